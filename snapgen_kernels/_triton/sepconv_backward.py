"""Backward of the separable convolution on the GPU; the contract is in ``snapgen_kernels/sepconv.py``.

For d = DW(a) + dw_bias, a = [nearest 2x of] SiLU(z), z = xhat norm_weight + norm_bias, and dd the gradient of d, one pass
over x and dd gives da, the parts of the gradients of the depthwise convolution, and those of the two sums per channel
that the norm's gradient needs. Where there is no norm, da is dx; else a second pass makes dx of da. Sums are parts in
fp32, added in a fixed order that depends on the shape alone: no atomics, a repeat is bitwise equal.

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
from snapgen_kernels._triton import common, weight_gradient
from snapgen_kernels._triton import group_norm_silu as norm_kernels


class Config(NamedTuple):
    """A tile of BLOCK_W positions of a row by BLOCK_C channels: 4 values a thread, so that nine accumulators and nine
    weights a channel stay in registers."""

    block_w: int
    block_c: int
    num_warps: int


DEPTHWISE_CONFIGS = {"wide": Config(16, 32, 4), "narrow": Config(4, 128, 4)}
# Programs per multiprocessor, about three times what runs at once; more would lengthen the adding of their parts.
PROGRAMS = 8
# Rows of a program, at least: two more are read.
MIN_ROWS = 8


class GradientConfig(NamedTuple):
    """A tile of BLOCK_P pixels by BLOCK_C channels."""

    block_p: int
    block_c: int
    num_warps: int


GRADIENT_CONFIGS = {"wide": GradientConfig(32, 128, 4), "narrow": GradientConfig(128, 32, 4)}


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


@triton.jit
def _dot(weights, taps):
    return weights[0] * taps[0] + weights[1] * taps[1] + weights[2] * taps[2]


@triton.jit
def _grown(sums, b_a, taps):
    """``sums`` + a * taps: the gradients of three weights."""
    return sums[0] + b_a * taps[0], sums[1] + b_a * taps[1], sums[2] + b_a * taps[2]


@triton.jit
def _activation(b_x, m, affine, HAS_NORM: tl.constexpr, FAST: tl.constexpr):
    """a (0 outside of the image), its derivative by z, and xhat. affine: mean, rstd, norm weight, norm bias."""
    if HAS_NORM:
        b_xhat = (b_x.to(tl.float32) - affine[0]) * affine[1]
        b_z = b_xhat * affine[2] + affine[3]
        b_s = common.sigmoid(b_z, FAST)
        b_a = b_z * b_s
        return tl.where(m, b_a, 0.0), b_s + b_a * (1.0 - b_s), b_xhat
    else:
        b_a = b_x.to(tl.float32)  # 0 outside: so it was loaded
        return b_a, b_a, b_a


@triton.jit
def _affine(p_mean, p_rstd, p_norm_weight, p_norm_bias, i_group, b_c, m_c, HAS_NORM: tl.constexpr):
    """mean, rstd, norm weight and norm bias of the channels ``b_c``, whose groups are ``i_group``; each [1, BLOCK_C]."""
    if HAS_NORM:
        b_mean = tl.load(p_mean + i_group, mask=m_c, other=0.0)[None, :]
        b_rstd = tl.load(p_rstd + i_group, mask=m_c, other=0.0)[None, :]
        b_weight = tl.load(p_norm_weight + b_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
        b_bias = tl.load(p_norm_bias + b_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
        return b_mean, b_rstd, b_weight, b_bias
    else:
        return 0.0, 0.0, 0.0, 0.0


@triton.jit
def _store_da(p_da, b_off, b_da, m):
    if p_da is not None:
        tl.store(p_da + b_off, b_da.to(p_da.dtype.element_ty), mask=m)


@triton.jit
def _norm_sums(sums, b_da, b_slope, b_xhat, m):
    """``sums`` of dz and dz xhat, grown by those of these positions."""
    b_dz = tl.where(m, b_da * b_slope, 0.0)
    return sums[0] + b_dz, sums[1] + b_dz * b_xhat


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
    INPUT: tl.constexpr,
    WEIGHTS: tl.constexpr,
    FAST: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """da, and per part (a chunk of ``rows`` rows of positions and a block of columns, of one sample) the parts of the
    gradients of the nine weights and the bias, [10, C], and where HAS_NORM the sums of dz and of dz xhat, [C].

    INPUT: da (stored unless p_da is None) and the sums. WEIGHTS: the gradients of the weights.
    Grid: B * chunks * cdiv(positions of a row, BLOCK_W) * cdiv(C, BLOCK_C).
    """
    PAIRS: tl.constexpr = STRIDE == 2 and not UPSAMPLE  # a position is two by two pixels of x
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
    weights_0, weights_1, weights_2 = (
        _weights(p_weight, b_c, m_c, 0),
        _weights(p_weight, b_c, m_c, 1),
        _weights(p_weight, b_c, m_c, 2),
    )
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
            m_odd = 2 * i_row + 1 < H
            p_even = (2 * i_row).to(tl.int64) * W * C
            p_odd = p_even + W * C
            b_x00 = tl.load(p_x + p_even + b_off_l, mask=m_l, other=0.0)
            b_x01 = tl.load(p_x + p_even + b_off_r, mask=m_r, other=0.0)
            b_x10 = tl.load(p_x + p_odd + b_off_l, mask=m_l & m_odd, other=0.0)
            b_x11 = tl.load(p_x + p_odd + b_off_r, mask=m_r & m_odd, other=0.0)
            lower = _columns(p_dd, i_row + 1, OH, OW, C, b_w, b_c, m_c, STRIDE, UPSAMPLE)
            b_ul, b_ur = upper[0].to(tl.float32), upper[1].to(tl.float32)
            b_ll, b_lr = lower[0].to(tl.float32), lower[1].to(tl.float32)
            upper = lower
            b_a00, b_slope00, b_xhat00 = _activation(b_x00, m_l, affine, HAS_NORM, FAST)
            b_a01, b_slope01, b_xhat01 = _activation(b_x01, m_r, affine, HAS_NORM, FAST)
            b_a10, b_slope10, b_xhat10 = _activation(b_x10, m_l & m_odd, affine, HAS_NORM, FAST)
            b_a11, b_slope11, b_xhat11 = _activation(b_x11, m_r & m_odd, affine, HAS_NORM, FAST)
            if WEIGHTS:
                grads_0 = (grads_0[0] + b_a11 * b_lr, grads_0[1] + b_a10 * b_ll, grads_0[2] + b_a11 * b_ll)
                grads_1 = (grads_1[0] + b_a01 * b_ur, grads_1[1] + b_a00 * b_ul, grads_1[2] + b_a01 * b_ul)
                grads_2 = (grads_2[0] + b_a11 * b_ur, grads_2[1] + b_a10 * b_ul, grads_2[2] + b_a11 * b_ul)
                b_bias += b_ul
            if INPUT:
                b_da00 = weights_1[1] * b_ul
                b_da01 = weights_1[0] * b_ur + weights_1[2] * b_ul
                b_da10 = weights_0[1] * b_ll + weights_2[1] * b_ul
                b_da11 = weights_0[0] * b_lr + weights_0[2] * b_ll + weights_2[0] * b_ur + weights_2[2] * b_ul
                _store_da(p_da, p_even + b_off_l, b_da00, m_l)
                _store_da(p_da, p_even + b_off_r, b_da01, m_r)
                _store_da(p_da, p_odd + b_off_l, b_da10, m_l & m_odd)
                _store_da(p_da, p_odd + b_off_r, b_da11, m_r & m_odd)
                if HAS_NORM:
                    sums = _norm_sums(sums, b_da00, b_slope00, b_xhat00, m_l)
                    sums = _norm_sums(sums, b_da01, b_slope01, b_xhat01, m_r)
                    sums = _norm_sums(sums, b_da10, b_slope10, b_xhat10, m_l & m_odd)
                    sums = _norm_sums(sums, b_da11, b_slope11, b_xhat11, m_r & m_odd)
    else:
        # A scan down the rows: a row of dd is read once per column of taps, and what is read is used a row later, so
        # that its latency hides behind a row's arithmetic.
        DOUBLE: tl.constexpr = UPSAMPLE and STRIDE == 1
        SCALE: tl.constexpr = 2 if DOUBLE else 1
        b_off = b_w[:, None] * C + b_c[None, :]
        m = (b_w < W)[:, None] & m_c[None, :]
        above = _by_tap(
            _columns(p_dd, SCALE * i_first - 1, OH, OW, C, b_w, b_c, m_c, STRIDE, UPSAMPLE), STRIDE, UPSAMPLE
        )
        here = _by_tap(_columns(p_dd, SCALE * i_first, OH, OW, C, b_w, b_c, m_c, STRIDE, UPSAMPLE), STRIDE, UPSAMPLE)
        next_row = _columns(p_dd, SCALE * i_first + 1, OH, OW, C, b_w, b_c, m_c, STRIDE, UPSAMPLE)
        after = next_row
        if DOUBLE:
            after = _columns(p_dd, SCALE * i_first + 2, OH, OW, C, b_w, b_c, m_c, STRIDE, UPSAMPLE)
        b_x = tl.load(p_x + i_first.to(tl.int64) * W * C + b_off, mask=m, other=0.0)
        for i in range(count):
            i_row = i_first + i
            p_row = i_row.to(tl.int64) * W * C
            coming = _columns(p_dd, SCALE * (i_row + 1) + 1, OH, OW, C, b_w, b_c, m_c, STRIDE, UPSAMPLE)
            coming_after = coming
            if DOUBLE:
                coming_after = _columns(p_dd, SCALE * (i_row + 1) + 2, OH, OW, C, b_w, b_c, m_c, STRIDE, UPSAMPLE)
            b_coming = tl.load(p_x + p_row + W * C + b_off, mask=m & (i_row + 1 < H), other=0.0)
            b_a, b_slope, b_xhat = _activation(b_x, m, affine, HAS_NORM, FAST)
            below = _by_tap(next_row, STRIDE, UPSAMPLE)
            if DOUBLE:
                last = _by_tap(after, STRIDE, UPSAMPLE)
                taps_0, taps_1, taps_2 = _plus(below, last), _plus(here, below), _plus(above, here)
                above, here = below, last
            elif UPSAMPLE:
                taps_0, taps_1, taps_2 = below, here, here
                here = below
            else:
                taps_0, taps_1, taps_2 = below, here, above
                above, here = here, below
            next_row, after, b_x = coming, coming_after, b_coming
            if WEIGHTS:
                grads_0, grads_1 = _grown(grads_0, b_a, taps_0), _grown(grads_1, b_a, taps_1)
                grads_2 = _grown(grads_2, b_a, taps_2)
                b_bias += taps_1[1]
            if INPUT:
                b_da = _dot(weights_0, taps_0) + _dot(weights_1, taps_1) + _dot(weights_2, taps_2)
                _store_da(p_da, p_row + b_off, b_da, m)
                if HAS_NORM:
                    sums = _norm_sums(sums, b_da, b_slope, b_xhat, m)
    i_part = (i_b * chunks + i_chunk) * blocks_w + i_w
    if WEIGHTS:
        p_out = p_dweight + i_part * 10 * C + b_c
        tl.store(p_out, tl.sum(grads_0[0], 0), mask=m_c)
        tl.store(p_out + C, tl.sum(grads_0[1], 0), mask=m_c)
        tl.store(p_out + 2 * C, tl.sum(grads_0[2], 0), mask=m_c)
        tl.store(p_out + 3 * C, tl.sum(grads_1[0], 0), mask=m_c)
        tl.store(p_out + 4 * C, tl.sum(grads_1[1], 0), mask=m_c)
        tl.store(p_out + 5 * C, tl.sum(grads_1[2], 0), mask=m_c)
        tl.store(p_out + 6 * C, tl.sum(grads_2[0], 0), mask=m_c)
        tl.store(p_out + 7 * C, tl.sum(grads_2[1], 0), mask=m_c)
        tl.store(p_out + 8 * C, tl.sum(grads_2[2], 0), mask=m_c)
        tl.store(p_out + 9 * C, tl.sum(b_bias, 0), mask=m_c)
    if INPUT and HAS_NORM:
        tl.store(p_dz + i_part * C + b_c, tl.sum(sums[0], 0), mask=m_c)
        tl.store(p_dzx + i_part * C + b_c, tl.sum(sums[1], 0), mask=m_c)


def builds(dtype: torch.dtype, nvidia: bool) -> list[common.Build]:
    name = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
    found = []
    for config in DEPTHWISE_CONFIGS.values():
        for stride, upsample in ((1, False), (2, False), (1, True), (2, True)):
            for normed in (True, False):
                for inputs, weights in ((True, True), (True, False), (False, True)):
                    constants: dict[str, Any] = {
                        "BLOCK_W": config.block_w,
                        "BLOCK_C": config.block_c,
                        "STRIDE": stride,
                        "UPSAMPLE": upsample,
                        "HAS_NORM": normed,
                        "INPUT": inputs,
                        "WEIGHTS": weights,
                        "FAST": nvidia and dtype == torch.bfloat16,
                    }
                    constants |= {} if inputs else {"p_da": None}
                    pointers = {"p_x": name, "p_dd": name, "p_da": name, "p_weight": name}
                    found.append(
                        common.Build(
                            depthwise_backward_kernel, constants, pointers, {"num_warps": config.num_warps}, ("C",)
                        )
                    )
    return found
