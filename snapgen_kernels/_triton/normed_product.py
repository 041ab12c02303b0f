"""The second half of the decoder's block on the GPU: GroupNorm's statistics from the moments of tiles, and a 1x1
product whose operand is normalised and passed through SiLU in registers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from snapgen_kernels._triton import common, tuning
from snapgen_kernels._triton.common import Build, silu, silu_of_half
from snapgen_kernels._triton.depthwise import Tiles
from snapgen_kernels._triton.group_norm_silu import MERGE_BLOCK
from snapgen_kernels._triton.pointwise import (
    ProductConfig,
    are_whole,
    dividing,
    filling,
    finish,
    new_moments,
    only,
    precisions,
    product_configs,
)
from snapgen_kernels.decoder_block import Weights

# ---- kernels ---------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["H", "W", "rows", "columns", "tiles"])
def merge_tiles_kernel(
    p_part,
    p_m2,
    p_gamma,
    p_beta,
    p_mean,
    p_rstd,
    p_scale,
    p_offset,
    C,
    H,
    W,
    G,
    rows,
    columns,
    tiles,
    eps,
    CG: tl.constexpr,
    BLOCK_CG: tl.constexpr,
    BLOCK: tl.constexpr,
    FAST: tl.constexpr,
):
    """Mean and rstd of one group from the moments of its channels in tiles of ``rows`` by ``columns`` pixels (Chan),
    and scale and offset that normalise its channels, halved where FAST. Grid: B * G."""
    i_program = tl.program_id(0)
    i_b, i_g = i_program // G, i_program % G
    b_c = tl.arange(0, BLOCK_CG)
    m_c = b_c < CG
    across = tl.cdiv(W, columns)
    i_base = i_b.to(tl.int64) * tiles * C + i_g * CG
    b_sum = tl.zeros([BLOCK, BLOCK_CG], dtype=tl.float32)
    # Sums are taken around the first tile's mean, so that a large mean costs no bits.
    first = tl.load(p_part + i_base)
    for i_start in range(0, tiles, BLOCK):
        b_k = i_start + tl.arange(0, BLOCK)
        m = (b_k < tiles)[:, None] & m_c[None, :]
        i_in = i_base + b_k.to(tl.int64)[:, None] * C + b_c[None, :]
        b_n = tl.minimum(H - b_k // across * rows, rows) * tl.minimum(W - b_k % across * columns, columns)
        b_part = tl.load(p_part + i_in, mask=m, other=0.0)
        b_sum += tl.where(m, (b_part - first) * b_n.to(tl.float32)[:, None], 0.0)
    n = tl.cast(H, tl.float32) * tl.cast(W, tl.float32) * CG
    off = tl.sum(tl.sum(b_sum, 1), 0) / n
    b_sum = tl.zeros([BLOCK, BLOCK_CG], dtype=tl.float32)
    for i_start in range(0, tiles, BLOCK):
        b_k = i_start + tl.arange(0, BLOCK)
        m = (b_k < tiles)[:, None] & m_c[None, :]
        i_in = i_base + b_k.to(tl.int64)[:, None] * C + b_c[None, :]
        b_n = tl.minimum(H - b_k // across * rows, rows) * tl.minimum(W - b_k % across * columns, columns)
        b_delta = tl.load(p_part + i_in, mask=m, other=0.0) - first - off
        b_square = b_delta * b_delta * b_n.to(tl.float32)[:, None]
        b_sum += tl.where(m, tl.load(p_m2 + i_in, mask=m, other=0.0) + b_square, 0.0)
    mean, rstd = first + off, 1.0 / tl.sqrt(tl.sum(tl.sum(b_sum, 1), 0) / n + eps)
    tl.store(p_mean + i_program, mean)
    tl.store(p_rstd + i_program, rstd)
    half = 0.5 if FAST else 1.0
    b_scale = tl.load(p_gamma + i_g * CG + b_c, mask=m_c, other=0.0).to(tl.float32) * rstd
    b_offset = tl.load(p_beta + i_g * CG + b_c, mask=m_c, other=0.0).to(tl.float32) - mean * b_scale
    i_out = i_b.to(tl.int64) * C + i_g * CG + b_c
    tl.store(p_scale + i_out, b_scale * half, mask=m_c)
    tl.store(p_offset + i_out, b_offset * half, mask=m_c)


@triton.jit(do_not_specialize=["P", "tiles"])
def normed_product_kernel(
    p_d,
    p_w,
    p_y,
    p_residual,
    p_scale,
    p_offset,
    p_mean,
    p_m2,
    P,
    K,
    N,
    tiles,
    STATISTICS: tl.constexpr,
    FAST: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y = SiLU(d scale + offset) w + residual; scale and offset: [B, K]. STATISTICS: and the moments of y. Grid: B *
    tiles * cdiv(N, BLOCK_N), tiles = cdiv(P, BLOCK_M). It begins with what was written last, which the cache still
    holds, as DW2 walks backwards."""
    blocks_n = tl.cdiv(N, BLOCK_N)
    i_n, i_rest = tl.program_id(0) % blocks_n, tl.program_id(0) // blocks_n
    i_m, i_b = i_rest % tiles, i_rest // tiles
    b_m = tl.arange(0, BLOCK_M)
    m_m = i_m * BLOCK_M + b_m < P
    b_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = b_n < N
    b_k = tl.arange(0, BLOCK_K)
    p_d += (i_b.to(tl.int64) * P + i_m * BLOCK_M) * K + b_m[:, None] * K + b_k[None, :]
    p_w += b_n[None, :] * K + b_k[:, None]
    p_scale += i_b * K + b_k
    p_offset += i_b * K + b_k
    b_acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i_k in range(0, K, BLOCK_K):
        if EVEN_K:
            b_d = tl.load(p_d, mask=m_m[:, None], other=0.0)
            b_w = tl.load(p_w, mask=m_n[None, :], other=0.0)
            b_scale, b_offset = tl.load(p_scale), tl.load(p_offset)
        else:
            m_k = i_k + b_k < K
            b_d = tl.load(p_d, mask=m_m[:, None] & m_k[None, :], other=0.0)
            b_w = tl.load(p_w, mask=m_k[:, None] & m_n[None, :], other=0.0)
            b_scale, b_offset = tl.load(p_scale, mask=m_k, other=0.0), tl.load(p_offset, mask=m_k, other=0.0)
        b_z = b_d.to(tl.float32) * b_scale[None, :] + b_offset[None, :]
        b_a = silu_of_half(b_z) if FAST else silu(b_z, False)
        b_acc = tl.dot(b_a.to(p_d.dtype.element_ty), b_w, b_acc, input_precision=PRECISION)
        p_d += BLOCK_K
        p_w += BLOCK_K
        p_scale += BLOCK_K
        p_offset += BLOCK_K
    finish(
        b_acc, p_y, p_y, p_y, p_residual, p_mean, p_m2, i_b, i_m, b_m, m_m, b_n, m_n, P, N, tiles,
        BLOCK_M, False, False, True, STATISTICS,
    )  # fmt: skip


