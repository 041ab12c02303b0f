"""Gated feed-forward: the first projection and its gate.

Formula, for x [B, N, C], weight [2F, C], bias [2F]::

    value, gate = split(x weight^T + bias)        F channels each
    y = value * gelu(gate),   gelu(g) = g / 2 (1 + erf(g / sqrt(2)))

The product accumulates in fp32. Backward, with P the normal distribution, p its density and g = gate::

    dh = [dy gelu(g), dy value (P(g) + g p(g))],   dx = dh weight,   dweight = dh^T x,   dbias = sum of dh

[value, gate] is kept for it, in the dtype of x, where a gradient will be asked for.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snapgen_kernels import _backend
from snapgen_kernels._library import CostCase, check_shape, dtype_seen, register

NAME = "geglu"


def reference(x: Tensor, weight: Tensor, bias: Tensor | None = None, keep: bool = False) -> Tensor:
    """The formula in plain PyTorch: [B, N, C] -> [B, N, F]. ``keep`` changes nothing here."""
    return _reference_kept(x, weight, bias, keep)[0]


def _reference_kept(x: Tensor, weight: Tensor, bias: Tensor | None, keep: bool) -> tuple[Tensor, Tensor]:
    h = F.linear(x, weight, bias)
    value, gate = h.chunk(2, dim=-1)
    return value * F.gelu(gate), h.detach() if keep else x.new_empty(0)


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, keep: bool) -> tuple[Tensor, Tensor]:
    width = weight.shape[0]
    return x.new_empty((*x.shape[:-1], width // 2)), x.new_empty((*x.shape[:-1], width) if keep else (0,))


_DTYPES = {
    "cpu": (torch.float32, torch.bfloat16),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}


def _unsupported(x: Tensor, weight: Tensor, bias: Tensor | None, *_: bool) -> str | None:
    """None if the fused kernels of this device take this call, else the reason."""
    dtype, allowed = dtype_seen(x), _DTYPES.get(x.device.type, ())
    if dtype not in allowed:
        return (
            f"x has dtype {dtype} on {x.device.type}; the kernels take {', '.join(map(str, allowed)) or 'none there'}"
        )
    if x.shape[-1] == 0:
        return "x has no channels"
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and dtype_seen(tensor) != dtype:
            return f"{name} has dtype {tensor.dtype}; the kernels take that of x, {dtype}"
    return None


def _cpu(*arguments: Any) -> tuple[Tensor, Tensor]:
    from snapgen_kernels._cpu import geglu as kernels

    return kernels.forward(*arguments)


def _cpu_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    from snapgen_kernels._cpu import geglu as kernels

    return kernels.backward(*arguments)


def _cuda(*arguments: Any) -> tuple[Tensor, Tensor]:
    from snapgen_kernels._triton import geglu as kernels

    return kernels.forward(*arguments)


def _cuda_backward(*arguments: Any) -> tuple[Tensor, ...]:
    from snapgen_kernels._triton import geglu as kernels

    return kernels.backward(*arguments)


OP = register(
    NAME,
    "Tensor x, Tensor weight, Tensor? bias, bool keep",
    outputs=1,
    saved=1,  # value and gate [B, N, 2F], or nothing
    differentiable=("x", "weight", "bias"),
    reference=_reference_kept,
    fake=_fake,
    cast=("x", "weight", "bias"),
    kernels=("cpu", "cuda"),
    cpu=_cpu,
    cpu_backward=_cpu_backward,
    cuda=_cuda,
    cuda_backward=_cuda_backward,
    unsupported=_unsupported,
)


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
    if _backend.select(NAME, x.device.type, _unsupported(x, weight, bias)):
        keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias))
        return torch.ops.snapgen.geglu(x, weight, bias, keep)[0]
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
