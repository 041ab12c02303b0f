"""The operations of an ML program as plain values: types, shapes, dtypes, constants, bytes of weights as stored."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from snapgen.export.inspect import _BLOB, _BLOB_MARK, read_spec
from snapgen.export.tools import PackageError, coremltools

# Bits of an element; a string or an unknown kind has none.
BITS = {
    "float64": 64, "float32": 32, "float16": 16, "bfloat16": 16, "bool": 8, "int64": 64, "int32": 32, "int16": 16,
    "int8": 8, "int4": 4, "uint64": 64, "uint32": 32, "uint16": 16, "uint8": 8, "uint6": 6, "uint4": 4, "uint3": 3,
    "uint2": 2, "uint1": 1,
}  # fmt: skip
LONGEST_CONSTANT = 64  # elements; longer constants are weights, whose values no rule reads, but for infinities
# Operations whose constants may be masks: only theirs are searched for infinities, since weights are large.
MASKING = ("add", "sub", "select", "maximum", "minimum", "scaled_dot_product_attention")


@dataclass(frozen=True)
class Value:
    """A tensor of the program.

    Attributes:
        shape: its extents; None for one that is open until the call.
        dtype: "float16", "int32", ...; the kind of value where it is no tensor ("list", "state", ...).
    """

    name: str
    shape: tuple[int | None, ...]
    dtype: str

    @property
    def elements(self) -> int:
        """How many elements; an open extent counts as 1."""
        return math.prod(1 if extent is None else extent for extent in self.shape)

    @property
    def bytes(self) -> int:
        """Size in memory, without padding."""
        return math.ceil(self.elements * BITS.get(self.dtype, 0) / 8)

    @property
    def open(self) -> bool:
        """Whether an extent is open until the call."""
        return None in self.shape


@dataclass(frozen=True)
class Constant:
    """A constant argument: a setting or a weight.

    Attributes:
        stored: bytes of its data in the package.
        form: "const", or the operation that unpacks it on load (constexpr_lut_to_dense, ...).
        content: its values where it has at most `LONGEST_CONSTANT` elements: a number, a string, or a flat tuple.
        infinite: whether a value of it is infinite; looked for in the operations of `MASKING`.
    """

    value: Value
    stored: int
    form: str = "const"
    content: Any = None
    infinite: bool = False


@dataclass(frozen=True)
class Operation:
    """An operation that is computed at every call.

    Attributes:
        index: place in the program. function: whose. inside: the operations whose blocks it stands in, outermost first.
        inputs: parameter -> its tensors that are computed or given at the call.
        constants: parameter -> its constants.
    """

    index: int
    name: str
    type: str
    function: str
    inputs: dict[str, tuple[Value, ...]]
    outputs: tuple[Value, ...]
    constants: dict[str, tuple[Constant, ...]] = field(default_factory=dict)
    inside: tuple[str, ...] = ()

    def setting(self, name: str, default: Any = None) -> Any:
        """The value of a constant argument, `default` where it is not given or too long to have been kept."""
        given = self.constants.get(name)
        return default if not given or given[0].content is None else given[0].content

    def settings(self, name: str) -> tuple[Any, ...]:
        """The values of a constant argument that is a list; empty where it is not given."""
        content = self.setting(name, ())
        return content if isinstance(content, tuple) else (content,)

    @property
    def read(self) -> tuple[Value, ...]:
        """The tensors that it reads, without constants, in order of their parameters."""
        return tuple(value for values in self.inputs.values() for value in values)

    @property
    def weights(self) -> int:
        """Bytes of its constant tensors as stored."""
        return sum(constant.stored for given in self.constants.values() for constant in given)


@dataclass(frozen=True)
class Graph:
    """A function of a program, with the operations of nested blocks in order.

    Attributes:
        producer: tensor -> the operation that makes it. consumers: tensor -> the operations that read it, in order.
    """

    function: str
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    operations: tuple[Operation, ...]
    producer: dict[str, Operation]
    consumers: dict[str, list[Operation]]

    def made_by(self, value: Value) -> Operation | None:
        """The operation that makes a tensor; None for an input."""
        return self.producer.get(value.name)

    def readers(self, op: Operation) -> list[Operation]:
        """The operations that read what `op` makes, in order."""
        return [reader for output in op.outputs for reader in self.consumers.get(output.name, [])]


def read_graphs(path: str | Path) -> list[Graph]:
    """Every function of a package's program.

    Raises:
        PackageError: the package cannot be read (see `inspect.read_spec`), or holds no ML program.
    """
    spec, weights = read_spec(path)
    kind = spec.WhichOneof("Type")
    if kind != "mlProgram":
        raise PackageError(
            f"{path}: holds a model of the kind {kind}, not an ML program: it lists no operations whose shapes and "
            f"dtypes could be judged; convert it again with convert_to='mlprogram'"
        )
    reader = _Reader(weights)
    return [reader.graph(name, spec.mlProgram.functions[name]) for name in sorted(spec.mlProgram.functions)]


class _Reader:
    def __init__(self, weights: Path) -> None:
        self._weights = weights
        self._infinite: dict[tuple[str, int], bool] = {}
        self._blobs: dict[str, Any] = {}  # constant -> where it lies
        data_type = coremltools("proto.MIL_pb2").DataType
        self._dtypes = {number: name.lower() for name, number in data_type.items()}

    def graph(self, name: str, function: Any) -> Graph:
        constants: dict[str, Constant] = {}
        block = function.block_specializations[function.opset]
        inputs = tuple(self._value(it.name, it.type) for it in function.inputs)
        known = {value.name: value for value in inputs}
        walked = self._walk(name, block, (), known, constants)
        operations = [Operation(index, *parts) for index, parts in enumerate(walked)]
        producer = {output.name: op for op in operations for output in op.outputs}
        consumers: dict[str, list[Operation]] = {}
        for op in operations:
            for value in dict.fromkeys(value.name for value in op.read):
                consumers.setdefault(value, []).append(op)
        outputs = tuple(known[output] for output in block.outputs if output in known)
        return Graph(name, inputs, outputs, tuple(operations), producer, consumers)

    def _walk(
        self,
        function: str,
        block: Any,
        inside: tuple[str, ...],
        known: dict[str, Value],
        constants: dict[str, Constant],
    ) -> Iterator[tuple[Any, ...]]:
        for value in block.inputs:
            known[value.name] = self._value(value.name, value.type)
        for op in block.operations:
            outputs = tuple(self._value(output.name, output.type) for output in op.outputs)
            if op.type == "const":
                constants[outputs[0].name] = self._constant(outputs[0], op.attributes["val"])
                if op.attributes["val"].WhichOneof("value") == "blobFileValue":
                    self._blobs[outputs[0].name] = op.attributes["val"].blobFileValue
                continue
            given: dict[str, tuple[Constant, ...]] = {}
            read: dict[str, tuple[Value, ...]] = {}
            for parameter, argument in op.inputs.items():
                fixed, tensors = [], []
                for binding in argument.arguments:
                    if binding.WhichOneof("binding") == "value":
                        fixed.append(self._constant(self._value("", binding.value.type), binding.value))
                    elif binding.name in constants:
                        constant = constants[binding.name]
                        if op.type in MASKING and binding.name in self._blobs:
                            found = self._has_infinity(constant.value, self._blobs[binding.name])
                            constant = replace(constant, infinite=found)
                        fixed.append(constant)
                    else:
                        tensors.append(known.get(binding.name, Value(binding.name, (), "unknown")))
                if fixed:
                    given[parameter] = tuple(fixed)
                if tensors:
                    read[parameter] = tuple(tensors)
            if op.type.startswith("constexpr_") and not read:
                parts = [constant for values in given.values() for constant in values]
                parts += [self._constant(outputs[0], it) for name, it in op.attributes.items() if name != "name"]
                stored = sum(part.stored for part in parts)
                constants[outputs[0].name] = Constant(outputs[0], stored, op.type)
                continue
            known.update({output.name: output for output in outputs})
            # Parameters lie in a map, whose order is not kept: sorted, so that two runs tell the same.
            yield (
                outputs[0].name if outputs else op.type, op.type, function, dict(sorted(read.items())), outputs,
                dict(sorted(given.items())), inside,
            )  # fmt: skip
            for inner in op.blocks:
                yield from self._walk(function, inner, (*inside, op.type), known, constants)

    def _value(self, name: str, value_type: Any) -> Value:
        kind = value_type.WhichOneof("type")
        if kind == "stateType":
            return self._value(name, value_type.stateType.wrappedType)
        if kind != "tensorType":
            return Value(name, (), str(kind).removesuffix("Type"))
        tensor = value_type.tensorType
        shape = tuple(
            extent.constant.size if extent.WhichOneof("dimension") == "constant" else None
            for extent in tensor.dimensions
        )
        return Value(name, shape, self._dtypes.get(tensor.dataType, "unknown"))

    def _constant(self, value: Value, stored: Any) -> Constant:
        if stored.WhichOneof("value") == "blobFileValue":
            with self._file(stored.blobFileValue).open("rb") as stream:
                return Constant(value, _head(stream, stored.blobFileValue)[0])
        tensor = stored.immediateValue.tensor
        kind = tensor.WhichOneof("value")
        if kind is None:  # a tuple, a list or a dictionary: a setting that no rule reads
            return Constant(value, 0)
        raw = getattr(tensor, kind).values
        if kind == "bytes":
            numbers = np.frombuffer(raw, np.float16) if value.dtype == "float16" else np.frombuffer(raw, np.uint8)
            infinite = bool(value.dtype == "float16" and np.isinf(numbers).any())
            items, size = numbers.tolist(), len(raw)
        else:
            items = list(raw)
            size = value.bytes
            infinite = kind in ("floats", "doubles") and any(math.isinf(item) for item in items)
        content = None
        if len(items) <= LONGEST_CONSTANT:
            content = items[0] if not value.shape and len(items) == 1 else tuple(items)
        return Constant(value, size, content=content, infinite=infinite)

    def _has_infinity(self, value: Value, blob: Any) -> bool:
        kind = {"float16": np.float16, "float32": np.float32}.get(value.dtype)
        place = (blob.fileName, blob.offset)
        if kind is not None and place not in self._infinite:
            with self._file(blob).open("rb") as stream:
                length, start = _head(stream, blob)
                stream.seek(start)
                self._infinite[place] = bool(np.isinf(np.frombuffer(stream.read(length), kind)).any())
        return self._infinite.get(place, False)

    def _file(self, blob: Any) -> Path:
        return self._weights / blob.fileName.rsplit("/", 1)[-1]


def _head(stream: BinaryIO, blob: Any) -> tuple[int, int]:
    """Bytes of a tensor in its weight file, and where they start. `read_spec` has checked the file."""
    stream.seek(blob.offset)
    mark, _, length, start = _BLOB.unpack(stream.read(_BLOB.size))
    if mark != _BLOB_MARK:
        raise PackageError(f"{blob.fileName}: damaged: no tensor where the program says that one lies")
    return length, start
