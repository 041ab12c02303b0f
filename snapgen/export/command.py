"""`snapgen export coreml`: a checkpoint, or a preset with random weights, to packages under a progress bar."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from snapgen.config import get_preset
from snapgen.decoder import TinyDecoder
from snapgen.export import inspect, parity
from snapgen.export.compress import summary as compression_summary
from snapgen.export.coreml import descriptions, export_pipeline
from snapgen.export.options import DEFAULTS, Options
from snapgen.export.tools import coremltools
from snapgen.pipeline import SnapGenPipeline, load
from snapgen.sampler import make_scheduler
from snapgen.text import CLIP_TOKENS
from snapgen.unet import SnapGenUNet

SEED = 0  # of the weights where there is no checkpoint


def main_coreml(
    checkpoint: str | None, out: Path, options: Options = DEFAULTS, preset: str | None = None, console: Any = None
) -> dict[str, Any]:
    """`snapgen export coreml`: load a checkpoint, export it under a progress bar, and print what is in the packages.

    Args:
        checkpoint: a folder, or the name of a shipped checkpoint ("tiny"); None for weights drawn at random.
        out: folder for the packages.
        options: what to export, and for what.
        preset: of the denoiser and decoder; with a checkpoint, the one that it must be of.
        console: a rich console; by default standard output.

    Returns:
        The report of `export_pipeline`.

    Raises:
        ValueError: neither checkpoint nor preset is given, or the checkpoint is of another preset.
        ExportError: see `export_pipeline`.
    """
    coremltools()  # fail before the work if it is missing
    console = console or Console()
    if checkpoint is None:
        if preset is None:
            raise ValueError("checkpoint: none given; name one, or a preset to export with random weights")
        pipe, tokens = seeded_pipeline(preset)
        options = replace(options, tokens=options.tokens or tokens)
        console.print(f"[yellow]note:[/] {preset} with random weights, seed {SEED}: for sizes and speed, not pictures")
    else:
        pipe = load(checkpoint)
        if preset is not None:
            _check_preset(pipe, preset)
    columns = (BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=1.0)

        def tell(message: str, share: float) -> None:
            bar.update(task, description=message, completed=share)

        report = export_pipeline(pipe, out, options, progress=tell)
    inspect.report(descriptions(report), console)
    for name, entry in report["parts"].items():
        if "compression" in entry:
            console.print(f"compressed: {compression_summary(name, entry['compression'])}", highlight=False)
    console.print(f"against PyTorch in fp32: {parity.summary(report['parts'])}", highlight=False)
    told = f"wrote {out}; look into it with: snapgen export audit {out}"
    console.print(escape(told), highlight=False, soft_wrap=True)
    return report


def seeded_pipeline(name: str) -> tuple[SnapGenPipeline, int]:
    """Denoiser and decoder of a preset with random weights, without text encoders; and the length of its context."""
    preset = get_preset(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        denoiser, decoder = SnapGenUNet(**preset.denoiser).eval(), TinyDecoder(**preset.decoder).eval()
    encoders = preset.text.get("encoders", ())
    clip = CLIP_TOKENS if any(encoder.startswith("clip") for encoder in encoders) else 0
    other = preset.text["max_tokens"] if "gemma-2" in encoders or not encoders else 0
    return SnapGenPipeline(denoiser, decoder, make_scheduler(preset.shift)), clip + other


def _check_preset(pipe: Any, name: str) -> None:
    """Refuse a checkpoint whose denoiser or decoder is not the preset's."""
    preset = get_preset(name)
    for part, wanted in (("denoiser", preset.denoiser), ("decoder", preset.decoder)):
        config = getattr(pipe, part).config
        for key, value in wanted.items():
            found = tuple(config[key]) if isinstance(value, tuple) else config[key]
            if found != value:
                raise ValueError(f"preset: the checkpoint is not {name}: its {part} has {key}={found}, not {value}")
