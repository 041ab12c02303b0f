"""The benchmark's CUDA branch without a GPU: on a simulated one, and in a process that lacks what it does not need."""

import functools
import subprocess
import sys
import weakref
from collections.abc import Iterator
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from rich.console import Console
from torch import Tensor
from torch.overrides import TorchFunctionMode

import bench.__main__ as command
import snapgen_kernels
from bench import cases, goals, limits, machine, models, runner, tables
from bench.providers.compiled import Compiled, release
from bench.providers.eager import drawn
from bench.results import Row, compare, read
from bench.runner import Budget, _peak
from bench.session import make_plan
from bench.timing import Clock, Prepared, Untimed, inference_step, interleaved, kept_bytes
from snapgen_kernels import _backend, checks, costs, decoder_costs, device_time
from snapgen_kernels.testing import small_cases
from tests.bench_runs import TINY, run

COPY, GEMM = 4e12, {torch.float32: 50e12, torch.bfloat16: 800e12}


class SimulatedGpu(TorchFunctionMode):
    """A queue of work with a clock of its own, in seconds. Tensors made on it have no memory, those brought to it stay
    on the CPU; copies, fills and products take as long as their bytes and FLOPs, and 4 us of the processor each."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.free = 0.0
        self.fills = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {**(kwargs or {})}
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "meta"
        if func is Tensor.to:
            args = tuple("cpu" if isinstance(value, (str, torch.device)) else value for value in args)
        result = func(*args, **kwargs)
        if func in (Tensor.zero_, Tensor.copy_) and result.device.type == "meta":
            self.fills += func is Tensor.zero_
            self.launch(result.nbytes * (1 if func is Tensor.zero_ else 2) / COPY)
        elif func is torch.mm:
            self.launch(2 * len(result) ** 3 / GEMM[result.dtype])
        return result

    def launch(self, seconds: float, processor: float = 4e-6) -> None:
        """One kernel, once the processor has queued it."""
        self.now += processor
        self.free = max(self.free, self.now) + seconds

    def synchronize(self) -> None:
        self.now = max(self.now, self.free)

    def event(self, enable_timing: bool) -> "Event":
        assert enable_timing
        return Event(self)


class Event:
    def __init__(self, gpu: SimulatedGpu) -> None:
        self.gpu = gpu
        self.reached = 0.0

    def record(self) -> None:
        self.reached = max(self.gpu.free, self.gpu.now)

    def query(self) -> bool:
        return self.reached <= self.gpu.now

    def elapsed_time(self, end: "Event") -> float:
        assert end.query(), "read before the device was there"
        return 1e3 * (end.reached - self.reached)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimulatedGpu]:
    simulated = SimulatedGpu()
    monkeypatch.setattr(torch.cuda, "Event", simulated.event)
    monkeypatch.setattr(torch.cuda, "synchronize", simulated.synchronize)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Simulated GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 1000)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 1700)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    with simulated:
        yield simulated


# ---- timing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("processor", [1e-6, 40e-6, 400e-6], ids=lambda s: f"{1e6 * s:g}us")
def test_events_time_the_device_alone(processor: float, gpu: SimulatedGpu) -> None:
    """Five kernels of 3 us and then two of 50 us, however long each takes the processor to queue; no flush counts."""
    clock = Clock("cuda")

    def forward() -> None:
        for _ in range(5):
            gpu.launch(3e-6, processor)

    def backward() -> None:
        for _ in range(2):
            gpu.launch(50e-6, processor)

    for _ in range(3):
        assert clock([forward, backward]) == pytest.approx([15e-3, 100e-3])
    found = interleaved({"a": [forward, backward], "b": [forward]}, clock, 1e-3)
    assert all(times == pytest.approx([15e-3, 100e-3]) for times in found["a"])


def test_every_part_starts_with_cold_caches(gpu: SimulatedGpu) -> None:
    fills: list[int] = []
    clock = Clock("cuda")
    clock([lambda: fills.append(gpu.fills), lambda: fills.append(gpu.fills)])
    assert fills == [1, 2]


def test_what_is_done_between_parts_is_not_timed(gpu: SimulatedGpu) -> None:
    """It is done before each repetition of the part after it, and before the caches are cold."""
    order: list[str] = []
    fills: list[int] = []

    def restore() -> None:
        order.append("restore")
        fills.append(gpu.fills)
        gpu.launch(2e-6)

    def backward() -> None:
        order.append("backward")
        fills.append(gpu.fills)
        for _ in range(9):
            gpu.launch(5e-6, 40e-6)

    clock = Clock("cuda")
    assert clock([lambda: gpu.launch(3e-6), Untimed(restore), backward]) == pytest.approx([3e-3, 45e-3])
    assert len(order) > 2 and order == ["restore", "backward"] * (len(order) // 2)
    assert all(before < after for before, after in zip(fills[::2], fills[1::2], strict=True))


def test_a_part_that_the_processor_cannot_keep_up_with_is_timed_all_the_same(gpu: SimulatedGpu) -> None:
    """One that waits for the device inside is never queued ahead: the tries end."""
    tries = []

    def waits() -> None:
        gpu.launch(1e-3)
        gpu.synchronize()
        tries.append(gpu.now)

    clock = Clock("cuda")
    assert clock([waits])[0] >= 1.0
    assert len(tries) == 1 + device_time.MOST_FLUSHES.bit_length() - 1
    tries.clear()
    clock([waits])
    assert len(tries) == 1, "the next time it is known"


def test_parts_are_forgotten_with_their_case(gpu: SimulatedGpu) -> None:
    clock = Clock("cuda")
    clock([lambda: gpu.launch(1e-6)])
    assert clock._timer is not None and not clock._timer._flushes


def test_limits_of_a_gpu_are_those_of_the_device(gpu: SimulatedGpu) -> None:
    found = limits.measure("cuda", ("bf16",), 0.05)
    assert found.gemm == pytest.approx({"fp32": 50e12, "bf16": 800e12})
    assert found.copy == ((1 << 32, pytest.approx(COPY)),)
    rates = found.of_kernels(torch.bfloat16)
    assert (rates.copy, rates.products, rates.vector) == pytest.approx((COPY, 800e12, 50e12))
    assert rates.special == costs.H200.special and rates.l2 > rates.copy


def test_what_the_forward_leaves_is_what_is_there_before_the_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    held = [100]
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: held[0])
    forward, backward = lambda: held.__setitem__(0, 175), lambda: held.__setitem__(0, 90)
    assert kept_bytes([forward, backward]) == 75
    held[0] = 100
    assert kept_bytes([forward, Untimed(lambda: None), backward]) == 75 and held == [90]


def test_poisoned_memory_does_not_refuse_what_cublas_does() -> None:
    """Deterministic algorithms that are only asked for, and no longer than wanted."""
    torch.use_deterministic_algorithms(True)
    try:
        with checks.poisoned_memory():
            assert torch.is_deterministic_algorithms_warn_only_enabled()
            assert torch.empty(3).isnan().all()
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


# ---- a whole run -----------------------------------------------------------------------------------------------------


def test_a_whole_run_on_a_simulated_gpu(gpu: SimulatedGpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "measure", lambda device, dtypes, seconds: limits.assumed(device))
    monkeypatch.setattr(Event, "elapsed_time", lambda start, end: 1.0)  # what is computed is computed by the CPU
    out, picture = tmp_path / "rows.csv", tmp_path / "run.png"
    files = ("--out", str(out), "--plot", str(picture))
    code, text = run("--device", "cuda", *TINY, "--providers", "fused,eager,eager-nchw", *files)
    assert code == 0, text
    assert picture.stat().st_size > 1000
    rows = read(out)
    missing = [_backend.missing_kernel("group_norm_silu", device) for device in ("cpu", "cuda")]
    fused = {"fused"} if missing == [None, None] else set()
    expected = {(m, p) for m in ("fwd", "bwd", "fwd+bwd") for p in {"eager", "eager-nchw"} | fused}
    assert {(r.mode, r.provider) for r in rows} == expected
    assert {(r.dtype, r.device, r.variant) for r in rows} == {("bf16", "Simulated GPU", "sm_90")}
    assert all(r.on_gpu for r in rows)
    assert {(r.mode, r.peak_bytes) for r in rows} == {("fwd", 700), ("bwd", 0), ("fwd+bwd", 700)}
    assert "group_norm_silu one-pixel bf16" in text and "GPU kernels by arithmetic" in text
    assert not torch.backends.cudnn.allow_tf32, "fp32 is the same for all"


def test_configs_are_tuned_before_anything_is_timed(
    gpu: SimulatedGpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[Any, Any]] = []

    def measure(device: str, *_: object) -> limits.Limits:
        calls.append(("measure", device))
        return limits.assumed(device)

    monkeypatch.setattr(limits, "measure", measure)
    monkeypatch.setattr(snapgen_kernels, "warmup", lambda shapes, **how: calls.append((shapes, how)))
    monkeypatch.setattr(Event, "elapsed_time", lambda start, end: 1.0)
    code, text = run(
        "--device", "cuda", *TINY, "--dtype", "bf16,fp32", "--mode", "fwd", "--providers", "eager", "--tune"
    )
    assert code == 0, text
    shapes = {"group_norm_silu": [next(c for c in small_cases("group_norm_silu") if c.name == "one-pixel").dims]}
    how = dict(device="cuda", backward=False, tune=True)
    assert calls == [
        (shapes, {**how, "dtypes": (torch.bfloat16,)}),
        (shapes, {**how, "dtypes": (torch.float32,)}),
        ("measure", "cuda"),
    ]
    code, text = run(*TINY, "--tune")
    assert code == 2 and "--tune: only the kernels of --device cuda" in text


def test_providers_of_a_gpu_share_their_inputs(gpu: SimulatedGpu) -> None:
    case = small_cases("resblock")[0]
    first, second, trained = (drawn(case, "cuda", train) for train in (False, False, True))
    assert first["x"].data_ptr() == second["x"].data_ptr() == trained["x"].data_ptr()
    assert trained["x"].is_leaf and trained["x"].requires_grad and trained["pw1_weight"].requires_grad
    assert not first["x"].requires_grad and not first["x"].is_inference()
    assert drawn(case, "cpu", False)["x"].data_ptr() != drawn(case, "cpu", False)["x"].data_ptr()


def test_two_compilers_side_by_side_compile_once_each() -> None:
    from torch._dynamo.utils import counters

    case = small_cases("group_norm_silu")[0]
    release()
    counters.clear()
    both = [Compiled("compile", "default"), Compiled("compile-max", "max-autotune-no-cudagraphs")]
    prepared = [provider.prepare(case, "cpu", False) for provider in both]
    for one in (*prepared, *prepared):
        one.call()
    assert counters["stats"]["unique_graphs"] == 2


# ---- what is run, and what it is held to -----------------------------------------------------------------------------


def test_the_suite_of_the_residual_block_is_what_has_goals() -> None:
    code, text = run("--device", "cuda", "--suite", "resblock", "--dry-run")
    assert code == 0
    ops, subset = cases.named(("resblock",), "cuda")
    chosen = cases.select("cuda", ops, ("bf16",), quick=False, small=False, subset=subset)
    names = {op: [case.name for case in chosen if case.op == op] for op in ops}
    assert names["group_norm_silu"] == ["256ch-128", "256ch-128-b16"]
    assert set(names["resblock"]) == {f"{n}{b}" for n in ("256ch-128", "512ch-64", "896ch-32") for b in ("", "-b8")}
    assert {"256ch-128-b8", "down-256-b8", "up-512-b8"} <= set(names["sepconv"])
    with_goals = [goal for goal in goals.GPU_GOALS if goal.op in ops]
    assert with_goals and all(goal.case in names[goal.op] for goal in with_goals)
    for case in chosen:
        assert f"{case.op} {case.name} bf16" in text, "every case has its table of kernels"
        sums = costs.total(costs.kernels(case.op, case.dims, 2, "fwd", rates=costs.H200), costs.H200)
        assert f"{1e6 * sums:.1f}" in text
    assert cases.named(("resblock",), "cpu") == (("resblock",), None), "on a CPU it is the op"
    assert cases.named(("sepconv", "resblock"), "cuda") == (("sepconv", "resblock"), None)


def test_the_suite_of_the_decoder_shows_what_each_of_its_kernels_moves() -> None:
    code, text = run("--device", "cuda", "--suite", "decoder_block", "--dry-run")
    assert code == 0, text
    ops, subset = cases.named(("decoder_block",), "cuda")
    chosen = cases.select("cuda", ops, ("bf16",), quick=False, small=False, subset=subset)
    names = {op: [case.name for case in chosen if case.op == op] for op in ops}
    assert names["decoder_block"] == ["128ch-1024", "128ch-512", "160ch-128"]
    assert names["sepconv"] == ["up-128-512", "up-128-512-b8"]
    for case in (case for case in chosen if case.op == "decoder_block"):
        below = text[text.index(f"{case.op} {case.name} bf16 ") :]
        low = decoder_costs.kernels(case.op, case.dims, 2, "fwd", "low memory")
        forms = decoder_costs.FORMS if len(low) > 5 else decoder_costs.FORMS[:1]
        for mode, form in [*(("fwd", form) for form in forms), ("bwd", "whole")]:
            found = decoder_costs.kernels(case.op, case.dims, 2, mode, form)
            total = f"{1e6 * costs.total(found, costs.H200):.1f}"
            lines = [line.split() for line in below.splitlines() if line.startswith(f" {mode} ")]
            sums = [line for line in lines if line[1:-1][: len(form.split()) + 1] == [*form.split(), "all"]]
            assert sums[0][-1] == total, (case.name, mode, form)
    assert cases.named(("decoder_block",), "cpu") == (("decoder_block",), None), "on a CPU it is the op"


def measured(provider: str, ms: float, peak: int = -1, **changes: Any) -> Row:
    values: dict[str, Any] = dict(
        op="resblock", case="256ch-128-b8", dtype="bf16", mode="fwd", provider=provider, p20_ms=ms, p50_ms=ms,
        p80_ms=ms, repeats=5, flops=10**9, bytes=10**8, floor_ms=0.05, gemm_gflops=8e5, copy_gbs=4000.0,
        peak_bytes=peak, checked="same shape", provider_version="1", date="2026-01-01T00:00:00+00:00", commit="abc",
        device="a GPU", variant="sm_90", threads=16, malloc="stock", load=0.1, python="3.12", torch="2.11.0",
        triton="3.6.0", snapgen="source",
    )  # fmt: skip
    return Row(**{**values, **changes})


def test_a_gpu_is_held_to_the_goals_of_gpus() -> None:
    norm = dict(op="group_norm_silu", case="256ch-128-b16")
    rows = [
        measured("fused", 0.1), measured("compile-max", 0.16), measured("eager", 0.5),
        measured("fused", 0.2, 30, mode="bwd"), measured("eager", 0.5, 120, mode="bwd"),
        measured("fused", 0.03, **norm), measured("eager", 0.06, **norm), measured("compile-max", 0.06, **norm),
    ]  # fmt: skip
    text = goals.table(rows)
    for line in (
        "| bf16 | 1.70x the best peer | 1.60x the best of compile-max, eager | missed |",
        "| bf16 | 70% of what copies and products allow | 50% of what copies and products allow | missed |",
        "| bf16 | at most 0.50x eager's memory between forward and backward | **0.25x eager's",
        "| bf16 | 1.30x torch.compile max-autotune | **2.00x torch.compile max-autotune** | reached |",
        "| bf16 | 85% of the copy bandwidth | 83% of the copy bandwidth | missed |",
    ):
        assert line in text, line
    assert "malloc" not in text and "low memory" not in text
    assert goals.gpu_table(rows) == text
    cpu = dict(variant="avx2", malloc="tuned", case="256ch-128")
    on_cpu = [measured("fused", 0.1, **cpu), measured("eager", 0.2, **cpu)]
    assert "of the matrix product's rate" in goals.table(on_cpu)
    alone = goals.gpu_table(on_cpu)
    assert alone.count("not measured") == len(goals.GPU_GOALS) and "a GPU" not in alone


def test_ours_is_the_faster_with_or_without_torch_compile() -> None:
    step = dict(op="train", case="t2i-128x128-b8", mode="step")
    rows = [
        measured("fused", 10.0, 10, **step), measured("fused-compile", 8.0, 6, **step),
        measured("eager", 20.0, 10, **step), measured("compile", 13.0, 9, **step),
    ]  # fmt: skip
    text = goals.table(rows)
    assert "| bf16 | 1.50x torch.compile | **1.62x torch.compile (ours inside torch.compile)** | reached |" in text
    assert "| **0.60x eager's peak memory (ours inside torch.compile)** | reached |" in text
    slower = [measured("fused-compile", 11.0, 6, **step), *(row for row in rows if row.provider != "fused-compile")]
    assert "| 1.50x torch.compile | 1.30x torch.compile | missed |" in goals.table(slower)
    assert compare(rows)[0].best_peer == rows[3]


def test_memory_of_graphs_is_told_without_them(gpu: SimulatedGpu) -> None:
    called: list[str] = []
    ours = Prepared(lambda: called.append("graph"), whole=True, graphs=True, ungraphed=lambda: called.append("plain"))
    assert _peak(ours, inference_step(ours), "cuda", False) == 700
    assert called == ["plain", "plain"], "once to compile, once to measure"
    theirs = replace(ours, ungraphed=None)
    assert _peak(theirs, inference_step(theirs), "cuda", False) == -1
    ordinary = Prepared(lambda: called.append("ordinary"), whole=True)
    assert _peak(ordinary, inference_step(ordinary), "cuda", False) == 700
    assert called == ["plain", "plain", "ordinary"]


class _Step:
    """A provider whose weights are alive as long as its step; the second has too little memory."""

    in_torch, version = True, "1"
    alive: ClassVar[weakref.WeakSet[Any]] = weakref.WeakSet()

    def __init__(self, name: str) -> None:
        self.name = name

    def unfit(self, case: Any, device: str, train: bool) -> None:
        return None

    def prepare(self, case: Any, device: str, train: bool) -> Prepared:
        assert not self.alive, "what the one before held is gone"

        class Weights:
            calls = 0

            def __call__(self) -> None:
                self.calls += 1
                if name == "fused-low" and self.calls == 3:  # while it is timed
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmuch")

        name, weights = self.name, Weights()
        self.alive.add(weights)
        return Prepared(weights, whole=True)


def test_training_steps_are_alone_on_a_gpu(gpu: SimulatedGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several together would not fit, and one that does not fit alone stops nobody else."""
    monkeypatch.setattr(Event, "elapsed_time", lambda start, end: 1.0)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(runner, "_checked", lambda case, plan: "somewhere")
    monkeypatch.setattr(runner, "_CHECKED", ("fused", "fused-low", "eager"))
    monkeypatch.setattr(runner, "costs", lambda case: {"step": cases.Cost(10**9, 10**6)})
    case = next(c for c in models.CASES if str(c) == "train-latents-float32")
    who: list[Any] = [_Step(name) for name in ("fused", "fused-low", "eager")]
    plan = runner.Plan("cuda", [case], ("train",), who, 0.01)
    found = runner.run(plan, limits.assumed("cuda"), machine.provenance("cpu", "abc"), lambda case, rows: None)
    assert [(r.provider, r.p50_ms, r.peak_bytes) for r in found.rows] == [("fused", 1.0, 700), ("eager", 1.0, 700)]
    assert [(m[1], m[2]) for m in found.missing] == [
        ("fused-low", "out of memory: CUDA out of memory. Tried to allocate")
    ]


