"""Trained pipeline to Core ML packages: fp16, static shapes, each compared with the model before it is kept."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from snapgen import io
from snapgen.export import inspect, parity
from snapgen.export.interpreter import Program
from snapgen.export.parts import Decoder, Denoiser, Part
from snapgen.export.text import TextEncoder
from snapgen.export.tools import ExportError, coremltools, quiet, snapgen_version
from snapgen_kernels import use

PARTS = ("denoiser", "decoder", "text_encoder")
TARGETS = ("iOS17", "iOS18")
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

Progress = Callable[[str, float], None]


def export_pipeline(
    pipe: Any,
    out_dir: str | Path,
    *,
    parts: Sequence[str] = PARTS,
    target: str = "iOS17",
    batch: int = 2,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the parts of a pipeline as .mlpackage files into `out_dir`.

    Every package is converted and compared with the model (`snapgen.export.parity`) in a hidden folder first; only when
    all hold do they appear, each whole, replacing one of that name. Neither the pipeline nor any global state changes.
    A repeat with the same versions gives the same bytes: coremltools' random identifiers and its date are replaced.

    Args:
        pipe: a `SnapGenPipeline`. Shapes are those that it was trained at.
        parts: any of "denoiser", "decoder", "text_encoder" (the latter only where it was trained with the denoiser).
        target: oldest system that runs the packages, "iOS17" or "iOS18" (and macOS 14 or 15).
        batch: of the denoiser; 2 takes both halves of classifier-free guidance in one call, 1 takes them in two.
        progress: called with what is being done and the share that is done, 0 to 1.

    Returns:
        `target`, `batch`, `versions` (of torch and coremltools) and `parts`: for each, what `inspect.describe` finds,
        and `psnr`, `floor` (dB) and `seconds`.

    Raises:
        ValueError: an argument is none of those allowed.
        ExportError: coremltools is missing, or a part has layers that are not exported.
        ParityError: a part is below its floor.
    """
    _check(pipe, parts, target, batch)
    ct = coremltools()
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {
        "target": target,
        "batch": batch,
        "versions": {"coremltools": ct.__version__, "torch": torch.__version__, "snapgen": snapgen_version()},
        "parts": {},
    }
    tell = progress or (lambda message, share: None)
    steps = 2 * len(parts) + 1
    with tempfile.TemporaryDirectory(dir=out_dir, prefix=".export-") as staging:
        tell("reading the pipeline", 0.0)
        size, tokens = pipe.denoiser.config.sample_size, _tokens(pipe)
        cases = parity.make_cases(pipe, tokens, size, size)
        for index, name in enumerate(parts):
            start = time.perf_counter()
            tell(f"converting the {name.replace('_', ' ')}", (2 * index + 0.5) / steps)
            part = build_part(pipe, name, batch=batch, tokens=tokens)
            package = Path(staging) / part.file
            convert(part, package, target)
            tell(f"checking the {name.replace('_', ' ')}", (2 * index + 1.5) / steps)
            figure = parity.check(name, Program(package), pipe, cases)
            report["parts"][name] = {"file": part.file, "psnr": figure, "floor": parity.FLOORS[name]}
            report["parts"][name]["seconds"] = time.perf_counter() - start
        tell("writing the packages", 1 - 0.5 / steps)
        for entry in report["parts"].values():
            _publish(Path(staging) / entry["file"], out_dir / entry["file"])
    for entry in report["parts"].values():
        entry.update(inspect.describe(out_dir / entry["file"]))
    tell("done", 1.0)
    return report


def build_part(pipe: Any, name: str, *, batch: int, tokens: int) -> Part:
    """The part `name` of a pipeline in the form that is exported, with copies of its weights."""
    size = pipe.denoiser.config.sample_size
    with use("reference"), torch.random.fork_rng(devices=[]):  # layers draw weights when they are made
        if name == "denoiser":
            return Denoiser(pipe.denoiser, batch=batch, height=size, width=size, tokens=tokens)
        if name == "decoder":
            return Decoder(pipe.decoder, batch=1, height=size, width=size)
        return TextEncoder(pipe.text_encoder, batch=1, tokens=tokens)


def convert(part: Part, package: Path, target: str) -> None:
    """Convert a part to a package at `package` (which must not exist, and whose name must end in .mlpackage)."""
    ct = coremltools()
    examples = tuple(feature.example for feature in part.inputs)
    passes = ct.PassPipeline(list(PASSES), "snapgen")
    with torch.no_grad(), use("reference"), torch.random.fork_rng(devices=[]), quiet():
        program = torch.export.export(part, examples).run_decompositions({})
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
    _stamp(part, package)


