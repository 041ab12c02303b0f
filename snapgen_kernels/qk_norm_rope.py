"""RMSNorm of queries and keys, then 2-D rotary position embedding.

Formula, for each vector x of q [B, N, H, D] and of k [B, M, D] (one key head)::

    n = x / sqrt(mean(x^2) + eps) * weight
    y = n * cos + rot(n) * sin,   rot(n)[2i] = -n[2i + 1],  rot(n)[2i + 1] = n[2i]

cos and sin are [N, D] (then M = N), or None for no rotation (cross-attention). Arithmetic is fp32 whatever the dtype of
q and k; the outputs are rounded once. Backward, with dn = dy cos + rot^T(dy sin), g = dn weight, r = 1 / sqrt(mean(x^2)
+ eps)::

    dx = r (g - x r^2 mean(g x)),   dweight = sum dn x r
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from snapgen_kernels import _backend
from snapgen_kernels._library import CostCase, check_shape, register
from snapgen_kernels.group_norm_silu import compute_dtype

NAME = "qk_norm_rope"


def rope_2d(
    height: int, width: int, head_dim: int, theta: float = 10000.0, device: torch.device | str | None = None
) -> tuple[Tensor, Tensor]:
    """cos and sin of 2-D RoPE, each [height * width, head_dim] in fp32.

    The first half of head_dim turns with the row, the second half with the column; within a half, pair i of d/2 turns
    by position * theta^(-2i / (d/2)).

    Raises:
        ValueError: head_dim is not a positive multiple of 4, or a size is negative.
    """
    if head_dim < 4 or head_dim % 4:
        raise ValueError(f"rope_2d: head_dim is {head_dim}; expected a positive multiple of 4")
    if height < 0 or width < 0:
        raise ValueError(f"rope_2d: height and width are {height} and {width}; expected no negative size")
    half = head_dim // 2
    exponents = torch.arange(0, half, 2, dtype=torch.float64, device=device) / half
    frequencies = theta**-exponents  # [D/4]
    rows = torch.arange(height, dtype=torch.float64, device=device)[:, None] * frequencies
    columns = torch.arange(width, dtype=torch.float64, device=device)[:, None] * frequencies
    angles = torch.cat(
        (rows[:, None, :].expand(height, width, -1), columns[None, :, :].expand(height, width, -1)), dim=-1
    )
    angles = angles.reshape(height * width, half).repeat_interleave(2, dim=-1)
    return angles.cos().float(), angles.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x * cos + rot(x) * sin, with cos and sin broadcast against x [..., D]."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x * cos + torch.stack((-odd, even), dim=-1).flatten(-2) * sin


def _norm_rotate(x: Tensor, weight: Tensor | None, cos: Tensor | None, sin: Tensor | None, eps: float) -> Tensor:
    wide = x.to(compute_dtype(x))
    if weight is not None:
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.to(wide.dtype)
    if cos is not None and sin is not None:
        wide = rotate(wide, cos.to(wide.dtype), sin.to(wide.dtype))
    return wide.to(x.dtype)


def reference(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """The formula in plain PyTorch; a weight of None leaves that norm out."""
    cos_q, sin_q = (None, None) if cos is None or sin is None else (cos[:, None, :], sin[:, None, :])
    return _norm_rotate(q, q_weight, cos_q, sin_q, eps), _norm_rotate(k, k_weight, cos, sin, eps)


def _fake(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k)


_DTYPES = {
    "cpu": (torch.float32, torch.bfloat16),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}
# What a tile of the GPU kernels holds of a head.
_GPU_HEAD = 256


def _unsupported(
    q: Tensor, k: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, *_: Tensor | float | None
) -> str | None:
    """None if the fused kernels of this device take this call, else the reason."""
    return unsupported_dtypes(q, (q.dtype, k.dtype), q_weight, k_weight)


def unsupported_dtypes(
    q: Tensor, seen: tuple[torch.dtype, torch.dtype], q_weight: Tensor | None, k_weight: Tensor | None
) -> str | None:
    """:func:`_unsupported` for an op that sees q and k in these dtypes."""
    allowed, (dtype, other) = _DTYPES.get(q.device.type, ()), seen
    if dtype not in allowed:
        names = ", ".join(map(str, allowed)) or "none there"
        return f"q has dtype {dtype} on {q.device.type}; the kernels take {names}"
    if other != dtype:
        return f"k has dtype {other}; the kernels take that of q, {dtype}"
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight is not None and weight.dtype not in (torch.float32, dtype):
            return f"{name} has dtype {weight.dtype}; the kernels take float32 or the dtype of q ({dtype})"
    if q.device.type == "cuda" and q.shape[-1] > _GPU_HEAD:
        return f"q has head dimension {q.shape[-1]}; the GPU kernels take at most {_GPU_HEAD}"
    return None


def _cpu(*arguments: Any) -> tuple[Tensor, Tensor]:
    from snapgen_kernels._cpu import qk_norm_rope as kernels

    return kernels.forward(*arguments)


def _cpu_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from snapgen_kernels._cpu import qk_norm_rope as kernels

    return kernels.backward(*arguments)


def _cuda(*arguments: Any) -> tuple[Tensor, Tensor]:
    from snapgen_kernels._triton import qk_norm_rope as kernels

    return kernels.forward(*arguments)


def _cuda_backward(*arguments: Any) -> tuple[Tensor, ...]:
    from snapgen_kernels._triton import qk_norm_rope_backward as kernels

    return kernels.backward(*arguments)


OP = register(
    NAME,
    "Tensor q, Tensor k, Tensor q_weight, Tensor k_weight, Tensor? cos, Tensor? sin, float eps",
    outputs=2,
    differentiable=("q", "k", "q_weight", "k_weight"),
    reference=reference,
    fake=_fake,
    kernels=("cpu", "cuda"),
    cpu=_cpu,
    cpu_backward=_cpu_backward,
    cuda=_cuda,
    cuda_backward=_cuda_backward,
    unsupported=_unsupported,
)


def check_qk(op: str, q: Tensor, k: Tensor, cos: Tensor | None, sin: Tensor | None) -> None:
    """Raise unless q [B, N, H, D], k [B, M, D], and cos and sin [N, D] with M = N (or both None) fit together."""
    if q.dim() != 4:
        raise ValueError(f"{op}: q has shape {tuple(q.shape)}; expected four dimensions [B, N, H, D]")
    check_shape(op, "q", q, q.shape)
    if k.dim() != 3:
        raise ValueError(f"{op}: k has shape {tuple(k.shape)}; expected three dimensions [B, M, D] (one key head)")
    batch, tokens, _, dim = q.shape
    check_shape(op, "k", k, (batch, k.shape[1], dim), q)
    if (cos is None) != (sin is None):
        raise ValueError(f"{op}: {'cos' if cos is None else 'sin'} is None and the other is not; give both or neither")
    if cos is not None:
        if dim % 2:
            raise ValueError(f"{op}: q has head dimension {dim}; rotation needs an even one")
        if k.shape[1] != tokens:
            raise ValueError(f"{op}: k has {k.shape[1]} tokens and q {tokens}; rotation needs equal counts")
        check_shape(op, "cos", cos, (tokens, dim), q)
        check_shape(op, "sin", sin, (tokens, dim), q)
        for name, table in (("cos", cos), ("sin", sin)):
            if table is not None and table.requires_grad:
                raise ValueError(f"{op}: {name} requires a gradient; the rotation tables are constants here")


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """RMSNorm of q and k over the head dimension, then rotation.

    Args:
        q: [B, N, H, D]. k: [B, M, D]. Any floating dtype.
        q_weight, k_weight: [D].
        cos, sin: [N, D], as :func:`rope_2d` makes them (then M = N), or None for no rotation. Constants: no gradient.
        eps: added to the mean square.

    Returns:
        q and k, normalised and rotated, in their own shapes and dtypes.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        FusedUnavailable: under ``use("fused")``, no kernel takes this call.
    """
    check_qk(NAME, q, k, cos, sin)
    dim = q.shape[-1]
    check_shape(NAME, "q_weight", q_weight, (dim,), q)
    check_shape(NAME, "k_weight", k_weight, (dim,), q)
    if _backend.select(NAME, q.device.type, _unsupported(q, k, q_weight, k_weight)):
        return torch.ops.snapgen.qk_norm_rope(q, k, q_weight, k_weight, cos, sin, eps)
    return reference(q, k, q_weight, k_weight, cos, sin, eps)


def cost(case: CostCase) -> tuple[int, int]:
    """(FLOPs, fewest bytes) of the forward: q and k read and written once, fp32 tables read once."""
    d = case.dims
    elements = d["B"] * (d["N"] * d["H"] + d["M"]) * d["D"]
    tables = 2 * d["N"] * d["D"] * 4 if d.get("rope") else 0
    return elements * (7 if d.get("rope") else 4), 2 * elements * case.dtype.itemsize + tables