def test_a_median_is_of_the_device_alone(gpu: SimulatedGpu) -> None:
    """What the processor takes to queue three kernels is ten times as long."""
    calls = []

    def call() -> None:
        calls.append(0)
        for _ in range(3):
            gpu.launch(2e-6, 20e-6)

    timer = device_time.DeviceTimer()
    assert timer.median(call) == pytest.approx(6e-3)
    assert 100 <= len(calls) < 115, "once to compile, a few until it was queued in time, a hundred that count"
    long = functools.partial(gpu.launch, 20e-3, 20e-6)
    begin = gpu.fills
    assert timer.median(long) == pytest.approx(20.0) and gpu.fills - begin == 5


def test_nothing_begins_that_would_pass_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(runner.time, "perf_counter", lambda: now[0])
    budget = Budget(60.0, 100.0)
    assert budget.over() is None and budget.refuses("compile-max", 0.0) is None
    budget.took("compile", 25.0)
    now[0] = 130.0
    assert budget.refuses("compile", 0.0) is None and budget.refuses("eager", 0.0) is None
    assert budget.refuses("compile-max", 8.0) is None
    assert "about 33 s to get ready, and the 60 s would be over" in str(budget.refuses("compile-max", 11.0))
    now[0] = 136.0
    assert "about 25 s" in str(budget.refuses("compile", 0.0)) and budget.over() is None
    now[0] = 161.0
    assert budget.over() == "left out: the 60 s were over"
    assert Budget(None, 0.0).over() is None and Budget(None, 0.0).refuses("compile-max", 1e9) is None


