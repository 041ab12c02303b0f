"""Launchers of csrc/attention.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from snapgen_kernels._cpu.qk_norm_rope import table
from snapgen_kernels._library import like


def _prepared(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    scale: float | None,
    eps: float,
) -> tuple[Tensor | float | None, ...]:
    """The arguments as the primitives take them: dense, tables in fp32."""
    mask = None if key_mask is None else key_mask.contiguous()
    tables = (table(q_weight), table(k_weight), table(cos), table(sin))
    scaled = (q.shape[-1] or 1) ** -0.5 if scale is None else scale
    return q.contiguous(), k.contiguous(), v.contiguous(), mask, *tables, scaled, eps


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    scale: float | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    o = torch.empty(q.shape, dtype=q.dtype)
    logsumexp = torch.empty(q.shape[:3], dtype=torch.float32)
    arguments = _prepared(q, k, v, key_mask, q_weight, k_weight, cos, sin, scale, eps)
    torch.ops.snapgen_cpu.attention(*arguments, o, logsumexp)
    return o, logsumexp


def backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    scale: float | None,
    eps: float,
    o: Tensor,
    logsumexp: Tensor,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    leaves = (q, k, v, q_weight, k_weight)
    made: list[Tensor | None] = []
    for leaf, need in zip(leaves, needs, strict=True):
        dtype = torch.float32 if leaf is q_weight or leaf is k_weight else q.dtype
        masked = key_mask is not None and (leaf is k or leaf is v)  # the kernels write no row of a masked key
        new = torch.zeros if masked else torch.empty
        made.append(new(leaf.shape, dtype=dtype) if need and leaf is not None else None)
    arguments = _prepared(q, k, v, key_mask, q_weight, k_weight, cos, sin, scale, eps)
    torch.ops.snapgen_cpu.attention_backward(do.contiguous(), *arguments, o.contiguous(), logsumexp.contiguous(), *made)
    return tuple(
        do.new_empty(0) if gradient is None or leaf is None else like(gradient, leaf)
        for gradient, leaf in zip(made, leaves, strict=True)
    )
