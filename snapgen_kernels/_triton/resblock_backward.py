"""Backward of the residual block on the GPU: its two halves, and the shortcut. No kernel of its own."""

from __future__ import annotations

from torch import Tensor

from snapgen_kernels._triton import common, weight_gradient
from snapgen_kernels._triton.sepconv_backward import Half, Norm, gradients, half, plain


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
    from snapgen_kernels._triton import sepconv as forward_kernels

    weights = (norm1_weight, norm1_bias, dw1_weight, pw1_weight, norm2_weight, norm2_bias, dw2_weight, pw2_weight)
    arguments = (x, shift, *weights, shortcut_weight, shortcut_bias)
    if dy.numel() == 0 or x.numel() == 0 or h.numel() == 0:
        return gradients([None] * len(arguments), arguments, needs, dy)
    in_x, in_shift, in_nw1, in_nb1, in_dw1, in_pw1, in_nw2, in_nb2, in_dw2, in_pw2, in_skip, in_skip_bias = needs
    dy, x = common.channels_last(dy), common.channels_last(x)

    def skip() -> Tensor:
        """The gradient of x along the shortcut."""
        if shortcut_weight is None:
            return dy
        matrix = shortcut_weight.contiguous().reshape(shortcut_weight.shape[:2])
        return forward_kernels.pointwise(dy, matrix, transposed=True)

    in_first = (in_x, in_dw1, in_pw1, False, False, in_nw1, in_nb1, in_shift)
    second = half(
        dy,
        common.channels_last(h),
        dw2_weight.contiguous(),
        pw2_weight.contiguous(),
        norm=Norm(mean2, rstd2, norm2_weight.contiguous(), norm2_bias.contiguous(), num_groups),
        needs=(any(in_first), in_dw2, in_pw2, False, False, in_nw2, in_nb2, False),
    )
    first = Half()
    if second.x is not None:
        first = half(
            second.x,
            x,
            dw1_weight.contiguous(),
            pw1_weight.contiguous(),
            shift=shift.contiguous(),
            norm=Norm(mean1, rstd1, norm1_weight.contiguous(), norm1_bias.contiguous(), num_groups),
            add=skip,
            needs=in_first,
        )
    shortcut = weight_gradient.gradients(
        [weight_gradient.parts_of(dy, lambda: x, in_skip, in_skip_bias)],
        plain(shortcut_weight) if in_skip else None,
        plain(shortcut_bias) if in_skip_bias else None,
        None,
    )
    found = (
        *(first.x, first.shift, first.norm_weight, first.norm_bias, first.dw_weight, first.pw_weight),
        *(second.norm_weight, second.norm_bias, second.dw_weight, second.pw_weight),
        *(shortcut.weight, shortcut.bias),
    )
    return gradients(found, arguments, needs, dy)
