"""Sums in fp16: the interpreter's pessimistic mode, in which every partial sum is rounded.

What the Neural Engine accumulates in is not documented. One published study of it finds a wide accumulator, like fp32
(ane-guide.readthedocs.io, part 1, "Numerics"); an older collection of findings suspects fp16 throughout
(github.com/hollance/neural-engine, docs/16-bit.md). fp32 is therefore the interpreter's default, and this the bound:
plain sequential sums, the least accurate order.

The order: convolutions from the first input channel of a group to the last and, within a channel, over the kernel's
rows and columns; matrix products and einsum along the summed axis (several in the order in which they first stand in
the equation); reductions and softmax along their axes, the last one fastest. A product is exact, is added to the sum so
far in fp32, and the result is rounded to fp16: s = fp16(s + a * b), from s = 0. A bias is added last and rounded. A
mean divides the sum. Softmax rounds exp(x - max) to fp16 and sums these.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from snapgen.export.tools import ExportError

# Additions of one operation. A core does some 10^8 a second, so an operation at the limit takes about a minute.
LIMIT = 5_000_000_000


def _half(x: Tensor) -> Tensor:
    return x.half().float()


def products(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """Matrix products [..., M, K] x [..., K, N] of fp16 values held in fp32, summed over K in order.

    Raises:
        ExportError: it has more than `LIMIT` additions.
    """
    shape = (*torch.broadcast_shapes(a.shape[:-2], b.shape[:-2]), a.shape[-2], b.shape[-1])
    _check(math.prod(shape) * a.shape[-1])
    total = torch.zeros(shape)
    for k in range(a.shape[-1]):
        total = _half(total + a[..., k, None] * b[..., None, k, :])
    return total if bias is None else _half(total + bias)


def sums(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    """Sums over `axes`, in order.

    Raises:
        ExportError: it has more than `LIMIT` additions.
    """
    _check(x.numel())
    summed = sorted(axis % x.ndim for axis in axes)
    kept = [axis for axis in range(x.ndim) if axis not in summed]
    rows = x.permute(*summed, *kept).reshape(-1, *(x.shape[axis] for axis in kept))
    total = torch.zeros(rows.shape[1:])
    for row in rows:
        total = _half(total + row)
    return total.reshape([1 if axis in summed else size for axis, size in enumerate(x.shape)]) if keep else total


def means(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    """Sums over `axes`, in order, divided by the count."""
    return sums(x, axes, keep) / math.prod(x.shape[axis] for axis in axes)


def softmax(x: Tensor, axis: int) -> Tensor:
    """Softmax whose exponentials and whose sum of them are fp16."""
    powers = _half((x - x.amax(axis, keepdim=True)).exp())
    return powers / sums(powers, [axis], True)


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, strides: Any, dilations: Any, groups: int) -> Tensor:
    """A convolution of a padded input [B, C, ...] of one or two spatial axes."""
    if x.ndim == 3:
        strides, dilations = [1, *strides], [1, *dilations]
        return convolution(x[:, :, None], weight[:, :, None], bias, strides, dilations, groups).squeeze(2)
    if x.ndim != 4:
        raise ExportError("accumulate='fp16': only convolutions of one and two spatial axes are run")
    batch, kernel = x.shape[0], tuple(weight.shape[2:])
    height, width = (
        (size - dilation * (taps - 1) - 1) // stride + 1
        for size, taps, stride, dilation in zip(x.shape[2:], kernel, strides, dilations, strict=True)
    )
    _check(batch * weight.numel() * height * width)
    # [B, groups, 1, C / groups * taps, H * W], channels slowest
    columns = F.unfold(x, kernel, dilation=tuple(dilations), stride=tuple(strides))
    columns = columns.reshape(batch, groups, -1, height * width)
    rows = weight.reshape(groups, weight.shape[0] // groups, -1)
    total = products(rows, columns).reshape(batch, -1, height, width)
    return total if bias is None else _half(total + bias.reshape(1, -1, 1, 1))


def einsum(equation: str, values: list[Tensor]) -> Tensor:
    """einsum of two tensors, whose axes are either summed, in both and the result, or in one and the result."""
    if len(values) != 2:
        raise ExportError(f"accumulate='fp16': einsum {equation!r} has {len(values)} operands; run are those of two")
    operands, result = equation.replace(" ", "").split("->")
    first, second = operands.split(",")
    a, b = values
    sizes = dict(zip(first + second, (*a.shape, *b.shape), strict=True))
    summed = [axis for axis in dict.fromkeys(first + second) if axis not in result]
    shared = [axis for axis in result if axis in first and axis in second]
    left = [axis for axis in result if axis in first and axis not in second]
    right = [axis for axis in result if axis in second and axis not in first]
    if any(axis not in first or axis not in second for axis in summed):
        raise ExportError(f"accumulate='fp16': einsum {equation!r} sums an axis of one operand alone")
    inner = math.prod(sizes[axis] for axis in summed)
    a = torch.einsum(f"{first}->{''.join(shared + left + summed)}", a)
    b = torch.einsum(f"{second}->{''.join(shared + summed + right)}", b)
    common = [sizes[axis] for axis in shared]
    total = products(a.reshape(*common, -1, inner), b.reshape(*common, inner, -1))
    total = total.reshape([sizes[axis] for axis in shared + left + right])
    return torch.einsum(f"{''.join(shared + left + right)}->{result}", total)


def _linear(a: Any) -> Tensor:
    return products(a.tensor("x"), a.tensor("weight").mT, a.maybe("bias"))


def _matmul(a: Any) -> Tensor:
    x, y = a.tensor("x"), a.tensor("y")
    return products(x.mT if a.flag("transpose_x") else x, y.mT if a.flag("transpose_y") else y)


def _reduction(function: Callable[[Tensor, list[int], bool], Tensor]) -> Callable[[Any], Tensor]:
    def run(a: Any) -> Tensor:
        x = a.tensor("x")
        return function(x, a.integers("axes") if "axes" in a else list(range(x.ndim)), a.flag("keep_dims"))

    return run


# As `interpreter.OPERATIONS`; its convolution prepares this one's arguments.
OPERATIONS: dict[str, Callable[[Any], Tensor]] = {
    "einsum": lambda a: einsum(a.raw("equation"), a.tensors("values")),
    "linear": _linear,
    "matmul": _matmul,
    "reduce_mean": _reduction(means),
    "reduce_sum": _reduction(sums),
    "reduce_sum_square": _reduction(lambda x, axes, keep: sums(_half(x.square()), axes, keep)),
    "softmax": lambda a: softmax(a.tensor("x"), a.integer("axis") if "axis" in a else -1),
}


def _check(additions: int) -> None:
    if additions > LIMIT:
        raise ExportError(
            f"accumulate='fp16': an operation has {additions:.1e} additions, at most {LIMIT:.0e} are run one by one; "
            "use a smaller model, or accumulate='fp32'"
        )
