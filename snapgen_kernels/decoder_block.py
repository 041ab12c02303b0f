"""The block of the tiny decoder: expanded separable convolutions with one GroupNorm.

Formula, for x [B, C, H, W] and expansion e::

    y = x + PW2(SiLU(GN(DW2(PW1(DW1(x))))))        C -> C -> eC -> eC -> C

DW1 and DW2 are depthwise 3x3 with bias, PW1 and PW2 pointwise without. Norm statistics are fp32; convolutions
accumulate in fp32 and round to the dtype of x.

GroupNorm's statistics split the block into two sweeps over the image, and the middle image DW2(...) either waits in
memory for the second sweep or is computed twice, in bands of rows (``low_memory``). Kept for the backward: the middle
image, where ``keep_middle`` asks for it (else an empty tensor), and the norm's mean and rstd, [B, G].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snapgen_kernels import _backend
from snapgen_kernels._library import CostCase, check_groups, check_image, check_shape, register
from snapgen_kernels.group_norm_silu import group_norm_silu, new_statistics, statistics
from snapgen_kernels.group_norm_silu import reference as group_norm_silu_reference
from snapgen_kernels.sepconv import check_separable, new_image, unsupported_dtypes, unsupported_layout

NAME = "decoder_block"


class Weights(NamedTuple):
    """The parameters of a block, in the order of the op's arguments."""

    dw1_weight: Tensor
    dw1_bias: Tensor
    pw1_weight: Tensor
    dw2_weight: Tensor
    dw2_bias: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    pw2_weight: Tensor


def _middle(
    x: Tensor, dw1_weight: Tensor, dw1_bias: Tensor, pw1_weight: Tensor, dw2_weight: Tensor, dw2_bias: Tensor
) -> Tensor:
    h = F.conv2d(x, dw1_weight, dw1_bias, padding=1, groups=dw1_weight.shape[0])
    h = F.conv2d(h, pw1_weight)
    return F.conv2d(h, dw2_weight, dw2_bias, padding=1, groups=dw2_weight.shape[0])


def _formula(
    norm_silu: Callable[[Tensor, int, Tensor, Tensor, float], Tensor],
    x: Tensor,
    dw1_weight: Tensor,
    dw1_bias: Tensor,
    pw1_weight: Tensor,
    dw2_weight: Tensor,
    dw2_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    pw2_weight: Tensor,
    num_groups: int,
    eps: float,
) -> Tensor:
    h = _middle(x, dw1_weight, dw1_bias, pw1_weight, dw2_weight, dw2_bias)
    return x + F.conv2d(norm_silu(h, num_groups, norm_weight, norm_bias, eps), pw2_weight)


def reference(
    x: Tensor,
    dw1_weight: Tensor,
    dw1_bias: Tensor,
    pw1_weight: Tensor,
    dw2_weight: Tensor,
    dw2_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    pw2_weight: Tensor,
    num_groups: int,
    eps: float = 1e-6,
    low_memory: bool = False,
    keep_middle: bool = False,
) -> Tensor:
    """The formula in plain PyTorch: [B, C, H, W] -> [B, C, H, W]. The last two arguments change nothing here."""
    return _formula(
        group_norm_silu_reference,
        x,
        dw1_weight,
        dw1_bias,
        pw1_weight,
        dw2_weight,
        dw2_bias,
        norm_weight,
        norm_bias,
        pw2_weight,
        num_groups,
        eps,
    )


def _reference_with_saved(
    x: Tensor,
    dw1_weight: Tensor,
    dw1_bias: Tensor,
    pw1_weight: Tensor,
    dw2_weight: Tensor,
    dw2_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    pw2_weight: Tensor,
    num_groups: int,
    eps: float,
    low_memory: bool,
    keep_middle: bool,
) -> tuple[Tensor, ...]:
    h = _middle(x, dw1_weight, dw1_bias, pw1_weight, dw2_weight, dw2_bias)
    y = x + F.conv2d(group_norm_silu_reference(h, num_groups, norm_weight, norm_bias, eps), pw2_weight)
    return y, h.detach() if keep_middle else x.new_empty(0), *statistics(h, num_groups, eps)


