"""Where a package's numbers leave the model's: layer by layer, the interpreter's values against PyTorch's in fp32.

The exported form of a part (`snapgen.export.parts`) has the trained model's layers under their names and computes its
numbers, so its hooks give the reference of every layer in the very layout that the package has; that it does compute
the pipeline's numbers is measured along. Two figures for each layer:

- total: the package's value against that of the form, both from the same inputs. It grows along the way.
- own: the same, after every layer before it handed the form the package's value. So it holds the error of this layer
  and of the arithmetic between it and those before it, and nothing that came from further up.

The layer at which the numbers leave is the one with the worst own figure.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

from snapgen import io
from snapgen.export import names, parity
from snapgen.export.coreml import build_parts, text_tokens
from snapgen.export.inspect import read_spec
from snapgen.export.interpreter import Program
from snapgen.export.options import DEFAULTS, PARTS, Options
from snapgen.export.parts import Part
from snapgen.export.tools import ExportError
from snapgen.pipeline import load
from snapgen_kernels import use

ROWS = 20  # of the table of the worst
BAR = 24  # characters; one for each 4 dB below 96 dB, which is finer than fp16 is


def compare(package: str | Path, pipe: Any, options: Options = DEFAULTS, *, case: int = 0) -> dict[str, Any]:
    """Every layer of a package against the pipeline that it was exported from.

    Args:
        package: an .mlpackage of `snapgen export`, compressed or not.
        pipe: a `SnapGenPipeline`.
        options: those that the package was exported with.
        case: which of the cases of `parity.make_cases`, from 0.

    Returns:
        `package`, `part`, `case` (in words); `form`: PSNR of the exported form against the pipeline, the worst of all
        cases; `outputs`: name -> figures of the package against the form; `layers`, in the order in which they end:
        `name`, `kind`, `shape`, `own` and `total`; `skipped`: name -> why. Figures are `psnr` (dB), `relative` (L2 norm
        of the error over that of the reference), `max` (largest error) and `finite`; psnr is None where the two are
        equal, or where the package's value is not finite. `own` is None where the layer's inputs were not finite.

    Raises:
        PackageError: the package cannot be read.
        ExportError: it is none of this pipeline's with these options, or it does not name its layers.
        ValueError: there is no such case.
    """
    package = Path(package)
    spec, _ = read_spec(package)
    variables = names.read(spec)
    if not variables:
        raise ExportError(f"{package}: does not say which of its values belong to which layer; export it again")
    program = Program(package)
    tokens, size = text_tokens(pipe), pipe.denoiser.config.sample_size
    name, parts, part = _find(package, program, pipe, options, tokens)
    cases = parity.make_cases(pipe, tokens, size, size)
    if not 0 <= case < len(cases.times):
        raise ValueError(f"case: got {case}; there are {len(cases.times)}, from 0")
    forms = _Forms(parts)
    form = min(figure for _, figure in parity.measure(name, forms, pipe, cases))
    inputs = forms.calls[case][part]

    wanted = set(variables.values())
    values: dict[str, Tensor] = {}

    def keep(_: str, variable: str, value: Tensor) -> None:
        if variable in wanted:
            values[variable] = value

    outputs = program(inputs, watch=keep)
    layers = {layer: values[variable] for layer, variable in variables.items() if variable in values}
    with torch.no_grad(), use("reference"):
        total, clean, skipped = _walk(part, inputs, layers, forced=False)
        own, _, _ = _walk(part, inputs, layers, forced=True)
    clean = clean if isinstance(clean, tuple) else (clean,)
    tokens_read = _read(inputs)
    kinds = dict(part.named_modules())
    return {
        "package": str(package),
        "part": name,
        "case": f"{f't = {cases.times[case]:.3f}, ' if name == 'denoiser' else ''}{cases.captions[case]!r}",
        "form": form,
        "outputs": {
            output: _figures(*(_rows(value, tokens_read) for value in (outputs[output], reference.float())))
            for (output, _), reference in zip(part.outputs, clean, strict=True)
        },
        "layers": [
            {
                "name": layer,
                "kind": type(kinds[layer]).__name__.lstrip("_"),
                "shape": list(layers[layer].shape),
                "own": own[layer],
                "total": total[layer],
            }
            for layer in total
        ],
        "skipped": skipped,
    }


class _Forms:
    """Exported forms run one after the other in fp32, as `interpreter.Chain` runs their packages; keeps the inputs."""

    def __init__(self, parts: list[Part]) -> None:
        self.parts = parts
        self.calls: list[dict[Part, dict[str, Tensor]]] = []
        self.inputs: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        made: set[str] = set()
        for part in parts:
            for feature in part.inputs:
                if feature.name not in made:
                    self.inputs[feature.name] = tuple(feature.example.shape), feature.example.dtype
            made.update(name for name, _ in part.outputs)

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        values = dict(inputs)
        call = {}
        for part in self.parts:
            call[part] = {feature.name: values[feature.name].to(feature.example.dtype) for feature in part.inputs}
            results = part(**call[part])
            for (name, _), result in zip(
                part.outputs, results if isinstance(results, tuple) else (results,), strict=True
            ):
                values[name] = result
        self.calls.append(call)
        return values


def _find(package: Path, program: Program, pipe: Any, options: Options, tokens: int) -> tuple[str, list[Part], Part]:
    """The part that a package holds, by its inputs and outputs, and by its file's name where two have the same."""
    shown = {name: (tuple(shape), dtype) for name, (shape, dtype) in program.inputs.items()}
    if "image" in program.outputs:
        possible = ["decoder"]
    elif "sample" in program.inputs or "velocity" in program.outputs:
        possible = ["denoiser"]
    elif "attention_mask" in program.inputs or any(name.startswith("hidden_states_") for name in shown):
        possible = ["text_encoder_3"]
    else:
        possible = [name for name in PARTS if name.startswith("text_encoder")]
    found = []
    for name in possible:
        if getattr(pipe, name) is None:
            continue
        parts = build_parts(pipe, name, options, tokens)
        for part in parts:
            borders = {f.name: (tuple(f.example.shape), f.example.dtype) for f in part.inputs}
            if borders == shown and tuple(output for output, _ in part.outputs) == program.outputs:
                found.append((name, parts, part))
    chosen = [entry for entry in found if entry[2].file == package.name] or found
    if len(chosen) != 1:
        shapes = ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, (shape, _) in shown.items())
        raise ExportError(
            f"{package}: takes {shapes} and gives {', '.join(program.outputs)}; "
            + (
                "several parts of the checkpoint do: give the package its own name back"
                if chosen
                else "no part of the checkpoint does with these options"
            )
        )
    return chosen[0]


