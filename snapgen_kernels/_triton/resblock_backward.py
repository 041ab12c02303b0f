"""Backward of the residual block on the GPU: its two halves, and the shortcut. No kernel of its own."""

from __future__ import annotations

from torch import Tensor

from snapgen_kernels._triton import common, weight_gradient
from snapgen_kernels._triton.depthwise import Affine
from snapgen_kernels._triton.pointwise import pointwise
from snapgen_kernels._triton.sepconv_backward import Found, Saved, Wanted, gradients, half, plain


def backward(
    dy: Tensor,
    x: Tensor,
    shift: Tensor,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    dw1_weight: Tensor,
    pw1_weight: Tensor,
    norm2_weight: Tensor,
    norm2_bias: Tensor,
    dw2_weight: Tensor,
    pw2_weight: Tensor,
    shortcut_weight: Tensor | None,
    shortcut_bias: Tensor | None,
    num_groups: int,
    eps: float,
    h: Tensor,
    mean1: Tensor,
    rstd1: Tensor,
    mean2: Tensor,
    rstd2: Tensor,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    """``snapgen::resblock_backward``."""
    weights = (norm1_weight, norm1_bias, dw1_weight, pw1_weight, norm2_weight, norm2_bias, dw2_weight, pw2_weight)
    arguments = (x, shift, *weights, shortcut_weight, shortcut_bias)
    if dy.numel() == 0 or x.numel() == 0 or h.numel() == 0:
        return gradients([None] * len(arguments), arguments, needs, dy)
    in_x, in_shift, in_nw1, in_nb1, in_dw1, in_pw1, in_nw2, in_nb2, in_dw2, in_pw2, in_skip, in_skip_bias = needs
    dy, x = common.channels_last(dy), common.channels_last(x)
    norm1 = Affine(mean1, rstd1, norm1_weight.contiguous(), norm1_bias.contiguous(), num_groups)
    norm2 = Affine(mean2, rstd2, norm2_weight.contiguous(), norm2_bias.contiguous(), num_groups)
    saved1 = Saved(x, dw1_weight.contiguous(), pw1_weight.contiguous(), norm=norm1, shift=shift.contiguous())
    saved2 = Saved(common.channels_last(h), dw2_weight.contiguous(), pw2_weight.contiguous(), norm=norm2)
    in_first = Wanted(x=in_x, dw_weight=in_dw1, pw_weight=in_pw1, norm_weight=in_nw1, norm_bias=in_nb1, shift=in_shift)
    in_second = Wanted(x=any(in_first), dw_weight=in_dw2, pw_weight=in_pw2, norm_weight=in_nw2, norm_bias=in_nb2)
    skip_weight, skip_bias = plain(shortcut_weight), plain(shortcut_bias)

    def along_shortcut() -> Tensor:
        return dy if skip_weight is None else pointwise(dy, skip_weight, transposed=True)

    second = half(saved2, dy, in_second)
    first = Found() if second.x is None else half(saved1, second.x, in_first, along_shortcut)
    shortcut = weight_gradient.parts_of(dy, lambda: x, in_skip, in_skip_bias)
    found = (
        *(first.x, first.shift, first.norm_weight, first.norm_bias, first.dw_weight, first.pw_weight),
        *(second.norm_weight, second.norm_bias, second.dw_weight, second.pw_weight),
        weight_gradient.added(shortcut.weight, skip_weight),
        weight_gradient.added(shortcut.sums, skip_bias),
    )
    return gradients(found, arguments, needs, dy)
