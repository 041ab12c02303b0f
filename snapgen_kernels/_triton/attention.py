"""Multi-query attention on the GPU.

One key/value head makes the N * H queries of a sample the rows of one matrix: a tile of rows reads every key once for
all heads. Keys are made ready first, by one small launch (none where nothing is to do): normalised, rotated, padded to
whole tiles, zero where masked or beyond the end. A mask becomes a bias per key: 0, or -inf where it may not be
attended. Without a mask only the last tile of keys has any to leave out, and only there they are looked for. Queries
are normalised and rotated in registers as their tile is loaded.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from snapgen_kernels._triton import common, tuning
from snapgen_kernels._triton.common import Build
from snapgen_kernels._triton.pointwise import precisions
from snapgen_kernels._triton.qk_norm_rope import (
    Rotation,
    block_d,
    load_tables,
    load_weight,
    norm_rotate,
    rotation,
    tile_mask,
)

LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2.0))
SMALLEST = tl.constexpr(torch.finfo(torch.float32).tiny)


class Config(NamedTuple):
    """A program computes ``block_m`` rows of queries, ``block_n`` keys at a time."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# ---- device functions ------------------------------------------------------------------------------------------------


@triton.jit
def load_rows(p_x, b_m, left, b_d, D, EVEN_D: tl.constexpr):
    """Rows of a tile as they are, 0 beyond the ``left`` that there are."""
    return tl.load(p_x + b_m[:, None] * D + b_d[None, :], mask=tile_mask(b_m, left, b_d, D, EVEN_D), other=0.0)


