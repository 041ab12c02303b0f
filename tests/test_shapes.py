"""The shapes world: what it draws is what it says, the same everywhere, and test captions stay unseen."""

from __future__ import annotations

import hashlib
import math
import sys
from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from snapgen.data import shapes
from snapgen.data.shapes import (
    COLORS,
    INVERSE,
    MIXES,
    NUMBERS,
    RELATIONS,
    SHAPES,
    SKILLS,
    VOCABULARY,
    Scene,
    SceneObject,
    ShapesDataset,
    captions,
    describe,
    eval_captions,
    parse,
    render,
    render_batch,
    sample_scene,
    signed_distance,
    unknown_words,
)

KINDS = (*SKILLS, *MIXES)
indices = st.integers(0, 2**40)


def one(shape: str, radius: float = 0.16, x: float = 0.5, y: float = 0.5, angle: float = 0.0) -> Scene:
    black = SceneObject(shape, "black", (0.0, 0.0, 0.0), x, y, radius, angle)
    return Scene((black,), (1.0, 1.0, 1.0), f"a {shape}", "single_object")


# --- scenes ---


def test_scenes_are_pinned() -> None:
    """A change here is a change of the data set that the shipped checkpoint was trained on."""
    scenes = [sample_scene(i) for i in range(256)]
    digest = hashlib.sha256("\n".join(scene.caption for scene in scenes).encode()).hexdigest()
    assert digest[:16] == "65c79629c2681526"
    places = np.array([(o.x, o.y, o.radius, o.angle, *o.rgb) for scene in scenes for o in scene.objects])
    np.testing.assert_allclose(
        places.mean(0), [0.49155, 0.49694, 0.13961, 0.00480, 0.54789, 0.40484, 0.35818], atol=1e-4
    )
    assert render_batch(scenes[:32], 64).mean() == pytest.approx(222.383, abs=0.01)


@given(index=indices, seed=st.integers(-5, 5), split=st.sampled_from(("train", "test")))
@settings(max_examples=300, deadline=None)
def test_objects_lie_apart_inside_and_as_the_caption_says(index: int, seed: int, split: str) -> None:
    scene = sample_scene(index, seed=seed, split=split)
    assert scene == sample_scene(index, seed=seed, split=split)
    reach = [shapes._BOUND[o.shape] * o.radius for o in scene.objects]
    for o, bound in zip(scene.objects, reach, strict=True):
        assert min(o.x, o.y, 1 - o.x, 1 - o.y) - bound >= 0.02 - 1e-9
        assert abs(o.angle) <= math.radians(8)
        assert max(abs(a - b) for a, b in zip(o.rgb, COLORS[o.color], strict=True)) <= 0.03 + 1e-9
    for (a, p), (b, q) in combinations(zip(scene.objects, reach, strict=True), 2):
        assert math.hypot(a.x - b.x, a.y - b.y) - p - q >= 0.06 - 1e-9
    assert all(0.85 <= c <= 0.985 for c in scene.background)

    spec = parse(scene.caption)
    assert spec.skill == scene.skill
    named = [(item.shape, item.color) for item in spec.objects for _ in range(item.number)]
    assert [o.shape for o in scene.objects] == [shape for shape, _ in named]
    assert all(color in (None, o.color) for o, (_, color) in zip(scene.objects, named, strict=True))
    if spec.objects[0].number > 1:
        assert len({o.color for o in scene.objects}) == 1
    if spec.relation:
        a, b = scene.objects
        dx, dy = a.x - b.x, a.y - b.y
        along = {"left of": -dx, "right of": dx, "above": -dy, "below": dy}[spec.relation]
        across = dy if spec.relation in ("left of", "right of") else dx
        assert along > 0
        assert abs(across) <= 0.4 * along + 1e-9


def test_training_shows_every_caption_kind_and_favours_the_harder() -> None:
    kinds = Counter(sample_scene(i, seed=4).skill for i in range(4000))
    assert set(kinds) == set(KINDS)
    assert min(kinds["position"], kinds["color_position"], kinds["counting"]) > 4000 / 8
    assert set(Counter(sample_scene(i, split="test").skill for i in range(200))) == set(SKILLS)
    with pytest.raises(ValueError, match="skill 'colour' is none of single_object"):
        sample_scene(0, skill="colour")
    with pytest.raises(ValueError, match="split 'val' is none of train, test"):
        sample_scene(0, split="val")


# --- captions ---


@pytest.mark.parametrize("kind", KINDS)
def test_held_out_captions_are_unseen_in_any_wording(kind: str) -> None:
    train, test = captions(kind, "train"), captions(kind, "test")
    if kind == "single_object":
        assert train == test and len(train) == 6
        return
    assert not set(train) & set(test)
    assert 0.08 <= len(test) / (len(train) + len(test)) <= 0.2
    for caption in test:
        spec = parse(caption)
        if len(spec.objects) == 2:
            swapped = shapes.Spec(spec.skill, spec.objects[::-1], INVERSE[spec.relation] if spec.relation else None)
            assert describe(swapped) in test
    seen = {sample_scene(i, seed=1, skill=kind).caption for i in range(1500)}
    assert seen <= set(train)
    assert {sample_scene(i, split="test", skill=kind).caption for i in range(300)} <= set(test)


