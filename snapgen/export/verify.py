"""`snapgen export verify`: is an export whole, and do its packages compute what the model computes.

On a Mac, Core ML runs each function of each part on every compute unit; elsewhere the interpreter runs it. The golden
calls that travel with the export decide, against the floors that it was held to.
"""

from __future__ import annotations

import json
import math
import platform
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from snapgen import io
from snapgen.export import golden, inspect
from snapgen.export.device import UNITS
from snapgen.export.interpreter import Chain, Program
from snapgen.export.parity import Case
from snapgen.export.tools import PackageError, ParityError, coremltools

INTERPRETER = "interpreter"
WORKER = (sys.executable, "-m", "snapgen.export.device")
PHONES = "phones, whose Neural Engine and memory are others than this Mac's"
UNCHECKED = (
    "Core ML itself, which runs on macOS only: its arithmetic, where it runs each operation, and how fast. The "
    "interpreter rounds as the program says and accumulates in fp32. Run this command on a Mac to check the rest"
)


def verify(
    folder: str | Path,
    *,
    units: Sequence[str] = UNITS,
    repeats: int = 20,
    timeout: float = 900.0,
    worker: Sequence[str] | None = None,
    progress: Callable[[str, float], None] | None = None,
) -> dict[str, Any]:
    """Check the packages of an export against its golden calls.

    Args:
        folder: what `export_pipeline` wrote.
        units: compute units that Core ML is run on; the interpreter has none.
        repeats: timed predictions, after a few that are not timed.
        timeout: seconds that loading, running and timing one function on one unit may take.
        worker: command that runs Core ML (`snapgen.export.device`); by default that on macOS, and elsewhere none, so
            that the interpreter runs.
        progress: called with what is being done and the share that is done, 0 to 1.

    Returns:
        `folder`; `machine`; `files`, how many were compared with their SHA-256; `problems`, a line for each file that
        is not as it was written and each package that cannot be read; `packages`, name -> oldest system; `results`, for
        each part, function and unit: `psnr` and `figures` by call (dB; None where there is no difference at all),
        `floor`, `failure` (None, or what went wrong), `packages` with `ready_seconds`, `load_seconds`, `predict_ms` and
        `residency` (Core ML only); `unchecked`, what this machine cannot tell; `holds`, whether there are no problems
        and every result is at or above its floor.

    Raises:
        ValueError: an argument is none of those allowed.
        PackageError: the folder holds no export.
    """
    _check_arguments(units, repeats, timeout)
    folder = Path(folder)
    record = golden.read(folder)
    if worker is None and sys.platform == "darwin":
        worker = WORKER
    names = [package for entry in record["parts"].values() for package in entry["packages"]]
    found = golden.fingerprints(folder)
    strangers = sorted(path.name for path in folder.glob("*.mlpackage") if path.name not in names)
    unchecked = [f"{name}: not of this export" for name in strangers] + [UNCHECKED if worker is None else PHONES]
    problems = _changes(record["sha256"], found, names)
    packages: dict[str, Any] = {}
    for name in names:
        try:
            packages[name] = inspect.describe(folder / name)
        except PackageError as error:
            problems.append(str(error))
    results = []
    runs = [
        (part, function, unit)
        for part, entry in record["parts"].items()
        for function in entry["functions"]
        for unit in (units if worker is not None else (INTERPRETER,))
        if all(name in packages for name in entry["packages"])
    ]
    tensors = io.load_tensors(folder / golden.GOLDEN)
    tell = progress or (lambda message, share: None)
    for index, (part, function, unit) in enumerate(runs):
        tell(f"{part.replace('_', ' ')} on {unit}", index / len(runs))
        entry = record["parts"][part]
        told = entry["functions"][function]["golden"]
        own = [packages[name] for name in entry["packages"]]
        result: dict[str, Any] = {"part": part, "function": function, "unit": unit, "floor": entry["floor"]}
        cases = golden.calls(told, tensors)
        if worker is None:
            program = Chain([Program(package["path"], function) for package in own])
            outputs = [program(case.inputs) for case in cases]
            result |= {"failure": None, "packages": []}
        else:
            request = {
                "unit": unit,
                "function": function,
                "packages": [_for_worker(package, function) for package in own],
                "golden": str((folder / golden.GOLDEN).resolve()),
                "calls": [call["inputs"] for call in told],
                "repeats": repeats,
            }
            outputs, ended = _in_process(worker, request, timeout)
            result |= ended
        failure = result["failure"]
        results.append(result | _figures(cases, outputs))
        results[-1]["failure"] = failure or results[-1]["failure"]
    tell("done", 1.0)
    return {
        "folder": str(folder),
        "machine": {
            "system": platform.platform(),
            "processor": platform.machine(),
            "coremltools": coremltools().__version__,
        },
        "files": len(record["sha256"]),
        "problems": problems,
        "packages": {name: package["system"] for name, package in packages.items()},
        "results": results,
        "unchecked": unchecked,
        "holds": not problems and all(result_holds(result) for result in results),
    }


