"""What a GPU alone takes for a call, by events, with cold caches.

A GPU works through a queue. Before a call the caches are overwritten (written, so that what is timed also pays for
making room, as with Triton's ``do_bench``), again and again until the processor has queued the whole call by the time
that the GPU gets to it: else the span would hold the processor's own time wherever kernels are short.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from weakref import WeakKeyDictionary

import torch

MOST_FLUSHES = 64  # some ms; a call that takes longer to queue waits for the device inside
_SCRATCH = 1 << 28  # bytes: twice the L2 cache of the largest GPUs of today

Call = Callable[[], object]


class DeviceTimer:
    """Queues calls between events; remembers for each how many flushes it takes."""

    def __init__(self, device: torch.device | str = "cuda") -> None:
        self._scratch = torch.empty(_SCRATCH, dtype=torch.int8, device=device)
        self._flushes: WeakKeyDictionary[Call, int] = WeakKeyDictionary()

    def queue(self, call: Call) -> tuple[torch.cuda.Event, torch.cuda.Event, bool]:
        """Queue one call; the events around it, and False where it is to be timed again behind twice as many
        flushes."""
        flushes = self._flushes.setdefault(call, 1)
        for _ in range(flushes):
            self._scratch.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        late = start.query()  # the device is there already
        end.record()
        if not late or flushes >= MOST_FLUSHES:
            return start, end, True
        self._flushes[call] = 2 * flushes
        return start, end, False

    def median(self, call: Call, *, fewest: int = 5, most: int = 100, ms: float = 50.0) -> float:
        """Median ms of a call, which is made once before: of so many repetitions as take about ``ms``."""
        call()
        times: list[float] = []
        while len(times) < fewest or (len(times) < most and sum(times) < ms):
            start, end, in_time = self.queue(call)
            torch.cuda.synchronize()
            if in_time:
                times.append(start.elapsed_time(end))
        return statistics.median(times)
