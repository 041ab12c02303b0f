"""The fused ops themselves, in strict mode: a call that would fall back to PyTorch is not timed."""

from __future__ import annotations

import torch

import snapgen_kernels
from bench import models
from bench.blocks import BlockCase
from bench.models import ModelCase
from bench.providers.eager import drawn, leaves
from bench.timing import Prepared
from snapgen_kernels import _backend
from snapgen_kernels.testing import Case, Inputs


def strictly(case: Case, inputs: Inputs) -> object:
    """The public function of the case's op under ``use("fused")``."""
    with snapgen_kernels.use("fused"):
        return case.spec.public(inputs)


def _model(case: ModelCase, low_memory: bool | None) -> Prepared:
    if case.op == "train":
        step = models.training(case)
    else:
        network, activations = models.network_and_feeds(case)
        graph = models.recorded(network) if case.device == "cuda" else None

        def step() -> torch.Tensor:
            if graph is not None:
                return graph(activations)
            return models.run_fused(network, activations, low_memory=low_memory)

    def call() -> torch.Tensor:
        with snapgen_kernels.use("auto"):
            return step()

    return Prepared(call, whole=True)


class Fused:
    """``snapgen_kernels`` under ``use("fused")``; whole models as users run them, under ``use("auto")``, without
    gradients on a GPU as CUDA graphs."""

    in_torch = True

    def __init__(self, name: str = "fused", *, low_memory: bool | None = None) -> None:
        from importlib import metadata

        self.name, self.low_memory = name, low_memory

        try:
            self.version = metadata.version("snapgen")
        except metadata.PackageNotFoundError:
            self.version = "source"

    def absent(self, device: str) -> str | None:
        return None

    def unfit(self, case: Case | ModelCase, device: str, train: bool) -> str | None:
        if self.low_memory and (case.op != "decoder" or device == "cuda"):
            return "only the decoder has a low-memory mode, on CPUs"
        if isinstance(case, ModelCase):
            return _backend.missing_kernel("resblock", device)
        ops = case.ops if isinstance(case, BlockCase) else (case.op,)
        reasons = (_backend.missing_kernel(op, device) for op in ops)
        return next((reason for reason in reasons if reason is not None), None)

    def prepare(self, case: Case | ModelCase, device: str, train: bool) -> Prepared:
        if isinstance(case, ModelCase):
            return _model(case, self.low_memory)
        inputs = drawn(case, device, train)
        return Prepared(lambda: strictly(case, inputs), leaves(case, inputs))
