"""GroupNorm + SiLU on the GPU, forward and backward; the contract is in ``snapgen_kernels/group_norm_silu.py``.

Names: i_ index, p_ pointer, b_ block in registers, m_ mask, s_ stride. B samples, C channels, P pixels, G groups; a
chunk is ``tiles`` tiles of BLOCK_P pixels. Both memory formats run the same kernels, with the strides of channel and
pixel swapped.

Statistics take two stages, so that one sample fills the GPU: per channel and chunk, mean and sum of squared deviations
(two passes over registers), then Chan's merge over the chunks and channels of a group. Every reduction has a fixed
order that depends on the shape alone: no atomics, a repeat is bitwise equal. Tiles are chosen by rule, not by timing,
for that reason.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Config(NamedTuple):
    """A tile of BLOCK_P pixels by BLOCK_C channels, computed by this many warps."""

    block_p: int
    block_c: int
    num_warps: int


# 4096 elements a tile: 32 a thread with 4 warps, so that the two-input kernels of the backward stay clear of spills.
CONFIGS = {
    "channels_last wide": Config(32, 128, 4),
    "channels_last": Config(64, 64, 4),
    "channels_last narrow": Config(128, 32, 4),
    "contiguous": Config(512, 8, 4),
    "contiguous small": Config(64, 64, 4),
}
MERGE_BLOCK = 256
# Chunks of one sample: enough to fill the largest GPU at batch 1, few enough that merging them stays cheap.
MAX_CHUNKS = 512


@triton.jit
def moments_kernel(p_x, p_mean, p_m2, C, P, tiles, chunks, s_b, s_c, s_p, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Per (sample, chunk, channel): mean and sum of squared deviations. Grid: B * chunks * cdiv(C, BLOCK_C)."""
    blocks_c = tl.cdiv(C, BLOCK_C)
    i_program = tl.program_id(0)
    i_c, i_chunk, i_b = i_program % blocks_c, (i_program // blocks_c) % chunks, i_program // (blocks_c * chunks)
    b_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = b_c < C
    p_x += i_b.to(tl.int64) * s_b + b_c.to(tl.int64)[None, :] * s_c
    b_n = 0.0
    b_mean = tl.zeros([BLOCK_C], dtype=tl.float32)
    b_m2 = tl.zeros([BLOCK_C], dtype=tl.float32)
    for i_tile in range(tiles):
        b_p = (i_chunk * tiles + i_tile) * BLOCK_P + tl.arange(0, BLOCK_P)
        m = (b_p < P)[:, None] & m_c[None, :]
        b_x = tl.load(p_x + b_p.to(tl.int64)[:, None] * s_p, mask=m, other=0.0).to(tl.float32)
        n = tl.minimum(tl.maximum(P - (i_chunk * tiles + i_tile) * BLOCK_P, 0), BLOCK_P).to(tl.float32)
        b_center = tl.sum(b_x, 0) / tl.maximum(n, 1.0)
        b_off = tl.where(m, b_x - b_center[None, :], 0.0)
        b_square = tl.sum(b_off * b_off, 0)
        b_delta = b_center - b_mean
        total = tl.maximum(b_n + n, 1.0)
        b_m2 += b_square + b_delta * b_delta * (b_n * n / total)
        b_mean += b_delta * (n / total)
        b_n += n
    i_out = (i_b.to(tl.int64) * chunks + i_chunk) * C + b_c
    tl.store(p_mean + i_out, b_mean, mask=m_c)
    tl.store(p_m2 + i_out, b_m2, mask=m_c)


@triton.jit
def merge_moments_kernel(
    p_part,
    p_m2,
    p_mean,
    p_rstd,
    C,
    P,
    G,
    chunk,
    chunks,
    eps,
    CG: tl.constexpr,
    BLOCK_CG: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Mean and rstd of one group from its chunks and channels. Grid: B * G."""
    i_program = tl.program_id(0)
    i_b, i_g = i_program // G, i_program % G
    b_c = tl.arange(0, BLOCK_CG)
    i_base = i_b.to(tl.int64) * chunks * C + i_g * CG
    b_sum = tl.zeros([BLOCK, BLOCK_CG], dtype=tl.float32)
    # Sums are taken around the first chunk's mean, so that a large mean costs no bits.
    first = tl.load(p_part + i_base)
    for i_start in range(0, chunks, BLOCK):
        b_k = i_start + tl.arange(0, BLOCK)
        m = (b_k < chunks)[:, None] & (b_c < CG)[None, :]
        i_in = i_base + b_k.to(tl.int64)[:, None] * C + b_c[None, :]
        b_n = tl.minimum(tl.maximum(P - b_k * chunk, 0), chunk).to(tl.float32)[:, None]
        b_sum += tl.where(m, (tl.load(p_part + i_in, mask=m, other=0.0) - first) * b_n, 0.0)
    n = P.to(tl.float32) * CG
    off = tl.sum(tl.sum(b_sum, 1), 0) / n
    b_sum = tl.zeros([BLOCK, BLOCK_CG], dtype=tl.float32)
    for i_start in range(0, chunks, BLOCK):
        b_k = i_start + tl.arange(0, BLOCK)
        m = (b_k < chunks)[:, None] & (b_c < CG)[None, :]
        i_in = i_base + b_k.to(tl.int64)[:, None] * C + b_c[None, :]
        b_n = tl.minimum(tl.maximum(P - b_k * chunk, 0), chunk).to(tl.float32)[:, None]
        b_delta = tl.load(p_part + i_in, mask=m, other=0.0) - first - off
        b_sum += tl.where(m, tl.load(p_m2 + i_in, mask=m, other=0.0) + b_delta * b_delta * b_n, 0.0)
    variance = tl.sum(tl.sum(b_sum, 1), 0) / n
    tl.store(p_mean + i_program, first + off)
    tl.store(p_rstd + i_program, 1.0 / tl.sqrt(variance + eps))


@triton.jit
def apply_kernel(
    p_x, p_y, p_weight, p_bias, p_mean, p_rstd, C, P, G, CG, s_b, s_c, s_p, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr
):
    """y = silu((x - mean) * rstd * weight + bias). Grid: B * cdiv(P, BLOCK_P) * cdiv(C, BLOCK_C)."""
    blocks_c, blocks_p = tl.cdiv(C, BLOCK_C), tl.cdiv(P, BLOCK_P)
    i_program = tl.program_id(0)
    i_c, i_p, i_b = i_program % blocks_c, (i_program // blocks_c) % blocks_p, i_program // (blocks_c * blocks_p)
    b_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    b_p = i_p * BLOCK_P + tl.arange(0, BLOCK_P)
    m_c = b_c < C
    m = (b_p < P)[:, None] & m_c[None, :]
    i_g = i_b * G + b_c // CG
    b_mean = tl.load(p_mean + i_g, mask=m_c, other=0.0)[None, :]
    b_rstd = tl.load(p_rstd + i_g, mask=m_c, other=0.0)[None, :]
    b_weight = tl.load(p_weight + b_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    b_bias = tl.load(p_bias + b_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    i_x = i_b.to(tl.int64) * s_b + b_c.to(tl.int64)[None, :] * s_c + b_p.to(tl.int64)[:, None] * s_p
    b_x = tl.load(p_x + i_x, mask=m, other=0.0).to(tl.float32)
    b_z = (b_x - b_mean) * (b_rstd * b_weight) + b_bias
    b_y = b_z / (1.0 + tl.exp(-b_z))
    tl.store(p_y + i_x, b_y.to(p_y.dtype.element_ty), mask=m)


@triton.jit
def sums_kernel(
    p_x,
    p_dy,
    p_weight,
    p_bias,
    p_mean,
    p_rstd,
    p_dz,
    p_dzx,
    C,
    P,
    G,
    CG,
    tiles,
    chunks,
    s_b,
    s_c,
    s_p,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Per (sample, chunk, channel): sums of dz and of dz * xhat. Grid: B * chunks * cdiv(C, BLOCK_C)."""
    blocks_c = tl.cdiv(C, BLOCK_C)
    i_program = tl.program_id(0)
    i_c, i_chunk, i_b = i_program % blocks_c, (i_program // blocks_c) % chunks, i_program // (blocks_c * chunks)
    b_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = b_c < C
    i_g = i_b * G + b_c // CG
    b_mean = tl.load(p_mean + i_g, mask=m_c, other=0.0)[None, :]
    b_rstd = tl.load(p_rstd + i_g, mask=m_c, other=0.0)[None, :]
    b_weight = tl.load(p_weight + b_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    b_bias = tl.load(p_bias + b_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    i_base = i_b.to(tl.int64) * s_b + b_c.to(tl.int64)[None, :] * s_c
    b_dz_sum = tl.zeros([BLOCK_C], dtype=tl.float32)
    b_dzx_sum = tl.zeros([BLOCK_C], dtype=tl.float32)
    for i_tile in range(tiles):
        b_p = (i_chunk * tiles + i_tile) * BLOCK_P + tl.arange(0, BLOCK_P)
        m = (b_p < P)[:, None] & m_c[None, :]
        i_x = i_base + b_p.to(tl.int64)[:, None] * s_p
        b_x = tl.load(p_x + i_x, mask=m, other=0.0).to(tl.float32)
        b_dy = tl.load(p_dy + i_x, mask=m, other=0.0).to(tl.float32)  # 0 outside: nothing is added there
        b_xhat = (b_x - b_mean) * b_rstd
        b_z = b_xhat * b_weight + b_bias
        b_s = 1.0 / (1.0 + tl.exp(-b_z))
        b_dz = b_dy * (b_s * (1.0 + b_z * (1.0 - b_s)))
        b_dz_sum += tl.sum(b_dz, 0)
        b_dzx_sum += tl.sum(b_dz * b_xhat, 0)
    i_out = (i_b.to(tl.int64) * chunks + i_chunk) * C + b_c
    tl.store(p_dz + i_out, b_dz_sum, mask=m_c)
    tl.store(p_dzx + i_out, b_dzx_sum, mask=m_c)


@triton.jit
def merge_sums_kernel(
    p_part_dz,
    p_part_dzx,
    p_weight,
    p_dz,
    p_dzx,
    p_mean_g,
    p_mean_gx,
    C,
    P,
    G,
    chunks,
    CG: tl.constexpr,
    BLOCK_CG: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Per sample: channel sums over the chunks, and the group means of dz * weight and dz * weight * xhat. Grid: B *
    G."""
    i_program = tl.program_id(0)
    i_b, i_g = i_program // G, i_program % G
    b_cg = tl.arange(0, BLOCK_CG)
    m_c = b_cg < CG
    b_c = i_g * CG + b_cg
    i_base = i_b.to(tl.int64) * chunks * C
    b_dz = tl.zeros([BLOCK, BLOCK_CG], dtype=tl.float32)
    b_dzx = tl.zeros([BLOCK, BLOCK_CG], dtype=tl.float32)
    for i_start in range(0, chunks, BLOCK):
        b_k = i_start + tl.arange(0, BLOCK)
        m = (b_k < chunks)[:, None] & m_c[None, :]
        i_in = i_base + b_k.to(tl.int64)[:, None] * C + b_c[None, :]
        b_dz += tl.load(p_part_dz + i_in, mask=m, other=0.0)
        b_dzx += tl.load(p_part_dzx + i_in, mask=m, other=0.0)
    b_dz_c, b_dzx_c = tl.sum(b_dz, 0), tl.sum(b_dzx, 0)
    b_weight = tl.load(p_weight + b_c, mask=m_c, other=0.0).to(tl.float32)
    n = P.to(tl.float32) * CG
    tl.store(p_dz + i_b.to(tl.int64) * C + b_c, b_dz_c, mask=m_c)
    tl.store(p_dzx + i_b.to(tl.int64) * C + b_c, b_dzx_c, mask=m_c)
    tl.store(p_mean_g + i_program, tl.sum(b_dz_c * b_weight, 0) / n)
    tl.store(p_mean_gx + i_program, tl.sum(b_dzx_c * b_weight, 0) / n)


@triton.jit
def parameters_kernel(p_dz, p_dzx, p_dweight, p_dbias, B, C, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr):
    """dweight and dbias: sums over the samples. Grid: cdiv(C, BLOCK_C)."""
    b_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    b_dz = tl.zeros([BLOCK_B, BLOCK_C], dtype=tl.float32)
    b_dzx = tl.zeros([BLOCK_B, BLOCK_C], dtype=tl.float32)
    for i_start in range(0, B, BLOCK_B):
        b_b = i_start + tl.arange(0, BLOCK_B)
        m = (b_b < B)[:, None] & (b_c < C)[None, :]
        i_in = b_b.to(tl.int64)[:, None] * C + b_c[None, :]
        b_dz += tl.load(p_dz + i_in, mask=m, other=0.0)
        b_dzx += tl.load(p_dzx + i_in, mask=m, other=0.0)
    tl.store(p_dweight + b_c, tl.sum(b_dzx, 0).to(p_dweight.dtype.element_ty), mask=b_c < C)
    tl.store(p_dbias + b_c, tl.sum(b_dz, 0).to(p_dbias.dtype.element_ty), mask=b_c < C)


@triton.jit
def gradient_kernel(
    p_x,
    p_dy,
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
    s_b,
    s_c,
    s_p,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dx = rstd (dz weight - mean_g - xhat mean_gx). Grid: B * cdiv(P, BLOCK_P) * cdiv(C, BLOCK_C)."""
    blocks_c, blocks_p = tl.cdiv(C, BLOCK_C), tl.cdiv(P, BLOCK_P)
    i_program = tl.program_id(0)
    i_c, i_p, i_b = i_program % blocks_c, (i_program // blocks_c) % blocks_p, i_program // (blocks_c * blocks_p)
    b_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    b_p = i_p * BLOCK_P + tl.arange(0, BLOCK_P)
    m_c = b_c < C
    m = (b_p < P)[:, None] & m_c[None, :]
    i_g = i_b * G + b_c // CG
    b_mean = tl.load(p_mean + i_g, mask=m_c, other=0.0)[None, :]
    b_rstd = tl.load(p_rstd + i_g, mask=m_c, other=0.0)[None, :]
    b_mean_g = tl.load(p_mean_g + i_g, mask=m_c, other=0.0)[None, :]
    b_mean_gx = tl.load(p_mean_gx + i_g, mask=m_c, other=0.0)[None, :]
    b_weight = tl.load(p_weight + b_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    b_bias = tl.load(p_bias + b_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    i_x = i_b.to(tl.int64) * s_b + b_c.to(tl.int64)[None, :] * s_c + b_p.to(tl.int64)[:, None] * s_p
    b_x = tl.load(p_x + i_x, mask=m, other=0.0).to(tl.float32)
    b_dy = tl.load(p_dy + i_x, mask=m, other=0.0).to(tl.float32)
    b_xhat = (b_x - b_mean) * b_rstd
    b_z = b_xhat * b_weight + b_bias
    b_s = 1.0 / (1.0 + tl.exp(-b_z))
    b_dz = b_dy * (b_s * (1.0 + b_z * (1.0 - b_s)))
    b_dx = b_rstd * (b_dz * b_weight - b_mean_g - b_xhat * b_mean_gx)
    tl.store(p_dx + i_x, b_dx.to(p_dx.dtype.element_ty), mask=m)


class _Plan(NamedTuple):
    dense: Tensor
    config: Config
    strides: tuple[int, int, int]
    tiles: int
    chunks: int


def _pow2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def _dense(x: Tensor) -> tuple[Tensor, bool]:
    """``x`` in one of the two dense formats, and whether that is channels_last."""
    if not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return x, True
    return x.contiguous(), False


def _plan(x: Tensor) -> _Plan:
    dense, last = _dense(x)
    _, channels, height, width = x.shape
    pixels = height * width
    if last:
        name = (
            "channels_last wide" if channels >= 128 else "channels_last" if channels >= 64 else "channels_last narrow"
        )
    else:
        name = "contiguous" if pixels >= 512 else "contiguous small"
    config = CONFIGS[name]
    steps = triton.cdiv(pixels, config.block_p)
    tiles = triton.cdiv(steps, MAX_CHUNKS)
    strides = (channels * pixels, 1, channels) if last else (channels * pixels, pixels, 1)
    return _Plan(dense, config, strides, tiles, triton.cdiv(steps, tiles))


def _merge_shape(per_group: int) -> tuple[int, int]:
    """BLOCK_CG and BLOCK of the merging kernels: about 4096 values at a time."""
    block_c = _pow2(per_group)
    return block_c, max(1, min(MERGE_BLOCK, 4096 // block_c))


def merge_moments(part: Tensor, pixels: int, chunk: int, num_groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """Statistics of groups from those of chunks of channels, in a fixed order.

    Args:
        part: [2, B, chunks, C] fp32, contiguous: mean and sum of squared deviations of each channel in each chunk.
        pixels: of a sample; at least 1.
        chunk: pixels in a chunk; the last one may be shorter, but chunks beyond it count nothing.
        num_groups: G, divides C.
        eps: added to the variance.

    Returns:
        mean and 1 / standard deviation, both [B, G] fp32.
    """
    _, batch, chunks, channels = part.shape
    mean = torch.empty((batch, num_groups), dtype=torch.float32, device=part.device)
    rstd = torch.empty_like(mean)
    per_group = channels // num_groups
    block_cg, block = _merge_shape(per_group)
    merge = {"CG": per_group, "BLOCK_CG": block_cg, "BLOCK": block, "num_warps": 4}
    merge_moments_kernel[(batch * num_groups,)](
        part[0], part[1], mean, rstd, channels, pixels, num_groups, chunk, chunks, eps, **merge
    )
    return mean, rstd


def moments(x: Tensor, num_groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and 1 / standard deviation of each group of ``x`` [B, C, H, W], both [B, G] fp32; NaN where x is empty.

    channels_last and contiguous are read as they lie; another layout is copied.
    """
    if x.numel() == 0:
        nothing = torch.full((x.shape[0], num_groups), float("nan"), dtype=torch.float32, device=x.device)
        return nothing, nothing.clone()
    plan = _plan(x)
    batch, channels, height, width = x.shape
    pixels = height * width
    block_p, block_c, warps = plan.config
    part = torch.empty((2, batch, plan.chunks, channels), dtype=torch.float32, device=x.device)
    moments_kernel[(batch * plan.chunks * triton.cdiv(channels, block_c),)](
        plan.dense,
        part[0],
        part[1],
        channels,
        pixels,
        plan.tiles,
        plan.chunks,
        *plan.strides,
        BLOCK_P=block_p,
        BLOCK_C=block_c,
        num_warps=warps,
    )
    return merge_moments(part, pixels, plan.tiles * block_p, num_groups, eps)


def forward(x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """y, mean and rstd; the arguments are those of ``snapgen::group_norm_silu``."""
    y = torch.empty_like(x)
    mean, rstd = moments(x, num_groups, eps)
    if x.numel() == 0:
        return y, mean, rstd
    plan = _plan(x)
    batch, channels, height, width = x.shape
    pixels, per_group = height * width, channels // num_groups
    block_p, block_c, warps = plan.config
    blocks_c = triton.cdiv(channels, block_c)
    tile = {"BLOCK_P": block_p, "BLOCK_C": block_c, "num_warps": warps}
    out = y if y.stride() == plan.dense.stride() else torch.empty_like(plan.dense)
    apply_kernel[(batch * triton.cdiv(pixels, block_p) * blocks_c,)](
        plan.dense,
        out,
        weight.contiguous(),
        bias.contiguous(),
        mean,
        rstd,
        channels,
        pixels,
        num_groups,
        per_group,
        *plan.strides,
        **tile,
    )
    return y if out is y else y.copy_(out), mean, rstd


def backward(
    dy: Tensor,
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    mean: Tensor,
    rstd: Tensor,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dweight and dbias; the arguments are those of ``snapgen::group_norm_silu_backward``."""
    empty = dy.new_empty(0)
    dx = torch.empty_like(x) if needs[0] else empty
    dweight, dbias = torch.empty_like(weight.contiguous()), torch.empty_like(bias.contiguous())
    if x.numel() == 0:
        return dx, dweight.zero_() if needs[1] else empty, dbias.zero_() if needs[2] else dy.new_empty(0)
    plan = _plan(x)
    batch, channels, height, width = x.shape
    pixels, per_group = height * width, channels // num_groups
    block_p, block_c, warps = plan.config
    blocks_c = triton.cdiv(channels, block_c)
    tile = {"BLOCK_P": block_p, "BLOCK_C": block_c, "num_warps": warps}
    last = plan.strides[1] == 1 and not plan.dense.is_contiguous()
    dense_dy = dy.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    weight, bias = weight.contiguous(), bias.contiguous()
    part = torch.empty((2, batch, plan.chunks, channels), dtype=torch.float32, device=x.device)
    sizes = (channels, pixels, num_groups, per_group)
    sums_kernel[(batch * plan.chunks * blocks_c,)](
        plan.dense,
        dense_dy,
        weight,
        bias,
        mean,
        rstd,
        part[0],
        part[1],
        *sizes,
        plan.tiles,
        plan.chunks,
        *plan.strides,
        **tile,
    )
    sums = torch.empty((2, batch, channels), dtype=torch.float32, device=x.device)
    means = torch.empty((2, batch, num_groups), dtype=torch.float32, device=x.device)
    block_cg, block = _merge_shape(per_group)
    merge = {"CG": per_group, "BLOCK_CG": block_cg, "BLOCK": block, "num_warps": 4}
    merge_sums_kernel[(batch * num_groups,)](
        part[0],
        part[1],
        weight,
        sums[0],
        sums[1],
        means[0],
        means[1],
        channels,
        pixels,
        num_groups,
        plan.chunks,
        **merge,
    )
    if needs[1] or needs[2]:
        parameters_kernel[(triton.cdiv(channels, 64),)](
            sums[0], sums[1], dweight, dbias, batch, channels, BLOCK_B=16, BLOCK_C=64, num_warps=4
        )
    if needs[0]:
        out = dx if dx.stride() == plan.dense.stride() else torch.empty_like(plan.dense)
        gradient_kernel[(batch * triton.cdiv(pixels, block_p) * blocks_c,)](
            plan.dense, dense_dy, out, weight, bias, mean, rstd, means[0], means[1], *sizes, *plan.strides, **tile
        )
        dx = dx if out is dx else dx.copy_(out)
    return dx, dweight if needs[1] else empty, dbias if needs[2] else dy.new_empty(0)


# What each kernel is compiled for, without a GPU: pointer arguments by the dtype they take ("x": that of the
# activations, "w": that of the parameters), and constants per config.
COMPILE = {
    "moments_kernel": {"p_x": "x"},
    "apply_kernel": {"p_x": "x", "p_y": "x", "p_weight": "w", "p_bias": "w"},
    "sums_kernel": {"p_x": "x", "p_dy": "x", "p_weight": "w", "p_bias": "w"},
    "gradient_kernel": {"p_x": "x", "p_dy": "x", "p_dx": "x", "p_weight": "w", "p_bias": "w"},
    "merge_moments_kernel": {},
    "merge_sums_kernel": {"p_weight": "w"},
    "parameters_kernel": {"p_dweight": "w", "p_dbias": "w"},
}


def compile_constants(kernel: str) -> list[dict[str, int]]:
    """The constexpr arguments of every config that the launchers may choose for ``kernel``."""
    if kernel == "parameters_kernel":
        return [{"BLOCK_B": 16, "BLOCK_C": 64, "num_warps": 4}]
    if kernel.startswith("merge"):
        return [
            {"CG": cg, "BLOCK_CG": _merge_shape(cg)[0], "BLOCK": _merge_shape(cg)[1], "num_warps": 4}
            for cg in (1, 8, 28)
        ]
    return [{"BLOCK_P": c.block_p, "BLOCK_C": c.block_c, "num_warps": c.num_warps} for c in CONFIGS.values()]
