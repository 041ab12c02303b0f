"""What a decoder's inference adds to its ops: blocks that write over their input, and its last layer.

Both functions compute without gradients and follow the mode of :func:`snapgen_kernels.use` as ops do. Their own kernels
are the CPU's; elsewhere the first is the block's op, and the second a convolution after :func:`group_norm_silu`.

Formula of :func:`norm_silu_conv`, for x [B, C, H, W] and few outputs::

    y = conv3x3(SiLU(GroupNorm(x)), weight) + bias        padding 1

Statistics are fp32, sums are fp32, y is rounded once; the normalised image is never stored.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from snapgen_kernels import _backend
from snapgen_kernels._library import check_groups, check_image, check_shape
from snapgen_kernels.decoder_block import DecoderBlock
from snapgen_kernels.decoder_block import _unsupported as _block_unsupported
from snapgen_kernels.group_norm_silu import Norm, group_norm_silu
from snapgen_kernels.group_norm_silu import reference as group_norm_silu_reference

NAME = "norm_silu_conv"
Progress = Callable[[float], None]
Statistics = tuple[Tensor, Tensor]


def reference(x: Tensor, norm: Norm, weight: Tensor, bias: Tensor) -> Tensor:
    """The formula in plain PyTorch: [B, C, H, W] -> [B, O, H, W]."""
    return F.conv2d(group_norm_silu_reference(x, *norm), weight, bias, padding=1)


def _unsupported(x: Tensor, norm: Norm, weight: Tensor, bias: Tensor) -> str | None:
    if x.dtype not in (torch.float32, torch.bfloat16):
        return f"x has dtype {x.dtype}; the kernels take float32 and bfloat16"
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor.dtype != x.dtype:
            return f"{name} has dtype {tensor.dtype}; expected that of x, {x.dtype}"
    for name, tensor in (("norm.weight", norm.weight), ("norm.bias", norm.bias)):
        if tensor.dtype not in (torch.float32, x.dtype):
            return f"{name} has dtype {tensor.dtype}; the kernels take float32 or the dtype of x ({x.dtype})"
    return None


def runs_in_place(x: Tensor) -> bool:
    """True where :func:`apply_block` is a kernel of its own, on a CPU, and may be used: no gradient is recorded and
    nothing is traced."""
    if x.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling() or _backend.is_reference():
        return False
    return _backend.missing_kernel("decoder_block", x.device.type) is None


@torch.no_grad()
def norm_silu_conv(
    x: Tensor, norm: Norm, weight: Tensor, bias: Tensor, *, statistics: Statistics | None = None
) -> Tensor:
    """GroupNorm, SiLU and a dense 3x3 convolution to a few channels, without gradients.

    Args:
        x: [B, C, H, W]; channels_last is fastest.
        norm: parameters of the norm, [C].
        weight: [O, C, 3, 3]. bias: [O].
        statistics: mean and rstd of x's groups, [B, G] in fp32, where the caller has them.

    Returns:
        [B, O, H, W]; channels_last where the kernel runs.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        FusedUnavailable: under ``use("fused")``, no kernel takes this call.
    """
    check_image(NAME, "x", x)
    channels = x.shape[1]
    check_groups(NAME, channels, norm.num_groups)
    check_shape(NAME, "norm.weight", norm.weight, (channels,), x)
    check_shape(NAME, "norm.bias", norm.bias, (channels,), x)
    check_shape(NAME, "weight", weight, (weight.shape[0], channels, 3, 3), x)
    check_shape(NAME, "bias", bias, (weight.shape[0],), x)
    on_cpu = x.device.type == "cpu"
    if on_cpu and _backend.select("decoder_block", x.device.type, _unsupported(x, norm, weight, bias)):
        from snapgen_kernels._cpu import decoder_block as kernels

        return kernels.norm_conv(x, norm, weight, bias, statistics)
    return F.conv2d(group_norm_silu(x, *norm), weight, bias, padding=1)


@torch.no_grad()
def apply_block(
    block: DecoderBlock,
    x: Tensor,
    *,
    memory: int | None = None,
    next_norm: Norm | None = None,
    progress: Progress | None = None,
) -> tuple[Tensor, Statistics | None]:
    """``block(x)`` without gradients, in x's own memory where the kernel can: x must not be used again.

    Args:
        memory: bytes that the call may take beside x, None: any. Less than the middle image needs: that is computed
            twice.
        next_norm: a norm that follows on y.
        progress: called with the share of the work that is done.

    Returns:
        y, and mean and rstd of y's groups if ``next_norm`` is given and the kernel had them at hand.
    """
    if x.device.type != "cpu":
        middle = x[:, :1].numel() * block.depthwise2.out_channels * x.element_size()
        return block(x, low_memory=memory is not None and memory < middle), None
    if _backend.select("decoder_block", x.device.type, _block_unsupported(x, block.weights())):
        from snapgen_kernels._cpu import decoder_block as kernels

        groups = None if next_norm is None else (next_norm.num_groups, next_norm.eps)
        return kernels.inplace(x, block.weights(), block.norm.num_groups, block.norm.eps, memory, groups, progress)
    return block(x), None
