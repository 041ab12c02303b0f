"""One part to one Core ML package: the compiler's passes, what stays in fp32, and what is stamped into the package."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any

import torch

from snapgen.export import names
from snapgen.export.parts import Part
from snapgen.export.tools import coremltools, quiet, snapgen_version
from snapgen_kernels import use

AUTHOR = "SnapGen contributors"
LICENSE = "Apache-2.0"

# Of coremltools' 95 compiler passes, those that a program needs which is written for export. The others look for
# patterns of other frameworks; each walks and validates the whole program, so leaving them out saves a third of the
# time, and what is written in `modules` is what comes out. add_int16_cast is left out on purpose: it packs token ids
# into 16 bits and has to guard them against turning negative.
PASSES = (
    "common::update_output_dtypes",
    "common::const_elimination",
    "common::noop_elimination",
    "common::dead_code_elimination",
    "common::rank0_expand_dims_swap",
    "common::fuse_elementwise_to_batchnorm",
    "common::merge_consecutive_reshapes",
    "common::merge_consecutive_transposes",
    "common::dedup_op_and_var_names",
    "common::add_fp16_cast",
    "common::update_output_dtypes",
    "common::const_elimination",
    "common::cast_optimization",
    "common::dead_code_elimination",
    "common::const_deduplication",
    "common::noop_elimination",
    "common::dedup_op_and_var_names",
    "common::topological_reorder",
    "common::dead_code_elimination",
)
# Stamped by coremltools; without it a package depends on nothing but the model and the versions.
CONVERSION_DATE = "com.github.apple.coremltools.conversion_date"


def convert(part: Part, package: Path, target: str) -> None:
    """Convert a part to a package at `package` (which must not exist, and whose name must end in .mlpackage)."""
    ct = coremltools()
    passes = ct.PassPipeline(list(PASSES), "snapgen")
    with torch.no_grad(), use("reference"), torch.random.fork_rng(devices=[]), quiet(), part.converting():
        # By name: a part whose inputs' names depend on its place takes **inputs.
        program = torch.export.export(part, (), part.arguments()).run_decompositions({})
        ct.convert(
            program,
            outputs=[ct.TensorType(name=name) for name, _ in part.outputs],
            minimum_deployment_target=getattr(ct.target, target),
            compute_precision=ct.transform.FP16ComputePrecision(op_selector=_holds_in_fp16),
            compute_units=ct.ComputeUnit.CPU_AND_NE,
            pass_pipeline=passes,
            skip_model_load=True,
            package_dir=str(package),
        )
    stamp(part, package, names.nodes(program, tuple(name for name, _ in part.outputs)))


def _holds_in_fp16(op: Any) -> bool:
    """Whether an operation is computed in fp16: all but the angles of the time embedding and their sine and cosine.

    Angles reach 1000 radians, where fp16 steps by half a radian.
    """
    waves = ("sin", "cos")

    def leads_to_waves(op: Any, depth: int) -> bool:
        below = [child for output in op.outputs for child in output.child_ops]
        return any(child.op_type in waves or (depth > 0 and leads_to_waves(child, depth - 1)) for child in below)

    return not (op.op_type in waves or (op.op_type in ("mul", "reshape", "expand_dims") and leads_to_waves(op, 1)))


def stamp(part: Part, package: Path, layers: dict[str, list[str]] | None = None) -> None:
    """Write the metadata into a fresh package, and take out of it whatever differs between two exports.

    `layers` are those of `snapgen.export.names.nodes`.
    """
    manifest_file = package / "Manifest.json"
    manifest = json.loads(manifest_file.read_text(encoding="utf-8"))
    root = package / "Data" / manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]["path"]
    spec = coremltools("proto.Model_pb2").Model()
    spec.ParseFromString(root.read_bytes())
    metadata = spec.description.metadata
    metadata.shortDescription, metadata.author, metadata.license = part.about, AUTHOR, LICENSE
    metadata.versionString = snapgen_version()
    metadata.userDefined.pop(CONVERSION_DATE, None)
    if layers is not None:
        names.stamp(spec, layers)
    about = {feature.name: feature.about for feature in part.inputs} | dict(part.outputs)
    for described in (spec.description, *spec.description.functions):
        for feature in (*described.input, *described.output):
            feature.shortDescription = about[feature.name]
    root.write_bytes(spec.SerializeToString(deterministic=True))

    # The identifiers are random; Core ML asks only that they differ within the package.
    items = manifest["itemInfoEntries"]
    renamed = {old: str(uuid.uuid5(uuid.NAMESPACE_URL, item["path"])) for old, item in items.items()}
    manifest["itemInfoEntries"] = {renamed[old]: item for old, item in items.items()}
    manifest["rootModelIdentifier"] = renamed[manifest["rootModelIdentifier"]]
    manifest_file.write_text(json.dumps(manifest, indent=4, sort_keys=True) + "\n", encoding="utf-8")
