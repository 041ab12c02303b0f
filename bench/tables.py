"""The README's tables from what was measured: ``python -m bench.tables README.md`` rewrites what stands between the
lines ``<!-- bench:begin -->`` and ``<!-- bench:end -->`` (rows of bench/results), ``<!-- goals:begin -->`` and
``<!-- goals:end -->`` (the same against their goals), likewise ``gpu-goals`` (those of GPUs alone) and ``scores`` (of
the shipped checkpoint), each where it is there; ``--check`` only says whether they are up to date.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro
from tyro.conf import Positional

from bench import goals
from bench.machine import RESULTS
from bench.models import MODELS
from bench.providers import NAMES
from bench.results import Comparison, Row, compare, read
from snapgen.config import SHIPPED
from snapgen.data.shapes import SKILLS
from snapgen.io import write_text

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
GOALS_BEGIN, GOALS_END = "<!-- goals:begin -->", "<!-- goals:end -->"
GPU_GOALS_BEGIN, GPU_GOALS_END = "<!-- gpu-goals:begin -->", "<!-- gpu-goals:end -->"
SCORES_BEGIN, SCORES_END = "<!-- scores:begin -->", "<!-- scores:end -->"
SCORES = {
    "": "tiny",
    "`tiny-4`, ": "tiny-4",
}  # how rows begin, and whose: of `snapgen eval shapes ... -o`
_EMPTY = "No rows are recorded yet: `python -m bench` measures this machine and appends them to `bench/results/`."
_LEGEND = (
    "Medians in milliseconds, providers in turns within one run. *Gain*: the best peer's time over ours. *Stock*: the "
    "same with glibc's malloc as it comes, which is otherwise told to keep its pages. *GEMM*: our FLOP/s over those of "
    "a large matrix product. *Floor*: the share of the time that the machine's own matrix products and memory copies, "
    "measured in the same run, allow. Ours is the faster of *fused* and *fused-compile*, the whole model inside "
    "torch.compile with our ops in it. *Memory*: our peak beyond weights and inputs over PyTorch's. *bwd* is the "
    "backward pass alone, *step* a whole training step with its optimizer. Whole models have random weights."
)


class MarkerError(ValueError):
    """The file lacks the two marker lines, or has them in the wrong order."""


Key = tuple[str, str, str, str]


def tables(rows: Sequence[Row]) -> str:
    """Markdown: for every device, thread count and malloc a table of the ops and one of whole models, with a line for
    each case, dtype and mode. What was measured with a stock malloc stands as a column beside what was not."""
    groups = compare(rows)
    if not groups:
        return _EMPTY
    machines: dict[tuple[str, int], dict[str, list[Comparison]]] = {}
    for group in groups:
        first = group.first
        machines.setdefault((first.device, first.threads), {}).setdefault(first.malloc, []).append(group)
    found = [_LEGEND]
    for by_malloc in machines.values():
        stock = {_key(group): group for group in by_malloc.get("stock", [])} if "tuned" in by_malloc else {}
        found += [
            _machine(members, stock) for malloc, members in by_malloc.items() if not (stock and malloc == "stock")
        ]
    return "\n\n".join(found)


def _key(group: Comparison) -> Key:
    return group.first.op, group.first.case, group.first.dtype, group.first.mode


def _machine(groups: Sequence[Comparison], stock: Mapping[Key, Comparison]) -> str:
    row = max((group.first for group in groups), key=lambda row: row.date)
    commits = ", ".join(dict.fromkeys(group.first.commit for group in groups))
    about = (
        f"**{row.device}** ({row.variant}), {row.threads} threads, malloc {row.malloc}; torch {row.torch}, "
        f"commit {commits}, {row.date[:10]}; matrix products "
        + ", ".join(f"{dtype} {rate:.0f}" for dtype, rate in _rates(groups).items())
        + " GFLOP/s"
    )
    # The sum of bwd and a forward is in the CSV file.
    shown = [group for group in groups if group.first.mode != "fwd+bwd"]
    whole = [group for group in shown if group.first.op in MODELS]
    single = [group for group in shown if group.first.op not in MODELS]
    parts = [_table(members, stock, what) for what, members in (("op", single), ("model", whole)) if members]
    return "\n\n".join([about, *parts])


def _table(groups: Sequence[Comparison], stock: Mapping[Key, Comparison], what: str) -> str:
    present = {row.provider for group in groups for row in group.rows}
    providers = [name for name in NAMES if name in present]
    extra = ["gain", *(["stock"] if any(_key(group) in stock for group in groups) else []), "GEMM", "floor"]
    if what == "model":
        extra.append("memory")
    lines = [_line([what, "case", "dtype", "mode", *providers, *extra])]
    lines.append("|---|---|---|---|" + "---:|" * (len(providers) + len(extra)))
    for group in groups:
        first, fused, gain = group.first, group.fused, group.speedup
        cells = [f"`{first.op}`", first.case, first.dtype, first.mode]
        fastest = min(group.rows, key=lambda r: r.p50_ms).provider
        for name in providers:
            found = group.of(name)
            text = "" if found is None else _ms(found.p50_ms)
            cells.append(f"**{text}**" if name == fastest else text)
        out_of_the_box = stock[_key(group)].speedup if _key(group) in stock else None
        values = {
            "gain": "" if gain is None else f"{gain:.2f}x",
            "stock": "" if out_of_the_box is None else f"{out_of_the_box:.2f}x",
            "GEMM": "" if fused is None else f"{fused.share:.0%}",
            "floor": "" if fused is None else f"{fused.floor_ms / fused.p50_ms:.0%}",
            "memory": _memory(group),
        }
        lines.append(_line([*cells, *(values[name] for name in extra)]))
    return "\n".join(lines)


def _memory(group: Comparison) -> str:
    """Our peak memory over that of plain PyTorch."""
    fused, eager = group.fused, group.of("eager")
    if fused is None or eager is None or min(fused.peak_bytes, eager.peak_bytes) <= 0:
        return ""
    return f"{fused.peak_bytes / eager.peak_bytes:.2f}x"


def _rates(groups: Sequence[Comparison]) -> dict[str, float]:
    rates: dict[str, float] = {}
    for group in groups:
        rates[group.first.dtype] = max(rates.get(group.first.dtype, 0.0), group.first.gemm_gflops)
    return rates


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _ms(value: float) -> str:
    decimals = next((d for d, limit in ((4, 0.1), (3, 1), (2, 10)) if value < limit), 1)
    return f"{value:.{decimals}f}"


def score_table(scores: Mapping[str, Mapping[str, float]]) -> str:
    """Markdown: a line for each number of steps, trained and not."""
    columns = (*SKILLS, "overall")
    lines = [_line(["", *(skill.replace("_", " ") for skill in columns)]), "|---|" + "---:|" * len(columns)]
    lines += [_line([name, *(f"{row[skill]:.2f}" for skill in columns)]) for name, row in scores.items()]
    return "\n".join(lines)


def insert(text: str, generated: str, where: str, begin: str = BEGIN, end: str = END) -> str:
    """``text`` with what stands between the markers replaced.

    Raises:
        MarkerError: the markers are not there once each, in order.
    """
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise MarkerError(f"{where}: needs the line {begin} and, after it, the line {end}, once each")
    before, rest = text.split(begin)
    return f"{before}{begin}\n{generated}\n{end}{rest.split(end)[1]}"


@dataclass(frozen=True)
class _Options:
    """Write the tables of bench/results between the marker lines of a Markdown file."""

    file: Positional[Path] = Path("README.md")
    """The file with the marker lines."""
    check: bool = False
    """Change nothing; exit code 1 where the file is not up to date."""
    results: Path = RESULTS
    """Folder of the CSV files."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done or up to date, 1 not up to date, 2 the file or its markers are missing."""
    options = tyro.cli(_Options, args=arguments, prog="python -m bench.tables")
    rows = [row for path in sorted(options.results.glob("*.csv")) for row in read(path)]
    try:
        old = options.file.read_text(encoding="utf-8")
        if not any(begin in old for begin in (BEGIN, GOALS_BEGIN, SCORES_BEGIN)):
            raise MarkerError(f"{options.file}: needs the line {BEGIN}, {GOALS_BEGIN} or {SCORES_BEGIN}")
        new = old
        if BEGIN in old or END in old:
            new = insert(new, tables(rows), str(options.file))
        if GOALS_BEGIN in old:
            new = insert(new, goals.table(rows), str(options.file), GOALS_BEGIN, GOALS_END)
        if GPU_GOALS_BEGIN in old:
            new = insert(new, goals.gpu_table(rows), str(options.file), GPU_GOALS_BEGIN, GPU_GOALS_END)
        if SCORES_BEGIN in old:
            files = {begin: SHIPPED / name / "scores.json" for begin, name in SCORES.items()}
            scores = {
                begin + row: values
                for begin, file in files.items()
                for row, values in json.loads(file.read_text(encoding="utf-8")).items()
            }
            new = insert(new, score_table(scores), str(options.file), SCORES_BEGIN, SCORES_END)
    except (MarkerError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if new == old:
        print(f"{options.file}: up to date")
        return 0
    if options.check:
        print(f"{options.file}: not up to date; run `python -m bench.tables {options.file}`", file=sys.stderr)
        return 1
    write_text(options.file, new)
    print(f"{options.file}: rewritten from {len(rows)} rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
