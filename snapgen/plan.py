"""`snapgen train --dry-run`: what a run would do, its parameters, and an estimate of its memory."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from snapgen.config import Preset, get_preset
from snapgen.info import si
from snapgen.parallel import own_device
from snapgen.settings import Source, TrainConfig

TOKENS, TINY_TOKENS = 77 + 256, 16  # CLIP's and Gemma's; a jointly trained text encoder's
# Weights, gradients, both moments and averaged weights, in fp32.
STATE_BYTES = 5 * 4


@dataclass(frozen=True)
class Plan:
    """Bytes that one process holds, and what they come from."""

    parameters: int
    state: int  # weights, gradients, moments, averaged weights
    activations: int  # kept for the backward pass, at the given micro-batch
    micro_batch: int
    passes: int

    @property
    def total(self) -> int:
        return self.state + self.activations


def make_plan(source: Source, config: TrainConfig, world: int) -> Plan:
    """The estimate for one of `world` processes: the denoiser's part, without frozen models and temporary buffers.

    Activations are counted, not guessed: the forward pass of a sample runs on tensors without memory, with the kernels
    that this machine would run, and what autograd keeps is added up.

    Raises:
        ValueError: the batch cannot be dealt out, or the preset is unknown.
    """
    from snapgen.data.loader import Share
    from snapgen.mmdit import make_denoiser

    spec = get_preset(source.preset)
    micro = config.micro_batch or max(1, config.batch_size // world)
    share = Share(config.batch_size, micro, 0, world)
    with FakeTensorMode(), own_device():
        denoiser = make_denoiser(spec.denoiser)
        kept = kept_bytes(denoiser, spec, source.resolution or spec.resolution, config)
    parameters = sum(p.numel() for p in denoiser.parameters())
    held = parameters // world if config.parallel == "fsdp" else parameters
    return Plan(parameters, held * STATE_BYTES, kept * micro, micro, share.passes)


def kept_bytes(denoiser: nn.Module, spec: Preset, resolution: int, config: TrainConfig) -> int:
    """Bytes that autograd keeps of one sample's forward pass through `denoiser`; its weights are not counted."""
    from snapgen.runs import upscale
    from snapgen.train import recompute

    recompute(denoiser.train(), config)
    side, flags = resolution // upscale(spec), spec.denoiser
    pooled = flags.get("pooled_dim")
    weights = {id(p) for p in denoiser.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        base = tensor if tensor._base is None else tensor._base
        if id(base) not in weights:
            kept[id(base)] = base
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast(own_device().type, torch.bfloat16, enabled=config.dtype == "bf16"),
    ):
        denoiser(
            torch.empty(1, flags["in_channels"], side, side),
            torch.zeros(1),
            torch.empty(1, TOKENS if spec.encoder is None else TINY_TOKENS, flags["context_dim"]),
            pooled_projections=None if pooled is None else torch.empty(1, pooled),
        )
    return sum(tensor.numel() * tensor.element_size() for tensor in kept.values())


def print_plan(source: Source, config: TrainConfig, console: Console) -> None:
    """The resolved configuration, parameters, and the estimate for one process of as many as torchrun started."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if int(os.environ.get("RANK", "0")) != 0:
        return
    plan = make_plan(source, config, world)
    settings = Table(title="Configuration", show_header=False)
    for name, value in {**dataclasses.asdict(source), **dataclasses.asdict(config)}.items():
        settings.add_row(name, "" if value is None else str(value))
    console.print(settings)
    table = Table(title=f"One of {world} process{'es' if world > 1 else ''}", show_header=False)
    rows = [
        ("denoiser", f"{si(plan.parameters)} parameters"),
        ("a step", f"{plan.passes} passes of {plan.micro_batch} samples"),
        ("weights, gradients, moments, average", gigabytes(plan.state)),
        ("kept for the backward pass", gigabytes(plan.activations)),
        ("together", gigabytes(plan.total)),
    ]
    for name, text in rows:
        table.add_row(name, text)
    console.print(table)
    console.print("An estimate: frozen encoders, a teacher and temporary buffers come on top.")


def gigabytes(count: float) -> str:
    return f"{count / 2**30:.2f} GiB"
