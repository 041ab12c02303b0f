"""Launcher of the decoder block's CPU kernels: two sweeps over the image, see csrc/decoder_block.h."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from snapgen_kernels._cpu import packed
from snapgen_kernels._cpu.sepconv import group_statistics
from snapgen_kernels._cpu.sepconv_backward import depthwise, gradients, pointwise, pointwise_weight, rows_of, separable
from snapgen_kernels._library import like
from snapgen_kernels.decoder_block import Weights, new_outputs
from snapgen_kernels.group_norm_silu import Norm

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
    w: Weights,
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
    middle = w.dw2_bias.shape[0]
    tasks, bands = _cpu.decoder_block_tasks(x, middle), _cpu.decoder_block_bands(x, middle)
    kept_bands = int(kept * bands)
    rows = height if kept_bands == bands else kept_bands * _cpu.decoder_block_band_rows(x, middle)
    mean = x.new_empty((batch, num_groups), dtype=torch.float32)
    rstd = torch.empty_like(mean)
    first = (w.dw1_weight, w.dw1_bias, packed(w.pw1_weight, "b"), w.dw2_weight, w.dw2_bias)
    h = _image(x, middle, rows)
    _cpu.huge_pages(h)
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
    norm = (w.norm_weight, w.norm_bias, packed(w.pw2_weight, "b"), mean, rstd, num_groups)
    for index, (begin, end) in enumerate(parts):
        _cpu.decoder_block_finish(x, *first, *norm, h, kept_bands, frames, out_groups, begin, end, out, out_moments)
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
    w = Weights(dw1_weight, dw1_bias, pw1_weight, dw2_weight, dw2_bias, norm_weight, norm_bias, pw2_weight)
    y, h, mean, rstd = new_outputs(x, dw2_bias.shape[0], num_groups, keep_middle)
    if x.numel() == 0:
        return y, h, mean.fill_(torch.nan), rstd.fill_(torch.nan)
    dense = _dense(x)
    out = y if y.is_contiguous(memory_format=torch.channels_last) else torch.empty_like(dense)
    kept = 0.0 if low_memory and not keep_middle else 1.0
    mean, rstd, middle, _ = run(dense, w, num_groups, eps, out=out, kept=kept)
    if keep_middle:
        h = like(middle, h)
    return (y if out is y else y.copy_(out)), h, mean, rstd


def inplace(
    x: Tensor,
    w: Weights,
    num_groups: int,
    eps: float,
    memory: int | None,
    next_norm: tuple[int, float] | None,
    progress: Progress | None,
) -> tuple[Tensor, Moments | None]:
    """The block in x's memory (or in that of a dense copy): y, and its statistics if ``next_norm`` asks for them."""
    if x.numel() == 0:
        return x, None
    y = _dense(x)
    kept = 1.0
    if memory is not None:
        middle = w.dw2_bias.shape[0]
        whole = middle * y.shape[0] * y.shape[2] * y.shape[3] * y.element_size()
        if whole > memory:
            frames = _cpu.decoder_block_frame(y, middle) * y.element_size()
            kept = max(0.0, (memory - frames) / whole)
    *_, found = run(y, w, num_groups, eps, out=y, kept=kept, next_norm=next_norm, progress=progress)
    return y, found


def norm_conv(x: Tensor, norm: Norm, weight: Tensor, bias: Tensor, statistics: Moments | None) -> Tensor:
    """``snapgen_kernels.decoding.norm_silu_conv``."""
    x = _dense(x)
    out = _image(x, weight.shape[0], x.shape[2])
    if out.numel() == 0:
        return out
    mean, rstd = statistics or group_statistics(x, norm.num_groups, norm.eps)
    # B of one product for all taps: [C, 9 O], tap by tap.
    taps = _cpu.pack(weight.permute(2, 3, 0, 1).flatten(0, 2).t())
    _cpu.norm_conv(x, norm.weight, norm.bias, mean, rstd, norm.num_groups, taps, bias, out)
    return out


def backward(
    dy: Tensor,
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
    y_middle: Tensor,
    mean: Tensor,
    rstd: Tensor,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    """``snapgen::decoder_block_backward``: the middle image is there or computed again; what is before it always is."""
    arguments = (x, dw1_weight, dw1_bias, pw1_weight, dw2_weight, dw2_bias, norm_weight, norm_bias, pw2_weight)
    if x.numel() == 0:
        return gradients([None] * len(arguments), arguments, needs, dy)
    in_x, in_dw1, in_b1, in_pw1, in_dw2, in_b2, in_nw, in_nb, in_pw2 = needs
    before_middle = in_x or in_dw1 or in_b1 or in_pw1
    before_norm = before_middle or in_dw2 or in_b2
    dy_rows, x_rows = rows_of(dy), rows_of(x)

    # m = PW1(DW1(x)), the middle image h = DW2(m), a = SiLU(GN(h)).
    recompute = not keep_middle and (before_norm or in_nw or in_nb or in_pw2)
    m = None
    if recompute or in_dw2:
        d1 = depthwise(None, x_rows, dw1_weight, dw1_bias, d=True, needs=[False] * 5).d
        assert d1 is not None
        m = d1.new_empty((*d1.shape[:3], pw1_weight.shape[0]))
        _cpu.product(d1.flatten(0, 2), packed(pw1_weight, "b"), m.view(-1, m.shape[3]))
        del d1
    if recompute:
        assert m is not None
        again = depthwise(None, m, dw2_weight, dw2_bias, d=True, needs=[False] * 5).d
        assert again is not None
        h = again.permute(0, 3, 1, 2)
        del again
    else:
        h = y_middle
    dpw2 = dnw = dnb = dh = None
    if in_pw2:
        a = torch.ops.snapgen.group_norm_silu(h, num_groups, norm_weight, norm_bias, eps)[0]
        dpw2 = pointwise_weight(dy_rows, rows_of(a), pw2_weight)
        del a
    if before_norm or in_nw or in_nb:
        da = pointwise(dy_rows, pw2_weight, needs=(True, False, False)).d
        assert da is not None
        dh, dnw, dnb = torch.ops.snapgen.group_norm_silu_backward(
            da.permute(0, 3, 1, 2), h, num_groups, norm_weight, norm_bias, eps, mean, rstd, [before_norm, in_nw, in_nb]
        )
        del da
    del h
    inner = outer = None
    if before_norm:
        assert dh is not None
        dh = rows_of(dh)
        # Without the weight's gradient the values of m are not read, only its shape.
        needed = [before_middle, in_dw2, in_b2, False, False]
        inner = depthwise(dh, dh if m is None else m, dw2_weight, dw2_bias, needs=needed)
    del dh, m
    if before_middle:
        assert inner is not None and inner.x is not None
        outer = separable(
            inner.x,
            x_rows,
            dw1_weight,
            pw1_weight,
            dw1_bias,
            extra=dy_rows if in_x else None,
            needs=(in_x, in_dw1, in_pw1, in_b1, False, False, False, False),
        )
    found = (
        None if outer is None or outer.x is None else outer.x.permute(0, 3, 1, 2),
        outer and outer.dw_weight,
        outer and outer.dw_bias,
        outer and outer.pw_weight,
        inner and inner.weight,
        inner and inner.bias,
        dnw,
        dnb,
        dpw2,
    )
    return gradients(found, arguments, needs, dy)
