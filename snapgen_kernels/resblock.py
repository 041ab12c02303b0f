"""The expanded separable residual block.

Formula, for x [B, C, H, W] and shift [B, M]::

    h = PW1(DW1(SiLU(GN1(x)))) + shift[:, :, None, None]       C -> M
    y = PW2(DW2(SiLU(GN2(h)))) + (x, or conv1x1(x) where C != O)   M -> O

M is the expanded width (paper: twice the wider of C and O). shift is the projected time embedding. Norm statistics are
fp32; convolutions accumulate in fp32 and round to the dtype of x. Kept for the backward: h in channels_last, and mean
and rstd of both norms, [B, G].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from snapgen_kernels import _backend
from snapgen_kernels._library import CostCase, check_groups, check_image, check_shape, register
from snapgen_kernels.group_norm_silu import Norm, new_statistics, statistics
from snapgen_kernels.sepconv import (
    SepConv2d,
    check_separable,
    new_image,
    sepconv,
    unsupported_dtypes,
    unsupported_layout,
)
from snapgen_kernels.sepconv import reference as sepconv_reference

NAME = "resblock"


def _formula(
    half: Callable[..., Tensor],
    x: Tensor,
    shift: Tensor,
    norm1: Norm,
    dw1_weight: Tensor,
    pw1_weight: Tensor,
    norm2: Norm,
    dw2_weight: Tensor,
    pw2_weight: Tensor,
    shortcut_weight: Tensor | None,
    shortcut_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """h and y, each by one call of ``half``."""
    skip = x if shortcut_weight is None else F.conv2d(x, shortcut_weight, shortcut_bias)
    h = half(x, dw1_weight, pw1_weight, norm=norm1, shift=shift)
    return h, half(h, dw2_weight, pw2_weight, norm=norm2, residual=skip)


def _reference_half(
    x: Tensor,
    dw_weight: Tensor,
    pw_weight: Tensor,
    *,
    norm: Norm,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    affine = (norm.weight, norm.bias, shift, residual, norm.num_groups, norm.eps)
    return sepconv_reference(x, dw_weight, pw_weight, None, None, *affine)


def reference(
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
    shortcut_weight: Tensor | None = None,
    shortcut_bias: Tensor | None = None,
    num_groups: int = 32,
    eps: float = 1e-5,
) -> Tensor:
    """The formula in plain PyTorch: [B, C, H, W] -> [B, O, H, W]."""
    norm1, norm2 = Norm(num_groups, norm1_weight, norm1_bias, eps), Norm(num_groups, norm2_weight, norm2_bias, eps)
    weights = (norm1, dw1_weight, pw1_weight, norm2, dw2_weight, pw2_weight, shortcut_weight, shortcut_bias)
    return _formula(_reference_half, x, shift, *weights)[1]


def _reference_with_saved(
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
    norm1, norm2 = Norm(num_groups, norm1_weight, norm1_bias, eps), Norm(num_groups, norm2_weight, norm2_bias, eps)
    weights = (norm1, dw1_weight, pw1_weight, norm2, dw2_weight, pw2_weight, shortcut_weight, shortcut_bias)
    h, y = _formula(_reference_half, x, shift, *weights)
    return y, h.detach(), *statistics(x, num_groups, eps), *statistics(h, num_groups, eps)


def _fake(
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
    y = new_image(x, pw2_weight.shape[0], height, width)
    shape = (batch, pw1_weight.shape[0], height, width)
    h = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    return y, h, *new_statistics(x, num_groups), *new_statistics(x, num_groups)


_WEIGHTS = (
    "norm1_weight",
    "norm1_bias",
    "dw1_weight",
    "pw1_weight",
    "norm2_weight",
    "norm2_bias",
    "dw2_weight",
    "pw2_weight",
)


def _unsupported(
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
    *rest: object,
) -> str | None:
    """None if a fused kernel takes this call, else the reason."""
    if pw1_weight.shape[0] == 0:
        return "pw1_weight has no outputs"
    like_x = (
        ("shift", shift),
        ("dw1_weight", dw1_weight),
        ("pw1_weight", pw1_weight),
        ("dw2_weight", dw2_weight),
        ("pw2_weight", pw2_weight),
        ("shortcut_weight", shortcut_weight),
        ("shortcut_bias", shortcut_bias),
    )
    norms = (
        ("norm1.weight", norm1_weight),
        ("norm1.bias", norm1_bias),
        ("norm2.weight", norm2_weight),
        ("norm2.bias", norm2_bias),
    )
    return unsupported_dtypes(x, like_x, norms)


def _cpu(*arguments: Any) -> tuple[Tensor, ...]:
    from snapgen_kernels._cpu import resblock as kernels

    return kernels.forward(*arguments)


def _cpu_backward(*arguments: Any) -> tuple[Tensor, ...]:
    from snapgen_kernels._cpu import resblock_backward as kernels

    return kernels.backward(*arguments)


def _cuda(*arguments: Any) -> tuple[Tensor, ...]:
    from snapgen_kernels._triton import resblock as kernels

    return kernels.forward(*arguments)


def _cuda_backward(*arguments: Any) -> tuple[Tensor, ...]:
    from snapgen_kernels._triton import resblock_backward as kernels

    return kernels.backward(*arguments)


OP = register(
    NAME,
    "Tensor x, Tensor shift, "
    + "".join(f"Tensor {name}, " for name in _WEIGHTS)
    + "Tensor? shortcut_weight, Tensor? shortcut_bias, int num_groups, float eps",
    outputs=1,
    saved=5,  # h, mean and rstd of norm1, mean and rstd of norm2
    differentiable=("x", "shift", *_WEIGHTS, "shortcut_weight", "shortcut_bias"),
    reference=_reference_with_saved,
    fake=_fake,
    cast=(
        "x",
        "shift",
        "dw1_weight",
        "pw1_weight",
        "dw2_weight",
        "pw2_weight",
        "shortcut_weight",
        "shortcut_bias",
    ),
    kernels=("cpu", "cuda"),
    cpu=_cpu,
    cpu_backward=_cpu_backward,
    cuda=_cuda,
    cuda_backward=_cuda_backward,
    unsupported=_unsupported,
)


def resblock(
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
    """The expanded separable residual block.

    Where the device has no fused kernel of the whole, ``auto`` composes it of two :func:`sepconv`, with ordinary
    autograd.

    Args:
        x: [B, C, H, W]; channels_last is fastest. shift: [B, M].
        norm1: GroupNorm parameters over C. norm2: over M.
        dw1_weight: [C, 1, 3, 3]. pw1_weight: [M, C, 1, 1]. dw2_weight: [M, 1, 3, 3]. pw2_weight: [O, M, 1, 1].
        shortcut_weight: [O, C, 1, 1], needed where C != O. shortcut_bias: [O] or None.

    Returns:
        [B, O, H, W] in the memory format of x.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        FusedUnavailable: under ``use("fused")``, no kernel takes this call.
    """
    check_image(NAME, "x", x)
    batch, channels = x.shape[:2]
    middle = check_separable(NAME, x, ("dw1_weight", dw1_weight), ("pw1_weight", pw1_weight), channels)
    outputs = check_separable(NAME, x, ("dw2_weight", dw2_weight), ("pw2_weight", pw2_weight), middle)
    check_shape(NAME, "shift", shift, (batch, middle), x)
    for name, norm, width_ in (("norm1", norm1, channels), ("norm2", norm2, middle)):
        check_groups(NAME, width_, norm.num_groups)
        check_shape(NAME, f"{name}.weight", norm.weight, (width_,), x)
        check_shape(NAME, f"{name}.bias", norm.bias, (width_,), x)
    check_shape(NAME, "shortcut_weight", shortcut_weight, (outputs, channels, 1, 1), x)
    check_shape(NAME, "shortcut_bias", shortcut_bias, (outputs,), x)
    if shortcut_weight is None and (channels != outputs or shortcut_bias is not None):
        raise ValueError(f"{NAME}: shortcut_weight is None; x has {channels} channels and the output {outputs}")
    first = (norm1.weight, norm1.bias, dw1_weight, pw1_weight)
    second = (norm2.weight, norm2.bias, dw2_weight, pw2_weight)
    tensors = (x, shift, *first, *second, shortcut_weight, shortcut_bias)
    reason = _unsupported(*tensors) or unsupported_layout(x)
    if norm1.num_groups != norm2.num_groups or norm1.eps != norm2.eps:
        reason = "norm1 and norm2 differ in num_groups or eps; the kernel takes one of each"
    if _backend.select(NAME, x.device.type, reason):
        return torch.ops.snapgen.resblock(*tensors, norm1.num_groups, norm1.eps)[0]
    weights = (norm1, dw1_weight, pw1_weight, norm2, dw2_weight, pw2_weight, shortcut_weight, shortcut_bias)
    return _formula(sepconv, x, shift, *weights)[1]


def cost(case: CostCase) -> tuple[int, int]:
    """(FLOPs, fewest bytes) of the forward: x and weights read once, y written once, nothing kept between the
    halves."""
    d = case.dims
    channels, middle, outputs = d["C"], d["M"], d["O"]
    pixels = d["B"] * d["H"] * d["W"]
    weights = channels * (9 + middle) + middle * (9 + outputs) + (channels * outputs if channels != outputs else 0)
    flops = 2 * pixels * weights + 12 * pixels * (channels + middle)
    return flops, (pixels * (channels + outputs) + weights) * case.dtype.itemsize


class SepResBlock(nn.Module):
    """The residual block with its time projection.

    State-dict keys: ``norm1``, ``norm2`` (GroupNorm), ``conv1``, ``conv2`` (:class:`SepConv2d`), ``time_emb_proj``
    (Linear), ``conv_shortcut`` (1x1 Conv2d with bias, only where in_channels != out_channels).

    Args:
        mid_channels: M; None: 2 * max(in_channels, out_channels).
        temb_channels: width of the time embedding.
        num_groups: divides in_channels and mid_channels.
        recompute: where a gradient is asked for, keep the input and the shift alone and compute the block a second time
            in the backward. Less memory for a third more work; gradients are the same to the bit. An attribute of the
            same name: it may be changed at any time, and is no part of the state dict.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        mid_channels: int | None = None,
        temb_channels: int,
        num_groups: int = 32,
        eps: float = 1e-5,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.recompute = recompute
        middle = 2 * max(in_channels, out_channels) if mid_channels is None else mid_channels
        self.norm1 = nn.GroupNorm(num_groups, in_channels, eps=eps)
        self.conv1 = SepConv2d(in_channels, middle)
        self.time_emb_proj = nn.Linear(temb_channels, middle)
        self.norm2 = nn.GroupNorm(num_groups, middle, eps=eps)
        self.conv2 = SepConv2d(middle, out_channels)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        """x [B, C, H, W], temb [B, temb_channels] (SiLU is applied here) -> [B, O, H, W]."""
        shift = self.time_emb_proj(F.silu(temb))
        # torch.func keeps intermediates its own way and refuses the hooks that recomputing needs.
        if self.recompute and torch.is_grad_enabled() and not torch._C._are_functorch_transforms_active():
            # Nothing here is random.
            return checkpoint(self._block, x, shift, use_reentrant=False, preserve_rng_state=False)
        return self._block(x, shift)

    def _block(self, x: Tensor, shift: Tensor) -> Tensor:
        shortcut = self.conv_shortcut
        return resblock(
            x,
            shift,
            Norm(self.norm1.num_groups, self.norm1.weight, self.norm1.bias, self.norm1.eps),
            self.conv1.depthwise.weight,
            self.conv1.pointwise.weight,
            Norm(self.norm2.num_groups, self.norm2.weight, self.norm2.bias, self.norm2.eps),
            self.conv2.depthwise.weight,
            self.conv2.pointwise.weight,
            shortcut_weight=None if shortcut is None else shortcut.weight,
            shortcut_bias=None if shortcut is None else shortcut.bias,
        )
