"""Multi-query attention: many query heads, one key/value head; self or cross, with QK-RMSNorm and RoPE folded in.

Formula, for q [B, N, H, D], k and v [B, M, D], key_mask [B, M] (True: attend)::

    q, k = qk_norm_rope(q, k, q_weight, k_weight, cos, sin)      where given
    p = softmax over the allowed keys of (q . k * scale),   scale = 1 / sqrt(D) unless given
    o = p v                                                      a row with no allowed key gives zeros

Softmax and accumulation are fp32. Kept for backward: o, and the logarithm of each row's sum of exponentials [B, N, H]
in fp32 (-inf for a row with no allowed key). With dp = do v^T and delta = sum(do o) of a row::

    ds = p (dp - delta),   dq = scale ds k,   dk = scale ds^T q,   dv = p^T do

and from there through the rotation and the norm. The kernels never read a key that is masked, so what stands there
(NaN even) reaches no output. With one key/value head the N * H queries of a sample are simply N * H rows of one head:
no copy of k or v per head is ever made.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snapgen_kernels import _backend
from snapgen_kernels._library import CostCase, check_shape, dtype_seen, register
from snapgen_kernels.group_norm_silu import compute_dtype
from snapgen_kernels.qk_norm_rope import check_qk, qk_norm_rope, unsupported_dtypes
from snapgen_kernels.qk_norm_rope import reference as qk_norm_rope_reference

NAME = "attention"


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None = None,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    scale: float | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """The formula in plain PyTorch, written out (so that it can be differentiated twice): -> [B, N, H, D]."""
    if q_weight is not None or cos is not None:
        q, k = qk_norm_rope_reference(q, k, q_weight, k_weight, cos, sin, eps)
    batch, tokens, heads, dim = q.shape
    rows = q.reshape(batch, tokens * heads, dim) * (dim**-0.5 if scale is None else scale)
    scores = torch.bmm(rows, k.transpose(1, 2)).to(compute_dtype(q))  # [B, N*H, M]
    if key_mask is not None:
        allowed = key_mask[:, None, :]
        scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
        weights = scores.softmax(-1).masked_fill(~allowed, 0.0)
    else:
        weights = scores.softmax(-1)
    return torch.bmm(weights.to(q.dtype), v).view(batch, tokens, heads, dim)


def _reference_with_statistics(
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
    o = reference(q, k, v, key_mask, q_weight, k_weight, cos, sin, scale, eps)
    with torch.no_grad():
        if q_weight is not None or cos is not None:
            q, k = qk_norm_rope_reference(q, k, q_weight, k_weight, cos, sin, eps)
        wide = compute_dtype(q)
        scores = torch.einsum("bnhd,bmd->bnhm", q.to(wide), k.to(wide)) * (
            q.shape[-1] ** -0.5 if scale is None else scale
        )
        if key_mask is not None:
            scores = scores.masked_fill(~key_mask[:, None, None, :], -torch.inf)
        return o, scores.logsumexp(-1)


def _composed(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float | None) -> Tensor:
    batch, tokens, heads, dim = q.shape
    rows = q.reshape(batch, 1, tokens * heads, dim)
    if key_mask is None:
        o = F.scaled_dot_product_attention(rows, k[:, None], v[:, None], scale=scale)
        return o.reshape(batch, tokens, heads, dim)
    # A sample without any allowed key attends everywhere and is then zeroed: neither NaN nor a gradient comes of it.
    some = key_mask.any(-1)
    allowed = (key_mask | ~some[:, None])[:, None, None, :]
    o = F.scaled_dot_product_attention(rows, k[:, None], v[:, None], attn_mask=allowed, scale=scale)
    o = o.masked_fill(~some[:, None, None, None], 0.0)
    return o.reshape(batch, tokens, heads, dim)


def _fake(q: Tensor, k: Tensor, v: Tensor, *_: Tensor | float | None) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=compute_dtype(q))


# What the GPU kernels' tiles hold of a head in registers and shared memory.
_GPU_HEAD = 128


def _unsupported(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    *_: Tensor | float | None,
) -> str | None:
    """None if a fused kernel takes this call, else the reason."""
    dtype = dtype_seen(q)
    if dtype_seen(v) != dtype:
        return f"v has dtype {v.dtype}; the kernels take that of q, {dtype}"
    if q.device.type == "cuda" and not 0 < q.shape[-1] <= _GPU_HEAD:
        return f"q has head dimension {q.shape[-1]}; the GPU kernels take 1 to {_GPU_HEAD}"
    return unsupported_dtypes(q, (dtype, dtype_seen(k)), q_weight, k_weight)


def _cpu(*arguments: Any) -> tuple[Tensor, Tensor]:
    from snapgen_kernels._cpu import attention as kernels

    return kernels.forward(*arguments)


def _cpu_backward(*arguments: Any) -> tuple[Tensor, ...]:
    from snapgen_kernels._cpu import attention as kernels

    return kernels.backward(*arguments)


def _cuda(*arguments: Any) -> tuple[Tensor, Tensor]:
    from snapgen_kernels._triton import attention as kernels

    return kernels.forward(*arguments)


def _cuda_backward(*arguments: Any) -> tuple[Tensor, ...]:
    from snapgen_kernels._triton import attention_backward as kernels

    return kernels.backward(*arguments)


OP = register(
    NAME,
    "Tensor q, Tensor k, Tensor v, Tensor? key_mask, Tensor? q_weight, Tensor? k_weight, "
    "Tensor? cos, Tensor? sin, float? scale, float eps",
    outputs=1,
    saved=1,  # logsumexp, [B, N, H]
    keep_outputs=True,
    differentiable=("q", "k", "v", "q_weight", "k_weight"),
    reference=_reference_with_statistics,
    fake=_fake,
    cast=("q", "k", "v"),
    kernels=("cpu", "cuda"),
    cpu=_cpu,
    cpu_backward=_cpu_backward,
    cuda=_cuda,
    cuda_backward=_cuda_backward,
    unsupported=_unsupported,
)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """Multi-query attention, self or cross.

    Where the device has no fused kernel, ``auto`` composes it of :func:`qk_norm_rope` and PyTorch's
    scaled_dot_product_attention, with ordinary autograd. That one has no second derivative on every device (PyTorch
    then raises): ``use("reference")`` has.

    Args:
        q: [B, N, H, D]. k, v: [B, M, D].
        key_mask: bool [B, M], True where a key may be attended, or None.
        scale: of the scores; None: 1 / sqrt(D).
        q_weight, k_weight: [D] of the RMSNorms, both or neither.
        cos, sin: [N, D] of the rotation (M = N), both or neither. eps: of the RMSNorms.

    Returns:
        [B, N, H, D], contiguous. A sample whose keys are all masked gives zeros.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        FusedUnavailable: under ``use("fused")``, no kernel takes this call.
    """
    check_qk(NAME, q, k, cos, sin)
    check_shape(NAME, "v", v, k.shape, q)
    dim = q.shape[-1]
    if (q_weight is None) != (k_weight is None):
        missing = "q_weight" if q_weight is None else "k_weight"
        raise ValueError(f"{NAME}: {missing} is None and the other weight is not; give both or neither")
    check_shape(NAME, "q_weight", q_weight, (dim,), q)
    check_shape(NAME, "k_weight", k_weight, (dim,), q)
    if key_mask is not None:
        if key_mask.dtype != torch.bool:
            raise TypeError(f"{NAME}: key_mask has dtype {key_mask.dtype}; expected torch.bool (True: attend)")
        if key_mask.shape != k.shape[:2]:
            raise ValueError(f"{NAME}: key_mask has shape {tuple(key_mask.shape)}; expected {tuple(k.shape[:2])}")
        if key_mask.device != q.device:
            raise ValueError(f"{NAME}: key_mask is on device {key_mask.device}; the first input is on {q.device}")
    if _backend.select(NAME, q.device.type, _unsupported(q, k, v, key_mask, q_weight, k_weight)):
        return torch.ops.snapgen.attention(q, k, v, key_mask, q_weight, k_weight, cos, sin, scale, eps)[0]
    if _backend.is_reference():
        return reference(q, k, v, key_mask, q_weight, k_weight, cos, sin, scale, eps)
    if q_weight is not None and k_weight is not None:
        q, k = qk_norm_rope(q, k, q_weight, k_weight, cos, sin, eps)
    elif cos is not None:
        q, k = qk_norm_rope_reference(q, k, None, None, cos, sin, eps)
    return _composed(q, k, v, key_mask, scale)


def cost(case: CostCase) -> tuple[int, int]:
    """(FLOPs, fewest bytes) of the forward: q, k, v read once, o written once; two products."""
    d = case.dims
    rows = d["B"] * d["N"] * d["H"]
    flops = 4 * rows * d["M"] * d["D"]
    return flops, (2 * rows * d["D"] + 2 * d["B"] * d["M"] * d["D"]) * case.dtype.itemsize


class MultiQueryAttention(nn.Module):
    """Self-attention with one key/value head.

    State-dict keys: ``to_q`` (Linear dim -> H*D), ``to_k``, ``to_v`` (Linear dim -> D), all without bias, ``norm_q``,
    ``norm_k`` (RMSNorm [D], where qk_norm), ``to_out`` (Linear H*D -> dim, with bias).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        head_dim: int = 64,
        qk_norm: bool = True,
        eps: float = 1e-6,
        context_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.eps = num_heads, head_dim, eps
        source = dim if context_dim is None else context_dim
        self.to_q = nn.Linear(dim, num_heads * head_dim, bias=False)
        self.to_k = nn.Linear(source, head_dim, bias=False)
        self.to_v = nn.Linear(source, head_dim, bias=False)
        self.norm_q = nn.RMSNorm(head_dim, eps=eps) if qk_norm else None
        self.norm_k = nn.RMSNorm(head_dim, eps=eps) if qk_norm else None
        self.to_out = nn.Linear(num_heads * head_dim, dim)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """x [B, N, dim], rope (cos, sin) each [N, head_dim] or None -> [B, N, dim]."""
        return self._attend(x, x, rope, None)

    def _attend(self, x: Tensor, source: Tensor, rope: tuple[Tensor, Tensor] | None, key_mask: Tensor | None) -> Tensor:
        if x.dim() != 3:
            raise ValueError(f"{type(self).__name__}: x has shape {tuple(x.shape)}; expected [B, N, dim]")
        cos, sin = (None, None) if rope is None else rope
        o = attention(
            self.to_q(x).unflatten(-1, (self.num_heads, self.head_dim)),
            self.to_k(source),
            self.to_v(source),
            key_mask=key_mask,
            q_weight=None if self.norm_q is None else self.norm_q.weight,
            k_weight=None if self.norm_k is None else self.norm_k.weight,
            cos=cos,
            sin=sin,
            eps=self.eps,
        )
        return self.to_out(o.flatten(-2))


class CrossAttention(MultiQueryAttention):
    """Attention to a context with one key/value head; the keys of :class:`MultiQueryAttention`, to_k and to_v from
    context_dim."""

    def __init__(
        self,
        dim: int,
        context_dim: int,
        num_heads: int,
        *,
        head_dim: int = 64,
        qk_norm: bool = True,
        eps: float = 1e-6,
    ) -> None:
        super().__init__(dim, num_heads, head_dim=head_dim, qk_norm=qk_norm, eps=eps, context_dim=context_dim)

    def forward(  # type: ignore[override]
        self, x: Tensor, context: Tensor, key_mask: Tensor | None = None
    ) -> Tensor:
        """x [B, N, dim], context [B, M, context_dim], key_mask bool [B, M] (True: attend) or None -> [B, N, dim]."""
        return self._attend(x, context, None, key_mask)
