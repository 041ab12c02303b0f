"""Audits a Core ML package for the Neural Engine on any machine: what may fall back and why, what spills, the cost.

Reads any .mlpackage, also one that was made elsewhere. Every verdict names the published rules that it rests on
(`rules`); times are estimates (`phones`), whose error against published latencies is stated beside them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from snapgen.export import phones
from snapgen.export.cost import PRODUCTS, Step, flops, segments_of, steps_of
from snapgen.export.graph import Graph, Operation, Value, read_graphs
from snapgen.export.inspect import SYSTEMS, read_spec
from snapgen.export.rule_checks import ON_CHIP
from snapgen.export.rules import (
    FALLBACK,
    RULES,
    SOURCES,
    UNLISTED,
    VERDICTS,
    BorderFinding,
    Finding,
    border_findings,
    findings,
    verdict,
)
from snapgen.export.tools import PackageError

SCHEMA = 1  # of the JSON; rises when a key changes its meaning or goes
LARGEST_PACKAGE = (
    1_000_000_000  # bytes of weights; larger models must be cut for iOS (apple/ml-stable-diffusion README)
)


@dataclass(frozen=True)
class Audited:
    """An operation with its verdict and its cost.

    Attributes:
        step: number of the step that it is fused into; None for a view.
        working_set: bytes that it reads, writes and weighs.
    """

    op: Operation
    verdict: str
    findings: tuple[Finding, ...]
    flops: int
    step: int | None

    @property
    def bytes_in(self) -> int:
        """Bytes of the tensors that it reads, each once."""
        return sum({value.name: value.bytes for value in self.op.read}.values())

    @property
    def bytes_out(self) -> int:
        """Bytes of the tensors that it makes."""
        return sum(value.bytes for value in self.op.outputs)

    @property
    def working_set(self) -> int:
        """Bytes that it reads, makes and holds as weights."""
        return self.bytes_in + self.bytes_out + self.op.weights


@dataclass(frozen=True)
class Report:
    """What an audit of one function of a package found."""

    path: str
    function: str
    system: str
    graph: Graph
    operations: tuple[Audited, ...]
    steps: tuple[Step, ...]
    borders: tuple[BorderFinding, ...]
    segments: int
    switches: int
    notes: tuple[str, ...]

    def work(self) -> list[tuple[int, float, float]]:
        """(how many, FLOPs, bytes) of the steps on the engine, equal ones together, as `phones.seconds` takes them."""
        counts = Counter((step.flops, step.moved) for step in self.steps if step.on_engine)
        return [(count, float(flops), float(moved)) for (flops, moved), count in sorted(counts.items())]

    def seconds(self, phone: phones.Phone, given: phones.Shares | None = None) -> float:
        """Estimated time of one prediction on a device, without what falls back."""
        return phones.seconds(self.work(), self.segments, phone, given or phones.shares())


def audit(path: str | Path) -> list[Report]:
    """Audit every function of an .mlpackage.

    Raises:
        PackageError: it is missing, damaged, of a newer format, or no ML program.
    """
    graphs = read_graphs(path)
    spec, weights = read_spec(path)
    system = SYSTEMS.get(spec.specificationVersion, "before iOS15")
    size = sum(file.stat().st_size for file in weights.rglob("*") if file.is_file()) if weights.is_dir() else 0
    notes = []
    if size > LARGEST_PACKAGE:
        notes.append(
            f"{size / 1e9:.2f} GB of weights: above 1 GB a model is cut into chunks for iPhones "
            "(apple/ml-stable-diffusion, README)"
        )
    return [_audit_graph(str(path), system, graph, tuple(notes)) for graph in graphs]


def packages(paths: Iterable[str | Path]) -> list[Path]:
    """The .mlpackage folders among paths and inside folders of packages, in order, none twice.

    Raises:
        PackageError: there is none at or in a path.
    """
    found: dict[Path, None] = {}
    for path in map(Path, paths):
        inside = sorted(path.glob("*.mlpackage")) if path.is_dir() and not (path / "Manifest.json").is_file() else []
        if path.suffix == ".mlmodel" and path.is_file():
            raise PackageError(f"{path}: a single .mlmodel file holds a neural network, not an ML program")
        if path.is_dir() and path.suffix != ".mlpackage" and not (path / "Manifest.json").is_file() and not inside:
            raise PackageError(f"{path}: holds no .mlpackage")
        found.update(dict.fromkeys(inside or [path]))
    return list(found)


def _audit_graph(path: str, system: str, graph: Graph, notes: tuple[str, ...]) -> Report:
    found = {op.index: tuple(findings(op, graph)) for op in graph.operations}
    verdicts = {index: verdict(given) for index, given in found.items()}
    steps, step_of = steps_of(graph, verdicts)
    segments, switches = segments_of(graph, verdicts)
    return Report(
        path=path,
        function=graph.function,
        system=system,
        graph=graph,
        operations=tuple(
            Audited(op, verdicts[op.index], found[op.index], flops(op), step_of.get(op.index))
            for op in graph.operations
        ),
        steps=tuple(steps),
        borders=tuple(border_findings(graph)),
        segments=segments,
        switches=switches,
        notes=notes,
    )


def summary(report: Report) -> dict[str, Any]:
    """The figures of an audit: what the table, the page and the JSON show."""
    total = sum(op.flops for op in report.operations)
    by_verdict = {
        name: {
            "operations": sum(op.verdict == name for op in report.operations),
            "flops": sum(op.flops for op in report.operations if op.verdict == name),
        }
        for name in VERDICTS
    }
    fallen = [op for op in report.operations if op.verdict == FALLBACK]
    largest = max(fallen, key=lambda op: (op.flops, op.working_set), default=None)
    moved = sum(step.moved for step in report.steps if step.on_engine)
    worked = sum(step.flops for step in report.steps if step.on_engine)
    spilling = [step for step in report.steps if step.largest > ON_CHIP]
    return {
        "path": report.path,
        "function": report.function,
        "system": report.system,
        "operations": len(report.operations),
        "verdicts": by_verdict,
        "flops": total,
        "flops_of_products": sum(op.flops for op in report.operations if op.op.type in PRODUCTS),
        "share_on_engine": 1 - by_verdict[FALLBACK]["flops"] / total if total else float(not fallen),
        "weight_bytes": sum(step.weights for step in report.steps),
        "moved_bytes": moved,
        "intensity": worked / moved if moved else 0.0,
        "steps": len(report.steps),
        "spilling_steps": len(spilling),
        "spilling_operations": sum(len(step.operations) for step in spilling),
        "segments": report.segments,
        "switches": report.switches,
        "largest_fallback": None if largest is None else largest.op.name,
        "estimates": {
            phone.name: {"seconds": report.seconds(phone), "ridge": phones.ridge(phone, phones.shares())}
            for phone in phones.PHONES
        },
        "borders": [
            {
                "name": it.name, "side": it.side, "shape": list(it.shape), "dtype": it.dtype, "detail": it.detail,
                "source": it.source,
            }
            for it in report.borders
        ],
        "notes": list(report.notes),
    }  # fmt: skip


def as_json(reports: Iterable[Report]) -> dict[str, Any]:
    """Everything that was found, as plain values.

    Keys: `schema`; `rules` (name -> `says`, `verdict`, `about`, `sources`); `sources` (key -> name and address);
    `devices`; `trust` (the fit and its errors, see `phones.calibration`); `packages`: of each function of each package
    the keys of `summary`, and `list`, its operations in order: `name`, `type`, `inside`, `verdict`, `findings`,
    `inputs` and `outputs` (`name`, `shape`, `dtype`), `flops`, `bytes_in`, `bytes_out`, `weight_bytes`,
    `working_set`, `step`.
    """
    calibration = phones.calibration()
    return {
        "schema": SCHEMA,
        "rules": {
            rule.name: {
                "says": rule.says, "verdict": rule.verdict, "about": rule.about, "sources": list(rule.sources)
            }
            for rule in (*RULES, UNLISTED)
        },
        "sources": {key: {"name": name, "address": address} for key, (name, address) in SOURCES.items()},
        "devices": [
            {
                "name": phone.name, "chip": phone.chip, "peak_flops": phone.peak, "bandwidth": phone.bandwidth,
                "peak_source": phone.peak_source, "bandwidth_source": phone.bandwidth_source,
            }
            for phone in phones.PHONES
        ],
        "trust": {"shares": calibration["shares"], "figures": calibration["figures"]},
        "packages": [summary(report) | {"list": [_operation(op) for op in report.operations]} for report in reports],
    }  # fmt: skip


def _operation(audited: Audited) -> dict[str, Any]:
    op = audited.op
    return {
        "name": op.name,
        "type": op.type,
        "inside": list(op.inside),
        "verdict": audited.verdict,
        "findings": [{"rule": it.rule.name, "detail": it.detail} for it in audited.findings],
        "inputs": [_tensor(value) for value in op.read],
        "outputs": [_tensor(value) for value in op.outputs],
        "flops": audited.flops,
        "bytes_in": audited.bytes_in,
        "bytes_out": audited.bytes_out,
        "weight_bytes": op.weights,
        "working_set": audited.working_set,
        "step": audited.step,
    }


def _tensor(value: Value) -> dict[str, Any]:
    return {"name": value.name, "shape": list(value.shape), "dtype": value.dtype}
