"""The training loop: one for every task, resumed by running the same command again.

A run is a function of its configuration and the step count: batches, noise and dropout of step n depend on (seed, n)
alone, so a run that was interrupted anywhere and resumed has, on a CPU, bitwise the weights of one left alone.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from snapgen import io, seeds
from snapgen.data.loader import batches
from snapgen.tasks import Task


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train. What decides the weights is saved with the run and may not differ when it is resumed."""

    steps: int = 10_000
    """Optimizer steps in all."""
    batch_size: int = 64
    """Pictures per forward pass; times `accumulate` per optimizer step."""
    accumulate: int = 1
    """Forward passes per optimizer step."""
    lr: float = 1e-3
    """Peak learning rate."""
    warmup: int = 200
    """Steps of linear warm-up."""
    cooldown: float = 0.25
    """Share of all steps, at the end, over which the learning rate falls linearly to zero."""
    weight_decay: float = 0.01
    """AdamW's decoupled weight decay."""
    betas: tuple[float, float] = (0.9, 0.99)
    """AdamW's moments."""
    grad_clip: float = 1.0
    """Largest norm of the gradient."""
    ema: float = 0.999
    """Decay of the averaged weights, which are what is exported."""
    dtype: str = "fp32"
    """Arithmetic: fp32, or bf16 (autocast; weights and optimizer stay fp32)."""
    seed: int = 0
    """Decides data order, noise and initial weights."""
    save_every: int = 500
    """Steps between checkpoints."""
    sample_every: int = 1000
    """Steps between sample grids."""
    log_every: int = 20
    """Steps between figures in the progress line and in TensorBoard."""
    keep: int = 2
    """Checkpoints to keep."""
    workers: int = 0
    """Processes that read data; 0 reads in this one."""
    compile: bool = False
    """torch.compile the trained modules."""
    export_dtype: str = "fp32"
    """What the exported weights are stored in: fp32, or fp16 at half the size. They load as fp32 either way."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "save_every", "sample_every", "log_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}; must be at least 1")
        if self.dtype not in ("fp32", "bf16"):
            raise ValueError(f"dtype: got {self.dtype!r}; allowed are fp32 and bf16")
        if self.export_dtype not in ("fp32", "fp16"):
            raise ValueError(f"export_dtype: got {self.export_dtype!r}; allowed are fp32 and fp16")
        if not 0 <= self.cooldown <= 1:
            raise ValueError(f"cooldown: got {self.cooldown}; must lie in [0, 1]")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema: got {self.ema}; must lie in [0, 1)")


# These may change between a run and its resumption without changing the weights.
_FREE = {"save_every", "sample_every", "log_every", "keep", "workers", "export_dtype"}


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up, constant, linear cool-down to zero."""
    warm = min(1.0, (step + 1) / max(1, config.warmup))
    tail = max(1, round(config.cooldown * config.steps))
    return config.lr * warm * min(1.0, (config.steps - step) / tail)


