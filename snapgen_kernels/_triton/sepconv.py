"""The separable convolution's forward on the GPU; the contract is in ``snapgen_kernels/sepconv.py``.

Two plans, chosen per shape:

- ``split``: :func:`depthwise_kernel` (normalise, SiLU, 3x3) writes the depthwise image, :func:`pointwise_kernel`
  multiplies it. A few samples at a time, so that the depthwise image is read back from the L2 cache and costs the
  memory nothing.
- ``fused``: :func:`fused_kernel` computes the rows of its product from nine taps each; nothing is kept in between. Every
  tap normalises anew, so that it pays where there is no norm (the samplers), or few outputs.

The depthwise kernel walks its tiles backwards and the product forwards: each begins with what the one before it touched
last, which the L2 cache still holds. Sums have an order given by shape and config: no atomics, a repeat is bitwise
equal.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from snapgen_kernels._triton import common, tuning
from snapgen_kernels._triton.common import Build, silu, silu_of_half
from snapgen_kernels._triton.group_norm_silu import moments
from snapgen_kernels.sepconv import no_statistics, output_size


class Affine(NamedTuple):
    """The norm in front of the convolution, its statistics known: ``mean`` and ``rstd`` [B, G], both fp32."""

    mean: Tensor
    rstd: Tensor
    weight: Tensor
    bias: Tensor
    num_groups: int

    def samples(self, first: int, last: int) -> Affine:
        return self._replace(mean=self.mean[first:last], rstd=self.rstd[first:last])


class Pair(NamedTuple):
    """A second product into the same accumulators: ``x`` [B, K, H, W] channels_last, ``weight`` [O, K, 1, 1]."""

    x: Tensor
    weight: Tensor


class DepthwiseConfig(NamedTuple):
    """A program scans ``rows`` rows of ``block_w`` groups of four columns by ``block_c`` channels."""

    block_w: int
    block_c: int
    rows: int
    num_warps: int


class DirectConfig(NamedTuple):
    """A program computes ``block_p`` pixels by ``block_c`` channels, nine taps each."""

    block_p: int
    block_c: int
    num_warps: int


class ProductConfig(NamedTuple):
    """A program computes ``block_m`` pixels by ``block_n`` outputs, ``block_k`` inputs at a time."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


class Plan(NamedTuple):
    """``fused`` or ``split``, and how many samples a split takes at a time."""

    fused: bool
    samples: int


# ---- device functions ------------------------------------------------------------------------------------------------


@triton.jit
def affine(p_mean, p_rstd, p_gamma, p_beta, i_b, G, CG, b_c, m_c, HAS_NORM: tl.constexpr, FAST: tl.constexpr):
    """Scale and offset that normalise channels ``b_c`` of sample ``i_b``, each [1, channels]; halved where FAST."""
    b_scale = tl.zeros(b_c.shape, tl.float32)
    b_offset = tl.zeros(b_c.shape, tl.float32)
    if HAS_NORM:
        i_g = i_b * G + b_c // CG
        b_scale = tl.load(p_gamma + b_c, mask=m_c, other=0.0).to(tl.float32)
        b_scale *= tl.load(p_rstd + i_g, mask=m_c, other=0.0)
        b_offset = tl.load(p_beta + b_c, mask=m_c, other=0.0).to(tl.float32)
        b_offset -= tl.load(p_mean + i_g, mask=m_c, other=0.0) * b_scale
        if FAST:
            b_scale, b_offset = 0.5 * b_scale, 0.5 * b_offset
    return b_scale[None, :], b_offset[None, :]


@triton.jit
def normalised(b_x, b_scale, b_offset, HAS_NORM: tl.constexpr, FAST: tl.constexpr):
    """SiLU of the normalised values; 0 where scale and offset are."""
    b_a = b_x.to(tl.float32)
    if HAS_NORM:
        b_a = b_a * b_scale + b_offset
        b_a = silu_of_half(b_a) if FAST else silu(b_a, False)
    return b_a


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
        b_w = tl.load(p_dw + b_c * 9 + i_tap, mask=m_c, other=0.0).to(tl.float32)
        b_a = normalised(b_x, b_scale, b_offset, HAS_NORM, FAST)
        if HAS_NORM:
            b_a = tl.where(m, b_a, 0.0)
        b_sum += b_a * b_w[None, :]
    return b_sum


