"""Operations that our packages do not have and packages of others do; `snapgen.export.interpreter` has the rest.

Each takes the arguments of one operation, tensors widened to fp32, and gives its value; see Core ML's reference of MIL.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from snapgen.export.tools import ExportError


class UnsupportedOp(ExportError):
    """The program has an operation that the interpreter lacks; names it."""


def _unary(function: Callable[[Tensor], Tensor]) -> Callable[[Any], Tensor]:
    return lambda a: function(a.tensor("x"))


def _with(function: Callable[..., Tensor], *names: str) -> Callable[[Any], Tensor]:
    return lambda a: function(a.tensor("x"), *(a.number(name) for name in names))


def _reduction(function: Callable[[Tensor, list[int], bool], Tensor]) -> Callable[[Any], Tensor]:
    def run(a: Any) -> Tensor:
        x = a.tensor("x")
        return function(x, a.integers("axes") if "axes" in a else list(range(x.ndim)), a.flag("keep_dims"))

    return run


def _product(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    for axis in sorted((axis % x.ndim for axis in axes), reverse=True):
        x = x.prod(axis, keepdim=keep)
    return x


def _pads(a: Any, spatial: int) -> list[int]:
    """(before, after) of each spatial axis, from the first."""
    kind = a.raw("pad_type", "valid")
    if kind == "custom":
        return list(a.integers("pad"))
    if kind == "valid":
        return [0] * (2 * spatial)
    raise UnsupportedOp(f"the interpreter lacks pad_type {kind!r} of poolings and transposed convolutions")


def _conv_transpose(a: Any) -> Tensor:
    x, weight = a.tensor("x"), a.tensor("weight")
    spatial = x.ndim - 2
    if "output_shape" in a or spatial not in (1, 2):
        raise UnsupportedOp("the interpreter lacks transposed convolutions with output_shape, or of three axes")
    strides = a.integers("strides") if "strides" in a else [1] * spatial
    dilations = a.integers("dilations") if "dilations" in a else [1] * spatial
    groups = a.integer("groups") if "groups" in a else 1
    transposed = {1: F.conv_transpose1d, 2: F.conv_transpose2d}[spatial]
    full = transposed(x, weight, a.maybe("bias"), strides, 0, 0, groups, dilations)
    pads = _pads(a, spatial)  # here, what is cut off
    for axis in range(spatial):
        before, after = pads[2 * axis : 2 * axis + 2]
        full = full.narrow(2 + axis, before, full.shape[2 + axis] - before - after)
    return full


def _pool(a: Any, largest: bool) -> Tensor:
    x, kernel = a.tensor("x"), a.integers("kernel_sizes")
    strides = a.integers("strides") if "strides" in a else [1] * len(kernel)
    if len(kernel) != 2 or a.flag("ceil_mode"):
        raise UnsupportedOp("the interpreter lacks poolings of other than two axes, and ceil_mode")
    (top, bottom), (left, right) = (_pads(a, 2)[2 * axis : 2 * axis + 2] for axis in range(2))
    padded = F.pad(x, (left, right, top, bottom), value=float("-inf") if largest else 0.0)
    if largest:
        return F.max_pool2d(padded, kernel, strides)
    total = F.avg_pool2d(padded, kernel, strides)
    if not a.flag("exclude_padding_from_average"):
        return total
    return total / F.avg_pool2d(F.pad(torch.ones_like(x), (left, right, top, bottom)), kernel, strides)


def _pad(a: Any) -> Tensor:
    x, pads, mode = a.tensor("x"), a.integers("pad"), a.raw("mode", "constant")
    # MIL lists (before, after) of the last axes from the first of these, F.pad from the last.
    pairs = [pads[index : index + 2] for index in range(0, len(pads), 2)]
    amounts = [amount for pair in reversed(pairs) for amount in pair]
    if mode == "constant":
        return F.pad(x, amounts, value=a.number("constant_val") if "constant_val" in a else 0.0)
    return F.pad(x, amounts, mode={"reflect": "reflect", "replicate": "replicate"}[mode])


def _instance_norm(a: Any) -> Tensor:
    x = a.tensor("x")
    axes = list(range(2, x.ndim))
    mean = x.mean(axes, keepdim=True)
    y = (x - mean) * torch.rsqrt((x - mean).square().mean(axes, keepdim=True) + a.number("epsilon"))
    shape = [1, -1] + [1] * len(axes)
    if "gamma" in a:
        y = y * a.tensor("gamma").reshape(shape)
    return y + a.tensor("beta").reshape(shape) if "beta" in a else y


def _cumsum(a: Any) -> Tensor:
    x, axis = a.tensor("x"), a.integer("axis") if "axis" in a else 0
    x = x.flip(axis) if a.flag("reverse") else x
    total = x.cumsum(axis) - (x if a.flag("exclusive") else 0)
    return total.flip(axis) if a.flag("reverse") else total


def _slice_by_size(a: Any) -> Tensor:
    x = a.tensor("x")
    for axis, (begin, size) in enumerate(zip(a.integers("begin"), a.integers("size"), strict=True)):
        x = x.narrow(axis, begin, x.shape[axis] - begin if size == -1 else size)
    return x


def _gather_along_axis(a: Any) -> Tensor:
    x, axis = a.tensor("x"), a.integer("axis") if "axis" in a else 0
    indices = a.tensor("indices").long()
    return x.take_along_dim(torch.where(indices < 0, indices + x.shape[axis], indices), axis)


def _one_hot(a: Any) -> Tensor:
    axis = a.integer("axis") if "axis" in a else -1
    hot = F.one_hot(a.tensor("indices").long(), a.integer("one_hot_vector_size")).movedim(-1, axis)
    on, off = (a.number(name) if name in a else default for name, default in (("on_value", 1), ("off_value", 0)))
    return hot * on + (1 - hot) * off


def _flatten(a: Any) -> Tensor:
    x, axis = a.tensor("x"), a.integer("axis") if "axis" in a else 1
    return x.reshape(x.shape[:axis].numel(), -1)


OTHERS: dict[str, Callable[[Any], Tensor | tuple[Tensor, ...]]] = {
    "acos": _unary(torch.acos),
    "asin": _unary(torch.asin),
    "atan": _unary(torch.atan),
    "avg_pool": lambda a: _pool(a, largest=False),
    "clamped_relu": _with(
        lambda x, alpha, beta: torch.where(x >= 0, x.clamp(max=beta), (alpha * x).clamp(max=beta)), "alpha", "beta"
    ),
    "conv_transpose": _conv_transpose,
    "cosh": _unary(torch.cosh),
    "cumsum": _cumsum,
    "depth_to_space": lambda a: _depth_to_space(a.tensor("x"), a.integer("block_size")),
    "elu": _with(lambda x, alpha: F.elu(x, alpha), "alpha"),
    "exp2": _unary(torch.exp2),
    "flatten2d": _flatten,
    "gather_along_axis": _gather_along_axis,
    "instance_norm": _instance_norm,
    "leaky_relu": _with(lambda x, alpha: F.leaky_relu(x, alpha), "alpha"),
    "linear_activation": _with(lambda x, alpha, beta: alpha * x + beta, "alpha", "beta"),
    "logical_xor": lambda a: torch.logical_xor(a.tensor("x"), a.tensor("y")),
    "max_pool": lambda a: _pool(a, largest=True),
    "mod": lambda a: torch.remainder(a.tensor("x"), a.tensor("y")),
    "one_hot": _one_hot,
    "pad": _pad,
    "reduce_argmin": lambda a: a.tensor("x").argmin(a.integer("axis"), keepdim=a.flag("keep_dims")),
    "reduce_l1_norm": _reduction(lambda x, axes, keep: x.abs().sum(axes, keepdim=keep)),
    "reduce_log_sum_exp": _reduction(lambda x, axes, keep: x.logsumexp(axes, keepdim=keep)),
    "reduce_prod": _reduction(_product),
    "relu6": _unary(F.relu6),
    "reverse": lambda a: a.tensor("x").flip(a.integers("axes") if "axes" in a else list(range(a.tensor("x").ndim))),
    "round": _unary(torch.round),
    "scaled_tanh": _with(lambda x, alpha, beta: alpha * torch.tanh(beta * x), "alpha", "beta"),
    "sigmoid_hard": _with(lambda x, alpha, beta: (alpha * x + beta).clamp(0, 1), "alpha", "beta"),
    "sign": _unary(torch.sign),
    "sinh": _unary(torch.sinh),
    "slice_by_size": _slice_by_size,
    "softplus": _unary(F.softplus),
    "softsign": _unary(F.softsign),
    "tan": _unary(torch.tan),
    "threshold": _with(lambda x, alpha: x.clamp(min=alpha), "alpha"),
    "topk": lambda a: _topk(a),
}
# Of these, how they sum in fp16 is not known.
SUMMING = (
    "avg_pool",
    "conv_transpose",
    "cumsum",
    "instance_norm",
    "reduce_l1_norm",
    "reduce_log_sum_exp",
    "reduce_prod",
)


def _depth_to_space(x: Tensor, block: int) -> Tensor:
    """Blocks lie on the channel axis before the channels; in pixel_shuffle, behind them."""
    batch, channels, height, width = x.shape
    blocks = x.reshape(batch, block, block, channels // block**2, height, width)
    return blocks.permute(0, 3, 4, 1, 5, 2).reshape(batch, -1, height * block, width * block)


def _topk(a: Any) -> tuple[Tensor, ...]:
    axis = a.integer("axis") if "axis" in a else -1
    found = a.tensor("x").topk(a.integer("k"), axis, largest=not a.flag("ascending"))
    return (found.values, found.indices) if a.flag("return_indices") or "return_indices" not in a else (found.values,)
