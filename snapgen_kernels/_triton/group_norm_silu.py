"""GroupNorm + SiLU on the GPU, forward and backward; the contract is in ``snapgen_kernels/group_norm_silu.py``.

Names: i_ index, p_ pointer, b_ block in registers, m_ mask, s_ stride. B samples, C channels, P pixels, G groups; a
chunk is ``tiles`` tiles of BLOCK_P pixels. Both memory formats run the same kernels, with the strides of channel and
pixel swapped.

Statistics take two stages, so that one sample fills the GPU: per channel and chunk, mean and sum of squared deviations
(two passes over registers), then Chan's merge over the chunks and channels of a group. Every reduction has a fixed
order that depends on the shape of a sample and on the tile alone: no atomics, a repeat is bitwise equal, and a sample's
result does not depend on the rest of its batch. Tiles come from ``tuning.choose``.

Bytes, with X those of x. Forward: statistics read X, applying them reads X and writes X, so 3 X where 2 X are the
floor. A sample must be read whole before its first output is known, so the second read can only be saved by the L2
cache, and three things help it: applying walks backwards, from what was read last; what it reads is marked for early
eviction, so that outputs do not push out inputs that are still to come; and a batch that outgrows the cache is taken a
few samples at a time, both passes for each group of samples. With the second read in the cache, memory sees 2 X and the
chunks' statistics, 8 bytes per channel and chunk: 3% of 2 X for bf16 and chunks of 64 pixels, 1.6% for 128. In the
model 256 channels of 128x128 in bf16 are 8.4 MB a sample: batch 1 fits in any L2; batch 16, 134 MB, moves 403 MB in
two plain passes and 268 MB at the floor. Backward: sums read x and dy (2 X), the gradient reads both again and writes
dx: 5 X, floor 3 X, by the same means. Each group of samples costs three launches, so groups are as large as fits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from snapgen_kernels._triton import common
from snapgen_kernels._triton.common import Build, cdiv, sigmoid, silu, silu_of_half, tanh_approx
from snapgen_kernels._triton.tuning import choose


class Tile(NamedTuple):
    """BLOCK_P pixels by BLOCK_C channels, computed by this many warps."""

    block_p: int
    block_c: int
    num_warps: int


class Group(NamedTuple):
    """Samples that go through both passes before the next ones start."""

    samples: int


# 16 to 64 elements a thread: in bf16 two to eight 16-byte loads in flight. More elements share a thread's part of the
# reductions and of the indices, and long chunks have fewer statistics; fewer elements make more programs.
CHANNELS_LAST = (Tile(128, 64, 4), Tile(64, 64, 4), Tile(32, 64, 4), Tile(128, 64, 8), Tile(32, 128, 4))
NARROW = (Tile(128, 32, 4),)
CONTIGUOUS = (Tile(512, 8, 4), Tile(256, 16, 4))
SMALL = (Tile(64, 64, 4),)
MERGE_BLOCK = 256
# Chunks of one sample: few enough that merging them stays cheap.
MAX_CHUNKS = 512
# Programs of one sample: two for each multiprocessor of the largest GPUs. A constant, since results depend on it.
MIN_PROGRAMS = 264
# Offsets inside a tile are 32-bit below this.
MAX_OFFSET = 1 << 31


@triton.jit
def place(blocks_c, blocks_p, REVERSED: tl.constexpr):
    """This program's block of channels, block of pixels and sample; REVERSED: the last program has the first."""
    i_program = tl.program_id(0)
    if REVERSED:
        i_program = tl.num_programs(0) - 1 - i_program
    return i_program % blocks_c, (i_program // blocks_c) % blocks_p, i_program // (blocks_c * blocks_p)


@triton.jit
def offsets(s_c, s_p, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, LONG: tl.constexpr):
    """[BLOCK_P, BLOCK_C] offsets from a tile's first element; 64-bit only where LONG: such arithmetic is slow."""
    b_p, b_c = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_C)
    if LONG:
        b_p, b_c = b_p.to(tl.int64), b_c.to(tl.int64)
    return b_p[:, None] * s_p + b_c[None, :] * s_c


@triton.jit
def load(p, m, EVEN: tl.constexpr, EVICTION: tl.constexpr):
    """fp32 values, 0 outside the mask; EVEN: the mask holds everywhere and costs nothing."""
    if EVEN:
        return tl.load(p, eviction_policy=EVICTION).to(tl.float32)
    else:
        return tl.load(p, mask=m, other=0.0, eviction_policy=EVICTION).to(tl.float32)


@triton.jit
def store(p, b, m, EVEN: tl.constexpr):
    """Rounded to the dtype of ``p``."""
    if EVEN:
        tl.store(p, b.to(p.dtype.element_ty))
    else:
        tl.store(p, b.to(p.dtype.element_ty), mask=m)


