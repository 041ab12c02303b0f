"""Does a picture show what its caption of the shapes world says? Exact where the picture is clean, firm where not.

The picture is cut into objects by their distance in colour from the plain ground; each object gets a colour (unmixed
from the ground, so that a blurred thin ring is still black and not grey) and a shape (overlap of its soft mask with
templates of equal centre and area). The caption is then judged as GenEval (Ghosh et al., 2023) does.

Right verdicts over 3,200 scenes of the training split, each against its own caption:

| picture | right | picture of 64 px | right |
|---|---|---|---|
| clean, 48, 56, 64, 80, 96, 128, 160, 200, 256 px | 100% | noise of sigma 8/255, 16/255, 32/255 | 100% |
| clean, 32 px | 99.97% | Gaussian blur of 0.5, 1, 1.5 px | 100% |
| | | Gaussian blur of 2 px | 99.9% |
| | | blur of 1 px and noise of sigma 16/255 | 100% |
| | | JPEG at quality 50 (chroma halved) | 99.9% |

None of 3,132 captions made wrong in one respect (shape, colour, count, relation, colours swapped) was accepted for
1,000 scenes, clean, noisy (32/255), blurred (1.5 px) or after JPEG. One core judges 200 to 300 pictures
of 64 px a second.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from snapgen.data.shapes import COLORS, PLURALS, SHAPES, SKILLS, Spec, describe, parse, signed_distance

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage

UNKNOWN = "unknown"  # a shape or colour unlike any of the world's

_WORKING = 64  # larger pictures are averaged down by whole factors to 64..127 px
_LEAST_CONTRAST = 0.22  # RGB distance from the ground of an object's core; the palest object of the world has 0.35
_LEAST_AREA = 0.004  # of the picture: smaller specks are no objects (the smallest shape covers 0.023)
_LEAST_OVERLAP = 0.80  # with the best template
_ONE_COLOR = 0.3  # RMS distance of a core from its mean colour: red and blue halves are 0.44 from theirs
_COLOR_TOLERANCE = 0.26  # RGB distance from the nearest palette colour
_MIXING_PRICE = 0.5  # in RGB distance: a blurred thin ring may hold 30% ground, but a grey circle is not black
_LEAST_OFFSET = 0.08  # of the picture's side, for a relation to hold
_EXTRAS = 1  # objects beyond those the caption names

Float = NDArray[np.float32]
Mask = NDArray[np.bool_]
Labels = NDArray[np.int64]


@dataclass(frozen=True)
class Found:
    """One object of a picture; lengths in units of the picture's sides, y down."""

    shape: str  # of SHAPES, or UNKNOWN
    color: str  # of COLORS, or UNKNOWN
    center: tuple[float, float]
    size: float  # square root of the area
    confidence: float  # overlap (IoU) of the soft mask with the best template, 0 to 1


@dataclass(frozen=True)
class Result:
    correct: bool
    reason: str
    found: list[Found]


# --- pixels ---------------------------------------------------------------------------------------------------------


