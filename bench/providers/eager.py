"""Plain PyTorch, op by op, as a user would write it."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from bench import models
from bench.models import ModelCase
from bench.plain import plain
from bench.timing import Prepared
from snapgen_kernels.checks import leaves_of
from snapgen_kernels.testing import Case, Inputs


def drawn(case: Case, device: str, train: bool) -> Inputs:
    """The case's inputs as ordinary tensors: those made in inference mode tell nobody when they change, so that nothing
    made of a weight could be kept. On a GPU, where all caches are cold anyway, providers share their memory."""
    with torch.inference_mode(False):
        if device == "cpu":
            return case.inputs(device, requires_grad=train)
        shared = _on_device(case, device)
        inputs = {name: value.detach() if isinstance(value, Tensor) else value for name, value in shared.items()}
        for leaf in leaves_of(case, inputs).values():
            leaf.requires_grad_(train)
        return inputs


@lru_cache(maxsize=2)  # both layouts of one case
def _on_device(case: Case, device: str) -> Inputs:
    """Random numbers come from the CPU, seconds of them for a batch."""
    return case.inputs(device)


def release() -> None:
    """Free the inputs that providers share."""
    _on_device.cache_clear()


def plain_model(case: ModelCase, *, layout: str = "channels_last", mode: str | None = None) -> Prepared:
    """A model of plain PyTorch: its forward, or its training step; ``mode``: of torch.compile, None for none."""
    if case.op == "train":
        step = models.training(case, layout=layout, mode=mode)
    else:
        network, activations = models.network_and_feeds(case)
        if layout == "contiguous":
            network = models.contiguous(network, case)
        forward: Any = network if mode is None else models.compiled(network, mode)

        def step() -> Tensor:
            return models.run(forward, activations)

    def call() -> Tensor:
        with plain():
            return step()

    return Prepared(call, whole=True)


def leaves(case: Case, inputs: Inputs) -> tuple[Tensor, ...]:
    """The inputs that gradients are asked of."""
    return tuple(value for value in leaves_of(case, inputs).values() if value.requires_grad)


class Eager:
    """PyTorch with pictures in the given layout: channels_last or contiguous (NCHW)."""

    in_torch = True

    def __init__(self, name: str, layout: str) -> None:
        self.name, self.layout, self.version = name, layout, str(torch.__version__)

    def absent(self, device: str) -> str | None:
        return None

    def unfit(self, case: Case | ModelCase, device: str, train: bool) -> str | None:
        if self.layout == "contiguous" and not isinstance(case, ModelCase) and "W" not in case.dims:
            return "tokens have one layout, which eager is timed in"
        return None

    def prepare(self, case: Case | ModelCase, device: str, train: bool) -> Prepared:
        if isinstance(case, ModelCase):
            return plain_model(case, layout=self.layout)
        inputs = drawn(replace(case, layout=self.layout), device, train)
        return Prepared(lambda: case.spec.eager(inputs), leaves(case, inputs))
