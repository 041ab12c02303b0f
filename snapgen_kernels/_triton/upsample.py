"""Nearest 2x and the depthwise 3x3 convolution after it on the GPU, with the norm and SiLU in front of them.

An output pixel sees two by two pixels of the small image, through sums of taps that depend on whether its row and its
column are even: ``[w0, w1 + w2]`` of the rows above and at it where even, ``[w0 + w1, w2]`` of those at and below it
where odd; columns alike. So the large image before the convolution is never made, an output takes 4 multiply-adds, not
9, and a value is loaded and normalised once for each pair of columns that it reaches, not nine times for each of the
four pixels that it becomes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from snapgen_kernels._triton import common, tuning
from snapgen_kernels._triton.common import Build
from snapgen_kernels._triton.normalise import Affine, affine, inside, norm_arguments, norm_flags, normalised


class Config(NamedTuple):
    """A program scans ``rows`` rows of ``block_w`` pairs of columns of the small image by ``block_c`` channels."""

    block_w: int
    block_c: int
    rows: int
    num_warps: int


# Long scans read less twice, short ones make more programs. Up to four 32-bit values of a row and column a thread.
CONFIGS = (Config(8, 64, 16, 4), Config(8, 64, 4, 4), Config(8, 64, 8, 8), Config(16, 32, 8, 4))


@triton.jit
def _taps(p_dw, C, m_c, ROW: tl.constexpr):
    """Of a row of the kernel: w0, w1 + w2, w0 + w1, w2, each [1, channels]."""
    b_0 = tl.load(p_dw + 3 * ROW * C, mask=m_c, other=0.0).to(tl.float32)[None, :]
    b_1 = tl.load(p_dw + (3 * ROW + 1) * C, mask=m_c, other=0.0).to(tl.float32)[None, :]
    b_2 = tl.load(p_dw + (3 * ROW + 2) * C, mask=m_c, other=0.0).to(tl.float32)[None, :]
    return b_0, b_1 + b_2, b_0 + b_1, b_2


@triton.jit
def _plus(left, right):
    return left[0] + right[0], left[1] + right[1], left[2] + right[2], left[3] + right[3]


@triton.jit
def _four_columns(p_x, C, m_0, m_1, m_2, m_3, there):
    """One row of the small image: the column left of the pair, the pair, the column right of it."""
    return (
        tl.load(p_x - C, mask=m_0 & there, other=0.0),
        tl.load(p_x, mask=m_1 & there, other=0.0),
        tl.load(p_x + C, mask=m_2 & there, other=0.0),
        tl.load(p_x + 2 * C, mask=m_3 & there, other=0.0),
    )


@triton.jit
def _spread(sums, taps, b_x0, b_x1, b_x2, b_x3):
    """``sums`` of four columns of the large image, grown by a row of the small one."""
    return (
        tl.fma(taps[1], b_x1, tl.fma(taps[0], b_x0, sums[0])),
        tl.fma(taps[3], b_x2, tl.fma(taps[2], b_x1, sums[1])),
        tl.fma(taps[1], b_x2, tl.fma(taps[0], b_x1, sums[2])),
        tl.fma(taps[3], b_x3, tl.fma(taps[2], b_x2, sums[3])),
    )


@triton.jit
def _store(p_y, sums, C, m_1, m_2, done):
    tl.store(p_y, sums[0].to(p_y.dtype.element_ty), mask=m_1 & done)
    tl.store(p_y + C, sums[1].to(p_y.dtype.element_ty), mask=m_1 & done)
    tl.store(p_y + 2 * C, sums[2].to(p_y.dtype.element_ty), mask=m_2 & done)
    tl.store(p_y + 3 * C, sums[3].to(p_y.dtype.element_ty), mask=m_2 & done)


@triton.jit(do_not_specialize=["H", "W", "G", "CG"])
def upsample_kernel(
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
    """y [2H, 2W]. Grid: B * cdiv(H, ROWS) * cdiv(W, 2 BLOCK_W) * cdiv(C, BLOCK_C), walked backwards."""
    blocks_c, blocks_w, blocks_h = tl.cdiv(C, BLOCK_C), tl.cdiv(W, 2 * BLOCK_W), tl.cdiv(H, ROWS)
    i_program = tl.num_programs(0) - 1 - tl.program_id(0)
    i_c, i_rest = i_program % blocks_c, i_program // blocks_c
    i_w, i_rest = i_rest % blocks_w, i_rest // blocks_w
    i_h, i_b = i_rest % blocks_h, i_rest // blocks_h
    b_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = b_c < C
    b_scale, b_offset = affine(p_mean, p_rstd, p_gamma, p_beta, i_b, G, CG, b_c, m_c, HAS_NORM, FAST)
    row_0, row_1, row_2 = _taps(p_dw + b_c, C, m_c, 0), _taps(p_dw + b_c, C, m_c, 1), _taps(p_dw + b_c, C, m_c, 2)
    rows_12, rows_01 = _plus(row_1, row_2), _plus(row_0, row_1)

    b_col = i_w * (2 * BLOCK_W) + 2 * tl.arange(0, BLOCK_W)
    m_0 = ((b_col > 0) & (b_col <= W))[:, None] & m_c[None, :]
    m_1 = (b_col < W)[:, None] & m_c[None, :]
    m_2 = (b_col + 1 < W)[:, None] & m_c[None, :]
    m_3 = (b_col + 2 < W)[:, None] & m_c[None, :]
    i_row = i_h * ROWS
    s_row = W * C
    p_x += (i_b.to(tl.int64) * H + i_row - 1) * s_row + b_col[:, None] * C + b_c[None, :]
    # The odd row above the first input row; a row of y has twice as many columns.
    p_y += (i_b.to(tl.int64) * (2 * H) + 2 * i_row - 3) * (2 * s_row) + 2 * b_col[:, None] * C + b_c[None, :]

    b_bias = tl.zeros([BLOCK_W, BLOCK_C], tl.float32)
    if HAS_BIAS:
        b_bias += tl.load(p_dw_bias + b_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    none = (b_bias, b_bias, b_bias, b_bias)
    # What the open rows of y have: the odd one above the input row, and the even one at it.
    odd, even = none, none
    there = i_row > 0
    b_x0, b_x1, b_x2, b_x3 = _four_columns(p_x, C, m_0, m_1, m_2, m_3, there)
    for i in range(ROWS + 2):
        # The next row is on its way while this one is computed.
        p_x += s_row
        coming = (i <= ROWS) & (i_row + i < H)
        b_n0, b_n1, b_n2, b_n3 = _four_columns(p_x, C, m_0, m_1, m_2, m_3, coming)
        # A row outside the image is 0 after the norm; so is a column, of which a pair side by side needs no proof.
        b_s, b_o = tl.where(there, b_scale, 0.0), tl.where(there, b_offset, 0.0)
        b_x0 = inside(normalised(b_x0, b_s, b_o, HAS_NORM, FAST), m_0, HAS_NORM)
        b_x1 = normalised(b_x1, b_s, b_o, HAS_NORM, FAST)
        b_x2 = inside(normalised(b_x2, b_s, b_o, HAS_NORM, FAST), m_2, HAS_NORM and not EVEN)
        b_x3 = inside(normalised(b_x3, b_s, b_o, HAS_NORM, FAST), m_3, HAS_NORM)
        odd = _spread(odd, row_2, b_x0, b_x1, b_x2, b_x3)
        _store(p_y, odd, C, m_1, m_2, (i >= 2) & (i_row + i - 2 < H))
        even = _spread(even, rows_12, b_x0, b_x1, b_x2, b_x3)
        _store(p_y + 2 * s_row, even, C, m_1, m_2, (i >= 1) & (i <= ROWS) & (i_row + i - 1 < H))
        p_y += 4 * s_row
        odd = _spread(none, rows_01, b_x0, b_x1, b_x2, b_x3)
        even = _spread(none, row_0, b_x0, b_x1, b_x2, b_x3)
        b_x0, b_x1, b_x2, b_x3 = b_n0, b_n1, b_n2, b_n3
        there = coming


def _filling(batch: int, channels: int, height: int, width: int, processors: int) -> Config:
    """The long scan where it gives every multiprocessor the three programs that it can run at once, else the short."""
    config = CONFIGS[0]
    across = common.cdiv(width, 2 * config.block_w) * common.cdiv(channels, config.block_c)
    return config if batch * common.cdiv(height, config.rows) * across >= 3 * processors else CONFIGS[1]


def upsample(x: Tensor, taps: Tensor, dw_bias: Tensor | None, norm: Affine | None, y: Tensor) -> None:
    """Fill ``y`` [B, C, 2H, 2W] of x [B, C, H, W], both channels_last; ``taps``: the weight by tap, [9, C]."""
    batch, channels, height, width = x.shape
    *pointers, groups, per_group = norm_arguments(norm, x)
    flags = {**norm_flags(norm, x.dtype), "HAS_BIAS": dw_bias is not None, "EVEN": width % 2 == 0}

    def launch(config: Config) -> None:
        block_w, block_c, rows, warps = config
        grid = batch * common.cdiv(height, rows) * common.cdiv(width, 2 * block_w) * common.cdiv(channels, block_c)
        upsample_kernel[(grid,)](
            x, y, taps, x if dw_bias is None else dw_bias, *pointers, height, width, channels, groups, per_group,
            ROWS=rows, BLOCK_W=block_w, BLOCK_C=block_c, num_warps=warps, **flags,
        )  # fmt: skip

    key = (str(x.dtype), batch, channels, height, width, norm is not None, dw_bias is not None)
    default = _filling(batch, channels, height, width, common.processors(x))
    launch(tuning.choose("upsample", key, CONFIGS, default, launch))


def builds(dtype: torch.dtype, nvidia: bool) -> list[Build]:
    """The kernel in every config that the launcher may choose: the decoder's, the denoiser's, and with all there is."""
    images = ("p_x", "p_y", "p_dw", "p_dw_bias")
    quick = dtype == torch.bfloat16 and nvidia
    found: list[Build] = []
    for config in CONFIGS:
        vector = config.block_w * config.block_c // (32 * config.num_warps) * dtype.itemsize
        for norm, bias, even in ((False, True, True), (False, False, True), (True, True, False)):
            flags: dict[str, Any] = {"HAS_NORM": norm, "HAS_BIAS": bias, "FAST": norm and quick, "EVEN": even}
            found.append(common.build(upsample_kernel, dtype, images, config, ("C",), vector=vector, **flags))
    return found
