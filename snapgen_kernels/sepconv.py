"""Separable convolution: depthwise 3x3, then pointwise 1x1, with what stands around them in a residual block.

Formula, for x [B, C, H, W]::

    a = SiLU(GroupNorm(x))           where norm is given (else a = x)
    a = nearest 2x of a              where upsample
    d = depthwise3x3(a, stride, padding 1) + dw_bias
    y = pointwise(d) + pw_bias + shift[:, :, None, None] + residual

The norm's statistics are fp32; convolutions accumulate in fp32 and round to the dtype of x. Kept for the backward: mean
and rstd of the norm, [B, G]; two empty tensors where there is no norm. SnapGen uses it for the halves of its expanded
separable residual blocks and for its samplers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snapgen_kernels import _backend
from snapgen_kernels._library import CostCase, check_groups, check_image, check_shape, dtype_seen, register
from snapgen_kernels.group_norm_silu import Norm, compute_dtype, group_norm_silu, new_statistics, statistics
from snapgen_kernels.group_norm_silu import reference as group_norm_silu_reference

NAME = "sepconv"


def _formula(
    norm_silu: Callable[[Tensor, int, Tensor, Tensor, float], Tensor],
    x: Tensor,
    dw_weight: Tensor,
    pw_weight: Tensor,
    dw_bias: Tensor | None,
    pw_bias: Tensor | None,
    norm: Norm | None,
    shift: Tensor | None,
    residual: Tensor | None,
    stride: int,
    upsample: bool,
) -> Tensor:
    a = x if norm is None else norm_silu(x, norm.num_groups, norm.weight, norm.bias, norm.eps)
    if upsample:
        a = F.interpolate(a, scale_factor=2.0, mode="nearest")
    d = F.conv2d(a, dw_weight, dw_bias, stride=stride, padding=1, groups=dw_weight.shape[0])
    y = F.conv2d(d, pw_weight, pw_bias)
    if shift is not None:
        y = y + shift[:, :, None, None]
    return y if residual is None else y + residual


def reference(
    x: Tensor,
    dw_weight: Tensor,
    pw_weight: Tensor,
    dw_bias: Tensor | None = None,
    pw_bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    num_groups: int = 1,
    eps: float = 1e-5,
    stride: int = 1,
    upsample: bool = False,
) -> Tensor:
    """The formula in plain PyTorch: [B, C, H, W] -> [B, O, H', W']."""
    norm = None if norm_weight is None or norm_bias is None else Norm(num_groups, norm_weight, norm_bias, eps)
    return _formula(
        group_norm_silu_reference, x, dw_weight, pw_weight, dw_bias, pw_bias, norm, shift, residual, stride, upsample
    )


def _reference_with_statistics(
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
    y = reference(
        x,
        dw_weight,
        pw_weight,
        dw_bias,
        pw_bias,
        norm_weight,
        norm_bias,
        shift,
        residual,
        num_groups,
        eps,
        stride,
        upsample,
    )
    return y, *(no_statistics(x) if norm_weight is None else statistics(x, num_groups, eps))


def no_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """What stands for mean and rstd where there is no norm."""
    return x.new_empty(0, dtype=compute_dtype(x)), x.new_empty(0, dtype=compute_dtype(x))


def output_size(height: int, width: int, stride: int, upsample: bool) -> tuple[int, int]:
    """Height and width after the depthwise convolution (3x3, padding 1)."""
    scale = 2 if upsample else 1
    return (height * scale - 1) // stride + 1, (width * scale - 1) // stride + 1


def is_channels_last(x: Tensor) -> bool:
    """True if convolutions give a channels_last output for ``x``."""
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def new_image(x: Tensor, channels: int, height: int, width: int) -> Tensor:
    """An uninitialised [B, channels, height, width] in the dtype and memory format of ``x``."""
    memory_format = torch.channels_last if is_channels_last(x) else torch.contiguous_format
    return torch.empty(
        (x.shape[0], channels, height, width), dtype=x.dtype, device=x.device, memory_format=memory_format
    )


def _fake(
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
    y = new_image(x, pw_weight.shape[0], *output_size(x.shape[2], x.shape[3], stride, upsample))
    return y, *(no_statistics(x) if norm_weight is None else new_statistics(x, num_groups))


def _unsupported(
    x: Tensor,
    dw_weight: Tensor,
    pw_weight: Tensor,
    dw_bias: Tensor | None,
    pw_bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    *rest: object,
) -> str | None:
    """None if a fused kernel takes this call, else the reason."""
    like_x = (
        ("dw_weight", dw_weight),
        ("pw_weight", pw_weight),
        ("dw_bias", dw_bias),
        ("pw_bias", pw_bias),
        ("shift", shift),
        ("residual", residual),
    )
    return unsupported_dtypes(x, like_x, (("norm.weight", norm_weight), ("norm.bias", norm_bias)))


_DTYPES = {
    "cpu": (torch.float32, torch.bfloat16),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}


def unsupported_dtypes(
    x: Tensor, like_x: Iterable[tuple[str, Tensor | None]], norms: Iterable[tuple[str, Tensor | None]]
) -> str | None:
    """None if the kernels of this device take these dtypes: that of x throughout, norms also in fp32; else the
    reason."""
    dtype, allowed = dtype_seen(x), _DTYPES.get(x.device.type, ())
    if dtype not in allowed:
        return (
            f"x has dtype {dtype} on {x.device.type}; the kernels take {', '.join(map(str, allowed)) or 'none there'}"
        )
    if x.shape[1] == 0:
        return "x has no channels"
    for name, tensor in like_x:
        if tensor is not None and dtype_seen(tensor) != dtype:
            return f"{name} has dtype {tensor.dtype}; the kernels take that of x, {dtype}"
    for name, tensor in norms:
        if tensor is not None and tensor.dtype not in (torch.float32, dtype):
            return f"{name} has dtype {tensor.dtype}; the kernels take float32 or the dtype of x, {dtype}"
    return None


def unsupported_layout(x: Tensor) -> str | None:
    """None if the kernels of this device are worth calling for the memory format of x, else the reason."""
    if x.device.type != "cuda" or x.is_contiguous(memory_format=torch.channels_last):
        return None
    return (
        f"x is not channels_last (shape {tuple(x.shape)}, strides {x.stride()}), which the GPU kernels need: "
        "x.to(memory_format=torch.channels_last), once for the whole network"
    )


def _cpu(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    from snapgen_kernels._cpu import sepconv as kernels

    return kernels.forward(*arguments)


def _cpu_backward(*arguments: Any) -> tuple[Tensor, ...]:
    from snapgen_kernels._cpu import sepconv_backward as kernels

    return kernels.backward(*arguments)


def _cuda(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    from snapgen_kernels._triton import sepconv as kernels

    return kernels.forward(*arguments)


def _cuda_backward(*arguments: Any) -> tuple[Tensor, ...]:
    from snapgen_kernels._triton import sepconv_backward as kernels

    return kernels.backward(*arguments)


OP = register(
    NAME,
    "Tensor x, Tensor dw_weight, Tensor pw_weight, Tensor? dw_bias, Tensor? pw_bias, "
    "Tensor? norm_weight, Tensor? norm_bias, Tensor? shift, Tensor? residual, "
    "int num_groups, float eps, int stride, bool upsample",
    outputs=1,
    saved=2,  # mean and rstd
    differentiable=(
        "x",
        "dw_weight",
        "pw_weight",
        "dw_bias",
        "pw_bias",
        "norm_weight",
        "norm_bias",
        "shift",
        "residual",
    ),
    reference=_reference_with_statistics,
    fake=_fake,
    cast=("x", "dw_weight", "pw_weight", "dw_bias", "pw_bias", "shift", "residual"),
    kernels=("cpu", "cuda"),
    cpu=_cpu,
    cpu_backward=_cpu_backward,
    cuda=_cuda,
    cuda_backward=_cuda_backward,
    unsupported=_unsupported,
)


def check_separable(op: str, x: Tensor, dw: tuple[str, Tensor], pw: tuple[str, Tensor], channels: int) -> int:
    """Raise unless the depthwise and pointwise weights fit ``channels`` inputs; return the number of outputs."""
    check_shape(op, dw[0], dw[1], (channels, 1, 3, 3), x)
    if pw[1].dim() != 4:
        raise ValueError(f"{op}: {pw[0]} has shape {tuple(pw[1].shape)}; expected [O, {channels}, 1, 1]")
    check_shape(op, pw[0], pw[1], (pw[1].shape[0], channels, 1, 1), x)
    return pw[1].shape[0]


def sepconv(
    x: Tensor,
    dw_weight: Tensor,
    pw_weight: Tensor,
    *,
    dw_bias: Tensor | None = None,
    pw_bias: Tensor | None = None,
    norm: Norm | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    stride: int = 1,
    upsample: bool = False,
) -> Tensor:
    """Separable convolution with optional norm + SiLU before it and time shift and residual after it.

    Where the device has no fused kernel of the whole, ``auto`` composes it of PyTorch's convolutions and
    :func:`group_norm_silu`, with ordinary autograd: nothing is recomputed in the backward.

    Args:
        x: [B, C, H, W]; channels_last is fastest.
        dw_weight: [C, 1, 3, 3]. pw_weight: [O, C, 1, 1].
        dw_bias: [C] or None. pw_bias: [O] or None.
        norm: parameters of GroupNorm + SiLU on x, or None.
        shift: [B, O], added to every pixel, or None.
        residual: [B, O, H', W'], added last, or None.
        stride: 1 or 2, of the depthwise convolution.
        upsample: nearest 2x before the depthwise convolution.

    Returns:
        [B, O, H', W'] with H' = (H * (2 if upsample else 1) - 1) // stride + 1, in the memory format of x.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        FusedUnavailable: under ``use("fused")``, no kernel takes this call.
    """
    check_image(NAME, "x", x)
    batch, channels, height, width = x.shape
    outputs = check_separable(NAME, x, ("dw_weight", dw_weight), ("pw_weight", pw_weight), channels)
    check_shape(NAME, "dw_bias", dw_bias, (channels,), x)
    check_shape(NAME, "pw_bias", pw_bias, (outputs,), x)
    check_shape(NAME, "shift", shift, (batch, outputs), x)
    if stride not in (1, 2):
        raise ValueError(f"{NAME}: stride is {stride!r}; allowed: 1, 2")
    check_shape(NAME, "residual", residual, (batch, outputs, *output_size(height, width, stride, upsample)), x)
    if norm is not None:
        check_groups(NAME, channels, norm.num_groups)
        check_shape(NAME, "norm.weight", norm.weight, (channels,), x)
        check_shape(NAME, "norm.bias", norm.bias, (channels,), x)
    norm_weight, norm_bias, num_groups, eps = (
        (None, None, 1, 1e-5) if norm is None else (norm[1], norm[2], norm[0], norm[3])
    )
    tensors = (x, dw_weight, pw_weight, dw_bias, pw_bias, norm_weight, norm_bias, shift, residual)
    if _backend.select(NAME, x.device.type, _unsupported(*tensors) or unsupported_layout(x)):
        return torch.ops.snapgen.sepconv(*tensors, num_groups, eps, stride, upsample)[0]
    return _formula(group_norm_silu, x, dw_weight, pw_weight, dw_bias, pw_bias, norm, shift, residual, stride, upsample)


def cost(case: CostCase) -> tuple[int, int]:
    """(FLOPs, fewest bytes) of the forward: x, weights and residual read once, y written once."""
    d = case.dims
    height, width = output_size(d["H"], d["W"], d.get("stride", 1), bool(d.get("upsample", 0)))
    inputs, pixels = d["B"] * d["C"] * d["H"] * d["W"], d["B"] * height * width
    flops = 2 * pixels * d["C"] * (9 + d["O"]) + (12 * inputs if d.get("G") else 0)
    images = inputs + pixels * d["O"] * (2 if d.get("residual") else 1)
    return flops, (images + d["C"] * (9 + d["O"])) * case.dtype.itemsize


class SepConv2d(nn.Module):
    """Depthwise 3x3 and pointwise 1x1 convolution; state-dict keys ``depthwise.*`` and ``pointwise.*`` (two nn.Conv2d).

    Args:
        in_channels, out_channels: C and O.
        stride: 1 or 2. upsample: nearest 2x first.
        dw_bias, pw_bias: whether the convolutions have a bias.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        stride: int = 1,
        upsample: bool = False,
        dw_bias: bool = False,
        pw_bias: bool = False,
    ) -> None:
        super().__init__()
        if stride not in (1, 2):
            raise ValueError(f"SepConv2d: stride is {stride!r}; allowed: 1, 2")
        self.stride, self.upsample = stride, upsample
        self.depthwise = nn.Conv2d(
            in_channels, in_channels, 3, stride=stride, padding=1, groups=in_channels, bias=dw_bias
        )
        self.pointwise = nn.Conv2d(in_channels, out_channels, 1, bias=pw_bias)

    def forward(
        self, x: Tensor, *, norm: Norm | None = None, shift: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """[B, C, H, W] -> [B, O, H', W']; see :func:`sepconv`."""
        return sepconv(
            x,
            self.depthwise.weight,
            self.pointwise.weight,
            dw_bias=self.depthwise.bias,
            pw_bias=self.pointwise.bias,
            norm=norm,
            shift=shift,
            residual=residual,
            stride=self.stride,
            upsample=self.upsample,
        )
