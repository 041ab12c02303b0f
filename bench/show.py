"""What the benchmark prints."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from bench.cases import DTYPE_NAMES, costs
from bench.limits import Limits
from bench.machine import Provenance
from bench.models import ModelCase
from bench.results import OURS, Row, compare
from bench.runner import Plan
from snapgen_kernels import costs as gpu
from snapgen_kernels import decoder_costs as decoder
from snapgen_kernels import token_costs as tokens
from snapgen_kernels.testing import Case


def machine(console: Console, provenance: Provenance) -> None:
    p = provenance
    console.print(
        f"[bold]{p.device}[/] ({p.variant}), {p.threads} threads, malloc {p.malloc}; torch {p.torch}, "
        f"python {p.python}, commit {p.commit}",
        soft_wrap=True,
    )


def limits(console: Console, found: Limits) -> None:
    gemm = ", ".join(f"{name} {si(rate)}FLOP/s" for name, rate in found.gemm.items())
    copy = ", ".join(f"{si(rate)}B/s at {size >> 20} MiB" for size, rate in found.copy)
    how = "measured" if found.measured else "assumed"
    console.print(f"{how} limits: products {gemm}; copies {copy}", soft_wrap=True)


def plan(console: Console, chosen: Plan, rates: Limits) -> None:
    """Every case with its FLOPs, fewest bytes and floor in each mode, and who would be timed, for each op."""
    table = Table(box=box.SIMPLE_HEAD, padding=0)
    for heading in ("op", "case", "dtype", "mode", "FLOPs", "bytes", "FLOP/byte", "floor ms"):
        table.add_column(heading, justify="right" if heading in _RIGHT else "left", no_wrap=True)
    for case in chosen.cases:
        for mode, cost in costs(case).items():
            if ("fwd" if mode == "fwd" else "train") not in chosen.modes:
                continue
            table.add_row(
                case.op,
                case.name,
                DTYPE_NAMES[case.dtype],
                mode,
                si(cost.flops),
                si(cost.bytes),
                f"{cost.flops / cost.bytes:.1f}",
                _ms(rates.floor_ms(cost, case.dtype)),
            )
    console.print(table)
    for case in {case.op: case for case in chosen.cases}.values():
        for mode in chosen.modes if not isinstance(case, ModelCase) else [m for m in chosen.modes if m == case.mode]:
            who = [p.name for p in chosen.providers if p.unfit(case, chosen.device, mode == "train") is None]
            console.print(f"{case.op} {mode} would be timed by: {', '.join(who) or 'nobody'}", soft_wrap=True)


def kernels(console: Console, chosen: Sequence[Case | ModelCase], rates: Limits) -> None:
    """What each GPU kernel of the cases moves and computes, and the sum of the kernels' floors beside the op's own;
    where an op may follow several plans, by plan."""
    known = [case for case in chosen if not isinstance(case, ModelCase) and case.op in _KNOWN]
    if known:
        console.print(
            "GPU kernels by arithmetic (snapgen_kernels/costs.py, token_costs.py, decoder_costs.py), by plan: split or "
            "whole (each kernel on the whole batch), blocked (a few samples at a time), fused, low memory (a few rows "
            "at a time); special: results of tanh, exponential and reciprocal",
            soft_wrap=True,
        )
    for case in known:
        console.print(_kernels(case, rates))
        if case.op not in gpu.OPS:
            continue
        rate, size = rates.of_kernels(case.dtype), case.dtype.itemsize
        for number, best in enumerate(gpu.plans(case.op, case.dims, size, rate), 1):
            console.print(
                f"half {number}: {best.form}, {best.samples} of {case.dims['B']} samples at a time, predicted "
                f"{1e6 * best.seconds:.1f} us after the statistics",
                soft_wrap=True,
            )


def _by_plan(case: Case, mode: str, rate: gpu.Rates) -> dict[str, list[gpu.Kernel]]:
    """The kernels of a mode under each plan that differs; transformer ops have one plan, without a name."""
    if case.op in tokens.OPS:
        return {"": tokens.kernels(case.op, case.dims, case.dtype.itemsize, mode)}
    if case.op in decoder.OPS:
        forms = decoder.FORMS if mode == "fwd" else decoder.FORMS[:1]
        plans = {form: decoder.kernels(case.op, case.dims, case.dtype.itemsize, mode, form) for form in forms}
        return {form: made for form, made in plans.items() if form == forms[0] or made != plans[forms[0]]}
    found: dict[str, list[gpu.Kernel]] = {}
    for form in gpu.FORMS:
        made = gpu.kernels(case.op, case.dims, case.dtype.itemsize, mode, form, rate)
        if made not in found.values():
            found[form] = made
    return found


def _kernels(case: Case, rates: Limits) -> Table:
    title = f"{case.op} {case.name} {DTYPE_NAMES[case.dtype]}"
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=0)
    for heading in ("mode", "plan", "kernel", "launches", "bytes", "FLOPs", "special", "floor us"):
        table.add_column(heading, justify="left" if heading in _NAMES else "right", no_wrap=True)
    rate = rates.of_kernels(case.dtype)
    for mode in ("fwd", "bwd"):
        for form, found in _by_plan(case, mode, rate).items():
            for k in found:
                table.add_row(mode, form, k.name, str(k.launches), *_numbers(k.bytes, k.flops, k.special),
                              _us(k.floor(rate)))  # fmt: skip
            sums = (sum(k.bytes for k in found), sum(k.flops for k in found), sum(k.special for k in found))
            launches = str(sum(k.launches for k in found))
            table.add_row(mode, form, "all", launches, *_numbers(*sums), _us(gpu.total(found, rate)), style="bold")
        cost = costs(case)[mode]
        floor = _us(rates.floor_ms(cost, case.dtype) / 1e3)
        table.add_row(mode, "", "the op itself", "", *_numbers(cost.bytes, cost.flops, 0), floor, style="dim")
        table.add_section()
    return table


def rows(console: Console, case: Case | ModelCase, measured: Sequence[Row]) -> None:
    """The providers of one case side by side, in each mode. ``gain``: the time of the best peer (the fastest but fused)
    over its own; ``floor``: share of the time that the machine's limits allow; ``GEMM``: share of a large product's
    rate; ``peak``: of bwd, what the forward left for it."""
    title = f"{case.op} {case.name} {DTYPE_NAMES[case.dtype]}"
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=0)
    for heading in ("mode", "provider", "ms", "p20 .. p80", "gain", "floor", "GFLOP/s", "GEMM", "GB/s", "peak"):
        left = heading in ("mode", "provider")
        table.add_column(heading, justify="left" if left else "right", no_wrap=True)
    for group in compare(measured):
        peer = group.best_peer
        for row in sorted(group.rows, key=lambda r: r.p50_ms):
            style = "bold green" if row.provider in OURS else ""
            ratio = "" if peer is None else f"{peer.p50_ms / row.p50_ms:.2f}x"
            table.add_row(
                row.mode,
                row.provider,
                _ms(row.p50_ms),
                f"{_ms(row.p20_ms)} .. {_ms(row.p80_ms)}",
                ratio,
                f"{row.floor_ms / row.p50_ms:.0%}",
                f"{row.gflops:.1f}",
                f"{row.share:.0%}",
                f"{row.bytes / row.p50_ms / 1e6:.1f}",
                "" if row.peak_bytes < 0 else f"{si(row.peak_bytes)}B",
                style=style,
            )
        table.add_section()
    console.print(table)


def missing(console: Console, found: Sequence[tuple[str, str, str]]) -> None:
    """Who was not timed and why: once for each reason."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for where, provider, reason in found:
        reasons.setdefault((provider, reason), []).append(where)
    for (provider, reason), places in reasons.items():
        first = ", ".join(places[:2]) + (f" and {len(places) - 2} more" if len(places) > 2 else "")
        console.print(f"[yellow]not timed:[/] {provider}: {reason} [dim]({first})[/]", soft_wrap=True)


def si(value: float) -> str:
    """A number with a decimal prefix: 8.8 G."""
    for unit, name in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:.3g} {name}"
    return f"{value:.3g} "


def _numbers(*values: int) -> list[str]:
    return [si(value) if value else "" for value in values]


def _us(seconds: float) -> str:
    return f"{1e6 * seconds:.1f}"


def _ms(value: float) -> str:
    decimals = next((d for d, limit in ((4, 0.1), (3, 1), (2, 10)) if value < limit), 1)
    return f"{value:.{decimals}f}"


_KNOWN = (*gpu.OPS, *tokens.OPS, *decoder.OPS)
_NAMES = ("mode", "plan", "kernel")
_RIGHT = ("FLOPs", "bytes", "FLOP/byte", "floor ms")
