"""What a decoder's inference adds to its ops: blocks that tell the next norm its statistics and, on a CPU, write over
their input; and its last layer.

Both functions compute without gradients and follow the mode of :func:`snapgen_kernels.use` as ops do. They are no
registered ops: under autocast and torch.compile they are the block's op and a convolution after
:func:`group_norm_silu`.

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
from snapgen_kernels._library import check_groups, check_image, check_shape, on_its_device
from snapgen_kernels.decoder_block import DecoderBlock, check
from snapgen_kernels.decoder_block import _unsupported as _block_unsupported
from snapgen_kernels.group_norm_silu import Norm, group_norm_silu
from snapgen_kernels.group_norm_silu import reference as group_norm_silu_reference
from snapgen_kernels.sepconv import unsupported_dtypes, unsupported_layout

NAME = "norm_silu_conv"
_backend.KERNELS[NAME] = ("cpu", "cuda")
MAX_OUTPUTS = 3  # of the GPU's kernel: all taps of them are one product's columns
Progress = Callable[[float], None]
Statistics = tuple[Tensor, Tensor]


def reference(x: Tensor, norm: Norm, weight: Tensor, bias: Tensor) -> Tensor:
    """The formula in plain PyTorch: [B, C, H, W] -> [B, O, H, W]."""
    return F.conv2d(group_norm_silu_reference(x, *norm), weight, bias, padding=1)


def _unsupported(x: Tensor, norm: Norm, weight: Tensor, bias: Tensor) -> str | None:
    norms = (("norm.weight", norm.weight), ("norm.bias", norm.bias))
    reason = unsupported_dtypes(x, (("weight", weight), ("bias", bias)), norms) or _indirect(x)
    if reason is None and x.device.type == "cuda" and weight.shape[0] > MAX_OUTPUTS:
        reason = f"weight has {weight.shape[0]} outputs; the GPU kernel takes up to {MAX_OUTPUTS}"
    return reason


def _indirect(x: Tensor) -> str | None:
    """None where kernels may be called on tensors as they are, else the reason."""
    if torch.compiler.is_compiling():
        return "called under torch.compile"
    casts = torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type)
    return "called under autocast" if casts else None


def runs_directly(x: Tensor) -> bool:
    """True where :func:`apply_block` has kernels for the device of ``x``, and they may be used: no gradient is
    recorded, nothing is traced or cast."""
    if torch.is_grad_enabled() or _backend.is_reference() or _indirect(x) is not None:
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

    The GPU's kernel takes x in channels_last, and up to three outputs.

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
    for name, known in zip(("mean", "rstd"), statistics or (), strict=False):
        check_shape(NAME, f"statistics: {name}", known, (x.shape[0], norm.num_groups), x)
        if known.dtype != torch.float32:
            raise TypeError(f"{NAME}: statistics: {name} has dtype {known.dtype}; expected torch.float32")
    if _backend.select(NAME, x.device.type, _unsupported(x, norm, weight, bias) or unsupported_layout(x)):
        return _kernels(x.device.type)[1](x, norm, weight, bias, statistics)
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
    """``block(x)`` without gradients, on a CPU in x's own memory where the kernel can: x must not be used again.

    Args:
        memory: bytes that the call may take beside x, None: any. Less than the middle image needs: that is computed
            twice.
        next_norm: a norm that follows on y.
        progress: called with the share of the work that is done; on a GPU once, when all of it is queued.

    Returns:
        y, and mean and rstd of y's groups if ``next_norm`` is given and the kernel had them at hand.
    """
    weights, num_groups, eps = block.weights(), block.norm.num_groups, block.norm.eps
    check(x, weights, num_groups)
    reason = _block_unsupported(x, weights) or unsupported_layout(x)
    # Otherwise the block's op decides for itself.
    if _indirect(x) is None and _backend.select("decoder_block", x.device.type, reason):
        following = None if next_norm is None else (next_norm.num_groups, next_norm.eps)
        return _kernels(x.device.type)[0](x, weights, num_groups, eps, memory, following, progress)
    middle = x[:, :1].numel() * block.depthwise2.out_channels * x.element_size()
    return block(x, low_memory=memory is not None and memory < middle), None


def _kernels(device_type: str) -> tuple[Callable[..., tuple[Tensor, Statistics | None]], Callable[..., Tensor]]:
    """The launchers of both functions."""
    if device_type == "cpu":
        from snapgen_kernels._cpu import decoder_block as cpu

        return cpu.inplace, cpu.norm_conv
    from snapgen_kernels._triton import decoder_block, norm_conv

    return (
        on_its_device("snapgen::decoder_block", decoder_block.apply),
        on_its_device(f"snapgen::{NAME}", norm_conv.norm_conv),
    )
