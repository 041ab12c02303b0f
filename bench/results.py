"""Rows of measurements: the CSV file that is only ever added to, and comparisons within a run."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from snapgen.io import write_text


@dataclass(frozen=True)
class Row:
    """One provider on one case in one mode. Times in ms, ``bytes`` and ``flops`` from :func:`bench.cases.costs`.

    ``floor_ms`` follows from ``gemm_gflops`` (GFLOP/s) and ``copy_gbs`` (GB/s), measured in the same run;
    ``peak_bytes`` is the most memory held at once beyond what was there before, outputs included; of ``bwd``, what the
    forward left for it, the peak of both being that of ``fwd+bwd`` (-1: not measured, as all of ``bwd`` on a CPU;
    scratch outside PyTorch's allocator does not count). ``checked`` says what was compared with fp64 beforehand. The
    rest is :class:`bench.machine.Provenance`.
    """

    op: str
    case: str
    dtype: str
    mode: str
    provider: str
    p20_ms: float
    p50_ms: float
    p80_ms: float
    repeats: int
    flops: int
    bytes: int
    floor_ms: float
    gemm_gflops: float
    copy_gbs: float
    peak_bytes: int
    checked: str
    provider_version: str
    date: str
    commit: str
    device: str
    variant: str
    threads: int
    malloc: str
    load: float
    python: str
    torch: str
    triton: str
    snapgen: str

    @property
    def on_gpu(self) -> bool:
        """Whether the device is a GPU: its variant is a compute capability."""
        return self.variant.startswith("sm_")

    @property
    def gflops(self) -> float:
        """GFLOP/s at the median."""
        return self.flops / self.p50_ms / 1e6

    @property
    def share(self) -> float:
        """GFLOP/s over those of a large matrix product of its dtype, measured in the same run."""
        return self.gflops / self.gemm_gflops


COLUMNS = tuple(field.name for field in fields(Row))
_NUMBERS = {f.name: {"int": int, "float": float}[str(f.type)] for f in fields(Row) if f.type in ("int", "float")}


def append(path: Path, rows: Sequence[Row]) -> None:
    """Add rows to a CSV file (made if missing), whole or not at all; what is there stays as it is.

    Raises:
        ValueError: the file has other columns.
    """
    there = path.read_text(encoding="utf-8") if path.exists() else ""
    if there:
        header = tuple(next(csv.reader(io.StringIO(there))))
        if header != COLUMNS:
            different = sorted(set(header) ^ set(COLUMNS)) or ["their order"]
            raise ValueError(f"{path}: its columns differ from this version's ({', '.join(different)}); move it away")
        if not there.endswith("\n"):
            there += "\n"
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    if not there:
        writer.writeheader()
    writer.writerows({name: _text(value) for name, value in asdict(row).items()} for row in rows)
    write_text(path, there + text.getvalue())


def read(path: Path) -> list[Row]:
    """The rows of a CSV file.

    Raises:
        ValueError: a row does not fit; names file and line.
    """
    with path.open(newline="", encoding="utf-8") as file:
        return [_row(record, f"{path}, line {line}") for line, record in enumerate(csv.DictReader(file), 2)]


def _row(record: dict[str, Any], where: str) -> Row:
    missing = [name for name in COLUMNS if record.get(name) is None]
    if missing:
        raise ValueError(f"{where}: no value for {', '.join(missing)}")
    try:
        return Row(**{name: _NUMBERS.get(name, str)(record[name]) for name in COLUMNS})
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _text(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


FASTEST = ("fused", "fused-compile")
OURS = (*FASTEST, "fused-low")


@dataclass(frozen=True)
class Comparison:
    """All providers on one case in one mode of one run."""

    rows: tuple[Row, ...]

    @property
    def first(self) -> Row:
        return self.rows[0]

    @property
    def fused(self) -> Row | None:
        """Ours: the fused ops, or inside torch.compile where a model was timed so too and is faster."""
        return min((r for r in self.rows if r.provider in FASTEST), key=lambda r: r.p50_ms, default=None)

    @property
    def best_peer(self) -> Row | None:
        """The fastest of the others, by median."""
        return min((r for r in self.rows if r.provider not in OURS), key=lambda r: r.p50_ms, default=None)

    @property
    def speedup(self) -> float | None:
        """How many times faster than the best peer; below 1 is slower. None where either is missing."""
        fused, peer = self.fused, self.best_peer
        return None if fused is None or peer is None else peer.p50_ms / fused.p50_ms

    def of(self, provider: str) -> Row | None:
        return next((row for row in self.rows if row.provider == provider), None)


def compare(rows: Iterable[Row]) -> list[Comparison]:
    """Group rows by device, threads, malloc, op, case, dtype and mode, in their order; of each only the latest run."""
    groups: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        key = (row.device, row.threads, row.malloc, row.op, row.case, row.dtype, row.mode)
        group = groups.setdefault(key, [])
        if group and row.date > group[0].date:
            group.clear()
        if not group or row.date == group[0].date:
            group.append(row)
    return [Comparison(tuple(group)) for group in groups.values()]
