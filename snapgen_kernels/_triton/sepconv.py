"""The separable convolution's forward on the GPU; the contract is in ``snapgen_kernels/sepconv.py``.

Two plans, chosen per shape:

- ``split``: :func:`depthwise_kernel` (normalise, SiLU, 3x3) writes the depthwise image, :func:`pointwise_kernel`
  multiplies it. All samples at once, or a few at a time, so that the depthwise image is read back from the L2 cache
  and costs the memory nothing.
- ``fused``: :func:`fused_kernel` computes the rows of its product from nine taps each; nothing is kept in between.
  Nine taps a pixel, again for each block of outputs, are many instructions: it pays where outputs are few.

The depthwise kernel walks its tiles backwards and the product forwards: each begins with what the one before it touched
last, which the L2 cache still holds. Sums have an order given by shape and config: no atomics, a repeat is bitwise
equal.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from snapgen_kernels import costs
from snapgen_kernels._triton import common, tuning
from snapgen_kernels._triton.common import Build, new_channels_last
from snapgen_kernels._triton.depthwise import (
    Affine,
    affine,
    by_tap,
    depthwise,
    nine_taps,
    norm_arguments,
    norm_flags,
    row_and_column,
)
from snapgen_kernels._triton.group_norm_silu import moments
from snapgen_kernels._triton.pointwise import (
    IMAGES,
    Epilogue,
    Moments,
    ProductConfig,
    are_whole,
    filling,
    finish,
    is_simple,
    launch_product,
    new_moments,
    only,
    precisions,
    product,
    product_config,
    variants,
)
from snapgen_kernels.sepconv import new_image, no_statistics, output_size


class Plan(NamedTuple):
    """``fused`` or ``split``, and how many samples a split takes at a time."""

    fused: bool
    samples: int


@triton.jit(do_not_specialize=["H", "W", "HO", "WO", "G", "CG", "tiles"])
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
    b_row, b_col = row_and_column(b_p, WO)
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


FUSED_CONFIGS = (
    ProductConfig(128, 256, 32, 8, 1),
    ProductConfig(128, 128, 64, 8, 1),
    ProductConfig(64, 128, 64, 4, 1),
)
FUSED_CONFIGS_FP32 = (ProductConfig(32, 64, 32, 8, 1),)


def fused_configs(dtype: torch.dtype, capability: int, simple: bool) -> tuple[ProductConfig, ...]:
    """The fused kernel's candidates, widest first; ``simple``: see :func:`is_simple`, with no depthwise bias."""
    if dtype == torch.float32:
        return FUSED_CONFIGS_FP32
    widest = 256 if simple and dtype == torch.bfloat16 else 128  # fp16 has no one-tanh form
    return tuple(c for c in FUSED_CONFIGS if only(c) in (0, capability) and c.block_n <= widest)


class Half(NamedTuple):
    """A separable convolution with all that stands around it; tensors are channels_last and dense."""

    x: Tensor
    taps: Tensor  # [9, C]
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


def _split(half: Half, y: Tensor, samples: int) -> Moments | None:
    batch, channels = half.x.shape[:2]
    scratch = new_channels_last(half.x, samples, channels, *y.shape[2:])
    config = product_config(
        scratch, half.pw_weight, y[:samples], False, half.ending.samples(0, samples), half.statistics
    )
    moments = new_moments(y, config.block_m) if half.statistics else None
    ending = half.ending.telling(moments)
    for first in range(0, batch, samples):
        last = min(first + samples, batch)
        norm = None if half.norm is None else half.norm.samples(first, last)
        d = scratch[: last - first]
        depthwise(half.x[first:last], half.taps, half.dw_bias, norm, half.stride, half.upsample, d)
        launch_product(d, half.pw_weight, y[first:last], False, ending.samples(first, last), config)
    return moments


