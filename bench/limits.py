"""What this machine can do at most, measured in the same run: products per second and copied bytes per second."""

from __future__ import annotations

import bisect
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from bench.cases import DTYPE_NAMES, DTYPES, Cost
from bench.timing import Clock
from snapgen_kernels import costs

# Where nothing can be measured (a dry run): an H200 and a 2-core AVX-512 machine, from earlier measurements.
_ASSUMED = {
    "cuda": ({"fp32": 50e12, "bf16": 790e12, "fp16": 790e12}, 4.3e12),
    "cpu": ({"fp32": 190e9, "bf16": 400e9, "fp16": 190e9}, 40e9),
}


@dataclass(frozen=True)
class Limits:
    """Measured rates.

    Attributes:
        gemm: FLOP/s of a square matrix product, by dtype name.
        copy: (bytes moved, bytes/s) of tensor copies, smallest first; a copy of n elements moves 2 n of them. Small
            ones stay in the caches, so that a small case is held to the caches' rate.
        measured: False for a dry run's assumptions.
    """

    gemm: dict[str, float]
    copy: tuple[tuple[int, float], ...]
    measured: bool = True

    def product_rate(self, dtype: torch.dtype) -> float:
        """FLOP/s for a case of this dtype: the better of its own rate and fp32's, since a kernel may widen."""
        return max(self.gemm[DTYPE_NAMES[dtype]], self.gemm["fp32"])

    def copy_rate(self, moved: int) -> float:
        """Bytes/s of a copy that moves this many bytes."""
        sizes = [size for size, _ in self.copy]
        at = bisect.bisect(sizes, max(moved, 1))
        if at == 0 or at == len(sizes):
            return self.copy[min(at, len(sizes) - 1)][1]
        (low, slow), (high, fast) = self.copy[at - 1], self.copy[at]
        share = math.log(moved / low) / math.log(high / low)
        return math.exp((1 - share) * math.log(slow) + share * math.log(fast))

    def of_kernels(self, dtype: torch.dtype) -> costs.Rates:
        """What single GPU kernels are held to: these rates; those of caches and special functions are assumed."""
        copy, usual = self.copy[-1][1], costs.H200
        products = self.gemm[DTYPE_NAMES[dtype]]
        return usual._replace(copy=copy, l2=usual.l2 / usual.copy * copy, products=products, vector=self.gemm["fp32"])

    def floor_ms(self, cost: Cost, dtype: torch.dtype) -> float:
        """The time below which no implementation gets: max(FLOPs / product rate, bytes / copy rate)."""
        return 1e3 * max(cost.flops / self.product_rate(dtype), cost.bytes / self.copy_rate(cost.bytes))


def assumed(device: str) -> Limits:
    """Rates of machines measured earlier, for plans."""
    gemm, copy = _ASSUMED[device]
    return Limits(dict(gemm), ((1 << 28, copy),), measured=False)


def measure(device: str, dtypes: tuple[str, ...], seconds: float = 0.5) -> Limits:
    """Measure products of the dtypes (and of fp32) and copies, about ``seconds`` for each of them.

    The fastest of many repetitions counts: a limit is what can be reached.
    """
    clock = Clock(device)
    gemm = {name: _gemm(DTYPES[name], device, clock, seconds) for name in dict.fromkeys(("fp32", *dtypes))}
    # On a GPU every case starts with a cold cache, so that only the large copy is a limit.
    sizes = (1 << 32,) if device == "cuda" else tuple(1 << power for power in range(20, 30, 2))
    return Limits(gemm, tuple((size, _copy(size, device, clock, seconds / len(sizes))) for size in sizes))


def _gemm(dtype: torch.dtype, device: str, clock: Clock, seconds: float) -> float:
    best, largest = 0.0, 8192 if device == "cuda" else 2048
    side = 256
    while side <= largest:
        # Some processors have no fast product of some dtype: each size is tried only if the last one was quick.
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        out = torch.empty(side, side, device=device, dtype=dtype)
        fastest = _fastest(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), clock, seconds / 3)  # type: ignore[misc]
        best = max(best, 2 * side**3 / fastest)
        if 8 * fastest > seconds / 2:
            break
        side *= 2
    return best


def _copy(moved: int, device: str, clock: Clock, seconds: float) -> float:
    source = torch.ones(moved // 8, device=device)
    target = torch.zeros_like(source)
    return moved / _fastest(lambda: target.copy_(source), clock, seconds)


def _fastest(call: Callable[[], object], clock: Clock, seconds: float) -> float:
    def part() -> None:
        call()

    with torch.inference_mode():
        clock([part])
        (fastest,), end = clock([part]), time.perf_counter() + seconds
        while time.perf_counter() < end:
            fastest = min(fastest, *clock([part]))
    return fastest / 1e3
