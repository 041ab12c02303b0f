"""``torch.compile`` of the plain PyTorch code, channels_last."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import replace

import torch

from bench.models import ModelCase
from bench.providers import Unusable
from bench.providers.eager import drawn, leaves, plain_model
from bench.timing import Prepared, inference_step, training_step
from snapgen_kernels import _backend
from snapgen_kernels.testing import Case


class Compiled:
    """``torch.compile(eager, mode=...)`` for static shapes, compiled anew for each case (see :func:`release`).

    max-autotune runs without CUDA graphs where events time the device: graphs would copy the inputs besides.
    """

    in_torch = True

    def __init__(self, name: str, mode: str) -> None:
        self.name, self.mode, self.version = name, mode, str(torch.__version__)

    def absent(self, device: str) -> str | None:
        if device == "cpu" and self.mode != "default":
            return "max-autotune is timed on CUDA only"
        return compiler_missing(device)

    def unfit(self, case: Case | ModelCase, device: str, train: bool) -> str | None:
        if isinstance(case, ModelCase) and train and self.mode != "default":
            return (
                "a whole training step is compared with torch.compile's default: tuning all of its products takes long"
            )
        return None

    def prepare(self, case: Case | ModelCase, device: str, train: bool) -> Prepared:
        if isinstance(case, ModelCase):
            # What a user waits for has the processor's time in it, which graphs spare.
            graphs = case.wall and self.mode != "default"
            prepared = replace(plain_model(case, mode="max-autotune" if graphs else self.mode), graphs=graphs)
        else:
            inputs = drawn(case, device, train)
            function = torch.compile(case.spec.eager, mode=self.mode, fullgraph=True, dynamic=False)
            prepared = Prepared(lambda: function(inputs), leaves(case, inputs))
        return runnable(prepared, train)


def compiler_missing(device: str) -> str | None:
    """None if torch.compile has what it needs for the device, else what is missing."""
    if device == "cuda":
        return _backend.triton_reason()
    compiler = os.environ.get("CXX", "g++")
    return None if shutil.which(compiler) else f"torch.compile needs a C++ compiler: {compiler} is not there"


def runnable(prepared: Prepared, train: bool) -> Prepared:
    """``prepared``, compiled: a step has run.

    Raises:
        Unusable: it does not compile.
    """
    try:
        step = training_step(prepared) if train and not prepared.whole else inference_step(prepared)
        for part in step:  # a backward is compiled when it first runs
            part()
    except torch._dynamo.exc.TorchDynamoException as error:
        raise Unusable(f"torch.compile failed: {str(error).strip().splitlines()[0]}") from error
    return prepared


def release() -> None:
    """Forget what was compiled for the last case: dynamo compiles a function for a few shapes only. Not between two
    providers of one case, for the first would compile again while it is timed."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