def _pixels(image: NDArray[np.uint8] | PILImage) -> Float:
    """RGB in [0, 1], [H, W, 3], averaged down so that the shorter side has fewer than 128 pixels."""
    array = image if isinstance(image, np.ndarray) else np.asarray(image.convert("RGB"))
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise ValueError(f"image must be uint8 [H, W, 3] or a PIL image, got {array.dtype} {list(array.shape)}")
    height, width = array.shape[:2]
    if min(height, width) < 32:
        raise ValueError(f"image is {width}x{height} pixels: the checker needs at least 32x32")
    factor = min(height, width) // _WORKING
    if factor > 1:
        pad = ((0, -height % factor), (0, -width % factor), (0, 0))
        padded = np.pad(array, pad, mode="edge")
        blocks = padded.reshape(padded.shape[0] // factor, factor, padded.shape[1] // factor, factor, 3)
        return blocks.mean((1, 3), dtype=np.float32) / np.float32(255)
    return array.astype(np.float32) / np.float32(255)


def _smooth(image: Float) -> Float:
    """Binomial 3x3 blur of [H, W, C]."""
    padded = np.pad(image, ((1, 1), (1, 1), (0, 0)), mode="edge")
    rows = padded[:-2] + 2 * padded[1:-1] + padded[2:]
    return (rows[:, :-2] + 2 * rows[:, 1:-1] + rows[:, 2:]) * np.float32(1 / 16)


def _denoised(image: Float) -> Float:
    """Smoothed as far as the picture's own noise asks for; a clean picture is left as it is."""
    steps = np.abs(np.diff(image, axis=1))
    sigma = float(np.median(steps)) / (0.6745 * math.sqrt(2))  # objects' edges are too few to move the median
    for level in (2.5 / 255, 12 / 255):
        if sigma > level:
            image = _smooth(image)
    return image


def _ground(image: Float) -> Float:
    """Colour of the plain ground: the median, then the median of what is near it."""
    flat = image.reshape(-1, 3)
    center = np.median(flat, axis=0)
    near = np.abs(flat - center).sum(1) < 0.3
    refined: Float = np.median(flat[near], axis=0) if near.any() else center
    return refined.astype(np.float32)


def _shifted(values: NDArray, offset: int, dim: int) -> NDArray:
    """values[i + offset] along `dim`, zero beyond the edge."""
    result = np.zeros_like(values)
    length = values.shape[dim]
    target = [slice(None)] * values.ndim
    source = list(target)
    target[dim] = slice(max(0, -offset), length - max(0, offset))
    source[dim] = slice(max(0, offset), length - max(0, -offset))
    result[tuple(target)] = values[tuple(source)]
    return result


def label_components(mask: Mask) -> tuple[Labels, int]:
    """8-connected components of a mask [H, W]: labels 1..n in reading order, 0 outside, and n.

    Runs of a row are united with the runs that touch them in the row above.
    """
    height, width = mask.shape
    padded = np.zeros((height, width + 2), np.int8)
    padded[:, 1:-1] = mask
    edges = np.flatnonzero(np.diff(padded.ravel()))  # a run's pixels are edges[0] .. edges[1] - 1 in `padded` minus 1
    starts, stops = edges[::2], edges[1::2]
    stride = width + 2
    above_low = np.searchsorted(stops, starts - stride, side="left")
    above_high = np.searchsorted(starts, stops - stride, side="right")
    parent = list(range(len(starts)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for i, (low, high) in enumerate(zip(above_low.tolist(), above_high.tolist(), strict=True)):
        for j in range(low, high):
            a, b = root(i), root(j)
            parent[max(a, b)] = min(a, b)
    roots, numbers = np.unique(np.array([root(i) for i in range(len(parent))], np.int64), return_inverse=True)
    labels = np.zeros(height * stride, np.int64)
    for start, stop, number in zip(starts.tolist(), stops.tolist(), numbers.tolist(), strict=True):
        labels[start + 1 : stop + 1] = number + 1
    return labels.reshape(height, stride)[:, 1:-1], len(roots)


# --- colours --------------------------------------------------------------------------------------------------------


def _color_distances(rgb: Float, ground: Float) -> Float:
    """How far colours [N, 3] are from each palette colour, [N, K], some ground mixed in at a price."""
    palette = np.array(list(COLORS.values()), np.float32) - ground  # [K, 3]
    share = np.linspace(0.6, 1, 9, dtype=np.float32)[:, None, None]
    apart = np.linalg.norm((rgb - ground)[:, None, None] - share * palette, axis=-1)
    distances: Float = (apart + _MIXING_PRICE * (1 - share[..., 0])).min(1)
    return distances


# --- shapes ---------------------------------------------------------------------------------------------------------

_GRID = 28
_SOFTNESS = (0.05, 0.09, 0.14, 0.2, 0.26)  # blur of the templates, in nominal radii (7 to 11 pixels of 64)
_CORE = 0.6  # the pixels above this quantile of contrast are an object's core
_REACH = 1.0  # half the grid's side, in units of the square root of the object's area


def _template_grid(count: int) -> Float:
    return ((np.arange(count, dtype=np.float32) + np.float32(0.5)) / count * 2 - 1) * np.float32(_REACH)


def _resample(mask: Float) -> tuple[Float, tuple[float, float], float]:
    """A soft mask on the templates' grid (centre of mass at 0, area 1), its centre (x, y) and its area in pixels."""
    height, width = mask.shape
    area = float(mask.sum())
    x0 = float(mask.sum(0) @ np.arange(width)) / area
    y0 = float(mask.sum(1) @ np.arange(height)) / area
    steps = _template_grid(_GRID) * np.float32(math.sqrt(area))
    weights = []
    for center, length in ((y0, height), (x0, width)):  # bilinear, as a product with one matrix per axis
        weights.append(np.maximum(0, 1 - np.abs((center + steps)[:, None] - np.arange(length))).astype(np.float32))
    return weights[0] @ mask @ weights[1].T, (x0, y0), area


@functools.cache
def _templates() -> tuple[Float, list[str]]:
    """Masks [T, GRID^2] of every shape, tilted by up to 12 degrees, at five softnesses, and the shape of each.

    They are made as an object's mask is: blurred, scaled to the contrast of the core, put on the grid by `_resample`.
    """
    axis = np.linspace(-2, 2, 161, dtype=np.float32)  # in units of the nominal radius
    masks, names = [], []
    for shape in SHAPES:
        for degrees in range(-12, 13, 4) if shape not in ("circle", "ring") else (0,):
            cos, sin = np.float32(math.cos(math.radians(degrees))), np.float32(math.sin(math.radians(degrees)))
            x, y = np.meshgrid(axis, axis)
            sharp = np.clip(np.float32(0.5) - signed_distance(shape, cos * x + sin * y, cos * y - sin * x) * 40, 0, 1)
            for softness in _SOFTNESS:
                reach = axis[np.abs(axis) < 3 * softness + 0.01]
                kernel = np.exp(-0.5 * (reach / softness) ** 2) / np.exp(-0.5 * (reach / softness) ** 2).sum()
                soft = sharp
                for dim in (0, 1):
                    soft = np.apply_along_axis(np.convolve, dim, soft, kernel, mode="same")
                inside = soft[soft > 0.5 * soft.max()]
                core = inside[inside >= np.quantile(inside, _CORE)].mean()
                masks.append(_resample(np.minimum(soft / core, 1).astype(np.float32))[0].ravel())
                names.append(shape)
    return np.array(masks, np.float32), names


def _overlaps(mask: Float) -> tuple[str, float]:
    """The best template's shape and its soft IoU with a resampled mask."""
    templates, names = _templates()
    common = np.minimum(templates, mask.ravel()).sum(1)
    scores = common / (templates.sum(1) + mask.sum() - common)
    best = int(scores.argmax())
    return names[best], float(scores[best])


# --- objects --------------------------------------------------------------------------------------------------------


def _strongest_nearby(image: Float, ground: Float) -> Float:
    """For each pixel, the difference to the ground of the pixel within two that differs most: [H, W, 3]."""
    core = image - ground
    power = (core * core).sum(2)
    for dim in (0, 1):  # a maximum over a square is one over columns of one over rows
        shifts = [_shifted(power, offset, dim) for offset in range(-2, 3)]
        best = np.argmax(shifts, axis=0)
        power = np.take_along_axis(np.stack(shifts), best[None], 0)[0]
        where = np.clip(
            np.arange(power.shape[dim]).reshape((-1, 1) if dim == 0 else (1, -1)) + best - 2, 0, power.shape[dim] - 1
        )
        core = np.take_along_axis(core, where[..., None], dim)
    return core


def _dilate(mask: Mask) -> Mask:
    """Grown by two pixels to every side."""
    for dim in (0, 1):
        mask = np.logical_or.reduce([_shifted(mask, offset, dim) for offset in range(-2, 3)])
    return mask


def _describe_object(image: Float, ground: Float, own: Mask, others: Mask) -> tuple[Found, float]:
    """Shape, colour and place of the object with pixels `own`, and how far its core is from being of one colour."""
    rows, columns = np.flatnonzero(own.any(1)), np.flatnonzero(own.any(0))
    top, left = max(0, rows[0] - 2), max(0, columns[0] - 2)
    window = (slice(top, rows[-1] + 3), slice(left, columns[-1] + 3))
    patch, inside = image[window], own[window]
    colors = patch[inside]
    contrast = ((colors - ground) ** 2).sum(1)
    colors = colors[contrast >= np.quantile(contrast, _CORE)]
    core = colors.mean(0)
    spread = float(np.sqrt(((colors - core) ** 2).sum(1).mean()))
    axis = core - ground
    alpha = np.clip((patch - ground) @ (axis / (axis @ axis)), 0, 1)
    # The soft edge reaches outside `own`, but not into a neighbour.
    mask, (x, y), area = _resample(np.where(_dilate(inside) & ~others[window], alpha, 0).astype(np.float32))
    shape, overlap = _overlaps(mask)
    distances = _color_distances(core[None], ground)[0]
    color = list(COLORS)[int(distances.argmin())] if distances.min() <= _COLOR_TOLERANCE else UNKNOWN
    height, width = own.shape
    return Found(
        shape=shape if overlap >= _LEAST_OVERLAP else UNKNOWN,
        color=color,
        center=((left + x + 0.5) / width, (top + y + 0.5) / height),
        size=math.sqrt(area / (height * width)),
        confidence=overlap,
    ), spread


def _parts_by_color(colors: Float, ground: Float, own: Mask, least: float) -> list[Mask]:
    """Connected parts of `own` by nearest palette colour, for colours with a fifth of its pixels or more."""
    nearest = _color_distances(colors[own] + ground, ground).argmin(1)
    shares = np.bincount(nearest, minlength=len(COLORS))
    parts = []
    for index in np.flatnonzero(shares >= max(least, 0.2 * len(nearest))):
        mine = np.zeros_like(own)
        mine[own] = nearest == index
        labels, count = label_components(mine)
        parts += [part for part in (labels == k for k in range(1, count + 1)) if part.sum() >= least]
    return parts


def find_objects(image: NDArray[np.uint8] | PILImage) -> list[Found]:
    """The objects of a picture (uint8 [H, W, 3] or PIL, at least 32x32), in reading order of their topmost pixels.

    A pixel belongs to an object where it has at least half the contrast of the strongest pixel within two pixels: so
    edges lie where they should at any blur, for pale objects as for dark ones. A connected region that looks like no
    shape, or whose core is not of one colour, is cut by colour where that explains it better: two objects may touch.
    Raises ValueError for any other array.
    """
    picture = _denoised(_pixels(image))
    ground = _ground(picture)
    strongest = _strongest_nearby(picture, ground)
    power = (strongest * strongest).sum(2)
    mask = (power > _LEAST_CONTRAST**2) & (((picture - ground) * strongest).sum(2) > 0.5 * power)
    labels, count = label_components(mask)
    least = _LEAST_AREA * mask.size
    sizes = np.bincount(labels.ravel(), minlength=count + 1)
    found = []
    for label in range(1, count + 1):
        if sizes[label] < least:
            continue
        own = labels == label
        whole, spread = _describe_object(picture, ground, own, mask & ~own)
        if whole.shape == UNKNOWN or spread > _ONE_COLOR:
            parts = _parts_by_color(strongest, ground, own, least)
            pieces = [_describe_object(picture, ground, part, mask & ~part)[0] for part in parts]
            if len(pieces) > 1 and (spread > _ONE_COLOR or any(p.shape != UNKNOWN for p in pieces)):
                found += pieces
                continue
        found.append(whole)
    return found


# --- judging --------------------------------------------------------------------------------------------------------


def relation_holds(relation: str, first: tuple[float, float], second: tuple[float, float]) -> bool:
    """Whether the offset of two centres points the named way, and more so than along the other axis."""
    dx, dy = first[0] - second[0], first[1] - second[1]
    along, across = (dx, dy) if relation in ("left of", "right of") else (dy, dx)
    if relation in ("left of", "above"):
        along = -along
    return along > max(abs(across), _LEAST_OFFSET)


def _judge(spec: Spec, found: list[Found]) -> str:
    """Why the objects do not satisfy the caption; empty where they do."""
    wanted = sum(item.number for item in spec.objects)
    seen = ", ".join(f"{item.color} {item.shape}" for item in found) or "nothing"
    if len(spec.objects) == 1 and wanted > 1:
        shape, color, number = spec.objects[0]
        same = [item for item in found if item.shape == shape]
        if len(same) != number:
            return f"{shape}: {len(same)} instead of {number}; seen: {seen}"
        if color and any(item.color != color for item in same):
            return f"not all {PLURALS[shape]} are {color}; seen: {seen}"
    else:
        matches = []
        for shape, color, _ in spec.objects:
            same = [item for item in found if item.shape == shape]
            if not same:
                return f"no {shape}; seen: {seen}"
            matches.append([item for item in same if color is None or item.color == color])
            if not matches[-1]:
                return f"no {shape} is {color}; seen: {seen}"
        if spec.relation and not any(
            relation_holds(spec.relation, a.center, b.center) for a, b in itertools.product(*matches)
        ):
            return f"no {spec.objects[0].shape} is {spec.relation} a {spec.objects[1].shape}; seen: {seen}"
    if len(found) > wanted + _EXTRAS:
        return f"{len(found) - wanted} objects beyond what the caption names; seen: {seen}"
    return ""


def check(image: NDArray[np.uint8] | PILImage, caption: str) -> Result:
    """Judge a picture (uint8 [H, W, 3] or PIL, at least 32x32) by a caption of the shapes world.

    Every named object must be there with its shape and, where named, its colour; a count must be exact; a relation
    holds where the offset of the centres points its way more than along the other axis. One object more than the
    caption names is forgiven, two are not. Raises ValueError for another kind of image or caption.
    """
    spec = parse(caption)
    found = find_objects(image)
    reason = _judge(spec, found)
    return Result(not reason, reason or f"shows {describe(spec)}", found)


def score(
    images: Sequence[NDArray[np.uint8] | PILImage] | NDArray[np.uint8], captions: Sequence[str], skills: Sequence[str]
) -> dict[str, float]:
    """Share of correct pictures for each skill that occurs in `skills`, and their mean over SKILLS as "overall".

    As in GenEval every skill weighs the same in "overall", however many pictures it has; the training mixes get a
    figure of their own but do not enter it.
    """
    if not len(images) == len(captions) == len(skills):
        raise ValueError(f"{len(images)} images, {len(captions)} captions, {len(skills)} skills: must be equally many")
    outcomes: dict[str, list[bool]] = {}
    for image, caption, skill in zip(images, captions, skills, strict=True):
        outcomes.setdefault(skill, []).append(check(image, caption).correct)
    means = {skill: sum(values) / len(values) for skill, values in outcomes.items()}
    scored = [means[skill] for skill in SKILLS if skill in means]
    if not scored:
        raise ValueError(f"skills {sorted(outcomes)}: none of {', '.join(SKILLS)}")
    return {
        **{skill: means[skill] for skill in (*SKILLS, *means) if skill in means},
        "overall": sum(scored) / len(scored),
    }
