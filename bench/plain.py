"""The models as plain PyTorch: inside :func:`plain` every fused op is the code that a user of PyTorch would write.

``use("reference")`` would not do for a peer: the references widen to fp32 where PyTorch's own ops need not.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from torch import Tensor

import snapgen_kernels
from snapgen_kernels.group_norm_silu import Norm
from snapgen_kernels.testing import SPECS

_EAGER: dict[str, Callable[[dict[str, Any]], Any]] = {name: spec.eager for name, spec in SPECS.items()}


def _group_norm_silu(x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    return _EAGER["group_norm_silu"](dict(x=x, num_groups=num_groups, weight=weight, bias=bias, eps=eps))


def _sepconv(
    x: Tensor,
    dw_weight: Tensor,
    pw_weight: Tensor,
    *,
    dw_bias: Tensor | None = None,
    pw_bias: Tensor | None = None,
    norm: Norm | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    stride: int = 1,
    upsample: bool = False,
) -> Tensor:
    inputs = dict(x=x, dw_weight=dw_weight, pw_weight=pw_weight, dw_bias=dw_bias, pw_bias=pw_bias, shift=shift)
    return _EAGER["sepconv"]({**inputs, **_norm("norm", norm), "residual": residual, "stride": stride,
                              "upsample": upsample})  # fmt: skip


def _resblock(
    x: Tensor,
    shift: Tensor,
    norm1: Norm,
    dw1_weight: Tensor,
    pw1_weight: Tensor,
    norm2: Norm,
    dw2_weight: Tensor,
    pw2_weight: Tensor,
    *,
    shortcut_weight: Tensor | None = None,
    shortcut_bias: Tensor | None = None,
) -> Tensor:
    convolutions = dict(dw1_weight=dw1_weight, pw1_weight=pw1_weight, dw2_weight=dw2_weight, pw2_weight=pw2_weight)
    shortcut = dict(shortcut_weight=shortcut_weight, shortcut_bias=shortcut_bias)
    return _EAGER["resblock"](
        {"x": x, "shift": shift, **_norm("norm1", norm1), **_norm("norm2", norm2), **convolutions, **shortcut}
    )


def _norm(prefix: str, norm: Norm | None) -> dict[str, Any]:
    if norm is None:
        return {f"{prefix}_weight": None, f"{prefix}_bias": None}
    return {f"{prefix}_weight": norm.weight, f"{prefix}_bias": norm.bias, "num_groups": norm.num_groups,
            "eps": norm.eps}  # fmt: skip


def _qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    eps: float = 1e-6,
) -> Any:
    return _EAGER["qk_norm_rope"](dict(q=q, k=k, q_weight=q_weight, k_weight=k_weight, cos=cos, sin=sin, eps=eps))


def _attention(
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
    if q_weight is not None and k_weight is not None:
        # Autocast leaves a norm's weights in fp32, and PyTorch's RMSNorm is several passes where dtypes differ.
        q_weight, k_weight = q_weight.to(q.dtype), k_weight.to(k.dtype)
    inputs = dict(q=q, k=k, v=v, key_mask=key_mask, scale=scale, q_weight=q_weight, k_weight=k_weight)
    return _EAGER["attention"]({**inputs, "cos": cos, "sin": sin, "eps": eps})


def _geglu(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return _EAGER["geglu"](dict(x=x, weight=weight, bias=bias))


def _decoder_block(
    x: Tensor,
    dw1_weight: Tensor,
    dw1_bias: Tensor,
    pw1_weight: Tensor,
    dw2_weight: Tensor,
    dw2_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    pw2_weight: Tensor,
    num_groups: int,
    eps: float = 1e-6,
    *,
    low_memory: bool = False,
) -> Tensor:
    """PyTorch has no other way where memory is low."""
    first = dict(x=x, dw1_weight=dw1_weight, dw1_bias=dw1_bias, pw1_weight=pw1_weight)
    second = dict(dw2_weight=dw2_weight, dw2_bias=dw2_bias, pw2_weight=pw2_weight)
    norm = dict(norm_weight=norm_weight, norm_bias=norm_bias, num_groups=num_groups, eps=eps)
    return _EAGER["decoder_block"]({**first, **second, **norm})


_PLAIN: dict[str, Callable[..., Any]] = {
    "group_norm_silu": _group_norm_silu,
    "sepconv": _sepconv,
    "resblock": _resblock,
    "qk_norm_rope": _qk_norm_rope,
    "attention": _attention,
    "geglu": _geglu,
    "decoder_block": _decoder_block,
}


@cache
def _swaps() -> tuple[tuple[dict[str, Any], str, Any, Any], ...]:
    """Every place in the two packages that holds a fused op's public function: (names, name, fused, plain)."""
    import snapgen.decoder
    import snapgen.unet  # noqa: F401  (their modules have to be there to be searched)

    swaps: list[tuple[dict[str, Any], str, Any, Any]] = []
    for op, replacement in _PLAIN.items():
        public = getattr(snapgen_kernels, op)
        for module_name, module in sorted(sys.modules.items()):
            if module_name.split(".")[0] in ("snapgen", "snapgen_kernels"):
                names = vars(module)
                swaps += [(names, name, public, replacement) for name, value in names.items() if value is public]
    return tuple(swaps)


@contextmanager
def plain() -> Iterator[None]:
    """Run, trace or compile models of plain PyTorch inside: no op of ours is called, not even a reference."""
    swaps = _swaps()
    for names, name, _, replacement in swaps:
        names[name] = replacement
    try:
        with snapgen_kernels.use("reference"):
            yield
    finally:
        for names, name, public, _ in swaps:
            names[name] = public
