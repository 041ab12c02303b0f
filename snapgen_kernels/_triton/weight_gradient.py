"""Gradients of what a pointwise convolution adds up over pixels, for y[p, o] = sum_c d[p, c] weight[o, c] + bias[o] +
shift[b, o]: those of weight, bias and shift. Parts of several backwards.

The pixels are split, so that a product with few output tiles fills the GPU. Each split writes its part in fp32, and the
parts are added in a fixed order: no atomics, a repeat is bitwise equal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from snapgen_kernels._triton import common, tuning
from snapgen_kernels._triton.common import Build
from snapgen_kernels._triton.pointwise import precisions


class Config(NamedTuple):
    """A tile of BLOCK_O by BLOCK_C weights, added up over BLOCK_P pixels at a time."""

    block_o: int
    block_c: int
    block_p: int
    num_warps: int
    num_stages: int


# Widest first.
WEIGHT_CONFIGS = (
    Config(256, 128, 32, 8, 4),
    Config(128, 128, 64, 8, 3),
    Config(64, 128, 64, 4, 3),
    Config(64, 64, 64, 4, 3),
)
WEIGHT_CONFIGS_TF32 = (Config(128, 128, 32, 8, 3), Config(64, 64, 32, 4, 3))
# fp32 products in full precision run on the ordinary units.
WEIGHT_CONFIGS_FP32 = (Config(64, 64, 32, 8, 2), Config(32, 32, 32, 4, 2))
# AMD has 64 KiB of shared memory.
WEIGHT_CONFIGS_HIP = (Config(128, 128, 64, 8, 2), Config(64, 64, 64, 4, 2))
# Accumulators of a multiprocessor's programs, so many that they run at once. More splits would fill the GPU no better,
# and each has its part to write and to read.
VALUES = 2 * 128 * 128
MAX_PROGRAMS = 4
# Pixels of a split, at least: below, reading and adding the parts outweighs the product.
MIN_PIXELS = 256
# Pixels whose products take as long as a part does to be written and read, by arithmetic: 2 FLOPs a pixel and weight at
# 790 TFLOP/s against 8 bytes a weight at 4.3 TB/s.
PART_PIXELS = 735
MAX_SPLITS = 8  # where there are more tiles than programs
# Columns of ones that add up dy on the tensor cores: the narrowest product that there is.
ONES = tl.constexpr(16)


class AddConfig(NamedTuple):
    """Adds BLOCK_S parts of BLOCK values at a time."""

    block_s: int
    block: int
    num_warps: int


# For many values of few parts, and for few values of many parts.
ADD_CONFIGS = (AddConfig(8, 256, 4), AddConfig(64, 32, 4))


class SumsConfig(NamedTuple):
    """A tile of BLOCK_P pixels by BLOCK_C channels."""

    block_p: int
    block_c: int
    num_warps: int


SUMS_CONFIGS = (SumsConfig(32, 128, 4), SumsConfig(128, 32, 4))


@triton.jit
def _product(
    p_dy,
    p_d,
    pixels,
    OUT,
    C,
    b_o,
    b_c,
    BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    SUMS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dy^T d over ``pixels`` rows of both, [BLOCK_O, BLOCK_C], and where SUMS the sums of dy, [BLOCK_O, ONES]."""
    b_p = tl.arange(0, BLOCK_P)
    b_off_dy = b_p[None, :] * OUT + b_o[:, None]  # transposed
    b_off_d = b_p[:, None] * C + b_c[None, :]
    m_o, m_c = (b_o < OUT)[:, None], (b_c < C)[None, :]
    b_ones = tl.full([BLOCK_P, ONES], 1.0, dtype=tl.float32).to(p_dy.dtype.element_ty)
    b_weight = tl.zeros([BLOCK_O, BLOCK_C], dtype=tl.float32)
    b_sums = tl.zeros([BLOCK_O, ONES], dtype=tl.float32)
    for i_p in range(0, pixels, BLOCK_P):
        m_p = b_p < pixels - i_p
        b_dy = tl.load(p_dy + b_off_dy, mask=m_p[None, :] & m_o, other=0.0)
        b_d = tl.load(p_d + b_off_d, mask=m_p[:, None] & m_c, other=0.0)
        b_weight = tl.dot(b_dy, b_d, b_weight, input_precision=PRECISION)
        if SUMS:
            b_sums = tl.dot(b_dy, b_ones, b_sums, input_precision="ieee")
        p_dy += BLOCK_P * OUT
        p_d += BLOCK_P * C
    return b_weight, b_sums


