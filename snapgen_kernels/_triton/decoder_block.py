"""The decoder block's forward on the GPU; the contract is in ``snapgen_kernels/decoder_block.py``.

In units of one C-channel image, with e the expansion, by arithmetic: the op itself needs 2 units (x, y) and
2 P C (9 + e C + 9 e + e C) FLOPs for P pixels. Kernels joined through memory, at their own:

========================================  ======  ===================
kernel                                    reads   writes
========================================  ======  ===================
DW1                                       1       1
PW1                                       1       e
DW2, and the moments of what it writes    e       e
PW2 of SiLU(norm(.)), + x                 e + 1   1
========================================  ======  ===================

5 + 4 e units. At 1024x1024, C = 128, e = 3, bf16 a unit is 268 MB: 17 units take 1.06 ms at 4.3 TB/s, the 216 GFLOP
0.27 ms at 790 TFLOP/s, the op's own 2 units 0.12 ms. The norm stands between DW2 and PW2, so that nobody can multiply
what DW2 has not yet finished everywhere; its statistics cost no pass of their own, and what it gives is never stored.
PW2 can leave the moments of y for a norm that follows the block.

The same kernels on a band of rows at a time (:class:`Plan`) keep d1 and h1 in the L2 cache, and memory sees 3 + 2 e
units; but such a band is 3 launches for 16 us of the GPU (96 MB at 6 TB/s, e = 3), which is less than the CPU is taken
to need for them (50 us, ``costs.py``): the rule is the whole image, and ``warmup(tune=True)`` measures the other. The
middle image of 160 channels at 128x128, 16 MB, stays in an H200's cache as a whole.

``low_memory`` computes the middle twice: bands up to the moments alone, then bands to the end. Nothing of M channels
exists but two bands; 4 units are moved, and PW1 is multiplied twice. ``keep_middle`` hands DW2's image to the backward
(``decoder_block_backward.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from snapgen_kernels import costs
from snapgen_kernels._triton import common, tuning
from snapgen_kernels._triton.bands import Band, Plan, bands, plan_for
from snapgen_kernels._triton.common import new_channels_last
from snapgen_kernels._triton.depthwise import (
    DepthwiseConfig,
    Rows,
    Tiles,
    by_tap,
    depthwise,
    launch_scan,
    moments_configs,
    new_tiles,
    scanning,
)
from snapgen_kernels._triton.group_norm_silu import merge_moments
from snapgen_kernels._triton.normed_product import NormedProduct, affine_of
from snapgen_kernels._triton.pointwise import Moments, ProductConfig, new_moments, pointwise
from snapgen_kernels._triton.sepconv import into
from snapgen_kernels.decoder_block import Weights, new_outputs
from snapgen_kernels.decoding import Progress, Statistics
from snapgen_kernels.sepconv import is_channels_last, new_image

# Rows of a band are a multiple, so that tiles of moments are those of the whole image.
BAND = 16
# Bytes of the two middle images of a band where memory is short: few launches, and little beside x and y.
LOW_MEMORY = 64 << 20


def _plan(x: Tensor, middle: int, room: int) -> Plan:
    """Samples or rows whose two middle images take about ``room`` bytes; at least ``BAND`` rows."""
    batch, _, height, width = x.shape
    return plan_for(batch, height, 2 * middle * width * x.element_size(), room, BAND)


def plans(x: Tensor, middle: int, low_memory: bool) -> tuple[tuple[Plan, ...], Plan]:
    """The plans that a forward may follow, and the rule's."""
    if low_memory:
        short = _plan(x, middle, LOW_MEMORY)
        return (short,), short
    whole = Plan(x.shape[0], x.shape[2])
    return tuple(dict.fromkeys((whole, _plan(x, middle, 2 * costs.H200.cache)))), whole


