"""Backward of the depthwise 3x3 convolution on the GPU, with the norm and SiLU in front of it.

For d = DW(a) + bias, a = [nearest 2x of] SiLU(z), z = xhat norm_weight + norm_bias, and dd the gradient of d, one pass
over x and dd gives da, the parts of the gradients of weight and bias, and those of the two sums per channel that the
norm's gradient needs. Where there is no norm, da is dx; else ``norm_backward.py`` makes dx of da. Sums are parts in
fp32, added in a fixed order that depends on the shape alone: no atomics, a repeat is bitwise equal.

A position is a pixel of x, or two by two of them where the stride is 2. H and W are the sizes of x, OH and OW those of
d. taps_r[c] is the dd that reaches a position through tap (r, c) of the 3x3 kernel.
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
from snapgen_kernels._triton.depthwise import Affine
from snapgen_kernels._triton.norm_backward import activation, centred
from snapgen_kernels._triton.weight_gradient import add_parts, new_parts


class Config(NamedTuple):
    """A tile of BLOCK_W positions of a row by BLOCK_C channels: 4 values a thread, so that nine accumulators and nine
    weights a channel stay in registers."""

    block_w: int
    block_c: int
    num_warps: int


CONFIGS = (Config(16, 32, 4), Config(8, 64, 4))
# Programs of one sample: two for each multiprocessor of the largest GPUs. A constant, so that a sample's gradient
# depends neither on the GPU nor on the rest of its batch.
MIN_PROGRAMS = 264
# Rows of a program: with few, the two more that are read weigh; with many, the last programs leave the GPU half idle.
MIN_ROWS, MAX_ROWS = 8, 64


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
def _weights(p_weight, C, b_c, m_c, ROW: tl.constexpr):
    """Taps (ROW, 0..2), each [1, BLOCK_C]."""
    b_0 = tl.load(p_weight + (3 * ROW) * C + b_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    b_1 = tl.load(p_weight + (3 * ROW + 1) * C + b_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    b_2 = tl.load(p_weight + (3 * ROW + 2) * C + b_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
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
def _norm_sums(sums, b_da, b_slope, b_centered):
    """``sums`` of dz and dz (x - mean), grown by those of these positions."""
    b_dz = b_da * b_slope
    return sums[0] + b_dz, tl.fma(b_dz, b_centered, sums[1])


@triton.jit
def depthwise_backward_kernel(
    p_x,
    p_dd,
    p_da,
    p_add,
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

    p_dweight: None where that is not needed; p_dz and p_dzx: where there is no norm. p_add: added to da as it is
    stored, or None; only where a position is a pixel and there is no norm.
    Grid: B * chunks * cdiv(positions of a row, BLOCK_W) * cdiv(C, BLOCK_C).
    """
    PAIRS: tl.constexpr = STRIDE == 2 and not UPSAMPLE  # a position is two by two pixels of x
    WEIGHTS: tl.constexpr = p_dweight is not None
    width = OW if PAIRS else W
    height = OH if PAIRS else H
    blocks_c, blocks_w = tl.cdiv(C, BLOCK_C), tl.cdiv(width, BLOCK_W)
    i_program = tl.program_id(0)
    i_c, i_w, i_strip = i_program % blocks_c, (i_program // blocks_c) % blocks_w, i_program // (blocks_c * blocks_w)
    i_chunk, i_b = i_strip % chunks, (i_strip // chunks).to(tl.int64)
    b_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    b_w = i_w * BLOCK_W + tl.arange(0, BLOCK_W)
    m_c = b_c < C
    affine = centred(p_mean, p_rstd, p_norm_weight, p_norm_bias, i_b * G + b_c // CG, b_c, m_c, HAS_NORM)
    weights_0 = _weights(p_weight, C, b_c, m_c, 0)
    weights_1 = _weights(p_weight, C, b_c, m_c, 1)
    weights_2 = _weights(p_weight, C, b_c, m_c, 2)
    b_zero = tl.zeros([BLOCK_W, BLOCK_C], dtype=tl.float32)
    grads_0, grads_1, grads_2 = (b_zero, b_zero, b_zero), (b_zero, b_zero, b_zero), (b_zero, b_zero, b_zero)
    b_bias = b_zero
    sums = (b_zero, b_zero)
    p_dd += i_b * OH * OW * C
    p_x += i_b * H * W * C
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
            b_a00, b_slope00, b_centered00 = activation(b_x00, affine, HAS_NORM, FAST)
            b_a01, b_slope01, b_centered01 = activation(b_x01, affine, HAS_NORM, FAST)
            b_a10, b_slope10, b_centered10 = activation(b_x10, affine, HAS_NORM, FAST)
            b_a11, b_slope11, b_centered11 = activation(b_x11, affine, HAS_NORM, FAST)
            b_da00 = weights_1[1] * b_ul
            b_da01 = weights_1[0] * b_ur + weights_1[2] * b_ul
            b_da10 = weights_0[1] * b_ll + weights_2[1] * b_ul
            b_da11 = weights_0[0] * b_lr + weights_0[2] * b_ll + weights_2[0] * b_ur + weights_2[2] * b_ul
            tl.store(p_da + p_even + b_off_l, b_da00.to(p_da.dtype.element_ty), mask=m_l)
            tl.store(p_da + p_even + b_off_r, b_da01.to(p_da.dtype.element_ty), mask=m_r)
            tl.store(p_da + p_odd + b_off_l, b_da10.to(p_da.dtype.element_ty), mask=m_ol)
            tl.store(p_da + p_odd + b_off_r, b_da11.to(p_da.dtype.element_ty), mask=m_or)
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
            if HAS_NORM:
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
            b_add = 0.0
            if p_add is not None:
                b_add = tl.load(p_add + i_b * H * W * C + p_row + b_off, mask=m, other=0.0).to(tl.float32)
            b_a, b_slope, b_centered = activation(b_x, affine, HAS_NORM, FAST)
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
            tl.store(p_da + p_row + b_off, (b_da + b_add).to(p_da.dtype.element_ty), mask=m)
            if WEIGHTS:
                grads_0, grads_1 = _grown(grads_0, b_a, taps_0), _grown(grads_1, b_a, taps_1)
                grads_2 = _grown(grads_2, b_a, taps_2)
                if BIAS:
                    b_bias += taps_1[1]
            if HAS_NORM:
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
    if HAS_NORM:
        tl.store(p_dz + i_part * C + b_c, tl.sum(tl.where(m, sums[0], 0.0), 0), mask=m_c)
        # Times rstd, x - mean is xhat. It is read only here, which spares registers.
        b_rstd = tl.load(p_rstd + i_b * G + b_c // CG, mask=m_c, other=0.0)
        tl.store(p_dzx + i_part * C + b_c, tl.sum(tl.where(m, sums[1], 0.0), 0) * b_rstd, mask=m_c)


class Parts(NamedTuple):
    """Parts of sums over the pixels, fp32; None where not needed. weight: [B * parts, 9 or 10, C], the tenth that of
    the bias. dz and dz xhat: [2, B, parts, C]."""

    weight: Tensor | None
    norm: Tensor | None


def _narrowest(configs: Sequence[Config], width: int) -> Config:
    """The first config that is no wider than the image, so that few columns are computed for nothing."""
    return next((config for config in configs if config.block_w <= common.pow2(width)), configs[-1])


def gradients(
    dd: Tensor,
    x: Tensor,
    weight: Tensor,
    norm: Affine | None,
    stride: int,
    upsample: bool,
    da: Tensor,
    in_weight: bool,
    in_bias: bool,
    add: Tensor | None = None,
) -> Parts:
    """Fill da in one pass over x [B, C, H, W] and dd [B, C, H', W'], all channels_last; and the parts of what is
    wanted: the gradients of weight and bias, and where there is a norm, its sums. ``weight`` is by tap, [9, C].
    ``add``: added to da, with stride 1 and no norm."""
    assert add is None or (norm is None and stride == 1)
    batch, channels, height, width = x.shape
    out_height, out_width = dd.shape[2:]
    rows_all, columns = (out_height, out_width) if stride == 2 and not upsample else (height, width)
    pointers = (x, x, x, x) if norm is None else norm[:4]
    groups = 1 if norm is None else norm.num_groups

    def launch(config: Config) -> Parts:
        blocks_w, blocks_c = common.cdiv(columns, config.block_w), common.cdiv(channels, config.block_c)
        filling = rows_all // common.cdiv(MIN_PROGRAMS, blocks_w * blocks_c)
        rows = min(max(filling, MIN_ROWS), MAX_ROWS, rows_all)
        chunks = common.cdiv(rows_all, rows)
        parts = chunks * blocks_w
        found = Parts(
            new_parts(x, batch * parts, 10 if in_bias else 9, channels) if in_weight or in_bias else None,
            new_parts(x, 2, batch, parts, channels) if norm is not None else None,
        )
        dz, dzx = (None, None) if found.norm is None else found.norm
        depthwise_backward_kernel[(batch * chunks * blocks_w * blocks_c,)](
            x, dd, da, add, weight, *pointers, found.weight, dz, dzx,
            channels, height, width, out_height, out_width, groups, channels // groups, rows, chunks,
            STRIDE=stride, UPSAMPLE=upsample, HAS_NORM=norm is not None, BIAS=in_bias,
            FAST=norm is not None and common.fast(x.dtype),
            BLOCK_W=config.block_w, BLOCK_C=config.block_c, num_warps=config.num_warps,
        )  # fmt: skip
        return found

    # Not of the batch: blocks of samples, of which the last may be smaller, must have the same parts.
    key = (str(x.dtype), *x.shape[1:], stride, upsample, norm is not None, in_weight, in_bias, add is not None)
    default = _narrowest(CONFIGS, columns)
    return launch(tuning.choose("depthwise_backward", key, CONFIGS, default, launch))


def parameters(parts: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The gradients of weight [C, 1, 3, 3] and bias [C] of their parts [any, 9 or 10, C]."""
    channels, dweight = weight.shape[0], torch.empty_like(weight)
    if bias is None:
        return add_parts(parts, dweight, inner=channels, strides=(1, 9)), None
    sums = add_parts(parts, new_parts(parts, 10, channels))
    return dweight.copy_(sums[:9].t().reshape(weight.shape)), torch.empty_like(bias).copy_(sums[9])


_FORMS = ((1, False), (2, False), (1, True), (2, True))  # stride, and whether after nearest 2x


def builds(dtype: torch.dtype, nvidia: bool) -> list[Build]:
    """The kernel in every config that the launcher may choose."""
    fast, vector = nvidia and dtype == torch.bfloat16, 4 * dtype.itemsize
    images = ("p_x", "p_dd", "p_da", "p_add", "p_weight")
    found: list[Build] = []
    halves = [(stride, up, norm, False) for stride, up in _FORMS for norm in (True, False)]
    halves.append((1, False, False, True))  # the decoder's block, whose input passes beside it
    for config in CONFIGS:
        for stride, upsample, norm, adds in halves:
            for wanted in ("all", "no bias", "input"):
                flags: dict[str, Any] = {"STRIDE": stride, "UPSAMPLE": upsample, "HAS_NORM": norm}
                flags |= {"BIAS": wanted == "all", "FAST": norm and fast}
                flags |= {"p_dweight": None} if wanted == "input" else {}
                flags |= {} if norm else {"p_dz": None, "p_dzx": None}
                flags |= {} if adds else {"p_add": None}
                found.append(
                    common.build(depthwise_backward_kernel, dtype, images, config, ("C",), vector=vector, **flags)
                )
    return found
