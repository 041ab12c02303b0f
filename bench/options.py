"""The options of ``python -m bench``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bench.malloc import Malloc


class UsageError(ValueError):
    """An option that cannot be followed; the message names it."""


@dataclass(frozen=True)
class Options:
    """Check the fused ops against fp64, then time them against PyTorch and other runtimes.

    Every case is checked first, and a wrong one stops the run with exit code 1. Providers are timed in turns within one
    run. Whole models have random weights. Modes: fwd (inference), bwd (backward alone, each time after an untimed
    forward of its own, nothing retained) and fwd+bwd (their sum, from the same repetitions). Rows go to a CSV file that
    is only ever added to.
    """

    device: Literal["cpu", "cuda"] = "cpu"
    """Where to run."""
    suite: str = "all"
    """What to run, separated by commas: ops (group_norm_silu, sepconv, resblock, qk_norm_rope, attention, geglu,
    decoder_block), a block of them (transformer_block), whole models (decoder, denoiser, picture, train), or ops,
    models, all; readme: what the README shows. On CUDA three entries, each alone, stand for more, at the sizes that
    have goals: resblock for what the block is made of (group_norm_silu, sepconv, resblock), attention for the
    transformer's ops and block (qk_norm_rope, attention, geglu, transformer_block), model for the whole models."""
    case: str = ""
    """Only cases whose name contains this, such as 256ch."""
    dtype: str = ""
    """fp32, bf16, fp16, separated by commas (default: fp32,bf16 on the CPU, bf16 on CUDA)."""
    mode: str = "fwd,train"
    """fwd, train (gives the rows bwd and fwd+bwd; of the model case train: step, with the optimizer), or both."""
    providers: str = ""
    """fused, fused-compile (whole models inside torch.compile), fused-low (the decoder in low memory), eager,
    eager-nchw, compile, compile-max, sdpa, flex, liger, openvino, onnxruntime, separated by commas (default: all that
    are installed and fit the device; with --quick: fused, eager, eager-nchw)."""
    quick: bool = False
    """Under a minute: few cases, only ops that have a kernel here, no torch.compile; saves rows only with --out."""
    small: bool = False
    """The tests' small cases instead of the model's shapes: to try the benchmark itself; saves rows only with --out."""
    threads: int | None = None
    """CPU threads (default: PyTorch's choice)."""
    malloc: Malloc = "tuned"
    """tuned starts Python anew with glibc's malloc told to keep its pages, for all providers alike; stock leaves it as
    a user meets it."""
    seconds: float | None = None
    """Time to spend on each case and mode, over all providers, after warm-up (default: 4; 0.6 with --quick)."""
    minutes: float | None = None
    """Minutes after which no case begins, nor before it a compiler that is expected to take longer. What is left out is
    listed, and --case takes it alone (default: 9 for --device cuda --suite model, 40 seconds with --quick, else
    none)."""
    out: Path | None = None
    """CSV file to append to (default: bench/results/<machine>.csv)."""
    json: Path | None = None
    """Also write rows, limits and what is missing as JSON."""
    plot: Path | None = None
    """Also draw the speed-ups and the roofline of this run (.png or .svg)."""
    tune: bool = False
    """Before anything is timed, choose the kernels' configs for these cases by timing them (CUDA; kept on disk)."""
    commit: str = ""
    """Commit to record where git cannot tell."""
    dry_run: bool = False
    """Print the plan with its FLOPs, bytes and floors, on CUDA also kernel by kernel, and run nothing; needs no
    device."""


def listed(option: str, value: str, allowed: tuple[str, ...]) -> tuple[str, ...]:
    """The entries of a comma-separated option, each one of ``allowed``.

    Raises:
        UsageError: an entry is not allowed, or there is none.
    """
    entries = tuple(entry.strip() for entry in value.split(",") if entry.strip())
    wrong = [entry for entry in entries if entry not in allowed]
    if wrong or not entries:
        given = ", ".join(map(repr, wrong)) or "empty"
        raise UsageError(f"--{option} is {given}; allowed: {', '.join(allowed)}")
    return tuple(dict.fromkeys(entries))
