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

The same kernels on a band of rows at a time (:class:`Plan`) keep d1 and h1 in the L2 cache, and memory sees 3 + 2 e
units; but such a band is 3 launches for 16 us of the GPU (96 MB at 6 TB/s, e = 3), which is less than the CPU is taken
to need for them (50 us, ``costs.py``): the rule is the whole image, and ``warmup(tune=True)`` measures the other. The
middle image of 160 channels at 128x128, 16 MB, stays in an H200's cache as a whole.

``low_memory`` computes the middle twice: bands up to the moments alone, then bands to the end. Nothing of M channels
exists but two bands; 4 units are moved, and PW1 is multiplied twice. ``keep_middle`` hands DW2's image to the backward
(``decoder_block_backward.py``).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from snapgen_kernels import costs
from snapgen_kernels._triton import common, tuning
from snapgen_kernels._triton.common import Build, new_channels_last, silu, silu_of_half
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
from snapgen_kernels._triton.group_norm_silu import MERGE_BLOCK
from snapgen_kernels._triton.pointwise import (
    ProductConfig,
    are_whole,
    filling,
    finish,
    only,
    pointwise,
    precisions,
    product_configs,
)
from snapgen_kernels._triton.sepconv import into
from snapgen_kernels.decoder_block import Weights, new_outputs

# Rows of a band are a multiple, so that tiles of moments are those of the whole image.
BAND = 16
# Bytes of the two middle images of a band where memory is short: few launches, and little beside x and y.
LOW_MEMORY = 64 << 20


class Plan(NamedTuple):
    """``samples`` samples at a time, or ``rows`` rows of one sample."""

    samples: int
    rows: int


class Band(NamedTuple):
    """Samples ``first`` to ``last``, and their rows ``top`` to ``bottom``."""

    first: int
    last: int
    top: int
    bottom: int


