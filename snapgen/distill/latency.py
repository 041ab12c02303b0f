"""What each block of a denoiser costs in time: measured here, or read from a file that was measured elsewhere."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from snapgen import io
from snapgen.fusion_unet import FusionUNet

REST = "rest"  # what is in no block: first and last convolution, samplers, time


@dataclass(frozen=True)
class LatencyTable:
    """Milliseconds of one forward pass by kind of block (`key`), and of what is in no block ("rest").

    Blocks of one kind, width and resolution take the same time, so a table has few entries. As JSON:
    {"device": ..., "batch": ..., "milliseconds": {"A 128 4x4": 0.61, "R 128+128>128 4x4": 0.42, ..., "rest": 1.3}}.
    """

    milliseconds: dict[str, float]
    device: str = ""
    batch: int = 2

    @classmethod
    def load(cls, path: str | Path) -> LatencyTable:
        """Read a table.

        Raises:
            io.CheckpointError: the file is damaged or no table; names what is wrong.
        """
        found = io.read_json(path)
        times = found.get("milliseconds")
        if not isinstance(times, dict) or not all(
            isinstance(value, int | float) and not isinstance(value, bool) and value >= 0 for value in times.values()
        ):
            raise io.CheckpointError(f"{path}: must hold milliseconds, a number of 0 or more for each kind of block")
        return cls(
            {name: float(value) for name, value in times.items()}, str(found.get("device", "")), found.get("batch", 2)
        )

    def save(self, path: str | Path) -> None:
        """Write the table, whole or not at all."""
        io.write_json(path, {"device": self.device, "batch": self.batch, "milliseconds": self.milliseconds})

    def block(self, net: FusionUNet, name: str) -> float:
        """Milliseconds of one block.

        Raises:
            ValueError: the table has no such kind of block.
        """
        return self._of(key(net, name))

    def total(self, net: FusionUNet) -> float:
        """Milliseconds of the whole net: the sum of its blocks and the rest."""
        return self._of(REST) + sum(self.block(net, name) for name in net.places)

    def _of(self, kind: str) -> float:
        if kind not in self.milliseconds:
            raise ValueError(f"table: has no entry {kind!r}; it has {', '.join(sorted(self.milliseconds))}")
        return self.milliseconds[kind]


def key(net: FusionUNet, name: str) -> str:
    """A block's kind, widths and resolution: "A 128 4x4", "R 64>128 4x4", or with a skip "R 128+64>64 8x8"."""
    place = net.places[name]
    side = net.config.sample_size >> place.stage
    if place.kind == "A":
        return f"A {place.width_out} {side}x{side}"
    skip = f"+{place.width_skip}" if place.width_skip else ""
    return f"R {place.width_in}{skip}>{place.width_out} {side}x{side}"


@torch.no_grad()
def measure(net: FusionUNet, *, batch: int = 2, tokens: int = 77, repeats: int = 30) -> LatencyTable:
    """Time every kind of block of `net` where it stands, at its own resolution: the median of `repeats` calls.

    The kinds are timed in turn, over and over, so that a machine that slows down slows all of them.

    Args:
        batch: 2 is one picture with guidance.
        tokens: length of the text.
    """
    if repeats < 1:
        raise ValueError(f"repeats: got {repeats}; must be at least 1")
    parameter = next(net.parameters())
    config = net.config

    def empty(*shape: int) -> Tensor:
        return torch.zeros(shape, device=parameter.device, dtype=parameter.dtype)

    pooled = None if config.pooled_dim is None else empty(batch, config.pooled_dim)
    sample = empty(batch, config.in_channels, config.sample_size, config.sample_size)
    parts = {name: net.get_submodule(name) for name in net.places}
    outside = [net.conv_in, net.time_embedding, net.pooled_embedding, net.norm_out, net.conv_out]
    outside += [stage.sampler for stage in (*net.down_stages, *net.up_stages)]
    parts |= {f"{REST} {index}": part for index, part in enumerate(outside) if part is not None}
    calls = _recorded(
        net, parts, lambda: net(sample, 1, empty(batch, tokens, config.context_dim), None, pooled, return_dict=False)
    )
    kinds: dict[str, str] = {}  # a representative of each
    for name in calls:
        kinds.setdefault(name if name.startswith(REST) else key(net, name), name)
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    training = net.training
    net.eval()
    for turn in range(repeats + 1):  # the first warms up
        for kind, name in kinds.items():
            seconds = _timed(calls[name], parameter.device)
            if turn:
                times[kind].append(1000 * seconds)
    net.train(training)
    medians = {kind: statistics.median(values) for kind, values in times.items()}
    rest = sum(value for kind, value in medians.items() if kind.startswith(REST))
    found = {kind: value for kind, value in medians.items() if not kind.startswith(REST)}
    return LatencyTable({**found, REST: rest}, _device_name(parameter.device), batch)


def _recorded(net: nn.Module, parts: dict[str, nn.Module], run: Callable[[], Any]) -> dict[str, Callable[[], Any]]:
    """For each part, a call with the inputs that it has when `run` runs."""
    calls: dict[str, Callable[[], Any]] = {}

    def hook(name: str) -> Any:
        def record(part: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            calls[name] = lambda: part(*inputs, **named)

        return record

    handles = [part.register_forward_pre_hook(hook(name), with_kwargs=True) for name, part in parts.items()]
    run()
    _remove(handles)
    return calls


def _remove(handles: Iterable[Any]) -> None:
    for handle in handles:
        handle.remove()


def _timed(call: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    from snapgen.info import machine

    return f"{machine()['processor']}, {torch.get_num_threads()} threads"
