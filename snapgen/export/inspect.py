"""What is in a Core ML package: inputs, outputs, operations, weights, multiply-adds, metadata. Reads any .mlpackage."""

from __future__ import annotations

import json
import math
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from snapgen.export.tools import PackageError, coremltools

NEWEST_FORMAT = 10  # of coremltools 9: iOS 26
SYSTEMS = {6: "iOS15", 7: "iOS16", 8: "iOS17", 9: "iOS18", 10: "iOS26"}
# Head of a tensor in a weight file: mark, dtype, bytes, where they start.
_BLOB = struct.Struct("<IIQQ")
_BLOB_MARK = 0xDEADBEEF


def read_spec(path: str | Path) -> tuple[Any, Path]:
    """The model description (a protobuf message) and the folder of the weight files of an .mlpackage.

    Raises:
        PackageError: it is missing, truncated, not a Core ML package, or of a newer format than coremltools knows.
    """
    path, root = _root(path)

    model_pb2 = coremltools("proto.Model_pb2")
    from google.protobuf.message import DecodeError

    spec = model_pb2.Model()
    try:
        spec.ParseFromString(root.read_bytes())
    except DecodeError as error:
        raise PackageError(f"{path}: {root.name} is truncated or no Core ML model") from error
    if spec.specificationVersion > NEWEST_FORMAT:
        raise PackageError(
            f"{path}: its format is number {spec.specificationVersion}, the newest known here is {NEWEST_FORMAT} "
            f"({SYSTEMS[NEWEST_FORMAT]}); a newer coremltools may read it"
        )
    if spec.WhichOneof("Type") is None:
        raise PackageError(f"{path}: {root.name} holds no model; it is truncated")
    weights = root.parent / "weights"
    for value in _blobs(spec):
        _blob(path, weights, value)
    return spec, weights


def _root(path: str | Path) -> tuple[Path, Path]:
    """A package, and its model file."""
    path = Path(path)
    if not path.exists():
        raise PackageError(f"{path}: no such package")
    manifest = path / "Manifest.json"
    if not manifest.is_file():
        raise PackageError(f"{path}: not a Core ML package (it holds no Manifest.json)")
    try:
        entries = json.loads(manifest.read_text(encoding="utf-8"))
        root = path / "Data" / entries["itemInfoEntries"][entries["rootModelIdentifier"]]["path"]
    except (ValueError, KeyError, TypeError) as error:
        raise PackageError(f"{path}: its Manifest.json is truncated or not of a Core ML package") from error
    if not root.is_file():
        raise PackageError(f"{path}: its model file {root.relative_to(path)} is missing")
    return path, root


def describe(path: str | Path) -> dict[str, Any]:
    """What is in an .mlpackage, as plain values.

    Keys: `path`; `kind` ("mlProgram", or another of Core ML's model types, for which there are no figures on
    operations and weights); `format` (number) and `system` (the oldest that runs it); `inputs` and `outputs`, lists of
    `name`, `shape`, `dtype`, `about`; `operations` (type -> count, constants left out); `weights`: dtype -> `count`,
    `elements`, `bytes`, of all functions, what they share once; `flops` of one call, two per multiply-add of
    convolutions, matrix products and attention, None where shapes are open or there is no program; `file_bytes` of the
    whole package; `metadata`; `function`, the name of the default function, whose inputs, outputs, operations and flops
    those are; `functions`: name -> these four, of each function.

    Compressed weights count as what they stand for: `elements` are those of the tensor that is made, `bytes` all that
    it is made of (indices and tables, numbers, scales and offsets), and the key in `weights` is the form: "palette-4"
    for indices of 4 bits, "int8" and the like for scaled numbers.

    Raises:
        PackageError: see `read_spec`.
    """
    path = Path(path)
    spec, weights = read_spec(path)
    functions = {name: _function(spec, name) for name in function_names(spec)}
    default = default_function(spec)
    metadata = spec.description.metadata
    return {
        "path": str(path),
        "kind": spec.WhichOneof("Type"),
        "format": spec.specificationVersion,
        "system": SYSTEMS.get(spec.specificationVersion, "before iOS15"),
        **functions[default],
        "function": default,
        "functions": functions,
        "weights": _weights(path, spec, weights),
        "file_bytes": sum(file.stat().st_size for file in path.rglob("*") if file.is_file()),
        "metadata": {
            "description": metadata.shortDescription,
            "author": metadata.author,
            "license": metadata.license,
            "version": metadata.versionString,
            "user": dict(sorted(metadata.userDefined.items())),
        },
    }