def _fused(half: Half, y: Tensor) -> Moments | None:
    x, ending = half.x, half.ending
    batch, channels, height, width = x.shape
    outputs, pixels = y.shape[1], y.shape[2] * y.shape[3]
    *pointers, groups, per_group = norm_arguments(half.norm, x)
    flags = {**norm_flags(half.norm, x.dtype), "STRIDE": half.stride, "UPSAMPLE": half.upsample}

    def launch(config: ProductConfig) -> Moments | None:
        block_m, block_n, block_k, warps, stages = config
        moments = new_moments(y, block_m) if half.statistics else None
        last = ending.telling(moments)
        tiles = common.cdiv(pixels, block_m)
        fused_kernel[(batch * tiles * common.cdiv(outputs, block_n),)](
            x, half.taps, x if half.dw_bias is None else half.dw_bias, *pointers, half.pw_weight, y,
            *last.tensors(y), height, width, *y.shape[2:], channels, groups, per_group, outputs, last.inputs(), tiles,
            **flags, **last.flags(), HAS_DW_BIAS=half.dw_bias is not None, EVEN_K=last.inputs() % block_k == 0,
            PRECISION=common.precision(x.dtype), BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
        return moments

    configs = fused_configs(x.dtype, common.capability(x), half.dw_bias is None and is_simple(ending))
    default = filling(configs, batch, pixels, outputs, common.processors(x))
    key = (
        str(x.dtype), batch, channels, height, width, outputs, half.stride, half.upsample, half.norm is not None,
        half.statistics, ending.inputs(), ending.extras(), common.precision(x.dtype),
    )  # fmt: skip
    return launch(tuning.choose("fused", key, configs, default, launch))


def plans(half: Half) -> tuple[tuple[Plan, ...], Plan]:
    """The plans that a half may follow, and the one that arithmetic predicts to be fastest. Channels that are no whole
    vectors are not fused: too many addresses for its registers."""
    batch, channels, height, width = half.x.shape
    size = half.x.element_size()
    _, outputs, *out = half.output()
    predicted = costs.choose_plan(
        batch, channels, outputs, height, width, size, norm=half.norm is not None, stride=half.stride,
        upsample=half.upsample, residual=half.ending.residual is not None, shortcut=half.ending.inputs(),
    )  # fmt: skip
    fusible = are_whole(channels, outputs, half.ending.inputs())
    rule = Plan(fusible and predicted.form == "fused", predicted.samples)
    blocked = Plan(False, costs.samples_in_cache(batch, batch * channels * out[0] * out[1] * size))
    fused = (Plan(True, batch),) if fusible else ()
    return tuple(dict.fromkeys((rule, blocked, Plan(False, batch), *fused))), rule


def run(half: Half, y: Tensor) -> Moments | None:
    """Compute a half into ``y``; the moments of its channels where they were asked for."""
    candidates, default = plans(half)

    def follow(plan: Plan) -> Moments | None:
        return _fused(half, y) if plan.fused else _split(half, y, plan.samples)

    key = (
        str(y.dtype), *half.x.shape, y.shape[1], half.stride, half.upsample, half.norm is not None, half.statistics,
        half.ending.inputs(), half.ending.residual is not None, half.dw_bias is not None, common.precision(y.dtype),
    )  # fmt: skip
    return follow(tuning.choose("sepconv", key, candidates, default, follow))


def into(y: Tensor) -> Tensor:
    """``y``, or a channels_last image to be copied into it where it is laid out otherwise."""
    last = y.is_contiguous(memory_format=torch.channels_last)
    return y if last else torch.empty_like(y, memory_format=torch.channels_last)


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
            by_tap(dw_weight),
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


def builds(dtype: torch.dtype, nvidia: bool) -> list[Build]:
    """The fused kernel in every config that the launcher may choose."""
    images = (*IMAGES[1:], "p_x", "p_dw", "p_dw_bias")
    found: list[Build] = []
    for ending, simple, whole in variants():
        if not whole:
            continue
        for precision in precisions(dtype, nvidia):
            for config in fused_configs(dtype, 90, simple):
                norm = ending["HAS_SHIFT"] or ending["HAS_RESIDUAL"]
                for stride in (1,) if norm else (1, 2):
                    flags: dict[str, Any] = {**ending, "HAS_NORM": norm, "HAS_DW_BIAS": not simple, "EVEN_K": True}
                    flags |= {"FAST": norm and nvidia and dtype == torch.bfloat16, "PRECISION": precision}
                    flags |= {"STRIDE": stride, "UPSAMPLE": not norm and stride == 1, "only": only(config)}
                    flags |= {"products": dtype != torch.float32 or precision == "tf32"}
                    found.append(common.build(fused_kernel, dtype, images, config, ("C", "N", "KS"), **flags))
    return found
