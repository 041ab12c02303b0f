"""The training loop: one for every task, on one process or many, resumed by running the same command again.

A run is a function of its configuration and the step count: data, noise and dropout of sample p of step n depend on
(seed, n, p) alone, so a run that was interrupted anywhere and resumed has, on a CPU, bitwise the weights of one left
alone, and on another number of processes the same up to the order of sums.
"""

from __future__ import annotations

import dataclasses
import json
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from snapgen import io, parallel
from snapgen.data.loader import Batch, Share, batches
from snapgen.logs import Journal, peak_memory, peak_rate, progress
from snapgen.parallel import Processes
from snapgen.seeds import Draws
from snapgen.settings import TrainConfig
from snapgen.state import RUNNING, SKIPPED, TrainState, checkpoints, freed
from snapgen.tasks import Task
from snapgen_kernels import profile_range

# These may change between a run and its resumption: they leave the weights as they are, but for the order of sums.
_FREE = {
    "micro_batch", "patience", "spike", "save_every", "sample_every", "log_every", "keep", "workers", "compile",
    "recompute", "recompute_keeps", "parallel", "wandb", "export_dtype",
}  # fmt: skip


def share_of(config: TrainConfig, group: Processes) -> Share:
    """What one process reads of every step."""
    micro = config.micro_batch or max(1, config.batch_size // group.world)
    return Share(config.batch_size, micro, group.rank, group.world)


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up, constant, linear cool-down to zero."""
    warm = min(1.0, (step + 1) / max(1, config.warmup))
    tail = max(1, round(config.cooldown * config.steps))
    return config.lr * warm * min(1.0, (config.steps - step) / tail)


def train(task: Task, data: Any, config: TrainConfig, out: Path, *, console: Console | None = None) -> Path:
    """Train `task` on `data` until `config.steps`, from the newest checkpoint in `out` if there is one.

    Under torchrun every process calls this with the same arguments; `task` stands on the CPU or on this process's GPU.

    Args:
        data: a dataset as of `snapgen.data`.
        out: the run's directory: checkpoints/, samples/, tensorboard/, and at the end export/.

    Returns:
        The directory of the exported model (averaged weights).

    Raises:
        ValueError: `out` holds a run of another configuration.
        io.CheckpointError: the newest checkpoint cannot be read.
        FloatingPointError: the loss or the weights are no longer finite, or `patience` steps in a row were skipped.
        KeyboardInterrupt: after Ctrl-C, once the step at hand is saved.
    """
    with parallel.processes(config.parallel) as group:
        return _Run(task, data, config, out, console or Console(), group).go()


class _Run:
    """What one call of :func:`train` holds together."""

    def __init__(
        self, task: Task, data: Any, config: TrainConfig, out: Path, console: Console, group: Processes
    ) -> None:
        self.task, self.data, self.config, self.out, self.group = task, data, config, out, group
        self.console = console if group.first else None
        if config.compile and not getattr(task, "compiles", True):
            raise ValueError("compile: this objective looks into its modules or changes them, which cannot be compiled")
        self.share = share_of(config, group)  # before anything is written
        if group.first:
            _claim(out, task, config)
            freed(out)
        group.wait()
        self.templates = {name: parallel.template(task.modules[name]) for name in task.averaged}
        if group.many and config.parallel == "fsdp":
            parallel.shard(task.modules, group)
        self.state = TrainState(task, config, group)
        self.wrappers = wrap(task, group)

    def go(self) -> Path:
        config, state, out = self.config, self.state, self.out
        if state.load_latest(out) and self.console is not None:
            self.console.print(f"resuming {out} at step {state.step} of {config.steps}")
        for module in self.task.modules.values():
            module.train()
            recompute(module, config)
            if config.compile:
                module.compile()
        with _interrupts() as interrupted, progress(self.console, config.steps, state.step) as show:
            journal = None
            if self.group.first:
                journal = Journal(out, dataclasses.asdict(config), show, start=state.step, wandb=config.wandb)
            meter = _Meter(self, journal)
            stream = batches(self.data, self.share, start=state.step, seed=config.seed, workers=config.workers)
            try:
                self._steps(stream, meter, journal, interrupted)
            except Exception:
                if not self.group.many:  # a process that failed cannot wait for others
                    state.settle()
                raise
            finally:
                if journal is not None:
                    journal.close()
            state.settle()
        return self._export()

    def _steps(self, stream: Iterator[Batch], meter: _Meter, journal: Journal | None, interrupted: Any) -> None:
        config, state, out = self.config, self.state, self.out
        while state.step < config.steps:
            meter.add(optimizer_step(self.task, config, state, stream, self.share, self.wrappers))
            last = state.step == config.steps
            if state.step % config.log_every == 0 or last:
                meter.report()
            stop, pending = self.group.agree_on(interrupted(), state.pending)
            if not pending:
                state.settle()
            if state.step % config.save_every == 0 or last or stop:
                state.save(out)
            if stop:
                state.settle()
                raise KeyboardInterrupt(f"stopped at step {state.step}; run the same command to go on")
            if state.step % config.sample_every == 0 or last:
                self._sample(journal)

    def _sample(self, journal: Journal | None) -> None:
        path = self.out / "samples" / f"step-{self.state.step:07d}.png"
        with self.state.averaged():
            # Weights that are dealt out are gathered by every process at once, so that all of them draw.
            if self.group.first or self.config.parallel == "fsdp":
                target = path if self.group.first else self.out / "samples" / f".rank-{self.group.rank}.png"
                self.task.sample_grid(target, self.config.seed)
                if not self.group.first:
                    target.unlink(missing_ok=True)
        if journal is not None and path.is_file():
            journal.picture(self.state.step, path)
        self.group.wait()

    def _export(self) -> Path:
        stored: dict[str, Tensor] = {
            f"{name}.{key}": value
            for name in self.task.averaged
            for key, value in self.task.modules[name].state_dict().items()
        }
        weights: dict[str, Tensor] = {}
        for name, value in {**stored, **self.state.ema}.items():
            gathered = parallel.whole(value)  # every process has to ask
            if self.group.first:
                weights[name] = gathered.detach().cpu()
        if self.group.first:
            modules = {name: self._exported(name, weights) for name in self.task.averaged}
            with torch.no_grad(), io.whole_directory(self.out / "export") as folder:
                self.task.export(folder, modules)
                if self.config.export_dtype == "fp16":
                    io.halve(folder)
        self.group.wait()
        return self.out / "export"

    def _exported(self, name: str, weights: Mapping[str, Tensor]) -> nn.Module:
        """A trained module, whole, with averaged weights, on the CPU."""
        module = self.templates[name].to_empty(device="cpu")
        module.load_state_dict({key: weights[f"{name}.{key}"] for key in module.state_dict()})
        for key, buffer in self.task.modules[name].named_buffers():  # those that are not saved
            module.get_buffer(key).copy_(buffer)
        return module.eval()


def wrap(task: Task, group: Processes) -> dict[str, dict[str, nn.Module]]:
    """Data-parallel wrappers of every phase's modules, by phase; none where there is one process or FSDP."""
    if not group.many or group.kind == "fsdp":
        return {}
    return {
        phase.name: {name: parallel.wrapped(task.modules[name], group, unused=phase.unused) for name in phase.modules}
        for phase in task.phases()
    }


def optimizer_step(
    task: Task,
    config: TrainConfig,
    state: TrainState,
    stream: Iterator[Batch],
    share: Share,
    wrappers: Mapping[str, Mapping[str, nn.Module]] | None = None,
) -> dict[str, Tensor]:
    """One optimizer step, phase by phase; returns every figure's mean over this process's samples, on the device.

    Its parts are ranges for a profiler (`snapgen_kernels.profile_ranges`): data, forward, backward, optimizer, average.
    """
    figures: dict[str, Tensor] = {}
    with profile_range("data"):
        passes = [next(stream) for _ in range(share.passes)]
    for index, player in enumerate(state.players):
        phase = player.phase
        found = _backward(task, config, state, index, passes, (wrappers or {}).get(phase.name, {}))
        with profile_range("optimizer"):
            found["grad_norm"] = player.move(learning_rate(config, state.step), config.grad_clip)
        for module in task.modules.values():
            module.zero_grad(set_to_none=True)  # what reached others than this phase's, under FSDP
        if len(state.players) > 1:
            found = {f"{phase.name}/{name}": value for name, value in found.items()}
        figures |= found
    state.step += 1
    with profile_range("average"):
        state.average()
    return figures


def _backward(
    task: Task,
    config: TrainConfig,
    state: TrainState,
    index: int,
    passes: list[Batch],
    wrappers: Mapping[str, nn.Module],
) -> dict[str, Tensor]:
    """The gradient of phase `index`'s loss, summed over its passes, and the mean of its figures."""
    phase = state.players[index].phase
    figures: dict[str, Tensor] = {}
    modules = list(wrappers.values()) or [task.modules[name] for name in phase.modules]
    others = [module for name, module in task.modules.items() if name not in phase.modules]
    with parallel.distributed(task.call, phase.modules, wrappers), parallel.resting(others):
        for turn, batch in enumerate(passes):
            batch = batch.to(state.device)
            draws = Draws(config.seed, state.step, batch.positions, state.device, index)
            with parallel.unsynchronised(modules, wait=turn < len(passes) - 1):
                autocast = torch.autocast(state.device.type, torch.bfloat16, enabled=config.dtype == "bf16")
                with profile_range("forward"), autocast:
                    loss, further = phase.loss(batch, draws)
                with profile_range("backward"):
                    (loss / len(passes)).backward()
            for name, value in {"loss": loss, **further}.items():
                figures[name] = figures.get(name, 0) + value.detach() / len(passes)
    return figures


class _Meter:
    """Figures between two reports, and what they say: speed, share of the processor's rate, memory, skipped steps."""

    def __init__(self, run: _Run, journal: Journal | None) -> None:
        self.run, self.journal = run, journal
        self.totals: dict[str, Tensor] = {}
        self.count, self.since = 0, time.perf_counter()
        self.flops = getattr(run.task, "flops", None)  # of a training step, per sample
        dtype = torch.bfloat16 if run.config.dtype == "bf16" else torch.float32
        self.rate = peak_rate(run.group.device, dtype) if self.flops and run.group.first else None

    def add(self, figures: Mapping[str, Tensor]) -> None:
        for name, value in figures.items():
            self.totals[name] = self.totals.get(name, torch.zeros(())) + value
        self.count += 1

    def report(self) -> None:
        """Report the means since the last report.

        Raises:
            FloatingPointError: too many steps in a row were skipped.
        """
        run, names = self.run, sorted(self.totals)
        means = run.group.mean(torch.stack([self.totals[name].float().cpu() for name in names]) / self.count)
        values = dict(zip(names, means.tolist(), strict=True))
        seconds = (time.perf_counter() - self.since) / self.count
        guards = torch.stack([player.guard for player in run.state.players])
        skipped, running = int(guards[:, SKIPPED].sum()), int(guards[:, RUNNING].max())
        if self.journal is not None:
            images = run.config.batch_size / seconds
            further = {
                "images_per_second": images,
                "lr": learning_rate(run.config, run.state.step - 1),
                "memory": float(peak_memory(run.group.device)),
                "skipped_steps": float(skipped),
            }
            line = f"{images:.0f} images/s  {further['memory'] / 1e9:.1f} GB"
            if self.rate and self.flops:
                further["mfu"] = images * self.flops / (self.rate * run.group.world)
                line += f"  {further['mfu']:.0%} MFU"
            if skipped:
                line += f"  {skipped} skipped"
            self.journal.report(run.state.step, values, further, line)
        self.totals, self.count, self.since = {}, 0, time.perf_counter()
        if running >= run.config.patience:
            raise FloatingPointError(
                f"step {run.state.step}: the last {running} steps were skipped, for their gradients were not finite or "
                f"too large; the last good checkpoint is in {run.out} (--spike may be raised on the way)"
            )


def recompute(module: nn.Module, config: TrainConfig) -> None:
    """Activation checkpointing of a diffusers model, as the configuration has it."""
    if not config.recompute or not getattr(module, "_supports_gradient_checkpointing", False):
        return
    from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

    kept = {_operator(name) for name in config.recompute_keeps}

    def policy(_: Any, operator: Any, *args: Any, **named: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if operator in kept else CheckpointPolicy.PREFER_RECOMPUTE

    def run(layer: Any, *args: Any) -> Any:
        if not kept:
            return checkpoint(layer, *args, use_reentrant=False)
        contexts = lambda: create_selective_checkpoint_contexts(policy)  # noqa: E731
        return checkpoint(layer, *args, use_reentrant=False, context_fn=contexts)

    module.enable_gradient_checkpointing(run)  # type: ignore[operator]


def _operator(name: str) -> Any:
    """The overload that an operator's name means ("aten::mm", "snapgen::attention")."""
    namespace, _, rest = name.partition("::")
    packet = getattr(getattr(torch.ops, namespace), rest, None) if rest else None
    if packet is None:
        raise ValueError(f"recompute_keeps: got {name!r}; there is no such operator (snapgen::attention is one)")
    return packet.default


def _claim(out: Path, task: Task, config: TrainConfig) -> None:
    """Record what this run is, or check that `out` holds the same one."""
    fixed = {key: value for key, value in dataclasses.asdict(config).items() if key not in _FREE}
    own = json.loads(json.dumps({"task": task.name, "preset": task.preset.name, **task.record(), **fixed}))
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
            done = int(found[-1].name.split("-")[1]) if (found := checkpoints(out)) else 0
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