def function_names(spec: Any) -> list[str]:
    """The functions of a model, in the order in which it describes them; "main" alone where it describes none."""
    return [function.name for function in spec.description.functions] or ["main"]


def default_function(spec: Any) -> str:
    """The function that runs where none is asked for."""
    return spec.description.defaultFunctionName or function_names(spec)[0]


def report(descriptions: Iterable[Mapping[str, Any]], console: Console | None = None) -> None:
    """Print what `describe` found: a table of figures, then each package's inputs, outputs and operations.

    A description may carry `psnr` (dB, of an export's parity check) beside the keys of `describe`.
    """
    console = console or Console()
    descriptions = list(descriptions)
    figures = Table(title="Core ML packages", title_justify="left")
    figures.add_column("package", no_wrap=True)
    for name in ("from", "MB", "weights", "ops", "GFLOP", "PSNR"):
        figures.add_column(name, justify="right", no_wrap=True)
    for found in descriptions:
        figures.add_row(
            Path(found["path"]).stem,
            found["system"],
            _digits(found["file_bytes"] / 1e6),
            _weights_in_short(found["weights"]),
            str(sum(found["operations"].values())),
            "-" if found["flops"] is None else _digits(found["flops"] / 1e9),
            f"{found['psnr']:.1f} dB" if "psnr" in found else "-",
        )
    console.print(figures)
    compressed = [found for found in descriptions if _is_compressed(found["weights"])]
    if compressed:
        forms = Table(title="How their weights are stored", title_justify="left")
        for name in ("package", "as"):
            forms.add_column(name, no_wrap=True)
        for name in ("tensors", "weights", "MB", "bits each"):
            forms.add_column(name, justify="right", no_wrap=True)
        for found in compressed:
            for kind, entry in sorted(found["weights"].items(), key=lambda item: -item[1]["bytes"]):
                forms.add_row(
                    Path(found["path"]).name,
                    kind.replace("float", "fp"),
                    str(entry["count"]),
                    f"{entry['elements'] / 1e6:.2f}M",
                    f"{entry['bytes'] / 1e6:.2f}",
                    f"{8 * entry['bytes'] / entry['elements']:.2f}" if entry["elements"] else "-",
                )
        console.print(forms)
    for found in descriptions:
        for name, function in found["functions"].items():
            title = Path(found["path"]).name
            if len(found["functions"]) > 1:
                title += f", function {name}{' (default)' if name == found['function'] else ''}"
                title += "" if function["flops"] is None else f", {function['flops'] / 1e9:.3f} GFLOP"
            console.print(_borders(title, function))


def _digits(value: float) -> str:
    """Four digits, fewer behind the point the more stand before it."""
    return f"{value:.{max(0, 3 - len(str(int(value))))}f}"


def _borders(title: str, function: Mapping[str, Any]) -> Table:
    counts = ", ".join(f"{count} {kind}" for kind, count in function["operations"].items())
    borders = Table(title=title, title_justify="left", caption=counts, caption_justify="left")
    borders.add_column("")
    for name in ("name", "shape", "type"):
        borders.add_column(name, no_wrap=True)
    borders.add_column("what it is")
    for side, word in (("inputs", "in"), ("outputs", "out")):
        for feature in function[side]:
            shape = "x".join(map(str, feature["shape"]))
            borders.add_row(word, feature["name"], shape, feature["dtype"], escape(feature["about"]))
    return borders


def _function(spec: Any, name: str) -> dict[str, Any]:
    """Inputs, outputs, operations and FLOPs of one function."""
    described = next((function for function in spec.description.functions if function.name == name), spec.description)
    program = spec.WhichOneof("Type") == "mlProgram"
    function = spec.mlProgram.functions[name] if program else None
    operations = list(_of_function(function)) if program else []
    return {
        "inputs": [_feature(feature) for feature in described.input],
        "outputs": [_feature(feature) for feature in described.output],
        "operations": dict(Counter(op.type for op in operations if op.type != "const").most_common()),
        "flops": _flops(function, operations) if program else None,
    }


