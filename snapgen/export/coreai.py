"""Trained pipeline to Core AI assets (.aimodel, from iOS 27 and macOS 27): static shapes, each compared with the model.

The parts are those of the Core ML export, under the same names of inputs and outputs. coreai-torch and coreai-core are
optional and imported on first use; the rules that the programs keep are in `snapgen.export.coreai_audit`.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from snapgen import io
from snapgen.export import parity
from snapgen.export.convert import AUTHOR, LICENSE
from snapgen.export.coreai_audit import operations, violations
from snapgen.export.coreai_run import Asset
from snapgen.export.coreml import SCHEDULE, build_parts, text_tokens
from snapgen.export.denoiser import schedule
from snapgen.export.options import COREAI_DEFAULTS, PARTS, CoreAIOptions
from snapgen.export.parts import Part
from snapgen.export.tools import ExportError, ParityError, quiet, snapgen_version
from snapgen_kernels import use

Progress = Callable[[str, float], None]
GEMMA = "text_encoder_3"
FLOOR_FP32 = 70.0  # dB, where Apple's own guide to Core AI asks for it too; fp16 has `parity.FLOORS`
INSTALL = "pip install 'snapgen[coreai]'"
PLATFORMS = "Linux on x86-64 with glibc 2.34, or macOS, and Python 3.11 to 3.13"

aten = torch.ops.aten
_BROADCASTING = (
    aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.maximum.default, aten.minimum.default,
)  # fmt: skip
_RESHAPES = (
    aten.permute.default, aten.transpose.int, aten.reshape.default, aten.view.default, aten.unsqueeze.default,
    aten.squeeze.dim, aten.flatten.using_ints,
)  # fmt: skip


def export_pipeline(
    pipe: Any, out_dir: str | Path, options: CoreAIOptions = COREAI_DEFAULTS, *, progress: Progress | None = None
) -> dict[str, Any]:
    """Write the parts of a pipeline as .aimodel assets into `out_dir`.

    Every asset is converted, run by Core AI's runtime and compared with the model (`snapgen.export.parity`) in a hidden
    folder first; only when all hold do they appear, each whole, replacing one of that name. The pipeline stays as it
    is. A repeat with the same versions gives the same program, in which Core AI gives large constants random names.

    Args:
        pipe: a `SnapGenPipeline`. Shapes are those that it was trained at.
        options: what to export, and for what.
        progress: called with what is being done and the share that is done, 0 to 1.

    Returns:
        `dtype`, `batch`, `versions` and `parts`: for each, `psnr` (None where it was not checked), `floor` (dB),
        `seconds` of conversion and `check_seconds`, and `assets`, a list of `path`, `operations` (type -> count),
        `violations` (of `coreai_audit`) and `file_bytes`.

    Raises:
        ExportError: Core AI is missing, a part has layers that are not exported, a weight is too large for the dtype,
            or a check took longer than `options.check_seconds`.
        ParityError: a part is below its floor.
    """
    names = options.parts or tuple(name for name in PARTS if getattr(pipe, name) is not None and name != GEMMA)
    for name in names:
        if getattr(pipe, name) is None:
            raise ExportError(f"parts: the pipeline has no {name}; leave it out")
    if GEMMA in names:
        raise ExportError(f"parts: {GEMMA} (Gemma-2) takes several assets, which are not exported through Core AI")
    coreai_torch()
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {
        "dtype": options.dtype,
        "batch": options.batch,
        "versions": {name: importlib.metadata.version(name) for name in ("coreai-core", "coreai-torch", "torch")},
        "parts": {},
    }
    report["versions"]["snapgen"] = snapgen_version()
    tell = progress or (lambda message, share: None)
    steps = 2 * len(names) + 1
    dtype = getattr(torch, options.dtype)
    with tempfile.TemporaryDirectory(dir=out_dir, prefix=".export-") as staging:
        tell("reading the pipeline", 0.0)
        size, tokens = pipe.denoiser.config.sample_size, text_tokens(pipe)
        cases = parity.make_cases(pipe, tokens, size, size) if options.check_seconds else None
        for index, name in enumerate(names):
            shown = name.replace("_", " ")
            start = time.perf_counter()
            tell(f"converting the {shown}", (2 * index + 0.5) / steps)
            assets: list[dict[str, Any]] = []
            for part in build_parts(pipe, name, options.of_parts(), tokens):
                path = Path(staging) / asset_name(part)
                program = convert(part, path, dtype)
                assets.append({"path": path.name, "operations": operations(program), "violations": violations(program)})
            converted = time.perf_counter()
            figure = None
            if cases is not None:
                tell(f"checking the {shown}", (2 * index + 1.5) / steps)
                paths = [Path(staging) / asset["path"] for asset in assets]
                figure = _checked(name, paths, pipe, cases, options)
            report["parts"][name] = {
                "psnr": figure,
                "floor": floor(name, options.dtype),
                "seconds": converted - start,
                "check_seconds": time.perf_counter() - converted,
                "assets": assets,
            }
        tell("writing the assets", 1 - 0.5 / steps)
        if options.steps is not None and "denoiser" in names:
            io.write_json(out_dir / SCHEDULE, schedule(pipe, options.steps))
        for entry in report["parts"].values():
            for asset in entry["assets"]:
                staged, path = Path(staging) / asset["path"], out_dir / asset["path"]
                with io.whole_directory(path) as temporary:
                    for item in staged.iterdir():
                        shutil.move(item, temporary / item.name)
                asset["path"] = str(path)
                asset["file_bytes"] = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    tell("done", 1.0)
    return report


def convert(part: Part, path: Path, dtype: torch.dtype) -> Any:
    """Convert a part to an asset at `path`, whose name must end in .aimodel, and return its program (an `AIProgram`).

    Raises:
        ExportError: a weight is too large for `dtype`; Core AI is missing.
    """
    library = coreai_torch()
    runtime = importlib.import_module("coreai.runtime")
    with torch.no_grad(), use("reference"), torch.random.fork_rng(devices=[]), quiet():
        table = library.get_decomp_table()
        table[aten.pixel_shuffle.default] = pixel_shuffle
        exported = in_dtype(part, dtype).run_decompositions(table)
        # DEBUG, the default, would write the paths of our sources into the asset.
        converter = library.TorchConverter(mode=library.TorchConverter.Mode.RELEASE)
        converter.add_exported_program(
            exported,
            input_names=[feature.name for feature in part.inputs],
            output_names=[name for name, _ in part.outputs],
        )
        program = converter.to_coreai()
        program.optimize()
        metadata = runtime.AIModelAssetMetadata()
        metadata.author, metadata.license, metadata.model_description = AUTHOR, LICENSE, part.about
        metadata.set_custom("version", snapgen_version())
        metadata.set_custom("inputs", {feature.name: feature.about for feature in part.inputs})
        metadata.set_custom("outputs", dict(part.outputs))
        program.save_asset(path, metadata)
    # Written in random order, and with the time of writing.
    stamped = io.read_json(path / "metadata.json")
    stamped.pop("creationDate", None)
    io.write_json(path / "metadata.json", stamped)
    return program


def in_dtype(part: Part, dtype: torch.dtype) -> Any:
    """A part as an exported program that computes in `dtype`, its borders too, and holds its weights so.

    Parts are written in fp32 with fp16 borders, and Core ML's compiler turns their insides into fp16; coreai-torch
    takes a program as it is. As there, angles of the time embedding, which reach 1000 radians, stay in fp32 up to their
    sine and cosine, and so does the time. The part itself stays as it is.

    Raises:
        ExportError: a weight is too large for `dtype`; names it.
    """
    module = torch.export.export(part, (), part.arguments()).module()
    graph, waves = module.graph, (aten.cos.default, aten.sin.default)
    angles: set[Any] = set()
    for node in graph.nodes:
        if node.target in waves:
            angles |= _before(node)
    for node in list(graph.nodes):
        if node.target is aten._assert_tensor_metadata.default:  # of the dtype that a value had before a cast
            graph.erase_node(node)
        elif node.target is aten.to.dtype and node.args[1].is_floating_point and node not in angles:
            node.args = (node.args[0], dtype)
        elif node.target in waves:
            with graph.inserting_after(node):
                narrow = graph.call_function(aten.to.dtype, (node, dtype))
            node.replace_all_uses_with(narrow, delete_user_cb=lambda user, narrow=narrow: user is not narrow)
        elif node.op == "get_attr" and node not in angles:
            _narrow(module, node.target, dtype)
    _guard_reshapes(graph)
    module.recompile()
    inputs = part.arguments()
    wide = {node.target for node in angles if node.op == "placeholder"}
    inputs = {
        name: value.to(dtype) if value.is_floating_point() and name not in wide else value
        for name, value in inputs.items()
    }
    return torch.export.export(module, (), inputs)


def pixel_shuffle(x: Tensor, factor: int) -> Tensor:
    """`torch.pixel_shuffle` in rank 5: one axis after the other, no short axis last, which the engine would pad.

    Core AI's own lowering goes through rank 6, and gives its graph a random name.
    """
    batch, channels, height, width = x.shape
    channels //= factor * factor
    # [B, C * a, b, H, W] -> [B, C * a, W, b, H] -> [B, C * a, H, W * b]
    columns = x.reshape(batch, channels * factor, factor, height, width).permute(0, 1, 4, 2, 3)
    columns = columns.reshape(batch, channels * factor, width * factor, height).permute(0, 1, 3, 2)
    # [B, C, a, H, W * b] -> [B, C, H, a, W * b]
    rows = columns.reshape(batch, channels, factor, height, width * factor).permute(0, 1, 3, 2, 4)
    return rows.reshape(batch, channels, height * factor, width * factor)


def floor(name: str, dtype: str) -> float:
    """Of a part's PSNR against the model in fp32, dB."""
    return FLOOR_FP32 if dtype == "float32" else parity.FLOORS[name]