def train(task: Task, data: Any, config: TrainConfig, out: Path, *, console: Console | None = None) -> Path:
    """Train `task` on `data` until `config.steps`, from the newest checkpoint in `out` if there is one.

    Args:
        data: a dataset as of `snapgen.data`.
        out: the run's directory: checkpoints/, samples/, tensorboard/, and at the end export/.

    Returns:
        The directory of the exported model (averaged weights).

    Raises:
        ValueError: `out` holds a run of another configuration.
        io.CheckpointError: the newest checkpoint cannot be read.
        FloatingPointError: the loss or the weights are no longer finite.
        KeyboardInterrupt: after Ctrl-C, once the step at hand is saved.
    """
    console = console or Console()
    _claim(out, task, config)
    state = TrainState(task, config)
    resumed = state.load_latest(out)
    if resumed:
        console.print(f"resuming {out} at step {state.step} of {config.steps}")
    for module in task.modules.values():
        module.train()
        if config.compile:
            module.compile()

    writer = _tensorboard(out)
    with _interrupts() as interrupted, _progress(console, config.steps, state.step) as show:
        stream = batches(data, config.batch_size, start=state.step * config.accumulate, seed=config.seed,
                         workers=config.workers)  # fmt: skip
        since, seen = time.perf_counter(), 0
        totals: dict[str, Tensor] = {}
        while state.step < config.steps:
            figures = optimizer_step(task, config, state, stream)
            seen += config.batch_size * config.accumulate
            for name, value in figures.items():
                totals[name] = totals.get(name, torch.zeros(())) + value
            last = state.step == config.steps
            if state.step % config.log_every == 0 or last:
                rate = seen / (time.perf_counter() - since)
                count = seen / (config.batch_size * config.accumulate)
                means = {name: float(value) / count for name, value in totals.items()}
                _report(writer, show, state.step, means, rate, learning_rate(config, state.step - 1))
                if not all(map(math.isfinite, means.values())):
                    raise FloatingPointError(
                        f"step {state.step}: the loss is no longer finite; the last good checkpoint is in {out}"
                    )
                since, seen, totals = time.perf_counter(), 0, {}
            stop = interrupted()
            if state.step % config.save_every == 0 or last or stop:
                state.save(out)
            if stop:
                raise KeyboardInterrupt(f"stopped at step {state.step}; run the same command to go on")
            if state.step % config.sample_every == 0 or last:
                with state.averaged():
                    task.sample_grid(out / "samples" / f"step-{state.step:07d}.png", config.seed)
    writer.close()
    with state.averaged(), io.whole_directory(out / "export") as folder:
        task.export(folder)
        if config.export_dtype == "fp16":
            io.halve(folder)
    return out / "export"


def optimizer_step(task: Task, config: TrainConfig, state: TrainState, stream: Iterator[Any]) -> dict[str, Tensor]:
    """One optimizer step; returns the mean of every figure over its micro-batches, on the device."""
    figures: dict[str, Tensor] = {}
    for micro in range(config.accumulate):
        images, captions = next(stream)
        # One generator per micro-batch, seeded by its place in the run: nothing to save, nothing to drift.
        generator = seeds.generator(config.seed, state.step * config.accumulate + micro + 1)
        with torch.autocast(state.device.type, torch.bfloat16, enabled=config.dtype == "bf16"):
            loss, further = task.loss(images.to(state.device), captions, generator)
        (loss / config.accumulate).backward()
        for name, value in {"loss": loss, **further}.items():
            figures[name] = figures.get(name, 0) + value.detach() / config.accumulate
    norm = nn.utils.clip_grad_norm_(state.parameters, config.grad_clip)
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate(config, state.step)
    state.optimizer.step()
    state.optimizer.zero_grad()
    state.step += 1
    state.average()
    return {**figures, "grad_norm": norm.detach()}


