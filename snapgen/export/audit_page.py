"""What an audit found, on the terminal and as one self-contained HTML page."""

from __future__ import annotations

import html
import io as memory
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from snapgen import io, report
from snapgen.export import phones
from snapgen.export.audit import Audited, Report, as_json, audit, packages, summary
from snapgen.export.cost import Step
from snapgen.export.rule_checks import ON_CHIP
from snapgen.export.rules import ENGINE, FALLBACK, RULES, SOURCES, UNLISTED, VERDICTS
from snapgen.export.tools import snapgen_version
from snapgen.report import Html, code, join

LISTED = 25  # rows of a table of the worst; the JSON holds every operation
FALLBACKS_LISTED = 200
DEFAULT_PHONE = "iPhone 16 Pro Max"
CAVEAT = (
    "Verdicts rest on published rules, not on Core ML's own decision, which depends on chip, system and shapes and "
    "which Apple does not document; Xcode's performance report on a device is what decides."
)


def main_audit(
    paths: Sequence[Path],
    out: Path | None = None,
    json: Path | None = None,
    phone: str | None = None,
    strict: bool = False,
    console: Console | None = None,
) -> int:
    """`snapgen export audit`: audit packages, print the tables, and write what is asked for, whole.

    Args:
        paths: packages, or folders of packages.
        out: HTML page to write. json: JSON file to write.
        phone: the device whose slowest steps are shown; also restricts the estimates to it.

    Returns:
        The exit code: 0, and with `strict` 2 where an operation falls back.

    Raises:
        ValueError: there is no such device.
        PackageError: a package cannot be read.
    """
    console = console or Console()
    chosen = phones.find(phone or DEFAULT_PHONE)
    reports = [found for path in packages(paths) for found in audit(path)]
    show(reports, chosen, console, only=phone is not None)
    if json is not None:
        io.write_json(json, as_json(reports))
        console.print(f"wrote {escape(str(json))}", soft_wrap=True)
    if out is not None:
        io.write_text(out, page(reports, chosen))
        console.print(f"wrote {escape(str(out))}", soft_wrap=True)
    return 2 if strict and any(op.verdict == FALLBACK for found in reports for op in found.operations) else 0


def show(reports: Sequence[Report], phone: phones.Phone, console: Console, *, only: bool = False) -> None:
    """Print the tables: verdicts, what falls back and why, working sets, and estimates (of `phone` only, or of all)."""
    for table in _verdicts(reports):
        console.print(table)
    for found in reports:
        rules = _by_rule(found)
        if rules:
            table = Table(title=escape(_title(found)), title_justify="left")
            for name in ("rule", "verdict", "ops", "for example"):
                table.add_column(name, justify="right" if name == "ops" else "left")
            for rule, listed in rules:
                op, detail = listed[0]
                table.add_row(rule.name, rule.verdict, str(len(listed)), escape(f"{op.op.name}: {detail}"))
            console.print(table)
        else:
            console.print(f"{escape(_title(found))}: no rule speaks against an operation", highlight=False)
        for it in found.borders:
            console.print(escape(f"  {it.side}put {it.name}: {it.detail}"), highlight=False, soft_wrap=True)
        for note in found.notes:
            console.print(escape(f"  {note}"), highlight=False, soft_wrap=True)
        worst = _worst_working_sets(found)[:3]
        largest = ", ".join(f"{op.op.name} ({op.op.type}) {report.size(op.working_set)}" for op in worst)
        if largest:
            console.print(escape(f"  largest working sets: {largest}"), highlight=False, soft_wrap=True)
    table = Table(title="estimated time of a prediction, without what falls back", title_justify="left")
    table.add_column("phone", no_wrap=True)
    for found in reports:
        table.add_column(escape(_title(found)), justify="right", overflow="fold")
    for device in (phone,) if only else phones.PHONES:
        table.add_row(device.name, *(_time(found.seconds(device)) for found in reports))
    console.print(table)
    console.print(f"{trust_line()} {CAVEAT}", highlight=False)