def result_holds(result: Mapping[str, Any]) -> bool:
    """Whether a run ended well, at or above its floor."""
    if result["failure"] is not None or not result["figures"]:
        return False
    return result["psnr"] is None or result["psnr"] >= result["floor"]


def report(found: Mapping[str, Any], console: Console | None = None) -> None:
    """Print what `verify` found."""
    console = console or Console()
    timed = any(result["packages"] for result in found["results"])
    table = Table(title=f"{found['folder']} on {found['machine']['system']}", title_justify="left")
    for name in ("part", "on"):
        table.add_column(name)
    for name in ("PSNR", "floor", *(("compile", "load", "ms", "NE ops", "NE cost") if timed else ())):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("")
    for result in found["results"]:
        psnr = "same" if result["psnr"] is None else f"{result['psnr']:.1f}"
        table.add_row(
            result["part"] + ("" if result["function"] == "main" else f" {result['function']}"),
            result["unit"],
            psnr if result["figures"] and (result["psnr"] is not None or result_holds(result)) else "-",
            f"{result['floor']:.0f}",
            *(_measurements(result["packages"]) if timed else ()),
            "[green]holds[/]" if result_holds(result) else "[red]fails[/]",
        )
    console.print(table)
    for result in found["results"]:
        where = f"{result['part']} {result['function']} on {result['unit']}"
        if result["failure"] is not None:
            console.print(f"[red]{where}:[/] {escape(result['failure'])}", highlight=False)
        for package in result["packages"]:
            plan = package.get("residency", {})
            if "problem" in plan:
                console.print(f"{where}: {escape(plan['problem'])}", highlight=False)
            if result["unit"] in ("CPU_AND_NE", "ALL") and plan.get("elsewhere"):
                listed = ", ".join(
                    f"{entry['operations']} {entry['operation']} ({entry['device']})" for entry in plan["elsewhere"]
                )
                console.print(f"{where}, {package['package']}, not on the Neural Engine: {listed}", highlight=False)
    whole = f"{found['files']} files as they were written"
    console.print("; ".join(found["problems"]) or whole, style="red" if found["problems"] else None, highlight=False)
    for line in found["unchecked"]:
        console.print(f"not checked: {line}", highlight=False)


def main_verify(
    folder: Path,
    *,
    out: Path | None = None,
    units: Sequence[str] = UNITS,
    repeats: int = 20,
    timeout: float = 900.0,
    console: Any = None,
) -> dict[str, Any]:
    """`snapgen export verify`: check an export under a progress bar, print what was found, and write it as JSON.

    Args:
        folder, units, repeats, timeout: as for `verify`.
        out: JSON file for what `verify` returns.
        console: a rich console; by default standard output.

    Raises:
        ParityError: something does not hold; it is printed, and written to `out`, before.
    """
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = console or Console()
    columns = (BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=1.0)

        def tell(message: str, share: float) -> None:
            bar.update(task, description=message, completed=share)

        found = verify(folder, units=units, repeats=repeats, timeout=timeout, progress=tell)
    report(found, console)
    if out is not None:
        io.write_json(out, found)
    if not found["holds"]:
        failed = [f"{it['part']} {it['function']} on {it['unit']}" for it in found["results"] if not result_holds(it)]
        raise ParityError(f"{folder}: does not hold: {'; '.join([*found['problems'], *failed])}")
    return found


def _check_arguments(units: Sequence[str], repeats: int, timeout: float) -> None:
    for unit in units:
        if unit not in UNITS:
            raise ValueError(f"units: got {unit!r}; allowed are {', '.join(UNITS)}")
    if not units:
        raise ValueError(f"units: none is named; allowed are {', '.join(UNITS)}")
    if repeats < 1:
        raise ValueError(f"repeats: got {repeats}; must be at least 1")
    if not timeout > 0:
        raise ValueError(f"timeout: got {timeout} seconds; must be more than 0")


