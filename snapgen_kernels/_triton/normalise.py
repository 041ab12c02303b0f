"""The norm and SiLU in front of a convolution on the GPU, their statistics known: how values are normalised where they
are loaded, and what launchers pass for it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from snapgen_kernels._triton import common
from snapgen_kernels._triton.common import silu, silu_of_half


class Affine(NamedTuple):
    """The norm in front of the convolution, its statistics known: ``mean`` and ``rstd`` [B, G], both fp32."""

    mean: Tensor
    rstd: Tensor
    weight: Tensor
    bias: Tensor
    num_groups: int

    def samples(self, first: int, last: int) -> Affine:
        return self._replace(mean=self.mean[first:last], rstd=self.rstd[first:last])


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
def inside(b_a, m, NEEDED: tl.constexpr):
    """0 outside the image, where a load's zeros were normalised."""
    return tl.where(m, b_a, 0.0) if NEEDED else b_a


def norm_flags(norm: Affine | None, dtype: torch.dtype) -> dict[str, bool]:
    return {"HAS_NORM": norm is not None, "FAST": norm is not None and common.fast(dtype)}


def norm_arguments(norm: Affine | None, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, int, int]:
    """Pointers of the norm, G and C/G; anything where there is none."""
    if norm is None:
        return x, x, x, x, 1, 1
    return norm.mean, norm.rstd, norm.weight, norm.bias, norm.num_groups, x.shape[1] // norm.num_groups
