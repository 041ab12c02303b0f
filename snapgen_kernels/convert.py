"""Weights of diffusers' blocks in the modules of this package: :func:`multi_query_attention`, :func:`cross_attention`
and :func:`geglu_feed_forward`.

diffusers itself is not needed: a block is taken as it is, or as its state dict.

One key/value head is fewer than a block has that was trained with one for each query head. Its projections are the
means of theirs, as conversions to grouped queries do it (Ainslie et al., "GQA", section 2.1). That is exact where the
heads are equal, and lossy where they are not: a converted network wants some more training.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from snapgen_kernels.attention import CrossAttention, MultiQueryAttention
from snapgen_kernels.geglu import GEGLUFeedForward

Weights = Mapping[str, Tensor]
Source = nn.Module | Weights
M = TypeVar("M", bound=nn.Module)

# diffusers' default, which a state dict does not hold.
_EPS = 1e-5
_PROJECTIONS = ("to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight")
_NORMS = ("norm_q.weight", "norm_k.weight")


class LossyConversion(UserWarning):
    """The heads that were averaged were not equal, so that the converted block computes something else."""


def multi_query_attention(
    source: Source, num_heads: int | None = None, *, eps: float | None = None
) -> MultiQueryAttention:
    """A :class:`MultiQueryAttention` of diffusers' ``Attention``, used for self-attention.

    Lossy unless the heads of keys and values are equal: see the top of this file. Copies; a dropout is left out.

    Args:
        source: the block, or its state dict. It has no biases on queries, keys and values (diffusers' default), and
            RMSNorms over each head on both queries and keys (``qk_norm="rms_norm"``) or none.
        num_heads: query heads; None: those that the block says it has. A state dict does not tell.
        eps: of the RMSNorms; None: the block's, or for a state dict diffusers' default, 1e-5.

    Raises:
        TypeError, ValueError: an argument does not fit, or the block is of another kind; the message names what.

    Warns:
        LossyConversion: the heads differ, with how much.
    """
    heads, eps, weights = _attention(source, num_heads, eps, to_itself=True)
    head_dim, dim = weights["to_k.weight"].shape
    with torch.device("meta"):
        module = MultiQueryAttention(dim, heads, head_dim=head_dim, qk_norm="norm_q.weight" in weights, eps=eps)
    return _filled(module, weights)


def cross_attention(source: Source, num_heads: int | None = None, *, eps: float | None = None) -> CrossAttention:
    """A :class:`CrossAttention` of diffusers' ``Attention``; otherwise as :func:`multi_query_attention`."""
    heads, eps, weights = _attention(source, num_heads, eps, to_itself=False)
    dim, (head_dim, width) = len(weights["to_out.weight"]), weights["to_k.weight"].shape
    with torch.device("meta"):
        module = CrossAttention(dim, width, heads, head_dim=head_dim, qk_norm="norm_q.weight" in weights, eps=eps)
    return _filled(module, weights)


def geglu_feed_forward(source: Source) -> GEGLUFeedForward:
    """A :class:`GEGLUFeedForward` of diffusers' ``FeedForward`` with ``activation_fn="geglu"``. Exact; copies; a
    dropout is left out.

    Args:
        source: the block, or its state dict.

    Raises:
        TypeError, ValueError: it is of another kind; the message names what.
    """
    net: Any = getattr(source, "net", None)
    kind = None if net is None else type(net[0]).__name__  # a state dict has shapes alone
    if kind not in (None, "GEGLU"):
        raise ValueError(f"source: its activation is {kind}; expected GEGLU")
    found = _weights(source, ("net.0.proj.weight", "net.2.weight"), ("net.0.proj.bias", "net.2.bias"))
    first, second = found["net.0.proj.weight"], found["net.2.weight"]
    hidden, dim = second.shape[1], first.shape[1]
    for name, tensor, shape in (
        ("net.0.proj.weight", first, (2 * hidden, dim)),
        ("net.2.weight", second, (dim, hidden)),
        ("net.0.proj.bias", found.get("net.0.proj.bias"), (2 * hidden,)),
        ("net.2.bias", found.get("net.2.bias"), (dim,)),
    ):
        _check_shape(name, tensor, shape)
    names = {"net.0.proj": "proj_in", "net.2": "proj_out"}
    biased = any(f"{name}.bias" in found for name in names)
    weights: dict[str, Tensor] = {}
    for theirs, ours in names.items():
        weight = weights[f"{ours}.weight"] = found[f"{theirs}.weight"]
        if biased:
            weights[f"{ours}.bias"] = found.get(f"{theirs}.bias", weight.new_zeros(len(weight)))
    with torch.device("meta"):
        module = GEGLUFeedForward(dim, hidden, bias=biased)
    return _filled(module, weights)


# ---- checks and pooling ----------------------------------------------------------------------------------------------


def _attention(
    source: Source, num_heads: int | None, eps: float | None, *, to_itself: bool
) -> tuple[int, float, dict[str, Tensor]]:
    """Query heads, the norms' eps, and the weights under this package's names."""
    found = _weights(source, _PROJECTIONS, (*_NORMS, "to_out.0.bias"))
    heads = getattr(source, "heads", None) if num_heads is None else num_heads
    if heads is None:
        raise ValueError("num_heads is None, and source does not tell; give the number of query heads")
    q, k, v, out = (found[name] for name in _PROJECTIONS)
    if heads < 1 or len(q) % heads:
        raise ValueError(f"num_heads is {heads}; it must divide the {len(q)} rows of to_q.weight")
    head_dim, dim = len(q) // heads, q.shape[1]
    if len(k) % head_dim or not len(k):
        raise ValueError(
            f"source: to_k.weight has {len(k)} rows, no multiple of a head's {head_dim} (num_heads {heads})"
        )
    if to_itself and k.shape[1] != dim:
        raise ValueError(
            f"source: to_k.weight takes {k.shape[1]} channels and to_q.weight {dim}: cross_attention converts that"
        )
    _check_shape("to_v.weight", v, tuple(k.shape))
    _check_shape("to_out.0.weight", out, (dim, len(q)))
    _check_shape("to_out.0.bias", found.get("to_out.0.bias"), (dim,))
    normed = [name for name in _NORMS if name in found]
    if len(normed) == 1:
        raise ValueError(f"source: has {normed[0]} alone; expected both of {' and '.join(_NORMS)}, or neither")
    for name in normed:
        _check_shape(name, found[name], (head_dim,))
    if isinstance(source, nn.Module):
        _check_formula(source, head_dim)
    bias = found.get("to_out.0.bias")
    weights = {
        "to_q.weight": q,
        "to_k.weight": _pooled(k, head_dim),
        "to_v.weight": _pooled(v, head_dim),
        "to_out.weight": out,
        "to_out.bias": out.new_zeros(dim) if bias is None else bias,
        **{name: found[name] for name in normed},
    }
    _warn({"keys": k, "values": v}, head_dim)
    own = getattr(getattr(source, "norm_q", None), "eps", _EPS)
    return heads, own if eps is None else eps, weights


def _weights(source: Source, required: tuple[str, ...], optional: tuple[str, ...]) -> dict[str, Tensor]:
    """The source's tensors by name: all that are required, and no others than the optional ones."""
    if not isinstance(source, (nn.Module, Mapping)):
        raise TypeError(f"source is {type(source).__name__}; expected a module of diffusers or its state dict")
    found = dict(source.state_dict() if isinstance(source, nn.Module) else source)
    missing = [name for name in required if name not in found]
    if missing:
        raise ValueError(f"source has no {', '.join(missing)}; it has {', '.join(sorted(found)) or 'nothing'}")
    surplus = sorted(set(found) - {*required, *optional})
    if surplus:
        raise ValueError(f"source has {', '.join(surplus)}, for which the converted module has no place")
    for name, tensor in found.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"source: {name} is {kind}; expected a floating-point tensor")
        if name.endswith("weight") and tensor.dim() != (1 if name in _NORMS else 2):
            raise ValueError(
                f"source: {name} has shape {tuple(tensor.shape)}; expected {'[D]' if name in _NORMS else '[O, I]'}"
            )
    return found


