"""RMSNorm over the head and 2-D rotation of queries and keys on the GPU, and its backward in ``qk_norm_rope_backward``.

A program holds the rotation tables of a tile of tokens in registers and walks over heads: a table is read once for
many heads, and the token of a row needs no division. Queries [B, N, H, D] and keys [B, M, D] share a launch: programs
beyond those of the queries take keys, which are one head.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from snapgen_kernels._library import like
from snapgen_kernels._triton import common, tuning
from snapgen_kernels._triton.common import Build


class Config(NamedTuple):
    """A tile of ``values`` numbers: values / BLOCK_D tokens of one head."""

    values: int
    num_warps: int


CONFIGS = (Config(2048, 4), Config(1024, 4), Config(4096, 8))
# Programs for each multiprocessor: enough warps to keep memory busy.
WAVES = 8


# ---- device functions ------------------------------------------------------------------------------------------------


@triton.jit
def rotated(b_x, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    """rot(x): of each pair of columns (a, b) the pair (-b, a). A thread holds pairs whole, so nothing moves."""
    b_even, b_odd = tl.split(tl.reshape(b_x, [BLOCK_R, BLOCK_D // 2, 2]))
    return tl.reshape(tl.join(-b_odd, b_even), [BLOCK_R, BLOCK_D])


@triton.jit
def rms(b_x, D, eps):
    """1 / sqrt(mean(x^2) + eps) of each row; columns beyond D hold 0."""
    return tl.rsqrt(tl.sum(b_x * b_x, 1) / D + eps)[:, None]


@triton.jit
def norm_rotate(b_x, b_weight, b_cos, b_sin, D, eps, NORM, ROPE, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of x, normalised (where NORM) and rotated (where ROPE), all fp32."""
    if NORM:
        b_x = b_x * rms(b_x, D, eps) * b_weight
    if ROPE:
        b_x = b_x * b_cos + rotated(b_x, BLOCK_R, BLOCK_D) * b_sin
    return b_x


@triton.jit
def load_weight(p_weight, b_d, D, NORM: tl.constexpr):
    """The weight as a row [1, BLOCK_D] of fp32, or 0 where there is no norm."""
    if NORM:
        return tl.load(p_weight + b_d, mask=b_d < D, other=0.0).to(tl.float32)[None, :]
    else:
        return 0.0


@triton.jit
def load_tables(p_cos, p_sin, i_first, b_off, m, ROPE: tl.constexpr):
    """cos and sin of a tile that starts at ``i_first``, or 0 where there is no rotation."""
    if ROPE:
        b_cos = tl.load(p_cos + i_first + b_off, mask=m, other=0.0)
        return b_cos, tl.load(p_sin + i_first + b_off, mask=m, other=0.0)
    else:
        return 0.0, 0.0


@triton.jit
def tile_mask(b_t, left, b_d, D, EVEN_D: tl.constexpr):
    """[tokens, BLOCK_D]: which elements of a tile are there, ``left`` tokens of it."""
    if EVEN_D:
        return (b_t < left)[:, None]
    else:
        return (b_t < left)[:, None] & (b_d < D)[None, :]


@triton.jit
def _forward_tile(
    p_x,
    p_y,
    p_weight,
    p_cos,
    p_sin,
    i_program,
    N,
    H,
    D,
    heads,
    eps,
    NORM: tl.constexpr,
    ROPE: tl.constexpr,
    EVEN_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """``heads`` heads of BLOCK_T tokens."""
    groups, tiles = tl.cdiv(H, heads), tl.cdiv(N, BLOCK_T)
    i_h, i_rest = (i_program % groups) * heads, i_program // groups
    i_t, i_b = (i_rest % tiles) * BLOCK_T, i_rest // tiles
    b_t, b_d = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_D)
    m = tile_mask(b_t, N - i_t, b_d, D, EVEN_D)
    b_cos, b_sin = load_tables(p_cos, p_sin, i_t.to(tl.int64) * D, b_t[:, None] * D + b_d[None, :], m, ROPE)
    b_weight = load_weight(p_weight, b_d, D, NORM)
    i_first = ((i_b.to(tl.int64) * N + i_t) * H + i_h) * D
    p_x += i_first
    p_y += i_first
    b_off = b_t[:, None] * (H * D) + b_d[None, :]
    for _ in range(tl.minimum(heads, H - i_h)):
        b_x = tl.load(p_x + b_off, mask=m, other=0.0).to(tl.float32)
        b_y = norm_rotate(b_x, b_weight, b_cos, b_sin, D, eps, NORM, ROPE, BLOCK_T, BLOCK_D)
        tl.store(p_y + b_off, b_y.to(p_y.dtype.element_ty), mask=m)
        p_x += D
        p_y += D


# ---- kernels ---------------------------------------------------------------------------------------------------------


