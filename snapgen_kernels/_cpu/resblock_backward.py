"""Launcher of the backward of the residual block: its two halves, and the shortcut."""

from __future__ import annotations

from torch import Tensor

from snapgen_kernels._cpu.sepconv_backward import (
    NormSaved,
    gradients,
    pointwise,
    pointwise_weight,
    rows_of,
    separable,
)


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
    dy_rows, x_rows = rows_of(dy), rows_of(x)

    skip: Tensor | None = dy_rows
    skip_weight = skip_bias = None
    if shortcut_weight is not None:
        outer = pointwise(dy_rows, shortcut_weight, shortcut_bias, needs=(in_x, False, in_skip_bias))
        skip, skip_bias = outer.d, outer.bias
        skip_weight = pointwise_weight(dy_rows, x_rows, shortcut_weight) if in_skip else None

    in_first = (in_x, in_dw1, in_pw1, False, False, in_nw1, in_nb1, in_shift)
    second = separable(
        dy_rows,
        rows_of(h),
        dw2_weight,
        pw2_weight,
        norm=NormSaved(num_groups, norm2_weight, norm2_bias, mean2, rstd2),
        needs=(any(in_first), in_dw2, in_pw2, False, False, in_nw2, in_nb2, False),
    )
    dx = None
    found: tuple[Tensor | None, ...] = (None,) * 5
    if second.x is not None:
        first = separable(
            second.x,
            x_rows,
            dw1_weight,
            pw1_weight,
            shift=shift,
            norm=NormSaved(num_groups, norm1_weight, norm1_bias, mean1, rstd1),
            extra=skip if in_x else None,
            needs=in_first,
        )
        dx = None if first.x is None else first.x.permute(0, 3, 1, 2)
        found = (first.shift, first.norm_weight, first.norm_bias, first.dw_weight, first.pw_weight)
    later = (second.norm_weight, second.norm_bias, second.dw_weight, second.pw_weight)
    return gradients((dx, *found, *later, skip_weight, skip_bias), arguments, needs, dy)
