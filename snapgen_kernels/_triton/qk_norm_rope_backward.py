"""Backward of RMSNorm and rotation of queries and keys on the GPU, recomputed from q and k.

Queries and keys share a launch, as in the forward. Gradients of the weights are written as one part a program and added
in a fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from snapgen_kernels._library import like
from snapgen_kernels._triton import common, tuning
from snapgen_kernels._triton import qk_norm_rope as kernels
from snapgen_kernels._triton.common import Build
from snapgen_kernels._triton.qk_norm_rope import Config, Rotation, load_tables, load_weight, rms, rotated, tile_mask
from snapgen_kernels._triton.weight_gradient import new_parts

# The weight's gradient is held as well: fewer numbers a thread than in the forward.
CONFIGS = (Config(1024, 4), Config(2048, 8))
# Heads that fill no tile need masks as well, for which the larger tile leaves no register on sm_100.
UNEVEN_CONFIGS = CONFIGS[:1]


class AddConfig(NamedTuple):
    """Adds BLOCK_S parts of BLOCK_D values at a time."""

    block_s: int
    block_d: int
    num_warps: int


ADD_CONFIG = AddConfig(128, 16, 4)


@triton.jit
def _backward_tiles(
    p_x,
    p_dy,
    p_dx,
    p_weight,
    p_cos,
    p_sin,
    p_mask,
    p_part,
    i_program,
    B,
    N,
    H,
    D,
    heads,
    per_program,
    eps,
    NORM: tl.constexpr,
    ROPE: tl.constexpr,
    EVEN_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dx of ``heads`` heads of ``per_program`` tiles of BLOCK_T tokens, and their part of dweight. Tokens that p_mask
    [B, N] leaves out have no gradient and are not read."""
    groups, tiles = tl.cdiv(H, heads), tl.cdiv(N, BLOCK_T)
    i_h, i_tile = (i_program % groups) * heads, (i_program // groups) * per_program
    b_t, b_d = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_D)
    b_weight = load_weight(p_weight, b_d, D, NORM)
    b_off = b_t[:, None] * (H * D) + b_d[None, :]
    b_dweight = tl.zeros([BLOCK_T, BLOCK_D], dtype=tl.float32)
    for i_flat in range(i_tile, tl.minimum(i_tile + per_program, B * tiles)):
        i_t, i_b = (i_flat % tiles) * BLOCK_T, (i_flat // tiles).to(tl.int64)
        m = tile_mask(b_t, N - i_t, b_d, D, EVEN_D)
        b_cos, b_sin = load_tables(p_cos, p_sin, i_t.to(tl.int64) * D, b_t[:, None] * D + b_d[None, :], m, ROPE)
        m_t = b_t < N - i_t
        if p_mask is not None:
            m_t = m_t & (tl.load(p_mask + i_b * N + i_t + b_t, mask=m_t, other=0) != 0)
        m_read = m & m_t[:, None]
        i_first = ((i_b * N + i_t) * H + i_h) * D
        for i_head in range(tl.minimum(heads, H - i_h)):
            i_at = i_first + i_head * D
            b_dx = tl.load(p_dy + i_at + b_off, mask=m_read, other=0.0).to(tl.float32)
            if ROPE:
                b_dx = b_dx * b_cos - rotated(b_dx * b_sin, BLOCK_T, BLOCK_D)
            if NORM:
                b_x = tl.load(p_x + i_at + b_off, mask=m_read, other=0.0).to(tl.float32)
                b_r = tl.where(m_t[:, None], rms(b_x, D, eps), 0.0)  # inf where eps is 0
                b_n = b_x * b_r
                b_dweight += b_dx * b_n
                b_g = b_dx * b_weight
                b_dx = b_r * (b_g - b_n * (tl.sum(b_g * b_n, 1) / D)[:, None])
            if p_dx is not None:
                tl.store(p_dx + i_at + b_off, b_dx.to(p_dx.dtype.element_ty), mask=m)
    if p_part is not None:
        tl.store(p_part + i_program.to(tl.int64) * D + b_d, tl.sum(b_dweight, 0), mask=b_d < D)


@triton.jit
def norm_rope_backward_kernel(
    p_q,
    p_k,
    p_dyq,
    p_dyk,
    p_dq,
    p_dk,
    p_wq,
    p_wk,
    p_cos,
    p_sin,
    p_mask,
    p_parts_q,
    p_parts_k,
    B,
    N,
    H,
    M,
    D,
    heads,
    tiles_q,
    tiles_k,
    programs,
    eps,
    NORM: tl.constexpr,
    ROPE: tl.constexpr,
    EVEN_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dq and dk (unless None), and a part [D] of each weight's gradient per program (unless None).

    Grid: ``programs`` = cdiv(B * cdiv(N, BLOCK_T), tiles_q) * cdiv(H, heads) for q, then cdiv(B * cdiv(M, BLOCK_T),
    tiles_k) for k, whose tokens p_mask [B, M] may leave out.
    """
    i_program = tl.program_id(0)
    if i_program < programs:
        _backward_tiles(
            p_q, p_dyq, p_dq, p_wq, p_cos, p_sin, None, p_parts_q, i_program, B, N, H, D, heads, tiles_q, eps,
            NORM, ROPE, EVEN_D, BLOCK_T, BLOCK_D,
        )  # fmt: skip
    else:
        _backward_tiles(
            p_k, p_dyk, p_dk, p_wk, p_cos, p_sin, p_mask, p_parts_k, i_program - programs, B, M, 1, D, 1, tiles_k, eps,
            NORM, ROPE, EVEN_D, BLOCK_T, BLOCK_D,
        )  # fmt: skip


@triton.jit
def _add(p_parts, p_out, parts, b_d, D, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr):
    b_s = tl.arange(0, BLOCK_S)
    b_sum = tl.zeros([BLOCK_S, BLOCK_D], dtype=tl.float32)
    for i_s in range(0, parts, BLOCK_S):
        m = (b_s < parts - i_s)[:, None] & (b_d < D)[None, :]
        b_sum += tl.load(p_parts + (i_s + b_s)[:, None] * D + b_d[None, :], mask=m, other=0.0)
    tl.store(p_out + b_d, tl.sum(b_sum, 0).to(p_out.dtype.element_ty), mask=b_d < D)


@triton.jit
def add_weights_kernel(
    p_parts_q, p_parts_k, p_wq, p_wk, parts_q, parts_k, D, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr
):
    """dweight [D] of q and of k (unless None), the sums of their parts. Grid: cdiv(D, BLOCK_D), 2."""
    b_d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    if tl.program_id(1) == 0:
        if p_wq is not None:
            _add(p_parts_q, p_wq, parts_q, b_d, D, BLOCK_S, BLOCK_D)
    else:
        if p_wk is not None:
            _add(p_parts_k, p_wk, parts_k, b_d, D, BLOCK_S, BLOCK_D)


# ---- launchers -------------------------------------------------------------------------------------------------------


class Gradients(NamedTuple):
    """What :func:`gradients` makes, each None where it is not asked for."""

    q: Tensor | None
    k: Tensor | None
    q_weight: Tensor | None
    k_weight: Tensor | None


def gradients(
    dq: Tensor,
    dk: Tensor,
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    tables: Rotation,
    eps: float,
    needs: Sequence[bool],
    key_mask: Tensor | None = None,
) -> Gradients:
    """Gradients of q [B, N, H, D], k [B, M, D] and the weights (``needs`` in this order), of those of the results; all
    contiguous. Keys that ``key_mask`` [B, M] leaves out are not read and get zeros."""
    batch, tokens, heads, dim = q.shape
    leaves = (q, k, q_weight, k_weight)
    made = Gradients(
        *(torch.empty_like(t) if need and t is not None else None for t, need in zip(leaves, needs, strict=True))
    )

    mask = None if key_mask is None else key_mask.view(torch.uint8)

    def launch(config: Config) -> None:
        flags = kernels.flags_of(q_weight, tables, dim, config)
        block_t, processors = flags["BLOCK_T"], common.processors(q)
        grid_q = kernels.dealt_out(batch, tokens, heads, block_t, processors)
        grid_k = kernels.dealt_out(batch, k.shape[1], 1, block_t, processors)
        if made.q is None and made.q_weight is None:
            grid_q = grid_q._replace(programs=0)
        if made.k is None and made.k_weight is None:
            grid_k = grid_k._replace(programs=0)
        parts_q, parts_k = (
            None if weight is None else new_parts(q, grid.programs, dim)
            for weight, grid in ((made.q_weight, grid_q), (made.k_weight, grid_k))
        )
        if grid_q.programs + grid_k.programs:
            norm_rope_backward_kernel[(grid_q.programs + grid_k.programs,)](
                q, k, dq, dk, made.q, made.k, q_weight, k_weight, *tables, mask, parts_q, parts_k,
                batch, tokens, heads, k.shape[1], dim, grid_q.heads, grid_q.tiles, grid_k.tiles, grid_q.programs, eps,
                **flags,
            )  # fmt: skip
        if parts_q is not None or parts_k is not None:
            add_weights_kernel[(common.cdiv(dim, ADD_CONFIG.block_d), 2)](
                parts_q, parts_k, made.q_weight, made.k_weight, grid_q.programs, grid_k.programs, dim,
                BLOCK_S=ADD_CONFIG.block_s, BLOCK_D=ADD_CONFIG.block_d, num_warps=ADD_CONFIG.num_warps,
            )  # fmt: skip

    if dim and any(gradient is not None for gradient in made):
        key = (*kernels.key_of(q, k.shape[1], q_weight, tables), *(gradient is not None for gradient in made))
        configs = CONFIGS if dim == kernels.block_d(dim) else UNEVEN_CONFIGS
        launch(tuning.choose("qk_norm_rope_backward", key, configs, configs[0], launch))
    return made


def backward(
    dq: Tensor,
    dk: Tensor,
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    leaves = (q, k, q_weight, k_weight)
    dq, dk, q, k, q_weight, k_weight = (t.contiguous() for t in (dq, dk, *leaves))
    made = gradients(dq, dk, q, k, q_weight, k_weight, kernels.rotation(cos, sin), eps, needs)
    return tuple(
        dq.new_empty(0) if gradient is None else like(gradient, leaf)
        for gradient, leaf in zip(made, leaves, strict=True)
    )


def builds(dtype: torch.dtype, nvidia: bool) -> list[Build]:
    """Every kernel of this file in every config that its launchers may choose."""
    kernel, images = norm_rope_backward_kernel, ("p_q", "p_k", "p_dyq", "p_dyk", "p_dq", "p_dk")
    unmasked: dict[str, Any] = {"p_mask": None}
    # Without a norm there are no weights to be given gradients.
    unnormed: dict[str, Any] = {"p_parts_q": None, "p_parts_k": None}
    rotated, plain, alone = kernels.variants()
    found = [
        *kernels.head_builds(kernel, dtype, images, CONFIGS, **unmasked, **rotated),
        *kernels.head_builds(kernel, dtype, images, CONFIGS, **unmasked, **plain),
        *kernels.head_builds(kernel, dtype, images, CONFIGS, **unmasked, **unnormed, **alone),
        *kernels.head_builds(kernel, dtype, images, CONFIGS, **plain),
        *kernels.head_builds(kernel, dtype, images, CONFIGS, **rotated),
        *kernels.uneven_builds(kernel, dtype, images, UNEVEN_CONFIGS, **rotated),
    ]
    found = [build._replace(pointers={**build.pointers, "p_mask": "u8"}) for build in found]
    return [*found, common.build(add_weights_kernel, dtype, (), ADD_CONFIG, ("D",))]
