"""Stores weights of a converted package in fewer bits: constants become Core ML's `constexpr_` operations.

The program and the weight file are rewritten tensor by tensor; all else in them stays as it was. Forms, by target:

    palette-b   constexpr_lut_to_dense. iOS17: one table per tensor, indices packed from the lowest bit. iOS18: one
                table per group of output channels.
    int8        constexpr_affine_dequantize (iOS17), constexpr_blockwise_shift_scale (iOS18), one scale per output
                channel, no offset.

What is known to break on devices is left out:
- A scale on top of a palette makes MPSGraph abort at load on the engine ("mps.dequantize ... must be tensor of
  quantized values", coremltools pull request 2688, seen on macOS 26). None is written, so no palette ever meets a
  constexpr_blockwise_shift_scale. A comment there reports the same abort of an iOS18 palette without the option, with
  such a scale in its compiled program: the iOS17 form has no operation that could become one, and is the default.
- 4-bit palettes of coremltools 9.0 gave wrong numbers or crashes in two language models (coremltools issue 2716; int8
  was right). The cause is not known. Nothing here is made by coremltools' palettizer, but the operation is the same: a
  4-bit package should be compared with the fp16 one on the device before it ships.
- Palettised convolutions of stride above 2 are refused by the engine (the rules in apple/coreai-models): left in fp16.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from snapgen.export import inspect
from snapgen.export.palette import Array, palettize, quantize
from snapgen.export.tools import ExportError, coremltools

FP16, INT8 = "fp16", "int8"
PALETTES = {"iOS17": (8, 6, 4, 2), "iOS18": (8, 6, 4, 3, 2)}  # bits; 3 is new in iOS18
# Smaller ones stay: for 2048 weights a table of 256 is a quarter of what 8 bits save, and all tensors that are smaller
# (norms, biases, the smallest projections) hold 0.1 percent of the t2i-1024 denoiser.
SMALLEST = 2048
GROUP = 32  # output channels that share a table from iOS18 on, where that is little: see `groups`
_LUT_SHARE = 16  # a group's table takes at most this part of its indices
MAX_STRIDE = 2
HEAD = 64  # bytes, of a weight file and of each tensor in it; tensors start at multiples of it
_IN_PLACE = 10  # elements; fewer are written into the program by coremltools


@dataclass(frozen=True)
class Weight:
    """A constant that can be compressed: fp16, at least `SMALLEST` elements, used only as a weight."""

    name: str
    shape: tuple[int, ...]
    start: int  # of its bytes in the weight file
    place: int  # of its head
    key: str  # of shape and values: the same in every package that holds it

    @property
    def elements(self) -> int:
        return int(np.prod(self.shape))


def groups(shape: Sequence[int], bits: int, target: str) -> int:
    """Tables for a weight [out, ...]: one on iOS17; on iOS18 one per group of 32 output channels, or more.

    The groups are doubled until a table takes at most a sixteenth of its group's indices; one table is left where they
    do not divide the output channels.
    """
    if target == "iOS17":
        return 1
    group, row = GROUP, int(np.prod(shape[1:]))
    while group < shape[0] and group * row * bits / 8 < _LUT_SHARE * 2 * (1 << bits):
        group *= 2
    return shape[0] // group if shape[0] % group == 0 else 1


def bits_of(form: str) -> int:
    """Bits of an index or a number: 16 of fp16, 8 of int8, b of palette-b."""
    return {FP16: 16, INT8: 8}[form] if form in (FP16, INT8) else int(form.removeprefix("palette-"))


def stored(form: str, shape: Sequence[int], target: str) -> int:
    """Bytes that a weight takes in the weight file, heads and alignment counted."""
    count = int(np.prod(shape))
    if form == FP16:
        pieces = [2 * count]
    elif form == INT8:
        pieces = [count]
        if shape[0] >= _IN_PLACE:
            pieces += [2 * shape[0]] + ([shape[0]] if target == "iOS17" else [])
    else:
        bits = bits_of(form)
        table = groups(shape, bits, target) << bits
        pieces = [-(-count * bits // 8)] + ([2 * table] if table >= _IN_PLACE else [])
    return sum(HEAD + _aligned(size) for size in pieces)


def weights(package: Path) -> tuple[list[Weight], int]:
    """What can be compressed in a package, in the program's order, and the size of its weight file.

    Weights are those of convolutions and linear layers and the tables that rows are gathered from. Depthwise kernels
    stay in fp16: each output sums nine of them, too few for rounding errors to average out, and they are 0.1 percent of
    the t2i-1024 denoiser's weights.

    Raises:
        ExportError: the weights lie in several files, or one that could be compressed is not finite.
    """
    spec, folder = inspect.read_spec(package)
    file = _only_file(package, folder)
    operations = list(inspect._operations(spec))
    constants = {op.outputs[0].name: op for op in operations if op.type == "const"}
    values = {name: op.attributes["val"] for name, op in constants.items()}
    refused = {name for op in operations for name in _refused(op, values)}
    used = {name for op in operations for name in _weights_of(op)}
    data = np.memmap(file, np.uint8, "r")
    found, seen = [], set()
    for name, op in constants.items():
        value = op.attributes["val"]
        kind = value.type.tensorType
        shape = tuple(inspect._shape(value.type))
        if name not in used or name in refused or value.WhichOneof("value") != "blobFileValue":
            continue
        if kind.dataType != coremltools("proto.MIL_pb2").DataType.FLOAT16 or int(np.prod(shape)) < SMALLEST:
            continue
        place = value.blobFileValue.offset
        if place in seen:
            continue
        seen.add(place)
        _, start, length = inspect._blob(package, folder, value)
        payload = data[start : start + length]
        if not np.isfinite(payload.view(np.float16)).all():
            raise ExportError(f"{package.name}: {name} leaves the range of fp16; it cannot be compressed")
        found.append(Weight(name, shape, start, place, weight_key(payload.view(np.float16).reshape(shape))))
    return found, file.stat().st_size


def weight_key(weight: Array) -> str:
    """A name for a weight by its shape and its values in fp16."""
    values = np.ascontiguousarray(weight.astype(np.float16, copy=False))
    return hashlib.blake2b(repr(values.shape).encode() + values.tobytes(), digest_size=16).hexdigest()


def rewrite(package: Path, forms: Mapping[Weight, str], target: str, metadata: Mapping[str, str]) -> None:
    """Store weights of a package in other forms, in place, and add to its metadata.

    Args:
        package: as `convert` leaves it.
        forms: of those that `weights` finds in it, the ones to change.
        target: of the package.
        metadata: entries for the user's part of the metadata.
    """
    chosen = {weight.place: (weight, form) for weight, form in forms.items() if form != FP16}
    spec, folder = inspect.read_spec(package)
    old, new = _only_file(package, folder), folder / "weight.new"
    data = np.memmap(old, np.uint8, "r")
    writer = coremltools("libmilstoragepython")._BlobStorageWriter(str(new))
    written: dict[int, Any] = {}
    for function in spec.mlProgram.functions.values():
        for op in function.block_specializations[function.opset].operations:
            for value in inspect._values(op):
                if value.WhichOneof("value") != "blobFileValue":
                    continue
                place = value.blobFileValue.offset
                if place in chosen and op.type == "const":
                    weight, form = chosen[place]
                    if place not in written:
                        payload = data[weight.start : weight.start + 2 * weight.elements]
                        written[place] = _Store(writer, new).compress(
                            payload.view(np.float16).reshape(weight.shape), form, target
                        )
                    _replace(op, written[place])
                else:
                    if place not in written:
                        _, start, length = inspect._blob(package, folder, value)
                        written[place] = _copy(writer, value.type.tensorType.dataType, data[start : start + length])
                    value.blobFileValue.offset = written[place]
    del writer, data  # the one writes its head when it goes, the other holds the file
    os.replace(new, old)
    spec.description.metadata.userDefined.update(metadata)
    _, root = inspect._root(package)
    root.write_bytes(spec.SerializeToString(deterministic=True))


@dataclass(frozen=True)
class _Constexpr:
    """An operation that makes a weight: its type, and its stored values as attributes (iOS17) or inputs (iOS18)."""

    type: str
    values: dict[str, Any]
    as_inputs: bool


class _Store:
    """Writes tensors to the weight file, and small ones into the program."""

    def __init__(self, writer: Any, file: Path) -> None:
        self._writer, self._file = writer, file
        self._helper = coremltools("converters.mil.backend.mil.helper")
        self._types = coremltools("proto.MIL_pb2").DataType

    def compress(self, weight: Array, form: str, target: str) -> _Constexpr:
        if form == INT8:
            integers, scale = quantize(weight)
            if target == "iOS17":
                values = {
                    "quantized_data": self._value(integers, "INT8"),
                    "zero_point": self._value(np.zeros(len(scale), np.int8), "INT8"),
                    "scale": self._value(scale, "FLOAT16"),
                    "axis": self._helper.create_scalar_value(np.int32(0)),
                }
                return _Constexpr("constexpr_affine_dequantize", values, False)
            per_channel = scale.reshape(-1, *[1] * (weight.ndim - 1))
            values = {"data": self._value(integers, "INT8"), "scale": self._value(per_channel, "FLOAT16")}
            return _Constexpr("constexpr_blockwise_shift_scale", values, True)
        bits = bits_of(form)
        palette = palettize(weight, bits, groups(weight.shape, bits, target))
        if target == "iOS17":
            values = {
                "indices": self._value(packed(palette.indices, bits), "UINT8"),
                "lut": self._value(palette.lut[0], "FLOAT16"),
                "shape": self._helper.create_tensor_value(np.array(weight.shape, np.uint32)),
            }
            return _Constexpr("constexpr_lut_to_dense", values, False)
        lut = palette.lut.reshape(-1, *[1] * (weight.ndim - 1), 1 << bits, 1)
        values = {"indices": self._value(palette.indices, f"UINT{bits}"), "lut": self._value(lut, "FLOAT16")}
        return _Constexpr("constexpr_lut_to_dense", values, True)

    def _value(self, array: Array, kind: str) -> Any:
        if array.size < _IN_PLACE:
            return self._helper.create_tensor_value(array)
        flat = np.ascontiguousarray(array.reshape(-1))
        flat = flat.view(np.uint16) if flat.dtype == np.float16 else flat
        offset = getattr(self._writer, _WRITERS[kind])(flat)
        name = f"@model_path/weights/{FILE}"
        return self._helper.create_file_value_tensor(name, offset, array.shape, self._types.Value(kind))


FILE = "weight.bin"
_WRITERS = {
    "FLOAT16": "write_fp16_data",
    "FLOAT32": "write_float_data",
    **{kind: f"write_{kind.lower()}_data" for kind in ("INT8", "UINT8", "INT16", "UINT16", "INT32", "UINT32")},
    **{f"UINT{bits}": f"write_uint{bits}_data" for bits in (1, 2, 3, 4, 6)},
}
_DTYPES: dict[str, Any] = {
    "FLOAT16": np.uint16,
    "FLOAT32": np.float32,
    "INT8": np.int8,
    "UINT8": np.uint8,
    "INT16": np.int16,
    "UINT16": np.uint16,
    "INT32": np.int32,
    "UINT32": np.uint32,
}


def packed(indices: Array, bits: int) -> Array:
    """Indices of `bits` bits one after the other from each byte's lowest bit on, as iOS17 reads them; uint8."""
    if bits == 8:
        return indices.reshape(-1)
    each = np.unpackbits(indices.reshape(-1, 1).astype(np.uint8), axis=1, count=bits, bitorder="little")
    return np.packbits(each.reshape(-1), bitorder="little")


