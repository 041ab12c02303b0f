"""Core ML itself, for which a Mac is needed: one function of a part on one compute unit, in a process of its own.

    python -m snapgen.export.device REQUEST.json FOLDER

`snapgen.export.verify` starts it, since a compute unit may abort the process (ultralytics pull request 24885) or never
return (apple/coremltools issue 2367), and reads what it left in FOLDER: `result.json`, written again after each stage,
and `outputs.safetensors`, output NAME of call I as `I.NAME`.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from snapgen.export.tools import coremltools

UNITS = ("CPU_ONLY", "CPU_AND_GPU", "CPU_AND_NE", "ALL")  # names of coremltools.ComputeUnit
WARM_UP = 3  # predictions that are not timed
DEVICES = {
    "MLNeuralEngineComputeDevice": "Neural Engine",
    "MLGPUComputeDevice": "GPU",
    "MLCPUComputeDevice": "CPU",
}


class CoreML:
    """The calls of coremltools 9 that work on macOS only."""

    def load(self, package: str, unit: str, function: str | None) -> Any:
        """An MLModel, compiled and loaded for a compute unit; a package of one function takes None."""
        ct = coremltools()
        with warnings.catch_warnings():
            # coremltools only warns where Core ML refuses a model.
            warnings.filterwarnings("error", "You will not be able to run predict", RuntimeWarning)
            return ct.models.MLModel(package, compute_units=ct.ComputeUnit[unit], function_name=function)

    def plan(self, model: Any, unit: str) -> Any:
        """The MLComputePlan of a loaded model; RuntimeError before macOS 14.4."""
        plans = coremltools("models.compute_plan")
        return plans.MLComputePlan.load_from_path(
            model.get_compiled_model_path(), compute_units=coremltools().ComputeUnit[unit]
        )


def run(request: Mapping[str, Any], folder: Path, core_ml: Any) -> None:
    """Load packages, run the golden calls through them one after the other, time them, and read their compute plans.

    Args:
        request: `unit`; `function`; `packages`, in order, each with `path`, `inputs` (names) and `several` (functions);
            `golden`, the safetensors file; `calls`, each input -> name of its tensor; `repeats`.
        folder: where results go.
        core_ml: a `CoreML`.
    """
    import numpy as np
    from safetensors.numpy import load_file, save_file

    unit, function = request["unit"], request["function"]
    tensors = load_file(request["golden"])
    calls = [{name: tensors[tensor] for name, tensor in call.items()} for call in request["calls"]]
    models, found = [], []
    for package in request["packages"]:
        start = time.perf_counter()
        models.append(core_ml.load(package["path"], unit, function if package["several"] else None))
        found.append({"package": Path(package["path"]).name, "ready_seconds": time.perf_counter() - start})
    names = [package["inputs"] for package in request["packages"]]
    outputs: dict[str, Any] = {}
    for index, call in enumerate(calls):
        made = predict(models, names, call)
        # Core ML pads rows of some outputs, which makes them views with strides.
        outputs |= {f"{index}.{name}": np.ascontiguousarray(value) for name, value in made.items()}
    save_file(outputs, folder / "outputs.safetensors")
    for entry, model in zip(found, models, strict=True):
        # Compilation is the rest of `ready_seconds`; an app ships what it leaves.
        taken = model.load_duration_in_nano_seconds
        entry["load_seconds"] = None if taken is None else taken / 1e9
    _write(folder, found)

    times: list[list[float]] = [[] for _ in models]
    for repeat in range(WARM_UP + request["repeats"]):
        predict(models, names, calls[-1])
        for own, model in zip(times, models, strict=True):
            if repeat >= WARM_UP:
                own.append(model.last_predict_duration_in_nano_seconds / 1e6)
    for entry, own in zip(found, times, strict=True):
        entry["predict_ms"] = {"median": statistics.median(own), "least": min(own), "most": max(own)}
    _write(folder, found)

    for entry, model in zip(found, models, strict=True):
        try:
            entry["residency"] = residency(core_ml.plan(model, unit), function)
        except RuntimeError as error:  # no compute plans before macOS 14.4; the rest holds
            entry["residency"] = {"problem": str(error)}
    _write(folder, found)


def predict(models: Sequence[Any], names: Sequence[Sequence[str]], inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Outputs of the last of several models, each of which takes its inputs by name from those given and those made."""
    values, outputs = dict(inputs), dict[str, Any]()
    for model, taken in zip(models, names, strict=True):
        outputs = model.predict({name: values[name] for name in taken})
        values |= outputs
    return outputs


def residency(plan: Any, function: str) -> dict[str, Any]:
    """Where Core ML means to run a function, from its MLComputePlan.

    Returns:
        `operations` whose device is known, constants left out; `undetermined`, the number of the others; for each
        device under `devices` its `operations` and the sum of their estimated `cost`; `neural_engine` and
        `neural_engine_cost`, its shares of both (None where nothing is known); `elsewhere`, the operations that run on
        other devices, by type: `operation`, `device`, `count`, `cost`, the costliest first.
    """
    devices: dict[str, dict[str, Any]] = {}
    elsewhere: dict[tuple[str, str], dict[str, Any]] = {}
    undetermined = 0
    for operation in _operations(plan.model_structure.program.functions[function].block):
        usage = plan.get_compute_device_usage_for_mlprogram_operation(operation)
        kind = operation.operator_name
        if usage is None:
            undetermined += not kind.split(".")[-1].startswith("const")
            continue
        device = DEVICES[type(usage.preferred_compute_device).__name__]
        cost = plan.get_estimated_cost_for_mlprogram_operation(operation)
        tallies = [devices.setdefault(device, {"operations": 0, "cost": 0.0})]
        if device != "Neural Engine":
            blank = {"operation": kind, "device": device, "operations": 0, "cost": 0.0}
            tallies.append(elsewhere.setdefault((kind, device), blank))
        for tally in tallies:
            tally["operations"] += 1
            tally["cost"] += 0.0 if cost is None else cost.weight
    engine = devices.get("Neural Engine", {"operations": 0, "cost": 0.0})
    operations = sum(tally["operations"] for tally in devices.values())
    total = sum(tally["cost"] for tally in devices.values())
    return {
        "operations": operations,
        "undetermined": undetermined,
        "devices": devices,
        "neural_engine": engine["operations"] / operations if operations else None,
        "neural_engine_cost": engine["cost"] / total if total else None,
        "elsewhere": sorted(elsewhere.values(), key=lambda tally: (-tally["cost"], -tally["operations"])),
    }


def main(arguments: Sequence[str], core_ml: Any) -> None:
    """Read the request that the first argument names, and leave results in the folder that the second names."""
    request, folder = arguments
    run(json.loads(Path(request).read_text(encoding="utf-8")), Path(folder), core_ml)


def _operations(block: Any) -> Iterator[Any]:
    for operation in block.operations:
        yield operation
        for inner in operation.blocks:
            yield from _operations(inner)


def _write(folder: Path, found: list[dict[str, Any]]) -> None:
    whole = folder / "result.partial"
    whole.write_text(json.dumps(found), encoding="utf-8")
    whole.replace(folder / "result.json")


if __name__ == "__main__":
    main(sys.argv[1:], CoreML())
