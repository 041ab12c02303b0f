"""Runs a Core ML program (MIL) with PyTorch, operation by operation, so that a package's numbers are known off a Mac.

Every value is held in the dtype that the program declares: an operation takes its inputs as they were rounded, computes
and accumulates in fp32, and rounds once to the declared dtype of its output. So overflow of fp16 shows as inf here as
it does on a device. What it does not show is where Core ML places an operation, nor what the Neural Engine accumulates
in, which is not documented: `snapgen.export.accumulation` has the pessimistic bound, sums in fp16.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from snapgen.export import accumulation
from snapgen.export.inspect import default_function, read_spec
from snapgen.export.operations import OTHERS, SUMMING, UnsupportedOp
from snapgen.export.tools import PackageError, coremltools, quiet

DTYPES = {
    "fp16": torch.float16,
    "fp32": torch.float32,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "int16": torch.int16,
    "uint16": torch.int32,  # PyTorch computes with no uint16; every one fits
    "int32": torch.int32,
    "bool": torch.bool,
}


class Program:
    """One function of a Core ML package, ready to run.

    Args:
        path: an .mlpackage.
        function: which of its functions; by default the package's default.
        accumulate: "fp32"; or "fp16": convolutions, matrix products, einsum, linear, sums, means and softmax whose
            output is fp16 round every partial sum, as `snapgen.export.accumulation` says. For small models only.

    Raises:
        PackageError: it cannot be read, or has no such function.
        UnsupportedOp: it has operations that are missing here; names all of them.
        ValueError: `accumulate` is neither.
    """

    def __init__(
        self, path: str | Path, function: str | None = None, *, accumulate: Literal["fp32", "fp16"] = "fp32"
    ) -> None:
        if accumulate not in ("fp32", "fp16"):
            raise ValueError(f"accumulate: got {accumulate!r}; allowed are 'fp32' and 'fp16'")
        self.accumulate = accumulate
        spec, weights = read_spec(path)
        if spec.WhichOneof("Type") != "mlProgram":
            raise PackageError(f"{path}: holds a {spec.WhichOneof('Type')}; only ML programs can be run here")
        function = function or default_function(spec)
        if function not in spec.mlProgram.functions:
            raise PackageError(f"{path}: has no function {function!r}; there are {sorted(spec.mlProgram.functions)}")
        for other in spec.mlProgram.functions.keys() - {function}:  # they would be built for nothing
            del spec.mlProgram.functions[other]
        milproto = coremltools("converters.mil.frontend.milproto.load")
        with quiet():
            program = milproto.load(spec, spec.specificationVersion, file_weights_dir=str(weights))
        self._block = program.functions[function]
        self.inputs = {name: (tuple(var.shape), DTYPES[_dtype(var)]) for name, var in self._block.inputs.items()}
        self.outputs = tuple(var.name for var in self._block.outputs)
        self._constants: dict[str, Any] = {}
        self._steps = []
        for op in self._block.operations:
            if op.op_type == "const":
                self._constants[op.outputs[0].name] = _kept(op.outputs[0].val)
            elif op.op_type.startswith("constexpr_"):
                with quiet():
                    self._constants[op.outputs[0].name] = _kept(op.materialized_val_inference())
            else:
                self._steps.append(op)
        lacking = sorted({op.op_type for op in self._steps} - OPERATIONS.keys())
        if lacking:
            raise UnsupportedOp(f"{path}: has operations that the interpreter lacks: {', '.join(lacking)}")
        self._last_use = {var.name: index for index, op in enumerate(self._steps) for var in _variables(op)}

    @torch.no_grad()
    def __call__(
        self, inputs: Mapping[str, Tensor], watch: Callable[[str, str, Tensor], None] | None = None
    ) -> dict[str, Tensor]:
        """Run the function.

        Args:
            inputs: a tensor of the right shape for every input; converted to the declared dtypes.
            watch: called with operation type, output name and value after each operation.

        Raises:
            ValueError: an input is missing, unknown, or of another shape.
            ExportError: an operation is too large to accumulate in fp16, or no such form of it is known.
        """
        values = self._checked(inputs)
        for index, op in enumerate(self._steps):
            arguments = {name: self._resolve(value, values) for name, value in op.inputs.items()}
            run = OPERATIONS[op.op_type]
            if self.accumulate == "fp16" and DTYPES[_dtype(op.outputs[0])] == torch.float16:
                run = _SUMS_IN_FP16.get(op.op_type, run)
            results = run(_Arguments(arguments))
            for var, result in zip(op.outputs, results if isinstance(results, tuple) else (results,), strict=True):
                values[var.name] = result.to(DTYPES[_dtype(var)])
                if watch is not None:
                    watch(op.op_type, var.name, values[var.name])
            for var in _variables(op):
                if self._last_use[var.name] == index and var.name not in self.outputs:
                    values.pop(var.name, None)
        return {name: values[name] if name in values else _tensor(self._constants[name]) for name in self.outputs}

    def _checked(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if inputs.keys() != self.inputs.keys():
            raise ValueError(f"inputs: got {sorted(inputs)}; the program takes {sorted(self.inputs)}")
        values = {}
        for name, (shape, dtype) in self.inputs.items():
            if tuple(inputs[name].shape) != shape:
                raise ValueError(f"inputs: {name} has shape {tuple(inputs[name].shape)}; the program takes {shape}")
            values[name] = inputs[name].to(dtype)
        return values

    def _resolve(self, value: Any, values: dict[str, Tensor]) -> Any:
        if value is None or isinstance(value, (str, int, float, bool, np.generic, np.ndarray)):
            return value
        if isinstance(value, (list, tuple)):
            return [self._resolve(item, values) for item in value]
        return self._constants[value.name] if value.name in self._constants else values[value.name]


class Chain:
    """Programs run one after the other: each takes its inputs from those given and from the outputs before it.

    Attributes:
        inputs: those that no program before makes: name -> (shape, dtype).
        outputs: names of the last program's.
    """

    def __init__(self, programs: Sequence[Program]) -> None:
        self.programs = tuple(programs)
        self.inputs: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        made: set[str] = set()
        for program in self.programs:
            self.inputs |= {name: border for name, border in program.inputs.items() if name not in made}
            made.update(program.outputs)
        self.outputs = self.programs[-1].outputs

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run them.

        Raises:
            ValueError: an input is missing, unknown, or of another shape.
        """
        if inputs.keys() != self.inputs.keys():
            raise ValueError(f"inputs: got {sorted(inputs)}; the programs take {sorted(self.inputs)}")
        values = dict(inputs)
        for program in self.programs:
            values |= program({name: values[name] for name in program.inputs})
        return {name: values[name] for name in self.outputs}