# ---- kernels ---------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["H", "W", "rows", "columns", "tiles"])
def merge_tiles_kernel(
    p_part,
    p_m2,
    p_gamma,
    p_beta,
    p_mean,
    p_rstd,
    p_scale,
    p_offset,
    C,
    H,
    W,
    G,
    rows,
    columns,
    tiles,
    eps,
    CG: tl.constexpr,
    BLOCK_CG: tl.constexpr,
    BLOCK: tl.constexpr,
    FAST: tl.constexpr,
):
    """Mean and rstd of one group from the moments of its channels in tiles of ``rows`` by ``columns`` pixels (Chan),
    and scale and offset that normalise its channels, halved where FAST. Grid: B * G."""
    i_program = tl.program_id(0)
    i_b, i_g = i_program // G, i_program % G
    b_c = tl.arange(0, BLOCK_CG)
    m_c = b_c < CG
    across = tl.cdiv(W, columns)
    i_base = i_b.to(tl.int64) * tiles * C + i_g * CG
    b_sum = tl.zeros([BLOCK, BLOCK_CG], dtype=tl.float32)
    # Sums are taken around the first tile's mean, so that a large mean costs no bits.
    first = tl.load(p_part + i_base)
    for i_start in range(0, tiles, BLOCK):
        b_k = i_start + tl.arange(0, BLOCK)
        m = (b_k < tiles)[:, None] & m_c[None, :]
        i_in = i_base + b_k.to(tl.int64)[:, None] * C + b_c[None, :]
        b_n = tl.minimum(H - b_k // across * rows, rows) * tl.minimum(W - b_k % across * columns, columns)
        b_part = tl.load(p_part + i_in, mask=m, other=0.0)
        b_sum += tl.where(m, (b_part - first) * b_n.to(tl.float32)[:, None], 0.0)
    n = tl.cast(H, tl.float32) * tl.cast(W, tl.float32) * CG
    off = tl.sum(tl.sum(b_sum, 1), 0) / n
    b_sum = tl.zeros([BLOCK, BLOCK_CG], dtype=tl.float32)
    for i_start in range(0, tiles, BLOCK):
        b_k = i_start + tl.arange(0, BLOCK)
        m = (b_k < tiles)[:, None] & m_c[None, :]
        i_in = i_base + b_k.to(tl.int64)[:, None] * C + b_c[None, :]
        b_n = tl.minimum(H - b_k // across * rows, rows) * tl.minimum(W - b_k % across * columns, columns)
        b_delta = tl.load(p_part + i_in, mask=m, other=0.0) - first - off
        b_square = b_delta * b_delta * b_n.to(tl.float32)[:, None]
        b_sum += tl.where(m, tl.load(p_m2 + i_in, mask=m, other=0.0) + b_square, 0.0)
    mean, rstd = first + off, 1.0 / tl.sqrt(tl.sum(tl.sum(b_sum, 1), 0) / n + eps)
    tl.store(p_mean + i_program, mean)
    tl.store(p_rstd + i_program, rstd)
    half = 0.5 if FAST else 1.0
    b_scale = tl.load(p_gamma + i_g * CG + b_c, mask=m_c, other=0.0).to(tl.float32) * rstd
    b_offset = tl.load(p_beta + i_g * CG + b_c, mask=m_c, other=0.0).to(tl.float32) - mean * b_scale
    i_out = i_b.to(tl.int64) * C + i_g * CG + b_c
    tl.store(p_scale + i_out, b_scale * half, mask=m_c)
    tl.store(p_offset + i_out, b_offset * half, mask=m_c)


@triton.jit(do_not_specialize=["P", "tiles"])
def normed_product_kernel(
    p_d,
    p_w,
    p_y,
    p_residual,
    p_scale,
    p_offset,
    P,
    K,
    N,
    tiles,
    FAST: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y = SiLU(d scale + offset) w + residual; scale and offset: [B, K]. Grid: B * tiles * cdiv(N, BLOCK_N), tiles =
    cdiv(P, BLOCK_M). It begins with what was written last, which the cache still holds, as DW2 walks backwards."""
    blocks_n = tl.cdiv(N, BLOCK_N)
    i_n, i_rest = tl.program_id(0) % blocks_n, tl.program_id(0) // blocks_n
    i_m, i_b = i_rest % tiles, i_rest // tiles
    b_m = tl.arange(0, BLOCK_M)
    m_m = i_m * BLOCK_M + b_m < P
    b_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = b_n < N
    b_k = tl.arange(0, BLOCK_K)
    p_d += (i_b.to(tl.int64) * P + i_m * BLOCK_M) * K + b_m[:, None] * K + b_k[None, :]
    p_w += b_n[None, :] * K + b_k[:, None]
    p_scale += i_b * K + b_k
    p_offset += i_b * K + b_k
    b_acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i_k in range(0, K, BLOCK_K):
        if EVEN_K:
            b_d = tl.load(p_d, mask=m_m[:, None], other=0.0)
            b_w = tl.load(p_w, mask=m_n[None, :], other=0.0)
            b_scale, b_offset = tl.load(p_scale), tl.load(p_offset)
        else:
            m_k = i_k + b_k < K
            b_d = tl.load(p_d, mask=m_m[:, None] & m_k[None, :], other=0.0)
            b_w = tl.load(p_w, mask=m_k[:, None] & m_n[None, :], other=0.0)
            b_scale, b_offset = tl.load(p_scale, mask=m_k, other=0.0), tl.load(p_offset, mask=m_k, other=0.0)
        b_z = b_d.to(tl.float32) * b_scale[None, :] + b_offset[None, :]
        b_a = silu_of_half(b_z) if FAST else silu(b_z, False)
        b_acc = tl.dot(b_a.to(p_d.dtype.element_ty), b_w, b_acc, input_precision=PRECISION)
        p_d += BLOCK_K
        p_w += BLOCK_K
        p_scale += BLOCK_K
        p_offset += BLOCK_K
    finish(
        b_acc, p_y, p_y, p_y, p_residual, p_scale, p_scale, i_b, i_m, b_m, m_m, b_n, m_n, P, N, tiles,
        BLOCK_M, False, False, True, False,
    )  # fmt: skip


# ---- launchers -------------------------------------------------------------------------------------------------------


def normed_configs(dtype: torch.dtype, precision: str, nvidia: bool, whole: bool) -> tuple[ProductConfig, ...]:
    """The candidates of products with a norm in front or its gradient behind: those with registers left for it."""
    found = [c for c in product_configs(dtype, precision, nvidia, 0, False, whole) if only(c) == 0]
    small = dtype == torch.float32 or not nvidia
    return tuple(c for c in found if not small or c.block_m * c.block_n <= 64 * 64)


def _merge_block(block_c: int) -> int:
    """Tiles that are merged at a time: about 2048 values."""
    return max(1, min(MERGE_BLOCK, 2048 // block_c))


def affine_of(
    tiles: Tiles, weights: Weights, num_groups: int, eps: float, height: int, width: int
) -> tuple[Tensor, ...]:
    """Mean and rstd [B, G], and scale and offset [B, M] of the norm, from the moments of its channels."""
    _, batch, count, middle = tiles.part.shape
    mean = torch.empty((batch, num_groups), dtype=torch.float32, device=tiles.part.device)
    scale = torch.empty((batch, middle), dtype=torch.float32, device=tiles.part.device)
    rstd, offset = torch.empty_like(mean), torch.empty_like(scale)
    per_group = middle // num_groups
    block_c = common.pow2(per_group)
    merge_tiles_kernel[(batch * num_groups,)](
        *tiles.part, weights.norm_weight, weights.norm_bias, mean, rstd, scale, offset,
        middle, height, width, num_groups, tiles.rows, tiles.columns, count, eps,
        CG=per_group, BLOCK_CG=block_c, BLOCK=_merge_block(block_c),
        FAST=common.fast(weights.pw2_weight.dtype), num_warps=4,
    )  # fmt: skip
    return mean, rstd, scale, offset


def normed_product(h: Tensor, weight: Tensor, scale: Tensor, offset: Tensor, residual: Tensor, y: Tensor) -> None:
    """y = PW(SiLU(h scale + offset)) + residual: h [B, M, H, W] and the others [B, C, H, W], rows of channels_last."""
    batch, inputs, height, width = h.shape
    outputs, pixels, precision = y.shape[1], height * width, common.precision(h.dtype)

    def launch(config: ProductConfig) -> None:
        block_m, block_n, block_k, warps, stages = config
        tiles = common.cdiv(pixels, block_m)
        normed_product_kernel[(batch * tiles * common.cdiv(outputs, block_n),)](
            h, weight, y, residual, scale, offset, pixels, inputs, outputs, tiles,
            FAST=common.fast(h.dtype), EVEN_K=inputs % block_k == 0, PRECISION=precision,
            BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, num_warps=warps, num_stages=stages,
        )  # fmt: skip

    configs = normed_configs(h.dtype, precision, torch.version.hip is None, are_whole(inputs, outputs))
    default = filling(configs, batch, pixels, outputs, common.processors(h))
    key = (str(h.dtype), precision, batch, pixels, inputs, outputs)
    launch(tuning.choose("normed_product", key, configs, default, launch))


def _plan(x: Tensor, middle: int, room: int) -> Plan:
    """Samples or rows whose two middle images take about ``room`` bytes; at least ``BAND`` rows."""
    batch, _, height, width = x.shape
    row = 2 * middle * width * x.element_size()
    samples = room // (row * height)
    if samples > 0 or height <= BAND:
        return Plan(min(max(samples, 1), batch), height)
    return Plan(1, max(BAND, room // row // BAND * BAND))


def plans(x: Tensor, middle: int, low_memory: bool) -> tuple[tuple[Plan, ...], Plan]:
    """The plans that a forward may follow, and the rule's."""
    if low_memory:
        bands = _plan(x, middle, LOW_MEMORY)
        return (bands,), bands
    whole = Plan(x.shape[0], x.shape[2])
    return tuple(dict.fromkeys((whole, _plan(x, middle, 2 * costs.H200.cache)))), whole


def _bands(plan: Plan, batch: int, height: int) -> Iterator[Band]:
    for first in range(0, batch, plan.samples):
        for top in range(0, height, plan.rows):
            yield Band(first, min(first + plan.samples, batch), top, min(top + plan.rows, height))


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
        x, top, bottom = self.x[band.first : band.last], band.top, band.bottom
        above, below = max(top - 1, 0), min(bottom + 1, x.shape[2])
        d1 = depthwise(x, self.taps1, self.weights.dw1_bias, None, 1, False, rows=Rows(above, below))
        return pointwise(d1, self.weights.pw1_weight), Rows(top - above, bottom - above, above)

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
        band = next(_bands(plan, batch, height))

        def launch(config: DepthwiseConfig) -> None:
            h1 = new_channels_last(x, band.last - band.first, middle, band.bottom - band.top, width)
            out, tiles = torch.empty_like(h1) if stored else None, new_tiles(h1, middle, height, config)
            self.second(h1, Rows(0, h1.shape[2]), out, tiles, config)

        key = (str(x.dtype), batch, middle, height, width)
        return tuning.choose("depthwise_moments", key, configs, default, launch)


def _rows(image: Tensor, band: Band) -> Tensor:
    """A band of an image: of several samples it is always whole."""
    return image[band.first : band.last, :, band.top : band.bottom]


def _statistics(block: Block, plan: Plan, config: DepthwiseConfig, h: Tensor | None) -> tuple[Tensor, ...]:
    """Mean, rstd, scale and offset of the norm; the middle image into ``h``."""
    batch, _, height, width = block.x.shape
    tiles = new_tiles(block.x, block.weights.dw2_bias.shape[0], height, config)
    for band in _bands(plan, batch, height):
        h1, rows = block.first(band)
        some = tiles._replace(part=tiles.part[:, band.first : band.last])
        block.second(h1, rows, None if h is None else _rows(h, band), some, config)
        del h1  # the next one takes its place
    return affine_of(tiles, block.weights, block.num_groups, block.eps, height, width)


def _once_more(block: Block, plan: Plan, config: DepthwiseConfig, scale: Tensor, offset: Tensor, y: Tensor) -> None:
    """y, of a middle image that was not kept."""
    batch, _, height, width = block.x.shape
    for band in _bands(plan, batch, height):
        h1, rows = block.first(band)
        h2 = new_channels_last(h1, h1.shape[0], h1.shape[1], band.bottom - band.top, width)
        block.second(h1, rows, h2, None, config)
        del h1
        some = slice(band.first, band.last)
        normed_product(h2, block.weights.pw2_weight, scale[some], offset[some], _rows(block.x, band), _rows(y, band))
        del h2


def prepared(x: Tensor, weights: Weights, num_groups: int, eps: float) -> Block:
    """A call with its tensors laid out as the kernels take them."""
    plain = Weights(*(weight.contiguous() for weight in weights))
    return Block(common.channels_last(x), plain, by_tap(plain.dw1_weight), by_tap(plain.dw2_weight), num_groups, eps)


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
    middle = dw2_bias.shape[0]
    y, h, mean, rstd = new_outputs(x, middle, num_groups, keep_middle)
    if y.numel() == 0:
        return y, h, mean.fill_(float("nan")), rstd.fill_(float("nan"))
    weights = Weights(dw1_weight, dw1_bias, pw1_weight, dw2_weight, dw2_bias, norm_weight, norm_bias, pw2_weight)
    block = prepared(x, weights, num_groups, eps)
    candidates, default = plans(x, middle, low_memory and not keep_middle)
    # What fits one band is kept: it would take no less memory to compute it twice.
    twice = low_memory and not keep_middle and default != Plan(x.shape[0], x.shape[2])
    out, kept = into(y), into(h) if keep_middle else None

    def follow(plan: Plan) -> tuple[Tensor, ...]:
        config = block.moments_config(plan, not twice)
        if twice:
            mean, rstd, scale, offset = _statistics(block, plan, config, None)
            _once_more(block, plan, config, scale, offset, out)
        else:
            h2 = new_channels_last(x, x.shape[0], middle, *x.shape[2:]) if kept is None else kept
            mean, rstd, scale, offset = _statistics(block, plan, config, h2)
            normed_product(h2, block.weights.pw2_weight, scale, offset, block.x, out)
        return mean, rstd

    key = (str(x.dtype), *x.shape, middle, keep_middle, common.precision(x.dtype))
    mean, rstd = follow(tuning.choose("decoder_block", key, candidates, default, follow))
    if kept is not None and kept is not h:
        h.copy_(kept)
    return y if out is y else y.copy_(out), h, mean, rstd


def builds(dtype: torch.dtype, nvidia: bool) -> list[Build]:
    """Every kernel of this file in every config that its launchers may choose."""
    fast, images = nvidia and dtype == torch.bfloat16, ("p_d", "p_w", "p_y", "p_residual")
    found: list[Build] = []
    for per_group in (1, 12, 15):
        block_c = common.pow2(per_group)
        constants = {"CG": per_group, "BLOCK_CG": block_c, "BLOCK": _merge_block(block_c), "FAST": fast}
        found.append(Build(merge_tiles_kernel, constants, {}, {"num_warps": 4}))
    for precision in precisions(dtype, nvidia):
        for whole in (True, False):
            for config in normed_configs(dtype, precision, nvidia, whole):
                flags: dict[str, Any] = {"FAST": fast, "EVEN_K": whole, "PRECISION": precision}
                flags |= {"products": dtype != torch.float32 or precision == "tf32"}
                sizes = ("K", "N") if whole else ()
                found.append(common.build(normed_product_kernel, dtype, images, config, sizes, **flags))
    return found
