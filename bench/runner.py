"""Check, then time: one case after the other."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import NamedTuple

import numpy
import torch

from bench import models, providers
from bench.agreement import Yardstick
from bench.cases import DTYPE_NAMES, costs, to_check
from bench.limits import Limits
from bench.machine import Provenance
from bench.models import ModelCase
from bench.providers import Provider, Unusable
from bench.providers.fused import strictly
from bench.results import Row
from bench.timing import Clock, Prepared, Step, inference_step, interleaved, kept_bytes, peak_bytes, training_step
from snapgen_kernels import FusedUnavailable, checks
from snapgen_kernels.testing import Case

# fp64 copies of a case and of its gradients have to fit into memory, and to be done in seconds.
_CHECKED_ELEMENTS = {"cpu": 1 << 24, "cuda": 1 << 26}


# Whose results are compared with fp64 before anything is timed; the others' are compared with eager's.
_CHECKED = ("fused", "fused-low")


class Red(Exception):
    """A fused op is wrong on a case; nothing is timed any more."""


@dataclass(frozen=True)
class Plan:
    """What to run. ``seconds`` are spent on each case and mode; no case starts after ``deadline`` seconds, and no
    provider that would not be ready by then; nor a case of an op whose forward alone takes PyTorch ``patience``
    seconds: some processors have no fast product of some dtype."""

    device: str
    cases: Sequence[Case | ModelCase]
    modes: tuple[str, ...]
    providers: list[Provider]
    seconds: float
    deadline: float | None = None
    patience: float = math.inf


@dataclass
class Outcome:
    """Rows measured so far, and what is missing: (case, provider, reason)."""

    rows: list[Row] = field(default_factory=list)
    missing: list[tuple[str, str, str]] = field(default_factory=list)


Report = Callable[[Case | ModelCase, list[Row]], None]


class Budget:
    """The time until the deadline, and who would pass it."""

    def __init__(self, deadline: float | None, begun: float) -> None:
        self.deadline, self.begun = deadline, begun
        self._longest: dict[str, float] = {}

    def over(self) -> str | None:
        """None before the deadline, else a reason."""
        if self.deadline is None or time.perf_counter() - self.begun <= self.deadline:
            return None
        return f"left out: the {self.deadline:g} s were over"

    def refuses(self, provider: str, compiled: float) -> str | None:
        """None if ``provider`` may get ready: it is guessed to take as long as it ever did, and max-autotune three
        times as long as the default took of the same case, ``compiled`` seconds. Else the reason."""
        guess = max(self._longest.get(provider, 0.0), 3 * compiled if provider == "compile-max" else 0.0)
        if self.deadline is None or time.perf_counter() - self.begun + guess <= self.deadline:
            return None
        return f"left out: it takes about {guess:.0f} s to get ready, and the {self.deadline:g} s would be over"

    def took(self, provider: str, seconds: float) -> None:
        self._longest[provider] = max(seconds, self._longest.get(provider, 0.0))


def run(plan: Plan, limits: Limits, provenance: Provenance, report: Report, begun: float | None = None) -> Outcome:
    """Check and time every case, reporting each one's rows as soon as they are there.

    Args:
        begun: from when on the deadline counts, by ``time.perf_counter``; None: now.

    Raises:
        Red: a fused op misses the bound; the message names the case and the numbers.
    """
    outcome, clock = Outcome(), Clock(plan.device)
    budget = Budget(plan.deadline, time.perf_counter() if begun is None else begun)
    for case in plan.cases:
        if (reason := budget.over()) is not None:
            outcome.missing.append((str(case), "all", reason))
            continue
        if not isinstance(case, ModelCase):
            forward = costs(case)["fwd"].flops / limits.gemm[DTYPE_NAMES[case.dtype]]
            if forward > plan.patience:
                outcome.missing.append((str(case), "all", f"left out: one forward takes PyTorch {forward:.1f} s here"))
                continue
        elif case.mode not in plan.modes:
            continue
        checked = _checked(case, plan)
        rows: list[Row] = []
        for mode in plan.modes:
            if not isinstance(case, ModelCase) or mode == case.mode:
                rows += _time(case, mode, plan, clock, limits, provenance, checked, outcome, budget)
        models.release()
        providers.release()
        outcome.rows += rows
        report(case, rows)
    return outcome


def _checked(case: Case | ModelCase, plan: Plan) -> str:
    if not any(p.name == "fused" and p.unfit(case, plan.device, False) is None for p in plan.providers):
        return "no kernel"
    try:
        return check(case, plan)
    except FusedUnavailable:  # this op has a kernel, but not for this dtype; the reason is shown when it is timed
        return "no kernel"


def check(case: Case | ModelCase, plan: Plan) -> str:
    """Compare the fused op or model with fp64: outputs, and all gradients where training is timed.

    Returns what was compared: ``same shape``, or the size of the smaller pictures.

    Raises:
        Red: it misses the bound.
        FusedUnavailable: no kernel takes this case.
    """
    if isinstance(case, ModelCase):
        try:
            return models.check(case)
        except AssertionError as error:
            raise Red(str(error)) from error
    smaller = to_check(case, _CHECKED_ELEMENTS[plan.device])
    try:
        checks.check_values(smaller, plan.device, lambda inputs: strictly(smaller, inputs))
        if "train" in plan.modes:
            checks.check_gradients(smaller, plan.device, lambda inputs: strictly(smaller, inputs))
    except AssertionError as error:
        raise Red(f"{case}: {error}") from error
    return "same shape" if smaller is case else "at " + "x".join(str(smaller.dims[n]) for n in ("B", "H", "W"))


def _time(
    case: Case | ModelCase,
    mode: str,
    plan: Plan,
    clock: Clock,
    limits: Limits,
    provenance: Provenance,
    checked: str,
    outcome: Outcome,
    budget: Budget,
) -> list[Row]:
    train = mode == "train"
    if isinstance(case, ModelCase) and case.wall:
        clock = Clock(plan.device, wall=True)
    ready: dict[str, _Ready] = {}
    samples: dict[str, list[list[float]]] = {}
    # Weights, moments and averages of several providers beside one's activations are more than a GPU holds.
    alone = plan.device == "cuda" and train and isinstance(case, ModelCase)
    yardstick = Yardstick(case, plan.device, train)
    compiled = 0.0
    with torch.inference_mode(not train):
        for provider in plan.providers:
            reason = provider.unfit(case, plan.device, train) or budget.refuses(provider.name, compiled)
            if reason is None:
                before = time.perf_counter()
                try:
                    ready[provider.name], own = _ready(provider, case, plan, train, clock, yardstick, alone)
                    samples |= own
                    budget.took(provider.name, time.perf_counter() - before)
                    if provider.name == "compile":
                        compiled = time.perf_counter() - before
                except (FusedUnavailable, Unusable) as error:
                    reason = str(error)
                except torch.OutOfMemoryError as error:
                    reason = f"out of memory: {str(error).splitlines()[0]}"
                if plan.device == "cuda":  # what is gone makes room for the next one
                    gc.collect()
                    torch.cuda.empty_cache()
            if reason is not None:
                outcome.missing.append((f"{case} {mode}", provider.name, reason))
        del yardstick  # its tensors would take memory from those that are timed
        if ready and not alone:
            samples = interleaved(
                {name: found.step for name, found in ready.items()},
                clock,
                plan.seconds,
                own_threads=[p.name for p in plan.providers if not p.in_torch],
                warm=isinstance(case, ModelCase),
            )
    cost, rows = costs(case), []
    versions = {provider.name: provider.version for provider in plan.providers}
    for row_mode, pick in _parts(case, mode).items():
        for name, times in samples.items():
            p20, p50, p80 = numpy.quantile([pick(parts) for parts in times], (0.2, 0.5, 0.8)).tolist()
            rows.append(
                Row(
                    op=case.op,
                    case=case.name,
                    dtype=DTYPE_NAMES[case.dtype],
                    mode=row_mode,
                    provider=name,
                    p20_ms=p20,
                    p50_ms=p50,
                    p80_ms=p80,
                    repeats=len(times),
                    flops=cost[row_mode].flops,
                    bytes=cost[row_mode].bytes,
                    floor_ms=limits.floor_ms(cost[row_mode], case.dtype),
                    gemm_gflops=limits.product_rate(case.dtype) / 1e9,
                    copy_gbs=limits.copy_rate(cost[row_mode].bytes) / 1e9,
                    peak_bytes=ready[name].kept if row_mode == "bwd" else ready[name].peak,
                    checked=checked,
                    provider_version=versions[name],
                    **asdict(provenance),
                )
            )
    return rows


class _Ready(NamedTuple):
    """A provider's step, its peak memory, and what its forward leaves for its backward; -1: not known."""

    step: Step
    peak: int
    kept: int