# ---- launchers -------------------------------------------------------------------------------------------------------


def normed_configs(
    dtype: torch.dtype, precision: str, nvidia: bool, inputs: int, outputs: int
) -> tuple[ProductConfig, ...]:
    """The candidates of products with a norm in front or its gradient behind: those with registers left for it."""
    whole = are_whole(inputs, outputs)
    found = [c for c in product_configs(dtype, precision, nvidia, 0, False, whole) if only(c) == 0]
    small = dtype == torch.float32 or not nvidia
    return dividing([c for c in found if not small or c.block_m * c.block_n <= 64 * 64], inputs)


def _merge_block(block_c: int) -> int:
    """Tiles that are merged at a time: about 4096 values."""
    return max(1, min(MERGE_BLOCK, 4096 // block_c))


def affine_of(
    tiles: Tiles, weights: Weights, num_groups: int, eps: float, height: int, width: int
) -> tuple[Tensor, ...]:
    """Mean and rstd [B, G], and scale and offset [B, M] of the norm, from the moments of its channels."""
    _, batch, count, middle = tiles.part.shape
    mean = torch.empty((batch, num_groups), dtype=torch.float32, device=tiles.part.device)
    scale = torch.empty((batch, middle), dtype=torch.float32, device=tiles.part.device)
    rstd, offset = torch.empty_like(mean), torch.empty_like(scale)
    per_group = middle // num_groups
    block_c = common.pow2(per_group)
    merge_tiles_kernel[(batch * num_groups,)](
        *tiles.part, weights.norm_weight, weights.norm_bias, mean, rstd, scale, offset,
        middle, height, width, num_groups, tiles.rows, tiles.columns, count, eps,
        CG=per_group, BLOCK_CG=block_c, BLOCK=_merge_block(block_c),
        FAST=common.fast(weights.pw2_weight.dtype), num_warps=4,
    )  # fmt: skip
    return mean, rstd, scale, offset


class NormedProduct(NamedTuple):
    """y = PW(SiLU(h scale + offset)) + residual, of images that are rows of channels_last."""

    weight: Tensor
    scale: Tensor  # [B, M]
    offset: Tensor

    def launch(self, h: Tensor, residual: Tensor, y: Tensor, config: ProductConfig, part: Tensor | None = None) -> None:
        """h [B, M, H, W], residual and y [B, C, H, W]. ``part`` [2, B, tiles, C]: the moments of y."""
        batch, inputs, height, width = h.shape
        outputs, pixels = y.shape[1], height * width
        block_m, block_n, block_k, warps, stages = config
        tiles = common.cdiv(pixels, block_m)
        normed_product_kernel[(batch * tiles * common.cdiv(outputs, block_n),)](
            h, self.weight, y, residual, self.scale, self.offset, *((y, y) if part is None else part),
            pixels, inputs, outputs, tiles, STATISTICS=part is not None,
            FAST=common.fast(h.dtype), EVEN_K=inputs % block_k == 0, PRECISION=common.precision(h.dtype),
            BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, num_warps=warps, num_stages=stages,
        )  # fmt: skip

    def config(self, h: Tensor, residual: Tensor, y: Tensor, statistics: bool) -> ProductConfig:
        """The config for images of these sizes."""
        batch, inputs, height, width = h.shape
        outputs, pixels, precision = y.shape[1], height * width, common.precision(h.dtype)

        def launch(config: ProductConfig) -> None:
            self.launch(h, residual, y, config, new_moments(y, config.block_m).part if statistics else None)

        configs = normed_configs(h.dtype, precision, torch.version.hip is None, inputs, outputs)
        default = filling(configs, batch, pixels, outputs, common.processors(h))
        key = (str(h.dtype), precision, batch, pixels, inputs, outputs, statistics)
        return tuning.choose("normed_product", key, configs, default, launch)

    def samples(self, first: int, last: int) -> NormedProduct:
        return self._replace(scale=self.scale[first:last], offset=self.offset[first:last])


def builds(dtype: torch.dtype, nvidia: bool) -> list[Build]:
    """Every kernel of this file in every config that its launchers may choose."""
    fast, images = nvidia and dtype == torch.bfloat16, ("p_d", "p_w", "p_y", "p_residual")
    found: list[Build] = []
    for per_group in (1, 12, 15):
        block_c = common.pow2(per_group)
        constants = {"CG": per_group, "BLOCK_CG": block_c, "BLOCK": _merge_block(block_c), "FAST": fast}
        found.append(Build(merge_tiles_kernel, constants, {}, {"num_warps": 4}))
    for precision in precisions(dtype, nvidia):
        for inputs in (384, 480, 33):
            for config in normed_configs(dtype, precision, nvidia, inputs, inputs):
                flags: dict[str, Any] = {"FAST": fast, "EVEN_K": inputs % 32 == 0, "PRECISION": precision}
                flags |= {"products": dtype != torch.float32 or precision == "tf32"}
                sizes = ("K", "N") if inputs % 32 == 0 else ()
                for measured in (False, True):
                    added = {**flags, "STATISTICS": measured}
                    found.append(common.build(normed_product_kernel, dtype, images, config, sizes, **added))
    return found
