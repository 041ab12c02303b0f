"""Random numbers that depend on a seed and a place in a run alone: nothing has to be saved to go on from there."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from snapgen.devices import sent


def generator(seed: int, index: int, stream: int = 0) -> torch.Generator:
    """A CPU generator for place `index` of the run with this `seed`.

    PyTorch's CPU generator reads only the low 32 bits of its seed, so both are mixed into these: seeds are 2^32 / phi
    apart, which keeps the ranges of different seeds from meeting.

    Args:
        stream: places of different streams have nothing in common.
    """
    place = seed * 0x9E3779B1 + index
    if stream:
        # One round of splitmix64 over both, so that streams do not follow each other at a distance.
        place = (place + stream * 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        place = ((place ^ (place >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        place = ((place ^ (place >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        place ^= place >> 31
    return torch.Generator().manual_seed(place & 0xFFFFFFFF)


class Draws:
    """Random numbers for the samples of a batch, each sample's own.

    What sample number p of a run draws depends on (seed, p) and on what it drew before, not on the batch or the process
    that it is in: a run is the same on one process and on many.

    Args:
        seed: of the run. step: number of the optimizer step.
        positions: of the batch's samples in the run.
        device: where results go. They are made on the CPU, so that every device draws the same.
        phase: of the step; each has numbers of its own.
    """

    def __init__(
        self, seed: int, step: int, positions: Sequence[int], device: torch.device | str = "cpu", phase: int = 0
    ) -> None:
        self.device, self.step = device, step
        self._samples = [generator(seed, position, 2 * phase + 1) for position in positions]
        self._step = generator(seed, step, 2 * phase + 2)

    def __len__(self) -> int:
        return len(self._samples)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers [B, *shape], fp32."""
        return self._stacked([torch.randn(shape, generator=own) for own in self._samples])

    def uniform(self, *shape: int) -> Tensor:
        """Uniform numbers in [0, 1), [B, *shape], fp32."""
        return self._stacked([torch.rand(shape, generator=own) for own in self._samples])

    def chosen(self, share: float) -> list[bool]:
        """For each sample whether it is among this share of all."""
        return [bool(torch.rand((), generator=own) < share) for own in self._samples]

    def common(self, *shape: int) -> Tensor:
        """Uniform numbers in [0, 1), of this shape, on the CPU: the same for all samples of the step."""
        return torch.rand(shape, generator=self._step)

    def _stacked(self, drawn: list[Tensor]) -> Tensor:
        return sent(torch.stack(drawn), self.device)
