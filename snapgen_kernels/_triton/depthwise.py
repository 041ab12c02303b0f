"""The depthwise 3x3 convolution on the GPU, with the norm and SiLU in front of it.

:func:`depthwise_kernel` scans rows: a value is loaded and normalised once for each group of four columns that it
reaches (1.5 times), and added to three output rows that stay in registers. It can leave the moments of what it
computes, and can leave it at them. ``upsample.py`` serves nearest 2x, and :func:`direct_kernel`, which takes nine taps
a pixel, what has stride 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from snapgen_kernels._triton import common, tuning
from snapgen_kernels._triton.common import Build
from snapgen_kernels._triton.normalise import Affine, affine, inside, norm_arguments, norm_flags, normalised
from snapgen_kernels._triton.upsample import upsample as upsampled
from snapgen_kernels.sepconv import output_size


class DepthwiseConfig(NamedTuple):
    """A program scans ``rows`` rows of ``block_w`` groups of four columns by ``block_c`` channels. ``maxnreg``: the
    registers of a thread, 0: as many as the compiler likes; NVIDIA alone."""

    block_w: int
    block_c: int
    rows: int
    num_warps: int
    maxnreg: int


class Rows(NamedTuple):
    """Rows ``first`` to ``last`` of the output; x may itself be a part of an image, with ``above`` rows above it."""

    first: int
    last: int
    above: int = 0


class Tiles(NamedTuple):
    """Mean and sum of squared deviations of each channel in each tile of ``rows`` by ``columns`` pixels, row by row of
    tiles: ``part`` [2, B, tiles, C] in fp32."""

    part: Tensor
    rows: int
    columns: int


class DirectConfig(NamedTuple):
    """A program computes ``block_p`` pixels by ``block_c`` channels, nine taps each."""

    block_p: int
    block_c: int
    num_warps: int


# ---- device functions ------------------------------------------------------------------------------------------------


@triton.jit
def row_and_column(b_p, W):
    """Of pixels counted row by row. Unsigned: a signed division costs more than all that follows it."""
    b_row = (b_p.to(tl.uint32) // tl.cast(W, tl.uint32)).to(tl.int32)
    return b_row, b_p - b_row * W


@triton.jit
def nine_taps(
    p_x,
    p_dw,
    p_dw_bias,
    b_scale,
    b_offset,
    i_b,
    i_row,
    b_row,
    b_col,
    m_p,
    b_c,
    m_c,
    H,
    W,
    C,
    HAS_NORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    FAST: tl.constexpr,
    STRIDE: tl.constexpr,
    UPSAMPLE: tl.constexpr,
):
    """The depthwise convolution at output pixels (b_row, b_col), [pixels, channels] in fp32. ``i_row``: the first of
    ``b_row``; addresses are taken from there, so that offsets fit 32 bits."""
    scale = 2 if UPSAMPLE else 1
    i_first = i_row * STRIDE // scale
    p_x += (i_b.to(tl.int64) * H + i_first) * W * C + b_c[None, :]
    b_sum = tl.zeros([b_row.shape[0], b_c.shape[0]], tl.float32)
    if HAS_BIAS:
        b_sum += tl.load(p_dw_bias + b_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    # A loop, not unrolled: with all nine taps at once the registers would not do.
    for i_tap in tl.range(9, num_stages=1):
        b_y = b_row * STRIDE + (i_tap // 3 - 1)
        b_z = b_col * STRIDE + (i_tap % 3 - 1)
        m = ((b_y >= 0) & (b_y < H * scale) & (b_z >= 0) & (b_z < W * scale) & m_p)[:, None] & m_c[None, :]
        # Both are divided after they were found not to be negative; where they are, nothing is loaded.
        b_at = ((b_y // scale - i_first) * W + b_z // scale) * C
        b_x = tl.load(p_x + b_at[:, None], mask=m, other=0.0)
        b_w = tl.load(p_dw + i_tap * C + b_c, mask=m_c, other=0.0).to(tl.float32)
        b_a = normalised(b_x, b_scale, b_offset, HAS_NORM, FAST)
        if HAS_NORM:
            b_a = tl.where(m, b_a, 0.0)
        b_sum += b_a * b_w[None, :]
    return b_sum


@triton.jit
def six_columns(p_x, C, m_0, m_1, m_2, m_3, m_4, m_5, there):
    """One row: the column left of the four, the four, the column right of them."""
    return (
        tl.load(p_x - C, mask=m_0 & there, other=0.0),
        tl.load(p_x, mask=m_1 & there, other=0.0),
        tl.load(p_x + C, mask=m_2 & there, other=0.0),
        tl.load(p_x + 2 * C, mask=m_3 & there, other=0.0),
        tl.load(p_x + 3 * C, mask=m_4 & there, other=0.0),
        tl.load(p_x + 4 * C, mask=m_5 & there, other=0.0),
    )


# ---- kernels ---------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["H", "W", "first", "last", "tile", "tiles", "G", "CG"])
def depthwise_kernel(
    p_x,
    p_y,
    p_dw,
    p_dw_bias,
    p_mean,
    p_rstd,
    p_gamma,
    p_beta,
    p_part,
    p_part_m2,
    H,
    W,
    first,
    last,
    tile,
    tiles,
    C,
    G,
    CG,
    ROWS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    FAST: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Stride 1: y [last - first rows], and unless p_part is None, the moments of each channel of each tile of ROWS by
    4 BLOCK_W pixels of it as it is rounded, from tile number ``tile`` of ``tiles`` on. p_y: None where they are all
    that is wanted. Grid: B * cdiv(last - first, ROWS) * cdiv(W, 4 BLOCK_W) * cdiv(C, BLOCK_C), walked backwards.

    A thread keeps four columns side by side, so that a value is normalised for 1.5 of them on average, not for its nine
    neighbours; it is added to the three output rows that are open.
    """
    MOMENTS: tl.constexpr = p_part is not None
    blocks_c, blocks_w, blocks_h = tl.cdiv(C, BLOCK_C), tl.cdiv(W, 4 * BLOCK_W), tl.cdiv(last - first, ROWS)
    i_program = tl.num_programs(0) - 1 - tl.program_id(0)
    i_c, i_rest = i_program % blocks_c, i_program // blocks_c
    i_w, i_rest = i_rest % blocks_w, i_rest // blocks_w
    i_h, i_b = i_rest % blocks_h, i_rest // blocks_h
    b_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = b_c < C
    b_scale, b_offset = affine(p_mean, p_rstd, p_gamma, p_beta, i_b, G, CG, b_c, m_c, HAS_NORM, FAST)
    p_dw += b_c
    b_w00 = tl.load(p_dw, mask=m_c, other=0.0).to(tl.float32)[None, :]
    b_w01 = tl.load(p_dw + C, mask=m_c, other=0.0).to(tl.float32)[None, :]
    b_w02 = tl.load(p_dw + 2 * C, mask=m_c, other=0.0).to(tl.float32)[None, :]
    b_w10 = tl.load(p_dw + 3 * C, mask=m_c, other=0.0).to(tl.float32)[None, :]
    b_w11 = tl.load(p_dw + 4 * C, mask=m_c, other=0.0).to(tl.float32)[None, :]
    b_w12 = tl.load(p_dw + 5 * C, mask=m_c, other=0.0).to(tl.float32)[None, :]
    b_w20 = tl.load(p_dw + 6 * C, mask=m_c, other=0.0).to(tl.float32)[None, :]
    b_w21 = tl.load(p_dw + 7 * C, mask=m_c, other=0.0).to(tl.float32)[None, :]
    b_w22 = tl.load(p_dw + 8 * C, mask=m_c, other=0.0).to(tl.float32)[None, :]

    b_col = i_w * (4 * BLOCK_W) + 4 * tl.arange(0, BLOCK_W)
    m_0 = ((b_col > 0) & (b_col <= W))[:, None] & m_c[None, :]
    m_1 = (b_col < W)[:, None] & m_c[None, :]
    m_2 = (b_col + 1 < W)[:, None] & m_c[None, :]
    m_3 = (b_col + 2 < W)[:, None] & m_c[None, :]
    m_4 = (b_col + 3 < W)[:, None] & m_c[None, :]
    m_5 = (b_col + 4 < W)[:, None] & m_c[None, :]
    b_at = b_col[:, None] * C + b_c[None, :]
    i_row = first + i_h * ROWS
    s_row = W * C
    p_x += (i_b.to(tl.int64) * H + i_row - 1) * s_row + b_at
    if p_y is not None:
        p_y += (i_b.to(tl.int64) * (last - first) + i_h * ROWS - 2) * s_row + b_at

    b_bias = tl.zeros([1, BLOCK_C], tl.float32)
    if HAS_BIAS:
        b_bias = tl.load(p_dw_bias + b_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    # Output rows above (u) and at (v) the input row, four columns each.
    b_none = tl.zeros([BLOCK_W, BLOCK_C], tl.float32)
    b_u0, b_u1, b_u2, b_u3 = b_none, b_none, b_none, b_none
    b_v0, b_v1, b_v2, b_v3 = b_none, b_none, b_none, b_none
    # Moments of what each thread has computed: of ``rows`` rows of ``b_count`` columns each.
    rows, b_mean, b_m2 = 0.0, b_none, b_none
    b_count = tl.minimum(tl.maximum(W - b_col, 0), 4).to(tl.float32)[:, None]
    b_share = 1.0 / tl.maximum(b_count, 1.0)
    there = i_row > 0
    b_x0, b_x1, b_x2, b_x3, b_x4, b_x5 = six_columns(p_x, C, m_0, m_1, m_2, m_3, m_4, m_5, there)
    for i in range(ROWS + 2):
        # The next row is on its way while this one is computed.
        p_x += s_row
        coming = (i <= ROWS) & (i_row + i < H)
        b_n0, b_n1, b_n2, b_n3, b_n4, b_n5 = six_columns(p_x, C, m_0, m_1, m_2, m_3, m_4, m_5, coming)
        # A row outside the image is 0 after the norm; so is a column, of which four side by side need no proof.
        b_s, b_o = tl.where(there, b_scale, 0.0), tl.where(there, b_offset, 0.0)
        b_x0 = inside(normalised(b_x0, b_s, b_o, HAS_NORM, FAST), m_0, HAS_NORM)
        b_x1 = normalised(b_x1, b_s, b_o, HAS_NORM, FAST)
        b_x2 = inside(normalised(b_x2, b_s, b_o, HAS_NORM, FAST), m_2, HAS_NORM and not EVEN)
        b_x3 = inside(normalised(b_x3, b_s, b_o, HAS_NORM, FAST), m_3, HAS_NORM and not EVEN)
        b_x4 = inside(normalised(b_x4, b_s, b_o, HAS_NORM, FAST), m_4, HAS_NORM and not EVEN)
        b_x5 = inside(normalised(b_x5, b_s, b_o, HAS_NORM, FAST), m_5, HAS_NORM)
        b_u0 = b_u0 + b_x0 * b_w20 + b_x1 * b_w21 + b_x2 * b_w22
        b_u1 = b_u1 + b_x1 * b_w20 + b_x2 * b_w21 + b_x3 * b_w22
        b_u2 = b_u2 + b_x2 * b_w20 + b_x3 * b_w21 + b_x4 * b_w22
        b_u3 = b_u3 + b_x3 * b_w20 + b_x4 * b_w21 + b_x5 * b_w22
        if HAS_BIAS:
            b_u0, b_u1, b_u2, b_u3 = b_u0 + b_bias, b_u1 + b_bias, b_u2 + b_bias, b_u3 + b_bias
        done = (i >= 2) & (i_row + i - 2 < last)
        b_y0, b_y1 = b_u0.to(p_x.dtype.element_ty), b_u1.to(p_x.dtype.element_ty)
        b_y2, b_y3 = b_u2.to(p_x.dtype.element_ty), b_u3.to(p_x.dtype.element_ty)
        if p_y is not None:
            tl.store(p_y, b_y0, mask=m_1 & done)
            tl.store(p_y + C, b_y1, mask=m_2 & done)
            tl.store(p_y + 2 * C, b_y2, mask=m_3 & done)
            tl.store(p_y + 3 * C, b_y3, mask=m_4 & done)
            p_y += s_row
        if MOMENTS:
            # Those of the four columns, merged (Chan) with those of the rows above.
            b_r0, b_r1 = b_y0.to(tl.float32), inside(b_y1.to(tl.float32), m_2, not EVEN)
            b_r2, b_r3 = inside(b_y2.to(tl.float32), m_3, not EVEN), inside(b_y3.to(tl.float32), m_4, not EVEN)
            b_center = (b_r0 + b_r1 + b_r2 + b_r3) * (0.25 if EVEN else b_share)
            b_r0, b_r1 = b_r0 - b_center, inside(b_r1 - b_center, m_2, not EVEN)
            b_r2, b_r3 = inside(b_r2 - b_center, m_3, not EVEN), inside(b_r3 - b_center, m_4, not EVEN)
            b_square = b_r0 * b_r0 + b_r1 * b_r1 + b_r2 * b_r2 + b_r3 * b_r3
            b_delta = b_center - b_mean
            share = 1.0 / (rows + 1.0)
            b_square += b_delta * b_delta * (rows * share * (4.0 if EVEN else b_count))
            b_mean = tl.where(done, b_mean + b_delta * share, b_mean)
            b_m2 = tl.where(done, b_m2 + b_square, b_m2)
            rows = tl.where(done, rows + 1.0, rows)
        b_u0 = b_v0 + b_x0 * b_w10 + b_x1 * b_w11 + b_x2 * b_w12
        b_u1 = b_v1 + b_x1 * b_w10 + b_x2 * b_w11 + b_x3 * b_w12
        b_u2 = b_v2 + b_x2 * b_w10 + b_x3 * b_w11 + b_x4 * b_w12
        b_u3 = b_v3 + b_x3 * b_w10 + b_x4 * b_w11 + b_x5 * b_w12
        b_v0 = b_x0 * b_w00 + b_x1 * b_w01 + b_x2 * b_w02
        b_v1 = b_x1 * b_w00 + b_x2 * b_w01 + b_x3 * b_w02
        b_v2 = b_x2 * b_w00 + b_x3 * b_w01 + b_x4 * b_w02
        b_v3 = b_x3 * b_w00 + b_x4 * b_w01 + b_x5 * b_w02
        b_x0, b_x1, b_x2, b_x3, b_x4, b_x5 = b_n0, b_n1, b_n2, b_n3, b_n4, b_n5
        there = coming
    if MOMENTS:
        # The threads' moments merged: columns beyond the edge count nothing.
        b_n = b_count * rows
        b_center = tl.sum(tl.where(m_1, b_mean * b_n, 0.0), 0) / tl.sum(b_n)
        b_off = b_mean - b_center[None, :]
        i_part = (i_b.to(tl.int64) * tiles + tile + i_h * blocks_w + i_w) * C + b_c
        tl.store(p_part + i_part, b_center, mask=m_c)
        tl.store(p_part_m2 + i_part, tl.sum(tl.where(m_1, b_m2 + b_off * b_off * b_n, 0.0), 0), mask=m_c)


@triton.jit(do_not_specialize=["H", "W", "HO", "WO", "G", "CG"])
def direct_kernel(
    p_x,
    p_y,
    p_dw,
    p_dw_bias,
    p_mean,
    p_rstd,
    p_gamma,
    p_beta,
    H,
    W,
    HO,
    WO,
    C,
    G,
    CG,
    HAS_NORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    FAST: tl.constexpr,
    STRIDE: tl.constexpr,
    UPSAMPLE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Stride 2, also after nearest 2x. Grid: B * cdiv(HO WO, BLOCK_P) * cdiv(C, BLOCK_C), walked backwards."""
    P = HO * WO
    blocks_c, blocks_p = tl.cdiv(C, BLOCK_C), tl.cdiv(P, BLOCK_P)
    i_program = tl.num_programs(0) - 1 - tl.program_id(0)
    i_c, i_rest = i_program % blocks_c, i_program // blocks_c
    i_p, i_b = i_rest % blocks_p, i_rest // blocks_p
    b_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = b_c < C
    b_scale, b_offset = affine(p_mean, p_rstd, p_gamma, p_beta, i_b, G, CG, b_c, m_c, HAS_NORM, FAST)
    b_m = tl.arange(0, BLOCK_P)
    b_p = i_p * BLOCK_P + b_m
    m_p = b_p < P
    b_row, b_col = row_and_column(b_p, WO)
    i_row = i_p * BLOCK_P // WO
    b_y = nine_taps(
        p_x, p_dw, p_dw_bias, b_scale, b_offset, i_b, i_row, b_row, b_col, m_p, b_c, m_c, H, W, C,
        HAS_NORM, HAS_BIAS, FAST, STRIDE, UPSAMPLE,
    )  # fmt: skip
    p_y += (i_b.to(tl.int64) * P + i_p * BLOCK_P) * C + b_m[:, None] * C + b_c[None, :]
    tl.store(p_y, b_y.to(p_y.dtype.element_ty), mask=m_p[:, None] & m_c[None, :])


# ---- launchers -------------------------------------------------------------------------------------------------------

# The rule takes one of the first four: long scans compute less for nothing, short ones make more programs. With 128
# registers a thread, four programs of four warps run at once.
DEPTHWISE_CONFIGS = (
    DepthwiseConfig(8, 64, 16, 4, 128),
    DepthwiseConfig(8, 64, 8, 4, 128),
    DepthwiseConfig(8, 64, 4, 4, 128),
    DepthwiseConfig(4, 64, 4, 2, 128),
    DepthwiseConfig(8, 64, 16, 4, 0),
    DepthwiseConfig(8, 64, 16, 2, 0),
    DepthwiseConfig(4, 64, 16, 2, 0),
    DepthwiseConfig(8, 32, 16, 2, 0),
)
DIRECT_CONFIGS = (DirectConfig(32, 64, 4), DirectConfig(32, 64, 8), DirectConfig(16, 128, 4))


def depthwise_configs(dtype: torch.dtype, nvidia: bool, even: bool) -> tuple[DepthwiseConfig, ...]:
    """Candidates: eight channels a thread, and few registers, only for bf16's one-tanh form; eight in whole groups."""
    quick = nvidia and dtype == torch.bfloat16
    found = (c if quick else c._replace(maxnreg=0) for c in DEPTHWISE_CONFIGS)
    return tuple(dict.fromkeys(c for c in found if (even and quick) or c.block_w * c.block_c <= 128 * c.num_warps))


def moments_configs(dtype: torch.dtype, nvidia: bool, even: bool) -> tuple[DepthwiseConfig, ...]:
    """Candidates of scans that leave moments: those of the rule; few registers for whole groups of columns alone."""
    configs = depthwise_configs(dtype, nvidia, even)[:4]
    return configs if even else tuple(config._replace(maxnreg=0) for config in configs)


def direct_configs(dtype: torch.dtype) -> tuple[DirectConfig, ...]:
    """Candidates: up to sixteen 16-bit or eight 32-bit values a thread."""
    wide = dtype == torch.float32
    return tuple(c for c in DIRECT_CONFIGS if not wide or c.block_p * c.block_c <= 256 * c.num_warps)


def scanning(
    configs: Sequence[DepthwiseConfig], batch: int, channels: int, height: int, width: int, processors: int
) -> DepthwiseConfig:
    """The first that gives every multiprocessor the four programs that it can run at once, else the smallest."""
    for config in configs[:4]:
        across = common.cdiv(width, 4 * config.block_w) * common.cdiv(channels, config.block_c)
        if batch * common.cdiv(height, config.rows) * across >= 4 * processors:
            return config
    return configs[3]


def by_tap(dw_weight: Tensor) -> Tensor:
    """[C, 1, 3, 3] -> [9, C], contiguous: a tap's weights of neighbouring channels are read at once."""
    return dw_weight.reshape(-1, 9).t().contiguous()


def new_tiles(x: Tensor, channels: int, height: int, config: DepthwiseConfig) -> Tiles:
    """Uninitialised moments of so many channels and rows, with the samples and the width of ``x``."""
    columns = 4 * config.block_w
    count = common.cdiv(height, config.rows) * common.cdiv(x.shape[3], columns)
    part = torch.empty((2, x.shape[0], count, channels), dtype=torch.float32, device=x.device)
    return Tiles(part, config.rows, columns)


def launch_scan(
    x: Tensor,
    taps: Tensor,
    dw_bias: Tensor | None,
    norm: Affine | None,
    rows: Rows,
    y: Tensor | None,
    tiles: Tiles | None,
    config: DepthwiseConfig,
) -> None:
    """These rows of the convolution of stride 1 into ``y``, and into ``tiles`` their moments: in the place that the
    rows have in the image, so that ``rows.above + rows.first`` is a multiple of the config's rows."""
    batch, channels, height, width = x.shape
    block_w, block_c, lines, warps, registers = config
    limit = {"maxnreg": registers} if registers else {}
    across = common.cdiv(width, 4 * block_w)
    part, part_m2, count = (None, None, 0) if tiles is None else (*tiles.part, tiles.part.shape[2])
    *pointers, groups, per_group = norm_arguments(norm, x)
    grid = batch * common.cdiv(rows.last - rows.first, lines) * across * common.cdiv(channels, block_c)
    depthwise_kernel[(grid,)](
        x, y, taps, x if dw_bias is None else dw_bias, *pointers, part, part_m2, height, width, rows.first, rows.last,
        (rows.above + rows.first) // lines * across, count, channels, groups, per_group,
        HAS_BIAS=dw_bias is not None, **norm_flags(norm, x.dtype), EVEN=width % 4 == 0,
        ROWS=lines, BLOCK_W=block_w, BLOCK_C=block_c, num_warps=warps, **limit,
    )  # fmt: skip


def depthwise(
    x: Tensor,
    taps: Tensor,
    dw_bias: Tensor | None,
    norm: Affine | None,
    stride: int,
    upsample: bool,
    out: Tensor | None = None,
    rows: Rows | None = None,
) -> Tensor:
    """DW(SiLU(norm(x))) of x [B, C, H, W] channels_last -> [B, C, H', W'] channels_last, rounded to its dtype.

    ``taps``: the weight, :func:`by_tap`. ``rows``: some of the output alone, for stride 1.
    """
    batch, channels, height, width = x.shape
    size = output_size(height, width, stride, upsample)
    if rows is not None:
        size = (rows.last - rows.first, width)
    y = common.new_channels_last(x, batch, channels, *size) if out is None else out

    def direct(config: DirectConfig) -> None:
        block_p, block_c, warps = config
        *pointers, groups, per_group = norm_arguments(norm, x)
        grid = batch * common.cdiv(size[0] * size[1], block_p) * common.cdiv(channels, block_c)
        direct_kernel[(grid,)](
            x, y, taps, x if dw_bias is None else dw_bias, *pointers, height, width, *size, channels, groups, per_group,
            STRIDE=stride, UPSAMPLE=upsample, HAS_BIAS=dw_bias is not None, **norm_flags(norm, x.dtype),
            BLOCK_P=block_p, BLOCK_C=block_c, num_warps=warps,
        )  # fmt: skip

    key: tuple[int | str, ...] = (str(x.dtype), batch, channels, *size, norm is not None, dw_bias is not None)
    if stride == 2:
        tiles = direct_configs(x.dtype)
        direct(tuning.choose("direct", (*key, height, width), tiles, tiles[0], direct))
    elif upsample:
        upsampled(x, taps, dw_bias, norm, y)
    else:

        def scan(config: DepthwiseConfig) -> None:
            launch_scan(x, taps, dw_bias, norm, rows or Rows(0, height), y, None, config)

        configs = depthwise_configs(x.dtype, torch.version.hip is None, width % 4 == 0)
        default = scanning(configs, batch, channels, *size, common.processors(x))
        scan(tuning.choose("depthwise", key, configs, default, scan))
    return y


def builds(dtype: torch.dtype, nvidia: bool) -> list[Build]:
    """Every kernel in every config that the launcher may choose."""
    images = ("p_x", "p_y", "p_dw", "p_dw_bias")
    quick = dtype == torch.bfloat16 and nvidia
    found: list[Build] = []
    for norm, bias in ((True, False), (False, True), (True, True)):
        flags: dict[str, Any] = {"HAS_NORM": norm, "HAS_BIAS": bias, "FAST": norm and quick}
        for even in (True, False):
            for scan in depthwise_configs(dtype, nvidia, even):
                vector = scan.block_w * scan.block_c // (32 * scan.num_warps) * dtype.itemsize
                added = {**flags, "EVEN": even, "vector": vector, "p_part": None, "p_part_m2": None}
                found.append(common.build(depthwise_kernel, dtype, images, scan, ("C",), **added))
        for direct in direct_configs(dtype):
            for upsample in (False, True):
                shape: dict[str, Any] = {**flags, "STRIDE": 2, "UPSAMPLE": upsample}
                found.append(common.build(direct_kernel, dtype, images, direct, ("C",), **shape))
    # The decoder's block: moments beside the image, and alone.
    flags = {"HAS_NORM": False, "HAS_BIAS": True, "FAST": False}
    for even in (True, False):
        for scan in moments_configs(dtype, nvidia, even):
            vector = scan.block_w * scan.block_c // (32 * scan.num_warps) * dtype.itemsize
            for alone in ({}, {"p_y": None}):
                added = {**flags, **alone, "EVEN": even, "vector": vector}
                found.append(common.build(depthwise_kernel, dtype, images, scan, ("C",), **added))
    return found