@triton.jit
def norm_rope_kernel(
    p_q,
    p_k,
    p_yq,
    p_yk,
    p_wq,
    p_wk,
    p_cos,
    p_sin,
    N,
    H,
    M,
    D,
    heads,
    programs,
    eps,
    NORM: tl.constexpr,
    ROPE: tl.constexpr,
    EVEN_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """q [B, N, H, D] and k [B, M, D], normalised and rotated.

    Grid: ``programs`` = B * cdiv(N, BLOCK_T) * cdiv(H, heads) for q, then B * cdiv(M, BLOCK_T) for k.
    """
    i_program = tl.program_id(0)
    if i_program < programs:
        _forward_tile(
            p_q, p_yq, p_wq, p_cos, p_sin, i_program, N, H, D, heads, eps, NORM, ROPE, EVEN_D, BLOCK_T, BLOCK_D
        )
    else:
        _forward_tile(
            p_k, p_yk, p_wk, p_cos, p_sin, i_program - programs, M, 1, D, 1, eps, NORM, ROPE, EVEN_D, BLOCK_T, BLOCK_D
        )


# ---- launchers -------------------------------------------------------------------------------------------------------


class Rotation(NamedTuple):
    """Tables [N, D], or None for no rotation."""

    cos: Tensor | None
    sin: Tensor | None


def rotation(cos: Tensor | None, sin: Tensor | None) -> Rotation:
    """The tables as the kernels take them: dense, fp32."""
    return Rotation(*(None if t is None else t.detach().float().contiguous() for t in (cos, sin)))


def block_d(dim: int) -> int:
    """Columns of a tile."""
    return max(16, common.pow2(dim))


class Tile(NamedTuple):
    """What a config comes to for one BLOCK_D."""

    block_t: int
    block_d: int
    num_warps: int


class Grid(NamedTuple):
    """How rows [B, N, H, D] are dealt out: heads and tiles of tokens of a program, and the programs."""

    heads: int
    tiles: int
    programs: int


def dealt_out(batch: int, tokens: int, heads: int, block_t: int, processors: int) -> Grid:
    """Few heads of one tile where that fills the GPU no more than once; beyond, more heads, then more tiles."""
    total, wanted = batch * common.cdiv(tokens, block_t), WAVES * processors
    groups = max(1, min(heads, common.cdiv(wanted, max(total, 1))))
    per_program = max(1, common.cdiv(heads, groups))
    tiles = max(1, total // wanted)
    return Grid(per_program, tiles, common.cdiv(total, tiles) * common.cdiv(heads, per_program))


def flags_of(weight: Tensor | None, tables: Rotation, dim: int, config: Config) -> dict[str, Any]:
    columns = block_d(dim)
    return {
        "NORM": weight is not None,
        "ROPE": tables.cos is not None,
        "EVEN_D": dim == columns,
        "BLOCK_T": max(1, config.values // columns),
        "BLOCK_D": columns,
        "num_warps": config.num_warps,
    }


def key_of(x: Tensor, keys: int, weight: Tensor | None, tables: Rotation) -> tuple[int | str, ...]:
    return (str(x.dtype), *x.shape, keys, weight is not None, tables.cos is not None)


def apply(
    q: Tensor,
    k: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    tables: Rotation,
    eps: float,
) -> tuple[Tensor, Tensor | None]:
    """q [B, N, H, D] and k [B, M, D] (None: q alone), normalised and rotated; all contiguous."""
    batch, tokens, heads, dim = q.shape
    keys = 0 if k is None else k.shape[1]
    new_q, new_k = torch.empty_like(q), None if k is None else torch.empty_like(k)

    def launch(config: Config) -> None:
        flags = flags_of(q_weight, tables, dim, config)
        block_t = flags["BLOCK_T"]
        # One tile each: tables are read again, but nothing is added up.
        dealt = dealt_out(batch, tokens, heads, block_t, common.processors(q))
        programs = batch * common.cdiv(tokens, block_t) * common.cdiv(heads, dealt.heads)
        total = programs + batch * common.cdiv(keys, block_t)
        norm_rope_kernel[(total,)](
            q, q if k is None else k, new_q, new_q if new_k is None else new_k, q_weight, k_weight, *tables,
            tokens, heads, keys, dim, dealt.heads, programs, eps, **flags,
        )  # fmt: skip

    if q.numel() + (0 if k is None else k.numel()):
        launch(tuning.choose("qk_norm_rope", key_of(q, keys, q_weight, tables), CONFIGS, CONFIGS[0], launch))
    return new_q, new_k


def forward(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor | None, sin: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    weights = q_weight.contiguous(), k_weight.contiguous()
    new_q, new_k = apply(q.contiguous(), k.contiguous(), *weights, rotation(cos, sin), eps)
    assert new_k is not None
    return like(new_q, q), like(new_k, k)


# ---- what is launched ------------------------------------------------------------------------------------------------


def variants() -> list[dict[str, Any]]:
    """The model's calls: self-attention, and cross-attention without rotation; rotation alone."""
    return [
        {"NORM": True, "ROPE": True},
        {"NORM": True, "ROPE": False, "p_cos": None, "p_sin": None},
        {"NORM": False, "ROPE": True, "p_wq": None, "p_wk": None},
    ]


def head_builds(
    kernel: Any, dtype: torch.dtype, images: tuple[str, ...], configs: tuple[Config, ...], **constants: Any
) -> list[Build]:
    """A kernel in every config, for the model's head and for a wider one."""
    return [
        common.build(kernel, dtype, images, Tile(values // columns, columns, warps), ("D",), EVEN_D=True, **constants)
        for values, warps in configs
        for columns in (64, 128)
    ]


def uneven_builds(
    kernel: Any, dtype: torch.dtype, images: tuple[str, ...], configs: tuple[Config, ...], **constants: Any
) -> list[Build]:
    """For heads of 40 and 200, which fill no tile; nor are their rows whole vectors."""
    return [
        common.build(
            kernel, dtype, images, Tile(values // columns, columns, warps), (), vector=4, EVEN_D=False, **constants
        )
        for values, warps in configs
        for columns in (64, 256)
    ]


def builds(dtype: torch.dtype, nvidia: bool) -> list[Build]:
    """The kernel in every config that the launcher may choose."""
    images = ("p_q", "p_k", "p_yq", "p_yk")
    found = [b for variant in variants() for b in head_builds(norm_rope_kernel, dtype, images, CONFIGS, **variant)]
    return [*found, *uneven_builds(norm_rope_kernel, dtype, images, CONFIGS, **variants()[0])]
