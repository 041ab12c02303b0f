"""The pointwise 1x1 convolution on the GPU: a product of pixels and weights, and what follows it while the result is
still in registers: bias, time shift, residual, a 1x1 shortcut as a second product, and the moments of the result for
the next norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from snapgen_kernels._triton import common, tuning
from snapgen_kernels._triton.common import Build


class ProductConfig(NamedTuple):
    """A program computes ``block_m`` pixels by ``block_n`` outputs, ``block_k`` inputs at a time."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


class Pair(NamedTuple):
    """A second product into the same accumulators: ``x`` [B, K, H, W] channels_last, ``weight`` [O, K, 1, 1]."""

    x: Tensor
    weight: Tensor


class Moments(NamedTuple):
    """Mean and sum of squared deviations of each channel of each tile of ``chunk`` pixels: [2, B, tiles, O] in fp32."""

    part: Tensor
    chunk: int


class Epilogue(NamedTuple):
    """What happens to a product before it is rounded, and where the moments of its channels go.

    ``bias`` [O], ``shift`` [B, O], ``residual`` [B, O, H, W] channels_last; ``moments``: mean and sum of squared
    deviations, both [B, tiles, O] in fp32.
    """

    bias: Tensor | None = None
    shift: Tensor | None = None
    residual: Tensor | None = None
    shortcut: Pair | None = None
    moments: tuple[Tensor, Tensor] | None = None

    def telling(self, moments: Moments | None) -> Epilogue:
        return self._replace(moments=None if moments is None else (moments.part[0], moments.part[1]))

    def samples(self, first: int, last: int) -> Epilogue:
        def cut(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[first:last]

        moments, pair = self.moments, self.shortcut
        return Epilogue(
            self.bias,
            cut(self.shift),
            cut(self.residual),
            None if pair is None else pair._replace(x=pair.x[first:last]),
            None if moments is None else (moments[0][first:last], moments[1][first:last]),
        )

    def flags(self) -> dict[str, bool]:
        return {
            "HAS_BIAS": self.bias is not None,
            "HAS_SHIFT": self.shift is not None,
            "HAS_RESIDUAL": self.residual is not None,
            "HAS_SHORTCUT": self.shortcut is not None,
            "STATISTICS": self.moments is not None,
        }

    def tensors(self, other: Tensor) -> tuple[Tensor, ...]:
        """The kernel's pointers, ``other`` standing where there is nothing."""
        pair, part = self.shortcut or (other, other), self.moments or (other, other)
        return (*(other if t is None else t for t in (self.bias, self.shift, self.residual)), *pair, *part)

    def extras(self) -> int:
        """How many images and vectors are added."""
        return sum(part is not None for part in (self.bias, self.shift, self.residual, self.shortcut))

    def inputs(self) -> int:
        """Channels of the shortcut."""
        return 0 if self.shortcut is None else self.shortcut.x.shape[1]


# ---- device functions ------------------------------------------------------------------------------------------------


@triton.jit
def finish(
    b_acc,
    p_y,
    p_bias,
    p_shift,
    p_residual,
    p_mean,
    p_m2,
    i_b,
    i_m,
    b_m,
    m_m,
    b_n,
    m_n,
    P,
    N,
    tiles,
    BLOCK_M: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    STATISTICS: tl.constexpr,
):
    """Bias, shift, residual; the rounded result; mean and sum of squared deviations of each channel of the tile."""
    if HAS_BIAS:
        b_acc += tl.load(p_bias + b_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    if HAS_SHIFT:
        b_acc += tl.load(p_shift + i_b * N + b_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    m = m_m[:, None] & m_n[None, :]
    i_base = (i_b.to(tl.int64) * P + i_m * BLOCK_M) * N
    b_at = b_m[:, None] * N + b_n[None, :]
    if HAS_RESIDUAL:
        b_acc += tl.load(p_residual + i_base + b_at, mask=m, other=0.0).to(tl.float32)
    b_y = b_acc.to(p_y.dtype.element_ty)
    tl.store(p_y + i_base + b_at, b_y, mask=m)
    if STATISTICS:
        # Channels beyond N are computed and not stored: masks of rows alone take fewer registers.
        b_r = tl.where(m_m[:, None], b_y.to(tl.float32), 0.0)
        n = tl.minimum(P - i_m * BLOCK_M, BLOCK_M).to(tl.float32)
        b_center = tl.sum(b_r, 0) / n
        b_off = tl.where(m_m[:, None], b_r - b_center[None, :], 0.0)
        i_part = (i_b.to(tl.int64) * tiles + i_m) * N + b_n
        tl.store(p_mean + i_part, b_center, mask=m_n)
        tl.store(p_m2 + i_part, tl.sum(b_off * b_off, 0), mask=m_n)


@triton.jit
def product(
    b_acc,
    p_a,
    p_w,
    i_pixel,
    b_m,
    m_m,
    b_n,
    m_n,
    K,
    N,
    TRANSPOSED: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """b_acc + a[pixels, K] times the weight, [N, K], or [K, N] where TRANSPOSED."""
    b_k = tl.arange(0, BLOCK_K)
    p_a += i_pixel * K + b_m[:, None] * K + b_k[None, :]
    if TRANSPOSED:
        p_w += b_k[:, None] * N + b_n[None, :]
    else:
        p_w += b_n[None, :] * K + b_k[:, None]
    for i_k in range(0, K, BLOCK_K):
        if EVEN_K:
            b_a = tl.load(p_a, mask=m_m[:, None], other=0.0)
            b_w = tl.load(p_w, mask=m_n[None, :], other=0.0)
        else:
            m_k = i_k + b_k < K
            b_a = tl.load(p_a, mask=m_m[:, None] & m_k[None, :], other=0.0)
            b_w = tl.load(p_w, mask=m_k[:, None] & m_n[None, :], other=0.0)
        b_acc = tl.dot(b_a, b_w, b_acc, input_precision=PRECISION)
        p_a += BLOCK_K
        p_w += BLOCK_K * N if TRANSPOSED else BLOCK_K
    return b_acc


# ---- kernel ----------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["P", "tiles"])
def pointwise_kernel(
    p_d,
    p_w,
    p_y,
    p_bias,
    p_shift,
    p_residual,
    p_xs,
    p_ws,
    p_mean,
    p_m2,
    P,
    K,
    N,
    KS,
    tiles,
    TRANSPOSED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_SHORTCUT: tl.constexpr,
    STATISTICS: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y = d w + bias + shift + residual + xs ws. Grid: B * tiles * cdiv(N, BLOCK_N), tiles = cdiv(P, BLOCK_M)."""
    blocks_n = tl.cdiv(N, BLOCK_N)
    i_n, i_rest = tl.program_id(0) % blocks_n, tl.program_id(0) // blocks_n
    i_m, i_b = i_rest % tiles, i_rest // tiles
    b_m = tl.arange(0, BLOCK_M)
    m_m = i_m * BLOCK_M + b_m < P
    b_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = b_n < N
    i_pixel = i_b.to(tl.int64) * P + i_m * BLOCK_M
    b_acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    b_acc = product(b_acc, p_d, p_w, i_pixel, b_m, m_m, b_n, m_n, K, N, TRANSPOSED, EVEN_K, BLOCK_K, PRECISION)
    if HAS_SHORTCUT:
        b_acc = product(b_acc, p_xs, p_ws, i_pixel, b_m, m_m, b_n, m_n, KS, N, False, EVEN_K, BLOCK_K, PRECISION)
    finish(
        b_acc, p_y, p_bias, p_shift, p_residual, p_mean, p_m2, i_b, i_m, b_m, m_m, b_n, m_n, P, N, tiles,
        BLOCK_M, HAS_BIAS, HAS_SHIFT, HAS_RESIDUAL, STATISTICS,
    )  # fmt: skip


# ---- launchers -------------------------------------------------------------------------------------------------------

# Widest first: the rule takes the first that fills the GPU.
PRODUCT_CONFIGS = (
    ProductConfig(128, 256, 64, 8, 3),
    ProductConfig(128, 128, 64, 8, 3),
    ProductConfig(64, 128, 64, 4, 4),
    ProductConfig(64, 64, 64, 4, 4),
)
# fp32 products in full precision run on the ordinary units, whose accumulators take more registers.
PRODUCT_CONFIGS_FP32 = (ProductConfig(32, 64, 16, 4, 2),)
PRODUCT_CONFIGS_TF32 = (ProductConfig(128, 128, 32, 8, 3), ProductConfig(64, 64, 32, 4, 3))
# Channels that are no whole vectors are loaded one by one, each with an address and a mask.
RAGGED = ProductConfig(32, 32, 32, 4, 2)
# AMD has 64 KiB of shared memory.
PRODUCT_CONFIGS_HIP = (ProductConfig(128, 128, 64, 8, 2), ProductConfig(64, 64, 64, 4, 2))


def only(config: ProductConfig) -> int:
    """The compute capability, times 10, on which alone a config is launched, or 0. The widest accumulators leave no
    registers for operands, which earlier GPUs than Hopper hold there, nor for their own copies, as later ones do."""
    return 90 if config.block_n > 128 else 0


def product_configs(
    dtype: torch.dtype, precision: str, nvidia: bool, capability: int, simple: bool, whole: bool
) -> tuple[ProductConfig, ...]:
    """The product's candidates, widest first; ``simple``: see :func:`is_simple`; ``whole``: channels are multiples of
    16."""
    if not whole:
        return (RAGGED,)
    if dtype == torch.float32:
        return PRODUCT_CONFIGS_TF32 if precision == "tf32" else PRODUCT_CONFIGS_FP32
    if not nvidia:
        return PRODUCT_CONFIGS_HIP
    return tuple(c for c in PRODUCT_CONFIGS if only(c) in (0, capability) and (simple or c.block_n <= 128))


def dividing(configs: Sequence[ProductConfig], *inputs: int) -> tuple[ProductConfig, ...]:
    """The same with steps of 32 inputs where 32 divides the inputs and 64 does not, as of the decoder's 160 and 480
    channels: a last step that is half empty costs masks in all of them."""
    if all(count % 64 == 0 for count in inputs) or any(count % 32 for count in inputs):
        return tuple(configs)
    halved = (c._replace(block_k=32, num_stages=c.num_stages + 1) if c.block_k == 64 else c for c in configs)
    return tuple(dict.fromkeys(halved))


def is_simple(ending: Epilogue) -> bool:
    """Whether the widest accumulators leave registers enough: for one thing to add, not for a second product."""
    return ending.extras() <= 1 and ending.shortcut is None


def are_whole(*channels: int) -> bool:
    return all(count % 16 == 0 for count in channels)


def filling(
    configs: tuple[ProductConfig, ...], samples: int, pixels: int, outputs: int, processors: int
) -> ProductConfig:
    """The first config with a program for every multiprocessor and no tile half empty; else the last."""
    for config in configs:
        programs = samples * common.cdiv(pixels, config.block_m) * common.cdiv(outputs, config.block_n)
        if programs >= processors and config.block_n <= common.pow2(outputs):
            return config
    return configs[-1]


def new_moments(y: Tensor, chunk: int) -> Moments:
    """Uninitialised moments of ``y``."""
    tiles = common.cdiv(y.shape[2] * y.shape[3], chunk)
    return Moments(torch.empty((2, y.shape[0], tiles, y.shape[1]), dtype=torch.float32, device=y.device), chunk)


def launch_product(
    d: Tensor,
    weight: Tensor,
    y: Tensor,
    transposed: bool,
    ending: Epilogue,
    config: ProductConfig,
    precision: str | None = None,
) -> None:
    """One product; ``precision`` is a convolution's where it is None."""
    batch, inputs, height, width = d.shape
    outputs, pixels = y.shape[1], height * width
    block_m, block_n, block_k, warps, stages = config
    tiles = common.cdiv(pixels, block_m)
    pointwise_kernel[(batch * tiles * common.cdiv(outputs, block_n),)](
        d, weight, y, *ending.tensors(y), pixels, inputs, outputs, ending.inputs(), tiles,
        TRANSPOSED=transposed, **ending.flags(), EVEN_K=inputs % block_k == 0 and ending.inputs() % block_k == 0,
        PRECISION=precision or common.precision(d.dtype), BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip


def product_config(
    d: Tensor,
    weight: Tensor,
    y: Tensor,
    transposed: bool,
    ending: Epilogue,
    statistics: bool,
    precision: str | None = None,
) -> ProductConfig:
    """The config for products of ``d``'s samples at a time; ``precision`` as in :func:`launch_product`."""
    batch, inputs, height, width = d.shape
    outputs, precision = y.shape[1], precision or common.precision(d.dtype)
    nvidia, whole = torch.version.hip is None, are_whole(inputs, outputs, ending.inputs())
    listed = product_configs(d.dtype, precision, nvidia, common.capability(d), is_simple(ending), whole)
    # The decoder's products have nothing behind them; inputs of the large denoisers' are multiples of 64.
    bare = ending.extras() == 0 and not statistics
    configs = dividing(listed, inputs) if bare else listed
    key = (
        str(d.dtype),
        precision,
        batch,
        height * width,
        inputs,
        outputs,
        transposed,
        statistics,
        ending.inputs(),
        ending.extras(),
    )

    def launch(config: ProductConfig) -> None:
        moments = new_moments(y, config.block_m) if statistics else None
        launch_product(d, weight, y, transposed, ending.telling(moments), config, precision)

    default = filling(configs, batch, height * width, outputs, common.processors(d))
    return tuning.choose("pointwise", key, configs, default, launch)


def pointwise(
    d: Tensor,
    weight: Tensor,
    *,
    transposed: bool = False,
    bias: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    shortcut: Pair | None = None,
    out: Tensor | None = None,
    precision: str | None = None,
) -> Tensor:
    """The product of every pixel's channels with ``weight`` [O, C, 1, 1], or with its transpose, and what follows.

    ``d`` [B, C, H, W] channels_last -> [B, O, H, W] channels_last; transposed: C and O the other way round.
    ``precision``: ``input_precision`` of the product; None: a convolution's.
    """
    outputs = weight.shape[1 if transposed else 0]
    y = common.new_channels_last(d, d.shape[0], outputs, *d.shape[2:]) if out is None else out
    ending = Epilogue(bias, shift, residual, shortcut)
    config = product_config(d, weight, y, transposed, ending, False, precision)
    launch_product(d, weight, y, transposed, ending, config, precision)
    return y


ENDINGS = (
    {"HAS_BIAS": False, "HAS_SHIFT": True, "HAS_RESIDUAL": False, "HAS_SHORTCUT": False, "STATISTICS": True},
    {"HAS_BIAS": False, "HAS_SHIFT": False, "HAS_RESIDUAL": True, "HAS_SHORTCUT": False, "STATISTICS": False},
    {"HAS_BIAS": True, "HAS_SHIFT": False, "HAS_RESIDUAL": False, "HAS_SHORTCUT": True, "STATISTICS": False},
    {"HAS_BIAS": False, "HAS_SHIFT": False, "HAS_RESIDUAL": False, "HAS_SHORTCUT": False, "STATISTICS": False},
    {"HAS_BIAS": True, "HAS_SHIFT": True, "HAS_RESIDUAL": True, "HAS_SHORTCUT": False, "STATISTICS": False},
)
IMAGES = ("p_d", "p_y", "p_w", "p_bias", "p_shift", "p_residual", "p_xs", "p_ws")


_HALVES = 160  # channels that steps of 32 divide, and steps of 64 do not


def precisions(dtype: torch.dtype, nvidia: bool) -> tuple[str, ...]:
    """What :func:`common.precision` may give."""
    return ("ieee", "tf32") if dtype == torch.float32 and nvidia else ("ieee",)


def variants() -> list[tuple[dict[str, bool], bool, bool]]:
    """Endings; whether they are simple (:func:`is_simple`); whether channels are whole vectors and blocks."""
    simple = [not (e["HAS_SHORTCUT"] or sum(e.values()) > 2) for e in ENDINGS]
    whole = [(ending, plain, True) for ending, plain in zip(ENDINGS, simple, strict=True)]
    return whole + [(ending, plain, False) for ending, plain, _ in whole]


def builds(dtype: torch.dtype, nvidia: bool) -> list[Build]:
    """The kernel in every config that the launchers may choose: the block's two halves, its shortcut, a backward."""
    found: list[Build] = []
    for ending, simple, whole in variants():
        for precision in precisions(dtype, nvidia):
            bare = not any(ending.values())
            listed = product_configs(dtype, precision, nvidia, 90, simple, whole)
            # The decoder's products have nothing behind them.
            for config in dict.fromkeys((*listed, *dividing(listed, _HALVES))) if bare and whole else listed:
                flags: dict[str, Any] = {**ending, "EVEN_K": whole, "PRECISION": precision}
                flags |= {"products": dtype != torch.float32 or precision == "tf32", "only": only(config)}
                sizes = ("K", "N", "KS") if whole else ()
                for transposed in (True, False) if bare and whole else (bare,):
                    flags["TRANSPOSED"] = transposed
                    found.append(common.build(pointwise_kernel, dtype, IMAGES, config, sizes, **flags))
    return found
