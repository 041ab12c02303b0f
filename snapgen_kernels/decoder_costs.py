"""What the GPU kernels of the decoder's block must move and compute: the arithmetic of :mod:`snapgen_kernels.costs`.

Symbols: P pixels of a batch; C channels, M of the middle, all of e bytes an element. Each kernel reads its inputs and
writes its outputs once; what is per channel is left out. Forward:

=================  ==============================  ============  ======================================
kernel             bytes                           products      special
=================  ==============================  ============  ======================================
1: depthwise       2 P C e                         0             0
1: product         P (C + M) e + C M e             2 P C M       0
2: depthwise       2 P M e, and the moments        0             0
merge              the moments, 8 M a tile, and    0             0
                   8 M a sample
2: product         P (M + 2 C) e + C M e           2 P C M       s P M for each block of 128 outputs
=================  ==============================  ============  ======================================

``low memory`` has the first four, with 2: depthwise writing moments alone, and then all but the merge again; a few rows
at a time, so that what a band writes and reads back stays in the L2 cache. Bands overlap by two rows, which is left
out. Backward: see :func:`_backward`; it reads the middle image that the forward kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from snapgen_kernels.costs import Kernel

OPS = ("decoder_block",)
FORMS = ("whole", "low memory")

_PROCESSORS = 132  # over which scans and weight gradients are split
_ROWS, _COLUMNS, _SCAN = (16, 8, 4), 32, 64  # of a tile of moments, and channels of a program
_TILE = 128  # pixels, and outputs, of a product's program
_SCANNED, _MOMENTS = 20, 6  # instructions for a value of a scan, and for its share in moments, by the machine code
_NORM = 6  # FLOPs of norm and SiLU besides the special functions
_BAND = 64 << 20  # bytes of a band's two middle images


def kernels(op: str, dims: Mapping[str, int], itemsize: int, mode: str, form: str = "whole") -> list[Kernel]:
    """Every kernel of a call of one of ``OPS``, in order. ``dims`` has the names of ``snapgen_kernels.testing``;
    ``mode`` is ``fwd`` or ``bwd`` (all gradients), and ``form`` one of ``FORMS``, of the forward."""
    if mode == "bwd":
        return _backward(dims, itemsize)
    once = form == "whole" or 2 * _pixels(dims) * dims["M"] * itemsize <= _BAND  # what fits one band is kept
    return _forward(dims, itemsize) if once else _low_memory(dims, itemsize)


def _pixels(dims: Mapping[str, int]) -> int:
    return dims["B"] * dims["H"] * dims["W"]


def _moments(dims: Mapping[str, int]) -> int:
    """Bytes of the middle image's moments: the longest scans that fill the GPU, else the shortest."""

    def programs(rows: int) -> int:
        across = math.ceil(dims["W"] / _COLUMNS) * math.ceil(dims["M"] / _SCAN)
        return dims["B"] * math.ceil(dims["H"] / rows) * across

    rows = next((rows for rows in _ROWS if programs(rows) >= 4 * _PROCESSORS), _ROWS[-1])
    return 8 * dims["M"] * dims["B"] * math.ceil(dims["H"] / rows) * math.ceil(dims["W"] / _COLUMNS)


def _multiplied(kernel: Kernel, flops: int, itemsize: int) -> Kernel:
    """``kernel`` with a product; fp32 takes vector units."""
    if itemsize == 2:
        return kernel._replace(products=flops)
    return kernel._replace(vector=kernel.vector + flops)


def _scan(name: str, values: int, itemsize: int) -> Kernel:
    return Kernel(name, 2 * values * itemsize, vector=18 * values, instructions=_SCANNED * values)


