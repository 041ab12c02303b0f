"""The separable convolution's forward on the CPU: layouts, statistics, and the C++ sweep over rows.

There is one path. The other candidate, the depthwise image in memory and one large product of oneDNN or MKL, was left
out: its results depend on the number of threads (bf16 [1024, 896] x [896, 1792] and fp32 [64, 1792] x [1792, 896]
differ between 1 and 2), and sums here may not. docs/benchmarks.md tells where that costs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from snapgen_kernels._cpu import packed
from snapgen_kernels.group_norm_silu import Norm, new_statistics
from snapgen_kernels.sepconv import is_channels_last, new_image, no_statistics, output_size


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def group_statistics(x: Tensor, num_groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and rstd [B, G] of a dense x."""
    mean, rstd = new_statistics(x, num_groups)
    torch.ops.snapgen_cpu.group_statistics(x, num_groups, eps, mean, rstd)
    return mean, rstd


def added(batch: int, outputs: int, *terms: Tensor | None) -> Tensor:
    """The sum of biases ([O]) and shifts ([B, O]) as [B, O] in fp32."""
    total = torch.zeros(batch, outputs)
    for term in terms:
        if term is not None:
            total += term
    return total


def half(
    x: Tensor,
    y: Tensor,
    dw_weight: Tensor,
    pw_weight: Tensor,
    add: Tensor,
    *,
    dw_bias: Tensor | None = None,
    norm: Norm | None = None,
    statistics: tuple[Tensor, Tensor] | None = None,
    residual: Tensor | None = None,
    skip: tuple[Tensor, Tensor] | None = None,
    stride: int = 1,
    upsample: bool = False,
    out_statistics: tuple[Tensor, Tensor] | None = None,
    out_eps: float = 0.0,
) -> None:
    """One separable convolution of x into y, neither empty; images are channels_last.

    Args:
        add: [B, O] in fp32, added to every pixel.
        statistics: mean and rstd of ``norm``.
        skip: an image and a weight [O, S, 1, 1]: their 1x1 convolution is added.
        out_statistics: receives mean and rstd of y's groups.
    """
    mean, rstd = (None, None) if statistics is None else statistics
    out_mean, out_rstd = (None, None) if out_statistics is None else out_statistics
    torch.ops.snapgen_cpu.sepconv(
        x,
        dw_weight,
        dw_bias,
        packed(pw_weight, "b"),
        add,
        mean,
        rstd,
        None if norm is None else norm.weight,
        None if norm is None else norm.bias,
        residual,
        None if skip is None else skip[0],
        None if skip is None else packed(skip[1], "b"),
        stride,
        upsample,
        y,
        out_mean,
        out_rstd,
        out_eps,
    )


def forward(
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
) -> tuple[Tensor, Tensor, Tensor]:
    batch, outputs = x.shape[0], pw_weight.shape[0]
    y = new_image(x, outputs, *output_size(x.shape[2], x.shape[3], stride, upsample))
    normed = norm_weight is not None and norm_bias is not None
    x = channels_last(x)
    mean, rstd = group_statistics(x, num_groups, eps) if normed else no_statistics(x)
    if y.numel() == 0:
        return y, mean, rstd
    target = y if is_channels_last(y) else torch.empty_like(y, memory_format=torch.channels_last)
    torch.ops.snapgen_cpu.huge_pages(target)
    half(
        x,
        target,
        dw_weight,
        pw_weight,
        added(batch, outputs, pw_bias, shift),
        dw_bias=dw_bias,
        norm=Norm(num_groups, norm_weight, norm_bias, eps)
        if norm_weight is not None and norm_bias is not None
        else None,
        statistics=(mean, rstd) if normed else None,
        residual=None if residual is None else channels_last(residual),
        stride=stride,
        upsample=upsample,
    )
    return y if target is y else y.copy_(target), mean, rstd