def _ready(
    provider: Provider,
    case: Case | ModelCase,
    plan: Plan,
    train: bool,
    clock: Clock,
    yardstick: Yardstick,
    alone: bool,
) -> tuple[_Ready, dict[str, list[list[float]]]]:
    """Prepare, compile and compare with eager, and measure the memory of a provider; ``alone``: time it at once, and
    let its step go."""
    prepared = provider.prepare(case, plan.device, train)
    if provider.name in _CHECKED:
        prepared.call()
    else:
        yardstick.check(prepared)  # compilers compile now
    step = training_step(prepared) if train and not prepared.whole else inference_step(prepared)
    if not prepared.whole or not provider.in_torch:
        clock(step)
    peak = _peak(prepared, step, plan.device, train) if provider.in_torch else -1
    kept = kept_bytes(step) if clock.cuda and train and not prepared.whole else -1
    if not alone:
        return _Ready(step, peak, kept), {}
    return _Ready((), peak, kept), interleaved({provider.name: step}, clock, plan.seconds / 4, warm=True)


def _peak(prepared: Prepared, step: Step, device: str, train: bool) -> int:
    """Peak memory of a step, -1 where it cannot be told."""
    if prepared.graphs:
        if prepared.ungraphed is None:
            return -1
        step = inference_step(replace(prepared, call=prepared.ungraphed))
        # As it was recorded: in another mode torch.compile would compile once more.
        with torch.inference_mode(False), torch.no_grad():
            for part in step:  # what is packed once is no part of it
                part()
            return peak_bytes(step, device)
    return peak_bytes(step, device, twice=train and prepared.whole)


def _parts(case: Case | ModelCase, mode: str) -> dict[str, Callable[[list[float]], float]]:
    """The rows of a mode, each with its time among those of a step's parts."""
    return {case.row_mode: sum} if isinstance(case, ModelCase) else _PARTS[mode]


_PARTS: dict[str, dict[str, Callable[[list[float]], float]]] = {
    "fwd": {"fwd": sum},
    "train": {"bwd": lambda parts: parts[1], "fwd+bwd": sum},
}