def test_smallest_held_out_sets_are_varied() -> None:
    counts = [parse(c).objects[0] for c in captions("counting", "test")]
    assert {item.number for item in counts} == set(NUMBERS.values()) and len({item.shape for item in counts}) == 3
    assert {o.shape for c in captions("two_object", "test") for o in parse(c).objects} == set(SHAPES)
    assert Counter(parse(c).relation for c in captions("position", "test")) == dict.fromkeys(RELATIONS, 3)


@pytest.mark.parametrize("kind", KINDS)
def test_grammar_reads_its_own_captions(kind: str) -> None:
    everything = captions(kind, "train") + captions(kind, "test")
    for caption in everything:
        assert describe(parse(caption)) == caption
        assert parse(caption).skill == kind
        assert unknown_words(caption) == []
    if kind != "single_object":
        assert len(set(everything)) == len(everything)


def test_vocabulary_is_what_captions_use() -> None:
    used = {word for kind in KINDS for split in ("train", "test") for c in captions(kind, split) for word in c.split()}
    assert used == set(VOCABULARY) and len(VOCABULARY) == len(used)


@pytest.mark.parametrize(
    ("caption", "complaint"),
    [
        ("", "is not '<a"),
        ("red circle", "starts with none of a, an, two"),
        ("a dog", "'dog' after 'a' is none of circle, square"),
        ("a circles", "'circles' after 'a' is none of circle"),
        ("two circle", "'circle' after 'two' is none of circles"),
        ("five circles", "starts with none"),
        ("a brown circle", "'brown' is none of the colours red"),
        ("a circle and a circle", "two different shapes, not circle twice"),
        ("a red circle and a square", "a colour for both objects or for neither"),
        ("two circles and a square", "a pair has one object of each, not 2"),
        ("a circle and a square and a star", "is not '<a"),
        ("a circle beside a square", "is not '<a"),
        ("a circle left of", "is not '<a"),
    ],
)
def test_other_captions_are_refused_with_the_reason(caption: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        parse(caption)


@given(st.lists(st.sampled_from(VOCABULARY), max_size=8))
def test_any_word_order_is_read_or_refused(words: list[str]) -> None:
    try:
        spec = parse(" ".join(words))
    except ValueError:
        return
    assert parse(describe(spec)) == spec


def test_prompts_are_read_leniently_in_form_only() -> None:
    assert parse("A red Circle  left of an blue square.") == parse("a red circle left of a blue square")
    assert unknown_words("A purple dog, left of a Dog and a cat!") == ["dog", "cat"]


@pytest.mark.parametrize("skill", SKILLS)
def test_eval_captions_are_balanced_and_repeatable(skill: str) -> None:
    drawn = eval_captions(skill, 50, seed=3)
    assert drawn == eval_captions(skill, 50, seed=3) != eval_captions(skill, 50, seed=4)
    assert set(drawn) <= set(captions(skill, "test"))
    times = Counter(drawn).values()
    assert max(times) - min(times) <= 1
    assert eval_captions(skill, 0) == []


# --- drawing ---


def polygon(shape: str) -> list[tuple[float, float]]:
    """Corners of the shapes with straight edges, from their definition: independent of the distance formulas."""
    if shape == "square":
        return [(x * shapes._SQUARE, y * shapes._SQUARE) for x, y in ((-1, -1), (1, -1), (1, 1), (-1, 1))]
    if shape == "cross":
        a, b = shapes._ARM, shapes._CROSS
        quarter = [(a, -b), (a, -a), (b, -a)]
        return [(c * x - s * y, s * x + c * y) for c, s in ((1, 0), (0, 1), (-1, 0), (0, -1)) for x, y in quarter]
    radii = [shapes._TRIANGLE] * 3 if shape == "triangle" else [shapes._STAR, shapes._STAR_INNER] * 5
    turn = 2 * math.pi / len(radii)
    return [(r * math.sin(i * turn), -r * math.cos(i * turn)) for i, r in enumerate(radii)]


def inside_polygon(corners: list[tuple[float, float]], x: np.ndarray, y: np.ndarray) -> np.ndarray:
    odd = np.zeros(x.shape, bool)
    for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1], strict=True):
        if y0 != y1:
            odd ^= ((y0 > y) != (y1 > y)) & (x < x0 + (y - y0) * (x1 - x0) / (y1 - y0))
    return odd


