"""ONNX Runtime on the CPU (optional: pip install onnxruntime onnx): forward only, fp32, weights baked in."""

from __future__ import annotations

import importlib.util
import tempfile
import warnings
from importlib import metadata
from typing import Any

import torch

from bench.models import ModelCase
from bench.providers import Unusable
from bench.providers.exported import exported
from bench.timing import Prepared
from snapgen_kernels.checks import outputs_of
from snapgen_kernels.testing import Case

_OPSET = 18  # the last one whose exporter in PyTorch needs no package besides onnx


def _rms_norm(graph: Any, x: Any, shape: Any, weight: Any, eps: Any) -> Any:
    """RMSNorm over the last axis, which ONNX has as one operator only from a later opset on."""
    axis = graph.op("Constant", value_t=torch.tensor([-1]))
    mean = graph.op("ReduceMean", graph.op("Mul", x, x), axis, keepdims_i=1)
    return graph.op("Mul", graph.op("Div", x, graph.op("Sqrt", graph.op("Add", mean, eps))), weight)


class OnnxRuntime:
    """ONNX Runtime's CPU provider with PyTorch's thread count."""

    name = "onnxruntime"
    in_torch = False

    def __init__(self) -> None:
        self.version = metadata.version("onnxruntime") if importlib.util.find_spec("onnxruntime") else ""

    def absent(self, device: str) -> str | None:
        if device != "cpu":
            return "ONNX Runtime is timed on the CPU only"
        missing = [name for name in ("onnxruntime", "onnx") if importlib.util.find_spec(name) is None]
        return f"not installed: {', '.join(missing)} (pip install onnxruntime onnx)" if missing else None

    def unfit(self, case: Case | ModelCase, device: str, train: bool) -> str | None:
        if train:
            return "ONNX Runtime has no backward in its inference package"
        if case.dtype != torch.float32:
            return "ONNX Runtime's CPU provider computes these ops in fp32 only"
        return None

    def prepare(self, case: Case | ModelCase, device: str, train: bool) -> Prepared:
        import onnxruntime

        module, feeds = exported(case)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        names = [f"in_{index}" for index in range(len(feeds))]
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # the TorchScript exporter announces its successor, which needs onnxscript
            file = f"{folder}/case.onnx"
            torch.onnx.register_custom_op_symbolic("aten::rms_norm", _rms_norm, _OPSET)
            try:
                torch.onnx.export(module, feeds, file, dynamo=False, opset_version=_OPSET, input_names=names)
            except torch.onnx.OnnxExporterError as error:
                raise Unusable(f"export to ONNX failed: {str(error).strip().splitlines()[0]}") from error
            results = outputs_of(module(*feeds))
            session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        binding = session.io_binding()
        for name, value in zip(names, feeds, strict=True):
            binding.bind_cpu_input(name, value.numpy())
        for output in session.get_outputs()[: len(results)]:
            binding.bind_output(output.name)

        def call() -> Any:
            session.run_with_iobinding(binding)
            return feeds and binding.get_outputs()  # the session reads the feeds' memory and does not keep it alive

        return Prepared(call, outputs=_tensors, whole=isinstance(case, ModelCase))


def _tensors(found: Any) -> tuple[torch.Tensor, ...]:
    return tuple(torch.from_numpy(value.numpy()) for value in found)
