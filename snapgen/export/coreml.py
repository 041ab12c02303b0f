"""Trained pipeline to Core ML packages: fp16, static shapes, each compared with the model before it is kept."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from snapgen import flow, io
from snapgen.export import inspect, parity
from snapgen.export.compress import compress
from snapgen.export.convert import LICENSE, convert
from snapgen.export.denoiser import Denoiser, DenoiserChunk, schedule
from snapgen.export.gemma import gemma_chunks
from snapgen.export.golden import Golden, decibels
from snapgen.export.golden import write as write_golden
from snapgen.export.interpreter import Chain, Program
from snapgen.export.multifunction import functions, join, latent_size
from snapgen.export.options import DEFAULTS, PARTS, Options
from snapgen.export.parts import Decoder, Part
from snapgen.export.text import TextEncoder
from snapgen.export.tools import ExportError, coremltools, snapgen_version
from snapgen.export.vocabulary import write_vocabulary
from snapgen.text import CLIP_TOKENS
from snapgen_kernels import use

SCHEDULE = "Schedule.json"
Progress = Callable[[str, float], None]


def export_pipeline(
    pipe: Any, out_dir: str | Path, options: Options = DEFAULTS, *, progress: Progress | None = None
) -> dict[str, Any]:
    """Write the parts of a pipeline as .mlpackage files into `out_dir`, and beside them what they can be checked by.

    Every package is converted and compared with the model (`snapgen.export.parity`) in a hidden folder first; only when
    all hold do they appear, together, replacing what has the same name. Neither the pipeline nor any global state
    changes. A repeat with the same versions gives the same bytes: coremltools' random identifiers and its date are
    replaced. Besides packages there are the files of `snapgen.export.golden`, and with a text encoder `vocab.json`.

    Args:
        pipe: a `SnapGenPipeline`.
        options: what to export, and for what. Shapes are those that it was trained at, unless they say otherwise.
        progress: called with what is being done and the share that is done, 0 to 1.

    Returns:
        `target`, `batch`, `versions` (of torch and coremltools) and `parts`: for each, `psnr`, `floor` (dB), `seconds`,
        `functions` (name -> `psnr`, `figures` by case, `golden`), and `packages`, the list of what `inspect.describe`
        finds in each, and `compression` where it is
        compressed, as `snapgen.export.compress.compress` returns it.

    Raises:
        ValueError: an argument is none of those allowed.
        ExportError: coremltools is missing, `out_dir` cannot be written to, a part has layers that are not exported, or
            its weights do not fit into the budget of `options.compress`.
        ParityError: a part is below its floor.
    """
    names = options.parts or tuple(name for name in PARTS if getattr(pipe, name) is not None)
    for name in names:
        if getattr(pipe, name) is None:
            raise ExportError(f"parts: the pipeline has no {name}; leave it out")
    if any(name not in names for name in options.compress_parts):
        raise ExportError(
            f"compress_parts: got {', '.join(options.compress_parts)}; of them only {', '.join(names)} can be exported"
        )
    if options.compress is not None and not any(options.compression(name) for name in names):
        raise ExportError(
            f"compress: {options.compress} leaves {', '.join(names)} in fp16 by default; name it in compress_parts"
        )
    choices = {name: functions(pipe, name, options) for name in names}
    ct = coremltools()
    out_dir = Path(out_dir)
    report: dict[str, Any] = {
        "target": options.target,
        "batch": options.batch,
        "versions": {"coremltools": ct.__version__, "torch": torch.__version__, "snapgen": snapgen_version()},
        "parts": {},
    }
    tell = progress or (lambda message, share: None)
    steps = 2 * len(names) + 1
    golden = Golden()
    with _staging(out_dir) as staging:
        fresh = Path(staging) / "fresh"
        fresh.mkdir()
        tell("reading the pipeline", 0.0)
        tokens = options.tokens or text_tokens(pipe)
        sizes = {latent_size(pipe, choice) for of_part in choices.values() for choice in of_part.values()}
        cases = {size: parity.make_cases(pipe, tokens, *size) for size in sorted(sizes)}
        for index, name in enumerate(names):
            start = time.perf_counter()
            tell(f"converting the {name.replace('_', ' ')}", (2 * index + 0.5) / steps)
            packages = _convert_part(pipe, name, choices[name], tokens, fresh)
            entry: dict[str, Any] = {}
            report["parts"][name] = entry
            compression = options.compression(name)
            if compression is not None:
                tell(f"compressing the {name.replace('_', ' ')}", (2 * index + 1) / steps)
                entry["compression"] = compress(name, packages, compression, options.target, pipe, tokens)
                if entry["compression"]["weight_bytes"] == entry["compression"]["fp16_bytes"]:
                    compression = None  # nothing was: fp16 has its own floor
            tell(f"checking the {name.replace('_', ' ')}", (2 * index + 1.5) / steps)
            checked: dict[str, dict[str, Any]] = {}
            for function, choice in choices[name].items():
                program = Chain([Program(package, function) for package in packages])
                measured = parity.measure(name, program, pipe, cases[latent_size(pipe, choice)])
                figures = {case.name: figure for case, figure in measured}
                kept = golden.keep(name, function, program.inputs, measured, 2 if len(choices[name]) == 1 else 1)
                checked[function] = {
                    "psnr": parity.hold(name, figures, compression),
                    "figures": figures,
                    "golden": kept,
                }
            entry |= {
                "psnr": min(found["psnr"] for found in checked.values()),
                "floor": parity.floor(name, compression),
                "seconds": time.perf_counter() - start,
                "functions": checked,
                "packages": [package.name for package in packages],
            }
        tell("writing the packages", 1 - 0.5 / steps)
        if options.steps is not None and "denoiser" in names:
            io.write_json(fresh / SCHEDULE, schedule(pipe, options.steps))
        write_golden(fresh, golden, _record(pipe, options, report, fresh))
        io.move_into(fresh, out_dir)
    for entry in report["parts"].values():
        entry["packages"] = [inspect.describe(out_dir / file) for file in entry["packages"]]
    tell("done", 1.0)
    return report


def _staging(out_dir: Path) -> tempfile.TemporaryDirectory[str]:
    """A hidden folder in `out_dir`, which is made if it is not there."""
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(dir=out_dir, prefix=".export-")
    except OSError as error:
        raise ExportError(f"out: got {out_dir}; must be a folder that can be written to ({error.strerror})") from error


def build_parts(pipe: Any, name: str, options: Options, tokens: int) -> list[Part]:
    """The part `name` of a pipeline in the form that is exported, with copies of its weights: one, or its chunks."""
    height, width = latent_size(pipe, options)
    with use("reference"), torch.random.fork_rng(devices=[]):  # layers draw weights when they are made
        if name == "denoiser":
            whole = Denoiser(
                pipe.denoiser,
                batch=options.batch,
                height=height,
                width=width,
                tokens=tokens,
                scheduled=options.steps is not None,
                query_chunk=options.query_chunk,
            )
            return [DenoiserChunk(whole, False), DenoiserChunk(whole, True)] if options.chunks else [whole]
        if name == "decoder":
            return [Decoder(pipe.decoder, batch=1, height=height, width=width)]
        if name == "text_encoder_3":
            return [*gemma_chunks(pipe.text_encoder_3, batch=1, tokens=int(pipe.config.max_tokens))]
        if pipe.config.joint_text:
            return [TextEncoder(pipe.text_encoder, batch=1, tokens=tokens)]
        model = pipe.text_encoder if name == "text_encoder" else pipe.text_encoder_2
        file = "TextEncoder.mlpackage" if name == "text_encoder" else "TextEncoder2.mlpackage"
        return [TextEncoder(model, batch=1, tokens=CLIP_TOKENS, penultimate=True, file=file)]


def _convert_part(pipe: Any, name: str, choices: dict[str, Options], tokens: int, folder: Path) -> list[Path]:
    """Convert a part into `folder`: its package, or those of its chunks, each with all functions."""
    made: dict[str, tuple[Part, dict[str, Path]]] = {}
    with tempfile.TemporaryDirectory(dir=folder.parent) as apart:
        for function, choice in choices.items():
            (Path(apart) / function).mkdir()
            for part in build_parts(pipe, name, choice, tokens):
                package = Path(apart) / function / part.file
                convert(part, package, choice.target)
                made.setdefault(part.file, (part, {}))[1][function] = package
        for file, (part, packages) in made.items():
            if len(packages) > 1:
                join(packages, part, folder / file)
            else:
                shutil.move(next(iter(packages.values())), folder / file)
    return [folder / file for file in made]


def _record(pipe: Any, options: Options, report: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What goes into `Export.json`."""
    parts = {}
    for name, entry in report["parts"].items():
        checked = {
            function: {
                "psnr": decibels(found["psnr"]),
                "figures": {case: decibels(figure) for case, figure in found["figures"].items()},
                "golden": found["golden"],
            }
            for function, found in entry["functions"].items()
        }
        parts[name] = {"floor": entry["floor"], "functions": checked, "packages": entry["packages"]}
    record = {
        "license": LICENSE,
        "options": asdict(options),
        "versions": report["versions"],
        "parts": parts,
        "schedule": {"shift": float(pipe.scheduler.config.shift), "timestep_scale": flow.TIMESTEP_SCALE},
    }
    if "text_encoder" in parts:
        record["tokenizer"] = write_vocabulary(pipe.tokenizer, folder)
    return record


def descriptions(report: dict[str, Any]) -> list[dict[str, Any]]:
    """What is in each package of an export's report, with its part's PSNR, for `inspect.report`."""
    return [package | {"psnr": entry["psnr"]} for entry in report["parts"].values() for package in entry["packages"]]


def text_tokens(pipe: Any) -> int:
    """Length of the text context: all that a jointly trained encoder takes, else what the encoders pad to."""
    if pipe.config.joint_text:
        return int(pipe.tokenizer.model_max_length)
    if not parity.has_text(pipe):
        raise ExportError("tokens: the pipeline has no text encoder that would tell the length of the context; give it")
    with torch.no_grad(), use("reference"):
        return pipe.encode_prompt(["a"]).context.shape[1]
