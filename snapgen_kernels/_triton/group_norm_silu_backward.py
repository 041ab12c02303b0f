"""Backward of GroupNorm + SiLU on the GPU, from the statistics that the forward kept.

The passes of the forward, with its names, tiles and order: one sums dz and dz xhat per channel and chunk, which are
merged over chunks and groups in a fixed order, one makes dx. Sums read x and dy (2 X, with X the bytes of x), the
gradient reads both again and writes dx: 5 X, floor 3 X, and the L2 cache saves the second read as in the forward.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from snapgen_kernels._triton import common
from snapgen_kernels._triton import group_norm_silu as kernels
from snapgen_kernels._triton.common import Build, cdiv, sigmoid, tanh_approx
from snapgen_kernels._triton.group_norm_silu import (
    Group,
    Image,
    Tile,
    chosen,
    image_of,
    load,
    merge_constants,
    offsets,
    per_channel,
    place,
    planned,
    room,
    split,
    store,
)

# ---- kernels ---------------------------------------------------------------------------------------------------------


@triton.jit
def slope(b_h, FAST: tl.constexpr):
    """Twice the derivative of SiLU at z = 2 h; FAST: see ``tanh_approx``."""
    if FAST:
        b_t = tanh_approx(b_h)
        return 1.0 + (b_h * (1.0 - b_t * b_t) + b_t)
    else:
        b_s = sigmoid(2.0 * b_h, False)
        return 2.0 * b_s * (1.0 + 2.0 * b_h * (1.0 - b_s))


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
    P,
    tiles,
    chunks,
    s_b,
    s_c,
    s_p,
    C: tl.constexpr,
    CG: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    EVEN: tl.constexpr,
    LONG: tl.constexpr,
    FAST: tl.constexpr,
):
    """Per (sample, chunk, channel): sums of dz and of dz * xhat. Grid: B * chunks * cdiv(C, BLOCK_C)."""
    i_c, i_chunk, i_b = place(tl.cdiv(C, BLOCK_C), chunks, False)
    b_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = b_c < C
    b_g = i_b * (C // CG) + b_c // CG
    b_mean, b_rstd = per_channel(p_mean, b_g, m_c, EVEN), per_channel(p_rstd, b_g, m_c, EVEN)
    b_weight, b_bias = per_channel(p_weight, b_c, m_c, EVEN), per_channel(p_bias, b_c, m_c, EVEN)
    b_half_weight, b_half_bias = b_rstd * b_weight * 0.5, b_bias * 0.5
    p_x += i_b.to(tl.int64) * s_b + (i_c * BLOCK_C).to(tl.int64) * s_c
    p_dy += i_b.to(tl.int64) * s_b + (i_c * BLOCK_C).to(tl.int64) * s_c
    i_x = offsets(s_c, s_p, BLOCK_P, BLOCK_C, LONG)
    b_sum = tl.zeros([BLOCK_C], dtype=tl.float32)  # of 2 dz
    b_off_sum = tl.zeros([BLOCK_C], dtype=tl.float32)  # of 2 dz (x - mean)
    for i_tile in range(tiles):
        i_first = (i_chunk * tiles + i_tile) * BLOCK_P
        m = (i_first + tl.arange(0, BLOCK_P) < P)[:, None] & m_c[None, :]
        b_off = load(p_x + i_first.to(tl.int64) * s_p + i_x, m, EVEN, "") - b_mean
        b_dy = load(p_dy + i_first.to(tl.int64) * s_p + i_x, m, EVEN, "")  # 0 outside: nothing is added there
        b_twice = b_dy * slope(b_off * b_half_weight + b_half_bias, FAST)
        b_sum += tl.sum(b_twice, 0)
        b_off_sum += tl.sum(b_twice * b_off, 0)
    i_out = (i_b.to(tl.int64) * chunks + i_chunk) * C + b_c
    store(p_dz + i_out, 0.5 * b_sum, m_c, EVEN)
    store(p_dzx + i_out, 0.5 * b_off_sum * tl.sum(b_rstd, 0), m_c, EVEN)  # a sum over one row


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
    n = tl.cast(P, tl.float32) * CG
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
    P,
    s_b,
    s_c,
    s_p,
    C: tl.constexpr,
    CG: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    EVEN: tl.constexpr,
    LONG: tl.constexpr,
    FAST: tl.constexpr,
):
    """dx = rstd (dz weight - mean_g - xhat mean_gx), backwards. Grid: B * cdiv(P, BLOCK_P) * cdiv(C, BLOCK_C)."""
    i_c, i_p, i_b = place(tl.cdiv(C, BLOCK_C), tl.cdiv(P, BLOCK_P), True)
    b_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = b_c < C
    m = (i_p * BLOCK_P + tl.arange(0, BLOCK_P) < P)[:, None] & m_c[None, :]
    i_first = i_b.to(tl.int64) * s_b + (i_c * BLOCK_C).to(tl.int64) * s_c + (i_p * BLOCK_P).to(tl.int64) * s_p
    i_x = offsets(s_c, s_p, BLOCK_P, BLOCK_C, LONG)
    b_x = load(p_x + i_first + i_x, m, EVEN, "evict_first")
    b_dy = load(p_dy + i_first + i_x, m, EVEN, "evict_first")
    b_g = i_b * (C // CG) + b_c // CG
    b_mean, b_rstd = per_channel(p_mean, b_g, m_c, EVEN), per_channel(p_rstd, b_g, m_c, EVEN)
    b_mean_g, b_mean_gx = per_channel(p_mean_g, b_g, m_c, EVEN), per_channel(p_mean_gx, b_g, m_c, EVEN)
    b_weight, b_bias = per_channel(p_weight, b_c, m_c, EVEN), per_channel(p_bias, b_c, m_c, EVEN)
    b_half_weight = b_rstd * b_weight * 0.5
    b_off = b_x - b_mean
    b_twice = b_dy * slope(b_off * b_half_weight + b_bias * 0.5, FAST)
    b_dx = b_twice * b_half_weight - (b_rstd * b_mean_g + b_off * (b_rstd * b_rstd * b_mean_gx))
    store(p_dx + i_first + i_x, b_dx, m, EVEN)


# ---- launchers -------------------------------------------------------------------------------------------------------


class _Saved(NamedTuple):
    """What the backward's passes take besides the image."""

    dy: Tensor
    weight: Tensor
    bias: Tensor
    mean: Tensor
    rstd: Tensor


