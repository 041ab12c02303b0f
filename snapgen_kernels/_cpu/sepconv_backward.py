"""Launchers of the backward of the separable convolution (csrc/sepconv_backward.cpp).

:func:`depthwise` and :func:`pointwise` are the parts that other ops' backwards are built of; :func:`separable` joins
them to that of one half of a residual block. They take images as [B, H, W, C], which is channels_last without its
permutation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from snapgen_kernels._cpu import packed
from snapgen_kernels._library import like

_ops = torch.ops.snapgen_cpu


class NormSaved(NamedTuple):
    """A GroupNorm + SiLU prologue and its statistics of this input."""

    num_groups: int
    weight: Tensor
    bias: Tensor
    mean: Tensor
    rstd: Tensor


def rows_of(image_BCHW: Tensor) -> Tensor:
    """[B, C, H, W] in any layout -> contiguous [B, H, W, C]; a view where the memory is channels_last."""
    return image_BCHW.permute(0, 2, 3, 1).contiguous()


def image_like(rows_BHWC: Tensor, argument_BCHW: Tensor) -> Tensor:
    """[B, H, W, C] -> [B, C, H, W] in the layout of ``empty_like(argument)``; a view where that is channels_last."""
    return like(rows_BHWC.permute(0, 3, 1, 2), argument_BCHW)


def _gradient_of(parameter: Tensor | None, need: bool) -> Tensor | None:
    """Contiguous memory for the gradient of a parameter; None where it is not needed."""
    if not need or parameter is None:
        return None
    return torch.empty_like(parameter, memory_format=torch.contiguous_format)


def _parameters(weight: Tensor, bias: Tensor | None, norm: NormSaved | None) -> tuple[Tensor | None, ...]:
    """The parameters of a depthwise convolution and of the norm before it, as the primitives take them."""
    plain = (weight.contiguous(), None if bias is None else bias.contiguous())
    if norm is None:
        return (*plain, None, None, None, None)
    return (*plain, norm.weight.contiguous(), norm.bias.contiguous(), norm.mean, norm.rstd)


class Depthwise(NamedTuple):
    """Gradients of :func:`depthwise`, None where they were not asked for; and d, for the gradient of what follows."""

    x: Tensor | None
    d: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None


def depthwise(
    dd: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: NormSaved | None = None,
    stride: int = 1,
    upsample: bool = False,
    extra: Tensor | None = None,
    d: bool = False,
    needs: Sequence[bool] = (True, True, True, True, True),
) -> Depthwise:
    """Backward of d = depthwise3x3([up2x] [SiLU(GroupNorm] x [)]) + bias.

    Args:
        dd: [B, H', W', C], gradient of d; None: only d itself is wanted.
        x: [B, H, W, C]. weight: [C, 1, 3, 3]. bias: [C] or None.
        extra: [B, H, W, C], added to the gradient of x, or None.
        d: compute d again as well.
        needs: which of the gradients of x, weight, bias, norm.weight, norm.bias are wanted.
    """
    scale = 2 if upsample else 1
    outputs = ((size * scale - 1) // stride + 1 for size in x.shape[1:3])
    found = Depthwise(
        torch.empty_like(x) if needs[0] else None,
        x.new_empty((x.shape[0], *outputs, x.shape[3])) if d else None,
        _gradient_of(weight, needs[1]),
        _gradient_of(bias, needs[2]),
        _gradient_of(norm.weight, needs[3]) if norm else None,
        _gradient_of(norm.bias, needs[4]) if norm else None,
    )
    groups = norm.num_groups if norm else 0
    _ops.depthwise_gradient(x, dd, *_parameters(weight, bias, norm), extra, groups, stride, scale, *found)
    return found


class Pointwise(NamedTuple):
    """Gradients of :func:`pointwise`, None where they were not asked for."""

    d: Tensor | None
    shift: Tensor | None
    bias: Tensor | None


def pointwise(
    dy: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    needs: Sequence[bool] = (True, True, True),
) -> Pointwise:
    """Backward of y = pointwise(d) + bias + shift[:, None, None] but for its weight (:func:`pointwise_weight`).

    Args:
        dy: [B, H, W, O]. weight: [O, C, 1, 1]. bias: [O] or None. shift: [B, O] or None.
        needs: which of the gradients of d, shift, bias are wanted.
    """
    found = Pointwise(
        dy.new_empty((*dy.shape[:3], weight.shape[1])) if needs[0] else None,
        _gradient_of(shift, needs[1]),
        _gradient_of(bias, needs[2]),
    )
    if any(gradient is not None for gradient in found):
        _ops.pointwise_gradient(dy, packed(weight, "bt") if needs[0] else None, *found)
    return found


def pointwise_weight(dy: Tensor, d: Tensor, weight: Tensor) -> Tensor:
    """Gradient of weight [O, C, 1, 1] of a pointwise convolution: dy [B, H, W, O], its input d [B, H, W, C]."""
    gradient = torch.empty_like(weight, memory_format=torch.contiguous_format)
    _ops.pointwise_weight_gradient(dy, d, gradient)
    return gradient


class Separable(NamedTuple):
    """Gradients of :func:`separable` by argument, None where they were not asked for."""

    x: Tensor | None = None
    dw_weight: Tensor | None = None
    pw_weight: Tensor | None = None
    dw_bias: Tensor | None = None
    pw_bias: Tensor | None = None
    norm_weight: Tensor | None = None
    norm_bias: Tensor | None = None
    shift: Tensor | None = None


def separable(
    dy: Tensor,
    x: Tensor,
    dw_weight: Tensor,
    pw_weight: Tensor,
    dw_bias: Tensor | None = None,
    pw_bias: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    norm: NormSaved | None = None,
    stride: int = 1,
    upsample: bool = False,
    extra: Tensor | None = None,
    needs: Sequence[bool],
) -> Separable:
    """Backward of y = pointwise(depthwise3x3([up2x] [SiLU(GroupNorm] x [)]) + dw_bias) + pw_bias + shift.

    Args:
        dy: [B, H', W', O]. x: [B, H, W, C]. The other arguments are those of ``sepconv``.
        extra: [B, H, W, C], added to the gradient of x (that of a skip connection), or None.
        needs: which gradients are wanted, in the order of :class:`Separable`.
    """
    in_x, in_dw, in_pw, in_dw_bias, in_pw_bias, in_norm_weight, in_norm_bias, in_shift = needs
    if in_x and in_dw and in_pw:
        found = Separable(
            torch.empty_like(x),
            _gradient_of(dw_weight, True),
            _gradient_of(pw_weight, True),
            _gradient_of(dw_bias, in_dw_bias),
            _gradient_of(pw_bias, in_pw_bias),
            _gradient_of(norm.weight, in_norm_weight) if norm else None,
            _gradient_of(norm.bias, in_norm_bias) if norm else None,
            _gradient_of(shift, in_shift),
        )
        scale = 2 if upsample else 1
        parameters = _parameters(dw_weight, dw_bias, norm)
        groups = norm.num_groups if norm else 0
        if _ops.separable_gradient(dy, packed(pw_weight, "bt"), x, *parameters, extra, groups, stride, scale, *found):
            return found
    deeper = (in_x, in_dw, in_dw_bias, in_norm_weight, in_norm_bias)
    outer = pointwise(dy, pw_weight, pw_bias, shift, needs=(any(deeper), in_shift, in_pw_bias))
    if not any(deeper) and not in_pw:
        return Separable(pw_bias=outer.bias, shift=outer.shift)
    inner = depthwise(
        outer.d,
        x,
        dw_weight,
        dw_bias,
        norm=norm,
        stride=stride,
        upsample=upsample,
        extra=extra,
        d=bool(in_pw),
        needs=[bool(need) for need in deeper],
    )
    return Separable(
        x=inner.x,
        dw_weight=inner.weight,
        pw_weight=None if inner.d is None else pointwise_weight(dy, inner.d, pw_weight),
        dw_bias=inner.bias,
        pw_bias=outer.bias,
        norm_weight=inner.norm_weight,
        norm_bias=inner.norm_bias,
        shift=outer.shift,
    )


def gradients(
    found: Sequence[Tensor | None], arguments: Sequence[Tensor | None], needs: Sequence[bool], like_: Tensor
) -> tuple[Tensor, ...]:
    """What a backward op returns: gradients laid out as their arguments, and empty tensors for those not needed."""
    results = []
    for gradient, argument, need in zip(found, arguments, needs, strict=True):
        if not need or argument is None:
            results.append(like_.new_empty(0))
        else:
            results.append(torch.zeros_like(argument) if gradient is None else like(gradient, argument))
    return tuple(results)


def backward(
    dy: Tensor,
    x: Tensor,
    dw_weight: Tensor,
    pw_weight: Tensor,
    dw_bias: Tensor | None,
    pw_bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    num_groups: int,
    eps: float,
    stride: int,
    upsample: bool,
    mean: Tensor,
    rstd: Tensor,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    """``snapgen::sepconv_backward``."""
    arguments = (x, dw_weight, pw_weight, dw_bias, pw_bias, norm_weight, norm_bias, shift, residual)
    if dy.numel() == 0 or x.numel() == 0:
        return gradients([None] * len(arguments), arguments, needs, dy)
    norm = None
    if norm_weight is not None and norm_bias is not None:
        norm = NormSaved(num_groups, norm_weight, norm_bias, mean, rstd)
    found = separable(
        rows_of(dy),
        rows_of(x),
        dw_weight,
        pw_weight,
        dw_bias,
        pw_bias,
        shift,
        norm=norm,
        stride=stride,
        upsample=upsample,
        needs=needs[:8],
    )
    dx = None if found.x is None else found.x.permute(0, 3, 1, 2)
    dresidual = torch.empty_like(residual).copy_(dy) if residual is not None and needs[8] else None
    return gradients((dx, *found[1:], dresidual), arguments, needs, dy)
