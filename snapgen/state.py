"""Everything that a resumed run needs: weights, averaged weights, optimizers, guards, step; and where it is kept.

Checkpoints are safetensors, written by `torch.distributed.checkpoint` in the background, each process its own part. One
written by any number of processes can be read by any other number.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor

from snapgen import io
from snapgen.parallel import Processes, dealt_out_again, local, replicated, whole
from snapgen.tasks import Phase, Task

# The guard's numbers.
AVERAGE, SEEN, SKIPPED, RUNNING = range(4)
MEMORY = 0.02  # a norm's weight in their average: about the last 50 steps
SETTLED = 100  # steps before the average is trusted


class Player:
    """The optimizer of one phase, and the guard that keeps broken gradients away from it.

    A step whose gradient is not finite, or whose norm exceeds `spike` times the running average, changes nothing. That
    is decided on the device: nothing waits for it.

    Args:
        named: the parameters that it moves.
        spike: 0 for none; a phase whose gradients are uneven has none either.
    """

    def __init__(
        self,
        phase: Phase,
        named: dict[str, nn.Parameter],
        *,
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
        spike: float,
    ) -> None:
        self.phase, self.named, self.spike = phase, named, 0.0 if phase.uneven else spike
        self.parameters: list[nn.Parameter] = list(named.values())
        if not self.parameters:
            raise ValueError(f"task: its phase {phase.name} has nothing to train")
        device = self.parameters[0].device
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=lr * phase.lr, betas=phase.betas or betas, weight_decay=weight_decay, fused=True
        )
        for parameter in self.parameters:  # now, so that a checkpoint can be read into it
            self.optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=device),
                "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            }
        self.guard = torch.zeros(4, device=device)

    def move(self, lr: float, grad_clip: float) -> Tensor:
        """One step of the optimizer; returns the gradient's norm before it was clipped."""
        found = [p.grad for p in self.parameters if p.grad is not None]
        norm = whole(nn.utils.get_total_norm(found)).float()
        nn.utils.clip_grads_with_norm_(self.parameters, grad_clip, replicated(norm, self.parameters[0]))
        broken = self._judge(norm)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * self.phase.lr
        # AdamW's fused step leaves everything as it is where this is 1.
        self.optimizer.found_inf = replicated(broken, self.parameters[0])  # type: ignore[attr-defined]
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    @torch.no_grad()
    def _judge(self, norm: Tensor) -> Tensor:
        """1 if this step is to be skipped, else 0."""
        average, seen = self.guard[AVERAGE], self.guard[SEEN]
        broken = ~norm.isfinite()
        if self.spike > 0:
            broken = broken | ((seen >= SETTLED) & (norm > self.spike * average))
        weight = torch.clamp(1 / (seen + 1), min=MEMORY)
        kept = torch.stack((torch.lerp(average, norm, weight), seen + 1, self.guard[SKIPPED], torch.zeros_like(seen)))
        skipped = torch.stack((average, seen, self.guard[SKIPPED] + 1, self.guard[RUNNING] + 1))
        self.guard.copy_(torch.where(broken, skipped, kept))
        return broken.float()