class TrainState:
    """Everything that a resumed run needs: weights, averaged weights, optimizer, step."""

    def __init__(self, task: Task, config: TrainConfig) -> None:
        self.task, self.config, self.step = task, config, 0
        self.parameters: list[Tensor] = [
            p for module in task.modules.values() for p in module.parameters() if p.requires_grad
        ]
        self.device = self.parameters[0].device
        self.ema = [p.detach().clone() for p in self.parameters]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, fused=True
        )

    @torch.no_grad()
    def average(self) -> None:
        """Move the averaged weights; a short ramp keeps the random start out of them."""
        decay = min(self.config.ema, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(self.ema, self.parameters, 1 - decay)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The task's modules with averaged weights, in eval mode, without gradients."""
        kept = [p.detach().clone() for p in self.parameters]
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, self.ema)
            for module in self.task.modules.values():
                module.eval()
            try:
                yield
            finally:
                torch._foreach_copy_(self.parameters, kept)
                for module in self.task.modules.values():
                    module.train()

    def _named(self) -> dict[str, nn.Parameter]:
        return {
            f"{prefix}.{name}": parameter
            for prefix, module in self.task.modules.items()
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        }

    def save(self, out: Path) -> None:
        """Write a checkpoint, whole or not at all, then drop the oldest ones.

        Raises:
            FloatingPointError: the weights are not finite; older checkpoints stay.
        """
        if not all(bool(parameter.isfinite().all()) for parameter in self.parameters):
            raise FloatingPointError(
                f"step {self.step}: the weights are no longer finite; the last good checkpoint is in {out}"
            )
        names = list(self._named())
        moments = {
            f"{names[index]}/{key}": value
            for index, slots in self.optimizer.state_dict()["state"].items()
            for key, value in slots.items()
        }
        with io.whole_directory(out / "checkpoints" / f"step-{self.step:07d}") as folder:
            io.save_tensors(folder / "model.safetensors", dict(zip(names, self.parameters, strict=True)))
            io.save_tensors(folder / "ema.safetensors", dict(zip(names, self.ema, strict=True)))
            io.save_tensors(folder / "optimizer.safetensors", moments)
            io.write_json(folder / "state.json", {"step": self.step})
        for old in _checkpoints(out)[: -self.config.keep]:
            shutil.rmtree(old)

    @torch.no_grad()
    def load_latest(self, out: Path) -> bool:
        """Load the newest checkpoint of the run in `out`; False if it has none."""
        found = _checkpoints(out)
        if not found:
            return False
        folder = found[-1]
        named = self._named()
        for file, targets in (("model", self.parameters), ("ema", self.ema)):
            tensors = io.load_tensors(folder / f"{file}.safetensors")
            wrong = [name for name, p in named.items() if name not in tensors or tensors[name].shape != p.shape]
            if wrong or len(tensors) != len(named):
                raise io.CheckpointError(f"{folder}: holds another model ({', '.join(wrong[:3]) or 'extra weights'})")
            torch._foreach_copy_(targets, [tensors[name].to(self.device) for name in named])
        moments = io.load_tensors(folder / "optimizer.safetensors")
        state = self.optimizer.state_dict()
        state["state"] = {
            index: {key: moments[f"{name}/{key}"] for key in ("step", "exp_avg", "exp_avg_sq")}
            for index, name in enumerate(named)
        }
        self.optimizer.load_state_dict(state)
        step = io.read_json(folder / "state.json").get("step")
        if not isinstance(step, int):
            raise io.CheckpointError(f"{folder / 'state.json'}: damaged, its step is {step!r}")
        self.step = step
        return True


def _checkpoints(out: Path) -> list[Path]:
    """Finished checkpoints, oldest first. One being written has a hidden name."""
    return sorted(p for p in (out / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d{7,}", p.name))


def _claim(out: Path, task: Task, config: TrainConfig) -> None:
    """Record what this run is, or check that `out` holds the same one."""
    fixed = {key: value for key, value in dataclasses.asdict(config).items() if key not in _FREE}
    own = json.loads(json.dumps({"task": task.name, "preset": task.preset.name, **fixed}))
    record = out / "config.json"
    if record.exists():
        there = io.read_json(record)
        differences = [
            f"{key} was {there.get(key)!r}, now {own.get(key)!r}"
            for key in sorted(own.keys() | there.keys())
            if own.get(key) != there.get(key)
        ]
        if "steps" in there and differences == [f"steps was {there.get('steps')!r}, now {own['steps']!r}"]:
            # Until the learning rate begins to fall, the length of a run has had no effect on it.
            done = int(found[-1].name.split("-")[1]) if (found := _checkpoints(out)) else 0
            if done <= (1 - config.cooldown) * min(there["steps"], own["steps"]):
                io.write_json(record, own)
                return
        if differences:
            raise ValueError(f"{out} holds another run ({'; '.join(differences)}); choose another directory")
    else:
        io.write_json(record, own)


@contextmanager
def _interrupts() -> Iterator[Any]:
    """Ctrl-C and SIGTERM set a flag that the loop reads between steps; a second Ctrl-C stops at once."""
    flag = False

    def ask(*_: Any) -> None:
        nonlocal flag
        flag = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    try:
        previous = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: whoever started it handles signals
        yield lambda: False
        return
    try:
        yield lambda: flag
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def _progress(console: Console, steps: int, start: int) -> Iterator[Any]:
    columns = (
        TextColumn("{task.completed}/{task.total}"),
        BarColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console) as bar:
        line = bar.add_task("starting", total=steps, completed=start)
        yield lambda step, text: bar.update(line, completed=step, description=text)


def _report(writer: Any, show: Any, step: int, means: dict[str, float], rate: float, lr: float) -> None:
    shown = "  ".join(f"{name} {value:.4f}" for name, value in means.items())
    show(step, f"{shown}  {rate:.0f} images/s")
    for name, value in {**means, "images_per_second": rate, "lr": lr}.items():
        writer.add_scalar(name, value, step)


def _tensorboard(out: Path) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(out / "tensorboard"))
