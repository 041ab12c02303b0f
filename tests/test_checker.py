"""The checker: always right on clean pictures, at the stated rates on degraded ones, and not to be talked round."""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from PIL import Image

from snapgen.checker import UNKNOWN, check, find_objects, label_components, relation_holds, score
from snapgen.data.shapes import (
    COLORS,
    NUMBERS,
    RELATIONS,
    SHAPES,
    SKILLS,
    Scene,
    SceneObject,
    Spec,
    describe,
    parse,
    render,
    render_batch,
    sample_scene,
)

Picture = NDArray[np.uint8]
Degrade = Callable[[Picture, np.random.Generator], Picture]


def noisy(sigma: float) -> Degrade:
    return lambda image, rng: np.clip(image + rng.normal(0, sigma, image.shape) + 0.5, 0, 255).astype(np.uint8)


def blurred(sigma: float) -> Degrade:
    taps = np.arange(-6, 7)
    kernel = np.exp(-0.5 * (taps / sigma) ** 2)
    kernel /= kernel.sum()

    def degrade(image: Picture, rng: np.random.Generator) -> Picture:
        rows = np.pad(image.astype(np.float64), ((6, 6), (6, 6), (0, 0)), mode="edge")
        rows = sum(w * rows[i : i + image.shape[0]] for i, w in enumerate(kernel))
        return np.clip(sum(w * rows[:, i : i + image.shape[1]] for i, w in enumerate(kernel)) + 0.5, 0, 255).astype(
            np.uint8
        )

    return degrade


def jpeg(quality: int) -> Degrade:
    def degrade(image: Picture, rng: np.random.Generator) -> Picture:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "JPEG", quality=quality)
        return np.asarray(Image.open(buffer))

    return degrade


def share_right(scenes: list[Scene], resolution: int, degrade: Degrade | None = None) -> float:
    """Share of pictures that satisfy their caption and in which exactly the drawn objects are found."""
    rng = np.random.default_rng(0)
    right = 0
    for scene in scenes:
        image = render(scene, resolution)
        result = check(degrade(image, rng) if degrade else image, scene.caption)
        drawn = sorted((o.shape, o.color) for o in scene.objects)
        right += result.correct and sorted((f.shape, f.color) for f in result.found) == drawn
    return right / len(scenes)


@pytest.mark.parametrize(
    ("resolution", "count"),
    [(64, 1500), (128, 600), (48, 150), (56, 150), (80, 150), (96, 150), (160, 150), (200, 150), (256, 150)],
)
def test_clean_pictures_are_always_right(resolution: int, count: int) -> None:
    assert share_right([sample_scene(i, seed=resolution) for i in range(count)], resolution) == 1


@pytest.mark.parametrize("skill", SKILLS)
def test_unseen_captions_are_always_right(skill: str) -> None:
    assert share_right([sample_scene(i, split="test", skill=skill) for i in range(50)], 64) == 1


@pytest.mark.parametrize(
    ("degrade", "floor"),
    [
        (noisy(8), 1),
        (noisy(16), 1),
        (noisy(32), 1),
        (blurred(0.5), 1),
        (blurred(1), 1),
        (blurred(1.5), 1),
        (blurred(2), 0.99),
        (jpeg(50), 0.99),
    ],
    ids=["noise8", "noise16", "noise32", "blur0.5", "blur1", "blur1.5", "blur2", "jpeg50"],
)
def test_degraded_pictures_are_right_at_the_stated_rate(degrade: Degrade, floor: float) -> None:
    assert share_right([sample_scene(i, seed=99) for i in range(200)], 64, degrade) >= floor


def test_places_and_sizes_are_measured() -> None:
    for resolution in (64, 150):
        for i in range(60):
            scene = sample_scene(i, seed=8, skill="color_attr")
            found = {f.shape: f for f in find_objects(render(scene, resolution))}
            for item in scene.objects:
                x, y = found[item.shape].center
                assert abs(x - item.x) < 0.012 and abs(y - item.y) < 0.012  # 0.8 px of 64
                assert 1.2 < found[item.shape].size / item.radius < 1.95


# --- contradictions ---


def contradictions(scene: Scene, choose: random.Random) -> list[str]:
    """Captions that differ from the scene's own in one respect, each false for it."""
    spec = parse(scene.caption)
    shapes, colors = {o.shape for o in scene.objects}, {o.color for o in scene.objects}
    wrong: list[Spec] = []
    for place, item in enumerate(spec.objects):
        changed = [item._replace(shape=choose.choice([s for s in SHAPES if s not in shapes]))]
        if item.color:
            changed.append(item._replace(color=choose.choice([c for c in COLORS if c not in colors])))
        if item.number > 1:
            changed.append(item._replace(number=choose.choice([n for n in NUMBERS.values() if n != item.number])))
        wrong += [replace(spec, objects=(*spec.objects[:place], new, *spec.objects[place + 1 :])) for new in changed]
    if spec.relation:
        wrong += [replace(spec, relation=other) for other in RELATIONS if other != spec.relation]
    if len(spec.objects) == 2 and spec.objects[0].color:
        first, second = spec.objects
        wrong.append(replace(spec, objects=(first._replace(color=second.color), second._replace(color=first.color))))
    return [describe(each) for each in wrong]


