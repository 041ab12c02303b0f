"""What the GPU kernels of a separable convolution must move and compute, and the plan that follows: arithmetic alone.

Half of a residual block is ``y = PW(DW(SiLU(GN(x)))) + shift + residual``. Symbols: P pixels of x and Q of y, over all
samples; C channels in, O out; e bytes an element. Each kernel reads its inputs and writes its outputs once; what is
per channel (norms, biases, depthwise weights) is left out. Forward:

==========  =========================================  ======================  =====================================
kernel      bytes                                      FLOPs                   special-function results
==========  =========================================  ======================  =====================================
moments     P C e, only where nobody has them yet      4 P C                   0
merge       8 C per tile of 128 pixels                 0                       0
depthwise   P C e + Q C e                              18 Q C + 6 E, or after  s E
                                                       nearest 2x 8 Q C + 6 E
product     Q C e + C O e + Q O e, + Q O e (residual)  2 Q C O                 0
fused       P C e + C O e + Q O e, + Q O e (residual)  2 Q C O + 18 n Q C + 6  s E
                                                       E
==========  =========================================  ======================  =====================================

E is how often a normalised input is evaluated, s what one SiLU takes: one tanh for 2-byte elements, else an exponential
and a reciprocal. ``depthwise`` scans 16 rows of four columns: E = Q C (16 + 2) / 16 (4 + 2) / 4; for nearest 2x, 16
rows of two columns of x: E = P C (16 + 2) / 16 (2 + 2) / 2; with stride 2 it takes nine taps: E = 9 Q C. ``fused``
feeds the product from nine taps: E = 9 n Q C, n blocks of 256 outputs. Without a norm E is 0. A product whose output is
normalised next also writes its partial statistics, 8 O bytes per tile; a shortcut adds its own product.

Backward: ``depthwise`` once more, ``weight gradient`` (Q O e + Q C e, and fp32 partials that ``sum of partials`` adds
up), ``product of dy`` (Q O e + C O e + Q C e), ``depthwise backward`` (Q C e + 2 P C e, E = P C), ``norm gradient``
(3 P C e, + P C e where something is added).

A norm alone reads x twice, for its statistics and to apply them; its backward reads x and dy twice.

A blocked plan works through a few samples at a time, so that what is read soon after (the output of ``depthwise``, the
input of a norm) stays in the L2 cache; its bytes then cost the cache's rate. Blocks so short that launching them takes
longer are not planned.

Instructions decide too where they outnumber bytes: the machine code of ``depthwise`` has 20 for each value of its scan
and 9 after nearest 2x, that of ``fused`` 8 for each of its taps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

OPS = ("group_norm_silu", "sepconv", "resblock")
FORMS = ("split", "blocked", "fused")

_TILE = 128  # pixels whose partial statistics a program writes
_HALO = (16 + 2) / 16 * (4 + 2) / 4  # inputs over outputs of what a thread of `depthwise` scans
_HALO_UP = (16 + 2) / 16 * (2 + 2) / 2  # over pixels of the small image, for nearest 2x
_OUTPUTS = 256  # channels out that a program of `fused` computes
# Instructions for a value of `depthwise`, for one after nearest 2x, and for a tap of `fused`.
_SCANNED, _SPREAD, _TAP = 20, 9, 8
_SHORTEST = 50e-6  # seconds of a block: a CPU takes about as long to launch one
_EVALUATION = 6  # FLOPs of norm and SiLU besides the special functions
_PROCESSORS = 132  # over which a weight gradient is split
_EFFICIENCY = 0.8  # of a large matrix product's rate that a kernel with an epilogue is taken to reach


class Rates(NamedTuple):
    """What a GPU can do at most, per second.

    Attributes:
        copy: bytes through memory. l2: bytes through the L2 cache.
        products: FLOPs of 2-byte matrix products. vector: all other FLOPs, and those of fp32 products.
        special: results of tanh, exponential and reciprocal. instructions: of all threads.
        cache: bytes of L2 that a block of samples may fill. launch: seconds that a kernel takes to start and to end.
    """

    copy: float
    l2: float
    products: float
    vector: float
    special: float
    instructions: float
    cache: int
    launch: float


# Assumed: 132 processors at 1.98 GHz, each with instructions for 128 threads and 16 special-function results a clock.
H200 = Rates(4.3e12, 6e12, 790e12, 50e12, 132 * 16 * 1.98e9, 132 * 128 * 1.98e9, 24 << 20, 2e-6)


class Kernel(NamedTuple):
    """What all launches of one kernel take together. ``cached``: bytes that need not leave the L2 cache."""

    name: str
    bytes: int
    cached: int = 0
    products: int = 0
    vector: int = 0
    special: int = 0
    instructions: int = 0
    launches: int = 1

    @property
    def flops(self) -> int:
        return self.products + self.vector

    def floor(self, rates: Rates) -> float:
        """Seconds below which it cannot get, whichever of memory, cache and units is slowest."""
        return self._slowest(rates, 1.0)

    def seconds(self, rates: Rates) -> float:
        """Predicted: the floor with products at a share of their rate, and the launches."""
        return self._slowest(rates, _EFFICIENCY) + self.launches * rates.launch

    def _slowest(self, rates: Rates, efficiency: float) -> float:
        return max(
            self.bytes / rates.copy,
            (self.bytes + self.cached) / rates.l2,
            self.products / (efficiency * rates.products),
            self.vector / rates.vector,
            self.special / rates.special,
            self.instructions / rates.instructions,
        )


class Half(NamedTuple):
    """A separable convolution. ``measured``: whoever wrote x left its partial statistics; ``emits``: this one leaves
    those of y; ``shortcut``: channels of the block's input where that is projected onto the output, else 0."""

    batch: int
    channels: int
    outputs: int
    height: int
    width: int
    itemsize: int
    norm: bool = True
    stride: int = 1
    upsample: bool = False
    residual: bool = False
    shortcut: int = 0
    measured: bool = False
    emits: bool = False

    @property
    def pixels_in(self) -> int:
        return self.batch * self.height * self.width

    @property
    def pixels_out(self) -> int:
        scale = 2 if self.upsample else 1
        height, width = ((side * scale - 1) // self.stride + 1 for side in (self.height, self.width))
        return self.batch * height * width

    @property
    def scratch(self) -> int:
        """Bytes of the depthwise convolution's output."""
        return self.pixels_out * self.channels * self.itemsize

    def evaluations(self) -> int:
        """How often ``depthwise`` evaluates a normalised input."""
        if not self.norm:
            return 0
        if self.stride == 1 and self.upsample:
            return int(self.pixels_in * self.channels * _HALO_UP)
        return int(self.pixels_out * self.channels * (_HALO if self.stride == 1 else 9))


def samples_in_cache(batch: int, moved: int, rates: Rates = H200) -> int:
    """Samples per block, as even as can be, so that a block's share of ``moved`` bytes stays in the L2 cache; all of
    them where one sample alone is too large."""
    fitting = rates.cache * batch // max(moved, 1)
    if not 0 < fitting < batch:
        return batch
    return math.ceil(batch / math.ceil(batch / fitting))


def forward(half: Half, form: str = "split", rates: Rates = H200) -> list[Kernel]:
    """The kernels of one half block under one of ``FORMS``."""
    found: list[Kernel] = []
    elements = half.pixels_in * half.channels
    if half.norm:
        partials = _partials(half.pixels_in, half.channels)
        if not half.measured:
            found.append(Kernel("moments", elements * half.itemsize + partials, vector=4 * elements))
        found.append(Kernel("merge", partials))
    if form == "fused":
        return [*found, _fused(half)]
    stays, launches = _blocks(half.batch, half.scratch, form, rates)
    found += [kernel._replace(launches=launches) for kernel in (_depthwise(half, stays), _product(half, stays))]
    return found


def backward(half: Half, form: str = "split", adds: bool = False, rates: Rates = H200) -> list[Kernel]:
    """The kernels of one half block's gradients; ``adds``: dx has something added to it. Blocks go from dy to what
    ``depthwise backward`` gives."""
    size, pixels = half.itemsize, half.pixels_out
    wide, inputs = pixels * half.outputs, half.pixels_in * half.channels
    stays, launches = _blocks(half.batch, half.scratch, form, rates)
    written, cached = (0, half.scratch) if stays else (half.scratch, 0)
    moved = (wide + half.channels * half.outputs) * size + written
    evaluations = inputs if half.norm else 0
    found = [
        _depthwise(half, False),
        *_weight_gradient("weight gradient", half, half.channels),
        _with_product(Kernel("product of dy", moved, cached=cached, launches=launches), half, half.channels),
        Kernel(
            "depthwise backward",
            written + 2 * inputs * size,
            cached=cached,
            vector=36 * pixels * half.channels + _EVALUATION * evaluations,
            special=_silu(size) * evaluations,
            launches=launches,
        ),
    ]
    if half.shortcut:
        moved = (wide + pixels * half.shortcut + half.shortcut * half.outputs) * size
        found.append(_with_product(Kernel("shortcut of dy", moved), half, half.shortcut))
        found += _weight_gradient("shortcut weight gradient", half, half.shortcut)
    if half.norm:
        moved = (4 if adds else 3) * inputs * size
        found.append(Kernel("norm gradient", moved, vector=12 * inputs, special=_silu(size) * inputs))
    return found


def kernels(
    op: str, dims: Mapping[str, int], itemsize: int, mode: str, form: str = "split", rates: Rates = H200
) -> list[Kernel]:
    """Every kernel of a call of one of ``OPS``, in order. ``dims`` has the names of ``snapgen_kernels.testing``;
    ``mode`` is ``fwd`` or ``bwd``, and ``form`` one of ``FORMS``; backwards and norms alone are never fused."""
    if op == "group_norm_silu":
        return _norm(dims, itemsize, mode, form, rates)
    halves = _halves(op, dims, itemsize)
    if mode == "fwd":
        parts = [forward(half, form, rates) for half in halves]
    else:
        # The block's input also reaches its output past both halves.
        parts = [backward(half, form, len(halves) == 2 and half is halves[0], rates) for half in halves]
    numbered = [
        [kernel._replace(name=f"{number}: {kernel.name}") for kernel in part] if len(halves) > 1 else part
        for number, part in enumerate(parts, 1)
    ]
    return [kernel for part in (numbered if mode == "fwd" else reversed(numbered)) for kernel in part]


class Plan(NamedTuple):
    """How to run a half block. ``form``: ``split`` or ``fused``; ``samples``: of a block, the batch where it is not cut
    up; ``seconds``: predicted for the kernels after the statistics."""

    form: str
    samples: int
    seconds: float


@lru_cache(maxsize=4096)
def choose_plan(
    batch: int,
    channels: int,
    outputs: int,
    height: int,
    width: int,
    itemsize: int,
    *,
    norm: bool = True,
    stride: int = 1,
    upsample: bool = False,
    residual: bool = False,
    shortcut: int = 0,
    rates: Rates = H200,
) -> Plan:
    """The plan that is predicted to be fastest; ``split`` on whole batches where two are equal.

    Args:
        batch, channels, outputs, height, width: B, C and O, and the size of x.
        itemsize: bytes of an element of x.
        norm: whether SiLU(GroupNorm(x)) comes first. stride, upsample, residual: as in :func:`snapgen_kernels.sepconv`.
        shortcut: channels of a projected residual, or 0.
        rates: of the GPU.
    """
    half = Half(batch, channels, outputs, height, width, itemsize, norm, stride, upsample, residual, shortcut, True)
    return min(_plans(half, rates), key=lambda plan: plan.seconds)


def plans(op: str, dims: Mapping[str, int], itemsize: int, rates: Rates = H200) -> list[Plan]:
    """:func:`choose_plan` for each half of a call of one of ``OPS``; a norm alone has none."""
    return [
        choose_plan(*half[:6], norm=half.norm, stride=half.stride, upsample=half.upsample, residual=half.residual,
                    shortcut=half.shortcut, rates=rates)
        for half in _halves(op, dims, itemsize)
    ]  # fmt: skip


def total(found: Sequence[Kernel], rates: Rates) -> float:
    """The kernels' floors one after the other, in seconds."""
    return sum(kernel.floor(rates) for kernel in found)


def _plans(half: Half, rates: Rates) -> Iterator[Plan]:
    for form in FORMS:
        samples = samples_in_cache(half.batch, half.scratch, rates) if form == "blocked" else half.batch
        seconds = sum(kernel.seconds(rates) for kernel in forward(half, form, rates) if kernel.name != "merge")
        # Nothing here tells what tensor cores do with fp32, which the fused kernel leaves little room for.
        if form == "fused" and half.itemsize > 2:
            continue
        if samples == half.batch or samples * seconds > _SHORTEST * half.batch:
            yield Plan("fused" if form == "fused" else "split", samples, seconds)


def _blocks(batch: int, moved: int, form: str, rates: Rates) -> tuple[bool, int]:
    """Whether a block's share of ``moved`` bytes stays in the L2 cache, and how many blocks there are."""
    samples = samples_in_cache(batch, moved, rates) if form == "blocked" else batch
    return moved * samples <= rates.cache * batch, math.ceil(batch / max(samples, 1))


def _silu(itemsize: int) -> int:
    return 1 if itemsize == 2 else 2


def _partials(pixels: int, channels: int) -> int:
    return 8 * channels * math.ceil(pixels / _TILE)


def _depthwise(half: Half, stays: bool) -> Kernel:
    evaluations = half.evaluations()
    moved, values = half.pixels_in * half.channels * half.itemsize, half.pixels_out * half.channels
    spreads = half.upsample and half.stride == 1
    return Kernel(
        "depthwise",
        moved + (0 if stays else half.scratch),
        cached=half.scratch if stays else 0,
        vector=(8 if spreads else 18) * values + _EVALUATION * evaluations,
        special=_silu(half.itemsize) * evaluations,
        instructions=(_SPREAD if spreads else _SCANNED) * values,
    )


def _product(half: Half, stays: bool) -> Kernel:
    moved = _epilogue(half) + half.channels * half.outputs * half.itemsize + (0 if stays else half.scratch)
    kernel = Kernel("product", moved, cached=half.scratch if stays else 0)
    return _with_product(kernel, half, half.channels + half.shortcut)


def _fused(half: Half) -> Kernel:
    taps = 9 * math.ceil(half.outputs / _OUTPUTS) * half.pixels_out * half.channels
    moved = _epilogue(half) + (half.pixels_in + half.outputs) * half.channels * half.itemsize
    evaluations = taps if half.norm else 0
    vector, special = 2 * taps + _EVALUATION * evaluations, _silu(half.itemsize) * evaluations
    kernel = Kernel("fused", moved, vector=vector, special=special, instructions=_TAP * taps)
    return _with_product(kernel, half, half.channels + half.shortcut)


def _epilogue(half: Half) -> int:
    """Bytes of y, of what is added to it, and of its partial statistics."""
    wide = half.pixels_out * half.outputs * half.itemsize
    shortcut = half.shortcut * (half.pixels_out + half.outputs) * half.itemsize
    emitted = _partials(half.pixels_out, half.outputs) if half.emits else 0
    return wide * (2 if half.residual else 1) + shortcut + emitted


def _with_product(kernel: Kernel, half: Half, channels: int) -> Kernel:
    """``kernel`` with a product of all output pixels by ``channels`` by the outputs; fp32 takes vector units."""
    flops = 2 * half.pixels_out * channels * half.outputs
    if half.itemsize == 2:
        return kernel._replace(products=kernel.products + flops)
    return kernel._replace(vector=kernel.vector + flops)


def _weight_gradient(name: str, half: Half, channels: int) -> list[Kernel]:
    weights = channels * half.outputs
    splits = max(1, _PROCESSORS // (math.ceil(channels / _TILE) * math.ceil(half.outputs / _TILE)))
    moved = half.pixels_out * (half.outputs + channels) * half.itemsize + 4 * splits * weights
    gradient = _with_product(Kernel(name, moved), half, channels)
    return [
        gradient,
        Kernel("sum of partials", 4 * splits * weights + weights * half.itemsize, vector=splits * weights),
    ]


def _norm(dims: Mapping[str, int], itemsize: int, mode: str, form: str, rates: Rates) -> list[Kernel]:
    pixels, channels = dims["B"] * dims["H"] * dims["W"], dims["C"]
    elements, partials = pixels * channels, _partials(pixels, channels)
    one = elements * itemsize
    special = _silu(itemsize) * elements
    read = one if mode == "fwd" else 2 * one  # x, or x and dy: once for the sums and once more
    stays, launches = _blocks(dims["B"], read, form, rates)
    again = dict(bytes=one + (0 if stays else read), cached=read if stays else 0, special=special)
    merge = Kernel("merge", partials)
    if mode == "fwd":
        found = [
            Kernel("moments", read + partials, vector=4 * elements),
            merge,
            Kernel("apply", vector=_EVALUATION * elements, **again),
        ]
        return [kernel._replace(launches=launches) for kernel in found]
    found = [
        Kernel("sums", read + partials, vector=12 * elements, special=special),
        merge,
        Kernel("gradient", vector=16 * elements, **again),
    ]
    parameters = Kernel("parameters", 8 * dims["B"] * channels)
    return [*(kernel._replace(launches=launches) for kernel in found), parameters]


def _halves(op: str, dims: Mapping[str, int], itemsize: int) -> list[Half]:
    if op == "group_norm_silu":
        return []
    size = (dims["H"], dims["W"], itemsize)
    if op == "sepconv":
        flags = dict(upsample=bool(dims.get("upsample")), residual=bool(dims.get("residual")))
        norm, stride = bool(dims.get("G")), dims.get("stride", 1)
        return [Half(dims["B"], dims["C"], dims["O"], *size, norm=norm, stride=stride, **flags)]
    channels, middle, outputs = dims["C"], dims["M"], dims["O"]
    same = channels == outputs
    return [
        Half(dims["B"], channels, middle, *size, emits=True),
        Half(dims["B"], middle, outputs, *size, residual=same, shortcut=0 if same else channels, measured=True),
    ]
