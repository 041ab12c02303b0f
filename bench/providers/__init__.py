"""Who is timed. One file per kind; a new one is a class with these members and a line in ``all_providers``."""

from __future__ import annotations

from typing import Protocol

from bench.models import ModelCase
from bench.timing import Prepared
from snapgen_kernels.testing import Case


class Unusable(RuntimeError):
    """A runtime cannot take a case, which shows only when it tries; the message says why."""


class Provider(Protocol):
    """A way to run a case.

    Attributes:
        name: as in ``--providers`` and in the rows.
        version: of the runtime, for the rows.
        in_torch: whether its memory comes from PyTorch's allocator, so that its peak can be told.
    """

    name: str
    version: str
    in_torch: bool

    def absent(self, device: str) -> str | None:
        """None if it can be used on this machine and device, else what is missing."""

    def unfit(self, case: Case | ModelCase, device: str, train: bool) -> str | None:
        """None if it can run this case, else why not."""

    def prepare(self, case: Case | ModelCase, device: str, train: bool) -> Prepared:
        """Inputs and callable; with ``train``, leaves that require gradients.

        Raises:
            Unusable: the runtime cannot take this case after all.
        """


def all_providers() -> dict[str, Provider]:
    """Every provider by name, in the order of the tables."""
    from bench.providers.compiled import Compiled
    from bench.providers.eager import Eager
    from bench.providers.flex import Flex
    from bench.providers.fused import Fused, FusedCompiled
    from bench.providers.liger import Liger
    from bench.providers.onnxruntime import OnnxRuntime
    from bench.providers.openvino import OpenVino
    from bench.providers.sdpa import Sdpa

    everyone: list[Provider] = [
        Fused(),
        FusedCompiled(),
        Fused("fused-low", low_memory=True),
        Eager("eager", "channels_last"),
        Eager("eager-nchw", "contiguous"),
        Compiled("compile", "default"),
        Compiled("compile-max", "max-autotune-no-cudagraphs"),
        Sdpa(),
        Flex(),
        Liger(),
        OpenVino(),
        OnnxRuntime(),
    ]
    return {provider.name: provider for provider in everyone}


NAMES = (
    "fused",
    "fused-compile",
    "fused-low",
    "eager",
    "eager-nchw",
    "compile",
    "compile-max",
    "sdpa",
    "flex",
    "liger",
    "openvino",
    "onnxruntime",
)


def release() -> None:
    """Free what the providers kept of the last case."""
    from bench.providers import compiled, eager

    compiled.release()
    eager.release()
