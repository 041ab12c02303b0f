"""k-means palettes and int8 against the best possible, theory, and their definitions."""

import numpy as np
import pytest

pytest.importorskip("coremltools", reason="the Core ML export is an optional part")

from snapgen.export.palette import Differences, Distinct, kmeans, palettize, quantize

pytestmark = [pytest.mark.export, pytest.mark.complete]  # with the rest of what compression is


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(shape) * 0.05).astype(np.float16)


def exact_kmeans(values: np.ndarray, counts: np.ndarray, size: int) -> float:
    """The least squared error of `size` clusters of sorted values, by dynamic programming over their ends."""
    number, total = np.cumsum(np.append(0, counts)), np.cumsum(np.append(0, counts * values))
    square = np.cumsum(np.append(0, counts * values**2))

    def cost(first: int, end: int) -> float:
        weight = number[end] - number[first]
        return square[end] - square[first] - (total[end] - total[first]) ** 2 / weight

    best = [cost(0, end) if end else 0.0 for end in range(len(values) + 1)]
    for _ in range(size - 1):
        best = [0.0] + [min(best[cut] + cost(cut, end) for cut in range(end)) for end in range(1, len(values) + 1)]
    return best[-1]


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_kmeans_is_near_the_best_possible(bits):
    generator = np.random.default_rng(bits)
    # Normal with a tenth of far values: weights with outliers. Rounded, so that values repeat.
    rows = np.where(generator.random((1, 400)) < 0.1, 6, 1) * generator.standard_normal((1, 400))
    distinct = Distinct.of((rows * 8).round().astype(np.float16) / 8)
    lut = kmeans(distinct, bits)
    error = (distinct.counts * (lut[0, distinct.nearest(lut)] - distinct.values) ** 2).sum()
    best = exact_kmeans(distinct.values, distinct.counts, 1 << bits)
    assert best * 0.999 <= error <= best * 1.001  # levels are rounded to fp16


def test_a_far_value_takes_no_levels_from_the_others():
    weights = normal(1, 4000)
    alone = palettize(weights, 4)
    weights[0, 7] = 60000
    palette = palettize(weights, 4)
    kept = np.delete(weights[0].astype(np.float64), 7)
    near = np.delete(palette.lut[0].astype(np.float64)[palette.indices[0]], 7)
    before = np.delete(alone.lut[0].astype(np.float64)[alone.indices[0]], 7)
    assert palette.lut[0, palette.indices[0, 7]] == np.float16(60000)
    assert np.square(near - kept).mean() < 1.3 * np.square(before - kept).mean()


@pytest.mark.parametrize(("bits", "decibels"), [(2, 9.30), (3, 14.62), (4, 20.22), (6, 31.89), (8, 43.78)])
def test_normal_weights_lose_what_theory_says(bits, decibels):
    """Signal to noise of the Lloyd-Max quantizer of a normal variable (Max 1960, Jayant and Noll 1984)."""
    weights = normal(512, 512)
    palette = palettize(weights, bits)
    exact = weights.astype(np.float64)
    noise = np.square(palette.lut[0].astype(np.float64)[palette.indices] - exact).mean()
    assert 10 * np.log10(np.square(exact).mean() / noise) == pytest.approx(decibels, abs=0.3)


@pytest.mark.parametrize("groups", [1, 3, 96])
def test_every_weight_takes_the_nearest_entry_of_its_group(groups):
    weights = normal(96, 20, 3, 3) * np.linspace(0.2, 30, 96).astype(np.float16)[:, None, None, None]
    weights[0, 0, 0, :2] = 0.0, -0.0
    palette = palettize(weights, 4, groups)
    assert palette.lut.shape == (groups, 16) and palette.lut.dtype == np.float16
    assert palette.indices.shape == weights.shape and (np.diff(palette.lut.astype(np.float32)) >= 0).all()
    rows = weights.reshape(groups, -1).astype(np.float64)
    distance = np.abs(rows[:, :, None] - palette.lut.astype(np.float64)[:, None])
    taken = np.take_along_axis(distance, palette.indices.reshape(groups, -1, 1).astype(np.int64), 2)[..., 0]
    assert np.array_equal(taken, distance.min(axis=2))


def test_few_values_are_kept_exactly():
    weights = np.array([[0.5, -2.0, 0.5, 7.0], [1.0, 1.0, 1.0, 1.0]], np.float16)
    for groups in (1, 2):
        palette = palettize(weights, 2, groups)
        rows = palette.indices.reshape(groups, -1).astype(np.int64)
        assert np.array_equal(np.take_along_axis(palette.lut, rows, 1).reshape(weights.shape), weights)
    integers, scale = quantize(np.zeros((2, 3), np.float16))
    assert not integers.any() and np.isfinite(scale).all()


@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_weights_beyond_fp16_are_refused(bad):
    weights = normal(4, 4)
    weights[1, 2] = bad
    for how in (lambda: palettize(weights, 4), lambda: quantize(weights)):
        with pytest.raises(ValueError, match="weights: some are not finite in fp16"):
            how()


@pytest.mark.parametrize("choices", [{8: 1, 4: 1}, {8: 2, 4: 8, 3: 1, 2: 8}, {6: 25, 3: 100}])
def test_projections_are_inner_products(choices):
    weights = normal(800, 12)
    gradient = np.random.default_rng(5).standard_normal(weights.shape).astype(np.float32)
    found = Differences(weights, choices).project(weights, gradient)
    for value, (bits, groups) in zip(found, choices.items(), strict=True):
        palette = palettize(weights, bits, groups)
        indices = palette.indices.reshape(groups, -1).astype(np.int64)
        change = np.take_along_axis(palette.lut.astype(np.float64), indices, 1).reshape(weights.shape) - weights
        assert value == pytest.approx((change * gradient).sum(), rel=1e-5, abs=1e-6)


def test_int8_is_off_by_half_a_step():
    weight = normal(64, 300) * np.linspace(0.01, 50, 64).astype(np.float16)[:, None]
    integers, scale = quantize(weight)
    exact = weight.astype(np.float64)
    assert np.abs(integers).max() == 127
    bound = 0.5 * scale.astype(np.float64)[:, None] + 127 * 2.0**-11 * scale.astype(np.float64)[:, None]
    assert (np.abs(integers * scale.astype(np.float64)[:, None] - exact) <= bound).all()
