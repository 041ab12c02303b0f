"""The residual block's forward on the CPU: two sweeps over rows; the first leaves the statistics of h."""

from __future__ import annotations

import torch
from torch import Tensor

from snapgen_kernels._cpu.sepconv import added, channels_last, group_statistics, half
from snapgen_kernels.group_norm_silu import Norm, new_statistics
from snapgen_kernels.sepconv import new_image


def forward(
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
) -> tuple[Tensor, ...]:
    batch, _, height, width = x.shape
    middle, outputs = pw1_weight.shape[0], pw2_weight.shape[0]
    y = new_image(x, outputs, height, width)
    x = channels_last(x)
    h = torch.empty((batch, middle, height, width), dtype=x.dtype, memory_format=torch.channels_last)
    first = group_statistics(x, num_groups, eps)
    second = new_statistics(x, num_groups)
    if y.numel() == 0:
        for statistic in second:
            statistic.fill_(float("nan"))
        return y, h, *first, *second
    half(
        x,
        h,
        dw1_weight,
        pw1_weight,
        added(batch, middle, shift),
        norm=Norm(num_groups, norm1_weight, norm1_bias, eps),
        statistics=first,
        out_statistics=second,
        out_eps=eps,
    )
    target = torch.empty_like(y, memory_format=torch.channels_last)
    half(
        h,
        target,
        dw2_weight,
        pw2_weight,
        added(batch, outputs, shortcut_bias),
        norm=Norm(num_groups, norm2_weight, norm2_bias, eps),
        statistics=second,
        residual=x if shortcut_weight is None else None,
        skip=None if shortcut_weight is None else (x, shortcut_weight),
    )
    return target if target.stride() == y.stride() else y.copy_(target), h, *first, *second
