"""Backward of the separable convolution on the GPU; the contract is in ``snapgen_kernels/sepconv.py``. Its kernels are
those of ``pointwise.py`` (dd of dy), ``depthwise.py`` (d, computed again), ``weight_gradient.py`` (of dy and d),
``depthwise_backward.py`` and ``norm_backward.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from snapgen_kernels import costs
from snapgen_kernels._library import like
from snapgen_kernels._triton import common, depthwise_backward, norm_backward, tuning, weight_gradient
from snapgen_kernels._triton.depthwise import Affine, by_tap, depthwise
from snapgen_kernels._triton.pointwise import pointwise


class Saved(NamedTuple):
    """What the forward of a separable convolution was called with: y = pointwise(depthwise3x3([up2x] [SiLU(norm] x [)])
    + dw_bias) + pw_bias + shift. x is channels_last, the parameters are contiguous."""

    x: Tensor
    dw_weight: Tensor
    pw_weight: Tensor
    dw_bias: Tensor | None = None
    pw_bias: Tensor | None = None
    norm: Affine | None = None
    shift: Tensor | None = None
    stride: int = 1
    upsample: bool = False


class Wanted(NamedTuple):
    """Which gradients of a :class:`Saved` are wanted; only of what is there."""

    x: bool = False
    dw_weight: bool = False
    pw_weight: bool = False
    dw_bias: bool = False
    pw_bias: bool = False
    norm_weight: bool = False
    norm_bias: bool = False
    shift: bool = False

    @property
    def norm(self) -> bool:
        return self.norm_weight or self.norm_bias


class Found(NamedTuple):
    """The gradients, as :class:`Wanted`: x in channels_last, the others contiguous; maybe None where not wanted."""

    x: Tensor | None = None
    dw_weight: Tensor | None = None
    pw_weight: Tensor | None = None
    dw_bias: Tensor | None = None
    pw_bias: Tensor | None = None
    norm_weight: Tensor | None = None
    norm_bias: Tensor | None = None
    shift: Tensor | None = None


class Plan(NamedTuple):
    """``samples`` samples at a time go from dy to da, so that their dd stays in the L2 cache."""

    samples: int


def plans(saved: Saved, dy: Tensor) -> tuple[tuple[Plan, ...], Plan]:
    """The plans that a half may follow, and the rule's choice."""
    batch = saved.x.shape[0]
    blocked = Plan(costs.samples_in_cache(batch, saved.x.shape[1] * dy[:, 0].numel() * dy.element_size()))
    # The rule is the whole batch: the CPU launches a block about as fast as the GPU computes it.
    whole = Plan(batch)
    return tuple(dict.fromkeys((whole, blocked))), whole


def _joined(parts: Sequence[Tensor | None], dim: int) -> Tensor | None:
    found = [part for part in parts if part is not None]
    return torch.cat(found, dim) if len(found) > 1 else found[0] if found else None


def _inner(
    saved: Saved, taps: Tensor, dy: Tensor, wanted: Wanted, samples: int
) -> tuple[Tensor, depthwise_backward.Parts]:
    """da [B, C, H, W], and the parts of what depthwise convolution and norm are to have."""
    x, batch = saved.x, saved.x.shape[0]
    da = torch.empty_like(x, memory_format=torch.channels_last)
    found = []
    for first in range(0, batch, samples):
        some = slice(first, min(first + samples, batch))
        norm = None if saved.norm is None else saved.norm.samples(some.start, some.stop)
        dd = pointwise(dy[some], saved.pw_weight, transposed=True)
        found.append(
            depthwise_backward.gradients(
                dd,
                x[some],
                taps,
                norm,
                saved.stride,
                saved.upsample,
                da[some],
                wanted.dw_weight,
                wanted.dw_bias,
            )
        )
        del dd  # the next one takes its place
    return da, depthwise_backward.Parts(
        _joined([part.weight for part in found], 0), _joined([part.norm for part in found], 1)
    )


def half(saved: Saved, dy: Tensor, wanted: Wanted, add: Callable[[], Tensor] | None = None) -> Found:
    """The backward of ``saved``.

    Args:
        dy: [B, O, H', W'], channels_last. Neither it nor x is empty.
        add: gives [B, C, H, W] in channels_last, to be added to the gradient of x; only with a norm. Called last, when
            other scratch memory has been freed.
    """
    taps = by_tap(saved.dw_weight)
    outer = weight_gradient.parts_of(
        dy,
        lambda: depthwise(saved.x, taps, saved.dw_bias, saved.norm, saved.stride, saved.upsample),
        wanted.pw_weight,
        wanted.pw_bias or wanted.shift,
    )
    found = Found(
        pw_weight=weight_gradient.added(outer.weight, saved.pw_weight if wanted.pw_weight else None),
        pw_bias=weight_gradient.added(outer.sums, saved.pw_bias if wanted.pw_bias else None),
        shift=weight_gradient.added(outer.sums, saved.shift if wanted.shift else None, sets=dy.shape[0]),
    )
    del outer
    if not (wanted.x or wanted.dw_weight or wanted.dw_bias or wanted.norm):
        return found

    def follow(plan: Plan) -> tuple[Tensor, depthwise_backward.Parts]:
        return _inner(saved, taps, dy, wanted, plan.samples)

    candidates, default = plans(saved, dy)
    key = (
        str(dy.dtype), *saved.x.shape, dy.shape[1], saved.stride, saved.upsample, saved.norm is not None,
        wanted.dw_weight, wanted.dw_bias,
    )  # fmt: skip
    da, inner = follow(tuning.choose("sepconv_backward", key, candidates, default, follow))
    if inner.weight is not None:
        bias = saved.dw_bias if wanted.dw_bias else None
        dweight, dbias = depthwise_backward.parameters(inner.weight, saved.dw_weight, bias)
        found = found._replace(dw_weight=dweight, dw_bias=dbias)
    if saved.norm is not None and inner.norm is not None:
        sums, means = norm_backward.merged(inner.norm, saved.norm, saved.x.shape[2] * saved.x.shape[3])
        if wanted.norm:
            dweight, dbias = norm_backward.parameters(sums, saved.norm)
            found = found._replace(norm_weight=dweight, norm_bias=dbias)
        if wanted.x:
            norm_backward.gradient(saved.x, da, None if add is None else add(), saved.norm, means)
    return found._replace(x=da) if wanted.x else found


def gradients(
    found: Sequence[Tensor | None], arguments: Sequence[Tensor | None], needs: Sequence[bool], like_: Tensor
) -> tuple[Tensor, ...]:
    """What a backward op returns: gradients laid out as their arguments, zeros where there is nothing to add up, and
    empty tensors for those not needed."""
    results = []
    for gradient, argument, need in zip(found, arguments, needs, strict=True):
        if not need or argument is None:
            results.append(like_.new_empty(0))
        else:
            results.append(torch.zeros_like(argument) if gradient is None else like(gradient, argument))
    return tuple(results)


def plain(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.contiguous()


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
        norm = Affine(mean, rstd, norm_weight.contiguous(), norm_bias.contiguous(), num_groups)
    saved = Saved(
        common.channels_last(x),
        dw_weight.contiguous(),
        pw_weight.contiguous(),
        plain(dw_bias),
        plain(pw_bias),
        norm,
        plain(shift),
        stride,
        upsample,
    )
    there = [need and argument is not None for need, argument in zip(needs, arguments, strict=True)]
    found = half(saved, common.channels_last(dy), Wanted(*there[:8]))
    dresidual = torch.empty_like(residual).copy_(dy) if residual is not None and needs[8] else None
    return gradients((*found, dresidual), arguments, needs, dy)
