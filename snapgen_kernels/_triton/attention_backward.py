"""Backward of multi-query attention on the GPU: recomputed from the ready queries and keys and the logarithm of each
row's sum of exponentials.

One kernel walks over the keys for the gradient of its queries, another over queries for the gradients of its keys. One
key head leaves few tiles of keys, so that the rows of queries are split: each split writes its part in fp32, and the
parts are added in a fixed order. Gradients then go through the rotation and the norm. No atomics: a repeat is bitwise
equal.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from snapgen_kernels._library import like
from snapgen_kernels._triton import attention as kernels
from snapgen_kernels._triton import common, qk_norm_rope, qk_norm_rope_backward, tuning
from snapgen_kernels._triton.attention import LOG2_E, Config, Keys, load_rows, within
from snapgen_kernels._triton.common import Build
from snapgen_kernels._triton.pointwise import precisions
from snapgen_kernels._triton.qk_norm_rope import Rotation, block_d, rotation, tile_mask
from snapgen_kernels._triton.weight_gradient import add_parts, new_parts

# ---- kernels ---------------------------------------------------------------------------------------------------------


@triton.jit
def query_gradient_kernel(
    p_q,
    p_k,
    p_v,
    p_bias,
    p_o,
    p_do,
    p_lse,
    p_shift,
    p_delta,
    p_dq,
    R,
    M,
    padded,
    D,
    tiles,
    scale,
    EVEN_D: tl.constexpr,
    TAIL: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dq (unless None) of R rows of queries a sample; of each row delta = sum(do o), and shift, its logarithm to the
    base 2, but inf where there is no key, so that weights are 0. TAIL: as in the forward. Grid: B * tiles, tiles =
    cdiv(R, BLOCK_M)."""
    i_row, i_b = (tl.program_id(0) % tiles) * BLOCK_M, (tl.program_id(0) // tiles).to(tl.int64)
    b_m, b_n, b_d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    i_first, left = i_b * R + i_row, R - i_row
    b_do = load_rows(p_do + i_first * D, b_m, left, b_d, D, EVEN_D)
    b_o = load_rows(p_o + i_first * D, b_m, left, b_d, D, EVEN_D)
    b_delta = tl.sum(b_do.to(tl.float32) * b_o.to(tl.float32), 1)
    tl.store(p_delta + i_first + b_m, b_delta, mask=b_m < left)
    b_lse = tl.load(p_lse + i_first + b_m, mask=b_m < left, other=0.0)
    b_shift = tl.where(b_lse == float("-inf"), float("inf"), b_lse * LOG2_E)
    tl.store(p_shift + i_first + b_m, b_shift, mask=b_m < left)
    if p_dq is not None:
        b_q = load_rows(p_q + i_first * D, b_m, left, b_d, D, EVEN_D)
        p_k += i_b * padded * BLOCK_D + b_n[:, None] * BLOCK_D + b_d[None, :]
        p_v += i_b * padded * BLOCK_D + b_n[None, :] * BLOCK_D + b_d[:, None]  # transposed
        log2_scale = scale * LOG2_E
        b_dq = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
        for i_n in range(0, M, BLOCK_N):
            b_k = tl.load(p_k)
            b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
            if p_bias is None:
                b_p = tl.exp2(tl.fma(b_s, log2_scale, -b_shift[:, None]))
                if TAIL:  # where scores are far below 0, a key of zeros has a weight of inf
                    b_p = within(b_p, b_n, M - i_n, 0.0, BLOCK_N)
            else:
                b_bias = tl.load(p_bias + i_b * padded + i_n + b_n)[None, :]
                b_p = tl.exp2(tl.fma(b_s, log2_scale, b_bias - b_shift[:, None]))
            b_dp = tl.dot(b_do, tl.load(p_v), input_precision=PRECISION)
            b_ds = (b_p * (b_dp - b_delta[:, None])).to(b_k.dtype)
            b_dq = tl.dot(b_ds, b_k, b_dq, input_precision=PRECISION)
            p_k += BLOCK_N * BLOCK_D
            p_v += BLOCK_N * BLOCK_D
        m = tile_mask(b_m, left, b_d, D, EVEN_D)
        b_dq = (b_dq * scale).to(p_dq.dtype.element_ty)
        tl.store(p_dq + i_first * D + b_m[:, None] * D + b_d[None, :], b_dq, mask=m)


@triton.jit
def key_gradient_kernel(
    p_q,
    p_k,
    p_v,
    p_bias,
    p_do,
    p_shift,
    p_delta,
    p_dk,
    p_dv,
    R,
    M,
    padded,
    D,
    chunk,
    chunks,
    scale,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The part of dk and of dv (unless None), both [chunks, B, M, D], of ``chunk`` rows of queries (whole tiles of
    BLOCK_M). Keys beyond the end are computed like the others, each for itself, and not stored.

    Grid: cdiv(M, BLOCK_N) * chunks * B; the tiles of keys of a chunk run side by side and share its rows.
    """
    tiles = tl.cdiv(M, BLOCK_N)
    i_n, i_rest = (tl.program_id(0) % tiles) * BLOCK_N, tl.program_id(0) // tiles
    i_chunk, i_b = i_rest % chunks, (i_rest // chunks).to(tl.int64)
    b_m, b_n, b_d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    b_key = (i_b * padded + i_n) * BLOCK_D + b_n[:, None] * BLOCK_D + b_d[None, :]
    b_k = tl.load(p_k + b_key)
    if p_dk is not None:
        b_v = tl.load(p_v + b_key)
        b_dk = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    if p_dv is not None:
        b_dv = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    if p_bias is not None:
        b_bias = tl.load(p_bias + i_b * padded + i_n + b_n)
    i_row = i_chunk * chunk
    i_first, left = i_b * R + i_row, R - i_row
    p_q += i_first * D
    p_do += i_first * D
    p_shift += i_first
    p_delta += i_first
    log2_scale = scale * LOG2_E
    for _ in range(0, tl.minimum(chunk, left), BLOCK_M):
        b_q = load_rows(p_q, b_m, left, b_d, D, EVEN_D)
        b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)  # [keys, rows]
        b_shift = tl.load(p_shift + b_m, mask=b_m < left, other=float("inf"))
        if p_bias is None:
            b_p = tl.exp2(tl.fma(b_s, log2_scale, -b_shift[None, :]))
        else:
            b_p = tl.exp2(tl.fma(b_s, log2_scale, b_bias[:, None] - b_shift[None, :]))
        b_do = load_rows(p_do, b_m, left, b_d, D, EVEN_D)
        if p_dv is not None:
            b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision=PRECISION)
        if p_dk is not None:
            b_dp = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION)
            b_delta = tl.load(p_delta + b_m, mask=b_m < left, other=0.0)
            b_ds = (b_p * (b_dp - b_delta[None, :])).to(b_q.dtype)
            b_dk = tl.dot(b_ds, b_q, b_dk, input_precision=PRECISION)
        p_q += BLOCK_M * D
        p_do += BLOCK_M * D
        p_shift += BLOCK_M
        p_delta += BLOCK_M
        left -= BLOCK_M
    i_part = ((i_chunk * (tl.num_programs(0) // (tiles * chunks)) + i_b) * M + i_n) * D
    b_off, m = b_n[:, None] * D + b_d[None, :], tile_mask(b_n, M - i_n, b_d, D, EVEN_D)
    if p_dk is not None:
        b_dk = b_dk * scale
        if p_bias is not None:  # NaN in do reaches no key that is left out
            b_dk = tl.where(b_bias[:, None] == 0.0, b_dk, 0.0)
        tl.store(p_dk + i_part + b_off, b_dk, mask=m)
    if p_dv is not None:
        if p_bias is not None:
            b_dv = tl.where(b_bias[:, None] == 0.0, b_dv, 0.0)
        tl.store(p_dv + i_part + b_off, b_dv, mask=m)


# ---- launchers -------------------------------------------------------------------------------------------------------

# Widest first; block_m are rows of queries, block_n keys, in both kernels.
QUERY_CONFIGS = (Config(128, 64, 8, 2), Config(64, 64, 4, 2))
QUERY_CONFIGS_TF32 = (Config(64, 32, 4, 2),)
QUERY_CONFIGS_FP32 = (Config(32, 32, 8, 2),)
QUERY_CONFIGS_HIP = (Config(64, 32, 4, 1), Config(64, 64, 4, 1))
KEY_CONFIGS = (Config(64, 128, 8, 2), Config(64, 64, 4, 2))
KEY_CONFIGS_TF32 = (Config(32, 64, 4, 1),)
KEY_CONFIGS_FP32 = (Config(32, 32, 4, 2),)
KEY_CONFIGS_HIP = (Config(32, 64, 4, 1),)
KEY_CONFIGS_HIP_RAGGED = (Config(32, 32, 8, 1),)
# Heads of more than 64; in tf32 small enough for GPUs with 99 KiB of shared memory a block.
QUERY_CONFIGS_WIDE = (Config(64, 64, 4, 2),)
QUERY_CONFIGS_WIDE_TF32 = (Config(64, 16, 8, 2),)
QUERY_CONFIGS_WIDE_FP32 = (Config(32, 16, 8, 2),)
KEY_CONFIGS_WIDE = (Config(64, 64, 8, 2), Config(32, 64, 8, 2))
KEY_CONFIGS_WIDE_RAGGED = (Config(32, 64, 8, 1),)
KEY_CONFIGS_WIDE_TF32 = (Config(32, 32, 8, 2),)
KEY_CONFIGS_WIDE_FP32 = (Config(32, 32, 8, 3),)
# Programs of the kernel for keys for each multiprocessor, and tiles of rows of a program, at least: below, writing and
# adding the parts outweighs the products.
PROGRAMS = 2
MIN_TILES = 4


def query_configs(dtype: torch.dtype, exactness: str, nvidia: bool, columns: int, whole: bool) -> tuple[Config, ...]:
    """The candidates, widest first; ``whole``: see ``attention.is_whole``."""
    wide = columns > 64
    if dtype == torch.float32:
        if exactness == "tf32":
            return QUERY_CONFIGS_WIDE_TF32 if wide else QUERY_CONFIGS_TF32
        return QUERY_CONFIGS_WIDE_FP32 if wide else QUERY_CONFIGS_FP32
    if not nvidia:
        return QUERY_CONFIGS_HIP if whole else QUERY_CONFIGS_HIP[-1:]
    return QUERY_CONFIGS_WIDE if wide else QUERY_CONFIGS


def key_configs(dtype: torch.dtype, exactness: str, nvidia: bool, columns: int, whole: bool) -> tuple[Config, ...]:
    """The candidates, widest first; ``whole``: see ``attention.is_whole``."""
    wide = columns > 64
    if dtype == torch.float32:
        if exactness == "tf32":
            return KEY_CONFIGS_WIDE_TF32 if wide else KEY_CONFIGS_TF32
        return KEY_CONFIGS_WIDE_FP32 if wide else KEY_CONFIGS_FP32
    if not nvidia:
        return KEY_CONFIGS_HIP if whole else KEY_CONFIGS_HIP_RAGGED
    if not whole:
        return KEY_CONFIGS_WIDE_RAGGED if wide else KEY_CONFIGS[-1:]
    return KEY_CONFIGS_WIDE if wide else KEY_CONFIGS


class _Rows(NamedTuple):
    """What both kernels read of the queries, all contiguous: ready q and do [B, N, H, D]; of each row, [B, N, H], lse
    and what the kernel for queries leaves for that for keys."""

    q: Tensor
    do: Tensor
    lse: Tensor
    shift: Tensor
    delta: Tensor


def _key(rows: _Rows, keys: Keys, count: int, exactness: str) -> tuple[int | str, ...]:
    return (str(rows.q.dtype), exactness, *rows.q.shape, count, keys.bias is not None)


def _query_gradient(rows: _Rows, keys: Keys, o: Tensor, count: int, scale: float, wanted: bool) -> Tensor | None:
    """Fills ``rows.shift`` and ``rows.delta``; dq of the ready queries where it is wanted. ``count``: keys."""
    batch, tokens, heads, dim = rows.q.shape
    dq, total, columns = torch.empty_like(rows.q) if wanted else None, tokens * heads, block_d(dim)
    exactness = kernels.precision(rows.q.dtype)

    def launch(config: Config) -> None:
        tiles = common.cdiv(total, config.block_m)
        query_gradient_kernel[(batch * tiles,)](
            rows.q, keys.k, keys.v, keys.bias, o, rows.do, rows.lse, rows.shift, rows.delta, dq,
            total, count, keys.padded, dim, tiles, scale,
            EVEN_D=dim == columns, TAIL=kernels.has_tail(keys, count, config), PRECISION=exactness,
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_D=columns, num_warps=config.num_warps,
            num_stages=config.num_stages,
        )  # fmt: skip

    configs = query_configs(rows.q.dtype, exactness, torch.version.hip is None, columns, kernels.is_whole(dim))
    default = kernels.filling(configs, batch, total, count, common.processors(rows.q))
    key = (*_key(rows, keys, count, exactness), wanted)
    launch(tuning.choose("attention_query_gradient", key, configs, default, launch))
    return dq


def _key_gradients(
    rows: _Rows, keys: Keys, count: int, scale: float, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, ...]:
    """The gradients of the ready keys and of the values, [B, M, D], M = ``count``, where they are wanted."""
    batch, tokens, heads, dim = rows.q.shape
    total, columns = tokens * heads, block_d(dim)
    exactness = kernels.precision(rows.q.dtype)

    def launch(config: Config) -> tuple[Tensor | None, ...]:
        tiles, steps = common.cdiv(count, config.block_n), common.cdiv(total, config.block_m)
        splits = min(common.cdiv(PROGRAMS * common.processors(rows.q), batch * tiles), steps // MIN_TILES)
        chunk = common.cdiv(steps, max(1, splits)) * config.block_m
        chunks = common.cdiv(total, chunk)
        parts = new_parts(rows.q, sum(wanted), chunks, batch, count, dim)
        given = iter(parts)
        dk, dv = (next(given) if need else None for need in wanted)
        key_gradient_kernel[(tiles * chunks * batch,)](
            rows.q, keys.k, keys.v, keys.bias, rows.do, rows.shift, rows.delta, dk, dv,
            total, count, keys.padded, dim, chunk, chunks, scale,
            EVEN_D=dim == columns, PRECISION=exactness, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
            BLOCK_D=columns, num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
        found = tuple(rows.q.new_empty((batch, count, dim)) if need else None for need in wanted)
        add_parts(parts.view(-1, batch * count * dim), *(t for t in found if t is not None))
        return found

    configs = key_configs(rows.q.dtype, exactness, torch.version.hip is None, columns, kernels.is_whole(dim))
    key = (*_key(rows, keys, count, exactness), *wanted)
    default = kernels.fitting(configs, count)[0]
    return launch(tuning.choose("attention_key_gradient", key, configs, default, launch))


class Weights(NamedTuple):
    """Of the norms, both or neither."""

    q: Tensor | None
    k: Tensor | None


def _gradients(
    rows: _Rows,
    o: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    weights: Weights,
    tables: Rotation,
    scale: float,
    eps: float,
    wanted: list[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v and the weights where they are wanted. ``rows`` holds q as it was given."""
    q, count = rows.q, k.shape[1]
    plain = weights.q is None and tables.cos is None
    if not plain:
        rows = rows._replace(q=qk_norm_rope.apply(q, None, *weights, tables, eps)[0])
    keys = kernels.ready(k, v, mask, weights.k, tables, eps, block_d(q.shape[-1]))
    wants_q, wants_k = wanted[0] or wanted[3], wanted[1] or wanted[4]
    dq = _query_gradient(rows, keys, o, count, scale, wants_q)
    dk, dv = _key_gradients(rows, keys, count, scale, (wants_k, wanted[2])) if wants_k or wanted[2] else (None, None)
    if plain:
        return dq, dk, dv, None, None
    needs = (wanted[0], wanted[1], wanted[3], wanted[4])
    found = qk_norm_rope_backward.gradients(
        q if dq is None else dq, k if dk is None else dk, q, k, *weights, tables, eps, needs, mask
    )
    return found.q, found.k, dv, found.q_weight, found.k_weight


def backward(
    do: Tensor,
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
    o: Tensor,
    logsumexp: Tensor,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    leaves = (q, k, v, q_weight, k_weight)
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    weights = Weights(*(None if t is None else t.contiguous() for t in (q_weight, k_weight)))
    mask = None if key_mask is None else key_mask.contiguous()
    wanted = [need and leaf is not None for need, leaf in zip(needs, leaves, strict=True)]
    if q.numel() == 0 or k.numel() == 0:
        made: tuple[Tensor | None, ...] = tuple(None if t is None else torch.zeros_like(t) for t in leaves)
    else:
        factor = q.shape[-1] ** -0.5 if scale is None else scale
        lse = logsumexp.contiguous()
        rows = _Rows(q, do.contiguous(), lse, torch.empty_like(lse), torch.empty_like(lse))
        made = _gradients(rows, o.contiguous(), k, v, mask, weights, rotation(cos, sin), factor, eps, wanted)
    return tuple(
        like(gradient, leaf) if need and gradient is not None and leaf is not None else do.new_empty(0)
        for gradient, leaf, need in zip(made, leaves, wanted, strict=True)
    )


# ---- what is launched ------------------------------------------------------------------------------------------------


def query_variants(whole: bool) -> list[dict[str, Any]]:
    """Masked keys; unmasked ones, in whole tiles and not; heads that are no power of two."""
    unbiased: dict[str, Any] = {"p_bias": None}
    uneven = [{"EVEN_D": False, "TAIL": True, **unbiased}, {"EVEN_D": False, "TAIL": False}]
    if not whole:
        return uneven
    return [
        {"EVEN_D": True, "TAIL": False, **unbiased},
        {"EVEN_D": True, "TAIL": False},
        {"EVEN_D": True, "TAIL": True, **unbiased},
        uneven[0],
    ]


def key_variants(whole: bool) -> list[dict[str, Any]]:
    """Masked keys and others; heads that are no power of two; one gradient alone."""
    unbiased: dict[str, Any] = {"p_bias": None}
    if not whole:
        return [{"EVEN_D": False, **unbiased}, {"EVEN_D": False}]
    return [
        {"EVEN_D": True, **unbiased},
        {"EVEN_D": True},
        {"EVEN_D": False, **unbiased},
        {"EVEN_D": True, "p_dv": None},
        {"EVEN_D": True, "p_dk": None},
    ]


def builds(dtype: torch.dtype, nvidia: bool) -> list[Build]:
    """Both kernels in every config that the launchers may choose."""
    images = ("p_q", "p_k", "p_v", "p_do")
    kinds = (
        (query_gradient_kernel, (*images, "p_o", "p_dq"), query_configs, query_variants),
        (key_gradient_kernel, images, key_configs, key_variants),
    )
    return [
        common.build(
            kernel, dtype, names, config, kernels.sizes(whole), BLOCK_D=columns, PRECISION=exactness,
            products=dtype != torch.float32 or exactness == "tf32", **variant,
        )
        for kernel, names, configs, variants in kinds
        for columns in (64, 128)
        for whole in (True, False)
        for exactness in precisions(dtype, nvidia)
        for config in configs(dtype, exactness, nvidia, columns, whole)
        for variant in variants(whole)
    ]  # fmt: skip