class TrainState:
    """Weights, averaged weights, optimizers and step of a run.

    Args:
        task: its modules stand where they are trained, and are dealt out already if they are to be.
        config: a `snapgen.train.TrainConfig`.
    """

    def __init__(self, task: Task, config: Any, group: Processes | None = None) -> None:
        self.task, self.config, self.step = task, config, 0
        self.group = group or Processes("ddp", 0, 1, torch.device("cpu"))
        self.players = [
            Player(
                phase,
                _trained(task, phase.modules),
                lr=config.lr,
                betas=config.betas,
                weight_decay=config.weight_decay,
                spike=config.spike,
            )
            for phase in task.phases()
        ]
        self.named = {name: p for player in self.players for name, p in player.named.items()}
        self.device = next(iter(self.named.values())).device
        self.drawn = {name: self.named[name] for name in _trained(task, task.averaged)}
        self.ema = {name: p.detach().clone() for name, p in self.drawn.items()}
        self.writing: Future | None = None
        self._finish: Any = None

    @torch.no_grad()
    def average(self) -> None:
        """Move the averaged weights; a short ramp keeps the random start out of them."""
        decay = min(self.config.ema, (1 + self.step) / (10 + self.step))
        ours, theirs = map(local, self.ema.values()), map(local, self.drawn.values())
        torch._foreach_lerp_(list(ours), list(theirs), 1 - decay)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The task's modules with averaged weights, in eval mode, without gradients."""
        modules = self.task.modules.values()
        current = [local(p) for p in self.drawn.values()]
        with torch.no_grad():
            kept = [p.detach().clone() for p in current]
            torch._foreach_copy_(current, [local(p) for p in self.ema.values()])
            dealt_out_again(modules)
            for module in modules:
                module.eval()
            try:
                yield
            finally:
                torch._foreach_copy_(current, kept)
                dealt_out_again(modules)
                for module in modules:
                    module.train()

    def finite(self) -> bool:
        """Whether every weight is."""
        own = all(bool(local(parameter).isfinite().all()) for parameter in self.named.values())
        return not self.group.agree(not own)

    @torch.no_grad()
    def tensors(self) -> dict[str, Tensor]:
        """All of it but the step, by name, sharing memory."""
        found: dict[str, Tensor] = {f"model/{name}": parameter for name, parameter in self.named.items()}
        found |= {f"ema/{name}": value for name, value in self.ema.items()}
        for prefix, module in self.task.modules.items():
            buffers = module.state_dict().keys() - dict(module.named_parameters()).keys()
            found |= {f"buffer/{prefix}.{name}": module.get_buffer(name) for name in sorted(buffers)}
        for player in self.players:
            found[f"guard/{player.phase.name}"] = player.guard
            for name, parameter in player.named.items():
                for key, value in player.optimizer.state[parameter].items():
                    found[f"optimizer/{player.phase.name}/{name}/{key}"] = value
        return {name: value.detach() for name, value in found.items()}

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def save(self, out: Path) -> None:
        """Begin to write a checkpoint, which appears whole or not at all; `settle` waits for it.

        Raises:
            FloatingPointError: the weights are not finite; older checkpoints stay.
            OSError: an earlier checkpoint could not be written.
        """
        self.settle()
        if not self.finite():
            raise FloatingPointError(
                f"step {self.step}: the weights are no longer finite; the last good checkpoint is in {out}"
            )
        final = out / "checkpoints" / f"step-{self.step:07d}"
        folder = None
        if self.group.first:
            final.parent.mkdir(parents=True, exist_ok=True)
            folder = tempfile.mkdtemp(dir=final.parent, prefix=f".{final.name}-")
        temporary = Path(self.group.same(folder))
        writer = HuggingFaceStorageWriter(str(temporary), save_distributed=True)
        # Whole weights are the same on every process: the first one's are enough.
        ours = self.tensors() if self.group.first or self.group.kind == "fsdp" else {}
        copies = {name: _copied(value) for name, value in ours.items()}
        self.writing = dcp.async_save(  # type: ignore[assignment]
            copies, storage_writer=writer, process_group=self.group.side, no_dist=not self.group.many
        )
        step = self.step

        def finish() -> None:
            if not self.group.first:
                return
            io.write_json(temporary / "state.json", {"step": step})
            io.publish(temporary, final)
            for old in checkpoints(out)[: -self.config.keep]:
                shutil.rmtree(old)

        self._finish = (finish, temporary, final)

    @property
    def pending(self) -> bool:
        """Whether this process is still writing a checkpoint."""
        return self.writing is not None and not self.writing.done()

    def settle(self) -> None:
        """Put the checkpoint that is being written, if any, into its place, once it is written.

        Raises:
            OSError: it could not be written; nothing is left of it.
        """
        if self.writing is None:
            return
        (finish, temporary, final), writing = self._finish, self.writing
        self.writing = self._finish = None
        try:
            with io.explained(final):
                try:
                    writing.result()
                except (Exception, CheckpointException) as error:  # which wraps what went wrong on each process
                    raise _cause(error) from error
                # The first process knows here that all have written theirs.
                finish()
        finally:
            if self.group.first:
                shutil.rmtree(temporary, ignore_errors=True)

    @torch.no_grad()
    def load_latest(self, out: Path) -> bool:
        """Load the newest checkpoint of the run in `out`; False if it has none.

        Raises:
            io.CheckpointError: it is damaged, or holds another model.
        """
        found = self.group.same(checkpoints(out))  # a network's file system may show others something older
        if not found:
            return False
        folder = found[-1]
        self.step = read_step(folder)
        own = self.tensors()
        there = stored_shapes(folder)
        wrong = [name for name, value in own.items() if there.get(name) != tuple(value.shape)]
        if wrong or there.keys() - own.keys():
            named = wrong or sorted(there.keys() - own.keys())
            raise io.CheckpointError(f"{folder}: holds another model ({', '.join(named[:3])})")
        dcp.load(own, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=not self.group.many)
        return True


def checkpoints(out: Path) -> list[Path]:
    """Finished checkpoints of a run, oldest first. One being written has a hidden name."""
    return sorted(p for p in (out / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d{7,}", p.name))


def read_step(folder: Path) -> int:
    """The step of a checkpoint."""
    step = io.read_json(folder / "state.json").get("step")
    if not isinstance(step, int):
        raise io.CheckpointError(f"{folder / 'state.json'}: damaged, its step is {step!r}")
    return step


def stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The tensors of a checkpoint and their whole shapes; checks that its files are whole.

    Raises:
        io.CheckpointError: a file is damaged, or there is none.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise io.CheckpointError(f"{folder}: holds no safetensors")
    for file in files:
        io.check_tensors(file)
    metadata = HuggingFaceStorageReader(str(folder)).read_metadata()
    return {
        name: tuple(value.size)
        for name, value in metadata.state_dict_metadata.items()
        if isinstance(value, TensorStorageMetadata)
    }


def _trained(task: Task, names: Any) -> dict[str, nn.Parameter]:
    return {
        f"{prefix}.{name}": parameter
        for prefix in names
        for name, parameter in task.modules[prefix].named_parameters()
        if parameter.requires_grad
    }


def _copied(value: Tensor) -> Tensor:
    """What can be written while training goes on, in the layout that safetensors takes."""
    if value.device.type != "cpu":
        return value.contiguous()  # the library copies it to the CPU before it returns
    if isinstance(value, DTensor):
        part = value.to_local().clone(memory_format=torch.contiguous_format)
        return DTensor.from_local(
            part, value.device_mesh, value.placements, run_check=False, shape=value.shape, stride=value.stride()
        )
    return value.clone(memory_format=torch.contiguous_format)


def _cause(error: BaseException) -> BaseException:
    """The operating system's own error, where one lies under the library's."""
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, OSError):
            return inner
        failures = getattr(inner, "failures", None)
        inner = next(iter(failures.values()))[0] if failures else inner.__cause__ or inner.__context__
    return error


def freed(out: Path) -> None:
    """Remove what a killed run was writing."""
    for path in (out / "checkpoints").glob(".step-*"):
        shutil.rmtree(path, ignore_errors=True)
