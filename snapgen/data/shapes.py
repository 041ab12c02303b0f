"""A captioned world of coloured shapes: real training input that needs no download.

Captions cover the six skills of GenEval (Ghosh et al., 2023): one object, two objects, counting, colours, position and
colour attribution. Training adds two richer mixes, a coloured position and a coloured count. A scene is a function of
(seed, split, index) alone and lives in unit coordinates (x to the right, y down), so any resolution can be drawn.

Held-out captions: of each combinatorial kind about a tenth (at least three) never occurs in split "train", and split
"test" draws from these only. They are chosen by hash and by meaning, not by wording: "a circle left of a star" and
"a star right of a circle" are both held out or neither is. A caption of another kind may still show training the same
arrangement with more said about it ("two red stars" while "two stars" is held out). `single_object` has six captions,
too few to hold any out, so train and test share them.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import itertools
import math
import os
import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypedDict

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
PLURALS = {"circle": "circles", "square": "squares", "triangle": "triangles", "star": "stars", "cross": "crosses",
           "ring": "rings"}  # fmt: skip
COLORS: dict[str, tuple[float, float, float]] = {  # RGB in [0, 1]; 0.37 or more apart, 0.36 from any ground
    "red": (0.84, 0.10, 0.12),
    "orange": (0.96, 0.48, 0.05),
    "yellow": (0.97, 0.85, 0.12),
    "green": (0.12, 0.60, 0.25),
    "blue": (0.12, 0.34, 0.86),
    "purple": (0.48, 0.16, 0.66),
    "pink": (0.97, 0.52, 0.75),
    "black": (0.09, 0.09, 0.10),
}
NUMBERS = {"two": 2, "three": 3, "four": 4}
RELATIONS = ("left of", "right of", "above", "below")
INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
SKILLS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
MIXES = ("color_position", "color_counting")
SPLITS = ("train", "test")

VOCABULARY: tuple[str, ...] = ("a", "an", "and", "left", "right", "of", "above", "below", *NUMBERS, *COLORS, *SHAPES,
                               *PLURALS.values())  # fmt: skip

# How often training shows each kind: relations most, for a model learns them last, and the rest from them as well.
_TRAIN_WEIGHTS = {"single_object": 0.03, "two_object": 0.08, "counting": 0.16, "colors": 0.04, "position": 0.24,
                  "color_attr": 0.08, "color_position": 0.28, "color_counting": 0.09}  # fmt: skip
_HELD_OUT_SHARE, _HELD_OUT_LEAST = 0.1, 3
_SALT = 67619  # chosen so that the smallest held-out sets (three counts, three pairs, five colours) repeat no word

_MARGIN = 0.06  # least gap between two objects' bounding circles: 4 px of 64, so that a blurry picture keeps them apart
_BORDER = 0.02  # least gap between a bounding circle and the edge of the canvas
_RADII = {1: (0.130, 0.175), 2: (0.125, 0.165), 3: (0.115, 0.145), 4: (0.110, 0.135)}  # by number of objects
_COLOR_JITTER, _TILT = 0.03, math.radians(8)

# Outlines in units of the nominal radius, chosen so that all shapes look about equally large.
_SQUARE, _TRIANGLE, _STAR, _STAR_INNER, _CROSS, _ARM, _HOLE = 0.88, 1.30, 1.28, 0.54, 1.06, 0.34, 0.54
_BOUND = {"circle": 1.0, "square": _SQUARE * math.sqrt(2), "triangle": _TRIANGLE, "star": _STAR,
          "cross": math.hypot(_CROSS, _ARM), "ring": 1.0}  # fmt: skip

Float = NDArray[np.float32]
Image = NDArray[np.uint8]


# --- captions -------------------------------------------------------------------------------------------------------


class ObjectSpec(NamedTuple):
    shape: str
    color: str | None  # None: the caption leaves it open
    number: int


@dataclass(frozen=True)
class Spec:
    """What a caption asks for: `relation` (one of RELATIONS) is that of the first object to the second."""

    skill: str
    objects: tuple[ObjectSpec, ...]
    relation: str | None = None


def unknown_words(prompt: str) -> list[str]:
    """Words of `prompt` that no caption of the shapes world contains, in order, each once."""
    words = (word.strip(".,;:!?\"'").lower() for word in prompt.split())
    return list(dict.fromkeys(word for word in words if word and word not in VOCABULARY))


def describe(spec: Spec) -> str:
    """The caption of `spec`; `parse` reads it back."""
    phrases = []
    for shape, color, number in spec.objects:
        noun = shape if number == 1 else PLURALS[shape]
        named = f"{color} {noun}" if color else noun
        article = "an" if named[0] in "aeiou" else "a"
        phrases.append(f"{article if number == 1 else next(w for w, n in NUMBERS.items() if n == number)} {named}")
    return f" {spec.relation or 'and'} ".join(phrases)


def _parse_phrase(words: list[str], caption: str) -> ObjectSpec:
    text = " ".join(words)
    if not 2 <= len(words) <= 3:
        raise ValueError(f"caption {caption!r}: {text!r} is not '<a|an|two|three|four> [colour] <shape>'")
    if words[0] not in ("a", "an") and words[0] not in NUMBERS:
        raise ValueError(f"caption {caption!r}: {text!r} starts with none of a, an, {', '.join(NUMBERS)}")
    number = NUMBERS.get(words[0], 1)
    color = words[1] if len(words) == 3 else None
    if color is not None and color not in COLORS:
        raise ValueError(f"caption {caption!r}: {color!r} is none of the colours {', '.join(COLORS)}")
    nouns = {name: name for name in SHAPES} if number == 1 else {plural: name for name, plural in PLURALS.items()}
    if words[-1] not in nouns:
        raise ValueError(f"caption {caption!r}: {words[-1]!r} after {words[0]!r} is none of {', '.join(nouns)}")
    return ObjectSpec(nouns[words[-1]], color, number)


def parse(caption: str) -> Spec:
    """Read a caption of the shapes world. Case, a final full stop and a/an are forgiven, nothing else is.

    Raises ValueError, naming the part that does not fit, for any text outside the grammar.
    """
    words = caption.lower().strip().removesuffix(".").split()
    text = " ".join(words)
    for link in ("and", *RELATIONS):
        head, found, tail = text.partition(f" {link} ")
        if found:
            break
    else:
        only = _parse_phrase(words, caption)
        if only.number > 1:
            return Spec("color_counting" if only.color else "counting", (only,))
        return Spec("colors" if only.color else "single_object", (only,))
    pair = (_parse_phrase(head.split(), caption), _parse_phrase(tail.split(), caption))
    if pair[0].number > 1 or pair[1].number > 1:
        raise ValueError(f"caption {caption!r}: a pair has one object of each, not {max(o.number for o in pair)}")
    if pair[0].shape == pair[1].shape:
        raise ValueError(f"caption {caption!r}: a pair has two different shapes, not {pair[0].shape} twice")
    if (pair[0].color is None) != (pair[1].color is None):
        raise ValueError(f"caption {caption!r}: give a colour for both objects or for neither")
    if link == "and":
        return Spec("color_attr" if pair[0].color else "two_object", pair)
    return Spec("color_position" if pair[0].color else "position", pair, link)


def _specs(skill: str) -> list[Spec]:
    """Every caption of one kind. Colours of a pair differ, as in GenEval."""
    shape_pairs = list(itertools.permutations(SHAPES, 2))
    colors: Sequence[str | None] = tuple(COLORS) if skill.startswith("color") else (None,)
    if skill in ("single_object", "colors"):
        return [Spec(skill, (ObjectSpec(s, c, 1),)) for s in SHAPES for c in colors]
    if skill in ("counting", "color_counting"):
        return [Spec(skill, (ObjectSpec(s, c, n),)) for s in SHAPES for c in colors for n in NUMBERS.values()]
    relations: Sequence[str | None] = RELATIONS if skill in ("position", "color_position") else (None,)
    color_pairs = [(c, d) for c in colors for d in colors if c is None or c != d]
    return [
        Spec(skill, (ObjectSpec(s, c, 1), ObjectSpec(t, d, 1)), relation)
        for (s, t), (c, d), relation in itertools.product(shape_pairs, color_pairs, relations)
    ]


def _meaning(spec: Spec) -> str:
    """One wording for all captions that ask for the same picture."""
    if len(spec.objects) == 1:
        return describe(spec)
    swapped = Spec(spec.skill, spec.objects[::-1], INVERSE[spec.relation] if spec.relation else None)
    return min(describe(spec), describe(swapped))


@functools.cache
def captions(skill: str, split: str = "train") -> tuple[str, ...]:
    """All captions of one kind (SKILLS or MIXES) that `split` may show, in a fixed order."""
    if skill not in _TRAIN_WEIGHTS:
        raise ValueError(f"skill {skill!r} is none of {', '.join(_TRAIN_WEIGHTS)}")
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is none of {', '.join(SPLITS)}")
    specs = _specs(skill)
    if skill == "single_object":
        return tuple(describe(spec) for spec in specs)
    meanings = sorted({_meaning(s) for s in specs}, key=lambda m: hashlib.sha256(f"{_SALT} {m}".encode()).digest())
    held_out = set(meanings[: max(_HELD_OUT_LEAST, round(_HELD_OUT_SHARE * len(meanings)))])
    return tuple(describe(spec) for spec in specs if (_meaning(spec) in held_out) == (split == "test"))


def eval_captions(skill: str, n: int, seed: int = 0) -> list[str]:
    """`n` captions of one skill that training never showed (single_object: all six), shuffled by `seed`.

    Where `n` exceeds what is held out, captions come round again, each equally often to within one.
    """
    pool, rng = captions(skill, "test"), _stream(seed, "eval", skill)
    drawn: list[str] = []
    while len(drawn) < n:
        drawn += sorted(pool, key=lambda _: rng.random())
    return drawn[:n]


# --- scenes ---------------------------------------------------------------------------------------------------------


class SceneObject(NamedTuple):
    shape: str
    color: str
    rgb: tuple[float, float, float]  # [0, 1], jittered about COLORS[color]
    x: float
    y: float
    radius: float  # nominal; the outline reaches up to 1.3 times as far
    angle: float  # radians


@dataclass(frozen=True)
class Scene:
    """Objects in unit coordinates on a plain ground, and the caption that they satisfy."""

    objects: tuple[SceneObject, ...]
    background: tuple[float, float, float]
    caption: str
    skill: str


def _stream(*key: object) -> random.Random:
    # Of random.Random only random() is used: the one method whose sequence Python promises to keep.
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return random.Random(int.from_bytes(digest, "little"))


def _place_pair(relation: str, bounds: list[float], rng: random.Random) -> list[tuple[float, float]]:
    """Two centres, the first in `relation` to the second: offset across at most 0.4 of that along."""
    first, second = bounds if relation in ("left of", "above") else bounds[::-1]
    room = 1 - 2 * _BORDER - first - second
    nearest = first + second + _MARGIN
    along = nearest + (room - nearest) * rng.random()
    across = 0.4 * along * (2 * rng.random() - 1)
    start = first + _BORDER + (room - along) * rng.random()
    low = max(first + _BORDER, second + _BORDER - across)
    high = min(1 - first - _BORDER, 1 - second - _BORDER - across)
    level = low + (high - low) * rng.random()
    centres = [(start, level), (start + along, level + across)]
    if relation in ("right of", "below"):
        centres.reverse()
    return centres if relation in ("left of", "right of") else [(y, x) for x, y in centres]


def _place_freely(bounds: list[float], rng: random.Random) -> list[tuple[float, float]] | None:
    """Centres without overlap, or None where an object found no room in 20 tries."""
    placed: list[tuple[float, float]] = []
    for i, bound in enumerate(bounds):
        span = 1 - 2 * (bound + _BORDER)
        for _ in range(20):
            x, y = bound + _BORDER + span * rng.random(), bound + _BORDER + span * rng.random()
            if all(math.hypot(x - u, y - v) >= bound + bounds[j] + _MARGIN for j, (u, v) in enumerate(placed)):
                placed.append((x, y))
                break
        if len(placed) == i:
            return None
    return placed


def compose(caption: str, rng: random.Random) -> Scene:
    """A random scene that satisfies `caption`; what the caption leaves open is drawn from `rng`."""
    spec = parse(caption)
    names = tuple(COLORS)
    wanted = []
    for shape, color, number in spec.objects:
        color = color or names[int(rng.random() * len(names))]
        wanted += [(shape, color)] * number
    low, high = _RADII[len(wanted)]
    centres = None
    while centres is None:
        radii = [low + (high - low) * rng.random() for _ in wanted]
        bounds = [_BOUND[shape] * radius for (shape, _), radius in zip(wanted, radii, strict=True)]
        centres = _place_pair(spec.relation, bounds, rng) if spec.relation else _place_freely(bounds, rng)
    objects = []
    for (shape, color), radius, (x, y) in zip(wanted, radii, centres, strict=True):
        red, green, blue = (min(1.0, max(0.0, c + _COLOR_JITTER * (2 * rng.random() - 1))) for c in COLORS[color])
        objects.append(SceneObject(shape, color, (red, green, blue), x, y, radius, _TILT * (2 * rng.random() - 1)))
    grey = 0.87 + 0.10 * rng.random()
    r, g, b = (grey + 0.01 * (2 * rng.random() - 1) for _ in range(3))
    return Scene(tuple(objects), (r, g, b), caption, spec.skill)


def sample_scene(index: int, *, seed: int = 0, split: str = "train", skill: str | None = None) -> Scene:
    """Scene number `index`: the same for the same arguments on every machine.

    skill None draws one: in split "train" of all eight kinds by training weight, in "test" of the six SKILLS evenly.
    """
    rng = _stream(seed, split, index, skill)
    if skill is None:
        draw = rng.random()
        if split == "train":
            skill = _KINDS[int(np.searchsorted(_CUMULATIVE, draw * _CUMULATIVE[-1], side="right"))]
        else:
            skill = SKILLS[int(draw * len(SKILLS))]
    pool = captions(skill, split)
    return compose(pool[int(rng.random() * len(pool))], rng)


_KINDS = tuple(_TRAIN_WEIGHTS)
_CUMULATIVE = np.cumsum(list(_TRAIN_WEIGHTS.values()))


# --- drawing --------------------------------------------------------------------------------------------------------


def signed_distance(shape: str, x: Float, y: Float) -> Float:
    """Distance to the outline of an upright `shape` of nominal radius 1, negative inside; y points down.

    Exact near straight edges and circles; corners are mitred (the distance is that to the nearer edge's line).
    """
    if shape == "circle":
        return np.sqrt(x * x + y * y) - np.float32(1)
    if shape == "ring":
        middle, half_width = np.float32((1 + _HOLE) / 2), np.float32((1 - _HOLE) / 2)
        return np.abs(np.sqrt(x * x + y * y) - middle) - half_width
    x = np.abs(x)
    if shape == "triangle":
        edge = np.float32(0.5 * _TRIANGLE)
        return np.maximum(y, np.float32(math.sqrt(0.75)) * x - np.float32(0.5) * y) - edge
    if shape == "star":
        # Fold the plane onto half a point: mirror at the y axis and at the line halfway to the next point, twice.
        sin, cos = np.float32(math.sin(math.pi / 5)), np.float32(math.cos(math.pi / 5))
        for _ in range(2):
            twice: Float = np.float32(2) * np.maximum(cos * x + sin * y, np.float32(0))
            x, y = np.abs(x - cos * twice), y - sin * twice
        run, rise = _STAR_INNER * math.sin(math.pi / 5), _STAR - _STAR_INNER * math.cos(math.pi / 5)
        length = math.hypot(run, rise)
        return np.float32(rise / length) * x - np.float32(run / length) * (y + np.float32(_STAR))
    y = np.abs(y)
    if shape == "square":
        return np.maximum(x, y) - np.float32(_SQUARE)
    if shape == "cross":
        return np.maximum(np.maximum(x, y) - np.float32(_CROSS), np.minimum(x, y) - np.float32(_ARM))
    raise ValueError(f"shape {shape!r} is none of {', '.join(SHAPES)}")


def render_batch(scenes: Sequence[Scene], resolution: int) -> Image:
    """Draw scenes: uint8 [B, resolution, resolution, 3].

    A pixel's coverage is clip(0.5 - sd * resolution, 0, 1) of the signed distance sd at its centre. All objects of one
    shape are computed together, each in a patch around it, and a picture does not depend on its batch.
    """
    if resolution < 8:
        raise ValueError(f"resolution {resolution}: at least 8 pixels are needed to draw a shape")
    ground: Float = np.array([scene.background for scene in scenes], np.float32).reshape(-1, 1, 1, 3)
    canvas: Float = np.broadcast_to(ground, (len(scenes), resolution, resolution, 3)).copy()
    groups: dict[str, list[tuple[int, SceneObject]]] = {}
    for b, scene in enumerate(scenes):
        for item in scene.objects:
            groups.setdefault(item.shape, []).append((b, item))
    for shape, members in groups.items():
        reach = max(item.radius for _, item in members) * _BOUND[shape] * resolution + 1
        size = min(2 * math.ceil(reach) + 1, resolution)
        rows = np.array([(o.x, o.y, o.radius, math.cos(o.angle), math.sin(o.angle)) for _, o in members], np.float32)
        x0, y0, radius, cos, sin = rows.T[:, :, None, None]
        left = np.clip(np.floor(x0 * resolution - size / 2 + 0.5).astype(np.int64), 0, resolution - size)
        top = np.clip(np.floor(y0 * resolution - size / 2 + 0.5).astype(np.int64), 0, resolution - size)
        steps = np.arange(size, dtype=np.float32) + np.float32(0.5)
        dx = (left.astype(np.float32) + steps) / np.float32(resolution) - x0  # [K, 1, S]
        dy = (top.astype(np.float32) + steps[:, None]) / np.float32(resolution) - y0  # [K, S, 1]
        u, v = (cos * dx + sin * dy) / radius, (cos * dy - sin * dx) / radius
        coverage = np.clip(np.float32(0.5) - signed_distance(shape, u, v) * (radius * np.float32(resolution)), 0, 1)
        for k, (b, item) in enumerate(members):
            window = canvas[b, top[k, 0, 0] : top[k, 0, 0] + size, left[k, 0, 0] : left[k, 0, 0] + size]
            window += coverage[k, :, :, None] * (np.array(item.rgb, np.float32) - ground[b, 0, 0])
    return (canvas * np.float32(255) + np.float32(0.5)).astype(np.uint8)


def render(scene: Scene, resolution: int) -> Image:
    """Draw one scene: uint8 [resolution, resolution, 3]."""
    return render_batch([scene], resolution)[0]


# --- the dataset ----------------------------------------------------------------------------------------------------


class Sample(TypedDict):
    image: Tensor  # float32 [3, H, W] in [-1, 1]
    caption: str
    index: int


class ShapesDataset:
    """Map-style dataset of `length` scenes; `batch` is several times faster than item by item."""

    procedural = True  # scenes are independent of each other: reading them in order is as good as shuffled

    def __init__(self, resolution: int = 64, seed: int = 0, split: str = "train", length: int = 1_000_000) -> None:
        if resolution < 8:
            raise ValueError(f"resolution {resolution}: at least 8 pixels are needed to draw a shape")
        if split not in SPLITS:
            raise ValueError(f"split {split!r} is none of {', '.join(SPLITS)}")
        if length < 1:
            raise ValueError(f"length {length}: must be at least 1")
        self.resolution, self.seed, self.split, self.length = resolution, seed, split, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        images, texts = self.batch([index])
        return {"image": images[0], "caption": texts[0], "index": index}

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, list[str]]:
        """Scenes `indices` as images, float32 [B, 3, H, W] in [-1, 1], and captions."""
        import torch  # here, so that drawing and checking need numpy alone

        for index in indices:
            if not 0 <= index < self.length:
                raise IndexError(f"index {index} is outside [0, {self.length})")
        scenes = [sample_scene(int(i), seed=self.seed, split=self.split) for i in indices]
        pixels = torch.from_numpy(render_batch(scenes, self.resolution)).permute(0, 3, 1, 2)
        images = pixels.to(torch.float32, memory_format=torch.contiguous_format).div_(127.5).sub_(1.0)
        return images, [scene.caption for scene in scenes]


# --- contact sheet --------------------------------------------------------------------------------------------------


def contact_sheet(scenes: Sequence[Scene], path: Path, *, resolution: int = 144, columns: int = 8) -> None:
    """Draw scenes with their captions underneath into one picture file, which appears whole or not at all."""
    from PIL import Image as PILImage
    from PIL import ImageDraw, ImageFont

    gap, footer, font = 14, 34, ImageFont.load_default(size=12)
    rows = math.ceil(len(scenes) / columns)
    sheet = PILImage.new("RGB", (gap + columns * (resolution + gap), gap + rows * (resolution + footer + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (scene, pixels) in enumerate(zip(scenes, render_batch(scenes, resolution), strict=True)):
        x, y = gap + i % columns * (resolution + gap), gap + i // columns * (resolution + footer + gap)
        sheet.paste(PILImage.fromarray(pixels), (x, y))
        lines = [""]
        for word in scene.caption.split():
            joined = f"{lines[-1]} {word}".strip()
            lines = [*lines[:-1], joined] if draw.textlength(joined, font) <= resolution else [*lines, word]
        for n, line in enumerate(lines):
            draw.text((x + resolution / 2, y + resolution + 4 + 15 * n), line, fill="#333333", font=font, anchor="ma")
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=path.suffix)
    os.close(handle)
    try:
        sheet.save(temporary)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw a contact sheet of the shapes world with its captions.")
    parser.add_argument("--out", type=Path, required=True, help="picture file to write (.png, .jpg, .webp)")
    parser.add_argument("--n", type=int, default=64, help="number of scenes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--split", choices=SPLITS, default="train")
    args = parser.parse_args()
    contact_sheet([sample_scene(i, seed=args.seed, split=args.split) for i in range(args.n)], args.out)
    print(f"{args.out}: {args.n} scenes of split {args.split!r}")


if __name__ == "__main__":
    main()