def _copy(writer: Any, kind: int, payload: Array) -> int:
    name = coremltools("proto.MIL_pb2").DataType.Name(kind)
    if name not in _DTYPES:
        raise ExportError(f"a constant of type {name.lower()} in the package: it is compressed already")
    return int(getattr(writer, _WRITERS[name])(np.ascontiguousarray(payload).view(_DTYPES[name])))


def _replace(op: Any, made: _Constexpr) -> None:
    """Turn a constant into the operation that makes it; its name and its output stay."""
    del op.attributes["val"]
    op.type = made.type
    for name, value in made.values.items():
        if made.as_inputs:
            op.inputs[name].arguments.add().value.CopyFrom(value)
        else:
            op.attributes[name].CopyFrom(value)


def _weights_of(op: Any) -> Iterable[str]:
    """Names of the constants that an operation uses as weights."""
    for name in {"conv": ("weight",), "linear": ("weight",), "gather": ("x",)}.get(op.type, ()):
        yield from (binding.name for binding in op.inputs[name].arguments)


def _refused(op: Any, constants: Mapping[str, Any]) -> Iterable[str]:
    """Names that an operation uses so that they must stay in fp16."""
    weights = set(_weights_of(op))
    for given in op.inputs.values():
        yield from (binding.name for binding in given.arguments if binding.name not in weights)
    if op.type == "conv":
        strides = inspect._immediates(op, "strides", constants) or [1]
        shapes = [inspect._shape(constants[name].type) for name in weights if name in constants]
        grouped = inspect._immediate(op, "groups", constants) not in (None, 1)
        if max(strides) > MAX_STRIDE or (grouped and any(shape[1] == 1 for shape in shapes)):
            yield from weights


def _only_file(package: Path, folder: Path) -> Path:
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    if [file.name for file in files] != [FILE]:
        raise ExportError(f"{package.name}: its weights lie in {[file.name for file in files]}; expected {FILE}")
    return folder / FILE


def _aligned(size: int) -> int:
    return -(-size // HEAD) * HEAD
