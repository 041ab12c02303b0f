"""GroupNorm + SiLU on the GPU, and its backward in ``group_norm_silu_backward``; the contract is in
``snapgen_kernels/group_norm_silu.py``.

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
two plain passes and 268 MB at the floor. Each group of samples costs three launches, so groups are as large as fits.
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
from snapgen_kernels._triton.common import Build, cdiv, silu, silu_of_half
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
MERGE_BLOCK = 1024
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


# ---- tiles -----------------------------------------------------------------------------------------------------------


@cache
def _tiles(channels: int, pixels: int, last: bool, itemsize: int) -> tuple[Tile, ...]:
    """The candidates for one format, size and dtype."""
    if not last:
        return CONTIGUOUS if pixels >= 512 else SMALL
    if channels <= 32:
        return NARROW
    return tuple(t for t in CHANNELS_LAST if t.block_c <= common.pow2(channels) and spills_nowhere(t, itemsize))


def spills_nowhere(tile: Tile, itemsize: int) -> bool:
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


class Image(NamedTuple):
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


def image_of(x: Tensor) -> Image:
    last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    channels, pixels = x.shape[1], x.shape[2] * x.shape[3]
    strides = (channels * pixels, 1, channels) if last else (channels * pixels, pixels, 1)
    return Image(x if last else x.contiguous(), last, channels, pixels, strides)


def _merge_shape(per_group: int) -> tuple[int, int]:
    """BLOCK_CG and BLOCK of the merging kernels: about 4096 values at a time."""
    block_c = common.pow2(per_group)
    return block_c, max(1, min(MERGE_BLOCK, 4096 // block_c))


def merge_constants(per_group: int) -> dict[str, int]:
    block_cg, block = _merge_shape(per_group)
    return {"CG": per_group, "BLOCK_CG": block_cg, "BLOCK": block, "num_warps": 4}


def split(samples: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The tensors, whose first axis is the batch, this many samples at a time."""
    batch = tensors[0].shape[0]
    if samples >= batch:
        yield tensors
        return
    for first in range(0, batch, samples):
        yield tuple(tensor[first : first + samples] for tensor in tensors)


def room(image: Image, tile: Tile) -> Tensor:
    """Two uninitialised fp32 values per sample, chunk and channel."""
    _, chunks = image.chunks(tile)
    shape = (2, image.dense.shape[0], chunks, image.channels)
    return torch.empty(shape, dtype=torch.float32, device=image.dense.device)