def asset_name(part: Part) -> str:
    """File name of a part's asset: that of its Core ML package with Core AI's suffix."""
    return Path(part.file).with_suffix(".aimodel").name


def coreai_torch() -> Any:
    """The package coreai-torch, with coreai-core behind it.

    Raises:
        ExportError: one of them is not installed, or is not made for this system.
    """
    try:
        importlib.import_module("coreai")
        with quiet():
            return importlib.import_module("coreai_torch")
    except ModuleNotFoundError as error:
        if error.name not in ("coreai", "coreai_torch"):
            raise
        package = {"coreai": "coreai-core", "coreai_torch": "coreai-torch"}[error.name]
        raise ExportError(
            f"Core AI export needs {package}, which is not installed: {INSTALL}, in an environment of its own, for it "
            f"takes PyTorch up to 2.11. There are wheels for {PLATFORMS}; this is {sys.platform}, Python "
            f"{sys.version_info.major}.{sys.version_info.minor}"
        ) from error


def main_coreai(
    checkpoint: str, out: Path, options: CoreAIOptions = COREAI_DEFAULTS, console: Any = None
) -> dict[str, Any]:
    """`snapgen export coreai`: load a checkpoint, export it under a progress bar, and print what is in the assets.

    Args:
        checkpoint: a folder, or the name of a shipped checkpoint ("tiny").
        out: folder for the assets.
        options: what to export, and for what.
        console: a rich console; by default standard output.

    Returns:
        The report of `export_pipeline`.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from snapgen.pipeline import SnapGenPipeline

    coreai_torch()  # fail before the work if it is missing
    console = console or Console()
    pipe = SnapGenPipeline.from_pretrained(checkpoint)
    columns = (BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=1.0)

        def tell(message: str, share: float) -> None:
            bar.update(task, description=message, completed=share)

        report = export_pipeline(pipe, out, options, progress=tell)
    _print(report, console)
    return report


def _print(report: dict[str, Any], console: Any) -> None:
    from rich.table import Table

    table = Table(title=f"Core AI assets, {report['dtype']}", title_justify="left")
    table.add_column("asset", no_wrap=True)
    for name in ("MB", "ops", "PSNR", "floor"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("not for the Neural Engine")
    for entry in report["parts"].values():
        for asset in entry["assets"]:
            kept = sorted({f"{found.operation} ({found.kind})" for found in asset["violations"]})
            table.add_row(
                Path(asset["path"]).name,
                f"{asset['file_bytes'] / 1e6:.2f}",
                str(sum(asset["operations"].values())),
                "not checked" if entry["psnr"] is None else f"{entry['psnr']:.1f} dB",
                f"{entry['floor']:.0f} dB",
                ("all of it: fp32" if report["dtype"] == "float32" else ", ".join(kept)) or "nothing",
            )
    console.print(table)


def _checked(name: str, paths: list[Path], pipe: Any, cases: parity.Cases, options: CoreAIOptions) -> float:
    (path,) = paths
    with Asset(path, options.check_seconds) as asset:
        program: Any = asset  # called as the interpreter's programs are
        figure = parity.check(name, program, pipe, cases)
    least = floor(name, options.dtype)
    if figure < least:
        raise ParityError(
            f"{name}: the exported program is {figure:.1f} dB from the model; the floor in {options.dtype} is "
            f"{least:.0f} dB. Nothing was written"
        )
    return figure


def _before(node: Any) -> set[Any]:
    """All nodes that a node's value is made of."""
    found: set[Any] = set()
    waiting = list(node.all_input_nodes)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += node.all_input_nodes
    return found