@pytest.mark.parametrize("shape", SHAPES)
def test_signed_distance_agrees_with_geometry(shape: str) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.uniform(-1.5, 1.5, (2, 20000)).astype(np.float32)
    distance = signed_distance(shape, x, y)
    assert distance.dtype == np.float32
    clear = np.abs(distance) > 1e-4
    radius = np.hypot(x, y)
    if shape in ("circle", "ring"):
        inside = (radius < 1) & ((shape == "circle") | (radius > shapes._HOLE))
    else:
        inside = inside_polygon(polygon(shape), x, y)
    assert ((distance < 0) == inside)[clear].all()
    assert radius[distance < 0].max() <= shapes._BOUND[shape]
    step = np.float32(1e-2)  # a distance grows by at most the step taken
    assert np.abs(signed_distance(shape, x + step, y) - distance).max() <= 1.01 * step


@given(
    shape=st.sampled_from(SHAPES),
    radius=st.floats(0.11, 0.17),
    x=st.floats(0.3, 0.7),
    y=st.floats(0.3, 0.7),
    angle=st.floats(-0.14, 0.14),
    resolution=st.sampled_from((32, 64, 100)),
)
@settings(max_examples=60, deadline=None)
def test_anti_aliasing_keeps_the_area(
    shape: str, radius: float, x: float, y: float, angle: float, resolution: int
) -> None:
    corners = polygon(shape) if shape not in ("circle", "ring") else []
    pairs = zip(corners, corners[1:] + corners[:1], strict=True)
    exact = abs(sum(x0 * y1 - x1 * y0 for (x0, y0), (x1, y1) in pairs)) / 2
    exact = exact or math.pi * (1 - (shapes._HOLE**2 if shape == "ring" else 0))
    drawn = 1 - render(one(shape, radius, x, y, angle), resolution)[..., 0].mean() / 255
    assert drawn == pytest.approx(exact * radius**2, rel=0.04 if resolution > 32 else 0.08)


@given(index=indices)
@settings(max_examples=40, deadline=None)
def test_resolutions_show_one_scene(index: int) -> None:
    scene = sample_scene(index)
    coarse = render(scene, 64).astype(np.float32)
    fine = render(scene, 256).reshape(64, 4, 64, 4, 3).mean((1, 3))
    assert np.abs(coarse - fine).mean() < 0.5
    assert np.abs(coarse - fine).max() < 100  # one pixel holds the whole point of a star: 88 was seen in 3000 scenes


def test_a_picture_does_not_depend_on_its_batch() -> None:
    scenes = [sample_scene(i, seed=2) for i in range(40)]
    for resolution in (8, 33, 64):
        together = render_batch(scenes, resolution)
        assert together.shape == (40, resolution, resolution, 3) and together.dtype == np.uint8
        for scene, picture in zip(scenes, together, strict=True):
            np.testing.assert_array_equal(render(scene, resolution), picture)
    assert render_batch([], 16).shape == (0, 16, 16, 3)
    with pytest.raises(ValueError, match="resolution 4: at least 8"):
        render(scenes[0], 4)


def test_colours_keep_their_distance() -> None:
    palette = np.array(list(COLORS.values()))
    apart = np.linalg.norm(palette[:, None] - palette, axis=-1)[~np.eye(len(palette), dtype=bool)]
    assert apart.min() > 0.37
    for grey in (0.86, 0.98):
        assert np.linalg.norm(palette - grey, axis=1).min() > 0.36


# --- data set ---


def test_dataset_items_are_those_of_batches() -> None:
    data = ShapesDataset(resolution=32, seed=7, length=50)
    images, texts = data.batch([3, 49, 3])
    assert images.shape == (3, 3, 32, 32) and images.dtype == torch.float32 and images.is_contiguous()
    assert -1 <= images.min() < -0.3 and 0.6 < images.max() <= 1
    item = data[49]
    assert torch.equal(item["image"], images[1]) and item["caption"] == texts[1] and item["index"] == 49
    assert torch.equal(images[0], images[2])
    scene = sample_scene(49, seed=7)
    assert texts[1] == scene.caption
    restored = ((images[1].permute(1, 2, 0) + 1) * 127.5).round().to(torch.uint8).numpy()
    np.testing.assert_array_equal(restored, render(scene, 32))
    assert len(data) == 50
    for wrong in (-1, 50):
        with pytest.raises(IndexError, match=r"outside \[0, 50\)"):
            data[wrong]
    test = ShapesDataset(split="test", length=300)
    unseen = {c for skill in SKILLS for c in captions(skill, "test")}
    assert {sample_scene(i, split="test").caption for i in range(300)} <= unseen
    assert test[5]["caption"] in unseen


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [({"resolution": 4}, "resolution 4"), ({"split": "val"}, "split 'val'"), ({"length": 0}, "length 0")],
)
def test_dataset_refuses_bad_arguments(arguments: dict[str, object], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        ShapesDataset(**arguments)  # type: ignore[arg-type]


def test_contact_sheet_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["shapes", "--out", str(tmp_path / "grid.png"), "--n", "9"])
    shapes.main()
    assert [p.name for p in tmp_path.iterdir()] == ["grid.png"]
    with pytest.raises(ValueError, match="unknown file extension"):
        shapes.contact_sheet([sample_scene(0)], tmp_path / "grid.nothing")
    assert [p.name for p in tmp_path.iterdir()] == ["grid.png"]
