"""Stands in for Core ML where there is no Mac: a worker like `snapgen.export.device`, over a runtime of golden outputs.

    python tests/fake_core_ml.py UNIT=BEHAVIOUR,... REQUEST.json FOLDER

A model takes the inputs that were recorded, refuses others, and gives the outputs that were recorded, as MLModel does:
fp32 numpy arrays by name. Behaviours: noise (40 dB below the peak), nan, shape, abort (while loading), abort_later (in
the compute plan), hang (of the decoder), refuse, no_plan (nor the time that loading took).
"""

import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from safetensors.numpy import load_file

from snapgen.export import device


class MLNeuralEngineComputeDevice: ...


class MLGPUComputeDevice: ...


class MLCPUComputeDevice: ...


class FakeModel:
    last_predict_duration_in_nano_seconds = None

    def __init__(self, package: str, function: str | None, behaviour: str) -> None:
        folder = Path(package).parent
        record = json.loads((folder / "Export.json").read_text())
        (self.part,) = [part for part in record["parts"].values() if Path(package).name in part["packages"]]
        if function is not None and len(self.part["functions"]) == 1:
            raise ValueError('function_name must be "main" for non multifunction model')
        self.calls = self.part["functions"][function or "main"]["golden"]
        self.tensors = load_file(folder / "Golden.safetensors")
        self.behaviour, self.predictions = behaviour, 0
        self.load_duration_in_nano_seconds = None if behaviour == "no_plan" else 1_000

    def predict(self, data: dict) -> dict:
        self.predictions += 1
        self.last_predict_duration_in_nano_seconds = 1_000_000 * self.predictions
        for call in self.calls:
            if all(np.array_equal(self.tensors[tensor], data[name]) for name, tensor in call["inputs"].items()):
                return {name: self.changed(self.tensors[tensor]) for name, tensor in call["outputs"].items()}
        raise KeyError("inputs that were not recorded")

    def changed(self, value: np.ndarray) -> np.ndarray:
        value = value.astype(np.float32)
        if self.behaviour == "noise":
            signs = np.where(np.arange(value.size) % 2, -1.0, 1.0).reshape(value.shape)
            return value + (1e-2 * np.abs(value).max() * signs).astype(np.float32)
        if self.behaviour == "nan":
            return value * np.float32("nan")
        # Rows apart in memory, as Core ML leaves some.
        return value[:, :1] if self.behaviour == "shape" else np.stack((value, value), axis=-1)[..., 0]


class FakePlan:
    """Three convolutions and one sine: the sine on the CPU, and no word about the constant."""

    def __init__(self, function: str) -> None:
        names = ("const", "ios17.conv", "ios17.conv", "ios17.sin", "ios17.conv")
        operations = [SimpleNamespace(operator_name=name, blocks=[]) for name in names]
        block = SimpleNamespace(operations=operations)
        program = SimpleNamespace(functions={function: SimpleNamespace(inputs=[], block=block)})
        self.model_structure = SimpleNamespace(program=program, neuralnetwork=None, pipeline=None)

    def get_compute_device_usage_for_mlprogram_operation(self, operation: SimpleNamespace) -> SimpleNamespace | None:
        if operation.operator_name == "const":
            return None
        sine = operation.operator_name == "ios17.sin"
        chosen = MLCPUComputeDevice() if sine else MLNeuralEngineComputeDevice()
        return SimpleNamespace(preferred_compute_device=chosen, supported_compute_devices=[chosen])

    def get_estimated_cost_for_mlprogram_operation(self, operation: SimpleNamespace) -> SimpleNamespace:
        return SimpleNamespace(weight=0.1 if operation.operator_name == "ios17.sin" else 0.3)


class FakeCoreML:
    def __init__(self, behaviours: dict[str, str]) -> None:
        self.behaviours, self.function = behaviours, "main"

    def load(self, package: str, unit: str, function: str | None) -> FakeModel:
        self.function = function or "main"
        behaviour = self.behaviours.get(unit, "")
        if behaviour == "abort":
            print("error: MLIR pass manager failed", file=sys.stderr, flush=True)
            os.abort()
        if behaviour == "hang" and "VAEDecoder" in package:
            time.sleep(600)
        if behaviour == "refuse":
            raise RuntimeWarning("You will not be able to run predict() on this Core ML model.")
        return FakeModel(package, function, behaviour)

    def plan(self, model: FakeModel, unit: str) -> FakePlan:
        if self.behaviours.get(unit) == "abort_later":
            os.abort()
        if self.behaviours.get(unit) == "no_plan":
            raise RuntimeError("MLComputePlan is only available on macOS >= 14.4")
        return FakePlan(self.function)


if __name__ == "__main__":
    device.main(sys.argv[2:], FakeCoreML(dict(item.split("=") for item in sys.argv[1].split(",") if item)))
