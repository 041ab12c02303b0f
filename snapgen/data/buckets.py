"""Aspect-ratio buckets: pictures keep their shape, and every batch holds pictures of one shape.

The paper does not say how it trains on pictures that are not square. This is our choice: sizes whose sides are
multiples of a unit and whose area is nearly `resolution` squared (as SDXL has them, section 2.3), a picture goes to the
size that is nearest in aspect ratio, and the order of batches is a function of (seed, step) alone.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from snapgen import seeds

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

NONE = -1  # the bucket of what is never drawn


class Size(NamedTuple):
    """Pixels of a bucket's pictures."""

    height: int
    width: int


@dataclass(frozen=True, kw_only=True)
class Buckets:
    """Sizes near `resolution` x `resolution` pixels.

    Args:
        resolution: side of the square; the area of all sizes is near its square.
        unit: every side is a multiple of this; 8 times 2 for each downsampling of the denoiser (32 for three stages).
        ratio: the longer side is at most this many times the shorter.

    Raises:
        ValueError: an argument does not fit.
    """

    resolution: int
    unit: int = 32
    ratio: float = 2.0

    def __post_init__(self) -> None:
        if self.unit < 1:
            raise ValueError(f"unit: got {self.unit}; must be at least 1")
        if self.resolution < 1 or self.resolution % self.unit:
            raise ValueError(f"resolution: got {self.resolution}; must be a multiple of unit, {self.unit}")
        if not (math.isfinite(self.ratio) and self.ratio >= 1):
            raise ValueError(f"ratio: got {self.ratio}; must be at least 1 and finite")

    @cached_property
    def sizes(self) -> tuple[Size, ...]:
        """From tall to wide. The square is one of them, and with each size there is the same turned by a quarter."""
        wide, square = [], self.resolution // self.unit
        for height in range(square, 0, -1):
            width = math.floor(square * square / height + 0.5)  # nearest to the budget; no rounding to even
            if width <= self.ratio * height:
                wide.append((height, width))
        tall = [(width, height) for height, width in wide if width != height]
        return tuple(Size(height * self.unit, width * self.unit) for height, width in (*tall[::-1], *wide))

    def nearest(self, height: int, width: int) -> int:
        """Index of the size nearest in aspect ratio, by its logarithm; of two equally near ones the first.

        Raises:
            ValueError: a side is less than 1.
        """
        if min(height, width) < 1:
            raise ValueError(f"picture: got {height}x{width} pixels; sides must be at least 1")
        distances = [abs(math.log(size.width * height / (size.height * width))) for size in self.sizes]
        return distances.index(min(distances))


def covering(height: int, width: int, size: Size) -> tuple[float, float, float, float]:
    """The box (left, top, right, bottom) that is cut from the middle of a picture of height x width pixels, as large
    as it can be at the aspect ratio of `size`."""
    scale = min(height / size.height, width / size.width)
    cut_height, cut_width = scale * size.height, scale * size.width
    left, top = (width - cut_width) / 2, (height - cut_height) / 2
    return (max(0.0, left), max(0.0, top), min(left + cut_width, float(width)), min(top + cut_height, float(height)))


def fitted(picture: Image.Image, size: Size) -> Image.Image:
    """The middle of a picture at `size`, resampled by Lanczos."""
    from PIL import Image

    box = covering(picture.height, picture.width, size)
    return picture.resize((size.width, size.height), Image.Resampling.LANCZOS, box=box)


# --- the order of batches -------------------------------------------------------------------------------------------


class BucketOrder:
    """Which samples step n trains on, a function of (seed, n) alone.

    Every bucket is an endless sequence of its samples, shuffled anew in every pass through it, cut into batches.
    Over e epochs a bucket of m samples has given floor(e m / batch_size) batches, so that small buckets, too, are drawn
    as often as their share of the samples says, and none is filled up with repeats. The batches of an epoch come in
    random order.

    Args:
        buckets: the bucket of every sample; those of a negative one are never drawn.
        batch_size: samples of an optimizer step.

    Raises:
        ValueError: there is no sample to draw.
    """

    def __init__(self, buckets: Sequence[int], batch_size: int, seed: int) -> None:
        import torch

        ids = torch.as_tensor(buckets)
        self.members = {int(n): (ids == n).nonzero()[:, 0] for n in ids.unique().tolist() if n >= 0}
        if not self.members:
            raise ValueError("data: the dataset is empty")
        self.batch_size, self.seed = batch_size, seed
        self._orders: dict[int, tuple[int, Tensor]] = {}
        self._epoch: tuple[int, int, list[tuple[int, int]]] = (-1, 0, [])

    def steps(self, epochs: int) -> int:
        """Optimizer steps in this many epochs."""
        return sum(epochs * len(own) // self.batch_size for own in self.members.values())

    def __call__(self, step: int) -> tuple[int, list[int]]:
        """The bucket of a step and its `batch_size` samples."""
        bucket, turn = self._turn(step)
        own = self.members[bucket]
        chosen: list[int] = []
        place = turn * self.batch_size
        while len(chosen) < self.batch_size:
            passes, offset = divmod(place + len(chosen), len(own))
            missing = self.batch_size - len(chosen)
            chosen += own[self._order(bucket, passes)[offset : offset + missing]].tolist()
        return bucket, chosen

    def _turn(self, step: int) -> tuple[int, int]:
        """The bucket of a step, and how many batches of it came before."""
        import torch

        epoch, first, batches = self._epoch
        if not first <= step < first + len(batches):
            # The epoch e for which steps(e) <= step < steps(e + 1): the number of e > 0 with steps(e) <= step.
            most = 1 + (step + len(self.members)) * self.batch_size // sum(map(len, self.members.values()))
            epoch = bisect_right(range(1, most + 1), step, key=self.steps)
            first, batches = self.steps(epoch), []
            for bucket, own in self.members.items():
                turns = range(epoch * len(own) // self.batch_size, (epoch + 1) * len(own) // self.batch_size)
                batches += [(bucket, turn) for turn in turns]
            mixed = torch.randperm(len(batches), generator=seeds.generator(self.seed, epoch)).tolist()
            batches = [batches[n] for n in mixed]
            self._epoch = (epoch, first, batches)
        return batches[step - first]

    def _order(self, bucket: int, turn: int) -> Tensor:
        """The order of a bucket's samples in a pass through it."""
        import torch

        known, order = self._orders.get(bucket, (-1, None))
        if order is None or known != turn:
            # Negative streams are ours: those of `seeds.Draws` are positive.
            generator = seeds.generator(self.seed, turn, -1 - bucket)
            order = torch.randperm(len(self.members[bucket]), generator=generator)
            self._orders[bucket] = (turn, order)
        return order