def _guard_reshapes(graph: Any) -> None:
    """Keep Core AI's compiler from dropping a reshape in front of an operation that broadcasts.

    coreai-core 1.0.0b2 takes a reshape that only moves axes of length 1 for one that adds them, and drops it where the
    result's shape stays the same: a mask [B, M, 1, 1] made of [B, 1, 1, M] is then added along the queries S instead of
    the keys M wherever S = M. It looks through operations with numbers, but not through a concatenation.
    """
    for node in list(graph.nodes):
        if node.target not in _BROADCASTING or not all(isinstance(value, torch.fx.Node) for value in node.args[:2]):
            continue
        for index, value in enumerate(node.args[:2]):
            other = _shape(node.args[1 - index])
            if any(_broadcast(shape, other) == _shape(node) for shape in _shapes_before(value)):
                axis = max(range(len(_shape(value))), key=lambda axis: _shape(value)[axis])
                half = _shape(value)[axis] // 2
                with graph.inserting_before(node):
                    ends = ((0, half), (half, _shape(value)[axis]))
                    halves = [graph.call_function(aten.slice.Tensor, (value, axis, *end)) for end in ends]
                    whole = graph.call_function(aten.cat.default, (halves, axis))
                node.update_arg(index, whole)


def _shapes_before(node: Any) -> list[tuple[int, ...]]:
    """Shapes that a value had before reshapes that moved axes of length 1 alone, where they differ from its own."""
    shape, found = _shape(node), []
    while len(node.all_input_nodes) == 1:
        (source,) = node.all_input_nodes
        if [size for size in _shape(source) if size > 1] != [size for size in shape if size > 1]:
            break
        if node.target not in _RESHAPES and _shape(source) != _shape(node):
            break
        node = source
        if _unpadded(_shape(node)) != _unpadded(shape):
            found.append(_shape(node))
    return found