class Block(NamedTuple):
    """A call: x in channels_last, its weights contiguous, the depthwise ones by tap."""

    x: Tensor
    weights: Weights
    taps1: Tensor
    taps2: Tensor
    num_groups: int
    eps: float

    def first(self, band: Band) -> tuple[Tensor, Rows]:
        """PW1(DW1(x)) of the rows that a band of DW2 needs, and where in it the band lies."""
        x = self.x[band.first : band.last]
        _, _, above, below = band.with_neighbours(x.shape[2])
        d1 = depthwise(x, self.taps1, self.weights.dw1_bias, None, 1, False, rows=Rows(above, below))
        return pointwise(d1, self.weights.pw1_weight), Rows(band.top - above, band.bottom - above, above)

    def second(self, h1: Tensor, rows: Rows, out: Tensor | None, tiles: Tiles | None, config: DepthwiseConfig) -> None:
        """DW2 of a band, into ``out`` and ``tiles``."""
        launch_scan(h1, self.taps2, self.weights.dw2_bias, None, rows, out, tiles, config)

    def before(self) -> tuple[Tensor, Tensor]:
        """d1 = DW1(x) and h1 = PW1(d1)."""
        d1 = depthwise(self.x, self.taps1, self.weights.dw1_bias, None, 1, False)
        return d1, pointwise(d1, self.weights.pw1_weight)

    def middle(self) -> Tensor:
        """DW2(h1)."""
        return depthwise(self.before()[1], self.taps2, self.weights.dw2_bias, None, 1, False)

    def moments_config(self, plan: Plan, stored: bool) -> DepthwiseConfig:
        """Of DW2 with moments. The whole image decides, so that every plan has the same tiles, and with them the same
        bits of the statistics."""
        x, middle = self.x, self.weights.dw2_bias.shape[0]
        batch, _, height, width = x.shape
        configs = moments_configs(x.dtype, torch.version.hip is None, width % 4 == 0)
        default = scanning(configs, batch, middle, height, width, common.processors(x))
        band = next(bands(plan, batch, height))

        def launch(config: DepthwiseConfig) -> None:
            h1 = new_channels_last(x, band.last - band.first, middle, band.bottom - band.top, width)
            out, tiles = torch.empty_like(h1) if stored else None, new_tiles(h1, middle, height, config)
            self.second(h1, Rows(0, h1.shape[2]), out, tiles, config)

        key = (str(x.dtype), batch, middle, height, width)
        return tuning.choose("depthwise_moments", key, configs, default, launch)


def _statistics(
    block: Block, plan: Plan, config: DepthwiseConfig, new: Callable[[], Tensor] | None
) -> tuple[Tensor | None, tuple[Tensor, ...]]:
    """The middle image, in what ``new`` makes, or None; mean, rstd, scale and offset of the norm."""
    batch, _, height, width = block.x.shape
    tiles = new_tiles(block.x, block.weights.dw2_bias.shape[0], height, config)
    h: Tensor | None = None
    for band in bands(plan, batch, height):
        h1, rows = block.first(band)
        if h is None and new is not None:
            h = new()  # not before the first depthwise image is gone
        some = tiles._replace(part=tiles.part[:, band.first : band.last])
        block.second(h1, rows, None if h is None else band.of(h), some, config)
        del h1  # the next one takes its place
    return h, affine_of(tiles, block.weights, block.num_groups, block.eps, height, width)


def _to_the_end(block: Block, product: NormedProduct, h: Tensor, y: Tensor, measured: bool) -> Moments | None:
    """y of a middle image that was kept."""
    config = product.config(h, block.x, y, measured)
    moments = new_moments(y, config.block_m) if measured else None
    product.launch(h, block.x, y, config, None if moments is None else moments.part)
    return moments


def _once_more(
    block: Block, plan: Plan, config: DepthwiseConfig, product: NormedProduct, y: Tensor, measured: bool
) -> Moments | None:
    """y of a middle image that was not kept; moments only where bands are whole tiles of them."""
    batch, _, height, width = block.x.shape
    chosen: ProductConfig | None = None  # the first band's, for all: tiles of moments have one size
    moments: Moments | None = None
    for band in bands(plan, batch, height):
        h1, rows = block.first(band)
        h2 = new_channels_last(h1, h1.shape[0], h1.shape[1], band.bottom - band.top, width)
        block.second(h1, rows, h2, None, config)
        del h1
        some, part = product.samples(band.first, band.last), None
        x_rows, y_rows = band.of(block.x), band.of(y)
        if chosen is None:
            chosen = some.config(h2, x_rows, y_rows, measured)
            if measured and (plan.rows == height or plan.rows * width % chosen.block_m == 0):
                moments = new_moments(y, chosen.block_m)
        if moments is not None:
            tile = band.top * width // chosen.block_m
            count = common.cdiv((band.bottom - band.top) * width, chosen.block_m)
            part = moments.part[:, band.first : band.last, tile : tile + count]
        some.launch(h2, x_rows, y_rows, chosen, part)
        del h2
    return moments


