"""Images in bands: what is between two kernels then stays in the L2 cache, or takes little memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor


class Plan(NamedTuple):
    """``samples`` samples at a time, or ``rows`` rows of one sample."""

    samples: int
    rows: int


class Band(NamedTuple):
    """Samples ``first`` to ``last``, and their rows ``top`` to ``bottom``: of several samples it is always whole."""

    first: int
    last: int
    top: int
    bottom: int

    def of(self, image: Tensor) -> Tensor:
        """The band of ``image`` [B, C, H, W]."""
        return image[self.first : self.last, :, self.top : self.bottom]

    def with_neighbours(self, height: int) -> Band:
        """And the row above and the one below, where an image of ``height`` rows has them."""
        return self._replace(top=max(self.top - 1, 0), bottom=min(self.bottom + 1, height))


def bands(plan: Plan, batch: int, height: int) -> Iterator[Band]:
    """The bands of a plan, in order."""
    for first in range(0, batch, plan.samples):
        for top in range(0, height, plan.rows):
            yield Band(first, min(first + plan.samples, batch), top, min(top + plan.rows, height))


def plan_for(batch: int, height: int, row: int, room: int, multiple: int = 1) -> Plan:
    """As many samples as have ``room`` bytes at ``row`` bytes a row; where one has not, so many rows of it, a multiple
    of ``multiple``."""
    samples = room // (row * height)
    if samples > 0 or height <= multiple:
        return Plan(min(max(samples, 1), batch), height)
    return Plan(1, max(multiple, room // row // multiple * multiple))