def _is_compressed(weights: Mapping[str, Mapping[str, int]]) -> bool:
    return any(not kind.startswith("float") and entry["elements"] > 0 for kind, entry in weights.items())


def _weights_in_short(weights: Mapping[str, Mapping[str, int]]) -> str:
    """How many, and what most of them are."""
    if not weights:
        return "-"
    count = sum(entry["elements"] for entry in weights.values())
    most = max(weights, key=lambda kind: weights[kind]["elements"])
    form = most.removeprefix("palette-") + "-bit" if most.startswith("palette-") else most.replace("float", "fp")
    return f"{count / 1e6:.2f}M {form}"


def _feature(feature: Any) -> dict[str, Any]:
    kind = feature.type.WhichOneof("Type")
    shape: list[int] = []
    dtype = str(kind)
    if kind == "multiArrayType":
        array = feature.type.multiArrayType
        shape = list(array.shape)
        dtype = array.ArrayDataType.Name(array.dataType).lower()
    elif kind == "imageType":
        image = feature.type.imageType
        shape, dtype = [image.height, image.width], f"image {image.ColorSpace.Name(image.colorSpace).lower()}"
    return {"name": feature.name, "shape": shape, "dtype": dtype, "about": feature.shortDescription}


def _operations(spec: Any) -> Iterator[Any]:
    for name in sorted(spec.mlProgram.functions):
        yield from _of_function(spec.mlProgram.functions[name])


def _of_function(function: Any) -> Iterator[Any]:
    def of_block(block: Any) -> Iterator[Any]:
        for op in block.operations:
            yield op
            for inner in op.blocks:
                yield from of_block(inner)

    yield from of_block(function.block_specializations[function.opset])


def _blobs(spec: Any) -> Iterator[Any]:
    """Every value of the program that lies in a weight file."""
    if spec.WhichOneof("Type") != "mlProgram":
        return
    for op in _operations(spec):
        yield from (value for value in _values(op) if value.WhichOneof("value") == "blobFileValue")


def _values(op: Any) -> list[Any]:
    """The values that are written into an operation, or for which it names a place in a weight file."""
    return [*op.attributes.values(), *(b.value for i in op.inputs.values() for b in i.arguments)]


def _blob(path: Path, weights: Path, value: Any) -> tuple[Path, int, int]:
    """The weight file of a value, where its bytes start in it, and how many they are; head and length are checked."""
    file = weights / value.blobFileValue.fileName.rsplit("/", 1)[-1]
    if not file.is_file():
        raise PackageError(f"{path}: its weight file {file.name} is missing")
    size = file.stat().st_size
    with file.open("rb") as stream:
        stream.seek(value.blobFileValue.offset)
        head = stream.read(_BLOB.size)
    if len(head) == _BLOB.size:
        mark, _, length, start = _BLOB.unpack(head)
        if mark == _BLOB_MARK and start + length <= size:
            return file, start, length
    raise PackageError(f"{path}: its weight file {file.name} is truncated or damaged ({size} bytes)")


def _weights(path: Path, spec: Any, folder: Path) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    seen: set[tuple[str, int]] = set()
    names = coremltools("proto.MIL_pb2").DataType
    for op in _operations(spec):
        stored = [value for value in _values(op) if value.WhichOneof("value") == "blobFileValue"]
        new = [value for value in stored if _place(value) not in seen]  # others are shared between functions
        seen.update(map(_place, new))
        if op.type.startswith("constexpr_"):
            sizes = [(_compressed(op, names), math.prod(_shape(op.outputs[0].type)), _stored_bytes(op, path, folder))]
            sizes = sizes if new else []
        else:
            kinds = [names.Name(value.type.tensorType.dataType).lower() for value in new]
            sizes = [(k, math.prod(_shape(v.type)), _blob(path, folder, v)[2]) for k, v in zip(kinds, new, strict=True)]
        for kind, elements, size in sizes:
            entry = found.setdefault(kind, {"count": 0, "elements": 0, "bytes": 0})
            entry["count"] += 1
            entry["elements"] += elements
            entry["bytes"] += size
    return found


