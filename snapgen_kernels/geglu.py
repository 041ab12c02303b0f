"""Gated feed-forward: the first projection and its gate.

Formula, for x [B, N, C], weight [2F, C], bias [2F]::

    value, gate = split(x weight^T + bias)        F channels each
    y = value * gelu(gate),   gelu(g) = g / 2 (1 + erf(g / sqrt(2)))

The product accumulates in fp32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snapgen_kernels import _backend
from snapgen_kernels._library import CostCase, check_shape, register

NAME = "geglu"


def reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The formula in plain PyTorch: [B, N, C] -> [B, N, F]."""
    value, gate = F.linear(x, weight, bias).chunk(2, dim=-1)
    return value * F.gelu(gate)


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0] // 2))


OP = register(
    NAME,
    "Tensor x, Tensor weight, Tensor? bias",
    outputs=1,
    differentiable=("x", "weight", "bias"),
    reference=reference,
    fake=_fake,
    cast=("x", "weight", "bias"),
)


def _unsupported(x: Tensor, weight: Tensor) -> str | None:
    """None if a fused kernel takes this call, else the reason."""
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"x has dtype {x.dtype}; allowed: float32, bfloat16, float16"
    if weight.dtype != x.dtype:
        return f"weight has dtype {weight.dtype}; expected that of x, {x.dtype}"
    return None


def geglu(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """value * gelu(gate) of one projection.

    Where the device has no fused kernel, ``auto`` calls PyTorch directly, with ordinary autograd.

    Args:
        x: [B, N, C]. weight: [2F, C], the value's rows first. bias: [2F] or None.

    Returns:
        [B, N, F] in the dtype of x.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        FusedUnavailable: under ``use("fused")``, no kernel takes this call.
    """
    if x.dim() != 3:
        raise ValueError(f"{NAME}: x has shape {tuple(x.shape)}; expected three dimensions [B, N, C]")
    check_shape(NAME, "x", x, x.shape)
    if weight.dim() != 2 or weight.shape[0] % 2:
        raise ValueError(f"{NAME}: weight has shape {tuple(weight.shape)}; expected [2F, {x.shape[-1]}]")
    check_shape(NAME, "weight", weight, (weight.shape[0], x.shape[-1]), x)
    check_shape(NAME, "bias", bias, (weight.shape[0],), x)
    if _backend.select(NAME, x.device.type, _unsupported(x, weight)):
        return torch.ops.snapgen.geglu(x, weight, bias)
    return reference(x, weight, bias)


def cost(case: CostCase) -> tuple[int, int]:
    """(FLOPs, fewest bytes) of the forward: x and weight read once, y written once."""
    d = case.dims
    rows = d["B"] * d["N"]
    return 4 * rows * d["C"] * d["F"], (rows * (d["C"] + d["F"]) + 2 * d["F"] * d["C"]) * case.dtype.itemsize


class GEGLUFeedForward(nn.Module):
    """proj_out(value * gelu(gate)); state-dict keys ``proj_in`` (Linear dim -> 2*hidden) and ``proj_out`` (hidden ->
    dim)."""

    def __init__(self, dim: int, hidden_dim: int, bias: bool = True) -> None:
        super().__init__()
        self.proj_in = nn.Linear(dim, 2 * hidden_dim, bias=bias)
        self.proj_out = nn.Linear(hidden_dim, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, dim] -> [B, N, dim]."""
        return self.proj_out(geglu(x, self.proj_in.weight, self.proj_in.bias))