def _check_shape(name: str, tensor: Tensor | None, shape: tuple[int, ...]) -> None:
    if tensor is not None and tuple(tensor.shape) != shape:
        raise ValueError(f"source: {name} has shape {tuple(tensor.shape)}; expected {shape}")


def _check_formula(source: nn.Module, head_dim: int) -> None:
    """Raise where the block does what its weights do not show."""
    usual = {"scale": head_dim**-0.5, "residual_connection": False, "rescale_output_factor": 1.0}
    for name, expected in usual.items():
        value = getattr(source, name, expected)
        if abs(float(value) - float(expected)) > 1e-6 * abs(float(expected)):
            raise ValueError(f"source: its {name} is {value}; the converted module has {expected}")
    for name in ("norm_q", "norm_k"):
        norm = getattr(source, name, None)
        kind = type(norm).__name__
        if kind not in ("RMSNorm", "NoneType"):
            raise ValueError(f"source: its {name} is a {kind}; expected an RMSNorm or None")
        if norm is not None and getattr(norm, "weight", None) is None:
            raise ValueError(f"source: its {name} has no weight; expected an RMSNorm with one, or None")
    q_eps, k_eps = (getattr(getattr(source, name, None), "eps", _EPS) for name in ("norm_q", "norm_k"))
    if q_eps is None or q_eps != k_eps:
        raise ValueError(f"source: its norms have eps {q_eps} and {k_eps}; expected one number for both")


def _heads(weight: Tensor, head_dim: int) -> Tensor:
    return weight.detach().unflatten(0, (-1, head_dim))


def _pooled(weight: Tensor, head_dim: int) -> Tensor:
    """The mean of the heads; of equal ones the first, to the last bit."""
    heads = _heads(weight, head_dim)
    return heads[0] if bool((heads == heads[:1]).all()) else heads.to(torch.float64).mean(0).to(weight.dtype)


def _warn(projections: Mapping[str, Tensor], head_dim: int) -> None:
    """Warn where heads are not equal."""
    lost = {}
    for name, weight in projections.items():
        heads = _heads(weight, head_dim).double()
        spread = (heads - heads.mean(0)).norm() / heads.norm().clamp_min(torch.finfo(torch.float64).tiny)
        if not bool((heads == heads[:1]).all()):
            lost[name] = f"{100 * spread.item():.2g}% of the {name}' weights ({len(heads)} heads)"
    if lost:
        warnings.warn(
            f"the heads are averaged to one, which is lossy: {' and '.join(lost.values())} are lost; "
            "train the converted network further",
            LossyConversion,
            stacklevel=4,
        )


def _filled(module: M, weights: Mapping[str, Tensor]) -> M:
    """The module with copies of the weights, on their device and in their dtype."""
    module.load_state_dict({name: tensor.detach().clone() for name, tensor in weights.items()}, assign=True)
    return module
