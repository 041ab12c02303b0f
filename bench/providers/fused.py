"""The fused ops themselves, in strict mode: a call that would fall back to PyTorch is not timed."""

from __future__ import annotations

import snapgen_kernels
from bench.providers.eager import leaves
from bench.timing import Prepared
from snapgen_kernels import _backend
from snapgen_kernels.testing import Case, Inputs


def strictly(case: Case, inputs: Inputs) -> object:
    """The public function of the case's op under ``use("fused")``."""
    with snapgen_kernels.use("fused"):
        return case.spec.public(inputs)


class Fused:
    """``snapgen_kernels`` under ``use("fused")``."""

    name = "fused"
    in_torch = True

    def __init__(self) -> None:
        from importlib import metadata

        try:
            self.version = metadata.version("snapgen")
        except metadata.PackageNotFoundError:
            self.version = "source"

    def absent(self, device: str) -> str | None:
        return None

    def unfit(self, case: Case, device: str, train: bool) -> str | None:
        return _backend.missing_kernel(case.op, device)

    def prepare(self, case: Case, device: str, train: bool) -> Prepared:
        inputs = case.inputs(device, requires_grad=train)
        return Prepared(lambda: strictly(case, inputs), leaves(case, inputs))