class _Arguments:
    """Arguments of one operation by name: as wide tensors, whole numbers, or as they are."""

    def __init__(self, values: dict[str, Any]) -> None:
        self._values = values

    def __contains__(self, name: str) -> bool:
        return self._values.get(name) is not None

    def raw(self, name: str, default: Any = None) -> Any:
        value = self._values.get(name)
        return default if value is None else value

    def tensor(self, name: str) -> Tensor:
        """The tensor, fp16 widened to fp32."""
        return _wide(_tensor(self._values[name]))

    def tensors(self, name: str) -> list[Tensor]:
        return [_wide(_tensor(value)) for value in self._values[name]]

    def maybe(self, name: str) -> Tensor | None:
        return self.tensor(name) if name in self else None

    def number(self, name: str) -> float:
        return float(self._values[name])

    def flag(self, name: str) -> bool:
        return bool(self.raw(name, False))

    def integer(self, name: str) -> int:
        return int(self._values[name])

    def integers(self, name: str) -> list[int]:
        return [int(value) for value in np.asarray(self._values[name]).reshape(-1)]


def _dtype(var: Any) -> str:
    return coremltools("converters.mil.mil").types.builtin_to_string(var.dtype)


def _variables(op: Any) -> list[Any]:
    found = []
    for value in op.inputs.values():
        found += [item for item in (value if isinstance(value, (list, tuple)) else (value,)) if hasattr(item, "op")]
    return found