def _changes(written: Mapping[str, str], found: Mapping[str, str], packages: Sequence[str]) -> list[str]:
    """A line for each file that is missing, changed, or new inside a package."""
    lines = {place: "changed since it was written" for place in written if found.get(place) != written[place]}
    lines |= dict.fromkeys(written.keys() - found.keys(), "missing")
    new = {place for place in found.keys() - written.keys() if place.split("/")[0] in packages}
    lines |= dict.fromkeys(new, "was not written by the export")
    return [f"{place}: {line}" for place, line in sorted(lines.items())]


def _for_worker(package: Mapping[str, Any], function: str) -> dict[str, Any]:
    return {
        "path": str(Path(package["path"]).resolve()),
        "inputs": [feature["name"] for feature in package["functions"][function]["inputs"]],
        "several": len(package["functions"]) > 1,
    }


def _in_process(
    worker: Sequence[str], request: Mapping[str, Any], timeout: float
) -> tuple[list[dict[str, Tensor]], dict[str, Any]]:
    """Run a request in a process of its own; the outputs of each call, as far as it came, and how it ended."""
    with tempfile.TemporaryDirectory(prefix="snapgen-verify-") as place:
        asked, folder = Path(place) / "request.json", Path(place) / "results"
        folder.mkdir()
        asked.write_text(json.dumps(request), encoding="utf-8")
        failure = None
        try:
            ended = subprocess.run(
                [*worker, str(asked), str(folder)], capture_output=True, text=True, timeout=timeout, check=False
            )
        except subprocess.TimeoutExpired:
            failure = f"did not end within {timeout:.0f} s"
        else:
            if ended.returncode:
                failure = _ending(ended.returncode, ended.stderr)
        outputs: list[dict[str, Tensor]] = [{} for _ in request["calls"]]
        if (folder / "result.json").is_file():
            for name, value in io.load_tensors(folder / "outputs.safetensors").items():
                index, output = name.split(".", 1)
                outputs[int(index)][output] = value
            packages = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        else:
            outputs, packages = [], []
    return outputs, {"failure": failure, "packages": packages}


def _ending(code: int, errors: str) -> str:
    """How a process ended, in a line."""
    said = [line.strip() for line in errors.splitlines() if line.strip()]
    ending = f"the process was ended by {signal.Signals(-code).name}" if code < 0 else f"the process ended with {code}"
    return f"{ending}: {said[-1]}" if said else ending


def _figures(cases: Sequence[Case], outputs: Sequence[Mapping[str, Tensor]]) -> dict[str, Any]:
    """`psnr` and `figures` of a run; no figures where it left no outputs."""
    if not outputs:
        return {"psnr": None, "figures": {}}
    for case, output in zip(cases, outputs, strict=True):
        wanted = {name: tuple(value.shape) for name, value in case.outputs.items()}
        got = {name: tuple(value.shape) for name, value in output.items()}
        if got != wanted:
            return {"psnr": None, "figures": {}, "failure": f"gave outputs {got}; the export's are {wanted}"}
    figures = {case.name: case.compare(output) for case, output in zip(cases, outputs, strict=True)}
    broken = [name for name, figure in figures.items() if figure == -math.inf]
    worst = golden.decibels(min(figures.values()))
    found = {"psnr": worst, "figures": {name: golden.decibels(figure) for name, figure in figures.items()}}
    return found | ({"failure": f"gave numbers that are not finite at {', '.join(broken)}"} if broken else {})


def _measurements(packages: Sequence[Mapping[str, Any]]) -> list[str]:
    """Compile and load (s), prediction (ms) and the Neural Engine's shares, of all packages of a part together."""

    def total(values: Sequence[float | None], form: str) -> str:
        known = [value for value in values if value is not None]
        return form.format(sum(known)) if len(known) == len(packages) and known else "-"

    plans = [package.get("residency", {}) for package in packages]
    shares = []
    for side, key in (("operations", "neural_engine"), ("cost", "neural_engine_cost")):
        known = [plan["devices"] for plan in plans if plan.get(key) is not None]
        everything = sum(tally[side] for devices in known for tally in devices.values())
        engine = sum(devices.get("Neural Engine", {side: 0})[side] for devices in known)
        shares.append(f"{100 * engine / everything:.1f}%" if len(known) == len(packages) and everything else "-")
    return [
        total([_compiled(package) for package in packages], "{:.1f} s"),
        total([package["load_seconds"] for package in packages], "{:.1f} s"),
        total([package.get("predict_ms", {}).get("median") for package in packages], "{:.2f}"),
        *shares,
    ]


def _compiled(package: Mapping[str, Any]) -> float | None:
    loaded = package["load_seconds"]
    return None if loaded is None else float(package["ready_seconds"] - loaded)