def prepared(x: Tensor, weights: Weights, num_groups: int, eps: float) -> Block:
    """A call with its tensors laid out as the kernels take them."""
    plain = Weights(*(weight.contiguous() for weight in weights))
    return Block(common.channels_last(x), plain, by_tap(plain.dw1_weight), by_tap(plain.dw2_weight), num_groups, eps)


class Result(NamedTuple):
    """What a forward leaves; ``moments``: of y, where they were asked for and bands are whole tiles."""

    y: Tensor
    middle: Tensor  # or nothing
    mean: Tensor
    rstd: Tensor
    moments: Moments | None


def run(
    x: Tensor, weights: Weights, num_groups: int, eps: float, low_memory: bool, keep_middle: bool, measured: bool
) -> Result:
    """The block of x, which has pixels, in the memory format of x; ``measured``: with the moments of y."""
    middle = weights.dw2_bias.shape[0]
    block = prepared(x, weights, num_groups, eps)
    candidates, default = plans(x, middle, low_memory and not keep_middle)
    # What fits one band is kept: it would take no less memory to compute it twice.
    twice = low_memory and not keep_middle and default != Plan(x.shape[0], x.shape[2])

    def follow(plan: Plan) -> Result:
        config = block.moments_config(plan, not twice)

        def new() -> Tensor:
            return new_channels_last(x, x.shape[0], middle, *x.shape[2:])

        h2, (mean, rstd, scale, offset) = _statistics(block, plan, config, None if twice else new)
        product = NormedProduct(block.weights.pw2_weight, scale, offset)
        y = new_image(x, *x.shape[1:])  # not before what is in front of the middle image is gone
        out = into(y)
        if h2 is None:
            found = _once_more(block, plan, config, product, out, measured)
        else:
            found = _to_the_end(block, product, h2, out, measured)
        kept = x.new_empty(0)
        if keep_middle and h2 is not None:
            kept = h2 if is_channels_last(x) else new_image(x, middle, *x.shape[2:]).copy_(h2)
        return Result(y if out is y else y.copy_(out), kept, mean, rstd, found)

    key = (str(x.dtype), *x.shape, middle, keep_middle, common.precision(x.dtype))
    return follow(tuning.choose("decoder_block", key, candidates, default, follow))


def forward(
    x: Tensor,
    dw1_weight: Tensor,
    dw1_bias: Tensor,
    pw1_weight: Tensor,
    dw2_weight: Tensor,
    dw2_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    pw2_weight: Tensor,
    num_groups: int,
    eps: float,
    low_memory: bool,
    keep_middle: bool,
) -> tuple[Tensor, ...]:
    """y, the middle image or nothing, mean and rstd; the arguments are those of ``snapgen::decoder_block``."""
    if x.numel() == 0:
        y, h, mean, rstd = new_outputs(x, dw2_bias.shape[0], num_groups, keep_middle)
        return y, h, mean.fill_(float("nan")), rstd.fill_(float("nan"))
    weights = Weights(dw1_weight, dw1_bias, pw1_weight, dw2_weight, dw2_bias, norm_weight, norm_bias, pw2_weight)
    return run(x, weights, num_groups, eps, low_memory, keep_middle, False)[:4]


def apply(
    x: Tensor,
    weights: Weights,
    num_groups: int,
    eps: float,
    memory: int | None,
    following: tuple[int, float] | None,
    progress: Progress | None,
) -> tuple[Tensor, Statistics | None]:
    """``snapgen_kernels.decoding.apply_block``, into new memory. ``following``: the next norm's groups, and what it
    adds to the variance."""
    if x.numel() == 0:
        return new_image(x, *x.shape[1:]), None
    low_memory = memory is not None and memory < x[:, :1].numel() * weights.dw2_bias.shape[0] * x.element_size()
    y, _, _, _, found = run(x, weights, num_groups, eps, low_memory, False, following is not None)
    if progress is not None:
        progress(1.0)
    if following is None or found is None:
        return y, None
    return y, merge_moments(found.part, x.shape[2] * x.shape[3], found.chunk, *following)
