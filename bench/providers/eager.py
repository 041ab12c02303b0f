"""Plain PyTorch, op by op, as a user would write it."""

from __future__ import annotations

from dataclasses import replace

import torch

from bench.timing import Prepared
from snapgen_kernels.checks import leaves_of
from snapgen_kernels.testing import Case, Inputs


def leaves(case: Case, inputs: Inputs) -> tuple[torch.Tensor, ...]:
    """The inputs that gradients are asked of."""
    return tuple(value for value in leaves_of(case, inputs).values() if value.requires_grad)


class Eager:
    """PyTorch with pictures in the given layout: channels_last or contiguous (NCHW)."""

    in_torch = True

    def __init__(self, name: str, layout: str) -> None:
        self.name, self.layout, self.version = name, layout, str(torch.__version__)

    def absent(self, device: str) -> str | None:
        return None

    def unfit(self, case: Case, device: str, train: bool) -> str | None:
        if self.layout == "contiguous" and "W" not in case.dims:
            return "tokens have one layout, which eager is timed in"
        return None

    def prepare(self, case: Case, device: str, train: bool) -> Prepared:
        inputs = replace(case, layout=self.layout).inputs(device, requires_grad=train)
        return Prepared(lambda: case.spec.eager(inputs), leaves(case, inputs))