def _kept(value: Any) -> Any:
    """A constant as it is kept: tensors of numbers as PyTorch's; scalars and names as they are."""
    return _tensor(value) if isinstance(value, np.ndarray) and value.dtype.kind in "fiub" else value


def _tensor(value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value
    array = np.asarray(value)
    # A copy: PyTorch wants memory that may be written to.
    return torch.from_numpy(array.astype(np.int32) if array.dtype == np.uint16 else np.array(array))


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype == torch.float16 else tensor


def _unary(function: Callable[[Tensor], Tensor]) -> Callable[[_Arguments], Tensor]:
    return lambda a: function(a.tensor("x"))


def _binary(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[_Arguments], Tensor]:
    return lambda a: function(a.tensor("x"), a.tensor("y"))


def _reduction(function: Callable[[Tensor, list[int], bool], Tensor]) -> Callable[[_Arguments], Tensor]:
    def run(a: _Arguments) -> Tensor:
        x = a.tensor("x")
        return function(x, a.integers("axes") if "axes" in a else list(range(x.ndim)), a.flag("keep_dims"))

    return run


def _conv(a: _Arguments, narrow: bool = False) -> Tensor:
    x, weight = a.tensor("x"), a.tensor("weight")
    spatial = x.ndim - 2
    strides = a.integers("strides") if "strides" in a else [1] * spatial
    dilations = a.integers("dilations") if "dilations" in a else [1] * spatial
    kind = a.raw("pad_type", "valid")
    if kind == "custom":
        pads = a.integers("pad")
    elif kind == "valid":
        pads = [0] * (2 * spatial)
    else:
        raise UnsupportedOp(f"the interpreter lacks convolutions with pad_type {kind!r}")
    inside = [0] * spatial  # padding that the convolution does itself, without a copy
    if not narrow and pads[::2] == pads[1::2]:
        inside = pads[::2]
    else:  # MIL lists (before, after) from the first axis, F.pad from the last
        x = F.pad(x, [amount for axis in reversed(range(spatial)) for amount in pads[2 * axis : 2 * axis + 2]])
    groups = a.integer("groups") if "groups" in a else 1
    if narrow:
        return accumulation.convolution(x, weight, a.maybe("bias"), strides, dilations, groups)
    convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[spatial]
    return convolve(x, weight, a.maybe("bias"), strides, inside, dilations, groups)


def _batch_norm(a: _Arguments) -> Tensor:
    x = a.tensor("x")
    return F.batch_norm(
        x, a.tensor("mean"), a.tensor("variance"), a.maybe("gamma"), a.maybe("beta"), eps=a.number("epsilon")
    )


def _layer_norm(a: _Arguments) -> Tensor:
    x, axes = a.tensor("x"), a.integers("axes")
    shape = [size if axis in [i % x.ndim for i in axes] else 1 for axis, size in enumerate(x.shape)]
    mean = x.mean(axes, keepdim=True)
    y = (x - mean) * torch.rsqrt((x - mean).square().mean(axes, keepdim=True) + a.number("epsilon"))
    if "gamma" in a:
        y = y * a.tensor("gamma").reshape(shape)
    return y + a.tensor("beta").reshape(shape) if "beta" in a else y


def _gelu(a: _Arguments) -> Tensor:
    x, mode = a.tensor("x"), a.raw("mode", "EXACT")
    if mode == "SIGMOID_APPROXIMATION":
        return x * torch.sigmoid(1.702 * x)
    return F.gelu(x, approximate="tanh" if mode == "TANH_APPROXIMATION" else "none")


def _reshape(a: _Arguments) -> Tensor:
    x = a.tensor("x")
    return x.reshape([x.shape[axis] if size == 0 else size for axis, size in enumerate(a.integers("shape"))])


def _squeeze(a: _Arguments) -> Tensor:
    x = a.tensor("x")
    return x.squeeze(tuple(a.integers("axes"))) if "axes" in a else x.squeeze()


def _expand_dims(a: _Arguments) -> Tensor:
    x = a.tensor("x")
    axes = a.integers("axes")
    for axis in sorted(axis % (x.ndim + len(axes)) for axis in axes):
        x = x.unsqueeze(axis)
    return x


def _split(a: _Arguments) -> tuple[Tensor, ...]:
    x, axis = a.tensor("x"), a.integer("axis")
    if "split_sizes" in a:
        return x.split(a.integers("split_sizes"), axis)
    return x.tensor_split(a.integer("num_splits"), axis)


def _concat(a: _Arguments) -> Tensor:
    values, axis = a.tensors("values"), a.integer("axis")
    if a.flag("interleave"):
        return torch.stack(values, axis % values[0].ndim + 1).flatten(axis % values[0].ndim, axis % values[0].ndim + 1)
    return torch.cat(values, axis)


def _slice_by_index(a: _Arguments) -> Tensor:
    x = a.tensor("x")
    begin, end = a.integers("begin"), a.integers("end")
    stride = a.integers("stride") if "stride" in a else [1] * x.ndim
    masks = [a.integers(name) if name in a else [0] * x.ndim for name in ("begin_mask", "end_mask", "squeeze_mask")]
    for axis, size in enumerate(x.shape):
        if masks[2][axis]:
            bounds = slice(begin[axis], begin[axis] + 1 or None)
        else:
            first, last = None if masks[0][axis] else begin[axis], None if masks[1][axis] else end[axis]
            bounds = slice(first, last, stride[axis])
        x = x.index_select(axis, torch.tensor(list(range(size)[bounds]), dtype=torch.long))
    return x.squeeze([axis for axis, squeezed in enumerate(masks[2]) if squeezed]) if any(masks[2]) else x


def _gather(a: _Arguments) -> Tensor:
    if "batch_dims" in a and a.integer("batch_dims"):
        raise UnsupportedOp("the interpreter lacks gather with batch_dims")
    x, indices, axis = a.tensor("x"), a.tensor("indices").long(), a.integer("axis") if "axis" in a else 0
    axis %= x.ndim
    taken = x.index_select(axis, torch.where(indices < 0, indices + x.shape[axis], indices).reshape(-1))
    return taken.reshape(*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])


