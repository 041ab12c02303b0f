"""One run of ``python -m bench``: from its options to rows, JSON and plots."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape

import snapgen_kernels
from bench import cases, limits, machine, show
from bench.blocks import BlockCase
from bench.models import MODELS, ModelCase, tune
from bench.options import Options, UsageError, listed
from bench.providers import NAMES, Provider, all_providers
from bench.results import Row, append
from bench.runner import Outcome, Plan, Red, run
from snapgen.io import write_json
from snapgen_kernels import _backend
from snapgen_kernels.testing import Case

# --quick: cases that have not begun by then are left out, so that the whole stays below a minute.
_QUICK_DEADLINE = 40.0
_MODELS_DEADLINE = 540.0  # compilers take minutes for a whole model
_QUICK_PROVIDERS = ("fused", "eager", "eager-nchw")


def session(options: Options, console: Console) -> int:
    """Follow the options; returns the exit code.

    Raises:
        UsageError: an option cannot be followed.
    """
    if options.threads is not None:
        if options.threads < 1:
            raise UsageError(f"--threads is {options.threads}; it must be at least 1")
        torch.set_num_threads(options.threads)
    if options.tune and options.device != "cuda":
        raise UsageError("--tune: only the kernels of --device cuda have configs to choose")
    plan = make_plan(options, console)
    if options.dry_run:
        return _dry_run(options, plan, console)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: PyTorch sees no CUDA or ROCm device; --dry-run prints the plan without one")
    out = _target(options)
    begun = time.perf_counter()
    provenance = machine.provenance(options.device, options.commit)
    show.machine(console, provenance)
    if provenance.load > 0.5 * provenance.threads:
        console.print(f"[yellow]this machine was busy before (load {provenance.load}): publish no time of this run[/]")
    where = "saving no rows" if out is None else f"rows go to {out}"
    console.print(f"{len(plan.cases)} cases; {where}", soft_wrap=True)
    dtypes = tuple(dict.fromkeys(cases.DTYPE_NAMES[case.dtype] for case in plan.cases))
    if options.device == "cuda":
        # fp32 is IEEE's for all: by default PyTorch's convolutions take tf32, and its matrix products do not.
        torch.backends.cudnn.allow_tf32 = False
    if options.tune:
        _tune(plan)
        begun = time.perf_counter()  # the deadline is for what is timed
    rates = limits.measure(options.device, dtypes, 0.25 if options.quick or options.small else 1.0)
    show.limits(console, rates)
    if options.device == "cuda":
        show.kernels(console, plan.cases, rates)

    def report(case: Case | ModelCase, rows: list[Row]) -> None:
        show.rows(console, case, rows)
        if out is not None and rows:
            append(out, rows)

    try:
        outcome = run(plan, rates, provenance, report, begun)
    except Red as error:
        console.print(
            f"[bold red]wrong:[/] {escape(str(error))}\nnothing more is timed until this is right", soft_wrap=True
        )
        return 1
    show.missing(console, outcome.missing)
    console.print(f"{len(outcome.rows)} rows in {time.perf_counter() - begun:.0f} s")
    _write(options, rates, provenance, outcome)
    return 0


def make_plan(options: Options, console: Console) -> Plan:
    """Cases, modes and providers that the options ask for.

    Raises:
        UsageError: an entry is not allowed, or nothing is left.
    """
    allowed = (*cases.SUITES, *cases.OPS, *cases.BLOCKS, *MODELS)
    entries = listed("suite", options.suite, (*allowed, "model") if options.device == "cuda" else allowed)
    names, subset = cases.named(entries, options.device)
    ops = tuple(name for name in names if name in (*cases.OPS, *cases.BLOCKS))
    if options.quick:
        unavailable = {op: _backend.missing_kernel(op, options.device) for op in ops if op in cases.OPS}
        for op, reason in unavailable.items():
            if reason is not None:
                console.print(f"[dim]{op}: left out of a quick run, {reason}[/]", soft_wrap=True)
        ops = tuple(op for op in ops if unavailable.get(op, "") is None)
    default = "bf16" if options.device == "cuda" else "fp32,bf16"
    dtypes = listed("dtype", options.dtype or default, tuple(cases.DTYPES))
    size = dict(quick=options.quick, small=options.small)
    chosen: list[Case | ModelCase] = [*cases.select(options.device, ops, dtypes, subset=subset, **size)]
    whole = cases.select_models(options.device, names, dtypes, subset=subset, **size)
    lacking = _lacking() if whole else []
    if lacking and not chosen:
        raise UsageError(f"--suite {options.suite}: whole models need {' and '.join(lacking)}")
    if lacking:
        console.print(f"[dim]whole models are left out: they need {' and '.join(lacking)}[/]", soft_wrap=True)
    else:
        chosen += whole
    chosen = [case for case in chosen if options.case in case.name]
    if not chosen:
        raise UsageError(
            f"no case is left of --suite {options.suite} --case {options.case!r}"
            + (" among the ops with a kernel here, which --quick runs" if options.quick else "")
        )
    deadline = _QUICK_DEADLINE if options.quick else None
    if options.minutes is not None:
        if options.minutes <= 0:
            raise UsageError(f"--minutes is {options.minutes:g}; it must be positive")
        deadline = 60 * options.minutes
    elif options.device == "cuda" and entries == ("model",):
        deadline = _MODELS_DEADLINE
    seconds = options.seconds if options.seconds is not None else (0.6 if options.quick else 4.0)
    if seconds <= 0:
        raise UsageError(f"--seconds is {seconds:g}; it must be positive")
    return Plan(
        device=options.device,
        cases=chosen,
        modes=listed("mode", options.mode, cases.MODES),
        providers=_providers(options, console),
        seconds=seconds,
        deadline=deadline,
        patience=0.5 if options.quick else 3.0,
    )


def _lacking() -> list[str]:
    """The packages of whole models that are not installed; the ops need none of them."""
    return [package for package in ("diffusers", "transformers") if importlib.util.find_spec(package) is None]


def _providers(options: Options, console: Console) -> list[Provider]:
    everyone = all_providers()
    if options.providers:
        chosen = [everyone[name] for name in listed("providers", options.providers, NAMES)]
    else:
        chosen = [p for name, p in everyone.items() if not options.quick or name in _QUICK_PROVIDERS]
    present = []
    for provider in chosen:
        reason = provider.absent(options.device)
        if reason is None:
            present.append(provider)
        elif options.providers:
            raise UsageError(f"--providers {provider.name}: {reason}")
        else:
            console.print(f"[dim]{provider.name}: {reason}[/]", soft_wrap=True)
    return present


def _tune(plan: Plan) -> None:
    """Measure the configs of the fused kernels for the plan's cases, of each dtype apart."""
    for dtype in dict.fromkeys(case.dtype for case in plan.cases):
        shapes: dict[str, list[Mapping[str, int]]] = {}
        for case in plan.cases:
            if not isinstance(case, ModelCase) and case.dtype == dtype:
                for op, dims in case.parts() if isinstance(case, BlockCase) else [(case.op, case.dims)]:
                    shapes.setdefault(op, []).append(dims)
        backward = "train" in plan.modes
        if shapes:
            snapgen_kernels.warmup(shapes, device=plan.device, dtypes=(dtype,), backward=backward, tune=True)
    for case in plan.cases:
        if isinstance(case, ModelCase) and case.mode in plan.modes:
            tune(case)