@pytest.mark.parametrize(
    ("arguments", "deadline"),
    [
        (("--device", "cuda", "--suite", "model"), 540),
        (("--device", "cuda", "--suite", "model", "--minutes", "2.5"), 150),
        (("--device", "cuda", "--suite", "decoder"), None),
        (("--suite", "models"), None),
        (("--suite", "decoder", "--minutes", "1"), 60),
    ],
)
def test_whole_models_on_a_gpu_take_nine_minutes(arguments: tuple[str, ...], deadline: float | None) -> None:
    assert make_plan(command.parse(arguments), Console(file=StringIO())).deadline == deadline


def test_goals_of_gpus_stand_between_their_markers(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"{tables.GPU_GOALS_BEGIN}\n{tables.GPU_GOALS_END}\n{tables.GOALS_BEGIN}\n{tables.GOALS_END}\n")
    assert tables.main((str(page), "--results", str(tmp_path))) == 0
    assert goals.gpu_table([]) in page.read_text()


# ---- a machine that has PyTorch, Triton and tyro, and little else ----------------------------------------------------

_LACKING = """
import importlib.abc, sys

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("accelerate", "coremltools", "diffusers", "nvtx", "tensorboard", "transformers"):
            raise ImportError(f"{name} is not there")

sys.meta_path.insert(0, Absent())
from bench import limits
from bench.__main__ import main

limits.measure = lambda device, *_: limits.assumed(device)
assert main(["--device", "cuda", "--suite", "resblock", "--dry-run"]) == 0
small = ["--suite", "resblock", "--small", "--case", "same", "--providers", "fused,eager,eager-nchw"]
assert main([*small, "--seconds", "0.05", "--out", sys.argv[1]]) == 0
"""


def test_ops_are_timed_without_the_packages_of_the_models(tmp_path: Path) -> None:
    out = tmp_path / "rows.csv"
    done = subprocess.run(
        [sys.executable, "-c", _LACKING, str(out)], cwd=machine.ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert {row.provider for row in read(out)} >= {"eager", "eager-nchw"}