def _matmul(a: _Arguments) -> Tensor:
    x, y = a.tensor("x"), a.tensor("y")
    return (x.mT if a.flag("transpose_x") else x) @ (y.mT if a.flag("transpose_y") else y)


def _attention(a: _Arguments) -> Tensor:
    q, k, v = a.tensor("query"), a.tensor("key"), a.tensor("value")
    return F.scaled_dot_product_attention(q, k, v, a.maybe("attn_mask"))


def _nearest(a: _Arguments) -> Tensor:
    factors = a.number("scale_factor_height"), a.number("scale_factor_width")
    return F.interpolate(a.tensor("x"), scale_factor=factors, mode="nearest")


OPERATIONS: dict[str, Callable[[_Arguments], Tensor | tuple[Tensor, ...]]] = {
    "abs": _unary(torch.abs),
    "add": _binary(torch.add),
    "batch_norm": _batch_norm,
    "cast": lambda a: a.tensor("x").to(DTYPES[a.raw("dtype")]),
    "ceil": _unary(torch.ceil),
    "clip": lambda a: a.tensor("x").clamp(a.number("alpha"), a.number("beta")),
    "concat": _concat,
    "conv": _conv,
    "cos": _unary(torch.cos),
    "einsum": lambda a: torch.einsum(a.raw("equation"), *a.tensors("values")),
    "equal": _binary(torch.eq),
    "erf": _unary(torch.erf),
    "exp": _unary(torch.exp),
    "expand_dims": _expand_dims,
    "floor": _unary(torch.floor),
    "floor_div": _binary(torch.floor_divide),
    "gather": _gather,
    "gelu": _gelu,
    "greater": _binary(torch.gt),
    "greater_equal": _binary(torch.ge),
    "identity": _unary(lambda x: x),
    "inverse": lambda a: 1 / (a.tensor("x") + a.number("epsilon")),
    "layer_norm": _layer_norm,
    "less": _binary(torch.lt),
    "less_equal": _binary(torch.le),
    "linear": lambda a: F.linear(a.tensor("x"), a.tensor("weight"), a.maybe("bias")),
    "log": lambda a: torch.log(a.tensor("x") + a.number("epsilon")),
    "logical_and": _binary(torch.logical_and),
    "logical_not": _unary(torch.logical_not),
    "logical_or": _binary(torch.logical_or),
    "matmul": _matmul,
    "maximum": _binary(torch.maximum),
    "minimum": _binary(torch.minimum),
    "mul": _binary(torch.mul),
    "not_equal": _binary(torch.ne),
    "pixel_shuffle": lambda a: F.pixel_shuffle(a.tensor("x"), a.integer("upscale_factor")),
    "pow": _binary(torch.pow),
    "real_div": _binary(torch.div),
    "reduce_argmax": lambda a: a.tensor("x").argmax(a.integer("axis"), keepdim=a.flag("keep_dims")),
    "reduce_l2_norm": _reduction(lambda x, axes, keep: x.square().sum(axes, keepdim=keep).sqrt()),
    "reduce_max": _reduction(lambda x, axes, keep: x.amax(axes, keepdim=keep)),
    "reduce_mean": _reduction(lambda x, axes, keep: x.mean(axes, keepdim=keep)),
    "reduce_min": _reduction(lambda x, axes, keep: x.amin(axes, keepdim=keep)),
    "reduce_sum": _reduction(lambda x, axes, keep: x.sum(axes, keepdim=keep)),
    "reduce_sum_square": _reduction(lambda x, axes, keep: x.square().sum(axes, keepdim=keep)),
    "relu": _unary(torch.relu),
    "reshape": _reshape,
    "rsqrt": lambda a: torch.rsqrt(a.tensor("x") + a.number("epsilon")),
    "scaled_dot_product_attention": _attention,
    "select": lambda a: torch.where(a.tensor("cond"), a.tensor("a"), a.tensor("b")),
    "sigmoid": _unary(torch.sigmoid),
    "silu": _unary(F.silu),
    "sin": _unary(torch.sin),
    "slice_by_index": _slice_by_index,
    "softmax": lambda a: a.tensor("x").softmax(a.integer("axis") if "axis" in a else -1),
    "split": _split,
    "sqrt": _unary(torch.sqrt),
    "square": _unary(torch.square),
    "squeeze": _squeeze,
    "stack": lambda a: torch.stack(a.tensors("values"), a.integer("axis")),
    "sub": _binary(torch.sub),
    "tanh": _unary(torch.tanh),
    "tile": lambda a: a.tensor("x").tile(a.integers("reps")),
    "transpose": lambda a: a.tensor("x").permute(a.integers("perm")),
    "upsample_nearest_neighbor": _nearest,
    **OTHERS,
}


def _lacks(operation: str) -> Callable[[_Arguments], Tensor]:
    def refuse(_: _Arguments) -> Tensor:
        raise UnsupportedOp(f"accumulate='fp16': how {operation} sums is not known; our packages have none")

    return refuse


_SUMS_IN_FP16: dict[str, Callable[[_Arguments], Tensor]] = {
    **accumulation.OPERATIONS,
    "conv": lambda a: _conv(a, narrow=True),
    **{name: _lacks(name) for name in ("layer_norm", "reduce_l2_norm", "scaled_dot_product_attention", *SUMMING)},
}