@pytest.mark.parametrize("degrade", [None, noisy(32), blurred(1.5)], ids=["clean", "noise32", "blur1.5"])
def test_contradicting_captions_are_rejected(degrade: Degrade | None) -> None:
    choose, rng = random.Random(1), np.random.default_rng(1)
    accepted = total = 0
    for i in range(250):
        scene = sample_scene(i, seed=21)
        image = render(scene, 64)
        wrong = contradictions(scene, choose)
        caption = choose.choice(wrong)
        total += 1
        accepted += check(degrade(image, rng) if degrade else image, caption).correct
    assert total == 250
    assert accepted == 0


@given(index=st.integers(0, 2**40), pick=st.integers(0, 2**31))
@settings(max_examples=100, deadline=None)
def test_any_scene_satisfies_its_caption_and_no_contradiction(index: int, pick: int) -> None:
    scene = sample_scene(index, seed=6)
    image = render(scene, 64)
    assert check(image, scene.caption).correct
    choose = random.Random(pick)
    wrong = choose.choice(contradictions(scene, choose))
    result = check(image, wrong)
    assert not result.correct, f"{scene.caption!r} passed as {wrong!r}"
    assert "seen: " in result.reason


# --- rules ---


def draw(*objects: tuple[str, str, float, float], radius: float = 0.13, resolution: int = 64) -> Picture:
    items = tuple(SceneObject(s, c, COLORS[c], x, y, radius, 0.0) for s, c, x, y in objects)
    return render_batch([Scene(items, (0.92, 0.92, 0.92), "", "")], resolution)[0]


def test_one_extra_object_is_forgiven_two_are_not() -> None:
    circle, star, ring = ("circle", "red", 0.2, 0.2), ("star", "blue", 0.8, 0.2), ("ring", "green", 0.5, 0.8)
    assert check(draw(circle), "a circle").correct
    assert check(draw(circle, star), "a circle").correct
    crowded = check(draw(circle, star, ring), "a circle")
    assert not crowded.correct
    assert crowded.reason == ("2 objects beyond what the caption names; seen: blue star, red circle, green ring")
    assert check(draw(circle, star, ring), "a red circle and a blue star").correct


def test_counts_are_exact() -> None:
    three = [("star", "blue", 0.2, 0.2), ("star", "blue", 0.8, 0.2), ("star", "blue", 0.5, 0.8)]
    assert check(draw(*three), "three stars").correct
    assert check(draw(*three), "three blue stars").correct
    assert check(draw(*three, ("circle", "red", 0.5, 0.45)), "three stars").correct
    for caption in ("two stars", "four stars", "three circles", "three red stars"):
        assert not check(draw(*three), caption).correct
    mixed = draw(*three[:2], ("star", "red", 0.5, 0.8))
    assert check(mixed, "three stars").correct
    assert check(mixed, "three blue stars").reason.startswith("not all stars are blue")


def test_relation_must_dominate() -> None:
    assert relation_holds("left of", (0.2, 0.5), (0.8, 0.6)) and relation_holds("above", (0.5, 0.2), (0.6, 0.8))
    assert relation_holds("right of", (0.8, 0.5), (0.2, 0.6)) and relation_holds("below", (0.5, 0.8), (0.6, 0.2))
    for relation in RELATIONS:
        assert not relation_holds(relation, (0.5, 0.5), (0.55, 0.55))  # too near
        assert not relation_holds(relation, (0.2, 0.2), (0.8, 0.8))  # diagonal
    assert not check(draw(("circle", "red", 0.2, 0.2), ("star", "blue", 0.7, 0.8)), "a circle left of a star").correct


def test_touching_objects_of_two_colours_are_two() -> None:
    found = find_objects(draw(("circle", "red", 0.37, 0.5), ("square", "blue", 0.6, 0.5)))
    assert {(f.shape, f.color) for f in found} == {("circle", "red"), ("square", "blue")}


def test_a_circle_of_two_colours_is_no_purple_circle() -> None:
    image = draw(("circle", "red", 0.5, 0.5))
    image[:, 32:] = draw(("circle", "blue", 0.5, 0.5))[:, 32:]
    assert not any(f.shape == "circle" for f in find_objects(image))
    assert not check(image, "a purple circle").correct


