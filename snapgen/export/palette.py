"""Weights in fewer bits: k-means palettes and per-channel int8, by numpy alone.

A palette of b bits keeps 2^b values of a group of weights and, for each weight, the index of the nearest. Weights of a
package are fp16, so a group has at most 65,536 distinct values whatever its size: k-means runs on their histogram, in
one dimension, where clusters are intervals and an iteration is one binary search per boundary. It starts from the point
density of the best quantizer of many levels, the cube root of the weights' density (Panter and Dite 1951), or for few
levels from the best clusters that have their boundaries on a grid of that density, by dynamic programming: Lloyd's
algorithm alone then stops in a poor minimum where some weights lie far out. Nothing is drawn at random, so that a
repeat gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.generic]

_CODES = 1 << 16
_HISTOGRAMS = 64  # groups whose histograms are held at once: 32 MB
# Weights per bin of the density that k-means starts from, on average: with fewer, the bins' noise puts levels into the
# tails (32 instead of 128 cost 0.8 dB at 8 bits in groups of 28,672 normal weights).
_PER_BIN = 128
_BINS = 2048  # at most
_FEW = 16  # levels, up to which clusters are searched for on a grid
_GRID = 256
_ROUNDS = 200
_GAIN = (
    1e-4  # of the squared error in a round, below which k-means stops; a tenth of it saves 0.02 dB in twice the time
)


def _in_order() -> NDArray[np.uint16]:
    """The codes of the finite fp16 numbers, ascending by value."""
    codes = np.arange(_CODES, dtype=np.uint16)
    finite = codes[np.isfinite(codes.view(np.float16))]
    return finite[np.argsort(finite.view(np.float16), kind="stable")]


_ORDER = _in_order()


@dataclass(frozen=True)
class Distinct:
    """The distinct values of some groups of fp16 weights, ascending within each group."""

    groups: int
    group: NDArray[np.int64]  # [M], which group a value is of
    codes: NDArray[np.uint16]  # [M], the value's fp16 bits
    values: NDArray[np.float64]  # [M]
    counts: NDArray[np.int64]  # [M]

    @classmethod
    def of(cls, weights: Array) -> Distinct:
        """Of weights [groups, n] in fp16, all finite."""
        groups, count = weights.shape
        codes = weights.view(np.uint16).astype(np.int64) + _CODES * np.arange(groups)[:, None]
        histogram = np.bincount(codes.reshape(-1), minlength=groups * _CODES).reshape(groups, _CODES)[:, _ORDER]
        group, place = np.nonzero(histogram)
        counts = histogram[group, place]
        if counts.sum() != groups * count:
            raise ValueError("weights: some are not finite in fp16")
        chosen = _ORDER[place]
        return cls(groups, group, chosen, chosen.view(np.float16).astype(np.float64), counts)

    def nearest(self, lut: Array) -> NDArray[np.intp]:
        """For each value, the index of the nearest entry of its group's table [groups, k], ascending."""
        cuts, positions = self._cuts(lut.astype(np.float64))
        # Cuts of all groups before this one lie below: they count k - 1 each.
        return np.searchsorted(cuts, positions, side="right") - self.group * (lut.shape[1] - 1)

    def _cuts(self, levels: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Boundaries between the levels' intervals, and values, on one axis: group g is moved by g * span."""
        span = 4 * _CODES  # twice the range of fp16
        middles = (levels[:, 1:] + levels[:, :-1]) / 2 + span * np.arange(self.groups)[:, None]
        return middles.reshape(-1), self.values + span * self.group


def kmeans(distinct: Distinct, bits: int) -> NDArray[np.float16]:
    """Tables [groups, 2^bits], ascending, that make the squared error of each group small: Lloyd's algorithm.

    A group of no more than 2^bits values gets exactly those, the last repeated.
    """
    size = 1 << bits
    weights = distinct.counts.astype(np.float64)
    starts = np.searchsorted(distinct.group, np.arange(distinct.groups + 1))
    number = np.concatenate(([0.0], np.cumsum(weights)))
    total = np.concatenate(([0.0], np.cumsum(weights * distinct.values)))
    square = float((weights * distinct.values**2).sum())
    levels = np.empty((distinct.groups, size))
    for group, (start, end) in enumerate(zip(starts[:-1], starts[1:], strict=True)):
        levels[group] = _first_levels(distinct.values[start:end], weights[start:end], size)

    before = np.inf
    for _ in range(_ROUNDS):
        cuts, positions = distinct._cuts(levels)
        inner = np.searchsorted(positions, cuts, side="left").reshape(distinct.groups, size - 1)
        edges = np.concatenate((starts[:-1, None], inner, starts[1:, None]), axis=1)
        members, sums = np.diff(number[edges], axis=1), np.diff(total[edges], axis=1)
        levels = np.where(members > 0, sums / np.maximum(members, 1), levels)
        error = square - float((sums**2 / np.maximum(members, 1)).sum())
        if before - error <= _GAIN * abs(error):
            break
        before = error
    # An empty cluster stays where it was, which its neighbours may pass.
    return np.sort(levels, axis=1).astype(np.float16)


def _first_levels(values: NDArray[np.float64], weights: NDArray[np.float64], size: int) -> NDArray[np.float64]:
    if len(values) <= size:
        return np.concatenate((values, np.full(size - len(values), values[-1])))
    bins = int(np.clip(weights.sum() / _PER_BIN, 16, _BINS))
    density, edges = np.histogram(values, bins=bins, weights=weights)
    mass = np.concatenate(([0.0], np.cumsum(np.cbrt(density)))) / np.cbrt(density).sum()
    if size > _FEW:
        return np.interp((np.arange(size) + 0.5) / size, mass, edges)
    grid = np.searchsorted(values, np.interp(np.arange(1, _GRID) / _GRID, mass, edges))
    ends = np.unique(np.concatenate(([0, len(values)], grid)))
    if len(values) <= _GRID or len(ends) <= size:  # all boundaries, or as many: one far value can empty the grid
        ends = np.unique(np.linspace(0, len(values), min(len(values), _GRID) + 1).astype(np.int64))
    return _best_means(values, weights, ends, size)


def _best_means(
    values: NDArray[np.float64], weights: NDArray[np.float64], ends: NDArray[np.int64], size: int
) -> NDArray[np.float64]:
    """Means of the `size` clusters of least squared error among those with boundaries in `ends`."""
    number, total, square = (np.concatenate(([0.0], np.cumsum(weights * values**power)))[ends] for power in (0, 1, 2))
    last = len(ends) - 1
    with np.errstate(divide="ignore", invalid="ignore"):
        cost = square - square[:, None] - (total - total[:, None]) ** 2 / (number - number[:, None])
    cost[np.tril_indices(last + 1)] = np.inf  # [first, end]
    best = cost[0]
    cuts = []
    for _ in range(size - 1):
        sums = best[:, None] + cost
        cuts.append(sums.argmin(axis=0))
        best = sums[cuts[-1], np.arange(last + 1)]
    bounds = [last]
    for cut in reversed(cuts):
        bounds.append(int(cut[bounds[-1]]))
    edges = np.array([0, *bounds[:0:-1], last])
    return np.diff(total[edges]) / np.diff(number[edges])


@dataclass(frozen=True)
class Palette:
    """Weights as tables and indices."""

    lut: NDArray[np.float16]  # [groups, 2^bits]
    indices: NDArray[np.uint8]  # of the weights' shape


def palettize(weights: Array, bits: int, groups: int = 1) -> Palette:
    """k-means palettes of `bits` bits.

    Args:
        weights: fp16, at least 2-D.
        bits: 1 to 8.
        groups: tables, each for as many neighbouring slices along the first axis; must divide its size.

    Raises:
        ValueError: a weight is inf or NaN.
    """
    rows = weights.reshape(groups, -1)
    indices = np.empty(rows.shape, np.uint8)
    tables = []
    for part in _chunks(groups):
        distinct = Distinct.of(rows[part])
        lut = kmeans(distinct, bits)
        of_code = np.zeros((distinct.groups, _CODES), np.uint8)
        of_code[distinct.group, distinct.codes] = distinct.nearest(lut)
        for row, table in zip(range(part.start, part.stop), of_code, strict=True):
            indices[row] = table[rows[row].view(np.uint16)]
        tables.append(lut)
    return Palette(np.concatenate(tables), indices.reshape(weights.shape))


class Differences:
    """What some palettes would change in a tensor of weights, as a function of the weights' groups and values.

    `project(gradient)` is the inner product of a gradient with the change that each width makes: the gradient is summed
    over weights of one value, once for all widths.
    """

    def __init__(self, weights: Array, choices: dict[int, int]) -> None:
        """weights as in `palettize`; choices: bits -> groups, which must divide the largest number of them."""
        self.groups = max(choices.values())
        found = {
            groups: [(part.start, Distinct.of(weights.reshape(groups, -1)[part])) for part in _chunks(groups)]
            for groups in set(choices.values())
        }
        finest = found[self.groups]
        group = np.concatenate([distinct.group + start for start, distinct in finest])
        codes = np.concatenate([distinct.codes for _, distinct in finest])
        self._where = codes + _CODES * group
        self._changes = np.empty((len(choices), len(group)), np.float32)
        for row, (bits, groups) in zip(self._changes, choices.items(), strict=True):
            if self.groups % groups:
                raise ValueError(f"choices: {groups} groups do not divide {self.groups}")
            own = group // (self.groups // groups)  # ascending
            for start, distinct in found[groups]:
                lut = kmeans(distinct, bits)
                of_code = np.zeros((distinct.groups, _CODES), np.float32)
                of_code[distinct.group, distinct.codes] = lut[distinct.group, distinct.nearest(lut)] - distinct.values
                inside = slice(*np.searchsorted(own, (start, start + distinct.groups)))
                row[inside] = of_code[own[inside] - start, codes[inside]]

    def project(self, weights: Array, gradient: Array) -> NDArray[np.float64]:
        """[choices]: the sum over all weights of gradient times change; both of the weights' shape, weights in fp16."""
        rows = weights.reshape(self.groups, -1).view(np.uint16)
        codes = rows.astype(np.int64)
        if self.groups > 1:
            codes += _CODES * np.arange(self.groups)[:, None]
        sums = np.bincount(codes.reshape(-1), gradient.reshape(-1), minlength=self.groups * _CODES)
        return self._changes.astype(np.float64) @ sums[self._where]


def quantize(weights: Array) -> tuple[NDArray[np.int8], NDArray[np.float16]]:
    """Symmetric int8 with one scale per slice along the first axis: weights are about `integers * scale`.

    Returns:
        Integers in [-127, 127], of the weights' shape, and scales [first size].

    Raises:
        ValueError: a weight is inf or NaN.
    """
    if not np.isfinite(weights).all():
        raise ValueError("weights: some are not finite in fp16")
    rows = weights.reshape(weights.shape[0], -1).astype(np.float32)
    scale = (np.abs(rows).max(axis=1) / 127).astype(np.float16)
    scale[scale == 0] = 1  # a slice of zeros, or of less than fp16 holds a 127th of
    integers = np.rint(rows / scale.astype(np.float32)[:, None]).clip(-127, 127).astype(np.int8)
    return integers.reshape(weights.shape), scale


def _chunks(groups: int) -> Iterator[slice]:
    for start in range(0, groups, _HISTOGRAMS):
        yield slice(start, min(start + _HISTOGRAMS, groups))
