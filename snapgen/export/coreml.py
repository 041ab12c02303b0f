"""Trained pipeline to Core ML packages: fp16, static shapes, each compared with the model before it is kept."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from snapgen import io
from snapgen.export import inspect, parity
from snapgen.export.convert import convert
from snapgen.export.gemma import gemma_chunks
from snapgen.export.interpreter import Chain, Program
from snapgen.export.options import DEFAULTS, PARTS, Options
from snapgen.export.parts import Decoder, Denoiser, Part
from snapgen.export.text import TextEncoder
from snapgen.export.tools import ExportError, coremltools, snapgen_version
from snapgen.text import CLIP_TOKENS
from snapgen_kernels import use

Progress = Callable[[str, float], None]


def export_pipeline(
    pipe: Any, out_dir: str | Path, options: Options = DEFAULTS, *, progress: Progress | None = None
) -> dict[str, Any]:
    """Write the parts of a pipeline as .mlpackage files into `out_dir`.

    Every package is converted and compared with the model (`snapgen.export.parity`) in a hidden folder first; only when
    all hold do they appear, each whole, replacing one of that name. Neither the pipeline nor any global state changes.
    A repeat with the same versions gives the same bytes: coremltools' random identifiers and its date are replaced.

    Args:
        pipe: a `SnapGenPipeline`. Shapes are those that it was trained at.
        options: what to export, and for what.
        progress: called with what is being done and the share that is done, 0 to 1.

    Returns:
        `target`, `batch`, `versions` (of torch and coremltools) and `parts`: for each, `psnr`, `floor` (dB), `seconds`,
        and `packages`, the list of what `inspect.describe` finds in each.

    Raises:
        ValueError: an argument is none of those allowed.
        ExportError: coremltools is missing, or a part has layers that are not exported.
        ParityError: a part is below its floor.
    """
    names = options.parts or tuple(name for name in PARTS if getattr(pipe, name) is not None)
    for name in names:
        if getattr(pipe, name) is None:
            raise ExportError(f"parts: the pipeline has no {name}; leave it out")
    ct = coremltools()
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {
        "target": options.target,
        "batch": options.batch,
        "versions": {"coremltools": ct.__version__, "torch": torch.__version__, "snapgen": snapgen_version()},
        "parts": {},
    }
    tell = progress or (lambda message, share: None)
    steps = 2 * len(names) + 1
    with tempfile.TemporaryDirectory(dir=out_dir, prefix=".export-") as staging:
        tell("reading the pipeline", 0.0)
        size, tokens = pipe.denoiser.config.sample_size, text_tokens(pipe)
        cases = parity.make_cases(pipe, tokens, size, size)
        for index, name in enumerate(names):
            start = time.perf_counter()
            tell(f"converting the {name.replace('_', ' ')}", (2 * index + 0.5) / steps)
            packages = []
            for part in build_parts(pipe, name, options, tokens):
                packages.append(Path(staging) / part.file)
                convert(part, packages[-1], options.target)
            tell(f"checking the {name.replace('_', ' ')}", (2 * index + 1.5) / steps)
            figure = parity.check(name, Chain([Program(package) for package in packages]), pipe, cases)
            report["parts"][name] = {"psnr": figure, "floor": parity.FLOORS[name]}
            report["parts"][name]["seconds"] = time.perf_counter() - start
            report["parts"][name]["packages"] = [package.name for package in packages]
        tell("writing the packages", 1 - 0.5 / steps)
        for entry in report["parts"].values():
            for file in entry["packages"]:
                _publish(Path(staging) / file, out_dir / file)
    for entry in report["parts"].values():
        entry["packages"] = [inspect.describe(out_dir / file) for file in entry["packages"]]
    tell("done", 1.0)
    return report


def build_parts(pipe: Any, name: str, options: Options, tokens: int) -> list[Part]:
    """The part `name` of a pipeline in the form that is exported, with copies of its weights: one, or its chunks."""
    size = pipe.denoiser.config.sample_size
    with use("reference"), torch.random.fork_rng(devices=[]):  # layers draw weights when they are made
        if name == "denoiser":
            return [Denoiser(pipe.denoiser, batch=options.batch, height=size, width=size, tokens=tokens)]
        if name == "decoder":
            return [Decoder(pipe.decoder, batch=1, height=size, width=size)]
        if name == "text_encoder_3":
            return [*gemma_chunks(pipe.text_encoder_3, batch=1, tokens=int(pipe.config.max_tokens))]
        if pipe.config.joint_text:
            return [TextEncoder(pipe.text_encoder, batch=1, tokens=tokens)]
        model = pipe.text_encoder if name == "text_encoder" else pipe.text_encoder_2
        file = "TextEncoder.mlpackage" if name == "text_encoder" else "TextEncoder2.mlpackage"
        return [TextEncoder(model, batch=1, tokens=CLIP_TOKENS, penultimate=True, file=file)]


def main_coreml(checkpoint: str, out: Path, options: Options = DEFAULTS, console: Any = None) -> dict[str, Any]:
    """`snapgen export coreml`: load a checkpoint, export it under a progress bar, and print what is in the packages.

    Args:
        checkpoint: a folder, or the name of a shipped checkpoint ("tiny").
        out: folder for the packages.
        options: what to export, and for what.
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

        def tell(message: str, share: float) -> None:
            bar.update(task, description=message, completed=share)

        report = export_pipeline(pipe, out, options, progress=tell)
    inspect.report(descriptions(report), console)
    figures = {name: entry["psnr"] for name, entry in report["parts"].items()}
    console.print(f"against PyTorch in fp32: {parity.summary(figures)}", highlight=False)
    return report


def descriptions(report: dict[str, Any]) -> list[dict[str, Any]]:
    """What is in each package of an export's report, with its part's PSNR, for `inspect.report`."""
    return [package | {"psnr": entry["psnr"]} for entry in report["parts"].values() for package in entry["packages"]]


def text_tokens(pipe: Any) -> int:
    """Length of the text context: all that a jointly trained encoder takes, else what the encoders pad to."""
    if pipe.config.joint_text:
        return int(pipe.tokenizer.model_max_length)
    with torch.no_grad(), use("reference"):
        return pipe.encode_prompt(["a"]).context.shape[1]


def _publish(staged: Path, package: Path) -> None:
    with io.whole_directory(package) as temporary:
        for item in staged.iterdir():
            shutil.move(item, temporary / item.name)