def _walk(
    part: Part, inputs: Mapping[str, Tensor], values: Mapping[str, Tensor], *, forced: bool
) -> tuple[dict[str, Any], Any, dict[str, str]]:
    """Run a part in fp32 and compare every layer's output with the package's value.

    Args:
        forced: hand the package's values on instead of the form's.

    Returns:
        Layer -> figures, in the order in which they end; the part's result; layer -> why it was skipped.
    """
    figures: dict[str, Any] = {}
    skipped: dict[str, str] = {}
    read = _read(inputs)

    def hook(name: str) -> Callable[..., Tensor | None]:
        def compare(module: nn.Module, given: Any, output: Any) -> Tensor | None:
            if not isinstance(output, Tensor):
                skipped[name] = "it returns several values"
            elif name not in values:
                skipped[name] = "the compiler merged its value into another, or it is called several times"
            elif values[name].shape != output.shape:
                skipped[name] = f"its value is {tuple(values[name].shape)}, in the package {tuple(output.shape)}"
            else:
                value = values[name].float()
                figures[name] = _figures(_rows(value, read), _rows(output, read))
                return value if forced else None
            return None

        return compare

    hooks = [module.register_forward_hook(hook(name)) for name, module in part.named_modules() if name]
    try:
        return figures, part(**inputs), skipped
    finally:
        for handle in hooks:
            handle.remove()


def _read(inputs: Mapping[str, Tensor]) -> Tensor | None:
    """Which tokens are no padding, bool [L], where a part takes a mask of its own tokens (Gemma-2) for one sequence."""
    mask = inputs.get("attention_mask")
    return None if mask is None or mask.shape[0] != 1 else mask.flatten() > 0