def _merge(part: Tensor, pixels: int, chunk: int, eps: float, mean: Tensor, rstd: Tensor) -> None:
    (batch, groups), (chunks, channels) = mean.shape, part.shape[2:]
    sizes = (channels, pixels, groups, chunk, chunks)
    merge_moments_kernel[(batch * groups,)](
        part[0], part[1], mean, rstd, *sizes, eps, **merge_constants(channels // groups)
    )


def _statistics(image: Image, eps: float, mean: Tensor, rstd: Tensor, tile: Tile) -> None:
    """Fill ``mean`` and ``rstd`` [B, G]."""
    batch, channels, pixels = image.dense.shape[0], image.channels, image.pixels
    tiles, chunks = image.chunks(tile)
    part = room(image, tile)
    moments_kernel[(batch * chunks * cdiv(channels, tile.block_c),)](
        image.dense, part[0], part[1], pixels, tiles, chunks, *image.strides, **image.constants(tile)
    )
    _merge(part, pixels, tiles * tile.block_p, eps, mean, rstd)


def _apply(image: Image, y: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, tile: Tile) -> None:
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


def chosen(name: str, image: Image, run: Callable[[Tile], object]) -> Tile:
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
    image = image_of(x)
    run = partial(_statistics, image, eps, mean, rstd)
    run(chosen("group_norm_silu.moments", image, run))
    return mean, rstd


def planned(names: tuple[str, str, str], image: Image, inputs: int, run: Callable[[Tile, Tile, Group], None]) -> None:
    """Run both passes with chosen tiles for reading and writing and a chosen group of samples; ``inputs``: tensors of
    the size of x that both read. While tuning each choice is judged by the time of the whole."""
    batch = image.dense.shape[0]
    sample = inputs * image.channels * image.pixels * image.dense.element_size()
    groups = _groups(batch, sample, common.cache_bytes(image.dense))
    rule, group = _writing(*image.size), groups[0]
    read = chosen(names[0], image, lambda tile: run(tile, rule, group))
    write = choose(names[1], image.key(batch), _tiles(*image.size), rule, lambda tile: run(read, tile, group))
    run(read, write, choose(names[2], image.key(batch), groups, group, lambda group: run(read, write, group)))


def forward(x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """y, mean and rstd; the arguments are those of ``snapgen::group_norm_silu``."""
    y = torch.empty_like(x)
    if x.numel() == 0:
        return y, *moments(x, num_groups, eps)
    mean = torch.empty((x.shape[0], num_groups), dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    image = image_of(x)
    out = y if y.stride() == image.dense.stride() else torch.empty_like(image.dense)
    weight, bias = weight.contiguous(), bias.contiguous()

    def run(read: Tile, write: Tile, group: Group) -> None:
        for dense, y_rows, mean_rows, rstd_rows in split(group.samples, image.dense, out, mean, rstd):
            rows = image._replace(dense=dense)
            _statistics(rows, eps, mean_rows, rstd_rows, read)
            _apply(rows, y_rows, weight, bias, mean_rows, rstd_rows, write)

    planned(("group_norm_silu.moments", "group_norm_silu.apply", "group_norm_silu.forward"), image, 1, run)
    return y if out is y else y.copy_(out), mean, rstd


# ---- compiling without a GPU -----------------------------------------------------------------------------------------


Listing = Callable[..., list[Build]]


def tile_builds(listed: Listing, dtype: torch.dtype) -> list[Build]:
    """Every launch of kernels that read images, for activations of ``dtype`` and fp32 parameters. ``listed`` gives
    those of a tile, of the sizes that are multiples of 16, and of constants."""
    found: list[Build] = []
    for even in (True, False):
        for tile in (*(t for t in CHANNELS_LAST if spills_nowhere(t, dtype.itemsize)), *NARROW):
            found += listed(tile, ("P", "s_b", "s_p"), s_c=1, EVEN=even, LONG=False)
        for tile in (*CONTIGUOUS, *SMALL):
            found += listed(tile, ("P", "s_b", "s_c"), s_p=1, EVEN=even, LONG=False)
    found += listed(CONTIGUOUS[0], ("P", "s_b", "s_c"), s_p=1, EVEN=False, LONG=True)
    return found


def merge_builds(kernel: Any) -> list[Build]:
    """A merging kernel, for groups of one channel and of the model's."""
    found: list[Build] = []
    for per_group in (1, 8, 28):
        constants = merge_constants(per_group)
        options = {"num_warps": constants.pop("num_warps")}
        found.append(Build(kernel, constants, {}, options))
    return found


def single(listed: Listing, merging: Build) -> list[Build]:
    """The launches for one pixel: Triton makes arguments of 1 constants."""
    ones = ("P", "G", "chunk", "chunks", "tiles", "s_b", "s_c", "s_p")
    return [
        build._replace(constants={**build.constants, **{name: 1 for name in ones if name in build.kernel.arg_names}})
        for build in [merging, *listed(SMALL[0], (), EVEN=False, LONG=False)]
    ]


def builds(dtype: torch.dtype, nvidia: bool) -> list[Build]:
    """Every kernel of this file in every tile that its launchers may choose."""
    fast = nvidia and dtype == torch.bfloat16

    def listed(tile: Tile, sizes: tuple[str, ...], **constants: Any) -> list[Build]:
        return [
            common.build(moments_kernel, dtype, ("p_x",), tile, sizes, C=256, **constants),
            common.build(apply_kernel, dtype, ("p_x", "p_y"), tile, sizes, C=256, CG=8, FAST=fast, **constants),
        ]

    merging = merge_builds(merge_moments_kernel)
    return [*merging, *tile_builds(listed, dtype), *single(listed, merging[0])]