def _dry_run(options: Options, plan: Plan, console: Console) -> int:
    rates = limits.assumed(options.device)
    show.limits(console, rates)
    show.plan(console, plan, rates)
    if options.device == "cuda":
        show.kernels(console, plan.cases, rates)
    fused = snapgen_kernels.backends()["ops"]
    for op in dict.fromkeys(case.op for case in plan.cases if case.op in cases.OPS):
        console.print(f"{op}: {fused[op][options.device]}", soft_wrap=True)
    console.print("dry run: nothing was checked, timed or written")
    return 0


def _target(options: Options) -> Path | None:
    if options.out is not None:
        return options.out
    return None if options.quick or options.small else machine.results_file(options.device)


def _write(options: Options, rates: limits.Limits, provenance: machine.Provenance, outcome: Outcome) -> None:
    if options.json is not None:
        write_json(
            options.json,
            {
                "machine": asdict(provenance),
                "limits": {"gemm_flops_per_s": rates.gemm, "copy_bytes_per_s": [list(pair) for pair in rates.copy]},
                "rows": [{**asdict(row), "gflops": row.gflops, "share_of_gemm": row.share} for row in outcome.rows],
                "missing": [dict(zip(("case", "provider", "reason"), entry, strict=True)) for entry in outcome.missing],
            },
        )
    if options.plot is not None and outcome.rows:
        from bench.plot import overview

        overview(outcome.rows, options.plot)
