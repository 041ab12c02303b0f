"""What the GPU kernels of attention, its norms and rotations, and the gated projection must move and compute: the
arithmetic of :mod:`snapgen_kernels.costs` for tokens.

Symbols: R = B N H rows of queries, K = B M keys, D columns of a head, all of e bytes an element; M' and D' are M and D
as the kernels pad them. Each kernel reads its inputs and writes its outputs once, whatever its tiles read again from
the L2 cache; the weights of norms are left out. ``tables`` are cos and sin, 8 N D bytes, where there is a rotation.

==========================  ====================================  ===============  =====
kernel                      bytes                                 products         special
==========================  ====================================  ===============  =====
keys                        2 (K D + B M' D') e, or half of it    0                0
                            where v stays, + tables; the bias
attention                   (2 R D + 2 B M' D') e + 4 R, bias,    4 R M D          R M
                            tables
queries                     2 R D e + tables                      0                0
query gradient              (4 R D + 2 B M' D') e + 12 R, bias    6 R M D          R M
key gradient                (2 R D + 2 B M' D') e + 8 R, bias,    8 R M D          R M
                            and fp32 parts of dk and dv
norm and rotation           2 (R + K) D e + tables                0                0
... gradient                3 (R + K) D e + tables, and parts     0                0
                            of the weights' gradients
GEGLU                       (T C + 2 F C + T F) e                 4 T C F          T F
... gradient                5 T F e, and parts of dbias           0                2 T F
product of dh               (2 T F + 2 F C + T C) e               4 T C F          0
weight gradient             (2 T F + T C) e, and parts            4 T C F          0
==========================  ====================================  ===============  =====

The keys' kernel is not launched where there is nothing to do, and ``queries`` makes the backward's queries ready where
there is a norm or a rotation. Parts are added up in a fixed order by kernels of their own. A training step's forward
keeps GEGLU's value and gate, 2 T F e bytes more, which its backward (as counted here) reads.

Other operations, by count of the formulas: a score takes 4 (its largest, a multiply-add, the sum) and as many in each
gradient; a norm takes 4 per element and a rotation 3, their gradients 10 and 3; the error function is an exponential
and a polynomial of ``_ERF``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from snapgen_kernels.costs import Kernel

OPS = ("attention", "qk_norm_rope", "geglu")

_PROCESSORS = 132  # over which sums are split
_PAD = 128  # keys are padded to a multiple
_QUERY_ROWS, _KEYS = 64, 128  # of a tile of the key gradient
_SPLITS = 2  # programs of the key gradient for each processor
_FEWEST_TILES = 4  # of rows, in one of them
_WAVES = 8  # programs of the norm's gradient, and of GEGLU's, for each processor
_NORM_VALUES = 1024  # numbers of a tile of the norm's gradient
_GATED = (16, 128)  # tokens and features of a tile of GEGLU's gradient
_WEIGHTS = (256, 128, 32)  # outputs, channels and tokens of a tile of the weight's gradient, one for each processor
_FEWEST_TOKENS = 256  # of a split of it
_MOST_SPLITS, _PART_TOKENS = 8, 735  # where there are more tiles than processors, see _triton/weight_gradient.py
_SCORE = 4
_NORM, _ROTATION, _NORM_GRADIENT = 4, 3, 10
_ERF = 16


def kernels(op: str, dims: Mapping[str, int], itemsize: int, mode: str) -> list[Kernel]:
    """Every kernel of a call of one of ``OPS``, in order. ``dims`` has the names of ``snapgen_kernels.testing``;
    ``mode`` is ``fwd`` (without what a backward would need) or ``bwd`` (all gradients)."""
    found: dict[str, list[Kernel]]
    if op == "attention":
        found = {"fwd": _attention(dims, itemsize), "bwd": _attention_backward(dims, itemsize)}
    elif op == "qk_norm_rope":
        found = {"fwd": [_normed(dims, itemsize, "q and k")], "bwd": _norm_gradients(dims, itemsize)}
    else:
        found = {"fwd": [_geglu(dims, itemsize)], "bwd": _geglu_backward(dims, itemsize)}
    return found[mode]


# ---- attention -------------------------------------------------------------------------------------------------------


def _columns(dim: int) -> int:
    """Of a tile: the power of two that holds a head."""
    return max(16, 1 << max(dim - 1, 0).bit_length())


def _per_element(dims: Mapping[str, int], norm: int) -> int:
    return (norm if dims.get("norm", 1) else 0) + (_ROTATION if dims.get("rope") else 0)


def _tables(dims: Mapping[str, int]) -> int:
    return 8 * dims["N"] * dims["D"] if dims.get("rope") else 0


def _rows(dims: Mapping[str, int]) -> int:
    return dims["B"] * dims["N"] * dims["H"]


def _padded(dims: Mapping[str, int]) -> int:
    return _PAD * math.ceil(dims["M"] / _PAD)


def _biased(dims: Mapping[str, int]) -> int:
    """Bytes of the keys' bias, which tells those that are none."""
    return 4 * dims["B"] * _padded(dims) if dims.get("mask") or _padded(dims) != dims["M"] else 0