def new_outputs(x: Tensor, middle: int, num_groups: int, keep_middle: bool) -> tuple[Tensor, ...]:
    """Uninitialised outputs of the registered op: y, the middle image or an empty tensor, mean, rstd."""
    channels, height, width = x.shape[1:]
    h = new_image(x, middle, height, width) if keep_middle else x.new_empty(0)
    return new_image(x, channels, height, width), h, *new_statistics(x, num_groups)


def _fake(
    x: Tensor,
    dw1_weight: Tensor,
    dw1_bias: Tensor,
    pw1_weight: Tensor,
    dw2_weight: Tensor,
    dw2_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    pw2_weight: Tensor,
    num_groups: int,
    eps: float,
    low_memory: bool,
    keep_middle: bool,
) -> tuple[Tensor, ...]:
    return new_outputs(x, dw2_bias.shape[0], num_groups, keep_middle)


def _cpu(*args: Any) -> tuple[Tensor, ...]:
    from snapgen_kernels._cpu import decoder_block as kernels

    return kernels.forward(*args)


def _cpu_backward(*args: Any) -> tuple[Tensor, ...]:
    from snapgen_kernels._cpu import decoder_block as kernels

    return kernels.backward(*args)


def _cuda(*args: Any) -> tuple[Tensor, ...]:
    from snapgen_kernels._triton import decoder_block as kernels

    return kernels.forward(*args)


def _cuda_backward(*args: Any) -> tuple[Tensor, ...]:
    from snapgen_kernels._triton import decoder_block_backward as kernels

    return kernels.backward(*args)


_WEIGHTS = Weights._fields


def _unsupported(x: Tensor, weights: Sequence[Tensor]) -> str | None:
    """None if a fused kernel takes this call, else the reason."""
    named = Weights(*weights)
    if named.pw1_weight.shape[0] == 0:
        return "pw1_weight has no outputs"
    like_x = [pair for pair in zip(_WEIGHTS, named, strict=True) if not pair[0].startswith("norm")]
    return unsupported_dtypes(x, like_x, (("norm_weight", named.norm_weight), ("norm_bias", named.norm_bias)))


def _call_unsupported(*args: Any) -> str | None:
    return _unsupported(args[0], args[1 : 1 + len(_WEIGHTS)])


OP = register(
    NAME,
    "Tensor x, "
    + "".join(f"Tensor {name}, " for name in _WEIGHTS)
    + "int num_groups, float eps, bool low_memory, bool keep_middle",
    outputs=1,
    saved=3,  # h or nothing, mean and rstd
    differentiable=("x", *_WEIGHTS),
    reference=_reference_with_saved,
    fake=_fake,
    kernels=("cpu", "cuda"),
    cpu=_cpu,
    cpu_backward=_cpu_backward,
    cuda=_cuda,
    cuda_backward=_cuda_backward,
    unsupported=_call_unsupported,
    cast=("x", "dw1_weight", "dw1_bias", "pw1_weight", "dw2_weight", "dw2_bias", "pw2_weight"),
)


def check(x: Tensor, weights: Weights, num_groups: int) -> None:
    """Raise unless the weights are those of a block for x [B, C, H, W]."""
    check_image(NAME, "x", x)
    channels = x.shape[1]
    depthwise, pointwise = ("dw1_weight", weights.dw1_weight), ("pw1_weight", weights.pw1_weight)
    middle = check_separable(NAME, x, depthwise, pointwise, channels)
    check_shape(NAME, "dw1_bias", weights.dw1_bias, (channels,), x)
    check_shape(NAME, "dw2_weight", weights.dw2_weight, (middle, 1, 3, 3), x)
    check_shape(NAME, "pw2_weight", weights.pw2_weight, (channels, middle, 1, 1), x)
    check_groups(NAME, middle, num_groups)
    for name in ("dw2_bias", "norm_weight", "norm_bias"):
        check_shape(NAME, name, getattr(weights, name), (middle,), x)


