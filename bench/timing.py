"""Interleaved timing of several providers on one case."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from snapgen_kernels.checks import outputs_of
from snapgen_kernels.device_time import DeviceTimer

_FEWEST = 5  # rounds, however slow the case
_FEWEST_SLOW = 3  # where one round takes longer than all were meant to
_MOST = 500


@dataclass(frozen=True)
class Prepared:
    """A provider ready to run one case.

    Attributes:
        call: what is timed. leaves: what gradients are asked of.
        outputs: turns what ``call`` gave into tensors laid out as eager's, for runtimes that have arrays of their own.
        gradients: turns the gradients of ``leaves`` into those that eager has.
        whole: the call is all there is to time: a model's forward, or a training step with its backward inside.
        overwrites: its backward may write into the gradients that come from above.
        graphs: the call replays CUDA graphs, whose memory PyTorch's allocator does not tell. ungraphed: the same
            without them, if there is such a function, to tell it by.
    """

    call: Callable[[], object]
    leaves: tuple[Tensor, ...] = ()
    outputs: Callable[[object], tuple[Tensor, ...]] = outputs_of
    gradients: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]] = tuple
    whole: bool = False
    overwrites: bool = False
    graphs: bool = False
    ungraphed: Callable[[], object] | None = None


@dataclass(frozen=True, eq=False)
class Untimed:
    """What has to be done between two parts and is no part of what is measured."""

    call: Callable[[], None]

    def __call__(self) -> None:
        self.call()


# A step is what one repetition does: the parts are timed one by one.
Part = Callable[[], None]
Step = Sequence[Part]


def inference_step(prepared: Prepared) -> Step:
    """The call alone: one forward without gradients, or a step that has its backward inside."""

    def forward() -> None:
        prepared.call()  # the output is freed here, inside the measurement, for all alike

    return [forward]


def training_step(prepared: Prepared) -> Step:
    """A forward that keeps what backward needs, then the gradients of all leaves; a fresh graph each time. What a
    backward overwrites is put back before it, untimed."""
    upstream = [torch.randn_like(output) for output in outputs_of(prepared.call())]
    untouched = [gradient.clone() for gradient in upstream] if prepared.overwrites else []
    kept: list[tuple[Tensor, ...]] = []

    def forward() -> None:
        kept[:] = [outputs_of(prepared.call())]

    def backward() -> None:
        torch.autograd.grad(kept.pop(), prepared.leaves, upstream)

    def restore() -> None:
        for gradient, before in zip(upstream, untouched, strict=True):
            gradient.copy_(before)

    return [forward, Untimed(restore), backward] if prepared.overwrites else [forward, backward]


class Clock:
    """Times the parts of a step, the :class:`Untimed` ones left out, in ms. On CUDA the device's time, each part with
    cold caches and queued beforehand (:mod:`snapgen_kernels.device_time`).

    Args:
        wall: on CUDA, time what a user waits for instead: from the call until the device is done, caches as they are.
    """

    def __init__(self, device: str, *, wall: bool = False) -> None:
        self.cuda = device == "cuda" and not wall
        self.waits = device == "cuda" and wall
        self._timer = DeviceTimer(device) if self.cuda else None

    def __call__(self, step: Step) -> list[float]:
        if self._timer is not None:
            return self._on_device(step, self._timer)
        times = []
        for part in step:
            if self.waits:
                torch.cuda.synchronize()
            begin = time.perf_counter()
            part()
            if self.waits:
                torch.cuda.synchronize()
            if not isinstance(part, Untimed):
                times.append(1e3 * (time.perf_counter() - begin))
        return times

    @staticmethod
    def _on_device(step: Step, timer: DeviceTimer) -> list[float]:
        ahead = False
        while not ahead:
            marks, ahead = [], True
            for part in step:
                if isinstance(part, Untimed):
                    part()
                    continue
                start, end, in_time = timer.queue(part)
                marks.append((start, end))
                ahead = ahead and in_time
            torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in marks]


def interleaved(
    steps: Mapping[str, Step],
    clock: Clock,
    seconds: float,
    *,
    warm: bool = False,
    own_threads: Collection[str] = (),
) -> dict[str, list[list[float]]]:
    """Run all steps in turns for about ``seconds``, at least five rounds (three where one round takes longer than
    ``seconds``), and return each one's times in ms.

    Every round has an order of its own, so that no provider always follows the same one. ``own_threads``: providers
    whose threads look for more work for a while after they are done, on cores that the next one needs; nobody follows
    them at once. ``warm``: the steps have been run before.
    """
    names = list(steps)
    for name in names if not warm else ():  # warm-up: caches, thread pools, oneDNN's primitives
        until = time.perf_counter() + 0.05 * seconds
        clock(steps[name])
        while time.perf_counter() < until:
            clock(steps[name])
    found: dict[str, list[list[float]]] = {name: [] for name in names}
    with _no_gc():
        begin = time.perf_counter()
        fewest = _FEWEST
        for round_ in range(_MOST):
            spent = time.perf_counter() - begin
            if round_ == 1 and spent > seconds:
                fewest = _FEWEST_SLOW
            if round_ >= fewest and spent > seconds:
                break
            first = names[round_ % len(names)]
            rest = [name for name in names if name != first]
            for name in (first, *random.Random(round_).sample(rest, len(rest))):
                found[name].append(clock(steps[name]))
                if name in own_threads:
                    time.sleep(_PAUSE)
    return found


_PAUSE = 0.02  # seconds
_MEASURED = "the step whose memory counts"


def peak_bytes(step: Step, device: str, *, twice: bool = False) -> int:
    """The most memory held at once beyond what was held before, outputs included, through PyTorch's allocator.

    ``twice``: measures the second of two steps, for those that leave something in place of what was there (packs of
    weights that have changed): on the CPU, what a step frees is known only if it was made under the same profiler.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        for part in step:
            part()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        if twice:
            for part in step:
                part()
        with torch.profiler.record_function(_MEASURED):
            for part in step:
                part()
    assert profile.profiler is not None
    events = sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns())
    begin = next(event.start_ns() for event in events if event.name() == _MEASURED)
    held = peak = before = 0
    for event in events:
        if event.name() == "[memory]":
            held += event.nbytes()
            if event.start_ns() < begin:
                before = held
            peak = max(peak if event.start_ns() >= begin else 0, held - before)
    return peak


def kept_bytes(step: Step) -> int:
    """What a training step's forward leaves for its backward, outputs included, through PyTorch's CUDA allocator."""
    forward, *rest = step
    before = torch.cuda.memory_allocated()
    forward()
    kept = torch.cuda.memory_allocated() - before
    for part in rest:
        part()
    return kept


@contextmanager
def _no_gc() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
