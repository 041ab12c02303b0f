"""The gated projection on the GPU; the contract is in ``snapgen_kernels/geglu.py``.

One product computes the value and the gate of a tile of features: the rows of the weight are read in turns, one of the
value and one of the gate, so that both stand side by side in a thread's accumulators, and a single product as wide as
two feeds the tensor cores.

Floors, for T tokens, C channels, F features and elements of e bytes, with T = 16384, C = 896, F = 2688 and e = 2 at
790 TFLOP/s of products and 4.3 TB/s of copies (arithmetic, not measured):

=====================  ==================  =============================  ========  =======
kernel                 FLOPs               bytes                          products  copies
=====================  ==================  =============================  ========  =======
forward                4 T C F             (T C + 2 F C + T F) e          0.20 ms   0.03 ms
... that keeps h                           + 2 T F e                                0.07 ms
gradient of a kept h   no product          5 T F e                                  0.10 ms
gradient, h anew       4 T C F             (T C + 2 F C + 3 T F) e        0.20 ms   0.07 ms
dx = dh weight         4 T C F             (2 T F + 2 F C + T C) e        0.20 ms   0.05 ms
dweight = dh^T x       4 T C F             (2 T F + T C + 2 F C) e        0.20 ms   0.05 ms
=====================  ==================  =============================  ========  =======

So h is worth its memory: writing it hides behind the forward's product, and reading it takes half the time of the
product that would give it again. dh has a pass of its own before the two products that read it: made as they load, it
would cost them the error function of every element once per column of tiles, in registers that are on the way to the
tensor cores. Where h is not kept, the product that gives it again ends in dh, and h is never written. The sums over
tokens for dbias are taken where dh is made, a part for each program, and added in a fixed order.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from snapgen_kernels._triton import common, tuning, weight_gradient
from snapgen_kernels._triton.common import Build
from snapgen_kernels._triton.pointwise import pointwise, precisions, product
from snapgen_kernels._triton.sepconv_backward import gradients, plain


class Config(NamedTuple):
    """A program computes ``block_m`` tokens by ``block_f`` features, a product of ``block_m`` by twice ``block_f``,
    ``block_k`` channels at a time."""

    block_m: int
    block_f: int
    block_k: int
    num_warps: int
    num_stages: int


class GradientConfig(NamedTuple):
    """A program works through tiles of ``block_m`` tokens by ``block_f`` features."""

    block_m: int
    block_f: int
    num_warps: int


# Widest first: the rule takes the first that fills the GPU.
CONFIGS = (
    Config(128, 128, 64, 8, 3),
    Config(128, 64, 64, 8, 3),
    Config(64, 64, 64, 4, 4),
    Config(64, 32, 64, 4, 4),
)
CONFIGS_TF32 = (Config(128, 64, 32, 8, 3), Config(64, 32, 32, 4, 3))
# fp32 products in full precision run on the ordinary units.
CONFIGS_FP32 = (Config(64, 32, 16, 4, 2), Config(32, 32, 16, 4, 2))
# AMD has 64 KiB of shared memory.
CONFIGS_HIP = (Config(128, 64, 64, 8, 2), Config(64, 32, 64, 4, 2))
# For many features, and for few.
GRADIENT_CONFIGS = (GradientConfig(16, 128, 4), GradientConfig(64, 32, 4))
# Programs of the gradient that one multiprocessor holds.
PROGRAMS = 8


# ---- device functions ------------------------------------------------------------------------------------------------


@triton.jit
def normal(b_g):
    """The normal distribution P."""
    return 0.5 + 0.5 * tl.erf(b_g * 0.7071067811865476)


@triton.jit
def density(b_g):
    """The normal density p."""
    return 0.3989422804014327 * tl.exp(-0.5 * b_g * b_g)


@triton.jit
def gated_gradient(b_value, b_gate, b_dy):
    """What value and gate get of dy."""
    b_p = normal(b_gate)
    return b_dy * (b_gate * b_p), b_dy * b_value * (b_p + b_gate * density(b_gate))


@triton.jit
def projected(
    p_x,
    p_w,
    p_bias,
    i_token,
    b_m,
    m_m,
    i_f,
    K,
    F,
    HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Value and gate, [BLOCK_M, BLOCK_F] each in fp32."""
    b_n = tl.arange(0, 2 * BLOCK_F)
    b_of = i_f * BLOCK_F + b_n // 2
    m_n = b_of < F
    b_row = b_of + (b_n % 2) * F
    b_acc = tl.zeros([BLOCK_M, 2 * BLOCK_F], tl.float32)
    b_acc = product(b_acc, p_x, p_w, i_token, b_m, m_m, b_row, m_n, K, 2 * F, False, EVEN_K, BLOCK_K, PRECISION)
    if HAS_BIAS:
        b_acc += tl.load(p_bias + b_row, mask=m_n, other=0.0).to(tl.float32)[None, :]
    return tl.split(tl.reshape(b_acc, [BLOCK_M, BLOCK_F, 2]))


