"""Backward of the decoder block on the GPU; the contract is in ``snapgen_kernels/decoder_block.py``.

In units of one C-channel image, with e the expansion, by arithmetic:

=============================================  =========  =======
kernel                                         reads      writes
=============================================  =========  =======
d1 = DW1(x), h1 = PW1(d1), again               2          1 + e
da = PW2^T dy; a of h2 beside it, and parts    1 + e      2 e
of the norm's two sums
PW2's weight gradient, of dy and a             1 + e
norm: dh2 of da and h2                         2 e        e
DW2: dh1 of dh2, and parts of its weights'     2 e        e
PW1's weight gradient, of dh1 and d1           1 + e
dd1 = PW1^T dh1                                e          1
DW1: dx of dd1 and x, + dy, and parts          3          1
=============================================  =========  =======

11 + 13 e units, 3 + 3 e more where the middle image was not kept: d1, h1 and DW2(h1) once more. The norm's sums and
SiLU(norm(h2)) come out of the product that makes da, which has h2 at hand then: passes of their own would take 3 e
units more. At most three images of M channels are alive at a time.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from snapgen_kernels._triton import common, depthwise_backward, norm_backward, tuning, weight_gradient
from snapgen_kernels._triton.common import Build
from snapgen_kernels._triton.decoder_block import prepared
from snapgen_kernels._triton.norm_backward import activation, centred
from snapgen_kernels._triton.normalise import Affine
from snapgen_kernels._triton.normed_product import normed_configs
from snapgen_kernels._triton.pointwise import ProductConfig, filling, pointwise, precisions, product
from snapgen_kernels._triton.sepconv_backward import gradients
from snapgen_kernels._triton.weight_gradient import new_parts
from snapgen_kernels.decoder_block import Weights


@triton.jit(do_not_specialize=["P", "G", "CG", "tiles"])
def gradient_product_kernel(
    p_d,
    p_w,
    p_h,
    p_da,
    p_a,
    p_mean,
    p_rstd,
    p_gamma,
    p_beta,
    p_dz,
    p_dzx,
    P,
    K,
    N,
    G,
    CG,
    tiles,
    FAST: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """da = d w, with w [K, N]; beside it a = SiLU(norm(h)) unless p_a is None, and for each tile and channel the sums
    of dz and of dz xhat, with dz = da silu'(z). Grid: B * tiles * cdiv(N, BLOCK_N), tiles = cdiv(P, BLOCK_M)."""
    blocks_n = tl.cdiv(N, BLOCK_N)
    i_n, i_rest = tl.program_id(0) % blocks_n, tl.program_id(0) // blocks_n
    i_m, i_b = i_rest % tiles, i_rest // tiles
    b_m = tl.arange(0, BLOCK_M)
    m_m = i_m * BLOCK_M + b_m < P
    b_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = b_n < N
    i_pixel = i_b.to(tl.int64) * P + i_m * BLOCK_M
    b_acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    b_acc = product(b_acc, p_d, p_w, i_pixel, b_m, m_m, b_n, m_n, K, N, True, EVEN_K, BLOCK_K, PRECISION)
    m = m_m[:, None] & m_n[None, :]
    i_base = i_pixel * N
    b_at = b_m[:, None] * N + b_n[None, :]
    b_da = b_acc.to(p_da.dtype.element_ty)
    tl.store(p_da + i_base + b_at, b_da, mask=m)
    b_h = tl.load(p_h + i_base + b_at, mask=m, other=0.0)
    i_group = i_b * G + b_n // CG
    affine = centred(p_mean, p_rstd, p_gamma, p_beta, i_group, b_n, m_n, True)
    b_a, b_slope, b_centered = activation(b_h, affine, True, FAST)
    if p_a is not None:
        tl.store(p_a + i_base + b_at, b_a.to(p_a.dtype.element_ty), mask=m)
    # Pixels beyond P have a gradient of 0.
    b_dz = b_da.to(tl.float32) * b_slope
    i_part = (i_b.to(tl.int64) * tiles + i_m) * N + b_n
    tl.store(p_dz + i_part, tl.sum(b_dz, 0), mask=m_n)
    b_rstd = tl.load(p_rstd + i_group, mask=m_n, other=0.0)
    tl.store(p_dzx + i_part, tl.sum(b_dz * b_centered, 0) * b_rstd, mask=m_n)


class Gradient(NamedTuple):
    """da and a [B, M, H, W] (a: None where not wanted), and parts of the sums of dz and dz xhat, [2, B, tiles, M]."""

    da: Tensor
    a: Tensor | None
    parts: Tensor


def gradient_product(dy: Tensor, weight: Tensor, h: Tensor, norm: Affine, activated: bool) -> Gradient:
    """Of y = PW(SiLU(norm(h))): dy [B, C, H, W], h [B, M, H, W] in channels_last, weight [C, M, 1, 1]."""
    batch, inputs, height, width = dy.shape
    outputs, pixels, precision = h.shape[1], height * width, common.precision(dy.dtype)

    def launch(config: ProductConfig) -> Gradient:
        block_m, block_n, block_k, warps, stages = config
        tiles = common.cdiv(pixels, block_m)
        found = Gradient(
            torch.empty_like(h), torch.empty_like(h) if activated else None, new_parts(dy, 2, batch, tiles, outputs)
        )
        gradient_product_kernel[(batch * tiles * common.cdiv(outputs, block_n),)](
            dy, weight, h, found.da, found.a, norm.mean, norm.rstd, norm.weight, norm.bias, *found.parts,
            pixels, inputs, outputs, norm.num_groups, outputs // norm.num_groups, tiles,
            FAST=common.fast(dy.dtype), EVEN_K=inputs % block_k == 0, PRECISION=precision,
            BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, num_warps=warps, num_stages=stages,
        )  # fmt: skip
        return found

    configs = _configs(dy.dtype, precision, torch.version.hip is None, inputs, outputs)
    default = filling(configs, batch, pixels, outputs, common.processors(dy))
    key = (str(dy.dtype), precision, batch, pixels, inputs, outputs, activated)
    return launch(tuning.choose("gradient_product", key, configs, default, launch))