def decoder_block(
    x: Tensor,
    dw1_weight: Tensor,
    dw1_bias: Tensor,
    pw1_weight: Tensor,
    dw2_weight: Tensor,
    dw2_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    pw2_weight: Tensor,
    num_groups: int,
    eps: float = 1e-6,
    *,
    low_memory: bool = False,
) -> Tensor:
    """The tiny decoder's block.

    Where the device has no fused kernel of the whole, ``auto`` composes it of PyTorch's convolutions and
    :func:`group_norm_silu`, with ordinary autograd: nothing is recomputed in the backward.

    Args:
        x: [B, C, H, W]; channels_last is fastest.
        dw1_weight: [C, 1, 3, 3]. dw1_bias: [C]. pw1_weight: [M, C, 1, 1]. dw2_weight: [M, 1, 3, 3]. dw2_bias: [M].
        norm_weight, norm_bias: [M]. pw2_weight: [C, M, 1, 1].
        num_groups: divides M.
        low_memory: hold no middle image [B, M, H, W], but compute it twice, and once more in the backward.

    Returns:
        [B, C, H, W] in the memory format of x.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        FusedUnavailable: under ``use("fused")``, no kernel takes this call.
    """
    weights = Weights(dw1_weight, dw1_bias, pw1_weight, dw2_weight, dw2_bias, norm_weight, norm_bias, pw2_weight)
    check(x, weights, num_groups)
    if _backend.select(NAME, x.device.type, _unsupported(x, weights) or unsupported_layout(x)):
        trained = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *weights))
        keep_middle = trained and not low_memory
        return torch.ops.snapgen.decoder_block(x, *weights, num_groups, eps, low_memory, keep_middle)[0]
    return _formula(group_norm_silu, x, *weights, num_groups, eps)


def cost(case: CostCase) -> tuple[int, int]:
    """(FLOPs, fewest bytes) of the forward: x and weights read once, y written once, the middle never stored."""
    d = case.dims
    channels, middle, pixels = d["C"], d["M"], d["B"] * d["H"] * d["W"]
    weights = channels * (9 + middle) + middle * (9 + channels)
    return 2 * pixels * weights + 12 * pixels * middle, (2 * pixels * channels + weights) * case.dtype.itemsize


class DecoderBlock(nn.Module):
    """:func:`decoder_block` with its parameters.

    State-dict keys: ``depthwise1``, ``depthwise2`` (3x3 Conv2d with bias), ``pointwise1``, ``pointwise2`` (1x1, no
    bias), ``norm`` (GroupNorm over expansion * channels).
    """

    def __init__(self, channels: int, *, expansion: int = 3, num_groups: int = 32, eps: float = 1e-6) -> None:
        super().__init__()
        middle = expansion * channels
        self.depthwise1 = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.pointwise1 = nn.Conv2d(channels, middle, 1, bias=False)
        self.depthwise2 = nn.Conv2d(middle, middle, 3, padding=1, groups=middle)
        self.norm = nn.GroupNorm(num_groups, middle, eps=eps)
        self.pointwise2 = nn.Conv2d(middle, channels, 1, bias=False)

    def weights(self) -> Weights:
        """The parameters by the names that :func:`decoder_block` has for them."""
        assert self.depthwise1.bias is not None and self.depthwise2.bias is not None
        return Weights(
            self.depthwise1.weight,
            self.depthwise1.bias,
            self.pointwise1.weight,
            self.depthwise2.weight,
            self.depthwise2.bias,
            self.norm.weight,
            self.norm.bias,
            self.pointwise2.weight,
        )

    def forward(self, x: Tensor, *, low_memory: bool = False) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]; see :func:`decoder_block`."""
        return decoder_block(x, *self.weights(), self.norm.num_groups, self.norm.eps, low_memory=low_memory)