def _forward(dims: Mapping[str, int], itemsize: int) -> list[Kernel]:
    pixels, channels, middle, moments = _pixels(dims), dims["C"], dims["M"], _moments(dims)
    narrow, wide, weights, flops = pixels * channels, pixels * middle, channels * middle, 2 * pixels * channels * middle
    evaluations = wide * math.ceil(channels / _TILE)
    second = _scan("2: depthwise", wide, itemsize)
    last = Kernel(
        "2: product",
        (wide + 2 * narrow + weights) * itemsize,
        vector=_NORM * evaluations,
        special=_silu(itemsize) * evaluations,
    )
    return [
        _scan("1: depthwise", narrow, itemsize),
        _multiplied(Kernel("1: product", (narrow + wide + weights) * itemsize), flops, itemsize),
        second._replace(
            bytes=second.bytes + moments,
            vector=second.vector + 8 * wide,
            instructions=second.instructions + _MOMENTS * wide,
        ),
        Kernel("merge", moments + 8 * middle * dims["B"]),
        _multiplied(last, flops, itemsize),
    ]


def _low_memory(dims: Mapping[str, int], itemsize: int) -> list[Kernel]:
    pixels, moments = _pixels(dims), _moments(dims)
    narrow, wide = pixels * dims["C"] * itemsize, pixels * dims["M"] * itemsize
    bands = math.ceil(2 * wide / _BAND)
    depthwise, product, measured, merge, last = (kernel._replace(launches=bands) for kernel in _forward(dims, itemsize))
    weights = product.bytes - narrow - wide
    # Only x comes from memory and only y goes there.
    depthwise = depthwise._replace(bytes=narrow, cached=narrow)
    product = product._replace(bytes=weights, cached=narrow + wide)
    measured = measured._replace(bytes=moments, cached=wide)
    again = _scan("2: depthwise", wide // itemsize, itemsize)._replace(bytes=0, cached=2 * wide, launches=bands)
    last = last._replace(bytes=2 * narrow + weights, cached=wide)
    return [depthwise, product, measured, merge._replace(launches=1), depthwise, product, again, last]


def _backward(dims: Mapping[str, int], itemsize: int) -> list[Kernel]:
    """The product of dy leaves da, SiLU of the normed middle, and parts of the norm's sums; both depthwise convolutions
    read their input and the gradient of their output and write that of the input, the first with dy added."""
    pixels, channels, middle = _pixels(dims), dims["C"], dims["M"]
    narrow, wide, weights, flops = pixels * channels, pixels * middle, channels * middle, 2 * pixels * channels * middle
    parts = 8 * middle * dims["B"] * math.ceil(dims["H"] * dims["W"] / _TILE)
    special = _silu(itemsize) * wide
    first, product, *_ = _forward(dims, itemsize)
    outer = Kernel(
        "2: product of dy", (narrow + 3 * wide + weights) * itemsize + parts, vector=14 * wide, special=special
    )

    def gradient(name: str, outputs: int, inputs: int) -> list[Kernel]:
        splits = _splits(outputs, inputs, pixels)
        partials = 4 * splits * weights
        product = Kernel(name, (narrow + wide) * itemsize + partials)
        summed = Kernel("sum of partials", partials + weights * itemsize, vector=splits * weights)
        return [_multiplied(product, flops, itemsize), summed]

    return [
        _multiplied(outer, flops, itemsize),
        *gradient("2: weight gradient", channels, middle),
        Kernel("merge", parts),
        Kernel("norm gradient", 3 * wide * itemsize, vector=12 * wide, special=special),
        first,
        product,
        Kernel("2: depthwise backward", 3 * wide * itemsize, vector=36 * wide),
        *gradient("1: weight gradient", middle, channels),
        _multiplied(Kernel("1: product of dy", (narrow + wide + weights) * itemsize), flops, itemsize),
        Kernel("1: depthwise backward", 4 * narrow * itemsize, vector=37 * narrow),
    ]


def _splits(outputs: int, inputs: int, pixels: int) -> int:
    """Splits of a weight gradient's pixels: as many as have their tiles run at once."""
    wide = outputs > _TILE  # tiles of 256 outputs, one for each processor; else of 128, two
    tiles = math.ceil(outputs / (2 * _TILE if wide else _TILE)) * math.ceil(inputs / _TILE)
    step = 32 if wide else 64
    splits = max(1, (1 if wide else 2) * _PROCESSORS // tiles)
    return math.ceil(pixels / (step * math.ceil(pixels / splits / step)))


def _silu(itemsize: int) -> int:
    return 1 if itemsize == 2 else 2