def trust_line() -> str:
    """How far the estimates were from published latencies, in a sentence."""
    errors = sorted(abs(it["error"]) for it in phones.calibration()["figures"] if not it["fitted"])
    middle = (errors[len(errors) // 2] + errors[(len(errors) - 1) // 2]) / 2
    return (
        f"Estimates: against {len(errors)} published latencies that nothing was fitted to, the median error is "
        f"{middle:.0%} and the largest {errors[-1]:.0%}."
    )


def page(reports: Sequence[Report], phone: phones.Phone) -> str:
    """The HTML page: a section for each function of each package, then devices, trust, and all rules."""
    sections = []
    for number, found in enumerate(reports):
        sections.append(report.Section(f"package-{number}", _title(found), _package(found, phone)))
    sections += [_trust(), _devices(), _rules()]
    lead = report.paragraph(
        "What Apple's Neural Engine may run of these packages, what it costs there, and why it may not. ", CAVEAT
    )
    everything = [op for found in reports for op in found.operations]
    fallen = sum(op.verdict == FALLBACK for op in everything)
    total = sum(op.flops for op in everything)
    kept = sum(op.flops for op in everything if op.verdict != FALLBACK)
    hero = report.figures(
        [
            (str(len(everything)), "operations"),
            (str(fallen), "fall back by a published rule"),
            (f"{kept / total:.2%}" if total else "-", "of the FLOPs stay on the engine"),
            (str(sum(found.segments for found in reports)), "runs on the engine"),
        ]
    )
    names = " ".join(dict.fromkeys(str(found.path) for found in reports))
    colophon = report.paragraph(
        "Made by ", code(f"snapgen export audit {names} -o report.html"), f" of SnapGen {snapgen_version()}."
    )
    return report.page("Neural Engine audit", lead, hero, sections, colophon)


def _package(found: Report, phone: phones.Phone) -> Html:
    figures = summary(found)
    parts: list[object] = [
        report.paragraph(
            f"{figures['operations']} operations in {figures['steps']} fused steps, {figures['flops'] / 1e9:.2f} "
            f"GFLOP, {report.size(figures['weight_bytes'])} of weights, {report.size(figures['moved_bytes'])} through "
            f"memory ({figures['intensity']:.0f} FLOP per byte); {figures['segments']} runs on the engine, "
            f"{figures['switches']} switches of compute unit. For {found.system} and later."
        ),
        report.heading("Verdicts"),
        report.table(
            ("verdict", "operations", "GFLOP", "share of FLOPs"),
            [
                (
                    name,
                    entry["operations"],
                    f"{entry['flops'] / 1e9:.3f}",
                    f"{entry['flops'] / figures['flops']:.2%}" if figures["flops"] else "-",
                )
                for name, entry in figures["verdicts"].items()
            ],
        ),
        report.heading("Rules that speak against operations"),
    ]
    rules = _by_rule(found)
    rows = [
        (code(rule.name), rule.verdict, rule.about, join(rule.says, " ", _sources(rule.sources)),
         join(code(listed[0][0].op.name), f": {listed[0][1]}"), len(listed))
        for rule, listed in rules
    ]  # fmt: skip
    headings = ("rule", "verdict", "at stake", "what it says", "for example", "operations")
    parts.append(report.table(headings, rows, left=5) if rows else report.note("None."))
    parts += [report.heading("Inputs and outputs"), _borders(found)]
    fallen = [op for op in found.operations if op.verdict == FALLBACK]
    parts.append(report.heading("What falls back"))
    if fallen:
        parts.append(
            report.table(
                ("operation", "type", "output", "because", "FLOPs", "bytes"),
                [
                    (code(op.op.name), op.op.type, _shape(op), _because(op), op.flops, op.bytes_in + op.bytes_out)
                    for op in fallen[:FALLBACKS_LISTED]
                ],
                left=4,
            )
        )
        if len(fallen) > FALLBACKS_LISTED:
            parts.append(report.note(f"and {len(fallen) - FALLBACKS_LISTED} more, in the JSON"))
    else:
        parts.append(report.note("Nothing by a published rule."))
    parts += [report.heading("Estimated time"), _estimates(found)]
    parts += [report.heading(f"Slowest steps on {phone.name}"), _slowest(found, phone)]
    parts += [report.heading("Where the steps lie under the roof"), _plot(found, phone)]
    parts += [
        report.heading("Largest working sets"),
        report.paragraph(
            f"What an operation reads, writes and holds as weights. A tensor above {ON_CHIP >> 20} MB is streamed from "
            f"memory: {figures['spilling_operations']} operations in {figures['spilling_steps']} steps touch one."
        ),
        report.table(
            ("operation", "type", "output", "reads", "writes", "weights", "together"),
            [
                (code(op.op.name), op.op.type, _shape(op), report.size(op.bytes_in), report.size(op.bytes_out),
                 report.size(op.op.weights), report.size(op.working_set))
                for op in _worst_working_sets(found)[:LISTED]
            ],
            left=3,
        ),
        report.details("Operations by type and verdict", _types(found)),
    ]  # fmt: skip
    parts += [report.note(note) for note in found.notes]
    return join(*parts)


def _borders(found: Report) -> Html:
    if not found.borders:
        return report.note("Laid out as the engine wants them.")
    rows = [
        (it.side, code(it.name), "x".join(map(str, it.shape)), it.dtype, join(it.detail, " ", _sources((it.source,))))
        for it in found.borders
    ]
    return report.table(("", "name", "shape", "type", "what"), rows, left=5)


def _estimates(found: Report) -> Html:
    shares = phones.shares()
    rows = []
    for device in phones.PHONES:
        compute = sum(step.flops for step in found.steps if step.on_engine) / (device.peak * shares.compute)
        memory_time = sum(step.moved for step in found.steps if step.on_engine) / (device.bandwidth * shares.memory)
        rows.append(
            (
                device.name, device.chip, _time(compute), _time(memory_time), _time(found.segments * phones.DISPATCH),
                _time(found.seconds(device)),
            )
        )  # fmt: skip
    table = report.table(("device", "chip", "arithmetic alone", "memory alone", "dispatches", "estimate"), rows, left=2)
    return join(table, report.paragraph(trust_line(), " What falls back is not timed."))


def _slowest(found: Report, phone: phones.Phone) -> Html:
    shares = phones.shares()
    compute, memory_rate = phone.peak * shares.compute, phone.bandwidth * shares.memory

    def seconds(step: Step) -> float:
        return max(step.flops / compute, step.moved / memory_rate)

    total = sum(seconds(step) for step in found.steps if step.on_engine) or 1.0
    worst = sorted((step for step in found.steps if step.on_engine), key=seconds, reverse=True)[:LISTED]
    rows = [
        (
            code(step.operations[0].name),
            _run_of_types(step),
            "memory" if step.moved / memory_rate > step.flops / compute else "arithmetic",
            f"{step.flops / 1e9:.3f}",
            report.size(step.moved),
            f"{step.flops / step.moved:.0f}" if step.moved else "-",
            _time(seconds(step)),
            f"{seconds(step) / total:.1%}",
        )
        for step in worst
    ]
    headings = ("step", "operations", "bound by", "GFLOP", "moved", "FLOP/byte", "time", "share")
    return report.table(headings, rows, left=3)


def _run_of_types(step: Step) -> str:
    return ", ".join(
        kind if count == 1 else f"{count} {kind}" for kind, count in Counter(op.type for op in step.operations).items()
    )


def _plot(found: Report, phone: phones.Phone) -> Html:
    import numpy as np
    from matplotlib.figure import Figure
    from PIL import Image

    steps = [step for step in found.steps if step.on_engine and step.flops and step.moved]
    if not steps:
        return report.note("No step has both arithmetic and memory traffic.")
    shares = phones.shares()
    compute, rate = phone.peak * shares.compute, phone.bandwidth * shares.memory
    spent: dict[float, float] = defaultdict(float)  # steps of one intensity lie on one another: one dot for all of them
    for step in steps:
        spent[round(math.log10(step.flops / step.moved), 2)] += max(step.flops / compute, step.moved / rate)
    intensity = 10 ** np.array(sorted(spent))
    share = np.array([spent[key] for key in sorted(spent)]) / sum(spent.values())
    reached = np.minimum(compute, intensity * rate)
    figure = Figure(figsize=(9, 4), dpi=110, layout="constrained")
    axes = figure.subplots()
    line = np.logspace(np.log10(min(intensity.min(), 0.1)), np.log10(max(intensity.max(), 1e4)), 200)
    axes.loglog(line, np.minimum(compute, line * rate) / 1e12, color="#b4b6ba", linewidth=1.5)
    axes.scatter(intensity, reached / 1e12, s=8 + 3000 * share, color="#3056c8", alpha=0.45, linewidth=0)
    axes.set_xlabel("FLOP per byte through memory")
    axes.set_ylabel("TFLOP/s")
    axes.grid(True, which="major", color="#e3e4e6", linewidth=0.6)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    buffer = memory.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    buffer.seek(0)
    with Image.open(buffer) as drawn:
        picture = report.picture(
            drawn.convert("RGB"), f"Steps under the estimated roofline of {phone.name}; area is time", plate=True
        )
    return join(
        picture,
        report.paragraph(
            f"Dots are steps, those of one intensity together; area is the share of the time on {phone.name}."
        ),
    )


def _types(found: Report) -> Html:
    counts: dict[str, Counter[str]] = {}
    work: Counter[str] = Counter()
    for op in found.operations:
        counts.setdefault(op.op.type, Counter())[op.verdict] += 1
        work[op.op.type] += op.flops
    rows = [
        (code(kind), *(counts[kind][name] or "" for name in VERDICTS), f"{work[kind] / 1e9:.3f}")
        for kind in sorted(counts, key=lambda kind: (-counts[kind].total(), kind))
    ]
    return report.table(("type", *VERDICTS, "GFLOP"), rows)


def _trust() -> report.Section:
    calibration = phones.calibration()
    rows = [
        (
            it["model"],
            it["phone"],
            it["source"],
            "fitted" if it["fitted"] else "held out",
            f"{it['milliseconds']:g}",
            f"{it['estimated']:.3g}",
            f"{it['error']:+.0%}",
        )
        for it in calibration["figures"]
    ]
    models = report.table(
        ("model", "what was audited for it", "operations"),
        [(code(name), it["about"], it["operations"]) for name, it in calibration["models"].items()],
        left=2,
    )
    body = join(
        report.paragraph(
            "Two numbers are fitted, the same for every device: the share of the stated peak that arithmetic reaches "
            f"({calibration['shares']['compute']:.0%}) and the share of the memory's bandwidth "
            f"({calibration['shares']['memory']:.0%}). ", trust_line(),
            " Nothing was measured by us; published figures come from other converters, systems and model code, and "
            "the models are ours, of the same sizes.",
        ),
        report.table(
            ("model", "device", "published by", "", "published ms", "estimated ms", "error"), rows, left=4
        ),
        models,
    )  # fmt: skip
    return report.Section("trust", "How far to trust this", body, command="python -m bench.neural_engine")


def _devices() -> report.Section:
    rows = [
        (
            device.name, device.chip, device.peak_source, device.bandwidth_source, f"{device.peak / 1e12:.1f}",
            f"{device.bandwidth / 1e9:.1f}", f"{phones.ridge(device, phones.shares()):.0f}",
        )
        for device in phones.PHONES
    ]  # fmt: skip
    headings = ("device", "chip", "source of peak", "source of bandwidth", "fp16 TFLOP/s", "GB/s", "ridge, FLOP/byte")
    body = join(
        report.table(headings, rows, left=4),
        report.paragraph(f"Working set: {phones.ON_CHIP_SOURCE}. Dispatch: {phones.DISPATCH_SOURCE}."),
    )
    return report.Section("devices", "Devices", body)


def _rules() -> report.Section:
    rows = [
        (code(rule.name), rule.verdict, rule.about, join(rule.says, " ", _sources(rule.sources)))
        for rule in (*RULES, UNLISTED)
    ]
    body = join(
        report.paragraph(
            f"Every operation is held against each of these. Where none speaks against it, it is “{ENGINE}”, which "
            "rests on a list of operations that were compiled and run on an M1 ", _sources(("guide-operations",)), "."
        ),
        report.table(("rule", "verdict", "at stake", "what it says"), rows, left=4),
    )  # fmt: skip
    return report.Section("rules", "The rules", body)


def _sources(keys: Sequence[str]) -> Html:
    links = (
        f'<a href="{html.escape(address)}">{html.escape(name)}</a>' for name, address in (SOURCES[it] for it in keys)
    )
    return Html(f"[{'; '.join(links)}]")


def _because(op: Audited) -> str:
    return "; ".join(f"{it.rule.name}: {it.detail}" for it in op.findings if it.rule.verdict == FALLBACK)


def _shape(op: Audited) -> str:
    first = op.op.outputs[0] if op.op.outputs else None
    return "-" if first is None else f"{'x'.join(map(str, first.shape)) or 'scalar'} {first.dtype}"


def _by_rule(found: Report) -> list[tuple[Any, list[tuple[Audited, str]]]]:
    """The rules that speak, worst first, each with (operation, words)."""
    listed: dict[str, tuple[Any, list[tuple[Audited, str]]]] = {}
    for op in found.operations:
        for it in op.findings:
            listed.setdefault(it.rule.name, (it.rule, []))[1].append((op, it.detail))
    return sorted(listed.values(), key=lambda entry: (-VERDICTS.index(entry[0].verdict), -len(entry[1]), entry[0].name))


def _worst_working_sets(found: Report) -> list[Audited]:
    moving = [op for op in found.operations if op.step is not None]
    return sorted(moving, key=lambda op: -op.working_set)


def _verdicts(reports: Sequence[Report]) -> tuple[Table, Table]:
    """Verdicts by operations, and what the packages compute and move: two tables, that both fit 80 columns."""
    counts = Table(title="Neural Engine audit: operations", title_justify="left")
    work = Table(title="what they compute and move", title_justify="left")
    for table, columns in (
        (counts, ("all", "engine", "at a cost", "unknown", "fall back", "runs")),
        (work, ("GFLOP", "on engine", "weights", "moved", "spilling")),
    ):
        table.add_column("package", overflow="fold")
        for column in columns:
            table.add_column(column, justify="right", no_wrap=True)
    for found in reports:
        figures, title = summary(found), escape(_title(found))
        counts.add_row(
            title,
            str(figures["operations"]),
            *(str(figures["verdicts"][name]["operations"]) for name in VERDICTS),
            str(figures["segments"]),
        )
        work.add_row(
            title,
            f"{figures['flops'] / 1e9:.2f}",
            f"{figures['share_on_engine']:.2%}",
            report.size(figures["weight_bytes"]),
            report.size(figures["moved_bytes"]),
            str(figures["spilling_operations"]),
        )
    return counts, work


def _title(found: Report) -> str:
    name = Path(found.path).stem
    return name if found.function == "main" else f"{name}, function {found.function}"


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"