@triton.jit
def weight_gradient_kernel(
    p_dy,
    p_d,
    p_parts,
    p_sums,
    OUT,
    C,
    P,
    chunk,
    chunks,
    BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    SUMS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Per split (a chunk of the pixels of one sample) its part of dy^T d, [OUT, C], and where SUMS that of the sums of
    dy, [OUT].

    Grid: B * chunks * cdiv(OUT, BLOCK_O) * cdiv(C, BLOCK_C); the tiles of a split run side by side and share its rows.
    """
    blocks_o, blocks_c = tl.cdiv(OUT, BLOCK_O), tl.cdiv(C, BLOCK_C)
    i_program = tl.program_id(0)
    i_c, i_o, i_split = i_program % blocks_c, (i_program // blocks_c) % blocks_o, i_program // (blocks_c * blocks_o)
    i_b, i_chunk = i_split // chunks, i_split % chunks
    b_o = i_o * BLOCK_O + tl.arange(0, BLOCK_O)
    b_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    i_p = i_b.to(tl.int64) * P + i_chunk * chunk
    pixels = tl.minimum(P - i_chunk * chunk, chunk)
    p_dy += i_p * OUT
    p_d += i_p * C
    if SUMS and i_c == 0:
        b_weight, b_sums = _product(p_dy, p_d, pixels, OUT, C, b_o, b_c, BLOCK_O, BLOCK_C, BLOCK_P, True, PRECISION)
        # The columns are equal, and so is their mean to the last bit.
        tl.store(p_sums + i_split.to(tl.int64) * OUT + b_o, tl.sum(b_sums, 1) / ONES, mask=b_o < OUT)
    else:
        b_weight, _ = _product(p_dy, p_d, pixels, OUT, C, b_o, b_c, BLOCK_O, BLOCK_C, BLOCK_P, False, PRECISION)
    p_parts += i_split.to(tl.int64) * OUT * C
    m = (b_o < OUT)[:, None] & (b_c < C)[None, :]
    tl.store(p_parts + b_o[:, None] * C + b_c[None, :], b_weight, mask=m)


@triton.jit
def add_parts_kernel(
    p_parts, p_out, p_second, parts, n, inner, s_outer, s_inner, BLOCK_S: tl.constexpr, BLOCK: tl.constexpr
):
    """out[i] = the sum of ``parts`` parts of n values; value i goes to (i // inner) * s_outer + (i % inner) * s_inner.

    Grid: sets of parts * cdiv(n, BLOCK); the outputs of the sets lie side by side, or, unless p_second is None, that of
    the second of two there.
    """
    blocks = tl.cdiv(n, BLOCK)
    b_i = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    i_set = (tl.program_id(0) // blocks).to(tl.int64)
    b_s = tl.arange(0, BLOCK_S)
    p_parts += i_set * parts * n
    b_sum = tl.zeros([BLOCK_S, BLOCK], dtype=tl.float32)
    for i_start in range(0, parts, BLOCK_S):
        m = (b_s < parts - i_start)[:, None] & (b_i < n)[None, :]
        b_sum += tl.load(p_parts + (i_start + b_s).to(tl.int64)[:, None] * n + b_i[None, :], mask=m, other=0.0)
    b_out = (b_i // inner) * s_outer + (b_i % inner) * s_inner
    b_total = tl.sum(b_sum, 0).to(p_out.dtype.element_ty)
    if p_second is None:
        tl.store(p_out + i_set * n + b_out, b_total, mask=b_i < n)
    elif i_set == 0:
        tl.store(p_out + b_out, b_total, mask=b_i < n)
    else:
        tl.store(p_second + b_out, b_total, mask=b_i < n)


@triton.jit
def channel_sums_kernel(p_x, p_sums, C, P, tiles, chunks, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Per (sample, chunk of ``tiles`` tiles, channel): the sum of x. Grid: B * chunks * cdiv(C, BLOCK_C)."""
    blocks_c = tl.cdiv(C, BLOCK_C)
    i_program = tl.program_id(0)
    i_c, i_split = i_program % blocks_c, i_program // blocks_c
    i_b, i_chunk = i_split // chunks, i_split % chunks
    b_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    b_p = tl.arange(0, BLOCK_P)
    b_off = b_p[:, None] * C + b_c[None, :]
    i_p = i_chunk * tiles * BLOCK_P
    p_x += (i_b.to(tl.int64) * P + i_p) * C
    b_sum = tl.zeros([BLOCK_P, BLOCK_C], dtype=tl.float32)
    for _ in range(tiles):
        m = (b_p < P - i_p)[:, None] & (b_c < C)[None, :]
        b_sum += tl.load(p_x + b_off, mask=m, other=0.0).to(tl.float32)
        p_x += BLOCK_P * C
        i_p += BLOCK_P
    tl.store(p_sums + i_split.to(tl.int64) * C + b_c, tl.sum(b_sum, 0), mask=b_c < C)


def new_parts(like: Tensor, *shape: int) -> Tensor:
    """Uninitialised fp32 memory for parts, on the device of ``like``."""
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def add_parts(
    parts: Tensor,
    out: Tensor,
    second: Tensor | None = None,
    *,
    sets: int = 1,
    inner: int | None = None,
    strides: tuple[int, int] = (0, 1),
) -> Tensor:
    """Fill ``out`` with the sums of ``parts``, [sets * any, n] in contiguous memory; returns ``out``.

    ``second``: what the second of two sets goes to, of the dtype of ``out``. ``inner`` and ``strides`` say where value
    i of n goes in ``out`` (see :func:`add_parts_kernel`); else to i.
    """
    sets = sets if second is None else 2
    total, n = parts.shape[0] // sets, parts[0].numel()
    config = ADD_CONFIGS[1 if total > 64 and n <= 1 << 16 else 0]
    add_parts_kernel[(sets * common.cdiv(n, config.block),)](
        parts,
        out,
        second,
        total,
        n,
        n if inner is None else inner,
        *strides,
        BLOCK_S=config.block_s,
        BLOCK=config.block,
        num_warps=config.num_warps,
    )
    return out


def weight_configs(dtype: torch.dtype, precision: str, nvidia: bool) -> tuple[Config, ...]:
    """The candidates, widest first."""
    if dtype == torch.float32:
        return WEIGHT_CONFIGS_TF32 if precision == "tf32" else WEIGHT_CONFIGS_FP32
    return WEIGHT_CONFIGS if nvidia else WEIGHT_CONFIGS_HIP


def _fitting(configs: Sequence[Config], outputs: int, channels: int) -> Config:
    """The first config of whose tile no half is empty; else the last."""
    for config in configs:
        if config.block_o <= common.pow2(outputs) and config.block_c <= common.pow2(channels):
            return config
    return configs[-1]


def _splits(config: Config, dy: Tensor, channels: int) -> int:
    """How many splits fill the GPU with programs: a function of the shape and the GPU."""
    batch, outputs, height, width = dy.shape
    tiles = common.cdiv(outputs, config.block_o) * common.cdiv(channels, config.block_c)
    programs = max(1, min(MAX_PROGRAMS, VALUES // (config.block_o * config.block_c)) * common.processors(dy))
    pixels = batch * height * width
    most = max(1, pixels // MIN_PIXELS)
    return min(programs // tiles, most) if tiles <= programs else _even(tiles, programs, pixels, min(MAX_SPLITS, most))


def _even(tiles: int, programs: int, pixels: int, most: int) -> int:
    """Splits of more tiles than run at once: the fewer programs are left for the last round, the longer the GPU waits
    for them, and the more parts there are, the more memory they take time for."""

    def seconds(splits: int) -> float:
        rounds = common.cdiv(tiles * splits, programs) * programs / (tiles * splits)
        return rounds + splits * PART_PIXELS / pixels

    return min(range(1, most + 1), key=seconds)


def channel_sums(x: Tensor) -> Tensor:
    """Parts of the sums over pixels of ``x`` [B, C, H, W] (channels_last): [B * chunks, C]."""
    batch, channels, height, width = x.shape
    config = SUMS_CONFIGS[0 if channels > 64 else 1]
    steps, blocks_c = common.cdiv(height * width, config.block_p), common.cdiv(channels, config.block_c)
    tiles = common.cdiv(steps * batch * blocks_c, 8 * common.processors(x))
    chunks = common.cdiv(steps, tiles)
    sums = new_parts(x, batch * chunks, channels)
    channel_sums_kernel[(batch * chunks * blocks_c,)](
        x,
        sums,
        channels,
        height * width,
        tiles,
        chunks,
        BLOCK_P=config.block_p,
        BLOCK_C=config.block_c,
        num_warps=config.num_warps,
    )
    return sums


class Parts(NamedTuple):
    """Parts of the gradients of a pointwise convolution's parameters, fp32; None where not needed. weight: [any, O, C].
    sums: of dy over the pixels, [B * any, O]."""

    weight: Tensor | None
    sums: Tensor | None


def weight_parts(dy: Tensor, d: Tensor, sums: bool, precision: str | None = None) -> Parts:
    """Parts of dy^T d, and of the sums of dy where ``sums``.

    dy [B, O, H, W] and d [B, C, H, W] in channels_last, not empty. ``precision``: ``input_precision`` of the product;
    None: a convolution's.
    """
    batch, outputs, height, width = dy.shape
    channels, precision = d.shape[1], precision or common.precision(dy.dtype)

    def launch(config: Config) -> Parts:
        splits = _splits(config, dy, channels)
        # Sums belong to a sample each. Where splits hold several samples, and where products are rounded to tf32, they
        # are cheaper in a pass of their own.
        inside = sums and splits >= batch and precision != "tf32"
        samples, pixels = (batch, height * width) if inside else (1, batch * height * width)
        chunk = common.cdiv(common.cdiv(pixels, max(1, splits // samples)), config.block_p) * config.block_p
        chunks = common.cdiv(pixels, chunk)
        parts = new_parts(dy, samples * chunks, outputs, channels)
        found = new_parts(dy, samples * chunks, outputs) if inside else None
        tiles = common.cdiv(outputs, config.block_o) * common.cdiv(channels, config.block_c)
        weight_gradient_kernel[(samples * chunks * tiles,)](
            dy,
            d,
            parts,
            found,
            outputs,
            channels,
            pixels,
            chunk,
            chunks,
            BLOCK_O=config.block_o,
            BLOCK_C=config.block_c,
            BLOCK_P=config.block_p,
            SUMS=inside,
            PRECISION=precision,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
        return Parts(parts, channel_sums(dy) if sums and not inside else found)

    configs = weight_configs(dy.dtype, precision, torch.version.hip is None)
    key = (str(dy.dtype), precision, batch, height * width, outputs, channels, sums)
    return launch(tuning.choose("weight_gradient", key, configs, _fitting(configs, outputs, channels), launch))


def parts_of(dy: Tensor, d: Callable[[], Tensor], weight: bool, sums: bool) -> Parts:
    """The parts that are wanted; d() is called only for those of the weight."""
    if weight:
        return weight_parts(dy, d(), sums)
    return Parts(None, channel_sums(dy) if sums else None)


def added(parts: Tensor | None, parameter: Tensor | None, sets: int = 1) -> Tensor | None:
    """The gradient of a contiguous ``parameter``, of its parts; None where either is. sets: see :func:`add_parts`."""
    if parts is None or parameter is None:
        return None
    return add_parts(parts, torch.empty_like(parameter), sets=sets)


def builds(dtype: torch.dtype, nvidia: bool) -> list[Build]:
    """Every kernel of this file in every config that its launchers may choose."""
    found: list[Build] = []
    for precision in precisions(dtype, nvidia):
        for config in weight_configs(dtype, precision, nvidia):
            for sums in (False, True)[: 1 if precision == "tf32" else 2]:
                flags: dict[str, Any] = {"SUMS": sums, "PRECISION": precision} | ({} if sums else {"p_sums": None})
                found.append(
                    common.build(
                        weight_gradient_kernel,
                        dtype,
                        ("p_dy", "p_d"),
                        config,
                        ("OUT", "C", "chunk"),
                        products=dtype != torch.float32 or precision == "tf32",
                        # Hopper multiplies tf32 with pixels side by side only: tiles are turned as they are copied.
                        vector=4 if precision == "tf32" else 16,
                        **flags,
                    )
                )
    for add in ADD_CONFIGS:
        alone: dict[str, Any] = {"p_second": None}
        found.append(common.build(add_parts_kernel, dtype, ("p_out",), add, ("n", "inner"), s_inner=1, **alone))
        found.append(common.build(add_parts_kernel, dtype, ("p_out", "p_second"), add, ("n", "inner"), s_inner=1))
    for shape in SUMS_CONFIGS:
        found.append(common.build(channel_sums_kernel, dtype, ("p_x",), shape, ("C",)))
    return found