@triton.jit
def per_channel(p, b_c, m_c, EVEN: tl.constexpr):
    """A row of fp32 values, one per channel."""
    return load(p + b_c, m_c, EVEN, "")[None, :]


@triton.jit
def moments_kernel(
    p_x,
    p_mean,
    p_m2,
    P,
    tiles,
    chunks,
    s_b,
    s_c,
    s_p,
    C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    EVEN: tl.constexpr,
    LONG: tl.constexpr,
):
    """Per (sample, chunk, channel): mean and sum of squared deviations. Grid: B * chunks * cdiv(C, BLOCK_C)."""
    i_c, i_chunk, i_b = place(tl.cdiv(C, BLOCK_C), chunks, False)
    b_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = b_c < C
    p_x += i_b.to(tl.int64) * s_b + (i_c * BLOCK_C).to(tl.int64) * s_c
    i_x = offsets(s_c, s_p, BLOCK_P, BLOCK_C, LONG)
    b_n = 0.0
    b_mean = tl.zeros([BLOCK_C], dtype=tl.float32)
    b_m2 = tl.zeros([BLOCK_C], dtype=tl.float32)
    for i_tile in range(tiles):
        i_first = (i_chunk * tiles + i_tile) * BLOCK_P
        m = (i_first + tl.arange(0, BLOCK_P) < P)[:, None] & m_c[None, :]
        b_x = load(p_x + i_first.to(tl.int64) * s_p + i_x, m, EVEN, "")
        if EVEN:
            n = BLOCK_P * 1.0
            b_center = tl.sum(b_x, 0) * (1.0 / BLOCK_P)
            b_off = b_x - b_center[None, :]
        else:
            n = tl.minimum(tl.maximum(P - i_first, 0), BLOCK_P).to(tl.float32)
            b_center = tl.sum(b_x, 0) * (1.0 / tl.maximum(n, 1.0))
            b_off = tl.where(m, b_x - b_center[None, :], 0.0)
        b_square = tl.sum(b_off * b_off, 0)
        b_delta = b_center - b_mean
        share = n / tl.maximum(b_n + n, 1.0)
        b_m2 += b_square + b_delta * b_delta * (b_n * share)
        b_mean += b_delta * share
        b_n += n
    i_out = (i_b.to(tl.int64) * chunks + i_chunk) * C + b_c
    store(p_mean + i_out, b_mean, m_c, EVEN)
    store(p_m2 + i_out, b_m2, m_c, EVEN)


