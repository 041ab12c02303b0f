"""OpenVINO on the CPU (optional: pip install openvino): forward only, weights baked in as a user would."""

from __future__ import annotations

import importlib.util
import warnings
from importlib import metadata
from typing import Any

import torch

from bench.models import ModelCase
from bench.providers.exported import exported
from bench.timing import Prepared
from snapgen_kernels.testing import Case


class OpenVino:
    """OpenVINO with PyTorch's thread count and the case's own precision, tuned for latency."""

    name = "openvino"
    in_torch = False

    def __init__(self) -> None:
        self.version = metadata.version("openvino") if importlib.util.find_spec("openvino") else ""

    def absent(self, device: str) -> str | None:
        if device != "cpu":
            return "OpenVINO is timed on the CPU only"
        return None if self.version else "openvino is not installed (pip install openvino)"

    def unfit(self, case: Case | ModelCase, device: str, train: bool) -> str | None:
        if train:
            return "OpenVINO has no backward"
        if case.dtype not in (torch.float32, torch.bfloat16):
            return f"OpenVINO is timed in fp32 and bf16, not {case.dtype}"
        return None

    def prepare(self, case: Case | ModelCase, device: str, train: bool) -> Prepared:
        import openvino

        module, feeds = exported(case)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", torch.jit.TracerWarning)  # shapes are constants, as they are meant to be
            model = openvino.convert_model(module, example_input=feeds)
        # OpenVINO picks a narrower type than the model's where the processor has one, unless told.
        precision = "bf16" if case.dtype == torch.bfloat16 else "f32"
        settings = {
            "INFERENCE_PRECISION_HINT": precision,
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "PERFORMANCE_HINT": "LATENCY",
        }
        request = openvino.compile_model(model, "CPU", settings).create_infer_request()
        for index, value in enumerate(feeds):
            request.set_input_tensor(index, openvino.Tensor(value.numpy(), shared_memory=True))

        def call() -> Any:
            return feeds and request.infer()  # the request reads the feeds' memory and does not keep it alive

        return Prepared(call, outputs=_tensors, whole=isinstance(case, ModelCase))


def _tensors(found: Any) -> tuple[torch.Tensor, ...]:
    return tuple(torch.from_numpy(value) for value in found.values())
