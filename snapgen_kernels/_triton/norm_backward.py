"""Backward of GroupNorm + SiLU in front of a convolution on the GPU, whose gradient da the convolution's backward has
stored together with parts of the two sums per channel that the norm needs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from snapgen_kernels._triton import common, group_norm_silu, group_norm_silu_backward, tuning
from snapgen_kernels._triton.common import Build
from snapgen_kernels._triton.depthwise import Affine
from snapgen_kernels._triton.weight_gradient import new_parts


class Config(NamedTuple):
    """A tile of BLOCK_P pixels by BLOCK_C channels."""

    block_p: int
    block_c: int
    num_warps: int


CONFIGS = (Config(32, 128, 4), Config(64, 64, 4), Config(128, 32, 4))
# Tiles of a program of the gradient kernel, at most: enough to make reading the parameters cheap.
MAX_TILES = 8


@triton.jit
def silu_and_slope(b_h, FAST: tl.constexpr):
    """silu(z) and its derivative for z = 2 h; FAST: see :func:`common.tanh_approx`."""
    if FAST:
        b_t = common.tanh_approx(b_h)
        b_a = tl.fma(b_h, b_t, b_h)
        b_s = tl.fma(b_t, 0.5, 0.5)
        return b_a, tl.fma(b_a, 1.0 - b_s, b_s)
    else:
        b_s = 1.0 / (1.0 + tl.exp(-2.0 * b_h))
        b_a = 2.0 * b_h * b_s
        return b_a, b_s + b_a * (1.0 - b_s)


@triton.jit
def centred(p_mean, p_rstd, p_weight, p_bias, i_group, b_c, m_c, HAS_NORM: tl.constexpr):
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
def activation(b_x, affine, HAS_NORM: tl.constexpr, FAST: tl.constexpr):
    """a, its derivative by z, and x - mean."""
    b_x = b_x.to(tl.float32)
    if HAS_NORM:
        b_centered = b_x - affine[0]
        b_a, b_slope = silu_and_slope(tl.fma(b_centered, affine[1], affine[2]), FAST)
        return b_a, b_slope, b_centered
    else:
        return b_x, b_x, b_x


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

    dx may be the memory of da. Grid: B * chunks * cdiv(C, BLOCK_C); a chunk is ``tiles`` tiles. Walked backwards: what
    was written last may still be in the cache.
    """
    blocks_c = tl.cdiv(C, BLOCK_C)
    i_program = tl.num_programs(0) - 1 - tl.program_id(0)
    i_c, i_chunk = i_program % blocks_c, (i_program // blocks_c) % chunks
    i_b = (i_program // (blocks_c * chunks)).to(tl.int64)
    b_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    b_p = tl.arange(0, BLOCK_P)
    m_c = b_c < C
    i_group = i_b * G + b_c // CG
    affine = centred(p_mean, p_rstd, p_weight, p_bias, i_group, b_c, m_c, True)
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
        _, b_slope, b_centered = activation(b_x, affine, True, FAST)
        b_dx = tl.fma(b_da * b_slope, b_dz_scale, tl.fma(b_centered, b_x_scale, b_offset))
        if p_add is not None:
            b_dx += tl.load(p_add + i_first + b_off, mask=m, other=0.0).to(tl.float32)
        tl.store(p_dx + i_first + b_off, b_dx.to(p_dx.dtype.element_ty), mask=m)


def gradient(x: Tensor, da: Tensor, add: Tensor | None, norm: Affine, means: Tensor) -> None:
    """Turn da, [B, C, H, W] as x (channels_last), into dx in place; means: mean_g and mean_gx, [2, B, G]."""
    batch, channels, height, width = x.shape
    pixels = height * width

    def launch(config: Config, dx: Tensor) -> None:
        steps, blocks_c = common.cdiv(pixels, config.block_p), common.cdiv(channels, config.block_c)
        tiles = min(common.cdiv(steps * batch * blocks_c, 16 * common.processors(x)), MAX_TILES)
        chunks = common.cdiv(steps, tiles)
        norm_gradient_kernel[(batch * chunks * blocks_c,)](
            x, da, add, dx, norm.weight, norm.bias, norm.mean, norm.rstd, means[0], means[1],
            channels, pixels, norm.num_groups, channels // norm.num_groups, tiles, chunks,
            FAST=common.fast(x.dtype), BLOCK_P=config.block_p, BLOCK_C=config.block_c, num_warps=config.num_warps,
        )  # fmt: skip

    key = (str(x.dtype), batch, pixels, channels, add is not None)
    default = next((c for c in CONFIGS if c.block_c <= common.pow2(channels)), CONFIGS[-1])
    # Timed runs must leave da as it is.
    config = tuning.choose("norm_gradient", key, CONFIGS, default, lambda config: launch(config, torch.empty_like(da)))
    launch(config, da)


def merged(parts: Tensor, norm: Affine, pixels: int) -> tuple[Tensor, Tensor]:
    """Of parts [2, B, parts, C] the sums of dz and dz xhat, [2, B, C], and their means by group, [2, B, G], weighted
    with the norm's weight."""
    _, batch, count, channels = parts.shape
    per_group = channels // norm.num_groups
    sums, means = new_parts(parts, 2, batch, channels), new_parts(parts, 2, batch, norm.num_groups)
    block_c = common.pow2(per_group)
    block = max(1, min(group_norm_silu.MERGE_BLOCK, 4096 // block_c))
    group_norm_silu_backward.merge_sums_kernel[(batch * norm.num_groups,)](
        parts[0], parts[1], norm.weight, sums[0], sums[1], means[0], means[1],
        channels, pixels, norm.num_groups, count, CG=per_group, BLOCK_CG=block_c, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return sums, means


def parameters(sums: Tensor, norm: Affine) -> tuple[Tensor, Tensor]:
    """The gradients of the norm's weight and bias of the sums over the pixels, [2, B, C]."""
    dweight, dbias = torch.empty_like(norm.weight), torch.empty_like(norm.bias)
    _, batch, channels = sums.shape
    group_norm_silu_backward.parameters_kernel[(common.cdiv(channels, 64),)](
        sums[0], sums[1], dweight, dbias, batch, channels, BLOCK_B=16, BLOCK_C=64, num_warps=4
    )
    return dweight, dbias


def builds(dtype: torch.dtype, nvidia: bool) -> list[Build]:
    """The kernel in every config that the launcher may choose."""
    fast, images = nvidia and dtype == torch.bfloat16, ("p_x", "p_da", "p_add", "p_dx")
    alone: dict[str, Any] = {"p_add": None}
    return [
        common.build(norm_gradient_kernel, dtype, images, config, ("C",), FAST=fast, **extra)
        for config in CONFIGS
        for extra in ({}, alone)
    ]
