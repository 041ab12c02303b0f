"""GroupNorm followed by SiLU.

Formula, for x [B, C, H, W] split into G groups of C/G channels::

    mean, var = statistics of x over the channels of a group and all pixels (biased variance)
    z = (x - mean) * rstd * weight[c] + bias[c],   rstd = 1 / sqrt(var + eps)
    y = z * sigmoid(z)

Statistics and arithmetic are fp32 (fp64 for fp64 input) whatever the dtype of x; y is rounded once. Backward, with
n = (C/G) H W, xhat = (x - mean) rstd, dz = dy sigmoid(z) (1 + z (1 - sigmoid(z))), g = dz weight[c]::

    dx = rstd (g - mean_n(g) - xhat mean_n(g xhat)),   dweight[c] = sum dz xhat,   dbias[c] = sum dz
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snapgen_kernels import _backend
from snapgen_kernels._library import CostCase, check_groups, check_image, check_shape, register

NAME = "group_norm_silu"


class Norm(NamedTuple):
    """A GroupNorm + SiLU prologue for other ops: ``SiLU(GroupNorm(x))`` with these parameters ([C] each)."""

    num_groups: int
    weight: Tensor
    bias: Tensor
    eps: float = 1e-5


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """fp32, or fp64 for fp64 input: the dtype of statistics and accumulation."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def reference(x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """SiLU(GroupNorm(x)) in plain PyTorch: [B, C, H, W] -> [B, C, H, W]."""
    if x.numel() == 0:  # group_norm's own backward gives NaN here
        return F.silu(x * weight[:, None, None] + bias[:, None, None]).to(x.dtype)
    wide = compute_dtype(x)
    # PyTorch 2.11 to 2.13 crash in the channels_last backward of group_norm on the CPU where x needs no gradient.
    frozen = not x.requires_grad and (weight.requires_grad or bias.requires_grad) and not x.is_contiguous()
    # torch.group_norm is F.group_norm without its refusal of a single value per group.
    z = torch.group_norm((x.contiguous() if frozen else x).to(wide), num_groups, weight.to(wide), bias.to(wide), eps)
    y = F.silu(z).to(x.dtype)
    # vmap knows no memory formats.
    restored = frozen and not torch._C._are_functorch_transforms_active()
    return y.contiguous(memory_format=torch.channels_last) if restored else y


def statistics(x: Tensor, num_groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and 1 / standard deviation of each group of x, both [B, G] in fp32 (fp64 for fp64); NaN where x is empty."""
    if x.numel() == 0:
        nothing = x.new_full((x.shape[0], num_groups), float("nan"), dtype=compute_dtype(x))
        return nothing, nothing.clone()
    per_group = x.shape[1] // num_groups * x.shape[2] * x.shape[3]
    groups = x.detach().to(compute_dtype(x)).reshape(x.shape[0], num_groups, per_group)
    var, mean = torch.var_mean(groups, dim=2, correction=0)
    return mean, torch.rsqrt(var + eps)


def new_statistics(x: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """Two uninitialised tensors for what :func:`statistics` returns."""
    mean = x.new_empty((x.shape[0], num_groups), dtype=compute_dtype(x))
    return mean, torch.empty_like(mean)


def _reference_with_statistics(
    x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return reference(x, num_groups, weight, bias, eps), *statistics(x, num_groups, eps)


def _fake(x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), *new_statistics(x, num_groups)


def _cuda(x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    from snapgen_kernels._triton import group_norm_silu as kernels

    return kernels.forward(x, num_groups, weight, bias, eps)


def _cuda_backward(
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
    from snapgen_kernels._triton import group_norm_silu_backward as kernels

    return kernels.backward(dy, x, num_groups, weight, bias, eps, mean, rstd, needs)


_DTYPES = {
    "cpu": (torch.float32, torch.bfloat16, torch.float64),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}


def _unsupported(x: Tensor, weight: Tensor, bias: Tensor) -> str | None:
    """None if the fused kernels take this call, else the reason."""
    allowed = _DTYPES.get(x.device.type, ())
    if x.dtype not in allowed:
        return (
            f"x has dtype {x.dtype} on {x.device.type}; the kernels take {', '.join(map(str, allowed)) or 'none there'}"
        )
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor.dtype not in (torch.float32, x.dtype):
            return f"{name} has dtype {tensor.dtype}; the kernels take float32 or the dtype of x ({x.dtype})"
    return None


OP = register(
    NAME,
    "Tensor x, int num_groups, Tensor weight, Tensor bias, float eps",
    outputs=1,
    saved=2,  # mean and rstd, [B, G]
    differentiable=("x", "weight", "bias"),
    reference=_reference_with_statistics,
    fake=_fake,
    kernels=("cpu", "cuda"),
    cuda=_cuda,
    cuda_backward=_cuda_backward,
    unsupported=lambda x, num_groups, weight, bias, eps: _unsupported(x, weight, bias),
)


def group_norm_silu(x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """SiLU(GroupNorm(x)), with fp32 statistics.

    Args:
        x: [B, C, H, W], any floating dtype; channels_last is fastest, every layout works.
        num_groups: divides C.
        weight, bias: [C], in fp32 or the dtype of x.
        eps: added to the variance.

    Returns:
        [B, C, H, W] in the dtype and memory format of x.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        FusedUnavailable: under ``use("fused")``, no kernel takes this call.
    """
    check_image(NAME, "x", x)
    channels = x.shape[1]
    check_groups(NAME, channels, num_groups)
    check_shape(NAME, "weight", weight, (channels,), x)
    check_shape(NAME, "bias", bias, (channels,), x)
    if _backend.select(NAME, x.device.type, _unsupported(x, weight, bias)):
        return torch.ops.snapgen.group_norm_silu(x, num_groups, weight, bias, eps)[0]
    return reference(x, num_groups, weight, bias, eps)


def cost(case: CostCase) -> tuple[int, int]:
    """(FLOPs, fewest bytes) of the forward: x is read once and y written once; about 12 operations an element."""
    d = case.dims
    elements = d["B"] * d["C"] * d["H"] * d["W"]
    return 12 * elements, 2 * elements * case.dtype.itemsize + 2 * d["C"] * case.dtype.itemsize


class GroupNormSiLU(nn.GroupNorm):
    """``nn.Sequential(GroupNorm, SiLU)`` as one module; state-dict keys of ``nn.GroupNorm``: weight, bias."""

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias
        if weight is None:  # affine=False
            weight = input.new_ones(self.num_channels)
        if bias is None:
            bias = input.new_zeros(self.num_channels)
        return group_norm_silu(input, self.num_groups, weight, bias, self.eps)