def _configs(dtype: torch.dtype, precision: str, nvidia: bool, inputs: int, outputs: int) -> tuple[ProductConfig, ...]:
    """The gradient product's candidates. In fp16, SiLU's gradient by an exponential, and its steps of 32 inputs, leave
    the widest tile too few registers."""
    found = normed_configs(dtype, precision, nvidia, inputs, outputs)
    narrow = dtype == torch.float16 and inputs % 64 != 0
    return tuple(c for c in found if not narrow or c.block_m * c.block_n <= 64 * 128)


def backward(
    dy: Tensor,
    x: Tensor,
    dw1_weight: Tensor,
    dw1_bias: Tensor,
    pw1_weight: Tensor,
    dw2_weight: Tensor,
    dw2_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    pw2_weight: Tensor,
    num_groups: int,
    eps: float,
    low_memory: bool,
    keep_middle: bool,
    h: Tensor,
    mean: Tensor,
    rstd: Tensor,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    """``snapgen::decoder_block_backward``."""
    weights = Weights(dw1_weight, dw1_bias, pw1_weight, dw2_weight, dw2_bias, norm_weight, norm_bias, pw2_weight)
    arguments = (x, *weights)
    if dy.numel() == 0:
        return gradients([None] * len(arguments), arguments, needs, dy)
    in_x, in_dw1, in_b1, in_pw1, in_dw2, in_b2, in_norm, in_offset, in_pw2 = needs
    in_first = in_x or in_dw1 or in_b1  # before PW1
    in_middle = in_first or in_pw1 or in_dw2 or in_b2  # before the norm
    dy, block = common.channels_last(dy), prepared(x, weights, num_groups, eps)
    x, plain, pixels = block.x, block.weights, x.shape[2] * x.shape[3]
    norm = Affine(mean, rstd, plain.norm_weight, plain.norm_bias, num_groups)
    found: dict[str, Tensor | None] = {}

    h2 = common.channels_last(h) if keep_middle else block.middle()
    outer = gradient_product(dy, plain.pw2_weight, h2, norm, in_pw2)
    dh2 = outer.da
    if outer.a is not None:
        parts = weight_gradient.weight_parts(dy, outer.a, False)
        found["pw2_weight"] = weight_gradient.added(parts.weight, plain.pw2_weight)
    sums, means = norm_backward.merged(outer.parts, norm, pixels)
    del outer
    if in_norm or in_offset:
        found["norm_weight"], found["norm_bias"] = norm_backward.parameters(sums, norm)
    if in_middle:
        norm_backward.gradient(h2, dh2, None, norm, means)  # in the place of da
    del h2
    if in_middle:
        d1, h1 = block.before()
        dh1 = torch.empty_like(h1)
        inner = depthwise_backward.gradients(dh2, h1, block.taps2, None, 1, False, dh1, in_dw2, in_b2)
        found["dw2_weight"], found["dw2_bias"] = _depthwise(inner, plain.dw2_weight, plain.dw2_bias if in_b2 else None)
        del h1, dh2, inner
        if in_pw1:
            parts = weight_gradient.weight_parts(dh1, d1, False)
            found["pw1_weight"] = weight_gradient.added(parts.weight, plain.pw1_weight)
        del d1
        if in_first:
            dd1 = pointwise(dh1, plain.pw1_weight, transposed=True)
            dx = torch.empty_like(x)
            inner = depthwise_backward.gradients(dd1, x, block.taps1, None, 1, False, dx, in_dw1, in_b1, dy)
            found["dw1_weight"], found["dw1_bias"] = _depthwise(
                inner, plain.dw1_weight, plain.dw1_bias if in_b1 else None
            )
            found["x"] = dx
    return gradients([found.get(name) for name in ("x", *Weights._fields)], arguments, needs, dy)


def _depthwise(
    parts: depthwise_backward.Parts, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of a depthwise convolution's parameters."""
    return (None, None) if parts.weight is None else depthwise_backward.parameters(parts.weight, weight, bias)


def builds(dtype: torch.dtype, nvidia: bool) -> list[Build]:
    """The kernel in every config that the launcher may choose."""
    fast, images = nvidia and dtype == torch.bfloat16, ("p_d", "p_w", "p_h", "p_da", "p_a")
    found: list[Build] = []
    for precision in precisions(dtype, nvidia):
        for inputs in (128, 160, 33):
            whole = inputs % 32 == 0
            for config in _configs(dtype, precision, nvidia, inputs, inputs):
                flags: dict[str, Any] = {"FAST": fast, "EVEN_K": whole, "PRECISION": precision}
                flags |= {"products": dtype != torch.float32 or precision == "tf32"}
                sizes = ("K", "N") if whole else ()
                for extra in ({}, {"p_a": None}) if whole else ({},):
                    added: dict[str, Any] = {**flags, **extra}
                    found.append(common.build(gradient_product_kernel, dtype, images, config, sizes, **added))
    return found