def _place(value: Any) -> tuple[str, int]:
    return value.blobFileValue.fileName, value.blobFileValue.offset


def _compressed(op: Any, names: Any) -> str:
    """How an operation's result is stored: "palette-4" with 16 entries per table, else the type of its numbers."""
    given = _named_values(op)
    if "lut" in given:
        entries = _shape(given["lut"].type)[-1 if "lut" in op.attributes else -2]
        return f"palette-{entries.bit_length() - 1}"
    data = next((given[name] for name in ("quantized_data", "data", "nonzero_data") if name in given), None)
    if data is None or data.WhichOneof("value") is None:
        return "scales"  # without data of its own it scales what another operation makes
    return str(names.Name(data.type.tensorType.dataType).lower())


def _stored_bytes(op: Any, path: Path, folder: Path) -> int:
    """Of all that an operation makes its result of, in the weight file or, if it is tiny, in the program."""
    total = 0
    for name, value in _named_values(op).items():
        if value.WhichOneof("value") == "blobFileValue":
            total += _blob(path, folder, value)[2]
        elif name != "shape" and value.immediateValue.tensor.WhichOneof("value") == "bytes":
            total += len(value.immediateValue.tensor.bytes.values)
    return total


def _named_values(op: Any) -> dict[str, Any]:
    """A constexpr operation's values: attributes up to iOS17, inputs from iOS18 on."""
    return {**op.attributes, **{name: given.arguments[0].value for name, given in op.inputs.items()}}


def _shape(value_type: Any) -> list[int]:
    return [dimension.constant.size for dimension in value_type.tensorType.dimensions]


def _flops(function: Any, operations: list[Any]) -> int | None:
    """FLOPs of one call, as `describe` counts them; None where a shape is open until the call."""
    named = [*function.inputs, *(output for op in operations for output in op.outputs)]
    if any(
        dimension.WhichOneof("dimension") == "unknown" for it in named for dimension in it.type.tensorType.dimensions
    ):
        return None
    shapes = {it.name: _shape(it.type) for it in named}
    constants = {op.outputs[0].name: op.attributes["val"] for op in operations if op.type == "const"}
    total = 0
    for op in operations:
        arguments = {name: [shapes.get(b.name, []) for b in given.arguments] for name, given in op.inputs.items()}
        out = math.prod(_shape(op.outputs[0].type)) if op.outputs else 0
        if op.type in ("conv", "linear") and arguments["weight"][0]:
            total += 2 * out * math.prod(arguments["weight"][0][1:])
        elif op.type == "matmul" and arguments["x"][0]:
            transposed = _immediate(op, "transpose_x", constants)
            total += 2 * out * arguments["x"][0][-2 if transposed else -1]
        elif op.type == "einsum":
            x, y = arguments["values"]
            total += 2 * out * _summed(_immediate(op, "equation", constants), x, y)
        elif op.type == "scaled_dot_product_attention":
            q, k, v = (arguments[name][0] for name in ("query", "key", "value"))
            total += 2 * math.prod(q[:-1]) * k[-2] * (q[-1] + v[-1])
    return total


def _summed(equation: str, x: list[int], y: list[int]) -> int:
    operands, result = equation.replace(" ", "").split("->")
    sizes = dict(zip("".join(operands.split(",")), [*x, *y], strict=True))
    return math.prod(size for axis, size in sizes.items() if axis not in result)


def _immediate(op: Any, name: str, constants: Mapping[str, Any]) -> Any:
    """The value of a scalar argument, which is written in place or as a constant's name; None where it is neither."""
    values = _immediates(op, name, constants)
    return None if values is None else values[0]


def _immediates(op: Any, name: str, constants: Mapping[str, Any]) -> Any:
    """As `_immediate`, of an argument that is a tensor: all its values."""
    if name not in op.inputs:
        return None
    binding = op.inputs[name].arguments[0]
    value = constants.get(binding.name) if binding.WhichOneof("binding") == "name" else binding.value
    if value is None:
        return None
    tensor = value.immediateValue.tensor
    return getattr(tensor, tensor.WhichOneof("value")).values