@triton.jit
def load_queries(
    p_q,
    p_weight,
    p_cos,
    p_sin,
    i_row,
    b_m,
    left,
    b_d,
    D,
    eps,
    NORM: tl.constexpr,
    ROPE: tl.constexpr,
    EVEN_D: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A tile of queries from row ``i_row`` of a sample on, normalised and rotated, in fp32."""
    b_q = load_rows(p_q, b_m, left, b_d, D, EVEN_D).to(tl.float32)
    i_token = i_row // HEADS
    b_token = (i_row + b_m) // HEADS - i_token
    m = tile_mask(b_m, left, b_d, D, EVEN_D)
    b_off = b_token[:, None] * D + b_d[None, :]
    b_cos, b_sin = load_tables(p_cos, p_sin, i_token.to(tl.int64) * D, b_off, m, ROPE)
    b_weight = load_weight(p_weight, b_d, D, NORM)
    return norm_rotate(b_q, b_weight, b_cos, b_sin, D, eps, NORM, ROPE, BLOCK_M, BLOCK_D)


@triton.jit
def within(b_x, b_n, left, rest, BLOCK_N: tl.constexpr):
    """Scores or weights of a tile of keys; ``rest`` beyond the last key, if fewer than BLOCK_N are left."""
    if left < BLOCK_N:
        b_x = tl.where((b_n < left)[None, :], b_x, rest)
    return b_x


# ---- kernels ---------------------------------------------------------------------------------------------------------


@triton.jit
def keys_kernel(
    p_k,
    p_v,
    p_new_k,
    p_new_v,
    p_bias,
    p_mask,
    p_weight,
    p_cos,
    p_sin,
    M,
    D,
    padded,
    eps,
    NORM: tl.constexpr,
    ROPE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """k [B, M, D], normalised and rotated, and v (unless p_new_v is None), both [B, padded, BLOCK_D] with zeros where
    there is nothing or p_mask [B, M] is 0; the bias [B, padded] (unless None). Grid: B * cdiv(padded, BLOCK_T)."""
    tiles = tl.cdiv(padded, BLOCK_T)
    i_t, i_b = (tl.program_id(0) % tiles) * BLOCK_T, (tl.program_id(0) // tiles).to(tl.int64)
    b_t, b_d = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_D)
    m_t = b_t < M - i_t
    if p_mask is not None:
        m_t = m_t & (tl.load(p_mask + i_b * M + i_t + b_t, mask=m_t, other=0) != 0)
    m = m_t[:, None] & (b_d < D)[None, :]
    i_first, b_off = (i_b * M + i_t) * D, b_t[:, None] * D + b_d[None, :]
    i_new, b_new = (i_b * padded + i_t) * BLOCK_D, b_t[:, None] * BLOCK_D + b_d[None, :]
    m_new = (b_t < padded - i_t)[:, None]
    b_cos, b_sin = load_tables(p_cos, p_sin, i_t.to(tl.int64) * D, b_off, m, ROPE)
    b_weight = load_weight(p_weight, b_d, D, NORM)
    b_k = tl.load(p_k + i_first + b_off, mask=m, other=0.0).to(tl.float32)
    b_k = norm_rotate(b_k, b_weight, b_cos, b_sin, D, eps, NORM, ROPE, BLOCK_T, BLOCK_D)
    b_k = tl.where(m_t[:, None], b_k, 0.0)  # the norm of nothing is NaN where eps is 0
    tl.store(p_new_k + i_new + b_new, b_k.to(p_new_k.dtype.element_ty), mask=m_new)
    if p_new_v is not None:
        tl.store(p_new_v + i_new + b_new, tl.load(p_v + i_first + b_off, mask=m, other=0.0), mask=m_new)
    if p_bias is not None:
        tl.store(p_bias + i_b * padded + i_t + b_t, tl.where(m_t, 0.0, float("-inf")), mask=b_t < padded - i_t)


@triton.jit
def attention_kernel(
    p_q,
    p_k,
    p_v,
    p_bias,
    p_o,
    p_lse,
    p_weight,
    p_cos,
    p_sin,
    R,
    M,
    padded,
    D,
    tiles,
    scale,
    eps,
    NORM: tl.constexpr,
    ROPE: tl.constexpr,
    EVEN_D: tl.constexpr,
    HEADS: tl.constexpr,
    TAIL: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """o, and the logarithm of the sum of exponentials, of R rows a sample, for ready keys [B, padded, BLOCK_D]. TAIL:
    there is no bias, and the last tile of keys is not whole.

    Grid: B * tiles, tiles = cdiv(R, BLOCK_M).
    """
    i_row, i_b = (tl.program_id(0) % tiles) * BLOCK_M, (tl.program_id(0) // tiles).to(tl.int64)
    b_m, b_n, b_d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    i_first, left = i_b * R + i_row, R - i_row
    b_q = load_queries(
        p_q + i_first * D, p_weight, p_cos, p_sin, i_row, b_m, left, b_d, D, eps,
        NORM, ROPE, EVEN_D, HEADS, BLOCK_M, BLOCK_D,
    )  # fmt: skip
    # A negative scale turns the queries round, so that the largest product has the largest score.
    b_q = (b_q * tl.where(scale < 0.0, -1.0, 1.0)).to(p_q.dtype.element_ty)
    log2_scale = tl.abs(scale) * LOG2_E
    if TAIL:
        log2_scale = tl.maximum(log2_scale, SMALLEST)  # -inf times 0 would be NaN
    p_k += i_b * padded * BLOCK_D + b_n[None, :] * BLOCK_D + b_d[:, None]  # transposed
    p_v += i_b * padded * BLOCK_D + b_n[:, None] * BLOCK_D + b_d[None, :]
    b_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    b_o = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    for i_n in range(0, M, BLOCK_N):
        b_s = tl.dot(b_q, tl.load(p_k), input_precision=PRECISION)
        if p_bias is None:
            if TAIL:
                b_s = within(b_s, b_n, M - i_n, float("-inf"), BLOCK_N)
            b_new_max = tl.maximum(b_max, tl.max(b_s, 1) * log2_scale)
            b_shift = b_new_max
            b_p = tl.exp2(tl.fma(b_s, log2_scale, -b_shift[:, None]))
        else:
            b_s = tl.fma(b_s, log2_scale, tl.load(p_bias + i_b * padded + i_n + b_n)[None, :])
            b_new_max = tl.maximum(b_max, tl.max(b_s, 1))
            b_shift = tl.where(b_new_max == float("-inf"), 0.0, b_new_max)  # -inf: no key so far
            b_p = tl.exp2(b_s - b_shift[:, None])
        b_decay = tl.exp2(b_max - b_shift)
        b_sum = b_sum * b_decay + tl.sum(b_p, 1)
        b_o = b_o * b_decay[:, None]
        b_v = tl.load(p_v)
        b_o = tl.dot(b_p.to(b_v.dtype), b_v, b_o, input_precision=PRECISION)
        b_max = b_new_max
        p_k += BLOCK_N * BLOCK_D
        p_v += BLOCK_N * BLOCK_D
    b_lse = tl.where(b_sum > 0.0, b_max * LN_2, 0.0) + tl.log(b_sum)
    b_o = b_o / tl.where(b_sum == 0.0, 1.0, b_sum)[:, None]
    m = tile_mask(b_m, left, b_d, D, EVEN_D)
    tl.store(p_lse + i_first + b_m, b_lse, mask=b_m < left)
    tl.store(p_o + i_first * D + b_m[:, None] * D + b_d[None, :], b_o.to(p_o.dtype.element_ty), mask=m)


# ---- launchers -------------------------------------------------------------------------------------------------------

# Widest first.
CONFIGS = (Config(128, 128, 8, 3), Config(128, 64, 4, 3), Config(64, 64, 4, 3))
CONFIGS_TF32 = (Config(64, 64, 8, 2), Config(64, 32, 4, 2))
# fp32 products in full precision run on the ordinary units, whose accumulators take more registers.
CONFIGS_FP32 = (Config(32, 32, 4, 2),)
# Heads of more than 64.
CONFIGS_WIDE = (Config(64, 64, 8, 3),)
CONFIGS_WIDE_TF32 = (Config(64, 32, 8, 2),)
CONFIGS_WIDE_FP32 = (Config(32, 32, 8, 2),)
# AMD has 64 KiB of shared memory.
CONFIGS_HIP = (Config(128, 64, 4, 1), Config(64, 64, 4, 1))
CONFIGS_HIP_RAGGED = (Config(64, 64, 8, 1),)
# Keys are padded to a multiple of the widest tile.
PAD = 128
# Numbers in a tile of the kernel that makes keys ready.
KEYS_VALUES = 2048


def precision(dtype: torch.dtype) -> str:
    """``input_precision`` of the products: fp32 runs in tf32 where PyTorch's own matrix products may."""
    allowed = torch.backends.cuda.matmul.fp32_precision == "tf32" and torch.version.hip is None
    return "tf32" if dtype == torch.float32 and allowed else "ieee"


def is_whole(dim: int) -> bool:
    """Whether rows of a head are whole vectors; else they are loaded number by number, each with an address and a mask,
    which takes more registers."""
    return dim % 16 == 0


def configs_for(
    dtype: torch.dtype, exactness: str, nvidia: bool, columns: int, whole: bool, shared: int
) -> tuple[Config, ...]:
    """The candidates, widest first; ``whole``: see :func:`is_whole`; ``shared``: see ``common.shared_bytes``."""
    wide = columns > 64
    if dtype == torch.float32:
        if exactness == "tf32":
            return CONFIGS_WIDE_TF32 if wide else CONFIGS_TF32
        return CONFIGS_WIDE_FP32 if wide else CONFIGS_FP32
    if not nvidia:
        return CONFIGS_HIP if whole else CONFIGS_HIP_RAGGED
    configs = CONFIGS_WIDE if wide else CONFIGS if whole else CONFIGS[-1:]
    if shared >= common.LARGE_SHARED:
        return configs
    # The widest tiles in three stages take 112 KiB; 128 rows in 4 warps spill with two.
    return tuple(config._replace(num_stages=2) for config in configs if config.block_m < 128 or config.num_warps > 4)


def fitting(configs: tuple[Config, ...], keys: int) -> tuple[Config, ...]:
    """Those of whose tile of keys no half is empty; the narrowest where there is none."""
    narrowest = min(config.block_n for config in configs)
    return tuple(config for config in configs if config.block_n <= max(common.pow2(keys), narrowest))


def filling(configs: tuple[Config, ...], samples: int, rows: int, keys: int, processors: int) -> Config:
    """Of those that fit the keys, the first config with a program for every multiprocessor; else the last."""
    configs = fitting(configs, keys)
    return next((c for c in configs if samples * common.cdiv(rows, c.block_m) >= processors), configs[-1])


class KeysTile(NamedTuple):
    """A tile of the kernel that makes keys ready."""

    block_t: int
    block_d: int
    num_warps: int


class Keys(NamedTuple):
    """Keys and values as the kernels take them, [B, padded, BLOCK_D], and the bias [B, padded], or None where no key is
    masked."""

    k: Tensor
    v: Tensor
    bias: Tensor | None
    padded: int


def ready(
    k: Tensor, v: Tensor, key_mask: Tensor | None, weight: Tensor | None, tables: Rotation, eps: float, columns: int
) -> Keys:
    """k and v [B, M, D], contiguous, made ready; themselves where nothing is to do."""
    batch, keys, dim = k.shape
    padded = common.cdiv(keys, PAD) * PAD
    copied = key_mask is not None or padded != keys or columns != dim
    if not copied and weight is None and tables.cos is None:
        return Keys(k, v, None, padded)
    new_k = k.new_empty((batch, padded, columns))
    new_v = torch.empty_like(new_k) if copied else None
    bias = None if key_mask is None else torch.empty((batch, padded), dtype=torch.float32, device=k.device)
    block_t = KEYS_VALUES // columns
    keys_kernel[(batch * common.cdiv(padded, block_t),)](
        k, v, new_k, new_v, bias, None if key_mask is None else key_mask.view(torch.uint8), weight, *tables,
        keys, dim, padded, eps, NORM=weight is not None, ROPE=tables.cos is not None, BLOCK_T=block_t,
        BLOCK_D=columns, num_warps=4,
    )  # fmt: skip
    return Keys(new_k, v if new_v is None else new_v, bias, padded)


def has_tail(made: Keys, keys: int, config: Config) -> bool:
    """Whether the last tile of keys has some to leave out that no bias tells of."""
    return made.bias is None and keys % config.block_n != 0


def _dense(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    scale: float | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    batch, tokens, heads, dim = q.shape
    rows, keys, columns = tokens * heads, k.shape[1], block_d(dim)
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    logsumexp = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    if logsumexp.numel() == 0:
        return o, logsumexp
    if keys == 0:
        return o.zero_(), logsumexp.fill_(-math.inf)
    q, tables = q.contiguous(), rotation(cos, sin)
    made = ready(k.contiguous(), v.contiguous(), _dense(key_mask), _dense(k_weight), tables, eps, columns)
    weight, exactness = _dense(q_weight), precision(q.dtype)

    def launch(config: Config) -> None:
        tiles = common.cdiv(rows, config.block_m)
        attention_kernel[(batch * tiles,)](
            q, made.k, made.v, made.bias, o, logsumexp, weight, *tables,
            rows, keys, made.padded, dim, tiles, dim**-0.5 if scale is None else scale, eps,
            NORM=weight is not None, ROPE=tables.cos is not None, EVEN_D=dim == columns,
            HEADS=1 if tables.cos is None else heads, TAIL=has_tail(made, keys, config), PRECISION=exactness,
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_D=columns, num_warps=config.num_warps,
            num_stages=config.num_stages,
        )  # fmt: skip

    shared = common.shared_bytes(q)
    configs = configs_for(q.dtype, exactness, torch.version.hip is None, columns, is_whole(dim), shared)
    default = filling(configs, batch, rows, keys, common.processors(q))
    flags = (made.bias is not None, weight is not None, tables.cos is not None)
    key = (str(q.dtype), exactness, *q.shape, keys, *flags)
    launch(tuning.choose("attention", key, configs, default, launch))
    return o, logsumexp


# ---- what is launched ------------------------------------------------------------------------------------------------


def variants(whole: bool) -> list[dict[str, Any]]:
    """The model's self-attention, and its cross-attention to masked keys and to keys that are no whole tiles; rotation
    without a norm, neither; heads that are no power of two. ``whole``: see :func:`is_whole`."""
    unrotated: dict[str, Any] = {"ROPE": False, "p_cos": None, "p_sin": None, "HEADS": 1}
    unbiased: dict[str, Any] = {"p_bias": None}
    unnormed: dict[str, Any] = {"NORM": False, "p_weight": None}
    rotated: dict[str, Any] = {"ROPE": True, "HEADS": 14}
    uneven = [
        {"EVEN_D": False, "NORM": True, "TAIL": True, **rotated, **unbiased},
        {"EVEN_D": False, "TAIL": False, **unnormed, **unrotated},
    ]
    if not whole:
        return uneven
    return [
        {"EVEN_D": True, "NORM": True, "TAIL": False, **rotated, **unbiased},
        {"EVEN_D": True, "NORM": True, "TAIL": False, **unrotated},
        {"EVEN_D": True, "NORM": True, "TAIL": True, **unrotated, **unbiased},
        {"EVEN_D": True, "TAIL": False, **unnormed, **rotated, **unbiased},
        {"EVEN_D": True, "TAIL": True, **unnormed, **unrotated, **unbiased},
        uneven[0],
    ]


def sizes(whole: bool) -> tuple[str, ...]:
    """Those that are multiples of 16."""
    return ("D", "padded") if whole else ("padded",)


def key_variants() -> list[dict[str, Any]]:
    """Of the kernel that makes keys ready: rotated in place of a copy, masked, and both; without a norm."""
    unmasked: dict[str, Any] = {"p_mask": None, "p_bias": None}
    unrotated: dict[str, Any] = {"ROPE": False, "p_cos": None, "p_sin": None}
    return [
        {"NORM": True, "ROPE": True, "p_new_v": None, **unmasked},
        {"NORM": True, **unrotated},
        {"NORM": True, "ROPE": True},
        {"NORM": False, "p_weight": None, "ROPE": True, **unmasked},
    ]


def builds(dtype: torch.dtype, nvidia: bool) -> list[Build]:
    """Every kernel of this file in every config that its launchers may choose."""
    found: list[Build] = []
    images = ("p_q", "p_k", "p_v", "p_o", "p_new_k", "p_new_v")
    for columns, whole in itertools.product((64, 128), (True, False)):
        for variant, exactness in itertools.product(variants(whole), precisions(dtype, nvidia)):
            listed: dict[Config, int] = {}  # and the shared memory that is there wherever it is launched
            for shared in (common.LARGE_SHARED, common.SMALL_SHARED):
                listed |= dict.fromkeys(configs_for(dtype, exactness, nvidia, columns, whole, shared), shared)
            for config, shared in listed.items():
                build = common.build(
                    attention_kernel, dtype, images, config, sizes(whole), BLOCK_D=columns, PRECISION=exactness,
                    products=dtype != torch.float32 or exactness == "tf32", **variant,
                )  # fmt: skip
                found.append(build._replace(shared=shared))
        for variant in key_variants():
            tile = KeysTile(KEYS_VALUES // columns, columns, 4)
            vector = 16 if whole else 4
            build = common.build(keys_kernel, dtype, images, tile, sizes(whole), vector=vector, **variant)
            found.append(build._replace(pointers={**build.pointers, "p_mask": "u8"}))
    return found
