"""Backward of the separable convolution on the GPU; the contract is in ``snapgen_kernels/sepconv.py``.

For d = DW(a) + dw_bias, a = [nearest 2x of] SiLU(z), z = xhat norm_weight + norm_bias, and dd the gradient of d, one
pass over x and dd gives da, the parts of the gradients of the depthwise convolution, and those of the two sums per
channel that the norm's gradient needs. Where there is no norm, da is dx; else a second pass makes dx of da. Sums are
parts in fp32, added in a fixed order that depends on the shape alone: no atomics, a repeat is bitwise equal.

Names as in ``common``; a position is a pixel of x (of d where the stride is 2), q its row. H and W are the sizes of x,
OH and OW those of d. t_rc is the dd that reaches a position through tap (r, c) of the 3x3 kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from snapgen_kernels._library import like
from snapgen_kernels._triton import common, tuning, weight_gradient
from snapgen_kernels._triton import group_norm_silu as norm_kernels
from snapgen_kernels._triton.common import Build
from snapgen_kernels._triton.depthwise import Affine, depthwise
from snapgen_kernels._triton.pointwise import pointwise
from snapgen_kernels._triton.sepconv import samples_at_once
from snapgen_kernels._triton.weight_gradient import joined, new_parts


class Config(NamedTuple):
    """A tile of BLOCK_W positions of a row by BLOCK_C channels: 4 values a thread, so that nine accumulators and nine
    weights a channel stay in registers."""

    block_w: int
    block_c: int
    num_warps: int


DEPTHWISE_CONFIGS = (Config(16, 32, 4), Config(8, 64, 4), Config(4, 128, 4))
# Programs per multiprocessor, about three times what runs at once; more would lengthen the adding of their parts.
PROGRAMS = 8
# Rows of a program, at least: two more are read.
MIN_ROWS = 8


class GradientConfig(NamedTuple):
    """A tile of BLOCK_P pixels by BLOCK_C channels."""

    block_p: int
    block_c: int
    num_warps: int


GRADIENT_CONFIGS = (GradientConfig(32, 128, 4), GradientConfig(64, 64, 4), GradientConfig(128, 32, 4))
# Tiles of a program of the gradient kernel, at most: enough to make reading the parameters cheap.
MAX_TILES = 8


@triton.jit
def _columns(p_dd, i_row, OH, OW, C, b_w, b_c, m_c, STRIDE: tl.constexpr, UPSAMPLE: tl.constexpr):
    """Row ``i_row`` of dd at the columns that reach the positions ``b_w``, 0 outside of the image, as it is stored."""
    p_row = p_dd + i_row.to(tl.int64) * OW * C
    m_row = (i_row >= 0) & (i_row < OH)
    if UPSAMPLE and STRIDE == 1:
        return (
            _column(p_row, 2 * b_w - 1, OW, C, b_c, m_c, m_row),
            _column(p_row, 2 * b_w, OW, C, b_c, m_c, m_row),
            _column(p_row, 2 * b_w + 1, OW, C, b_c, m_c, m_row),
            _column(p_row, 2 * b_w + 2, OW, C, b_c, m_c, m_row),
        )
    elif STRIDE == 2:
        return _column(p_row, b_w, OW, C, b_c, m_c, m_row), _column(p_row, b_w + 1, OW, C, b_c, m_c, m_row)
    else:
        return (
            _column(p_row, b_w - 1, OW, C, b_c, m_c, m_row),
            _column(p_row, b_w, OW, C, b_c, m_c, m_row),
            _column(p_row, b_w + 1, OW, C, b_c, m_c, m_row),
        )


@triton.jit
def _column(p_row, b_w, W, C, b_c, m_c, m_row):
    m = ((b_w >= 0) & (b_w < W) & m_row)[:, None] & m_c[None, :]
    return tl.load(p_row + (b_w[:, None] * C + b_c[None, :]), mask=m, other=0.0)


@triton.jit
def _by_tap(columns, STRIDE: tl.constexpr, UPSAMPLE: tl.constexpr):
    """What each column of taps (0, 1, 2) takes of one row of dd."""
    if UPSAMPLE and STRIDE == 1:
        b_0, b_1 = columns[0].to(tl.float32), columns[1].to(tl.float32)
        b_2, b_3 = columns[2].to(tl.float32), columns[3].to(tl.float32)
        return b_2 + b_3, b_1 + b_2, b_0 + b_1
    elif STRIDE == 2:
        b_0, b_1 = columns[0].to(tl.float32), columns[1].to(tl.float32)
        return b_1, b_0, b_0
    else:
        return columns[2].to(tl.float32), columns[1].to(tl.float32), columns[0].to(tl.float32)


@triton.jit
def _plus(left, right):
    return left[0] + right[0], left[1] + right[1], left[2] + right[2]


@triton.jit
def _weights(p_weight, b_c, m_c, ROW: tl.constexpr):
    """Taps (ROW, 0..2), each [1, BLOCK_C]."""
    b_0 = tl.load(p_weight + b_c * 9 + 3 * ROW, mask=m_c, other=0.0).to(tl.float32)[None, :]
    b_1 = tl.load(p_weight + b_c * 9 + 3 * ROW + 1, mask=m_c, other=0.0).to(tl.float32)[None, :]
    b_2 = tl.load(p_weight + b_c * 9 + 3 * ROW + 2, mask=m_c, other=0.0).to(tl.float32)[None, :]
    return b_0, b_1, b_2


# Multiply-adds are spelled out: left to itself, LLVM makes vectors of sums and products that do not belong together,
# and pads them with products by one.
@triton.jit
def _dot(weights_0, weights_1, weights_2, taps_0, taps_1, taps_2):
    """The sum over the nine taps."""
    b_sum = weights_0[0] * taps_0[0]
    b_sum = tl.fma(weights_0[1], taps_0[1], b_sum)
    b_sum = tl.fma(weights_0[2], taps_0[2], b_sum)
    b_sum = tl.fma(weights_1[0], taps_1[0], b_sum)
    b_sum = tl.fma(weights_1[1], taps_1[1], b_sum)
    b_sum = tl.fma(weights_1[2], taps_1[2], b_sum)
    b_sum = tl.fma(weights_2[0], taps_2[0], b_sum)
    b_sum = tl.fma(weights_2[1], taps_2[1], b_sum)
    return tl.fma(weights_2[2], taps_2[2], b_sum)


@triton.jit
def _grown(sums, b_a, taps):
    """``sums`` + a * taps: the gradients of three weights."""
    return tl.fma(b_a, taps[0], sums[0]), tl.fma(b_a, taps[1], sums[1]), tl.fma(b_a, taps[2], sums[2])


@triton.jit
def _silu_and_slope(b_h, FAST: tl.constexpr):
    """silu(z) and its derivative for z = 2 h; see :func:`common.sigmoid`."""
    if FAST:
        b_t = tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [b_h], dtype=tl.float32, is_pure=True, pack=1
        )
        b_a = tl.fma(b_h, b_t, b_h)
        b_s = tl.fma(b_t, 0.5, 0.5)
        return b_a, tl.fma(b_a, 1.0 - b_s, b_s)
    else:
        b_s = 1.0 / (1.0 + tl.exp(-2.0 * b_h))
        b_a = 2.0 * b_h * b_s
        return b_a, b_s + b_a * (1.0 - b_s)


@triton.jit
def _affine(p_mean, p_rstd, p_weight, p_bias, i_group, b_c, m_c, HAS_NORM: tl.constexpr):
    """mean, and scale and offset with h = z / 2 = (x - mean) scale + offset, for channels ``b_c`` of groups
    ``i_group``; each [1, BLOCK_C]."""
    if HAS_NORM:
        b_mean = tl.load(p_mean + i_group, mask=m_c, other=0.0)[None, :]
        b_rstd = tl.load(p_rstd + i_group, mask=m_c, other=0.0)[None, :]
        b_weight = tl.load(p_weight + b_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
        b_bias = tl.load(p_bias + b_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
        return b_mean, 0.5 * b_rstd * b_weight, 0.5 * b_bias
    else:
        return 0.0, 0.0, 0.0


@triton.jit
def _activation(b_x, affine, HAS_NORM: tl.constexpr, FAST: tl.constexpr):
    """a, its derivative by z, and x - mean."""
    b_x = b_x.to(tl.float32)
    if HAS_NORM:
        b_centered = b_x - affine[0]
        b_a, b_slope = _silu_and_slope(tl.fma(b_centered, affine[1], affine[2]), FAST)
        return b_a, b_slope, b_centered
    else:
        return b_x, b_x, b_x


@triton.jit
def _store_da(p_da, b_off, b_da, m):
    if p_da is not None:
        tl.store(p_da + b_off, b_da.to(p_da.dtype.element_ty), mask=m)


@triton.jit
def _norm_sums(sums, b_da, b_slope, b_centered):
    """``sums`` of dz and dz (x - mean), grown by those of these positions."""
    b_dz = b_da * b_slope
    return sums[0] + b_dz, tl.fma(b_dz, b_centered, sums[1])


@triton.jit
def depthwise_backward_kernel(
    p_x,
    p_dd,
    p_da,
    p_weight,
    p_mean,
    p_rstd,
    p_norm_weight,
    p_norm_bias,
    p_dweight,
    p_dz,
    p_dzx,
    C,
    H,
    W,
    OH,
    OW,
    G,
    CG,
    rows,
    chunks,
    STRIDE: tl.constexpr,
    UPSAMPLE: tl.constexpr,
    HAS_NORM: tl.constexpr,
    BIAS: tl.constexpr,
    FAST: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """da, and per part (a chunk of ``rows`` rows of positions and a block of columns, of one sample) the parts of the
    gradients of the nine weights and, where BIAS, of the bias, [9 or 10, C], and the sums of dz and of dz xhat, [C].

    p_da, p_dweight, p_dz with p_dzx: None where that is not needed (the sums: nor where there is no norm).
    Grid: B * chunks * cdiv(positions of a row, BLOCK_W) * cdiv(C, BLOCK_C).
    """
    PAIRS: tl.constexpr = STRIDE == 2 and not UPSAMPLE  # a position is two by two pixels of x
    WEIGHTS: tl.constexpr = p_dweight is not None
    SUMS: tl.constexpr = p_dz is not None
    width = OW if PAIRS else W
    height = OH if PAIRS else H
    blocks_c, blocks_w = tl.cdiv(C, BLOCK_C), tl.cdiv(width, BLOCK_W)
    i_program = tl.program_id(0)
    i_c, i_w, i_strip = i_program % blocks_c, (i_program // blocks_c) % blocks_w, i_program // (blocks_c * blocks_w)
    i_chunk, i_b = i_strip % chunks, (i_strip // chunks).to(tl.int64)
    b_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    b_w = i_w * BLOCK_W + tl.arange(0, BLOCK_W)
    m_c = b_c < C
    affine = _affine(p_mean, p_rstd, p_norm_weight, p_norm_bias, i_b * G + b_c // CG, b_c, m_c, HAS_NORM)
    weights_0 = _weights(p_weight, b_c, m_c, 0)
    weights_1 = _weights(p_weight, b_c, m_c, 1)
    weights_2 = _weights(p_weight, b_c, m_c, 2)
    b_zero = tl.zeros([BLOCK_W, BLOCK_C], dtype=tl.float32)
    grads_0, grads_1, grads_2 = (b_zero, b_zero, b_zero), (b_zero, b_zero, b_zero), (b_zero, b_zero, b_zero)
    b_bias = b_zero
    sums = (b_zero, b_zero)
    p_dd += i_b * OH * OW * C
    p_x += i_b * H * W * C
    if p_da is not None:
        p_da += i_b * H * W * C
    i_first = i_chunk * rows
    count = tl.minimum(height - i_first, rows)
    if PAIRS:
        # Position (i, j) holds the pixels (2i, 2j) ... (2i + 1, 2j + 1); dd of rows i, i + 1 and columns j, j + 1 reach
        # them, each tap once.
        b_left, b_right = 2 * b_w, 2 * b_w + 1
        b_off_l, b_off_r = b_left[:, None] * C + b_c[None, :], b_right[:, None] * C + b_c[None, :]
        m_l, m_r = (b_left < W)[:, None] & m_c[None, :], (b_right < W)[:, None] & m_c[None, :]
        upper = _columns(p_dd, i_first, OH, OW, C, b_w, b_c, m_c, STRIDE, UPSAMPLE)
        for i in range(count):
            i_row = i_first + i
            p_even = (2 * i_row).to(tl.int64) * W * C
            p_odd = p_even + W * C
            m_ol, m_or = m_l & (2 * i_row + 1 < H), m_r & (2 * i_row + 1 < H)
            b_x00 = tl.load(p_x + p_even + b_off_l, mask=m_l, other=0.0)
            b_x01 = tl.load(p_x + p_even + b_off_r, mask=m_r, other=0.0)
            b_x10 = tl.load(p_x + p_odd + b_off_l, mask=m_ol, other=0.0)
            b_x11 = tl.load(p_x + p_odd + b_off_r, mask=m_or, other=0.0)
            lower = _columns(p_dd, i_row + 1, OH, OW, C, b_w, b_c, m_c, STRIDE, UPSAMPLE)
            b_ul, b_ur = upper[0].to(tl.float32), upper[1].to(tl.float32)
            b_ll, b_lr = lower[0].to(tl.float32), lower[1].to(tl.float32)
            upper = lower
            b_a00, b_slope00, b_centered00 = _activation(b_x00, affine, HAS_NORM, FAST)
            b_a01, b_slope01, b_centered01 = _activation(b_x01, affine, HAS_NORM, FAST)
            b_a10, b_slope10, b_centered10 = _activation(b_x10, affine, HAS_NORM, FAST)
            b_a11, b_slope11, b_centered11 = _activation(b_x11, affine, HAS_NORM, FAST)
            b_da00 = weights_1[1] * b_ul
            b_da01 = weights_1[0] * b_ur + weights_1[2] * b_ul
            b_da10 = weights_0[1] * b_ll + weights_2[1] * b_ul
            b_da11 = weights_0[0] * b_lr + weights_0[2] * b_ll + weights_2[0] * b_ur + weights_2[2] * b_ul
            _store_da(p_da, p_even + b_off_l, b_da00, m_l)
            _store_da(p_da, p_even + b_off_r, b_da01, m_r)
            _store_da(p_da, p_odd + b_off_l, b_da10, m_ol)
            _store_da(p_da, p_odd + b_off_r, b_da11, m_or)
            # The last row and column of pairs may hang over the edge of x, where dd of inside is still in reach.
            if WEIGHTS:
                if HAS_NORM:
                    b_a01, b_a10 = tl.where(m_r, b_a01, 0.0), tl.where(m_ol, b_a10, 0.0)
                    b_a11 = tl.where(m_or, b_a11, 0.0)
                grads_0 = (grads_0[0] + b_a11 * b_lr, grads_0[1] + b_a10 * b_ll, grads_0[2] + b_a11 * b_ll)
                grads_1 = (grads_1[0] + b_a01 * b_ur, grads_1[1] + b_a00 * b_ul, grads_1[2] + b_a01 * b_ul)
                grads_2 = (grads_2[0] + b_a11 * b_ur, grads_2[1] + b_a10 * b_ul, grads_2[2] + b_a11 * b_ul)
                if BIAS:
                    b_bias += b_ul
            if SUMS:
                sums = _norm_sums(sums, b_da00, b_slope00, b_centered00)
                sums = _norm_sums(sums, tl.where(m_r, b_da01, 0.0), b_slope01, b_centered01)
                sums = _norm_sums(sums, tl.where(m_ol, b_da10, 0.0), b_slope10, b_centered10)
                sums = _norm_sums(sums, tl.where(m_or, b_da11, 0.0), b_slope11, b_centered11)
        m = m_l
    else:
        # A scan down the rows: a row of dd is read once per column of taps, and what is read is used a row later, so
        # that its latency hides behind a row's arithmetic.
        DOUBLE: tl.constexpr = UPSAMPLE and STRIDE == 1
        SCALE: tl.constexpr = 2 if DOUBLE else 1
        b_off = b_w[:, None] * C + b_c[None, :]
        m = (b_w < W)[:, None] & m_c[None, :]
        i_dd = SCALE * i_first
        above = _by_tap(_columns(p_dd, i_dd - 1, OH, OW, C, b_w, b_c, m_c, STRIDE, UPSAMPLE), STRIDE, UPSAMPLE)
        here = _by_tap(_columns(p_dd, i_dd, OH, OW, C, b_w, b_c, m_c, STRIDE, UPSAMPLE), STRIDE, UPSAMPLE)
        coming = _columns(p_dd, i_dd + 1, OH, OW, C, b_w, b_c, m_c, STRIDE, UPSAMPLE)
        coming_after = coming
        if DOUBLE:
            coming_after = _columns(p_dd, i_dd + 2, OH, OW, C, b_w, b_c, m_c, STRIDE, UPSAMPLE)
        b_coming = tl.load(p_x + i_first.to(tl.int64) * W * C + b_off, mask=m, other=0.0)
        for i in range(count):
            i_row = i_first + i
            i_dd = SCALE * (i_row + 1)
            p_row = i_row.to(tl.int64) * W * C
            arrived, arrived_after, b_x = coming, coming_after, b_coming
            coming = _columns(p_dd, i_dd + 1, OH, OW, C, b_w, b_c, m_c, STRIDE, UPSAMPLE)
            coming_after = coming
            if DOUBLE:
                coming_after = _columns(p_dd, i_dd + 2, OH, OW, C, b_w, b_c, m_c, STRIDE, UPSAMPLE)
            b_coming = tl.load(p_x + p_row + W * C + b_off, mask=m & (i_row + 1 < H), other=0.0)
            b_a, b_slope, b_centered = _activation(b_x, affine, HAS_NORM, FAST)
            below = _by_tap(arrived, STRIDE, UPSAMPLE)
            if DOUBLE:
                last = _by_tap(arrived_after, STRIDE, UPSAMPLE)
                taps_0, taps_1, taps_2 = _plus(below, last), _plus(here, below), _plus(above, here)
                above, here = below, last
            elif UPSAMPLE:
                taps_0, taps_1, taps_2 = below, here, here
                here = below
            else:
                taps_0, taps_1, taps_2 = below, here, above
                above, here = here, below
            b_da = _dot(weights_0, weights_1, weights_2, taps_0, taps_1, taps_2)
            _store_da(p_da, p_row + b_off, b_da, m)
            if WEIGHTS:
                grads_0, grads_1 = _grown(grads_0, b_a, taps_0), _grown(grads_1, b_a, taps_1)
                grads_2 = _grown(grads_2, b_a, taps_2)
                if BIAS:
                    b_bias += taps_1[1]
            if SUMS:
                sums = _norm_sums(sums, b_da, b_slope, b_centered)
    # Columns beyond the edge have added something as well.
    i_part = (i_b * chunks + i_chunk) * blocks_w + i_w
    if WEIGHTS:
        p_out = p_dweight + i_part * (10 if BIAS else 9) * C + b_c
        for i_tap in tl.static_range(3):
            tl.store(p_out + i_tap * C, tl.sum(tl.where(m, grads_0[i_tap], 0.0), 0), mask=m_c)
            tl.store(p_out + (3 + i_tap) * C, tl.sum(tl.where(m, grads_1[i_tap], 0.0), 0), mask=m_c)
            tl.store(p_out + (6 + i_tap) * C, tl.sum(tl.where(m, grads_2[i_tap], 0.0), 0), mask=m_c)
        if BIAS:
            tl.store(p_out + 9 * C, tl.sum(tl.where(m, b_bias, 0.0), 0), mask=m_c)
    if SUMS:
        tl.store(p_dz + i_part * C + b_c, tl.sum(tl.where(m, sums[0], 0.0), 0), mask=m_c)
        # Times rstd, x - mean is xhat. It is read only here, which spares registers.
        b_rstd = tl.load(p_rstd + i_b * G + b_c // CG, mask=m_c, other=0.0)
        tl.store(p_dzx + i_part * C + b_c, tl.sum(tl.where(m, sums[1], 0.0), 0) * b_rstd, mask=m_c)


@triton.jit
def norm_gradient_kernel(
    p_x,
    p_da,
    p_add,
    p_dx,
    p_weight,
    p_bias,
    p_mean,
    p_rstd,
    p_mean_g,
    p_mean_gx,
    C,
    P,
    G,
    CG,
    tiles,
    chunks,
    FAST: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dx = rstd (dz weight - mean_g - xhat mean_gx) + add (unless p_add is None), with dz = da silu'(z).

    dx may be the memory of da. Grid: B * chunks * cdiv(C, BLOCK_C); a chunk is ``tiles`` tiles.
    """
    blocks_c = tl.cdiv(C, BLOCK_C)
    i_program = tl.program_id(0)
    i_c, i_chunk = i_program % blocks_c, (i_program // blocks_c) % chunks
    i_b = (i_program // (blocks_c * chunks)).to(tl.int64)
    b_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    b_p = tl.arange(0, BLOCK_P)
    m_c = b_c < C
    i_group = i_b * G + b_c // CG
    affine = _affine(p_mean, p_rstd, p_weight, p_bias, i_group, b_c, m_c, True)
    b_rstd = tl.load(p_rstd + i_group, mask=m_c, other=0.0)[None, :]
    b_dz_scale = b_rstd * tl.load(p_weight + b_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    b_x_scale = -b_rstd * b_rstd * tl.load(p_mean_gx + i_group, mask=m_c, other=0.0)[None, :]
    b_offset = -b_rstd * tl.load(p_mean_g + i_group, mask=m_c, other=0.0)[None, :]
    b_off = b_p[:, None] * C + b_c[None, :]
    for i_tile in range(tiles):
        i_p = (i_chunk * tiles + i_tile) * BLOCK_P
        m = (b_p < P - i_p)[:, None] & m_c[None, :]
        i_first = (i_b * P + i_p) * C
        b_x = tl.load(p_x + i_first + b_off, mask=m, other=0.0)
        b_da = tl.load(p_da + i_first + b_off, mask=m, other=0.0).to(tl.float32)
        _, b_slope, b_centered = _activation(b_x, affine, True, FAST)
        b_dx = tl.fma(b_da * b_slope, b_dz_scale, tl.fma(b_centered, b_x_scale, b_offset))
        if p_add is not None:
            b_dx += tl.load(p_add + i_first + b_off, mask=m, other=0.0).to(tl.float32)
        tl.store(p_dx + i_first + b_off, b_dx.to(p_dx.dtype.element_ty), mask=m)


class Parts(NamedTuple):
    """Parts of sums over the pixels, fp32; None where not needed. weight: [B * parts, 9 or 10, C], the tenth that of
    the bias. dz and dz xhat: [2, B, parts, C]."""

    weight: Tensor | None
    norm: Tensor | None


def _narrowest(configs: Sequence[Config], width: int) -> Config:
    """The first config that is no wider than the image, so that few columns are computed for nothing."""
    return next((config for config in configs if config.block_w <= common.pow2(width)), configs[-1])


def depthwise_backward(
    dd: Tensor,
    x: Tensor,
    weight: Tensor,
    norm: Affine | None,
    stride: int,
    upsample: bool,
    da: Tensor | None,
    needs: tuple[bool, bool, bool],
) -> Parts:
    """One pass over x [B, C, H, W] and dd [B, C, H', W'], both channels_last: da is filled where it is given.

    needs: whether the gradient of the weight, that of the bias, and the sums for the norm are wanted.
    """
    batch, channels, height, width = x.shape
    out_height, out_width = dd.shape[2:]
    rows_all, columns = (out_height, out_width) if stride == 2 and not upsample else (height, width)
    in_weight, in_bias, in_sums = needs
    pointers = (x, x, x, x) if norm is None else norm[:4]
    groups = 1 if norm is None else norm.num_groups

    def launch(config: Config) -> Parts:
        blocks_w, blocks_c = triton.cdiv(columns, config.block_w), triton.cdiv(channels, config.block_c)
        wanted = triton.cdiv(PROGRAMS * common.processors(x), batch * blocks_w * blocks_c)
        rows = min(max(triton.cdiv(rows_all, wanted), MIN_ROWS), rows_all)
        chunks = triton.cdiv(rows_all, rows)
        parts = chunks * blocks_w
        found = Parts(
            new_parts(x, batch * parts, 10 if in_bias else 9, channels) if in_weight or in_bias else None,
            new_parts(x, 2, batch, parts, channels) if in_sums else None,
        )
        dz, dzx = (None, None) if found.norm is None else found.norm
        depthwise_backward_kernel[(batch * chunks * blocks_w * blocks_c,)](
            x, dd, da, weight, *pointers, found.weight, dz, dzx,
            channels, height, width, out_height, out_width, groups, channels // groups, rows, chunks,
            STRIDE=stride, UPSAMPLE=upsample, HAS_NORM=norm is not None, BIAS=in_bias,
            FAST=norm is not None and common.fast(x.dtype),
            BLOCK_W=config.block_w, BLOCK_C=config.block_c, num_warps=config.num_warps,
        )  # fmt: skip
        return found

    key = (str(x.dtype), *x.shape, stride, upsample, norm is not None, da is not None, *needs)
    default = _narrowest(DEPTHWISE_CONFIGS, columns)
    return launch(tuning.choose("depthwise_backward", key, DEPTHWISE_CONFIGS, default, launch))


def norm_gradient(x: Tensor, da: Tensor, add: Tensor | None, norm: Affine, means: Tensor) -> None:
    """Turn da, [B, C, H, W] as x (channels_last), into dx in place; means: mean_g and mean_gx, [2, B, G]."""
    batch, channels, height, width = x.shape
    pixels = height * width

    def launch(config: GradientConfig, dx: Tensor) -> None:
        steps, blocks_c = triton.cdiv(pixels, config.block_p), triton.cdiv(channels, config.block_c)
        tiles = min(triton.cdiv(steps * batch * blocks_c, 16 * common.processors(x)), MAX_TILES)
        chunks = triton.cdiv(steps, tiles)
        norm_gradient_kernel[(batch * chunks * blocks_c,)](
            x, da, add, dx, norm.weight, norm.bias, norm.mean, norm.rstd, means[0], means[1],
            channels, pixels, norm.num_groups, channels // norm.num_groups, tiles, chunks,
            FAST=common.fast(x.dtype), BLOCK_P=config.block_p, BLOCK_C=config.block_c, num_warps=config.num_warps,
        )  # fmt: skip

    key = (str(x.dtype), batch, pixels, channels, add is not None)
    default = next((c for c in GRADIENT_CONFIGS if c.block_c <= common.pow2(channels)), GRADIENT_CONFIGS[-1])
    # Timed runs must leave da as it is.
    config = tuning.choose(
        "norm_gradient", key, GRADIENT_CONFIGS, default, lambda config: launch(config, torch.empty_like(da))
    )
    launch(config, da)


def _merged_norm(parts: Tensor, norm: Affine, pixels: int) -> tuple[Tensor, Tensor]:
    """Of parts [2, B, parts, C] the sums of dz and dz xhat, [2, B, C], and their means by group, [2, B, G], weighted
    with the norm's weight."""
    _, batch, count, channels = parts.shape
    per_group = channels // norm.num_groups
    sums, means = new_parts(parts, 2, batch, channels), new_parts(parts, 2, batch, norm.num_groups)
    block_c = common.pow2(per_group)
    block = max(1, min(norm_kernels.MERGE_BLOCK, 4096 // block_c))
    norm_kernels.merge_sums_kernel[(batch * norm.num_groups,)](
        parts[0], parts[1], norm.weight, sums[0], sums[1], means[0], means[1],
        channels, pixels, norm.num_groups, count, CG=per_group, BLOCK_CG=block_c, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return sums, means


def _norm_parameters(sums: Tensor, norm: Affine) -> tuple[Tensor, Tensor]:
    """The gradients of the norm's weight and bias of the sums over the pixels, [2, B, C]."""
    dweight, dbias = torch.empty_like(norm.weight), torch.empty_like(norm.bias)
    _, batch, channels = sums.shape
    norm_kernels.parameters_kernel[(triton.cdiv(channels, 64),)](
        sums[0], sums[1], dweight, dbias, batch, channels, BLOCK_B=16, BLOCK_C=64, num_warps=4
    )
    return dweight, dbias


def _depthwise_parameters(parts: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The gradients of weight [C, 1, 3, 3] and bias [C] of their parts [any, 9 or 10, C]."""
    channels, dweight = weight.shape[0], torch.empty_like(weight)
    if bias is None:
        return weight_gradient.add_parts(parts, dweight, inner=channels, strides=(1, 9)), None
    sums = weight_gradient.add_parts(parts, new_parts(parts, 10, channels))
    return dweight.copy_(sums[:9].t().reshape(weight.shape)), sums[9].to(bias.dtype)


class Saved(NamedTuple):
    """What the forward of a separable convolution was called with: y = pointwise(depthwise3x3([up2x] [SiLU(norm] x [)])
    + dw_bias) + pw_bias + shift. x is channels_last, the parameters are contiguous."""

    x: Tensor
    dw_weight: Tensor
    pw_weight: Tensor
    dw_bias: Tensor | None = None
    pw_bias: Tensor | None = None
    norm: Affine | None = None
    shift: Tensor | None = None
    stride: int = 1
    upsample: bool = False


class Wanted(NamedTuple):
    """Which gradients of a :class:`Saved` are wanted; only of what is there."""

    x: bool = False
    dw_weight: bool = False
    pw_weight: bool = False
    dw_bias: bool = False
    pw_bias: bool = False
    norm_weight: bool = False
    norm_bias: bool = False
    shift: bool = False

    @property
    def norm(self) -> bool:
        return self.norm_weight or self.norm_bias


class Found(NamedTuple):
    """The gradients, as :class:`Wanted`: x in channels_last, the others contiguous; maybe None where not wanted."""

    x: Tensor | None = None
    dw_weight: Tensor | None = None
    pw_weight: Tensor | None = None
    dw_bias: Tensor | None = None
    pw_bias: Tensor | None = None
    norm_weight: Tensor | None = None
    norm_bias: Tensor | None = None
    shift: Tensor | None = None


class Plan(NamedTuple):
    """``samples`` samples at a time go through the kernels, so that their d and dd stay in the L2 cache."""

    samples: int


def plans(saved: Saved, dy: Tensor) -> tuple[tuple[Plan, ...], Plan]:
    """The plans that a half may follow, and the rule's choice. ``samples`` divides the batch: all blocks are alike."""
    batch, channels = saved.x.shape[:2]
    fitting = samples_at_once(batch, channels * dy.shape[2] * dy.shape[3] * dy.element_size())
    rule = Plan(next(n for n in range(fitting, 0, -1) if batch % n == 0))
    return tuple(dict.fromkeys((rule, Plan(batch)))), rule


def _in_blocks(
    saved: Saved, dy: Tensor, wanted: Wanted, samples: int
) -> tuple[Tensor | None, weight_gradient.Parts, Parts]:
    """da, and the parts of all gradients that are sums over the pixels; ``samples`` samples at a time."""
    x, norm, batch = saved.x, saved.norm, saved.x.shape[0]
    da = torch.empty_like(x, memory_format=torch.channels_last) if wanted.x else None
    in_sums = norm is not None and (wanted.x or wanted.norm)
    outer, inner = [], []
    for first in range(0, batch, samples):
        some = slice(first, first + samples)
        norm_some = None if norm is None else norm.samples(first, first + samples)
        if wanted.pw_weight:
            d = depthwise(x[some], saved.dw_weight, saved.dw_bias, norm_some, saved.stride, saved.upsample)
            outer.append(weight_gradient.weight_parts(dy[some], d, wanted.pw_bias or wanted.shift))
            del d  # dd takes its place
        elif wanted.pw_bias or wanted.shift:
            outer.append(weight_gradient.Parts(None, weight_gradient.channel_sums(dy[some])))
        if wanted.x or wanted.dw_weight or wanted.dw_bias or in_sums:
            dd = pointwise(dy[some], saved.pw_weight, transposed=True)
            inner.append(
                depthwise_backward(
                    dd,
                    x[some],
                    saved.dw_weight,
                    norm_some,
                    saved.stride,
                    saved.upsample,
                    None if da is None else da[some],
                    (wanted.dw_weight, wanted.dw_bias, in_sums),
                )
            )
            del dd
    return (
        da,
        weight_gradient.Parts(joined([part.weight for part in outer]), joined([part.sums for part in outer])),
        Parts(joined([part.weight for part in inner]), joined([part.norm for part in inner], dim=1)),
    )


def half(saved: Saved, dy: Tensor, wanted: Wanted, add: Callable[[], Tensor] | None = None) -> Found:
    """The backward of ``saved``.

    Args:
        dy: [B, O, H', W'], channels_last. Neither it nor x is empty.
        add: gives [B, C, H, W] in channels_last, to be added to the gradient of x; only with a norm. Called last, when
            other scratch memory has been freed.
    """
    candidates, default = plans(saved, dy)

    def follow(plan: Plan) -> tuple[Tensor | None, weight_gradient.Parts, Parts]:
        return _in_blocks(saved, dy, wanted, plan.samples)

    key = (
        str(dy.dtype), *saved.x.shape, dy.shape[1], saved.stride, saved.upsample, saved.norm is not None, *wanted
    )  # fmt: skip
    da, outer, inner = follow(tuning.choose("sepconv_backward", key, candidates, default, follow))
    found = Found(
        x=da,
        pw_weight=weight_gradient.added(outer.weight, saved.pw_weight if wanted.pw_weight else None),
        pw_bias=weight_gradient.added(outer.sums, saved.pw_bias if wanted.pw_bias else None),
        shift=weight_gradient.added(outer.sums, saved.shift if wanted.shift else None, sets=dy.shape[0]),
    )
    if inner.weight is not None:
        dweight, dbias = _depthwise_parameters(inner.weight, saved.dw_weight, saved.dw_bias if wanted.dw_bias else None)
        found = found._replace(dw_weight=dweight, dw_bias=dbias)
    if saved.norm is not None and inner.norm is not None:
        sums, means = _merged_norm(inner.norm, saved.norm, saved.x.shape[2] * saved.x.shape[3])
        if wanted.norm:
            dweight, dbias = _norm_parameters(sums, saved.norm)
            found = found._replace(norm_weight=dweight, norm_bias=dbias)
        if da is not None:
            norm_gradient(saved.x, da, None if add is None else add(), saved.norm, means)
    return found


def gradients(
    found: Sequence[Tensor | None], arguments: Sequence[Tensor | None], needs: Sequence[bool], like_: Tensor
) -> tuple[Tensor, ...]:
    """What a backward op returns: gradients laid out as their arguments, zeros where there is nothing to add up, and
    empty tensors for those not needed."""
    results = []
    for gradient, argument, need in zip(found, arguments, needs, strict=True):
        if not need or argument is None:
            results.append(like_.new_empty(0))
        else:
            results.append(torch.zeros_like(argument) if gradient is None else like(gradient, argument))
    return tuple(results)


def plain(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.contiguous()


def backward(
    dy: Tensor,
    x: Tensor,
    dw_weight: Tensor,
    pw_weight: Tensor,
    dw_bias: Tensor | None,
    pw_bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    num_groups: int,
    eps: float,
    stride: int,
    upsample: bool,
    mean: Tensor,
    rstd: Tensor,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    """``snapgen::sepconv_backward``."""
    arguments = (x, dw_weight, pw_weight, dw_bias, pw_bias, norm_weight, norm_bias, shift, residual)
    if dy.numel() == 0 or x.numel() == 0:
        return gradients([None] * len(arguments), arguments, needs, dy)
    norm = None
    if norm_weight is not None and norm_bias is not None:
        norm = Affine(mean, rstd, norm_weight.contiguous(), norm_bias.contiguous(), num_groups)
    saved = Saved(
        common.channels_last(x),
        dw_weight.contiguous(),
        pw_weight.contiguous(),
        plain(dw_bias),
        plain(pw_bias),
        norm,
        plain(shift),
        stride,
        upsample,
    )
    there = [need and argument is not None for need, argument in zip(needs, arguments, strict=True)]
    found = half(saved, common.channels_last(dy), Wanted(*there[:8]))
    dresidual = torch.empty_like(residual).copy_(dy) if residual is not None and needs[8] else None
    return gradients((*found, dresidual), arguments, needs, dy)


def builds(dtype: torch.dtype, nvidia: bool) -> list[Build]:
    """Every kernel of this file in every config that its launchers may choose."""
    fast = nvidia and dtype == torch.bfloat16
    found: list[Build] = []
    for config in DEPTHWISE_CONFIGS:
        for stride, upsample in ((1, False), (2, False), (1, True), (2, True)):
            for norm in (True, False):
                for wanted in ("all", "no bias", "input", "weight"):
                    flags: dict[str, Any] = {"STRIDE": stride, "UPSAMPLE": upsample, "HAS_NORM": norm}
                    flags |= {"BIAS": wanted == "all", "FAST": norm and fast}
                    flags |= {"p_dweight": None} if wanted == "input" else {}
                    flags |= {"p_da": None} if wanted == "weight" else {}
                    flags |= {} if norm and wanted != "weight" else {"p_dz": None, "p_dzx": None}
                    images = ("p_x", "p_dd", "p_da", "p_weight")
                    found.append(common.build(depthwise_backward_kernel, dtype, images, config, ("C",), **flags))
    images = ("p_x", "p_da", "p_add", "p_dx")
    for gradient in GRADIENT_CONFIGS:
        for extra in ({"p_add": None}, {}):
            flags = {"FAST": fast, **extra}
            found.append(common.build(norm_gradient_kernel, dtype, images, gradient, ("C",), **flags))
    return found
