"""GroupNorm, SiLU and a dense 3x3 convolution to a few outputs on the GPU: the decoder's last layer; the contract is
that of ``snapgen_kernels.decoding.norm_silu_conv``.

A pixel is normalised once and multiplied with the weights of all nine taps at once: z[9 O] = SiLU(norm(x)) w, of which
each output pixel then adds what nine pixels have for it. The large image is read once and the normalised one is never
stored. z is fp32, by planes, so that neighbours in a row are neighbours in memory at every tap.

Bytes at 1024x1024, C = 128, O = 3, bf16: x is 268 MB and must be read; z is 113 MB, written once and read once, where a
normalised image would be 537 MB. z of a band of rows stays in the L2 cache, for two launches: which is faster is
measured by tuning; the rule is as much as fits into ``SCRATCH`` bytes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from snapgen_kernels import costs
from snapgen_kernels._triton import common, tuning
from snapgen_kernels._triton.bands import Plan, bands, plan_for
from snapgen_kernels._triton.common import Build, new_channels_last
from snapgen_kernels._triton.group_norm_silu import moments
from snapgen_kernels._triton.normalise import Affine, affine, norm_arguments, normalised
from snapgen_kernels._triton.pointwise import are_whole, precisions
from snapgen_kernels.decoding import MAX_OUTPUTS
from snapgen_kernels.group_norm_silu import Norm

COLUMNS = common.pow2(9 * MAX_OUTPUTS)
SCRATCH = 512 << 20


class TapsConfig(NamedTuple):
    """A program multiplies ``block_m`` pixels, ``block_k`` channels at a time."""

    block_m: int
    block_k: int
    num_warps: int
    num_stages: int


class SumConfig(NamedTuple):
    """A program adds up ``block_w`` pixels of a row."""

    block_w: int
    num_warps: int


TAPS_CONFIGS = (
    TapsConfig(128, 32, 4, 3),
    TapsConfig(128, 64, 4, 3),
    TapsConfig(128, 32, 8, 3),
    TapsConfig(64, 32, 4, 3),
)
# Products in full precision run on the ordinary units.
TAPS_CONFIGS_FP32 = (TapsConfig(32, 32, 4, 2),)
TAPS_CONFIGS_TF32 = (TapsConfig(64, 32, 4, 2),)
# Channels that are no whole vectors are loaded one by one, each with an address and a mask.
RAGGED = TapsConfig(32, 32, 4, 2)
SUM_CONFIGS = (SumConfig(256, 4), SumConfig(128, 4), SumConfig(512, 4))


@triton.jit(do_not_specialize=["P", "G", "CG", "N", "tiles"])
def taps_kernel(
    p_x,
    p_w,
    p_z,
    p_mean,
    p_rstd,
    p_gamma,
    p_beta,
    P,
    C,
    G,
    CG,
    N,
    tiles,
    FAST: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """z [B, N, P] = SiLU(norm(x [B, P, C])) times w [N, C]. Grid: B * tiles, tiles = cdiv(P, BLOCK_M)."""
    i_m, i_b = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    b_m = tl.arange(0, BLOCK_M)
    m_m = i_m * BLOCK_M + b_m < P
    b_n = tl.arange(0, BLOCK_N)
    m_n = b_n < N
    b_k = tl.arange(0, BLOCK_K)
    p_x += (i_b.to(tl.int64) * P + i_m * BLOCK_M) * C + b_m[:, None] * C + b_k[None, :]
    p_w += b_n[None, :] * C + b_k[:, None]
    b_acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i_k in range(0, C, BLOCK_K):
        b_c = i_k + b_k
        m_k = b_c < C
        if EVEN_K:
            b_x = tl.load(p_x, mask=m_m[:, None], other=0.0)
            b_w = tl.load(p_w, mask=m_n[None, :], other=0.0)
        else:
            b_x = tl.load(p_x, mask=m_m[:, None] & m_k[None, :], other=0.0)
            b_w = tl.load(p_w, mask=m_k[:, None] & m_n[None, :], other=0.0)
        # Channels beyond C have scale and offset 0, and SiLU(0) = 0.
        b_scale, b_offset = affine(p_mean, p_rstd, p_gamma, p_beta, i_b, G, CG, b_c, m_k, True, FAST)
        b_a = normalised(b_x, b_scale, b_offset, True, FAST)
        b_acc = tl.dot(b_a.to(p_x.dtype.element_ty), b_w, b_acc, input_precision=PRECISION)
        p_x += BLOCK_K
        p_w += BLOCK_K
    # Plans keep z of a sample below 2^31 values.
    p_z += i_b.to(tl.int64) * N * P + i_m * BLOCK_M
    tl.store(p_z + (b_n[None, :] * P + b_m[:, None]), b_acc, mask=m_m[:, None] & m_n[None, :])


@triton.jit(do_not_specialize=["H", "W", "HZ", "above"])
def sum_taps_kernel(p_z, p_bias, p_y, H, W, HZ, above, OUTPUTS: tl.constexpr, BLOCK_W: tl.constexpr):
    """y [B, H, W, OUTPUTS] of z [B, 9 OUTPUTS, HZ, W], whose row ``above`` is y's first. Grid: B * H * cdiv(W,
    BLOCK_W), walked backwards: it begins with what was written last, which the cache still holds."""
    i_program = tl.num_programs(0) - 1 - tl.program_id(0)
    blocks_w = tl.cdiv(W, BLOCK_W)
    i_w, i_rest = i_program % blocks_w, i_program // blocks_w
    i_h, i_b = i_rest % H, i_rest // H
    b_w = i_w * BLOCK_W + tl.arange(0, BLOCK_W)
    plane = tl.cast(HZ, tl.int64) * W
    p_y += (i_b.to(tl.int64) * H + i_h) * W * OUTPUTS
    for i_o in tl.static_range(OUTPUTS):
        b_y = tl.zeros([BLOCK_W], tl.float32) + tl.load(p_bias + i_o).to(tl.float32)
        for i_tap in tl.static_range(9):
            i_row, b_col = above + i_h + i_tap // 3 - 1, b_w + i_tap % 3 - 1
            m = (i_row >= 0) & (i_row < HZ) & (b_col >= 0) & (b_col < W)
            i_z = (i_b * (9 * OUTPUTS) + i_tap * OUTPUTS + i_o).to(tl.int64) * plane + i_row * W
            b_y += tl.load(p_z + i_z + b_col, mask=m, other=0.0)
        tl.store(p_y + b_w * OUTPUTS + i_o, b_y.to(p_y.dtype.element_ty), mask=b_w < W)


# ---- launchers -------------------------------------------------------------------------------------------------------


def taps_configs(dtype: torch.dtype, precision: str, whole: bool) -> tuple[TapsConfig, ...]:
    """The product's candidates; ``whole``: channels are a multiple of 16."""
    if not whole:
        return (RAGGED,)
    if dtype == torch.float32:
        return TAPS_CONFIGS_TF32 if precision == "tf32" else TAPS_CONFIGS_FP32
    return TAPS_CONFIGS


