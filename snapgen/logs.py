"""What a run reports: a progress line, TensorBoard, Weights & Biases."""

from __future__ import annotations

import resource
import secrets
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from snapgen import io

# Dense bf16 products of GPUs, FLOP/s, by their makers' data sheets.
PEAKS = {
    "H100": 989e12,
    "H200": 989e12,
    "H800": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "B200": 2250e12,
    "L40S": 362e12,
}


class Journal:
    """Where figures go: the progress line, a TensorBoard folder, and a Weights & Biases project if one is named."""

    def __init__(
        self, out: Path, config: Mapping[str, Any], show: Any, *, start: int = 0, wandb: str | None = None
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._show = show
        # What a run that was killed wrote after its last checkpoint is written again.
        self._tensorboard = SummaryWriter(str(out / "tensorboard"), purge_step=start + 1)
        self._wandb = _wandb(wandb, out, config) if wandb else None

    def report(self, step: int, means: Mapping[str, float], further: Mapping[str, float], line: str) -> None:
        """Figures of the steps up to `step`; those of `means` and `line` are shown, all are written."""
        shown = "  ".join(f"{name} {value:.4f}" for name, value in means.items())
        self._show(step, f"{shown}  {line}")
        for name, value in {**means, **further}.items():
            self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log({**means, **further}, step=step)

    def picture(self, step: int, path: Path) -> None:
        """A sample grid."""
        import numpy as np
        from PIL import Image

        with Image.open(path) as picture:
            self._tensorboard.add_image("samples", np.asarray(picture.convert("RGB")), step, dataformats="HWC")
            if self._wandb is not None:
                import wandb

                self._wandb.log({"samples": wandb.Image(picture)}, step=step)

    def close(self) -> None:
        self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def _wandb(project: str, out: Path, config: Mapping[str, Any]) -> Any:
    try:
        import wandb
    except ModuleNotFoundError:
        raise ValueError(f"wandb: got {project!r}, but the package wandb is not installed") from None
    # A resumed run goes on in its own page.
    record = out / "wandb.json"
    if not record.is_file():
        io.write_json(record, {"id": secrets.token_hex(8)})
    own, name = io.read_json(record)["id"], out.resolve().name
    return wandb.init(project=project, name=name, id=own, resume="allow", config=dict(config), dir=str(out))


@contextmanager
def progress(console: Console | None, steps: int, start: int) -> Iterator[Any]:
    """A function (step, text) that moves the progress line; a silent one without a console."""
    if console is None:
        yield lambda step, text: None
        return
    columns = (
        TextColumn("{task.completed}/{task.total}"),
        BarColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    if not console.is_terminal:  # a log: a line for every report
        yield lambda step, text: console.print(f"{step}/{steps}  {text}", soft_wrap=True)
        return
    with Progress(*columns, console=console, speed_estimate_period=3600) as bar:
        line = bar.add_task("starting", total=steps, completed=start)
        yield lambda step, text: bar.update(line, completed=step, description=text)


def peak_rate(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s of large products: of a GPU by its data sheet (None if it is not listed), of a CPU as measured now."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = next((rate for key, rate in PEAKS.items() if key in name), None)
        return known if known is None or dtype == torch.bfloat16 else known / 2  # tf32
    a, b = torch.ones(1024, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - start)
    return 2 * 1024**3 / best


def peak_memory(device: torch.device) -> int:
    """Most bytes held so far: the GPU's allocations, or the process's memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
