"""One figure of a peer that can be called in several ways: the fastest of those that are right."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Mapping

from bench.agreement import Yardstick
from bench.providers import Unusable
from bench.timing import Clock, Prepared, inference_step, training_step
from snapgen_kernels.testing import Case

_ROUNDS = 5  # of each candidate


def fastest(
    candidates: Mapping[str, Prepared], case: Case, device: str, train: bool, what: str
) -> tuple[str, Prepared]:
    """The name of the fastest candidate that takes the case and agrees with eager, and the candidate.

    Args:
        candidates: by the names that stand in the rows.
        what: they are, for the message where none is left.

    Raises:
        Unusable: none is.
    """
    clock, yardstick = Clock(device), Yardstick(case, device, train)
    times: dict[str, float] = {}
    reasons: list[str] = []
    for name, prepared in candidates.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # PyTorch says at length why a kernel does not take a call
                yardstick.check(prepared)
                step = training_step(prepared) if train else inference_step(prepared)
                clock(step)
                times[name] = statistics.median(sum(clock(step)) for _ in range(_ROUNDS))
        except RuntimeError as error:  # no such kernel, wrong, not to be compiled, or not enough memory for it
            reasons.append(f"{name}: {(str(error).strip() or repr(error)).splitlines()[0]}")
    if not times:
        raise Unusable(f"none of {what} takes it: {'; '.join(reasons)}")
    best = min(times, key=lambda name: times[name])
    return best, candidates[best]
