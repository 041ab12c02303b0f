"""Launchers of csrc/qk_norm_rope.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

import snapgen_kernels._cpu  # noqa: F401  (loads the extension)
from snapgen_kernels._library import like


def table(tensor: Tensor | None) -> Tensor | None:
    """A weight or a rotation table as the primitives take it: dense, fp32."""
    return None if tensor is None else tensor.detach().float().contiguous()


def _rows(x: Tensor, cos: Tensor | None) -> tuple[int, int]:
    """Heads and tokens of x [B, N, H, D] or [B, M, D]: row i belongs to token (i / heads) % tokens."""
    return (x.shape[2] if x.dim() == 4 else 1), (1 if cos is None else x.shape[1])


def _forward(x: Tensor, weight: Tensor, cos: Tensor | None, sin: Tensor | None, eps: float) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype)
    torch.ops.snapgen_cpu.norm_rope(x.contiguous(), table(weight), cos, sin, *_rows(x, cos), eps, out)
    return like(out, x)


def forward(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor | None, sin: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    cos, sin = table(cos), table(sin)
    return _forward(q, q_weight, cos, sin, eps), _forward(k, k_weight, cos, sin, eps)


def _backward(
    dy: Tensor, x: Tensor, weight: Tensor, cos: Tensor | None, sin: Tensor | None, eps: float, needs: tuple[bool, bool]
) -> tuple[Tensor, Tensor]:
    dx = torch.empty(x.shape, dtype=x.dtype) if needs[0] else None
    dweight = torch.empty(weight.shape, dtype=torch.float32) if needs[1] else None
    if dx is not None or dweight is not None:
        torch.ops.snapgen_cpu.norm_rope_backward(
            x.contiguous(), dy.contiguous(), table(weight), cos, sin, *_rows(x, cos), eps, dx, dweight
        )
    absent = dy.new_empty(0)
    return (
        absent if dx is None else like(dx, x),
        absent.clone() if dweight is None else like(dweight, weight),
    )


def backward(
    dq: Tensor,
    dk: Tensor,
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    cos, sin = table(cos), table(sin)
    q_grad, q_weight_grad = _backward(dq, q, q_weight, cos, sin, eps, (needs[0], needs[2]))
    k_grad, k_weight_grad = _backward(dk, k, k_weight, cos, sin, eps, (needs[1], needs[3]))
    return q_grad, k_grad, q_weight_grad, k_weight_grad