@triton.jit
def finish(
    b_acc,
    p_y,
    p_bias,
    p_shift,
    p_residual,
    p_mean,
    p_m2,
    i_b,
    i_m,
    b_m,
    m_m,
    b_n,
    m_n,
    P,
    N,
    tiles,
    BLOCK_M: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    STATISTICS: tl.constexpr,
):
    """Bias, shift, residual; the rounded result; mean and sum of squared deviations of each channel of the tile."""
    if HAS_BIAS:
        b_acc += tl.load(p_bias + b_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    if HAS_SHIFT:
        b_acc += tl.load(p_shift + i_b * N + b_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    m = m_m[:, None] & m_n[None, :]
    i_base = (i_b.to(tl.int64) * P + i_m * BLOCK_M) * N
    b_at = b_m[:, None] * N + b_n[None, :]
    if HAS_RESIDUAL:
        b_acc += tl.load(p_residual + i_base + b_at, mask=m, other=0.0).to(tl.float32)
    b_y = b_acc.to(p_y.dtype.element_ty)
    tl.store(p_y + i_base + b_at, b_y, mask=m)
    if STATISTICS:
        b_r = tl.where(m, b_y.to(tl.float32), 0.0)
        n = tl.minimum(P - i_m * BLOCK_M, BLOCK_M).to(tl.float32)
        b_center = tl.sum(b_r, 0) / n
        b_off = tl.where(m, b_r - b_center[None, :], 0.0)
        i_part = (i_b.to(tl.int64) * tiles + i_m) * N + b_n
        tl.store(p_mean + i_part, b_center, mask=m_n)
        tl.store(p_m2 + i_part, tl.sum(b_off * b_off, 0), mask=m_n)


@triton.jit
def product(
    b_acc,
    p_a,
    p_w,
    i_pixel,
    b_m,
    m_m,
    b_n,
    m_n,
    K,
    N,
    TRANSPOSED: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """b_acc + a[pixels, K] times the weight, [N, K], or [K, N] where TRANSPOSED."""
    b_k = tl.arange(0, BLOCK_K)
    p_a += i_pixel * K + b_m[:, None] * K + b_k[None, :]
    if TRANSPOSED:
        p_w += b_k[:, None] * N + b_n[None, :]
    else:
        p_w += b_n[None, :] * K + b_k[:, None]
    for i_k in range(0, K, BLOCK_K):
        if EVEN_K:
            b_a = tl.load(p_a, mask=m_m[:, None], other=0.0)
            b_w = tl.load(p_w, mask=m_n[None, :], other=0.0)
        else:
            m_k = i_k + b_k < K
            b_a = tl.load(p_a, mask=m_m[:, None] & m_k[None, :], other=0.0)
            b_w = tl.load(p_w, mask=m_k[:, None] & m_n[None, :], other=0.0)
        b_acc = tl.dot(b_a, b_w, b_acc, input_precision=PRECISION)
        p_a += BLOCK_K
        p_w += BLOCK_K * N if TRANSPOSED else BLOCK_K
    return b_acc


@triton.jit
def inside(b_a, m, NEEDED: tl.constexpr):
    """0 outside the image, where a load's zeros were normalised."""
    return tl.where(m, b_a, 0.0) if NEEDED else b_a


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


@triton.jit
def depthwise_kernel(
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
    """Stride 1. Grid: B * cdiv(H, ROWS) * cdiv(W, 4 BLOCK_W) * cdiv(C, BLOCK_C), walked backwards.

    A thread keeps four columns side by side, so that a value is normalised for 1.5 of them on average, not for its nine
    neighbours; it is added to the three output rows that are open.
    """
    blocks_c, blocks_w, blocks_h = tl.cdiv(C, BLOCK_C), tl.cdiv(W, 4 * BLOCK_W), tl.cdiv(H, ROWS)
    i_program = tl.num_programs(0) - 1 - tl.program_id(0)
    i_c, i_rest = i_program % blocks_c, i_program // blocks_c
    i_w, i_rest = i_rest % blocks_w, i_rest // blocks_w
    i_h, i_b = i_rest % blocks_h, i_rest // blocks_h
    b_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = b_c < C
    b_scale, b_offset = affine(p_mean, p_rstd, p_gamma, p_beta, i_b, G, CG, b_c, m_c, HAS_NORM, FAST)
    p_dw += b_c * 9
    b_w00 = tl.load(p_dw, mask=m_c, other=0.0).to(tl.float32)[None, :]
    b_w01 = tl.load(p_dw + 1, mask=m_c, other=0.0).to(tl.float32)[None, :]
    b_w02 = tl.load(p_dw + 2, mask=m_c, other=0.0).to(tl.float32)[None, :]
    b_w10 = tl.load(p_dw + 3, mask=m_c, other=0.0).to(tl.float32)[None, :]
    b_w11 = tl.load(p_dw + 4, mask=m_c, other=0.0).to(tl.float32)[None, :]
    b_w12 = tl.load(p_dw + 5, mask=m_c, other=0.0).to(tl.float32)[None, :]
    b_w20 = tl.load(p_dw + 6, mask=m_c, other=0.0).to(tl.float32)[None, :]
    b_w21 = tl.load(p_dw + 7, mask=m_c, other=0.0).to(tl.float32)[None, :]
    b_w22 = tl.load(p_dw + 8, mask=m_c, other=0.0).to(tl.float32)[None, :]

    b_col = i_w * (4 * BLOCK_W) + 4 * tl.arange(0, BLOCK_W)
    m_0 = ((b_col > 0) & (b_col <= W))[:, None] & m_c[None, :]
    m_1 = (b_col < W)[:, None] & m_c[None, :]
    m_2 = (b_col + 1 < W)[:, None] & m_c[None, :]
    m_3 = (b_col + 2 < W)[:, None] & m_c[None, :]
    m_4 = (b_col + 3 < W)[:, None] & m_c[None, :]
    m_5 = (b_col + 4 < W)[:, None] & m_c[None, :]
    b_at = b_col[:, None] * C + b_c[None, :]
    i_row = i_h * ROWS
    s_row = W * C
    p_x += (i_b.to(tl.int64) * H + i_row - 1) * s_row + b_at
    p_y += (i_b.to(tl.int64) * H + i_row - 2) * s_row + b_at

    b_bias = tl.zeros([1, BLOCK_C], tl.float32)
    if HAS_BIAS:
        b_bias = tl.load(p_dw_bias + b_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    # Output rows above (u) and at (v) the input row, four columns each.
    b_none = tl.zeros([BLOCK_W, BLOCK_C], tl.float32)
    b_u0, b_u1, b_u2, b_u3 = b_none, b_none, b_none, b_none
    b_v0, b_v1, b_v2, b_v3 = b_none, b_none, b_none, b_none
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
        done = (i >= 2) & (i_row + i - 2 < H)
        tl.store(p_y, b_u0.to(p_y.dtype.element_ty), mask=m_1 & done)
        tl.store(p_y + C, b_u1.to(p_y.dtype.element_ty), mask=m_2 & done)
        tl.store(p_y + 2 * C, b_u2.to(p_y.dtype.element_ty), mask=m_3 & done)
        tl.store(p_y + 3 * C, b_u3.to(p_y.dtype.element_ty), mask=m_4 & done)
        p_y += s_row
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


@triton.jit
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
    """Any stride, nearest 2x. Grid: B * cdiv(HO WO, BLOCK_P) * cdiv(C, BLOCK_C), walked backwards."""
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
    b_row, b_col = b_p // WO, b_p % WO
    i_row = i_p * BLOCK_P // WO
    b_y = nine_taps(
        p_x, p_dw, p_dw_bias, b_scale, b_offset, i_b, i_row, b_row, b_col, m_p, b_c, m_c, H, W, C,
        HAS_NORM, HAS_BIAS, FAST, STRIDE, UPSAMPLE,
    )  # fmt: skip
    p_y += (i_b.to(tl.int64) * P + i_p * BLOCK_P) * C + b_m[:, None] * C + b_c[None, :]
    tl.store(p_y, b_y.to(p_y.dtype.element_ty), mask=m_p[:, None] & m_c[None, :])


@triton.jit
def pointwise_kernel(
    p_d,
    p_w,
    p_y,
    p_bias,
    p_shift,
    p_residual,
    p_xs,
    p_ws,
    p_mean,
    p_m2,
    P,
    K,
    N,
    KS,
    tiles,
    TRANSPOSED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_SHORTCUT: tl.constexpr,
    STATISTICS: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y = d w + bias + shift + residual + xs ws. Grid: B * tiles * cdiv(N, BLOCK_N), tiles = cdiv(P, BLOCK_M)."""
    blocks_n = tl.cdiv(N, BLOCK_N)
    i_n, i_rest = tl.program_id(0) % blocks_n, tl.program_id(0) // blocks_n
    i_m, i_b = i_rest % tiles, i_rest // tiles
    b_m = tl.arange(0, BLOCK_M)
    m_m = i_m * BLOCK_M + b_m < P
    b_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = b_n < N
    i_pixel = i_b.to(tl.int64) * P + i_m * BLOCK_M
    b_acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    b_acc = product(b_acc, p_d, p_w, i_pixel, b_m, m_m, b_n, m_n, K, N, TRANSPOSED, EVEN_K, BLOCK_K, PRECISION)
    if HAS_SHORTCUT:
        b_acc = product(b_acc, p_xs, p_ws, i_pixel, b_m, m_m, b_n, m_n, KS, N, False, EVEN_K, BLOCK_K, PRECISION)
    finish(
        b_acc, p_y, p_bias, p_shift, p_residual, p_mean, p_m2, i_b, i_m, b_m, m_m, b_n, m_n, P, N, tiles,
        BLOCK_M, HAS_BIAS, HAS_SHIFT, HAS_RESIDUAL, STATISTICS,
    )  # fmt: skip


@triton.jit
def fused_kernel(
    p_x,
    p_dw,
    p_dw_bias,
    p_gn_mean,
    p_gn_rstd,
    p_gamma,
    p_beta,
    p_w,
    p_y,
    p_bias,
    p_shift,
    p_residual,
    p_xs,
    p_ws,
    p_mean,
    p_m2,
    H,
    W,
    HO,
    WO,
    C,
    G,
    CG,
    N,
    KS,
    tiles,
    HAS_NORM: tl.constexpr,
    HAS_DW_BIAS: tl.constexpr,
    FAST: tl.constexpr,
    STRIDE: tl.constexpr,
    UPSAMPLE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_SHORTCUT: tl.constexpr,
    STATISTICS: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Depthwise and pointwise in one. Grid: B * tiles * cdiv(N, BLOCK_N), tiles = cdiv(HO WO, BLOCK_M)."""
    P = HO * WO
    blocks_n = tl.cdiv(N, BLOCK_N)
    i_n, i_rest = tl.program_id(0) % blocks_n, tl.program_id(0) // blocks_n
    i_m, i_b = i_rest % tiles, i_rest // tiles
    b_m = tl.arange(0, BLOCK_M)
    b_p = i_m * BLOCK_M + b_m
    m_m = b_p < P
    b_row, b_col = b_p // WO, b_p % WO
    i_row = i_m * BLOCK_M // WO
    b_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = b_n < N
    b_k = tl.arange(0, BLOCK_K)
    b_acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    # Not pipelined: the nine taps of several steps would not fit into shared memory.
    for i_k in tl.range(0, C, BLOCK_K, num_stages=1):
        b_c = i_k + b_k
        m_c = b_c < C
        b_w = tl.load(p_w + b_n[None, :] * C + b_c[:, None], mask=m_c[:, None] & m_n[None, :], other=0.0)
        b_scale, b_offset = affine(p_gn_mean, p_gn_rstd, p_gamma, p_beta, i_b, G, CG, b_c, m_c, HAS_NORM, FAST)
        b_d = nine_taps(
            p_x, p_dw, p_dw_bias, b_scale, b_offset, i_b, i_row, b_row, b_col, m_m, b_c, m_c, H, W, C,
            HAS_NORM, HAS_DW_BIAS, FAST, STRIDE, UPSAMPLE,
        )  # fmt: skip
        b_acc = tl.dot(b_d.to(p_x.dtype.element_ty), b_w, b_acc, input_precision=PRECISION)
    if HAS_SHORTCUT:
        i_pixel = i_b.to(tl.int64) * P + i_m * BLOCK_M
        b_acc = product(b_acc, p_xs, p_ws, i_pixel, b_m, m_m, b_n, m_n, KS, N, False, EVEN_K, BLOCK_K, PRECISION)
    finish(
        b_acc, p_y, p_bias, p_shift, p_residual, p_mean, p_m2, i_b, i_m, b_m, m_m, b_n, m_n, P, N, tiles,
        BLOCK_M, HAS_BIAS, HAS_SHIFT, HAS_RESIDUAL, STATISTICS,
    )  # fmt: skip


# ---- configs ---------------------------------------------------------------------------------------------------------

DEPTHWISE_CONFIGS = (
    DepthwiseConfig(8, 64, 16, 4),
    DepthwiseConfig(8, 64, 8, 4),
    DepthwiseConfig(8, 64, 4, 4),
    DepthwiseConfig(8, 64, 16, 2),
    DepthwiseConfig(4, 64, 16, 2),
    DepthwiseConfig(8, 32, 16, 2),
)
DIRECT_CONFIGS = (DirectConfig(32, 64, 4), DirectConfig(32, 64, 8), DirectConfig(16, 128, 4))
# Widest first: the rule takes the first that fills the GPU.
PRODUCT_CONFIGS = (
    ProductConfig(128, 256, 64, 8, 3),
    ProductConfig(128, 128, 64, 8, 3),
    ProductConfig(128, 128, 64, 4, 3),
    ProductConfig(64, 128, 64, 4, 4),
    ProductConfig(64, 64, 64, 4, 4),
)
# fp32 products in full precision run on the ordinary units, whose accumulators take more registers.
PRODUCT_CONFIGS_FP32 = (ProductConfig(64, 64, 32, 4, 2), ProductConfig(32, 64, 32, 4, 2))
# AMD has 64 KiB of shared memory.
PRODUCT_CONFIGS_HIP = (ProductConfig(128, 128, 64, 8, 2), ProductConfig(64, 64, 64, 4, 2))
FUSED_CONFIGS = (
    ProductConfig(128, 256, 32, 8, 1),
    ProductConfig(128, 128, 64, 8, 1),
    ProductConfig(64, 128, 64, 8, 1),
    ProductConfig(64, 64, 32, 4, 1),
)
FUSED_CONFIGS_FP32 = (ProductConfig(64, 64, 32, 8, 1), ProductConfig(32, 64, 32, 4, 1))

# The depthwise image of so many bytes stays in the L2 cache between its writing and its reading (an H200 has 60 MB).
SCRATCH_BYTES = 24 << 20


def product_configs(dtype: torch.dtype, nvidia: bool = True) -> tuple[ProductConfig, ...]:
    """The product's candidates, widest first."""
    if dtype == torch.float32:
        return PRODUCT_CONFIGS_FP32
    return PRODUCT_CONFIGS if nvidia else PRODUCT_CONFIGS_HIP


def fused_configs(dtype: torch.dtype) -> tuple[ProductConfig, ...]:
    """The fused kernel's candidates, widest first."""
    return FUSED_CONFIGS_FP32 if dtype == torch.float32 else FUSED_CONFIGS


def _filling(
    configs: tuple[ProductConfig, ...], samples: int, pixels: int, outputs: int, processors: int
) -> ProductConfig:
    """The first config with a program for every multiprocessor and no tile half empty; else the last."""
    for config in configs:
        programs = samples * triton.cdiv(pixels, config.block_m) * triton.cdiv(outputs, config.block_n)
        if programs >= processors and config.block_n <= common.pow2(outputs):
            return config
    return configs[-1]


def _scanning(batch: int, channels: int, height: int, width: int, processors: int) -> DepthwiseConfig:
    """The longest scan that leaves four programs a multiprocessor: each program computes two rows for nothing."""
    for config in DEPTHWISE_CONFIGS[:3]:
        programs = (
            batch
            * triton.cdiv(height, config.rows)
            * triton.cdiv(width, 4 * config.block_w)
            * triton.cdiv(channels, config.block_c)
        )
        if programs >= 4 * processors:
            return config
    return DEPTHWISE_CONFIGS[2]


def samples_at_once(batch: int, sample_bytes: int) -> int:
    """How many samples' scratch stays in the L2 cache, evenly shared out; 1 where not even one does."""
    blocks = triton.cdiv(batch, max(1, SCRATCH_BYTES // max(sample_bytes, 1)))
    return triton.cdiv(batch, blocks)


# ---- launchers -------------------------------------------------------------------------------------------------------


def _flags(norm: Affine | None, dtype: torch.dtype) -> dict[str, bool]:
    return {"HAS_NORM": norm is not None, "FAST": norm is not None and common.fast(dtype)}


def _norm_arguments(norm: Affine | None, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, int, int]:
    """Pointers of the norm, G and C/G; anything where there is none."""
    if norm is None:
        return x, x, x, x, 1, 1
    return norm.mean, norm.rstd, norm.weight, norm.bias, norm.num_groups, x.shape[1] // norm.num_groups


def new_channels_last(x: Tensor, batch: int, channels: int, height: int, width: int) -> Tensor:
    """An uninitialised image of the dtype and device of ``x``."""
    shape = (batch, channels, height, width)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def depthwise(
    x: Tensor,
    dw_weight: Tensor,
    dw_bias: Tensor | None,
    norm: Affine | None,
    stride: int,
    upsample: bool,
    out: Tensor | None = None,
) -> Tensor:
    """DW(SiLU(norm(x))) of x [B, C, H, W] channels_last -> [B, C, H', W'] channels_last, rounded to its dtype."""
    batch, channels, height, width = x.shape
    size = output_size(height, width, stride, upsample)
    y = new_channels_last(x, batch, channels, *size) if out is None else out
    flags = {**_flags(norm, x.dtype), "HAS_BIAS": dw_bias is not None}
    *pointers, groups, per_group = _norm_arguments(norm, x)
    tensors = (x, y, dw_weight, x if dw_bias is None else dw_bias, *pointers)
    key = (str(x.dtype), batch, channels, height, width, stride, upsample, norm is not None)

    def scan(config: DepthwiseConfig) -> None:
        block_w, block_c, rows, warps = config
        grid = batch * triton.cdiv(height, rows) * triton.cdiv(width, 4 * block_w) * triton.cdiv(channels, block_c)
        depthwise_kernel[(grid,)](
            *tensors, height, width, channels, groups, per_group,
            ROWS=rows, EVEN=width % 4 == 0, BLOCK_W=block_w, BLOCK_C=block_c, num_warps=warps, **flags,
        )  # fmt: skip

    def direct(config: DirectConfig) -> None:
        block_p, block_c, warps = config
        grid = batch * triton.cdiv(size[0] * size[1], block_p) * triton.cdiv(channels, block_c)
        direct_kernel[(grid,)](
            *tensors, height, width, *size, channels, groups, per_group,
            STRIDE=stride, UPSAMPLE=upsample, BLOCK_P=block_p, BLOCK_C=block_c, num_warps=warps, **flags,
        )  # fmt: skip

    if stride == 1 and not upsample:
        default = _scanning(batch, channels, height, width, common.processors(x))
        scan(tuning.choose("depthwise", key, DEPTHWISE_CONFIGS, default, scan))
    else:
        direct(tuning.choose("direct", key, DIRECT_CONFIGS, DIRECT_CONFIGS[0], direct))
    return y


class Epilogue(NamedTuple):
    """What happens to a product before it is rounded, and where the moments of its channels go.

    ``bias`` [O], ``shift`` [B, O], ``residual`` [B, O, H, W] channels_last; ``moments``: two fp32 tensors [B, tiles, O].
    """

    bias: Tensor | None = None
    shift: Tensor | None = None
    residual: Tensor | None = None
    shortcut: Pair | None = None
    moments: tuple[Tensor, Tensor] | None = None

    def samples(self, first: int, last: int) -> Epilogue:
        def cut(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[first:last]

        moments, pair = self.moments, self.shortcut
        return Epilogue(
            self.bias,
            cut(self.shift),
            cut(self.residual),
            None if pair is None else pair._replace(x=pair.x[first:last]),
            None if moments is None else (moments[0][first:last], moments[1][first:last]),
        )

    def flags(self) -> dict[str, bool]:
        return {
            "HAS_BIAS": self.bias is not None,
            "HAS_SHIFT": self.shift is not None,
            "HAS_RESIDUAL": self.residual is not None,
            "HAS_SHORTCUT": self.shortcut is not None,
            "STATISTICS": self.moments is not None,
        }

    def tensors(self, other: Tensor) -> tuple[Tensor, ...]:
        """The kernel's pointers, ``other`` standing where there is nothing."""
        pair, part = self.shortcut or (other, other), self.moments or (other, other)
        return (*(other if t is None else t for t in (self.bias, self.shift, self.residual)), *pair, *part)

    def inputs(self) -> int:
        """Channels of the shortcut."""
        return 0 if self.shortcut is None else self.shortcut.x.shape[1]


def _product(d: Tensor, weight: Tensor, y: Tensor, transposed: bool, ending: Epilogue, config: ProductConfig) -> None:
    batch, inputs, height, width = d.shape
    outputs, pixels = y.shape[1], height * width
    block_m, block_n, block_k, warps, stages = config
    tiles = triton.cdiv(pixels, block_m)
    pointwise_kernel[(batch * tiles * triton.cdiv(outputs, block_n),)](
        d, weight, y, *ending.tensors(y), pixels, inputs, outputs, ending.inputs(), tiles,
        TRANSPOSED=transposed, **ending.flags(), EVEN_K=inputs % block_k == 0 and ending.inputs() % block_k == 0,
        PRECISION=common.precision(d.dtype), BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip


def _product_config(
    d: Tensor, weight: Tensor, y: Tensor, transposed: bool, ending: Epilogue, statistics: bool
) -> ProductConfig:
    """The config for products of ``d``'s samples at a time."""
    batch, inputs, height, width = d.shape
    outputs, configs = y.shape[1], product_configs(d.dtype, torch.version.hip is None)
    key = (str(d.dtype), batch, height * width, inputs, outputs, transposed, statistics, ending.inputs())

    def launch(config: ProductConfig) -> None:
        moments = new_moments(y, config.block_m) if statistics else None
        _product(d, weight, y, transposed, ending._replace(moments=moments), config)

    default = _filling(configs, batch, height * width, outputs, common.processors(d))
    return tuning.choose("pointwise", key, configs, default, launch)


def new_moments(y: Tensor, block_m: int) -> tuple[Tensor, Tensor]:
    """Uninitialised mean and sum of squared deviations of each channel of each tile of ``block_m`` pixels of ``y``."""
    tiles = triton.cdiv(y.shape[2] * y.shape[3], block_m)
    part = torch.empty((2, y.shape[0], tiles, y.shape[1]), dtype=torch.float32, device=y.device)
    return part[0], part[1]


def pointwise(
    d: Tensor,
    weight: Tensor,
    *,
    transposed: bool = False,
    bias: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    shortcut: Pair | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The product of every pixel's channels with ``weight`` [O, C, 1, 1], or with its transpose, and what follows.

    ``d`` [B, C, H, W] (transposed: [B, O, H, W]) channels_last -> [B, O, H, W] (transposed: [B, C, H, W]) channels_last.
    """
    outputs = weight.shape[1 if transposed else 0]
    y = new_channels_last(d, d.shape[0], outputs, *d.shape[2:]) if out is None else out
    ending = Epilogue(bias, shift, residual, shortcut)
    _product(d, weight, y, transposed, ending, _product_config(d, weight, y, transposed, ending, False))
    return y


class Half(NamedTuple):
    """A separable convolution with all that stands around it; tensors are channels_last and dense."""

    x: Tensor
    dw_weight: Tensor
    pw_weight: Tensor
    dw_bias: Tensor | None
    norm: Affine | None
    ending: Epilogue
    stride: int = 1
    upsample: bool = False
    statistics: bool = False

    def output(self) -> tuple[int, int, int, int]:
        """Shape of the result."""
        size = output_size(self.x.shape[2], self.x.shape[3], self.stride, self.upsample)
        return self.x.shape[0], self.pw_weight.shape[0], *size


class Moments(NamedTuple):
    """Per sample, tile of ``chunk`` pixels and channel: mean and sum of squared deviations, [B, tiles, O] in fp32."""

    mean: Tensor
    m2: Tensor
    chunk: int


def _split(half: Half, y: Tensor, samples: int) -> Moments | None:
    batch, channels = half.x.shape[:2]
    scratch = new_channels_last(half.x, samples, channels, *y.shape[2:])
    config = _product_config(
        scratch, half.pw_weight, y[:samples], False, half.ending.samples(0, samples), half.statistics
    )
    moments = new_moments(y, config.block_m) if half.statistics else None
    ending = half.ending._replace(moments=moments)
    for first in range(0, batch, samples):
        last = min(first + samples, batch)
        norm = None if half.norm is None else half.norm.samples(first, last)
        d = scratch[: last - first]
        depthwise(half.x[first:last], half.dw_weight, half.dw_bias, norm, half.stride, half.upsample, d)
        _product(d, half.pw_weight, y[first:last], False, ending.samples(first, last), config)
    return None if moments is None else Moments(*moments, config.block_m)


def _fused(half: Half, y: Tensor) -> Moments | None:
    x, ending = half.x, half.ending
    batch, channels, height, width = x.shape
    outputs, pixels = y.shape[1], y.shape[2] * y.shape[3]
    *pointers, groups, per_group = _norm_arguments(half.norm, x)
    flags = {**_flags(half.norm, x.dtype), "STRIDE": half.stride, "UPSAMPLE": half.upsample}

    def launch(config: ProductConfig) -> Moments | None:
        block_m, block_n, block_k, warps, stages = config
        moments = new_moments(y, block_m) if half.statistics else None
        last = ending._replace(moments=moments)
        tiles = triton.cdiv(pixels, block_m)
        fused_kernel[(batch * tiles * triton.cdiv(outputs, block_n),)](
            x, half.dw_weight, x if half.dw_bias is None else half.dw_bias, *pointers, half.pw_weight, y,
            *last.tensors(y), height, width, *y.shape[2:], channels, groups, per_group, outputs, last.inputs(), tiles,
            **flags, **last.flags(), HAS_DW_BIAS=half.dw_bias is not None, EVEN_K=last.inputs() % block_k == 0,
            PRECISION=common.precision(x.dtype), BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
        return None if moments is None else Moments(*moments, block_m)

    configs = fused_configs(x.dtype)
    default = _filling(configs, batch, pixels, outputs, common.processors(x))
    key = (str(x.dtype), batch, channels, height, width, outputs, half.stride, half.upsample, half.norm is not None)
    return launch(tuning.choose("fused", key, configs, default, launch))


def plans(half: Half) -> tuple[tuple[Plan, ...], Plan]:
    """The plans that a half may follow, and the rule's choice: fused where no tap has a norm to compute anew."""
    batch, channels = half.x.shape[:2]
    _, _, height, width = half.output()
    samples = samples_at_once(batch, channels * height * width * half.x.element_size())
    found = tuple(dict.fromkeys((Plan(False, samples), Plan(False, batch), Plan(True, batch))))
    return found, found[0] if half.norm is not None else found[-1]


def run(half: Half, y: Tensor) -> Moments | None:
    """Compute a half into ``y``; the moments of its channels where they were asked for."""
    candidates, default = plans(half)

    def follow(plan: Plan) -> Moments | None:
        return _fused(half, y) if plan.fused else _split(half, y, plan.samples)

    key = (
        str(y.dtype), *half.x.shape, y.shape[1], half.stride, half.upsample, half.norm is not None, half.statistics,
        half.ending.inputs(),
    )  # fmt: skip
    return follow(tuning.choose("sepconv", key, candidates, default, follow))


def into(y: Tensor) -> Tensor:
    """``y``, or a channels_last image to be copied into it where it is laid out otherwise."""
    return y if y.is_contiguous(memory_format=torch.channels_last) else channels_last_like(y)


def channels_last_like(y: Tensor) -> Tensor:
    return torch.empty_like(y, memory_format=torch.channels_last)


def forward(
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
) -> tuple[Tensor, Tensor, Tensor]:
    """y, mean and rstd; the arguments are those of ``snapgen::sepconv``."""
    from snapgen_kernels.sepconv import new_image

    dense = common.channels_last(x)
    norm, saved = None, no_statistics(x)
    if norm_weight is not None and norm_bias is not None:
        saved = moments(dense, num_groups, eps)
        norm = Affine(*saved, norm_weight.contiguous(), norm_bias.contiguous(), num_groups)
    y = new_image(x, pw_weight.shape[0], *output_size(x.shape[2], x.shape[3], stride, upsample))
    if y.numel() == 0:
        return y, *saved
    ending = Epilogue(
        None if pw_bias is None else pw_bias.contiguous(),
        None if shift is None else shift.contiguous(),
        None if residual is None else common.channels_last(residual),
    )
    out = into(y)
    run(
        Half(
            dense,
            dw_weight.contiguous(),
            pw_weight.contiguous(),
            None if dw_bias is None else dw_bias.contiguous(),
            norm,
            ending,
            stride,
            upsample,
        ),
        out,
    )
    return y if out is y else y.copy_(out), *saved
