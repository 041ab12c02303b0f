"""The depthwise 3x3 convolution on the GPU, with the norm and SiLU in front of it.

:func:`depthwise_kernel` scans rows: a value is loaded and normalised once for each group of four columns that it
reaches (1.5 times), and added to three output rows that stay in registers. :func:`direct_kernel` takes nine taps a
pixel and serves what has stride 2 or nearest 2x.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from snapgen_kernels._triton import common, tuning
from snapgen_kernels._triton.common import Build, silu, silu_of_half
from snapgen_kernels.sepconv import output_size


class Affine(NamedTuple):
    """The norm in front of the convolution, its statistics known: ``mean`` and ``rstd`` [B, G], both fp32."""

    mean: Tensor
    rstd: Tensor
    weight: Tensor
    bias: Tensor
    num_groups: int

    def samples(self, first: int, last: int) -> Affine:
        return self._replace(mean=self.mean[first:last], rstd=self.rstd[first:last])


class DepthwiseConfig(NamedTuple):
    """A program scans ``rows`` rows of ``block_w`` groups of four columns by ``block_c`` channels. ``maxnreg``: the
    registers of a thread, 0: as many as the compiler likes; NVIDIA alone."""

    block_w: int
    block_c: int
    rows: int
    num_warps: int
    maxnreg: int


class DirectConfig(NamedTuple):
    """A program computes ``block_p`` pixels by ``block_c`` channels, nine taps each."""

    block_p: int
    block_c: int
    num_warps: int


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


@triton.jit(do_not_specialize=["H", "W", "G", "CG"])
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


def direct_configs(dtype: torch.dtype) -> tuple[DirectConfig, ...]:
    """Candidates: up to sixteen 16-bit or eight 32-bit values a thread."""
    wide = dtype == torch.float32
    return tuple(c for c in DIRECT_CONFIGS if not wide or c.block_p * c.block_c <= 256 * c.num_warps)


def _scanning(
    configs: Sequence[DepthwiseConfig], batch: int, channels: int, height: int, width: int, processors: int
) -> DepthwiseConfig:
    """The first that gives every multiprocessor the four programs that it can run at once, else the smallest."""
    for config in configs[:4]:
        across = common.cdiv(width, 4 * config.block_w) * common.cdiv(channels, config.block_c)
        if batch * common.cdiv(height, config.rows) * across >= 4 * processors:
            return config
    return configs[3]


def norm_flags(norm: Affine | None, dtype: torch.dtype) -> dict[str, bool]:
    return {"HAS_NORM": norm is not None, "FAST": norm is not None and common.fast(dtype)}


def norm_arguments(norm: Affine | None, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, int, int]:
    """Pointers of the norm, G and C/G; anything where there is none."""
    if norm is None:
        return x, x, x, x, 1, 1
    return norm.mean, norm.rstd, norm.weight, norm.bias, norm.num_groups, x.shape[1] // norm.num_groups


def by_tap(dw_weight: Tensor) -> Tensor:
    """[C, 1, 3, 3] -> [9, C], contiguous: a tap's weights of neighbouring channels are read at once."""
    return dw_weight.reshape(-1, 9).t().contiguous()


def depthwise(
    x: Tensor,
    taps: Tensor,
    dw_bias: Tensor | None,
    norm: Affine | None,
    stride: int,
    upsample: bool,
    out: Tensor | None = None,
) -> Tensor:
    """DW(SiLU(norm(x))) of x [B, C, H, W] channels_last -> [B, C, H', W'] channels_last, rounded to its dtype.

    ``taps``: the weight, :func:`by_tap`.
    """
    batch, channels, height, width = x.shape
    size = output_size(height, width, stride, upsample)
    y = common.new_channels_last(x, batch, channels, *size) if out is None else out
    flags = {**norm_flags(norm, x.dtype), "HAS_BIAS": dw_bias is not None}
    *pointers, groups, per_group = norm_arguments(norm, x)
    tensors = (x, y, taps, x if dw_bias is None else dw_bias, *pointers)
    key = (str(x.dtype), batch, channels, height, width, stride, upsample, norm is not None, dw_bias is not None)

    def scan(config: DepthwiseConfig) -> None:
        block_w, block_c, rows, warps, registers = config
        limit = {"maxnreg": registers} if registers else {}
        grid = batch * common.cdiv(height, rows) * common.cdiv(width, 4 * block_w) * common.cdiv(channels, block_c)
        depthwise_kernel[(grid,)](
            *tensors, height, width, channels, groups, per_group,
            ROWS=rows, EVEN=width % 4 == 0, BLOCK_W=block_w, BLOCK_C=block_c, num_warps=warps, **flags, **limit,
        )  # fmt: skip

    def direct(config: DirectConfig) -> None:
        block_p, block_c, warps = config
        grid = batch * common.cdiv(size[0] * size[1], block_p) * common.cdiv(channels, block_c)
        direct_kernel[(grid,)](
            *tensors, height, width, *size, channels, groups, per_group,
            STRIDE=stride, UPSAMPLE=upsample, BLOCK_P=block_p, BLOCK_C=block_c, num_warps=warps, **flags,
        )  # fmt: skip

    if stride == 1 and not upsample:
        configs = depthwise_configs(x.dtype, torch.version.hip is None, width % 4 == 0)
        default = _scanning(configs, batch, channels, height, width, common.processors(x))
        scan(tuning.choose("depthwise", key, configs, default, scan))
    else:
        tiles = direct_configs(x.dtype)
        direct(tuning.choose("direct", key, tiles, tiles[0], direct))
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
                added = {**flags, "EVEN": even, "vector": vector}
                found.append(common.build(depthwise_kernel, dtype, images, scan, ("C",), **added))
        for direct in direct_configs(dtype):
            for stride in (1, 2):
                shape: dict[str, Any] = {**flags, "STRIDE": stride, "UPSAMPLE": stride == 1}
                found.append(common.build(direct_kernel, dtype, images, direct, ("C",), **shape))
    return found