@triton.jit
def merge_moments_kernel(
    p_part,
    p_m2,
    p_mean,
    p_rstd,
    C,
    P,
    G,
    chunk,
    chunks,
    eps,
    CG: tl.constexpr,
    BLOCK_CG: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Mean and rstd of one group from its chunks and channels. Grid: B * G."""
    i_program = tl.program_id(0)
    i_b, i_g = i_program // G, i_program % G
    b_c = tl.arange(0, BLOCK_CG)
    i_base = i_b.to(tl.int64) * chunks * C + i_g * CG
    b_sum = tl.zeros([BLOCK, BLOCK_CG], dtype=tl.float32)
    # Sums are taken around the first chunk's mean, so that a large mean costs no bits.
    first = tl.load(p_part + i_base)
    for i_start in range(0, chunks, BLOCK):
        b_k = i_start + tl.arange(0, BLOCK)
        m = (b_k < chunks)[:, None] & (b_c < CG)[None, :]
        i_in = i_base + b_k.to(tl.int64)[:, None] * C + b_c[None, :]
        b_n = tl.minimum(tl.maximum(P - b_k * chunk, 0), chunk).to(tl.float32)[:, None]
        b_sum += tl.where(m, (tl.load(p_part + i_in, mask=m, other=0.0) - first) * b_n, 0.0)
    n = tl.cast(P, tl.float32) * CG  # Triton makes an argument of 1 a constant, which has no .to()
    off = tl.sum(tl.sum(b_sum, 1), 0) / n
    b_sum = tl.zeros([BLOCK, BLOCK_CG], dtype=tl.float32)
    for i_start in range(0, chunks, BLOCK):
        b_k = i_start + tl.arange(0, BLOCK)
        m = (b_k < chunks)[:, None] & (b_c < CG)[None, :]
        i_in = i_base + b_k.to(tl.int64)[:, None] * C + b_c[None, :]
        b_n = tl.minimum(tl.maximum(P - b_k * chunk, 0), chunk).to(tl.float32)[:, None]
        b_delta = tl.load(p_part + i_in, mask=m, other=0.0) - first - off
        b_sum += tl.where(m, tl.load(p_m2 + i_in, mask=m, other=0.0) + b_delta * b_delta * b_n, 0.0)
    variance = tl.sum(tl.sum(b_sum, 1), 0) / n
    tl.store(p_mean + i_program, first + off)
    tl.store(p_rstd + i_program, 1.0 / tl.sqrt(variance + eps))


@triton.jit
def apply_kernel(
    p_x,
    p_y,
    p_weight,
    p_bias,
    p_mean,
    p_rstd,
    P,
    s_b,
    s_c,
    s_p,
    C: tl.constexpr,
    CG: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    EVEN: tl.constexpr,
    LONG: tl.constexpr,
    FAST: tl.constexpr,
):
    """y = silu((x - mean) * rstd * weight + bias), backwards. Grid: B * cdiv(P, BLOCK_P) * cdiv(C, BLOCK_C)."""
    i_c, i_p, i_b = place(tl.cdiv(C, BLOCK_C), tl.cdiv(P, BLOCK_P), True)
    b_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = b_c < C
    m = (i_p * BLOCK_P + tl.arange(0, BLOCK_P) < P)[:, None] & m_c[None, :]
    i_first = i_b.to(tl.int64) * s_b + (i_c * BLOCK_C).to(tl.int64) * s_c + (i_p * BLOCK_P).to(tl.int64) * s_p
    i_x = offsets(s_c, s_p, BLOCK_P, BLOCK_C, LONG)
    b_x = load(p_x + i_first + i_x, m, EVEN, "evict_first")
    b_g = i_b * (C // CG) + b_c // CG
    b_mean, b_rstd = per_channel(p_mean, b_g, m_c, EVEN), per_channel(p_rstd, b_g, m_c, EVEN)
    b_weight, b_bias = per_channel(p_weight, b_c, m_c, EVEN), per_channel(p_bias, b_c, m_c, EVEN)
    if FAST:
        b_y = silu_of_half((b_x - b_mean) * (b_rstd * b_weight * 0.5) + b_bias * 0.5)
    else:
        b_y = silu((b_x - b_mean) * (b_rstd * b_weight) + b_bias, False)
    store(p_y + i_first + i_x, b_y, m, EVEN)


@triton.jit
def slope(b_h, FAST: tl.constexpr):
    """Twice the derivative of SiLU at z = 2 h; FAST: see ``tanh_approx``."""
    if FAST:
        b_t = tanh_approx(b_h)
        return 1.0 + (b_h * (1.0 - b_t * b_t) + b_t)
    else:
        b_s = sigmoid(2.0 * b_h, False)
        return 2.0 * b_s * (1.0 + 2.0 * b_h * (1.0 - b_s))


@triton.jit
def sums_kernel(
    p_x,
    p_dy,
    p_weight,
    p_bias,
    p_mean,
    p_rstd,
    p_dz,
    p_dzx,
    P,
    tiles,
    chunks,
    s_b,
    s_c,
    s_p,
    C: tl.constexpr,
    CG: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    EVEN: tl.constexpr,
    LONG: tl.constexpr,
    FAST: tl.constexpr,
):
    """Per (sample, chunk, channel): sums of dz and of dz * xhat. Grid: B * chunks * cdiv(C, BLOCK_C)."""
    i_c, i_chunk, i_b = place(tl.cdiv(C, BLOCK_C), chunks, False)
    b_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = b_c < C
    b_g = i_b * (C // CG) + b_c // CG
    b_mean, b_rstd = per_channel(p_mean, b_g, m_c, EVEN), per_channel(p_rstd, b_g, m_c, EVEN)
    b_weight, b_bias = per_channel(p_weight, b_c, m_c, EVEN), per_channel(p_bias, b_c, m_c, EVEN)
    b_half_weight, b_half_bias = b_rstd * b_weight * 0.5, b_bias * 0.5
    p_x += i_b.to(tl.int64) * s_b + (i_c * BLOCK_C).to(tl.int64) * s_c
    p_dy += i_b.to(tl.int64) * s_b + (i_c * BLOCK_C).to(tl.int64) * s_c
    i_x = offsets(s_c, s_p, BLOCK_P, BLOCK_C, LONG)
    b_sum = tl.zeros([BLOCK_C], dtype=tl.float32)  # of 2 dz
    b_off_sum = tl.zeros([BLOCK_C], dtype=tl.float32)  # of 2 dz (x - mean)
    for i_tile in range(tiles):
        i_first = (i_chunk * tiles + i_tile) * BLOCK_P
        m = (i_first + tl.arange(0, BLOCK_P) < P)[:, None] & m_c[None, :]
        b_off = load(p_x + i_first.to(tl.int64) * s_p + i_x, m, EVEN, "") - b_mean
        b_dy = load(p_dy + i_first.to(tl.int64) * s_p + i_x, m, EVEN, "")  # 0 outside: nothing is added there
        b_twice = b_dy * slope(b_off * b_half_weight + b_half_bias, FAST)
        b_sum += tl.sum(b_twice, 0)
        b_off_sum += tl.sum(b_twice * b_off, 0)
    i_out = (i_b.to(tl.int64) * chunks + i_chunk) * C + b_c
    store(p_dz + i_out, 0.5 * b_sum, m_c, EVEN)
    store(p_dzx + i_out, 0.5 * b_off_sum * tl.sum(b_rstd, 0), m_c, EVEN)  # a sum over one row


@triton.jit
def merge_sums_kernel(
    p_part_dz,
    p_part_dzx,
    p_weight,
    p_dz,
    p_dzx,
    p_mean_g,
    p_mean_gx,
    C,
    P,
    G,
    chunks,
    CG: tl.constexpr,
    BLOCK_CG: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Per sample: channel sums over the chunks, and the group means of dz * weight and dz * weight * xhat. Grid: B *
    G."""
    i_program = tl.program_id(0)
    i_b, i_g = i_program // G, i_program % G
    b_cg = tl.arange(0, BLOCK_CG)
    m_c = b_cg < CG
    b_c = i_g * CG + b_cg
    i_base = i_b.to(tl.int64) * chunks * C
    b_dz = tl.zeros([BLOCK, BLOCK_CG], dtype=tl.float32)
    b_dzx = tl.zeros([BLOCK, BLOCK_CG], dtype=tl.float32)
    for i_start in range(0, chunks, BLOCK):
        b_k = i_start + tl.arange(0, BLOCK)
        m = (b_k < chunks)[:, None] & m_c[None, :]
        i_in = i_base + b_k.to(tl.int64)[:, None] * C + b_c[None, :]
        b_dz += tl.load(p_part_dz + i_in, mask=m, other=0.0)
        b_dzx += tl.load(p_part_dzx + i_in, mask=m, other=0.0)
    b_dz_c, b_dzx_c = tl.sum(b_dz, 0), tl.sum(b_dzx, 0)
    b_weight = tl.load(p_weight + b_c, mask=m_c, other=0.0).to(tl.float32)
    n = tl.cast(P, tl.float32) * CG
    tl.store(p_dz + i_b.to(tl.int64) * C + b_c, b_dz_c, mask=m_c)
    tl.store(p_dzx + i_b.to(tl.int64) * C + b_c, b_dzx_c, mask=m_c)
    tl.store(p_mean_g + i_program, tl.sum(b_dz_c * b_weight, 0) / n)
    tl.store(p_mean_gx + i_program, tl.sum(b_dzx_c * b_weight, 0) / n)


@triton.jit
def parameters_kernel(p_dz, p_dzx, p_dweight, p_dbias, B, C, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr):
    """dweight and dbias: sums over the samples. Grid: cdiv(C, BLOCK_C)."""
    b_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    b_dz = tl.zeros([BLOCK_B, BLOCK_C], dtype=tl.float32)
    b_dzx = tl.zeros([BLOCK_B, BLOCK_C], dtype=tl.float32)
    for i_start in range(0, B, BLOCK_B):
        b_b = i_start + tl.arange(0, BLOCK_B)
        m = (b_b < B)[:, None] & (b_c < C)[None, :]
        i_in = b_b.to(tl.int64)[:, None] * C + b_c[None, :]
        b_dz += tl.load(p_dz + i_in, mask=m, other=0.0)
        b_dzx += tl.load(p_dzx + i_in, mask=m, other=0.0)
    tl.store(p_dweight + b_c, tl.sum(b_dzx, 0).to(p_dweight.dtype.element_ty), mask=b_c < C)
    tl.store(p_dbias + b_c, tl.sum(b_dz, 0).to(p_dbias.dtype.element_ty), mask=b_c < C)


@triton.jit
def gradient_kernel(
    p_x,
    p_dy,
    p_dx,
    p_weight,
    p_bias,
    p_mean,
    p_rstd,
    p_mean_g,
    p_mean_gx,
    P,
    s_b,
    s_c,
    s_p,
    C: tl.constexpr,
    CG: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    EVEN: tl.constexpr,
    LONG: tl.constexpr,
    FAST: tl.constexpr,
):
    """dx = rstd (dz weight - mean_g - xhat mean_gx), backwards. Grid: B * cdiv(P, BLOCK_P) * cdiv(C, BLOCK_C)."""
    i_c, i_p, i_b = place(tl.cdiv(C, BLOCK_C), tl.cdiv(P, BLOCK_P), True)
    b_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = b_c < C
    m = (i_p * BLOCK_P + tl.arange(0, BLOCK_P) < P)[:, None] & m_c[None, :]
    i_first = i_b.to(tl.int64) * s_b + (i_c * BLOCK_C).to(tl.int64) * s_c + (i_p * BLOCK_P).to(tl.int64) * s_p
    i_x = offsets(s_c, s_p, BLOCK_P, BLOCK_C, LONG)
    b_x = load(p_x + i_first + i_x, m, EVEN, "evict_first")
    b_dy = load(p_dy + i_first + i_x, m, EVEN, "evict_first")
    b_g = i_b * (C // CG) + b_c // CG
    b_mean, b_rstd = per_channel(p_mean, b_g, m_c, EVEN), per_channel(p_rstd, b_g, m_c, EVEN)
    b_mean_g, b_mean_gx = per_channel(p_mean_g, b_g, m_c, EVEN), per_channel(p_mean_gx, b_g, m_c, EVEN)
    b_weight, b_bias = per_channel(p_weight, b_c, m_c, EVEN), per_channel(p_bias, b_c, m_c, EVEN)
    b_half_weight = b_rstd * b_weight * 0.5
    b_off = b_x - b_mean
    b_twice = b_dy * slope(b_off * b_half_weight + b_bias * 0.5, FAST)
    b_dx = b_twice * b_half_weight - (b_rstd * b_mean_g + b_off * (b_rstd * b_rstd * b_mean_gx))
    store(p_dx + i_first + i_x, b_dx, m, EVEN)


# ---- tiles -----------------------------------------------------------------------------------------------------------


@cache
def _tiles(channels: int, pixels: int, last: bool, itemsize: int) -> tuple[Tile, ...]:
    """The candidates for one format, size and dtype."""
    if not last:
        return CONTIGUOUS if pixels >= 512 else SMALL
    if channels <= 32:
        return NARROW
    return tuple(t for t in CHANNELS_LAST if t.block_c <= common.pow2(channels) and _spills_nowhere(t, itemsize))


def _spills_nowhere(tile: Tile, itemsize: int) -> bool:
    """Whether two inputs fit in the registers: at most 128 bytes of each in a thread."""
    return tile.block_p * tile.block_c * itemsize <= 128 * 32 * tile.num_warps


@cache
def _reading(channels: int, pixels: int, last: bool, itemsize: int) -> Tile:
    """The rule for statistics and sums: the longest chunks that still make enough programs of one sample."""
    tiles = _tiles(channels, pixels, last, itemsize)
    if not last or channels <= 32:
        return tiles[0]
    tiles = tuple(tile for tile in CHANNELS_LAST[:3] if tile in tiles)
    enough = (t for t in tiles if cdiv(pixels, t.block_p) * cdiv(channels, t.block_c) >= MIN_PROGRAMS)
    return next(enough, tiles[-1])


@cache
def _writing(channels: int, pixels: int, last: bool, itemsize: int) -> Tile:
    """The rule for y and dx, which reduce nothing."""
    return CHANNELS_LAST[1] if last and channels > 32 else _tiles(channels, pixels, last, itemsize)[0]


def _group_rule(batch: int, sample: int, cached: int) -> int:
    """Samples in a group, for this many bytes of input per sample: groups of equal size that take at most 5/8 of the
    L2 cache, to leave room for the output; the whole batch where a sample alone does not fit."""
    fitting = cached * 5 // 8 // sample
    return batch if fitting == 0 else cdiv(batch, cdiv(batch, fitting))


@cache
def _groups(batch: int, sample: int, cached: int) -> tuple[Group, ...]:
    """Candidates: the rule's first, half and twice that, everything at once."""
    rule = _group_rule(batch, sample, cached)
    return tuple(Group(n) for n in dict.fromkeys((rule, cdiv(rule, 2), min(2 * rule, batch), batch)))


# ---- launchers -------------------------------------------------------------------------------------------------------


class _Image(NamedTuple):
    """x in one of the two dense formats, with what every launch needs of it."""

    dense: Tensor
    last: bool
    channels: int
    pixels: int
    strides: tuple[int, int, int]

    def constants(self, tile: Tile) -> dict[str, int]:
        """What kernels that read the image are compiled for."""
        (tiles, chunks), (_, s_c, s_p) = self.chunks(tile), self.strides
        reach = (tile.block_c - 1) * s_c + (tile.block_p - 1) * s_p
        return {
            "C": self.channels,
            "BLOCK_P": tile.block_p,
            "BLOCK_C": tile.block_c,
            "EVEN": self.channels % tile.block_c == 0 and self.pixels == chunks * tiles * tile.block_p,
            "LONG": reach >= MAX_OFFSET,
            "num_warps": tile.num_warps,
        }

    def formula(self, tile: Tile, groups: int) -> dict[str, int]:
        """The same for those that also normalise."""
        return {**self.constants(tile), "CG": self.channels // groups, "FAST": common.fast(self.dense.dtype)}

    @property
    def size(self) -> tuple[int, int, bool, int]:
        """What rules and candidates depend on."""
        return self.channels, self.pixels, self.last, self.dense.element_size()

    def grid(self, tile: Tile) -> tuple[int]:
        """One program per tile."""
        blocks = cdiv(self.pixels, tile.block_p) * cdiv(self.channels, tile.block_c)
        return (self.dense.shape[0] * blocks,)

    def chunks(self, tile: Tile) -> tuple[int, int]:
        """Tiles of a chunk, and chunks of a sample."""
        steps = cdiv(self.pixels, tile.block_p)
        tiles = cdiv(steps, MAX_CHUNKS)
        return tiles, cdiv(steps, tiles)

    def key(self, *more: int) -> tuple[int | str, ...]:
        """What a choice of tiles depends on."""
        return (self.channels, self.pixels, "last" if self.last else "first", str(self.dense.dtype), *more)


def _image(x: Tensor) -> _Image:
    last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    channels, pixels = x.shape[1], x.shape[2] * x.shape[3]
    strides = (channels * pixels, 1, channels) if last else (channels * pixels, pixels, 1)
    return _Image(x if last else x.contiguous(), last, channels, pixels, strides)


def _merge_shape(per_group: int) -> tuple[int, int]:
    """BLOCK_CG and BLOCK of the merging kernels: about 4096 values at a time."""
    block_c = common.pow2(per_group)
    return block_c, max(1, min(MERGE_BLOCK, 4096 // block_c))


def _merge_constants(per_group: int) -> dict[str, int]:
    block_cg, block = _merge_shape(per_group)
    return {"CG": per_group, "BLOCK_CG": block_cg, "BLOCK": block, "num_warps": 4}


def _split(samples: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The tensors, whose first axis is the batch, this many samples at a time."""
    batch = tensors[0].shape[0]
    if samples >= batch:
        yield tensors
        return
    for first in range(0, batch, samples):
        yield tuple(tensor[first : first + samples] for tensor in tensors)


def _room(image: _Image, tile: Tile) -> Tensor:
    """Two uninitialised fp32 values per sample, chunk and channel."""
    _, chunks = image.chunks(tile)
    shape = (2, image.dense.shape[0], chunks, image.channels)
    return torch.empty(shape, dtype=torch.float32, device=image.dense.device)


def _merge(part: Tensor, pixels: int, chunk: int, eps: float, mean: Tensor, rstd: Tensor) -> None:
    (batch, groups), (chunks, channels) = mean.shape, part.shape[2:]
    sizes = (channels, pixels, groups, chunk, chunks)
    merge_moments_kernel[(batch * groups,)](
        part[0], part[1], mean, rstd, *sizes, eps, **_merge_constants(channels // groups)
    )


def _statistics(image: _Image, eps: float, mean: Tensor, rstd: Tensor, tile: Tile) -> None:
    """Fill ``mean`` and ``rstd`` [B, G]."""
    batch, channels, pixels = image.dense.shape[0], image.channels, image.pixels
    tiles, chunks = image.chunks(tile)
    part = _room(image, tile)
    moments_kernel[(batch * chunks * cdiv(channels, tile.block_c),)](
        image.dense, part[0], part[1], pixels, tiles, chunks, *image.strides, **image.constants(tile)
    )
    _merge(part, pixels, tiles * tile.block_p, eps, mean, rstd)


def _apply(image: _Image, y: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, tile: Tile) -> None:
    """Fill ``y``, which has the strides of ``image.dense``."""
    apply_kernel[image.grid(tile)](
        image.dense,
        y,
        weight,
        bias,
        mean,
        rstd,
        image.pixels,
        *image.strides,
        **image.formula(tile, mean.shape[1]),
    )


def _chosen(name: str, image: _Image, run: Callable[[Tile], object]) -> Tile:
    """The tile of a kernel that reads an image and writes sums. The bits of a sample's result depend on it, so the
    batch has no say."""
    return choose(name, image.key(), _tiles(*image.size), _reading(*image.size), run)


def merge_moments(part: Tensor, pixels: int, chunk: int, num_groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """Statistics of groups from those of chunks of channels, in a fixed order.

    Args:
        part: [2, B, chunks, C] fp32, contiguous: mean and sum of squared deviations of each channel in each chunk.
        pixels: of a sample; at least 1.
        chunk: pixels in a chunk; the last one may be shorter.
        num_groups: G, divides C.
        eps: added to the variance.

    Returns:
        mean and 1 / standard deviation, both [B, G] fp32.
    """
    mean = torch.empty((part.shape[1], num_groups), dtype=torch.float32, device=part.device)
    rstd = torch.empty_like(mean)
    _merge(part, pixels, chunk, eps, mean, rstd)
    return mean, rstd


def moments(x: Tensor, num_groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and 1 / standard deviation of each group of ``x`` [B, C, H, W], both [B, G] fp32; NaN where x is empty.

    channels_last and contiguous are read as they lie; another layout is copied.
    """
    mean = torch.empty((x.shape[0], num_groups), dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    if x.numel() == 0:
        return mean.fill_(float("nan")), rstd.fill_(float("nan"))
    image = _image(x)
    run = partial(_statistics, image, eps, mean, rstd)
    run(_chosen("group_norm_silu.moments", image, run))
    return mean, rstd


def _planned(names: tuple[str, str, str], image: _Image, inputs: int, run: Callable[[Tile, Tile, Group], None]) -> None:
    """Run both passes with chosen tiles for reading and writing and a chosen group of samples; ``inputs``: tensors of
    the size of x that both read. While tuning each choice is judged by the time of the whole."""
    batch = image.dense.shape[0]
    sample = inputs * image.channels * image.pixels * image.dense.element_size()
    groups = _groups(batch, sample, common.cache_bytes(image.dense))
    rule, group = _writing(*image.size), groups[0]
    read = _chosen(names[0], image, lambda tile: run(tile, rule, group))
    write = choose(names[1], image.key(batch), _tiles(*image.size), rule, lambda tile: run(read, tile, group))
    run(read, write, choose(names[2], image.key(batch), groups, group, lambda group: run(read, write, group)))


def forward(x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """y, mean and rstd; the arguments are those of ``snapgen::group_norm_silu``."""
    y = torch.empty_like(x)
    if x.numel() == 0:
        return y, *moments(x, num_groups, eps)
    mean = torch.empty((x.shape[0], num_groups), dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    image = _image(x)
    out = y if y.stride() == image.dense.stride() else torch.empty_like(image.dense)
    weight, bias = weight.contiguous(), bias.contiguous()

    def run(read: Tile, write: Tile, group: Group) -> None:
        for dense, y_rows, mean_rows, rstd_rows in _split(group.samples, image.dense, out, mean, rstd):
            rows = image._replace(dense=dense)
            _statistics(rows, eps, mean_rows, rstd_rows, read)
            _apply(rows, y_rows, weight, bias, mean_rows, rstd_rows, write)

    _planned(("group_norm_silu.moments", "group_norm_silu.apply", "group_norm_silu.forward"), image, 1, run)
    return y if out is y else y.copy_(out), mean, rstd


class _Saved(NamedTuple):
    """What the backward's passes take besides the image."""

    dy: Tensor
    weight: Tensor
    bias: Tensor
    mean: Tensor
    rstd: Tensor


def _sums(image: _Image, saved: _Saved, dz: Tensor, dzx: Tensor, tile: Tile) -> Tensor:
    """Fill ``dz`` and ``dzx`` [B, C], sums over the pixels; returns the means of both over groups, [2, B, G]."""
    (batch, groups), channels = saved.mean.shape, image.channels
    tiles, chunks = image.chunks(tile)
    part = _room(image, tile)
    sums_kernel[(batch * chunks * cdiv(channels, tile.block_c),)](
        image.dense,
        *saved,
        part[0],
        part[1],
        image.pixels,
        tiles,
        chunks,
        *image.strides,
        **image.formula(tile, groups),
    )
    means = torch.empty((2, batch, groups), dtype=torch.float32, device=part.device)
    merge_sums_kernel[(batch * groups,)](
        part[0],
        part[1],
        saved.weight,
        dz,
        dzx,
        means[0],
        means[1],
        channels,
        image.pixels,
        groups,
        chunks,
        **_merge_constants(channels // groups),
    )
    return means


def _gradient(image: _Image, saved: _Saved, means: Tensor, dx: Tensor, tile: Tile) -> None:
    """Fill ``dx``, which has the strides of ``image.dense``."""
    gradient_kernel[image.grid(tile)](
        image.dense,
        saved.dy,
        dx,
        *saved[1:],
        means[0],
        means[1],
        image.pixels,
        *image.strides,
        **image.formula(tile, saved.mean.shape[1]),
    )


def _both_passes(image: _Image, saved: _Saved, sums: Tensor, dx: Tensor) -> None:
    """Fill ``sums`` [2, B, C], of dz and of dz xhat over the pixels, and ``dx``."""

    def run(read: Tile, write: Tile, group: Group) -> None:
        tensors = (image.dense, dx, sums[0], sums[1], saved.dy, saved.mean, saved.rstd)
        for dense, dx_rows, dz, dzx, dy, mean, rstd in _split(group.samples, *tensors):
            rows, kept = image._replace(dense=dense), saved._replace(dy=dy, mean=mean, rstd=rstd)
            means = _sums(rows, kept, dz, dzx, read)
            _gradient(rows, kept, means, dx_rows, write)

    _planned(("group_norm_silu.sums", "group_norm_silu.gradient", "group_norm_silu.backward"), image, 2, run)


def backward(
    dy: Tensor,
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    mean: Tensor,
    rstd: Tensor,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dweight and dbias; the arguments are those of ``snapgen::group_norm_silu_backward``."""
    dx = torch.empty_like(x) if needs[0] else dy.new_empty(0)
    dweight, dbias = torch.empty_like(weight.contiguous()), torch.empty_like(bias.contiguous())
    if x.numel() == 0:
        return dx, dweight.zero_() if needs[1] else dy.new_empty(0), dbias.zero_() if needs[2] else dy.new_empty(0)
    image = _image(x)
    batch, channels = x.shape[:2]
    dy = dy.contiguous(memory_format=torch.channels_last if image.last else torch.contiguous_format)
    weight, bias = weight.contiguous(), bias.contiguous()
    sums = torch.empty((2, batch, channels), dtype=torch.float32, device=x.device)

    saved = _Saved(dy, weight, bias, mean, rstd)
    if needs[0]:
        out = dx if dx.stride() == image.dense.stride() else torch.empty_like(image.dense)
        _both_passes(image, saved, sums, out)
        dx = dx if out is dx else dx.copy_(out)
    else:
        alone = partial(_sums, image, saved, sums[0], sums[1])
        alone(_chosen("group_norm_silu.sums", image, alone))
    if needs[1] or needs[2]:
        parameters_kernel[(cdiv(channels, 64),)](
            sums[0], sums[1], dweight, dbias, batch, channels, BLOCK_B=16, BLOCK_C=64, num_warps=4
        )
    return dx, dweight if needs[1] else dy.new_empty(0), dbias if needs[2] else dy.new_empty(0)


# ---- compiling without a GPU -----------------------------------------------------------------------------------------


def builds(dtype: torch.dtype, nvidia: bool) -> list[Build]:
    """Every launch that the tiles allow, for activations of ``dtype`` and fp32 parameters."""
    found = [Build(parameters_kernel, {"BLOCK_B": 16, "BLOCK_C": 64}, {}, {"num_warps": 4})]
    for per_group in (1, 8, 28):
        constants = _merge_constants(per_group)
        options = {"num_warps": constants.pop("num_warps")}
        found += [Build(kernel, constants, {}, options) for kernel in (merge_moments_kernel, merge_sums_kernel)]
    fast = nvidia and dtype == torch.bfloat16
    for even in (True, False):
        for tile in (*(t for t in CHANNELS_LAST if _spills_nowhere(t, dtype.itemsize)), *NARROW):
            found += _tile_builds(dtype, tile, ("P", "s_b", "s_p"), fast, s_c=1, EVEN=even, LONG=False)
        for tile in (*CONTIGUOUS, *SMALL):
            found += _tile_builds(dtype, tile, ("P", "s_b", "s_c"), fast, s_p=1, EVEN=even, LONG=False)
    found += _tile_builds(dtype, CONTIGUOUS[0], ("P", "s_b", "s_c"), fast, s_p=1, EVEN=False, LONG=True)
    # One pixel: Triton makes arguments of 1 constants.
    single = [*found[1:3], *_tile_builds(dtype, SMALL[0], (), fast, EVEN=False, LONG=False)]
    ones = ("P", "G", "chunk", "chunks", "tiles", "s_b", "s_c", "s_p")
    return found + [
        build._replace(constants={**build.constants, **{name: 1 for name in ones if name in build.kernel.arg_names}})
        for build in single
    ]


def _tile_builds(dtype: torch.dtype, tile: Tile, sizes: tuple[str, ...], fast: bool, **constants: Any) -> list[Build]:
    """The four kernels that read images."""
    images = {
        apply_kernel: ("p_x", "p_y"),
        sums_kernel: ("p_x", "p_dy"),
        gradient_kernel: ("p_x", "p_dy", "p_dx"),
    }
    return [common.build(moments_kernel, dtype, ("p_x",), tile, sizes, C=256, **constants)] + [
        common.build(kernel, dtype, pointers, tile, sizes, C=256, CG=8, FAST=fast, **constants)
        for kernel, pointers in images.items()
    ]
