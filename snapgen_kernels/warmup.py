"""Everything that happens on first use, at a time of the caller's choosing."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from snapgen_kernels import _backend

if TYPE_CHECKING:
    from snapgen_kernels.testing import Case

Shapes = Mapping[str, Sequence[Mapping[str, int]]]

END = "norm_silu_conv"
_END_SIZES = ("B", "C", "M", "H", "W", "G", "O")
_MODEL_END = {"B": 1, "C": 128, "M": 384, "H": 1024, "W": 1024, "G": 32, "O": 3}
_SMALL_END = {"B": 1, "C": 16, "M": 32, "H": 8, "W": 8, "G": 4, "O": 3}


def warmup(
    shapes: Shapes | None = None,
    *,
    device: torch.device | str = "cpu",
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16),
    backward: bool = True,
    progress: bool = True,
    tune: bool = False,
) -> int:
    """Load and compile the fused kernels, so that the first real call does not wait; optionally measure which of their
    configs is the fastest for these shapes.

    Nothing else in the package measures: without ``tune``, here or earlier on this machine, configs are chosen by rule.
    What is measured is kept in memory and in the folder ``SNAPGEN_CACHE`` (default ``~/.cache/snapgen``), one file for
    each model of GPU, release of Triton and version of the kernels. Other processes that start later find it there.

    Args:
        shapes: op name -> sizes of each call, by the names that ``snapgen_kernels.testing`` uses (for group_norm_silu:
            B, C, H, W, G). ``snapgen_kernels.testing.model_shapes()`` has those of the model's registered ops. Under
            norm_silu_conv stand decoders' ends: the last block (B, C, M, H, W, G), which tells the norm after it its
            statistics, and the layer behind it, of G groups and O outputs. None: with ``tune`` the model's; else the
            small test shapes of every op, which loads everything and compiles every kind of kernel once.
        device: where the kernels will run.
        dtypes: dtypes to compile for.
        backward: also the backward kernels.
        progress: a line on stderr that counts up and names the call.
        tune: measure the configs of each kernel, also where that was done before. Every call is compiled and timed once
            per config, so this takes minutes for the model's shapes; the GPU should have nothing else to do.

    Returns:
        How many calls were made; 0 where no op has a usable fused kernel on the device.

    Raises:
        ValueError: an op is unknown, or ``tune`` on a device where no Triton kernel runs.
        RuntimeError: no config of some kernel fits the GPU.
    """
    from snapgen_kernels.testing import SPECS

    for op in shapes or {}:
        if op not in SPECS and op != END:
            raise ValueError(f"warmup: unknown op {op!r}; allowed: {', '.join((*SPECS, END))}")
    device = torch.device(device)
    reason = _untunable(device) if tune else None
    if reason is not None:
        raise ValueError(f"warmup: tune is True and device is {str(device)!r}: {reason}")
    cases: list[Case | _End] = [*_cases(shapes, device, dtypes, tune), *_ends(shapes, device, dtypes, tune)]
    with contextlib.ExitStack() as stack:
        if cases and device.type == "cuda":  # Triton launches on the current device
            stack.enter_context(torch.cuda.device(device))
        if tune:
            from snapgen_kernels._triton.tuning import tuning

            stack.enter_context(tuning())
        for index, case in enumerate(cases):
            if progress:
                _show(f"{'tuning' if tune else 'warming up'} {index + 1}/{len(cases)} {_label(case)}")
            if isinstance(case, _End):
                case.call(device)
            else:
                _call(case, device, backward)
    if progress and cases:
        print(file=sys.stderr)
    return len(cases)


def _untunable(device: torch.device) -> str | None:
    """None if there are configs to measure on ``device``, else why not."""
    if device.type != "cuda":
        return "only Triton kernels have configs to measure, and they run on 'cuda'"
    if (reason := _backend.triton_reason()) is not None:
        return reason
    return None if torch.cuda.is_available() else "torch sees no CUDA or ROCm device"


def _cases(shapes: Shapes | None, device: torch.device, dtypes: Sequence[torch.dtype], tune: bool) -> list[Case]:
    """One case per op with a kernel on ``device``, distinct sizes and dtype."""
    from snapgen_kernels.testing import SPECS, Case, model_shapes, small_cases

    if shapes is None:
        shapes = model_shapes() if tune else {op: [case.dims for case in small_cases(op)] for op in SPECS}
    cases: list[Case] = []
    for op in SPECS:
        if _backend.missing_kernel(op, device.type) is not None:
            continue
        unique = {tuple(sorted(dims.items())): dims for dims in shapes.get(op, [])}
        cases += [Case(op, "warmup", dims, dtype) for dims in unique.values() for dtype in dtypes]
    return cases


class _End(NamedTuple):
    """A decoder's end: its last block, and the layer behind it."""

    dims: Mapping[str, int]
    dtype: torch.dtype
    op: str = END

    def call(self, device: torch.device) -> None:
        from snapgen_kernels.decoder_block import DecoderBlock
        from snapgen_kernels.decoding import apply_block, norm_silu_conv
        from snapgen_kernels.group_norm_silu import Norm

        batch, channels, middle, height, width, groups, outputs = (self.dims[name] for name in _END_SIZES)
        with torch.random.fork_rng(devices=()):  # a program's own random numbers stay what they are
            block = DecoderBlock(channels, expansion=middle // channels, num_groups=groups).to(device, self.dtype)
        x = torch.ones(batch, channels, height, width, device=device, dtype=self.dtype)
        norm = Norm(groups, block.norm.weight[:channels], block.norm.bias[:channels], 1e-6)
        y, statistics = apply_block(block, x.contiguous(memory_format=torch.channels_last), next_norm=norm)
        weight = torch.ones(outputs, channels, 3, 3, device=device, dtype=self.dtype)
        norm_silu_conv(y, norm, weight, weight[:, 0, 0, 0].contiguous(), statistics=statistics)


def _ends(shapes: Shapes | None, device: torch.device, dtypes: Sequence[torch.dtype], tune: bool) -> list[_End]:
    if _backend.missing_kernel(END, device.type) is not None:
        return []
    for dims in (shapes or {}).get(END, []):
        if missing := [name for name in _END_SIZES if name not in dims]:
            raise ValueError(f"warmup: {END}: no size {', '.join(missing)}; needs {', '.join(_END_SIZES)}")
        if dims["M"] % dims["C"]:
            raise ValueError(f"warmup: {END}: M is {dims['M']}; it must be a multiple of C, {dims['C']}")
    some = shapes.get(END, []) if shapes is not None else [_MODEL_END if tune else _SMALL_END]
    return [_End(dims, dtype) for dims in some for dtype in dtypes]


def _call(case: Case, device: torch.device, backward: bool) -> None:
    from snapgen_kernels import checks

    inputs = case.inputs(device, requires_grad=backward)
    if backward:
        checks.run(case, case.spec.registered, inputs)
    if not backward or "keep" in inputs:  # a call without gradients keeps nothing, which is another kernel
        with torch.no_grad():
            case.spec.registered({**inputs, "keep": False} if "keep" in inputs else inputs)


def _label(case: Case | _End) -> str:
    sizes = " ".join(f"{name}={size}" for name, size in case.dims.items())
    return f"{case.op} {str(case.dtype).removeprefix('torch.')} {sizes}"


def _show(text: str) -> None:
    """Write over the line on stderr (ESC [K clears what a longer one left)."""
    print(f"\rsnapgen_kernels: {text}\x1b[K", end="", file=sys.stderr, flush=True)