def main_coreml(
    checkpoint: str,
    out: Path,
    target: str = "iOS17",
    parts: Sequence[str] = PARTS,
    batch: int = 2,
    console: Any = None,
) -> dict[str, Any]:
    """`snapgen export coreml`: load a checkpoint, export it under a progress bar, and print what is in the packages.

    Args:
        checkpoint: a folder, or the name of a shipped checkpoint ("tiny").
        console: a rich console; by default standard output.

    Returns:
        The report of `export_pipeline`.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from snapgen.pipeline import SnapGenPipeline

    coremltools()  # fail before the work if it is missing
    console = console or Console()
    pipe = SnapGenPipeline.from_pretrained(checkpoint)
    columns = (BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=1.0)
        report = export_pipeline(
            pipe,
            out,
            parts=parts,
            target=target,
            batch=batch,
            progress=lambda message, share: bar.update(task, description=message, completed=share),
        )
    inspect.report(report["parts"].values(), console)
    figures = {name: entry["psnr"] for name, entry in report["parts"].items()}
    console.print(f"against PyTorch in fp32: {parity.summary(figures)}", highlight=False)
    return report


def _check(pipe: Any, parts: Sequence[str], target: str, batch: int) -> None:
    if not parts:
        raise ValueError(f"parts: none given; choose from {', '.join(PARTS)}")
    for name in parts:
        if name not in PARTS:
            raise ValueError(f"parts: unknown part {name!r}; choose from {', '.join(PARTS)}")
    if len(set(parts)) != len(parts):
        raise ValueError(f"parts: {', '.join(parts)} names one twice")
    if target not in TARGETS:
        raise ValueError(f"target: got {target!r}; allowed are {', '.join(TARGETS)}")
    if batch not in (1, 2):
        raise ValueError(f"batch: got {batch!r}; allowed are 1 and 2")
    if "text_encoder" in parts and not pipe.config.joint_text:
        raise ExportError(
            "text_encoder: only one that was trained with the denoiser is exported; leave it out of `parts` for "
            "pipelines with CLIP-L, CLIP-G or Gemma-2"
        )


def _tokens(pipe: Any) -> int:
    """Length of the text context: all that a jointly trained encoder takes, else what the encoders pad to."""
    if pipe.config.joint_text:
        return int(pipe.tokenizer.model_max_length)
    with torch.no_grad(), use("reference"):
        return pipe.encode_prompt(["a"]).context.shape[1]


def _holds_in_fp16(op: Any) -> bool:
    """Whether an operation is computed in fp16: all but the angles of the time embedding and their sine and cosine.

    Angles reach 1000 radians, where fp16 steps by half a radian.
    """
    waves = ("sin", "cos")

    def leads_to_waves(op: Any, depth: int) -> bool:
        below = [child for output in op.outputs for child in output.child_ops]
        return any(child.op_type in waves or (depth > 0 and leads_to_waves(child, depth - 1)) for child in below)

    return not (op.op_type in waves or (op.op_type in ("mul", "reshape", "expand_dims") and leads_to_waves(op, 1)))


def _stamp(part: Part, package: Path) -> None:
    """Write the metadata into a fresh package, and take out of it whatever differs between two exports."""
    manifest_file = package / "Manifest.json"
    manifest = json.loads(manifest_file.read_text(encoding="utf-8"))
    root = package / "Data" / manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]["path"]
    spec = coremltools("proto.Model_pb2").Model()
    spec.ParseFromString(root.read_bytes())
    metadata = spec.description.metadata
    metadata.shortDescription, metadata.author, metadata.license = part.about, AUTHOR, LICENSE
    metadata.versionString = snapgen_version()
    metadata.userDefined.pop(CONVERSION_DATE, None)
    about = {feature.name: feature.about for feature in part.inputs} | dict(part.outputs)
    for feature in (*spec.description.input, *spec.description.output):
        feature.shortDescription = about[feature.name]
    root.write_bytes(spec.SerializeToString(deterministic=True))

    # The identifiers are random; Core ML asks only that they differ within the package.
    items = manifest["itemInfoEntries"]
    renamed = {old: str(uuid.uuid5(uuid.NAMESPACE_URL, item["path"])) for old, item in items.items()}
    manifest["itemInfoEntries"] = {renamed[old]: item for old, item in items.items()}
    manifest["rootModelIdentifier"] = renamed[manifest["rootModelIdentifier"]]
    manifest_file.write_text(json.dumps(manifest, indent=4, sort_keys=True) + "\n", encoding="utf-8")


def _publish(staged: Path, package: Path) -> None:
    with io.whole_directory(package) as temporary:
        for item in staged.iterdir():
            shutil.move(item, temporary / item.name)