def test_odd_shapes_and_colours_are_unknown() -> None:
    image = np.full((64, 64, 3), 235, np.uint8)
    image[30:34, 8:56] = (214, 26, 31)  # a red bar
    assert [(f.shape, f.color) for f in find_objects(image)] == [(UNKNOWN, "red")]
    grey = draw(("circle", "black", 0.5, 0.5))
    grey = np.where(grey < 100, 130, grey).astype(np.uint8)
    assert [(f.shape, f.color) for f in find_objects(grey)] == [("circle", UNKNOWN)]


@given(arrays(np.uint8, st.tuples(st.integers(32, 40), st.integers(32, 90), st.just(3))))
@settings(max_examples=30, deadline=None)
def test_any_picture_gets_a_verdict(image: Picture) -> None:
    result = check(image, "a red circle")
    assert result.correct == any((f.shape, f.color) == ("circle", "red") for f in result.found[:2])
    assert all(0 <= f.center[0] <= 1 and 0 <= f.center[1] <= 1 and 0 <= f.confidence <= 1 for f in result.found)


def test_noise_and_empty_pictures_satisfy_nothing() -> None:
    static = np.random.default_rng(0).integers(0, 256, (20, 64, 64, 3), dtype=np.uint8)
    plain = np.full((1, 64, 64, 3), 240, np.uint8)
    for image in (*static, *plain):
        seen = {f.shape for f in find_objects(image)} - {UNKNOWN}  # a blob of static may resemble a shape by chance
        assert not any(check(image, f"a {shape}").correct for shape in seen)
    assert check(plain[0], "a circle").reason == "no circle; seen: nothing"


# --- inputs ---


def test_pictures_come_as_arrays_or_pil_of_any_shape() -> None:
    image = draw(("circle", "red", 0.3, 0.5), ("star", "blue", 0.7, 0.5), resolution=90)
    wide = np.concatenate([image[:, :10].repeat(5, 1), image], axis=1)
    for variant in (image, np.asfortranarray(image), wide, Image.fromarray(image), Image.fromarray(image, "RGB")):
        assert check(variant, "a red circle left of a blue star").correct
    assert check(Image.fromarray(image).convert("RGBA"), "a red circle left of a blue star").correct


@pytest.mark.parametrize(
    ("image", "complaint"),
    [
        (np.zeros((64, 64, 3), np.float32), r"must be uint8 \[H, W, 3\] or a PIL image, got float32 \[64, 64, 3\]"),
        (np.zeros((3, 64, 64), np.uint8), r"got uint8 \[3, 64, 64\]"),
        (np.zeros((64, 64), np.uint8), r"got uint8 \[64, 64\]"),
        (np.zeros((16, 64, 3), np.uint8), "64x16 pixels: the checker needs at least 32x32"),
    ],
)
def test_other_arrays_are_refused(image: Picture, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        check(image, "a circle")


def test_captions_outside_the_grammar_are_refused() -> None:
    with pytest.raises(ValueError, match="'dog'"):
        check(np.zeros((64, 64, 3), np.uint8), "a dog")


def test_score_weighs_skills_evenly() -> None:
    circle, star = draw(("circle", "red", 0.5, 0.5)), draw(("star", "blue", 0.5, 0.5))
    scores = score(
        [circle, circle, circle, star, star],
        ["a circle", "a circle", "a star", "a blue star", "two red stars"],
        ["single_object", "single_object", "single_object", "colors", "color_counting"],
    )
    assert scores == {
        "single_object": pytest.approx(2 / 3),
        "colors": 1,
        "color_counting": 0,
        "overall": pytest.approx(5 / 6),
    }
    with pytest.raises(ValueError, match="2 images, 1 captions, 1 skills"):
        score([circle, star], ["a circle"], ["single_object"])
    with pytest.raises(ValueError, match="none of single_object"):
        score([star], ["two red stars"], ["color_counting"])


# --- components ---


def flood(mask: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Connected components by flood fill: slow and plain."""
    labels = np.zeros(mask.shape, np.int64)
    for seed in zip(*np.nonzero(mask), strict=True):
        if labels[seed]:
            continue
        number, pending = labels.max() + 1, [seed]
        while pending:
            row, column = pending.pop()
            if not (0 <= row < mask.shape[0] and 0 <= column < mask.shape[1]):
                continue
            if mask[row, column] and not labels[row, column]:
                labels[row, column] = number
                pending += [(row + i, column + j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
    return labels


@given(arrays(np.bool_, st.tuples(st.integers(1, 12), st.integers(1, 14))))
@settings(max_examples=300, deadline=None)
def test_components_are_those_of_a_flood_fill(mask: NDArray[np.bool_]) -> None:
    labels, count = label_components(mask)
    expected = flood(mask)
    assert count == expected.max()
    np.testing.assert_array_equal(labels, expected)