def _taps(x: Tensor, norm: Affine, weight: Tensor, z: Tensor) -> None:
    """Fill ``z`` [B, 9 O, P] of x, rows of channels_last; ``weight``: [9 O, C]."""
    batch, channels, height, width = x.shape
    columns, pixels, precision = weight.shape[0], height * width, common.precision(x.dtype)
    *pointers, groups, per_group = norm_arguments(norm, x)

    def launch(config: TapsConfig) -> None:
        block_m, block_k, warps, stages = config
        tiles = common.cdiv(pixels, block_m)
        taps_kernel[(batch * tiles,)](
            x, weight, z, *pointers, pixels, channels, groups, per_group, columns, tiles,
            FAST=common.fast(x.dtype), EVEN_K=channels % block_k == 0, PRECISION=precision,
            BLOCK_M=block_m, BLOCK_N=COLUMNS, BLOCK_K=block_k, num_warps=warps, num_stages=stages,
        )  # fmt: skip

    configs = taps_configs(x.dtype, precision, are_whole(channels))
    key = (str(x.dtype), precision, batch, pixels, channels, columns)
    launch(tuning.choose("norm_conv.taps", key, configs, configs[0], launch))


def _sum(z: Tensor, bias: Tensor, above: int, width: int, y: Tensor) -> None:
    """Fill ``y``, rows of channels_last, of z [B, 9 O, P]; see :func:`sum_taps_kernel`."""
    batch, outputs, height, _ = y.shape
    rows = z.shape[2] // width

    def launch(config: SumConfig) -> None:
        block_w, warps = config
        sum_taps_kernel[(batch * height * common.cdiv(width, block_w),)](
            z, bias, y, height, width, rows, above, OUTPUTS=outputs, BLOCK_W=block_w, num_warps=warps
        )

    key = (str(y.dtype), batch, outputs, height, width)
    launch(tuning.choose("norm_conv.sum", key, SUM_CONFIGS, SUM_CONFIGS[0], launch))


