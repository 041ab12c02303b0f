"""What the Triton files share: device functions, layouts, and how a kernel is listed for compilation without a GPU.

Names in kernels: i_ index, p_ pointer, b_ block in registers, m_ mask, s_ stride. B samples, C channels in, O channels
out, P pixels, G groups. Images are channels_last: a pixel's channels lie side by side.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def tanh_approx(b_x):
    """tanh by one instruction (relative error 2^-11, enough for bf16), NVIDIA only."""
    return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [b_x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def sigmoid(b_z, FAST: tl.constexpr):
    """1 / (1 + exp(-z)). FAST: see :func:`tanh_approx`."""
    if FAST:
        return 0.5 * tanh_approx(0.5 * b_z) + 0.5
    else:
        return 1.0 / (1.0 + tl.exp(-b_z))


@triton.jit
def silu_of_half(b_h):
    """z sigmoid(z) of h = z / 2; see :func:`tanh_approx`."""
    return b_h * tanh_approx(b_h) + b_h


@triton.jit
def silu(b_z, FAST: tl.constexpr):
    """z sigmoid(z). FAST: see :func:`silu_of_half`."""
    if FAST:
        return silu_of_half(0.5 * b_z)
    else:
        return b_z / (1.0 + tl.exp(-b_z))


# Under TRITON_INTERPRET=1 a jit function is of another class.
INTERPRETED = not isinstance(silu, triton.runtime.JITFunction)


def fast(dtype: torch.dtype) -> bool:
    """Whether kernels may use :func:`silu`'s FAST form: bf16 on NVIDIA."""
    return dtype == torch.bfloat16 and torch.version.hip is None and not INTERPRETED


def precision(dtype: torch.dtype) -> str:
    """``input_precision`` of a product that stands for a convolution: fp32 runs in tf32 where PyTorch's own would, as
    is the default on NVIDIA (``torch.backends.cudnn.conv.fp32_precision``)."""
    allowed = torch.backends.cudnn.conv.fp32_precision == "tf32" and torch.version.hip is None  # type: ignore[attr-defined]
    return "tf32" if dtype == torch.float32 and allowed else "ieee"


def linear_precision(dtype: torch.dtype) -> str:
    """:func:`precision` of a product that stands for a linear layer: fp32 runs in full unless PyTorch's own may run in
    tf32 (``torch.backends.cuda.matmul.fp32_precision``)."""
    allowed = torch.backends.cuda.matmul.fp32_precision == "tf32" and torch.version.hip is None
    return "tf32" if dtype == torch.float32 and allowed else "ieee"


@cache
def _processors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def processors(tensor: Tensor) -> int:
    """Multiprocessors of the tensor's GPU; an H200's where there is none (under the interpreter)."""
    return _processors(tensor.get_device()) if tensor.is_cuda else 132


@cache
def _capability(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def capability(tensor: Tensor) -> int:
    """Compute capability of the tensor's GPU, times 10; an H200's where there is none."""
    return _capability(tensor.get_device()) if tensor.is_cuda else 90


@cache
def _cache_bytes(index: int) -> int:
    return torch.cuda.get_device_properties(index).L2_cache_size


def cache_bytes(tensor: Tensor) -> int:
    """Bytes of the L2 cache of the tensor's GPU; an H200's where there is none (under the interpreter)."""
    return _cache_bytes(tensor.get_device()) if tensor.is_cuda else 60 << 20


# Shared memory that a block can have on the GPUs that have least (sm_86, sm_89, sm_120), and on those that kernels
# are tuned for.
SMALL_SHARED, LARGE_SHARED = 99 << 10, 160 << 10


@cache
def _shared_bytes(index: int) -> int:
    return torch.cuda.get_device_properties(index).shared_memory_per_block_optin  # type: ignore[attr-defined]


def shared_bytes(tensor: Tensor) -> int:
    """Bytes of shared memory that a block can have on the tensor's NVIDIA GPU; an H200's where there is none."""
    return _shared_bytes(tensor.get_device()) if tensor.is_cuda and torch.version.hip is None else 227 << 10


def cdiv(a: int, b: int) -> int:
    """The quotient rounded up; ``triton.cdiv``, outside a kernel, takes microseconds."""
    return -(-a // b)


def pow2(n: int) -> int:
    """The least power of two that is not below n."""
    return 1 << max(n - 1, 0).bit_length()


def channels_last(x: Tensor) -> Tensor:
    """``x`` [B, C, H, W] in channels_last, copied only where it is not."""
    return x.contiguous(memory_format=torch.channels_last)


def new_channels_last(x: Tensor, batch: int, channels: int, height: int, width: int) -> Tensor:
    """An uninitialised image of the dtype and device of ``x``."""
    shape = (batch, channels, height, width)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


class Build(NamedTuple):
    """One way in which a kernel is launched, so that it can be compiled without a GPU.

    Attributes:
        kernel: the jit function.
        constants: its constexpr arguments, and arguments that the launch specialises on (a stride of 1; None pointers).
        pointers: its pointer arguments -> dtype in Triton's names (``bf16``, ``fp32``); a missing one is fp32.
        options: num_warps, num_stages.
        divisible: integer arguments that are multiples of 16 in the model's shapes.
        products: whether tensor-core instructions must be there.
        only: the compute capability, times 10, on which alone it is launched; 0: on all.
        vector: bytes of an image that a thread loads at once.
        shared: bytes of shared memory that a block can have wherever it is launched.
    """

    kernel: Any
    constants: Mapping[str, Any]
    pointers: Mapping[str, str]
    options: Mapping[str, int]
    divisible: tuple[str, ...] = ()
    products: bool = False
    only: int = 0
    vector: int = 16
    shared: int = SMALL_SHARED


_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def build(
    kernel: Any,
    dtype: torch.dtype,
    images: tuple[str, ...],
    config: Any,
    divisible: tuple[str, ...],
    *,
    products: bool = False,
    only: int = 0,
    vector: int = 16,
    **constants: Any,
) -> Build:
    """The build of a kernel for a config: fields that are no launch options are its constants, in capitals."""
    fields = config._asdict()
    given = {name: fields.pop(name) for name in ("num_warps", "num_stages", "maxnreg") if name in fields}
    options = {name: value for name, value in given.items() if value}
    sizes = {name.upper(): value for name, value in fields.items()}
    pointers = dict.fromkeys(images, _NAMES[dtype])
    return Build(kernel, {**sizes, **constants}, pointers, options, divisible, products, only, vector)