# ---- kernels ---------------------------------------------------------------------------------------------------------


@triton.jit
def geglu_kernel(
    p_x,
    p_w,
    p_bias,
    p_y,
    p_h,
    T,
    K,
    F,
    HAS_BIAS: tl.constexpr,
    KEEP: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y [T, F], and where KEEP h [T, 2F]. Grid: cdiv(T, BLOCK_M) * cdiv(F, BLOCK_F); the features of a token run side
    by side and share its row."""
    blocks_f = tl.cdiv(F, BLOCK_F)
    i_f, i_m = tl.program_id(0) % blocks_f, tl.program_id(0) // blocks_f
    i_token = i_m.to(tl.int64) * BLOCK_M
    b_m = tl.arange(0, BLOCK_M)
    m_m = b_m < T - i_token
    b_value, b_gate = projected(
        p_x, p_w, p_bias, i_token, b_m, m_m, i_f, K, F, HAS_BIAS, EVEN_K, PRECISION, BLOCK_M, BLOCK_F, BLOCK_K
    )
    b_f = i_f * BLOCK_F + tl.arange(0, BLOCK_F)
    m = m_m[:, None] & (b_f < F)[None, :]
    # y first: with h stored before it, the widest tile spills.
    b_y = b_value * (b_gate * normal(b_gate))
    tl.store(p_y + i_token * F + b_m[:, None] * F + b_f[None, :], b_y.to(p_y.dtype.element_ty), mask=m)
    if KEEP:
        p_h += i_token * 2 * F
        b_at = b_m[:, None] * (2 * F) + b_f[None, :]
        tl.store(p_h + b_at, b_value.to(p_h.dtype.element_ty), mask=m)
        tl.store(p_h + F + b_at, b_gate.to(p_h.dtype.element_ty), mask=m)


@triton.jit
def geglu_anew_gradient_kernel(
    p_x,
    p_w,
    p_bias,
    p_dy,
    p_dh,
    p_sums,
    T,
    K,
    F,
    HAS_BIAS: tl.constexpr,
    SUMS: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dh [T, 2F] of an h that was not kept, and where SUMS the sums of its columns per tile of tokens, [tiles, 2F].
    Grid: that of :func:`geglu_kernel`."""
    blocks_f = tl.cdiv(F, BLOCK_F)
    i_f, i_m = tl.program_id(0) % blocks_f, tl.program_id(0) // blocks_f
    i_token = i_m.to(tl.int64) * BLOCK_M
    b_m = tl.arange(0, BLOCK_M)
    m_m = b_m < T - i_token
    b_value, b_gate = projected(
        p_x, p_w, p_bias, i_token, b_m, m_m, i_f, K, F, HAS_BIAS, EVEN_K, PRECISION, BLOCK_M, BLOCK_F, BLOCK_K
    )
    b_f = i_f * BLOCK_F + tl.arange(0, BLOCK_F)
    m_f = b_f < F
    m = m_m[:, None] & m_f[None, :]
    b_dy = tl.load(p_dy + i_token * F + b_m[:, None] * F + b_f[None, :], mask=m, other=0.0).to(tl.float32)
    b_dvalue, b_dgate = gated_gradient(b_value, b_gate, b_dy)
    p_dh += i_token * 2 * F
    b_at = b_m[:, None] * (2 * F) + b_f[None, :]
    tl.store(p_dh + b_at, b_dvalue.to(p_dh.dtype.element_ty), mask=m)
    tl.store(p_dh + F + b_at, b_dgate.to(p_dh.dtype.element_ty), mask=m)
    if SUMS:
        # Where there is no token, x and dy are zero; a bias that is not finite would make that a NaN.
        p_sums += i_m.to(tl.int64) * 2 * F + b_f
        tl.store(p_sums, tl.sum(tl.where(m_m[:, None], b_dvalue, 0.0), 0), mask=m_f)
        tl.store(p_sums + F, tl.sum(tl.where(m_m[:, None], b_dgate, 0.0), 0), mask=m_f)


@triton.jit
def geglu_gradient_kernel(
    p_h, p_dy, p_dh, p_sums, T, F, tiles, SUMS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr
):
    """dh [T, 2F] of a kept h, and where SUMS the sums of its columns per chunk of ``tiles`` tiles of tokens,
    [chunks, 2F]. Grid: chunks * cdiv(F, BLOCK_F)."""
    blocks_f = tl.cdiv(F, BLOCK_F)
    i_f, i_chunk = tl.program_id(0) % blocks_f, tl.program_id(0) // blocks_f
    i_token = i_chunk.to(tl.int64) * tiles * BLOCK_M
    b_m = tl.arange(0, BLOCK_M)
    b_f = i_f * BLOCK_F + tl.arange(0, BLOCK_F)
    m_f = b_f < F
    p_h += i_token * 2 * F
    p_dh += i_token * 2 * F
    p_dy += i_token * F
    b_at = b_m[:, None] * (2 * F) + b_f[None, :]
    b_at_dy = b_m[:, None] * F + b_f[None, :]
    b_dvalues = tl.zeros([BLOCK_M, BLOCK_F], dtype=tl.float32)
    b_dgates = tl.zeros([BLOCK_M, BLOCK_F], dtype=tl.float32)
    for _ in range(tiles):
        m = (b_m < T - i_token)[:, None] & m_f[None, :]
        b_value = tl.load(p_h + b_at, mask=m, other=0.0).to(tl.float32)
        b_gate = tl.load(p_h + F + b_at, mask=m, other=0.0).to(tl.float32)
        b_dy = tl.load(p_dy + b_at_dy, mask=m, other=0.0).to(tl.float32)
        b_dvalue, b_dgate = gated_gradient(b_value, b_gate, b_dy)
        tl.store(p_dh + b_at, b_dvalue.to(p_dh.dtype.element_ty), mask=m)
        tl.store(p_dh + F + b_at, b_dgate.to(p_dh.dtype.element_ty), mask=m)
        if SUMS:
            b_dvalues += b_dvalue
            b_dgates += b_dgate
        i_token += BLOCK_M
        p_h += BLOCK_M * 2 * F
        p_dh += BLOCK_M * 2 * F
        p_dy += BLOCK_M * F
    if SUMS:
        p_sums += i_chunk.to(tl.int64) * 2 * F + b_f
        tl.store(p_sums, tl.sum(b_dvalues, 0), mask=m_f)
        tl.store(p_sums + F, tl.sum(b_dgates, 0), mask=m_f)


# ---- launchers -------------------------------------------------------------------------------------------------------


class Call(NamedTuple):
    """What a product of the projection reads: x [T, C], weight [2F, C], bias [2F] or None, all contiguous."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None

    @property
    def sizes(self) -> tuple[int, int, int]:
        """T, C and F."""
        return *self.x.shape, self.weight.shape[0] // 2


def only(config: Config) -> int:
    """As ``pointwise.only``: the widest accumulators leave other GPUs than Hopper no registers for operands."""
    return 90 if config.block_f > 64 else 0


def configs_for(
    dtype: torch.dtype, precision: str, nvidia: bool, capability: int, gradient: bool
) -> tuple[Config, ...]:
    """The candidates, widest first; ``gradient``: of a product that ends in dh, which takes more registers."""
    if dtype == torch.float32:
        return CONFIGS_TF32 if precision == "tf32" else CONFIGS_FP32
    if not nvidia:
        return CONFIGS_HIP
    widest = 64 if gradient else 128
    return tuple(c for c in CONFIGS if only(c) in (0, capability) and c.block_f <= widest)


def _filling(configs: tuple[Config, ...], tokens: int, features: int, processors: int) -> Config:
    """The first config with a program for every multiprocessor and no tile half empty; else the last."""
    for config in configs:
        programs = common.cdiv(tokens, config.block_m) * common.cdiv(features, config.block_f)
        if programs >= processors and config.block_f <= common.pow2(features):
            return config
    return configs[-1]


def _choose(kernel: str, call: Call, gradient: bool, flag: bool, launch: Any) -> Config:
    tokens, channels, features = call.sizes
    dtype, precision = call.x.dtype, common.linear_precision(call.x.dtype)
    configs = configs_for(dtype, precision, torch.version.hip is None, common.capability(call.x), gradient)
    default = _filling(configs, tokens, features, common.processors(call.x))
    key = (str(dtype), precision, tokens, channels, features, call.bias is not None, flag)
    return tuning.choose(kernel, key, configs, default, launch)


def _launch(kernel: Any, call: Call, outputs: tuple[Tensor, ...], config: Config, **flags: bool) -> None:
    tokens, channels, features = call.sizes
    kernel[(common.cdiv(tokens, config.block_m) * common.cdiv(features, config.block_f),)](
        call.x,
        call.weight,
        call.weight if call.bias is None else call.bias,
        *outputs,
        tokens,
        channels,
        features,
        HAS_BIAS=call.bias is not None,
        **flags,
        EVEN_K=channels % config.block_k == 0,
        PRECISION=common.linear_precision(call.x.dtype),
        BLOCK_M=config.block_m,
        BLOCK_F=config.block_f,
        BLOCK_K=config.block_k,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def _rows(x: Tensor) -> Tensor:
    """[B, N, C] as [B N, C], contiguous."""
    return x.reshape(x.shape[0] * x.shape[1], x.shape[2]).contiguous()


def _image(rows: Tensor) -> Tensor:
    """[T, C] as one channels_last picture of T pixels, [1, C, T, 1]: the same memory."""
    return rows.t()[None, :, :, None]


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, keep: bool) -> tuple[Tensor, Tensor]:
    """y, and h or nothing; the arguments are those of ``snapgen::geglu``."""
    y = x.new_empty((*x.shape[:-1], weight.shape[0] // 2))
    h = x.new_empty((*x.shape[:-1], weight.shape[0]) if keep else (0,))
    if y.numel():
        call = Call(_rows(x), weight.contiguous(), plain(bias))

        def launch(config: Config) -> None:
            _launch(geglu_kernel, call, (y, h if keep else y), config, KEEP=keep)

        launch(_choose("geglu", call, False, keep, launch))
    return y, h


def _anew(call: Call, dy: Tensor, dh: Tensor, sums: bool) -> Tensor | None:
    """Fill dh of an h that was not kept; parts of its sums over tokens, [any, 2F], where ``sums``."""

    def launch(config: Config) -> Tensor | None:
        parts = weight_gradient.new_parts(dh, common.cdiv(len(dh), config.block_m), dh.shape[1]) if sums else None
        outputs = (dy, dh, dh if parts is None else parts)
        _launch(geglu_anew_gradient_kernel, call, outputs, config, SUMS=sums)
        return parts

    return launch(_choose("geglu_anew_gradient", call, True, sums, launch))


def _of_kept(h: Tensor, dy: Tensor, dh: Tensor, sums: bool) -> Tensor | None:
    """Fill dh of a kept h; parts of its sums over tokens, [any, 2F], where ``sums``."""
    tokens, features = dy.shape

    def launch(config: GradientConfig) -> Tensor | None:
        steps, blocks_f = common.cdiv(tokens, config.block_m), common.cdiv(features, config.block_f)
        tiles = common.cdiv(steps * blocks_f, PROGRAMS * common.processors(h))
        chunks = common.cdiv(steps, tiles)
        parts = weight_gradient.new_parts(dh, chunks, 2 * features) if sums else None
        geglu_gradient_kernel[(chunks * blocks_f,)](
            h,
            dy,
            dh,
            dh if parts is None else parts,
            tokens,
            features,
            tiles,
            SUMS=sums,
            BLOCK_M=config.block_m,
            BLOCK_F=config.block_f,
            num_warps=config.num_warps,
        )
        return parts

    default = GRADIENT_CONFIGS[0 if features > 64 else 1]
    key = (str(h.dtype), tokens, features, sums)
    return launch(tuning.choose("geglu_gradient", key, GRADIENT_CONFIGS, default, launch))


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, keep: bool, h: Tensor, needs: list[bool]
) -> tuple[Tensor, ...]:
    """``snapgen::geglu_backward``."""
    arguments = (x, weight, bias)
    if dy.numel() == 0:
        return gradients([None] * 3, arguments, needs, dy)
    call = Call(_rows(x), weight.contiguous(), plain(bias))
    upstream, sums = _rows(dy), needs[2] and bias is not None
    dh = dy.new_empty((len(upstream), weight.shape[0]))
    parts = _of_kept(_rows(h), upstream, dh, sums) if keep else _anew(call, upstream, dh, sums)
    precision = common.linear_precision(dy.dtype)
    dx = dweight = None
    if needs[0]:
        dx = x.new_empty(x.shape)
        pointwise(_image(dh), call.weight, transposed=True, out=_image(dx.view_as(call.x)), precision=precision)
    if needs[1]:
        found = weight_gradient.weight_parts(_image(dh), _image(call.x), False, precision)
        dweight = weight_gradient.added(found.weight, call.weight)
    return gradients((dx, dweight, weight_gradient.added(parts, call.bias)), arguments, needs, dy)


# ---- builds ----------------------------------------------------------------------------------------------------------


def builds(dtype: torch.dtype, nvidia: bool) -> list[Build]:
    """Every kernel of this file in every config that its launchers may choose, as the model calls them."""
    found: list[Build] = []
    outputs: dict[Any, tuple[tuple[str, ...], str]] = {
        geglu_kernel: (("p_y", "p_h"), "KEEP"),
        geglu_anew_gradient_kernel: (("p_dy", "p_dh"), "SUMS"),
    }
    for kernel, (images, flag) in outputs.items():
        for precision in precisions(dtype, nvidia):
            for config in configs_for(dtype, precision, nvidia, 90, flag == "SUMS"):
                for value in (False, True):
                    flags: dict[str, Any] = {"HAS_BIAS": True, flag: value, "EVEN_K": True, "PRECISION": precision}
                    listed = common.build(
                        kernel,
                        dtype,
                        ("p_x", "p_w", "p_bias", *images),
                        config,
                        ("K", "F"),
                        products=dtype != torch.float32 or precision == "tf32",
                        only=only(config),
                        **flags,
                    )
                    found.append(listed)
    for shape in GRADIENT_CONFIGS:
        for sums in (False, True):
            images = ("p_h", "p_dy", "p_dh")
            found.append(common.build(geglu_gradient_kernel, dtype, images, shape, ("F",), SUMS=sums))
    return found
