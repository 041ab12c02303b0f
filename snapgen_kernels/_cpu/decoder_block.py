"""Launcher of the decoder block's CPU kernels: two sweeps over the image, see csrc/decoder_block.h."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


from snapgen_kernels._cpu import packed
from snapgen_kernels._library import like
from snapgen_kernels.decoder_block import new_outputs

_cpu = torch.ops.snapgen_cpu
Progress = Callable[[float], None]
Moments = tuple[Tensor, Tensor]


def _dense(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _image(x: Tensor, channels: int, rows: int) -> Tensor:
    shape = (x.shape[0], channels, rows, x.shape[3])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _parts(tasks: int, progress: Progress | None) -> list[tuple[int, int]]:
    """Ranges of tasks: all at once, or in eighths so that progress can be told."""
    parts = 1 if progress is None else min(8, max(tasks, 1))
    return [(tasks * part // parts, tasks * (part + 1) // parts) for part in range(parts)]


def run(
    x: Tensor,
    dw1_weight: Tensor,
    dw1_bias: Tensor,
    pw1_weight: Tensor,
    dw2_weight: Tensor,
    dw2_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    pw2_weight: Tensor,
    num_groups: int,
    eps: float,
    *,
    out: Tensor,
    kept: float = 1.0,
    next_norm: tuple[int, float] | None = None,
    progress: Progress | None = None,
) -> tuple[Tensor, Tensor, Tensor, Moments | None]:
    """The block from a dense channels_last ``x`` into ``out``, which may be ``x``.

    Args:
        kept: share of the middle image's rows that the first sweep stores for the second, which computes the others
            anew: 0 to 1.
        next_norm: (groups, eps) of a norm on y, whose statistics are wanted.
        progress: called with the share of the work that is done.

    Returns:
        mean and rstd [B, G] of the middle image, the middle image where all of it was kept (else a part of it), and
        mean and rstd of y where ``next_norm`` asks for them.
    """
    batch, channels, height, _ = x.shape
    middle = dw2_bias.shape[0]
    tasks, bands = _cpu.decoder_block_tasks(x, middle), _cpu.decoder_block_bands(x, middle)
    kept_bands = round(kept * bands)
    rows = height if kept_bands == bands else kept_bands * _cpu.decoder_block_band_rows(x, middle)
    mean = x.new_empty((batch, num_groups), dtype=torch.float32)
    rstd = torch.empty_like(mean)
    first = (dw1_weight, dw1_bias, packed(pw1_weight, "b"), dw2_weight, dw2_bias)
    h = _image(x, middle, rows)
    moments = x.new_empty((tasks, num_groups, 2), dtype=torch.float64)
    parts = _parts(tasks, progress)
    for index, (begin, end) in enumerate(parts):
        _cpu.decoder_block_statistics(x, *first, num_groups, kept_bands, begin, end, h, moments)
        if progress is not None:
            progress((index + 1) / (2 * len(parts)))
    _cpu.decoder_block_merge(x, middle, middle, moments, eps, mean, rstd)

    over = out.data_ptr() == x.data_ptr() and kept_bands < bands
    frames = x.new_empty(_cpu.decoder_block_frame(x, middle) if over else 0)
    if over:
        _cpu.decoder_block_frames(x, middle, kept_bands, frames)
    out_groups, out_eps = (0, 0.0) if next_norm is None else next_norm
    out_moments = x.new_empty((tasks, out_groups, 2), dtype=torch.float64)
    norm = (norm_weight, norm_bias, packed(pw2_weight, "b"), mean, rstd, num_groups)
    for index, (begin, end) in enumerate(parts):
        _cpu.decoder_block_finish(
            x, *first, *norm, h, kept_bands, frames, out_groups, begin, end, out, out_moments
        )
        if progress is not None:
            progress((len(parts) + index + 1) / (2 * len(parts)))
    if next_norm is None:
        return mean, rstd, h, None
    out_mean = x.new_empty((batch, out_groups), dtype=torch.float32)
    out_rstd = torch.empty_like(out_mean)
    _cpu.decoder_block_merge(out, middle, channels, out_moments, out_eps, out_mean, out_rstd)
    return mean, rstd, h, (out_mean, out_rstd)


def forward(
    x: Tensor,
    dw1_weight: Tensor,
    dw1_bias: Tensor,
    pw1_weight: Tensor,
    dw2_weight: Tensor,
    dw2_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    pw2_weight: Tensor,
    num_groups: int,
    eps: float,
    low_memory: bool,
    keep_middle: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op: y, the middle image (empty unless kept), mean and rstd."""
    weights = (dw1_weight, dw1_bias, pw1_weight, dw2_weight, dw2_bias, norm_weight, norm_bias, pw2_weight)
    y, h, mean, rstd = new_outputs(x, dw2_bias.shape[0], num_groups, keep_middle)
    if x.numel() == 0:
        return y, h, mean.fill_(torch.nan), rstd.fill_(torch.nan)
    dense = _dense(x)
    out = y if y.is_contiguous(memory_format=torch.channels_last) else torch.empty_like(dense)
    kept = 1.0 if keep_middle else 0.0 if low_memory else kept_share(x)
    mean, rstd, middle, _ = run(dense, *weights, num_groups, eps, out=out, kept=kept)
    if keep_middle:
        h = like(middle, h)
    return (y if out is y else y.copy_(out)), h, mean, rstd


def kept_share(x: Tensor) -> float:
    """The share of the middle image that is fastest to keep rather than to compute twice."""
    return 1.0