def _ready_keys(dims: Mapping[str, int], itemsize: int) -> int:
    """Bytes of keys and values as the kernels take them."""
    return 2 * dims["B"] * _padded(dims) * _columns(dims["D"]) * itemsize + _biased(dims)


def _keys(dims: Mapping[str, int], itemsize: int) -> list[Kernel]:
    given = dims["B"] * dims["M"] * dims["D"]
    copied = bool(_biased(dims)) or _columns(dims["D"]) != dims["D"]
    work = _per_element(dims, _NORM)
    if not copied and not work:
        return []
    mask = dims["B"] * dims["M"] if dims.get("mask") else 0
    made = dims["B"] * _padded(dims) * _columns(dims["D"])
    moved = (given + made) * itemsize * (2 if copied else 1) + _biased(dims) + mask + _tables(dims)
    return [Kernel("keys", moved, vector=work * given)]


def _scores(name: str, dims: Mapping[str, int], itemsize: int, moved: int, products: int, more: int = 0) -> Kernel:
    """A kernel with ``products`` products of queries and keys, which evaluates every weight once; ``more``: other
    operations."""
    weights = _rows(dims) * dims["M"]
    flops, others = 2 * products * weights * dims["D"], _SCORE * weights + more
    if itemsize == 2:
        return Kernel(name, moved, products=flops, vector=others, special=weights)
    return Kernel(name, moved, vector=flops + others, special=weights)


def _attention(dims: Mapping[str, int], itemsize: int) -> list[Kernel]:
    rows = _rows(dims)
    moved = 2 * rows * dims["D"] * itemsize + 4 * rows + _ready_keys(dims, itemsize) + _tables(dims)
    work = _per_element(dims, _NORM) * rows * dims["D"]
    return [*_keys(dims, itemsize), _scores("attention", dims, itemsize, moved, 2, work)]


