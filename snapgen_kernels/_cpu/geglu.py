"""Launchers of csrc/geglu.cpp.

One path serves every shape; docs/benchmarks.md tells where PyTorch's products are faster. They are not used, since
their sums depend on the number of threads, and so would results and gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from snapgen_kernels._cpu import packed


def _rows(x: Tensor) -> Tensor:
    """[B, N, C] as [B N, C] with dense rows."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(-1) == 1 or flat.shape[-1] < 2 else flat.contiguous()


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, h: Tensor | None, y: Tensor) -> None:
    if y.numel():
        torch.ops.snapgen_cpu.geglu(
            _rows(x),
            packed(weight, "pairs"),
            None if bias is None else bias.contiguous(),
            None if h is None else h.view(-1, h.shape[-1]),
            y.view(-1, y.shape[-1]),
        )


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, keep: bool) -> tuple[Tensor, Tensor]:
    y = x.new_empty((*x.shape[:-1], weight.shape[0] // 2))
    h = x.new_empty((*x.shape[:-1], weight.shape[0]) if keep else (0,))
    _forward(x, weight, bias, h if keep else None, y)
    return y, h


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, keep: bool, h: Tensor, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    if not keep:
        h = x.new_empty((*x.shape[:-1], weight.shape[0]))
        _forward(x, weight, bias, h, torch.empty_like(dy, memory_format=torch.contiguous_format))
    width = weight.shape[0]
    dh = x.new_empty((dy.numel() // max(width // 2, 1), width))
    sums = torch.zeros(width, dtype=torch.float32) if needs[2] else None
    if dy.numel():
        flat = dy.reshape(-1, width // 2).contiguous()
        torch.ops.snapgen_cpu.geglu_gradient(h.view(-1, width), flat, dh, sums)
    dx, dweight, dbias = (dy.new_empty(0) for _ in range(3))
    if needs[0]:
        dx = torch.empty(x.shape, dtype=x.dtype)
        if dh.numel():
            torch.ops.snapgen_cpu.product(dh, packed(weight, "bt"), dx.view(-1, x.shape[-1]))
        else:
            dx.zero_()
    if needs[1]:
        dweight = torch.empty(weight.shape, dtype=weight.dtype)
        torch.ops.snapgen_cpu.outer(dh, _rows(x), dweight)
    if sums is not None and bias is not None:
        dbias = sums.to(bias.dtype)
    return dx, dweight, dbias
