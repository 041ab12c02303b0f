"""Makes Triton's interpreter right for bf16: as shipped it computes on the raw 16-bit integers and truncates on
stores."""

from typing import Any

import numpy as np
import triton
import triton.language as tl
from triton.runtime import interpreter


def _decode(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _encode(values: np.ndarray) -> np.ndarray:
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def mend_bf16() -> None:
    """Patch ``InterpreterBuilder`` of this process: casts, arithmetic and dot decode bf16 and round to nearest even."""
    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    plain_cast, plain_binary, plain_dot = builder.cast_impl, builder.binary_op, builder.create_dot

    def cast(self: Any, source: Any, target: Any) -> Any:
        data, kind = source.data, source.dtype.scalar
        if kind == tl.bfloat16 and target.scalar != tl.bfloat16:
            source = handle(_decode(data), tl.float32)
        if target.scalar == tl.bfloat16 and kind != tl.bfloat16:
            return handle(_encode(data), tl.bfloat16)
        return source if source.dtype.scalar == target.scalar else plain_cast(self, source, target)

    def binary(self: Any, left: Any, right: Any, op: Any) -> Any:
        if left.dtype.scalar != tl.bfloat16:
            return plain_binary(self, left, right, op)
        result = op(_decode(left.data), _decode(right.data))
        return handle(_encode(result) if result.dtype != bool else result, tl.bfloat16)

    def dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        a, b = (handle(_decode(t.data), tl.float32) if t.dtype.scalar == tl.bfloat16 else t for t in (a, b))
        return plain_dot(self, a, b, d, *rest)

    def fp_to_fp(self: Any, source: Any, target: Any, rounding: Any) -> Any:
        return cast(self, source, target)

    builder.cast_impl, builder.binary_op, builder.create_dot = cast, binary, dot
    builder.create_fp_to_fp = fp_to_fp


@triton.jit
def exact_tanh(b_x):  # type: ignore[no-untyped-def]
    """Stands in for ``tanh.approx``, an instruction that the interpreter has not."""
    return 2.0 / (1.0 + tl.exp(-2.0 * b_x)) - 1.0


@triton.jit
def rough_tanh(b_x):  # type: ignore[no-untyped-def]
    """:func:`exact_tanh` as wrong as ``tanh.approx`` may be, always to the same side: a relative 2^-11."""
    return exact_tanh(b_x) * (1.0 + 1.0 / 2048)