def _key_chunks(dims: Mapping[str, int]) -> int:
    """How many parts there are of the gradients of keys and values."""
    rows = dims["N"] * dims["H"]
    tiles, steps = math.ceil(dims["M"] / _KEYS), math.ceil(rows / _QUERY_ROWS)
    splits = min(math.ceil(_SPLITS * _PROCESSORS / (dims["B"] * tiles)), steps // _FEWEST_TILES)
    return math.ceil(rows / (math.ceil(steps / max(1, splits)) * _QUERY_ROWS))


def _attention_backward(dims: Mapping[str, int], itemsize: int) -> list[Kernel]:
    rows, keys = _rows(dims), dims["B"] * dims["M"] * dims["D"]
    one, ready = rows * dims["D"] * itemsize, _ready_keys(dims, itemsize)
    parts = 4 * _key_chunks(dims) * keys
    work = _per_element(dims, _NORM)
    add = Kernel("sum of partials", 2 * (parts + keys * itemsize), vector=parts // 2, launches=2)
    found = [
        *([Kernel("queries", 2 * one + _tables(dims), vector=work * one // itemsize)] if work else []),
        *_keys(dims, itemsize),
        _scores("query gradient", dims, itemsize, 4 * one + 12 * rows + ready, 3, 2 * rows * dims["D"]),
        _scores("key gradient", dims, itemsize, 2 * one + 8 * rows + ready + 2 * parts, 4),
        add,
    ]
    return [*found, *(_norm_gradients(dims, itemsize) if work else [])]


# ---- norms and rotations ---------------------------------------------------------------------------------------------


def _normed(dims: Mapping[str, int], itemsize: int, name: str) -> Kernel:
    elements = (_rows(dims) + dims["B"] * dims["M"]) * dims["D"]
    return Kernel(name, 2 * elements * itemsize + _tables(dims), vector=_per_element(dims, _NORM) * elements)


def _programs(batch: int, tokens: int, heads: int, dim: int) -> int:
    """Of the norm's gradient: each leaves a part of the weight's."""
    total = batch * math.ceil(tokens / max(1, _NORM_VALUES // _columns(dim)))
    wanted = _WAVES * _PROCESSORS
    groups = max(1, min(heads, math.ceil(wanted / max(total, 1))))
    return math.ceil(total / max(1, total // wanted)) * math.ceil(heads / max(1, math.ceil(heads / groups)))


def _norm_gradients(dims: Mapping[str, int], itemsize: int) -> list[Kernel]:
    elements = (_rows(dims) + dims["B"] * dims["M"]) * dims["D"]
    mask = dims["B"] * dims["M"] if dims.get("mask") else 0
    moved = 3 * elements * itemsize + _tables(dims) + mask
    gradient = Kernel("norm gradient", moved, vector=_per_element(dims, _NORM_GRADIENT) * elements)
    if not dims.get("norm", 1):
        return [gradient]
    programs = _programs(dims["B"], dims["N"], dims["H"], dims["D"]) + _programs(dims["B"], dims["M"], 1, dims["D"])
    parts = 4 * programs * dims["D"]
    added = Kernel("sum of weights' partials", parts + 2 * dims["D"] * itemsize, vector=parts // 4)
    return [gradient._replace(bytes=moved + parts), added]


# ---- the gated projection --------------------------------------------------------------------------------------------


def _sizes(dims: Mapping[str, int]) -> tuple[int, int, int]:
    """Tokens, channels and features."""
    return dims["B"] * dims["N"], dims["C"], dims["F"]


def _product(name: str, dims: Mapping[str, int], itemsize: int, moved: int, more: int = 0, special: int = 0) -> Kernel:
    tokens, channels, features = _sizes(dims)
    flops = 4 * tokens * channels * features
    if itemsize == 2:
        return Kernel(name, moved, products=flops, vector=more, special=special)
    return Kernel(name, moved, vector=flops + more, special=special)


def _geglu(dims: Mapping[str, int], itemsize: int) -> Kernel:
    tokens, channels, features = _sizes(dims)
    moved = (tokens * (channels + features) + 2 * features * channels) * itemsize
    outputs = tokens * features
    return _product("product and gate", dims, itemsize, moved, (_ERF + 6) * outputs, outputs)


def _weight_parts(tokens: int, outputs: int, channels: int) -> int:
    """How many parts there are of the weight's gradient."""
    tiles = math.ceil(outputs / _WEIGHTS[0]) * math.ceil(channels / _WEIGHTS[1])
    most = max(1, tokens // _FEWEST_TOKENS)

    def rounds(splits: int) -> float:
        """What the last round of programs leaves idle, and what the parts take besides."""
        programs = math.ceil(tiles * splits / _PROCESSORS) * _PROCESSORS
        return programs / (tiles * splits) + splits * _PART_TOKENS / tokens

    if tiles <= _PROCESSORS:
        splits = min(_PROCESSORS // tiles, most)
    else:
        splits = min(range(1, min(_MOST_SPLITS, most) + 1), key=rounds)
    return math.ceil(tokens / (math.ceil(math.ceil(tokens / splits) / _WEIGHTS[2]) * _WEIGHTS[2]))


def _geglu_backward(dims: Mapping[str, int], itemsize: int) -> list[Kernel]:
    tokens, channels, features = _sizes(dims)
    outputs, weights = tokens * features, 2 * features * channels
    steps, blocks = math.ceil(tokens / _GATED[0]), math.ceil(features / _GATED[1])
    chunks = math.ceil(steps / math.ceil(steps * blocks / (_WAVES * _PROCESSORS)))
    sums = 8 * chunks * features if dims.get("bias", 1) else 0
    moved = (2 * outputs + weights + tokens * channels) * itemsize
    parts = 4 * _weight_parts(tokens, 2 * features, channels) * weights
    read = (2 * outputs + tokens * channels) * itemsize
    found = [
        Kernel("gate gradient", 5 * outputs * itemsize + sums, vector=(_ERF + 14) * outputs, special=2 * outputs),
        _product("product of dh", dims, itemsize, moved),
        _product("weight gradient", dims, itemsize, read + parts),
        Kernel("sum of partials", parts + weights * itemsize, vector=parts // 4),
    ]
    if sums:
        found.append(Kernel("sum of bias's partials", sums + 2 * features * itemsize, vector=sums // 4))
    return found