def _plan(x: Tensor, outputs: int, room: int) -> Plan:
    """Samples or rows whose z takes about ``room`` bytes."""
    batch, _, height, width = x.shape
    return plan_for(batch, height, 4 * 9 * outputs * width, room)


def plans(x: Tensor, outputs: int) -> tuple[tuple[Plan, ...], Plan]:
    """The plans that a call may follow, and the rule's."""
    rule = _plan(x, outputs, SCRATCH)
    return tuple(dict.fromkeys((rule, _plan(x, outputs, costs.H200.cache // 2)))), rule


def norm_conv(x: Tensor, norm: Norm, weight: Tensor, bias: Tensor, statistics: tuple[Tensor, Tensor] | None) -> Tensor:
    """``snapgen_kernels.decoding.norm_silu_conv`` of up to ``MAX_OUTPUTS`` outputs; y is channels_last."""
    dense = common.channels_last(x)
    batch, channels, height, width = x.shape
    outputs = weight.shape[0]
    y = new_channels_last(dense, batch, outputs, height, width)
    if y.numel() == 0:
        return y
    mean, rstd = statistics or moments(dense, norm.num_groups, norm.eps)
    before = Affine(
        mean.contiguous(), rstd.contiguous(), norm.weight.contiguous(), norm.bias.contiguous(), norm.num_groups
    )
    taps = weight.permute(2, 3, 0, 1).reshape(9 * outputs, channels).contiguous()
    bias = bias.contiguous()

    def follow(plan: Plan) -> None:
        for band in bands(plan, batch, height):
            more = band.with_neighbours(height)
            shape = (band.last - band.first, 9 * outputs, (more.bottom - more.top) * width)
            z = torch.empty(shape, dtype=torch.float32, device=x.device)
            _taps(more.of(dense), before.samples(band.first, band.last), taps, z)
            _sum(z, bias, band.top - more.top, width, band.of(y))
            del z  # the next one takes its place

    candidates, rule = plans(dense, outputs)
    key = (str(x.dtype), *x.shape, outputs, common.precision(x.dtype))
    follow(tuning.choose("norm_conv", key, candidates, rule, follow))
    return y


def builds(dtype: torch.dtype, nvidia: bool) -> list[Build]:
    """Both kernels in every config that the launchers may choose."""
    fast = nvidia and dtype == torch.bfloat16
    found: list[Build] = []
    for precision in precisions(dtype, nvidia):
        for whole in (True, False):
            for config in taps_configs(dtype, precision, whole):
                flags: dict[str, Any] = {"FAST": fast, "EVEN_K": whole, "PRECISION": precision, "BLOCK_N": COLUMNS}
                flags |= {"products": dtype != torch.float32 or precision == "tf32"}
                sizes = ("C",) if whole else ()
                found.append(common.build(taps_kernel, dtype, ("p_x", "p_w"), config, sizes, **flags))
    for shape in SUM_CONFIGS:
        for outputs in (1, MAX_OUTPUTS):
            found.append(common.build(sum_taps_kernel, dtype, ("p_y", "p_bias"), shape, (), OUTPUTS=outputs))
    return found