def _unpadded(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Without leading axes of length 1, which broadcasting adds by itself."""
    return shape[next((axis for axis, size in enumerate(shape) if size > 1), len(shape)) :]


def _broadcast(first: tuple[int, ...], second: tuple[int, ...]) -> tuple[int, ...] | None:
    """The shape that two shapes broadcast to; None where they do not."""
    length = max(len(first), len(second))
    pairs = list(zip((1,) * (length - len(first)) + first, (1,) * (length - len(second)) + second, strict=True))
    return tuple(map(max, pairs)) if all(a == b or 1 in (a, b) for a, b in pairs) else None


def _shape(node: Any) -> tuple[int, ...]:
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def _narrow(module: nn.Module, name: str, dtype: torch.dtype) -> None:
    """Replace a tensor of a module by a copy in `dtype`; whole numbers stay."""
    owner_name, _, attribute = name.rpartition(".")
    owner = module.get_submodule(owner_name)
    value = getattr(owner, attribute)
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype == dtype:
        return
    narrow = value.detach().to(dtype)
    if not narrow.isfinite().all():
        raise ExportError(f"{name} reaches {value.abs().max():.3g}, too large for {str(dtype).rpartition('.')[-1]}")
    setattr(owner, attribute, nn.Parameter(narrow, requires_grad=False) if isinstance(value, nn.Parameter) else narrow)