def _sums(image: Image, saved: _Saved, dz: Tensor, dzx: Tensor, tile: Tile) -> Tensor:
    """Fill ``dz`` and ``dzx`` [B, C], sums over the pixels; returns the means of both over groups, [2, B, G]."""
    (batch, groups), channels = saved.mean.shape, image.channels
    tiles, chunks = image.chunks(tile)
    part = room(image, tile)
    sums_kernel[(batch * chunks * cdiv(channels, tile.block_c),)](
        image.dense,
        *saved,
        part[0],
        part[1],
        image.pixels,
        tiles,
        chunks,
        *image.strides,
        **image.formula(tile, groups),
    )
    means = torch.empty((2, batch, groups), dtype=torch.float32, device=part.device)
    merge_sums_kernel[(batch * groups,)](
        part[0],
        part[1],
        saved.weight,
        dz,
        dzx,
        means[0],
        means[1],
        channels,
        image.pixels,
        groups,
        chunks,
        **merge_constants(channels // groups),
    )
    return means


def _gradient(image: Image, saved: _Saved, means: Tensor, dx: Tensor, tile: Tile) -> None:
    """Fill ``dx``, which has the strides of ``image.dense``."""
    gradient_kernel[image.grid(tile)](
        image.dense,
        saved.dy,
        dx,
        *saved[1:],
        means[0],
        means[1],
        image.pixels,
        *image.strides,
        **image.formula(tile, saved.mean.shape[1]),
    )


def _both_passes(image: Image, saved: _Saved, sums: Tensor, dx: Tensor) -> None:
    """Fill ``sums`` [2, B, C], of dz and of dz xhat over the pixels, and ``dx``."""

    def run(read: Tile, write: Tile, group: Group) -> None:
        tensors = (image.dense, dx, sums[0], sums[1], saved.dy, saved.mean, saved.rstd)
        for dense, dx_rows, dz, dzx, dy, mean, rstd in split(group.samples, *tensors):
            rows, kept = image._replace(dense=dense), saved._replace(dy=dy, mean=mean, rstd=rstd)
            means = _sums(rows, kept, dz, dzx, read)
            _gradient(rows, kept, means, dx_rows, write)

    planned(("group_norm_silu.sums", "group_norm_silu.gradient", "group_norm_silu.backward"), image, 2, run)


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
    dx = torch.empty_like(x) if needs[0] else dy.new_empty(0)
    dweight, dbias = torch.empty_like(weight.contiguous()), torch.empty_like(bias.contiguous())
    if x.numel() == 0:
        return dx, dweight.zero_() if needs[1] else dy.new_empty(0), dbias.zero_() if needs[2] else dy.new_empty(0)
    image = image_of(x)
    batch, channels = x.shape[:2]
    dy = dy.contiguous(memory_format=torch.channels_last if image.last else torch.contiguous_format)
    weight, bias = weight.contiguous(), bias.contiguous()
    sums = torch.empty((2, batch, channels), dtype=torch.float32, device=x.device)

    saved = _Saved(dy, weight, bias, mean, rstd)
    if needs[0]:
        out = dx if dx.stride() == image.dense.stride() else torch.empty_like(image.dense)
        _both_passes(image, saved, sums, out)
        dx = dx if out is dx else dx.copy_(out)
    else:
        alone = partial(_sums, image, saved, sums[0], sums[1])
        alone(chosen("group_norm_silu.sums", image, alone))
    if needs[1] or needs[2]:
        parameters_kernel[(cdiv(channels, 64),)](
            sums[0], sums[1], dweight, dbias, batch, channels, BLOCK_B=16, BLOCK_C=64, num_warps=4
        )
    return dx, dweight if needs[1] else dy.new_empty(0), dbias if needs[2] else dy.new_empty(0)


# ---- compiling without a GPU -----------------------------------------------------------------------------------------


def builds(dtype: torch.dtype, nvidia: bool) -> list[Build]:
    """Every kernel of this file in every tile that its launchers may choose."""
    fast = nvidia and dtype == torch.bfloat16
    images = {sums_kernel: ("p_x", "p_dy"), gradient_kernel: ("p_x", "p_dy", "p_dx")}

    def listed(tile: Tile, sizes: tuple[str, ...], **constants: Any) -> list[Build]:
        return [
            common.build(kernel, dtype, pointers, tile, sizes, C=256, CG=8, FAST=fast, **constants)
            for kernel, pointers in images.items()
        ]

    merging = kernels.merge_builds(merge_sums_kernel)
    found = [*merging, *kernels.tile_builds(listed, dtype), *kernels.single(listed, merging[0])]
    return [*found, Build(parameters_kernel, {"BLOCK_B": 16, "BLOCK_C": 64}, {}, {"num_warps": 4})]
