"""Devices with a Neural Engine: what is published of each, and what is fitted where nothing is.

Peak rates are Apple's own figures, bandwidths those of the memory. Nobody publishes what share of either a model gets
on a phone, so two shares, one for arithmetic and one for memory, the same for every device, are fitted to published
latencies of whole models: `python -m bench.neural_engine` does that and writes them, with every figure's error, to
calibration.json beside this file.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

ON_CHIP_SOURCE = (
    "2 MB: measured on the M1, and in the compiler's tables of all later chips (arXiv 2606.22283, ch. 4, 9)"
)
DISPATCH = 0.23e-3
DISPATCH_SOURCE = "0.23 ms: measured on the M1 (arXiv 2606.22283, ch. 9); taken for every device"

_APPLE = "Apple's figure, by hollance/neural-engine, supported-devices.md"
_INT8 = f"half of the 35 TOPS that Apple states, which from the A17 Pro on counts int8 (maderix/ANE); {_APPLE}"


@dataclass(frozen=True)
class Phone:
    """A device.

    Attributes:
        peak: fp16 FLOP/s of its Neural Engine, as stated by Apple. bandwidth: bytes/s of its memory, whole.
        peak_source, bandwidth_source: where they are published.
    """

    name: str
    chip: str
    peak: float
    bandwidth: float
    peak_source: str
    bandwidth_source: str


PHONES = (
    Phone(
        "iPhone 12 Pro Max",
        "A14",
        11e12,
        34.1e9,
        _APPLE,
        "LPDDR4X-4266 on 64 bits (as the A13's and A15's: topcpu.net)",
    ),
    Phone("iPhone 13 Pro Max", "A15", 15.8e12, 34.1e9, _APPLE, "askgeek.io, A16 against A15"),
    Phone("iPhone 14 Pro", "A16", 17e12, 51.2e9, _APPLE, "askgeek.io, A16 against A15; Apple: half as much again"),
    Phone("iPhone 15 Pro", "A17 Pro", 17.5e12, 51.2e9, _INT8, "LPDDR5-6400 on 64 bits, as the A16"),
    Phone("iPhone 16 Pro Max", "A18 Pro", 17.5e12, 59.9e9, _INT8, "Apple: 17 % above the A17 Pro"),
    Phone("M1", "M1", 11e12, 68.25e9, _APPLE, "Apple, M1 technical specifications"),
    Phone("M2", "M2", 15.8e12, 100e9, _APPLE, "Apple, M2 technical specifications"),
)


@dataclass(frozen=True)
class Shares:
    """What share of a device's peak and of its bandwidth a model gets, fitted; see `calibration`."""

    compute: float
    memory: float


@cache
def calibration() -> dict[str, Any]:
    """The fit: `shares`, `models` (each with its `work`), `figures` (published, estimated, error, fitted or not)."""
    return json.loads(resources.files("snapgen.export").joinpath("calibration.json").read_text(encoding="utf-8"))


def shares() -> Shares:
    """The fitted shares."""
    return Shares(**calibration()["shares"])


def find(name: str) -> Phone:
    """The device of that name.

    Raises:
        ValueError: there is none; names those that there are.
    """
    for phone in PHONES:
        if phone.name.lower() == name.strip().lower():
            return phone
    raise ValueError(f"phone: got {name!r}; allowed are {', '.join(phone.name for phone in PHONES)}")


def seconds(work: Iterable[tuple[int, float, float]], segments: int, phone: Phone, given: Shares) -> float:
    """Time of one prediction: for each step the longer of arithmetic and memory traffic, and the dispatches.

    Args:
        work: (how many, FLOPs, bytes from and to memory) of the steps on the engine.
        segments: runs of operations on the engine, each dispatched by itself.
    """
    compute, memory = phone.peak * given.compute, phone.bandwidth * given.memory
    return segments * DISPATCH + sum(count * max(flops / compute, moved / memory) for count, flops, moved in work)


def ridge(phone: Phone, given: Shares) -> float:
    """FLOPs per byte at which arithmetic and memory take equally long."""
    return phone.peak * given.compute / (phone.bandwidth * given.memory)


def fit(figures: Iterable[tuple[list[tuple[int, float, float]], int, Phone, float]]) -> Shares:
    """The two shares, in steps of 0.01, with the least sum of squared logarithms of estimated over published.

    Args:
        figures: (work, segments, device, published seconds) of each figure that is fitted.
    """
    import numpy as np

    grid = np.arange(0.01, 1.005, 0.01)
    compute, memory = np.meshgrid(grid, grid, indexing="ij")
    loss = np.zeros_like(compute)
    for work, segments, phone, published in figures:
        total = np.full_like(compute, segments * DISPATCH)
        for count, flops, moved in work:
            total += count * np.maximum(flops / (phone.peak * compute), moved / (phone.bandwidth * memory))
        loss += np.log(total / published) ** 2
    best = np.unravel_index(loss.argmin(), loss.shape)
    return Shares(round(float(compute[best]), 2), round(float(memory[best]), 2))
