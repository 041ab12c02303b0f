"""The fused ops themselves, in strict mode: a call that would fall back to PyTorch is not timed."""

from __future__ import annotations

from collections.abc import Callable

import torch

import snapgen_kernels
from bench import models
from bench.blocks import BlockCase
from bench.models import ModelCase
from bench.providers.compiled import compiler_missing, runnable
from bench.providers.eager import drawn, leaves
from bench.timing import Prepared
from snapgen_kernels import _backend
from snapgen_kernels.testing import Case, Inputs


def strictly(case: Case, inputs: Inputs) -> object:
    """The public function of the case's op under ``use("fused")``."""
    with snapgen_kernels.use("fused"):
        return case.spec.public(inputs)


def _model(case: ModelCase, *, low_memory: bool | None = None, compiled: bool = False) -> Prepared:
    """A forward, or a training step; ``compiled``: what is no fused op goes to torch.compile."""

    def fused(step: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        def call() -> torch.Tensor:
            with snapgen_kernels.use("auto"):
                return step()

        return call

    if case.op == "train":
        return Prepared(fused(models.training(case, mode="default" if compiled else None)), whole=True)
    network, activations = models.network_and_feeds(case)
    run = models.fused(network, low_memory=low_memory, compiled=compiled)
    plain = fused(lambda: run(*activations))
    if case.device != "cuda":
        return Prepared(plain, whole=True)
    graph = models.fused(network, low_memory=low_memory, compiled=compiled, graph=True)
    return Prepared(fused(lambda: graph(*activations)), whole=True, graphs=True, ungraphed=plain)


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
        if self.low_memory and case.op != "decoder":
            return "only the decoder has a low-memory mode"
        if isinstance(case, ModelCase):
            return _backend.missing_kernel("resblock", device)
        ops = case.ops if isinstance(case, BlockCase) else (case.op,)
        reasons = (_backend.missing_kernel(op, device) for op in ops)
        return next((reason for reason in reasons if reason is not None), None)

    def prepare(self, case: Case | ModelCase, device: str, train: bool) -> Prepared:
        if isinstance(case, ModelCase):
            return _model(case, low_memory=self.low_memory)
        inputs = drawn(case, device, train)
        return Prepared(lambda: strictly(case, inputs), leaves(case, inputs))


class FusedCompiled(Fused):
    """Whole models under ``use("auto")`` inside torch.compile, which joins what stands between the fused ops."""

    def __init__(self) -> None:
        super().__init__("fused-compile")

    def absent(self, device: str) -> str | None:
        return compiler_missing(device)

    def unfit(self, case: Case | ModelCase, device: str, train: bool) -> str | None:
        if not isinstance(case, ModelCase) or case.op == "decoder":
            return "only denoisers and training have something between the fused ops"
        return super().unfit(case, device, train)

    def prepare(self, case: Case | ModelCase, device: str, train: bool) -> Prepared:
        assert isinstance(case, ModelCase)
        return runnable(_model(case, compiled=True), train)