def _rows(value: Tensor, read: Tensor | None) -> Tensor:
    """`value` [B, C, 1, L] or [B, L, C] without the rows of padding, which mean nothing: no key is open to them."""
    if read is not None and value.ndim == 4 and value.shape[3] == len(read):
        return value[..., read]
    if read is not None and value.ndim == 3 and value.shape[1] == len(read):
        return value[:, read]
    return value


def _figures(value: Tensor, reference: Tensor) -> dict[str, Any] | None:
    if not reference.isfinite().all():
        return None
    if not value.isfinite().all():
        return {"psnr": None, "relative": None, "max": None, "finite": False}
    value, reference = value.double(), reference.double()
    error = value - reference
    exact = not error.any()
    norm = float(reference.norm())
    return {
        "psnr": None if exact or norm == 0 else parity.psnr(value, reference),
        "relative": 0.0 if exact else float(error.norm()) / norm if norm else None,
        "max": float(error.abs().max()),
        "finite": True,
    }


def decibels(figures: Mapping[str, Any] | None) -> float:
    """PSNR as a number to sort by.

    Infinite where values are equal or could not be compared; minus infinite where the package's left the range of fp16,
    or where the reference is all zeros and the package's value is not.
    """
    if figures is None or (figures["finite"] and figures["max"] == 0):
        return math.inf
    return -math.inf if figures["psnr"] is None else float(figures["psnr"])


def worst(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The layers of a report, worst own figure first; among equals the one that comes first."""
    return sorted(report["layers"], key=lambda layer: decibels(layer["own"]))


def show(report: Mapping[str, Any], console: Console) -> None:
    """Print a report: what was compared, the worst layers, then all outer ones in order with a bar for the error."""
    console.print(
        f"{escape(report['package'])}, {report['part'].replace('_', ' ')}, case {escape(report['case'])}: the exported "
        f"form in fp32 is {report['form']:.1f} dB from the pipeline, the package from the form "
        + ", ".join(f"{_db(figures)} ({name})" for name, figures in report["outputs"].items()),
        soft_wrap=True,
        highlight=False,
    )
    table = Table(title="worst layers by their own error", title_justify="left")
    table.add_column("layer", overflow="fold")
    for name in ("kind", "own dB", "total dB", "own L2", "own max"):
        table.add_column(name, justify="left" if name == "kind" else "right", no_wrap=True)
    for layer in worst(report)[:ROWS]:
        own = layer["own"]
        known = own is not None and own["relative"] is not None
        table.add_row(
            layer["name"],
            layer["kind"],
            _db(own),
            _db(layer["total"]),
            f"{own['relative']:.1e}" if known else "-",
            f"{own['max']:.1e}" if known else "-",
        )
    console.print(table)

    layers = report["layers"]
    depth = max((d for d in range(1, 12) if sum(_depth(layer) <= d for layer in layers) <= 60), default=1)
    table = Table(title="in order of execution", title_justify="left", caption="longer bars, larger own errors")
    table.add_column("layer", overflow="fold")
    for name in ("own dB", "total dB"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", width=BAR, no_wrap=True)
    for layer in layers:
        if _depth(layer) <= depth:
            length = math.ceil((96 - min(max(decibels(layer["own"]), 0.0), 96.0)) / 4)
            table.add_row(layer["name"], _db(layer["own"]), _db(layer["total"]), "#" * length)
    console.print(table)
    if report["skipped"]:
        console.print(f"not compared: {len(report['skipped'])}", highlight=False)
        for name, why in report["skipped"].items():
            console.print(f"  {name}: {why}", highlight=False, soft_wrap=True)


def main_compare(
    package: Path, checkpoint: str, out: Path | None, options: Options, case: int, console: Console
) -> dict[str, Any]:
    """`snapgen export compare`: print the report of `compare`, and write it to `out` as JSON."""
    report = compare(package, load(checkpoint), options, case=case)
    show(report, console)
    if out is not None:
        io.write_json(out, report)
    return report


def _depth(layer: Mapping[str, Any]) -> int:
    return str(layer["name"]).count(".") + 1


def _db(figures: Mapping[str, Any] | None) -> str:
    if figures is None:
        return "-"
    if not figures["finite"]:
        return "overflow"
    value = decibels(figures)
    return "equal" if value == math.inf else f"{value:.1f}"
