"""The benchmark end to end on small cases: it refuses wrong ops, keeps provenance, and its files stay whole."""

import json
import math
import os
import subprocess
import sys
from dataclasses import asdict, replace
from io import StringIO
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console

import bench.__main__ as command
from bench import cases, goals, limits, machine, malloc, models, plot, tables
from bench.plain import plain
from bench.providers import NAMES, all_providers
from bench.results import COLUMNS, Row, append, compare, read
from bench.runner import Plan, check
from bench.session import make_plan
from bench.timing import Clock, Prepared, inference_step, interleaved, peak_bytes, training_step
from snapgen_kernels import FusedUnavailable, _backend
from snapgen_kernels.testing import CASES, SPECS, Case, bench_cases, small_cases

TINY = ("--small", "--suite", "group_norm_silu", "--case", "one-pixel", "--seconds", "0.02")
KERNEL = _backend.missing_kernel("group_norm_silu", "cpu") is None


@pytest.fixture(autouse=True)
def _quick_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring the machine takes seconds; one test does it."""
    monkeypatch.setattr(limits, "measure", lambda device, dtypes, seconds: limits.assumed(device))


def run(*arguments: str) -> tuple[int, str]:
    """Exit code and printed text of the benchmark, in this process."""
    text = StringIO()
    code = command.main(arguments, Console(file=text, width=160, highlight=False))
    return code, text.getvalue()


def row(**changes: object) -> Row:
    measured = dict(p20_ms=1.0, p50_ms=2.0, p80_ms=3.0, repeats=5, flops=10**8, bytes=10**6, floor_ms=1.0)
    rates = dict(gemm_gflops=190.0, copy_gbs=40.0, peak_bytes=100, checked="same shape", provider_version="1")
    where = dict(
        date="2026-01-01T00:00:00+00:00", commit="abc", device="a processor, 2 cores", variant="avx2", threads=2,
        malloc="tuned", load=0.1, python="3.11", torch="2.13.0", triton="none", snapgen="0.1",
    )  # fmt: skip
    case = dict(op="resblock", case="256ch-128", dtype="fp32", mode="fwd", provider="fused")
    values: dict[str, object] = {**case, **measured, **rates, **where, **changes}
    return Row(**values)  # type: ignore[arg-type]


# ---- a whole run -----------------------------------------------------------------------------------------------------


def test_a_run_appends_whole_rows_with_their_provenance(tmp_path: Path) -> None:
    out, report, picture = tmp_path / "rows.csv", tmp_path / "run.json", tmp_path / "run.png"
    files = ("--out", str(out), "--json", str(report), "--plot", str(picture))
    code, text = run(*TINY, "--providers", "fused,eager,eager-nchw", *files)
    assert code == 0, text
    rows = read(out)
    providers = {"fused", "eager", "eager-nchw"} if KERNEL else {"eager", "eager-nchw"}
    expected = {(d, m, p) for d in ("fp32", "bf16") for m in ("fwd", "bwd", "fwd+bwd") for p in providers}
    assert {(r.dtype, r.mode, r.provider) for r in rows} == expected
    assert len(rows) == len(expected)
    for r in rows:
        assert 0 < r.p20_ms <= r.p50_ms <= r.p80_ms
        assert r.repeats >= 5
        assert r.flops > 0 and r.bytes > 0 and r.floor_ms > 0
        assert r.peak_bytes == -1 if r.mode == "bwd" else r.peak_bytes > 0
        assert r.checked == ("same shape" if KERNEL else "no kernel")
        assert r.torch == torch.__version__ == r.provider_version or r.provider == "fused"
        assert r.threads == torch.get_num_threads()
        assert all(str(value) for value in asdict(r).values()), r
    first = out.read_text()
    assert run(*TINY, "--providers", "eager", "--mode", "fwd", "--out", str(out))[0] == 0
    assert out.read_text().startswith(first), "rows that were there have changed"
    assert len(read(out)) == len(rows) + 2
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")], "a temporary file was left"
    found = json.loads(report.read_text())
    assert [r["p50_ms"] for r in found["rows"]] == pytest.approx([r.p50_ms for r in rows], rel=1e-5)
    assert found["machine"]["device"] == rows[0].device
    assert found["limits"]["gemm_flops_per_s"]["fp32"] > 0
    assert Image.open(picture).size > (200, 100)


def test_a_backward_is_the_second_part_of_the_same_repetitions(tmp_path: Path) -> None:
    out = tmp_path / "rows.csv"
    assert run(*TINY, "--providers", "eager", "--mode", "train", "--dtype", "fp32", "--out", str(out))[0] == 0
    backward, both = read(out)
    assert (backward.mode, both.mode) == ("bwd", "fwd+bwd")
    assert backward.repeats == both.repeats
    assert backward.p20_ms < both.p20_ms


@pytest.mark.skipif(not KERNEL, reason="without a kernel there is nothing that could be wrong")
@pytest.mark.parametrize("wrong", ["outputs", "gradients"])
def test_a_wrong_op_is_not_timed(wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = SPECS["group_norm_silu"]

    def public(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        right = spec.public(inputs)
        return 1.01 * right if wrong == "outputs" else 0.99 * right + 0.01 * right.detach()

    monkeypatch.setitem(SPECS, "group_norm_silu", replace(spec, public=public))
    monkeypatch.setitem(CASES, "group_norm_silu", [replace(case) for case in CASES["group_norm_silu"]])
    out = tmp_path / "rows.csv"
    code, text = run(*TINY, "--out", str(out))
    assert code == 1
    assert "wrong: group_norm_silu-one-pixel-float32-channels_last" in text
    assert "allowed" in text
    assert not out.exists()


def test_torch_compile_is_timed(tmp_path: Path) -> None:
    out = tmp_path / "rows.csv"
    arguments = (*TINY, "--dtype", "fp32", "--mode", "fwd", "--providers", "compile,eager", "--out", str(out))
    code, text = run(*arguments)
    assert code == 0, text
    assert {r.provider for r in read(out)} == {"compile", "eager"}


def test_an_op_without_a_kernel_says_so_and_its_peers_are_timed() -> None:
    without = [op for op in cases.OPS if _backend.missing_kernel(op, "cpu")]
    if not without:
        pytest.skip("every op has a CPU kernel by now")
    small = small_cases(without[0])[0].name
    code, text = run(
        "--small", "--suite", without[0], "--case", small, "--seconds", "0.02", "--dtype", "fp32",
        "--providers", "fused,eager", "--mode", "fwd",
    )  # fmt: skip
    assert code == 0, text
    assert "not timed: fused: " in text
    assert "eager" in text


def test_a_quick_run_leaves_out_what_it_has_no_time_for(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = cases.select("cpu", cases.OPS, ("fp32", "bf16"), quick=True, small=False)
    first = [case.op for case in chosen[: 2 * len(cases.OPS)]]
    assert set(first) == set(cases.OPS), "a slow machine sees every op before the second case of any"
    if not KERNEL:
        return
    from bench import session

    monkeypatch.setattr(session, "_QUICK_DEADLINE", 0.0)
    code, text = run("--quick", "--suite", "group_norm_silu", "--seconds", "0.02")
    assert code == 0, text
    assert "not timed: all: left out: 0 s were over" in text


def test_a_case_that_takes_pytorch_too_long_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = limits.Limits({"fp32": 1e9, "bf16": 1e-3}, ((1 << 20, 1e9),))
    monkeypatch.setattr(limits, "measure", lambda device, dtypes, seconds: slow)
    code, text = run(*TINY, "--providers", "eager", "--mode", "fwd")
    assert code == 0, text
    assert "one forward takes PyTorch" in text
    assert "group_norm_silu-one-pixel-bfloat16" in text
    assert "2 rows" not in text and "1 rows" in text


# ---- plans and bad input ---------------------------------------------------------------------------------------------


def test_the_plan_for_a_gpu_needs_none() -> None:
    code, text = run("--device", "cuda", "--suite", "resblock", "--dry-run")
    assert code == 0
    assert "256ch-128-b8" in text
    assert "dry run: nothing was checked, timed or written" in text
    cost = cases.costs(next(c for c in cases.select("cuda", ("resblock",), ("bf16",), quick=False, small=False)))["fwd"]
    floor = 1e3 * max(cost.flops / 790e12, cost.bytes / 4.3e12)
    for said in (f"{cost.flops / 1e9:.3g} G", f"{cost.bytes / 1e6:.3g} M", f"{floor:.3f}"):
        assert said in text, said


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_there_is_one_clear_error() -> None:
    code, text = run("--device", "cuda", "--suite", "resblock")
    assert code == 2
    assert "error: --device cuda: PyTorch sees no CUDA or ROCm device" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--suite", "resnet"), "--suite is 'resnet'; allowed: all, ops, models, readme, group_norm_silu"),
        (("--dtype", "int8"), "--dtype is 'int8'; allowed: fp32, bf16, fp16"),
        (("--mode", "forward"), "--mode is 'forward'; allowed: fwd, train"),
        (("--providers", "eager,tvm"), "--providers is 'tvm'; allowed: fused, fused-low, eager"),
        (("--providers", ","), "--providers is empty"),
        (("--case", "none-such"), "no case is left"),
        (("--threads", "0"), "--threads is 0"),
        (("--seconds", "-1"), "--seconds is -1"),
        (("--providers", "compile-max"), "--providers compile-max: max-autotune is timed on CUDA only"),
    ],
)
def test_bad_options(arguments: tuple[str, ...], message: str) -> None:
    code, text = run("--dry-run", *arguments)
    assert code == 2
    assert message in text


def test_every_provider_is_listed_and_tells_what_it_lacks() -> None:
    everyone = all_providers()
    assert tuple(everyone) == NAMES
    case = bench_cases("resblock")[0]
    for provider in everyone.values():
        for reason in (provider.absent("cpu"), provider.absent("cuda"), provider.unfit(case, "cpu", True)):
            assert reason is None or len(reason) > 10
    assert everyone["openvino"].unfit(case, "cpu", True)
    assert everyone["eager-nchw"].unfit(bench_cases("attention")[0], "cpu", False)


# ---- costs and limits ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [c for op in cases.OPS for c in bench_cases(op)], ids=str)
def test_every_case_has_costs_and_a_floor(case: Case) -> None:
    for device in ("cpu", "cuda"):
        rates, found = limits.assumed(device), cases.costs(case)
        for cost in found.values():
            assert cost.flops > 0 and cost.bytes > 0
            assert 0 < rates.floor_ms(cost, case.dtype) < math.inf
        assert found["fwd+bwd"].flops == found["fwd"].flops + found["bwd"].flops
        assert found["bwd"].bytes > found["fwd"].bytes


def test_the_backward_moves_inputs_and_gradients_once() -> None:
    case = Case("group_norm_silu", "drawn", {"B": 2, "C": 8, "H": 3, "W": 5, "G": 2})
    size = 2 * 8 * 3 * 5 * 4
    # x and dy are read, dx is written; weight and bias are read, their gradients written.
    assert cases.costs(case)["bwd"].bytes == 3 * size + 4 * 8 * 4


def test_limits_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    rates = limits.measure("cpu", ("fp32",), 0.05)
    assert rates.measured
    assert 1e9 < rates.gemm["fp32"] < 1e14
    assert all(1e8 < rate < 1e13 for _, rate in rates.copy)
    sizes = [size for size, _ in rates.copy]
    assert rates.copy_rate(1) == rates.copy[0][1] and rates.copy_rate(1 << 40) == rates.copy[-1][1]
    between = rates.copy_rate(2 * sizes[0])
    assert min(rates.copy[0][1], rates.copy[1][1]) <= between <= max(rates.copy[0][1], rates.copy[1][1])


def test_large_pictures_are_checked_at_a_smaller_size(monkeypatch: pytest.MonkeyPatch) -> None:
    large = next(case for case in bench_cases("decoder_block") if case.name == "128ch-1024")
    smaller = cases.to_check(large, 1 << 24)
    assert smaller.dims["H"] * smaller.dims["W"] * smaller.dims["M"] <= 1 << 24
    assert (smaller.dims["C"], smaller.dims["M"]) == (large.dims["C"], large.dims["M"])
    fitting = next(case for case in bench_cases("resblock") if case.name == "256ch-128")
    assert cases.to_check(fitting, 1 << 24) is fitting
    tokens = bench_cases("attention")[0]
    assert cases.to_check(tokens, 1) is tokens


@pytest.mark.skipif(not KERNEL, reason="without a kernel the reason is another")
def test_a_dtype_without_a_kernel_says_so_and_its_peers_are_timed() -> None:
    code, text = run(*TINY, "--dtype", "fp16", "--providers", "fused,eager", "--mode", "fwd")
    assert code == 0, text
    assert "not timed: fused: group_norm_silu: x has dtype torch.float16 on cpu" in text
    assert "1 rows" in text


@pytest.mark.skipif(not KERNEL, reason="nothing to check without a kernel")
def test_the_check_says_what_it_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    from bench import runner

    plan = Plan("cpu", [], ("fwd", "train"), [], 1.0)
    case = Case("group_norm_silu", "drawn", {"B": 1, "C": 8, "H": 16, "W": 12, "G": 2})
    assert check(case, plan) == "same shape"
    monkeypatch.setitem(runner._CHECKED_ELEMENTS, "cpu", 400)
    assert check(case, plan) == "at 1x8x6"
    with pytest.raises(FusedUnavailable, match=r"x has dtype torch\.float16"):
        check(replace(case, dtype=torch.float16), plan)


# ---- whole models ----------------------------------------------------------------------------------------------------

SMALL = {str(case): case for case in models.CASES if not case.bench}


@pytest.mark.parametrize("name", list(SMALL))
def test_models_are_checked_and_timed(name: str, tmp_path: Path) -> None:
    case, out = SMALL[name], tmp_path / "rows.csv"
    dtypes = ("fp32",) if name == "train-small-float32" else ("fp32", "bf16")  # the whole trainer: once is enough
    code, text = run(
        "--small", "--suite", case.op, "--case", case.name, "--seconds", "0.02", "--out", str(out),
        "--providers", "fused,eager,eager-nchw", "--dtype", ",".join(dtypes),
    )  # fmt: skip
    assert code == 0, text
    rows = [r for r in read(out) if r.case == case.name]
    providers = {"fused", "eager", "eager-nchw"} if KERNEL else {"eager", "eager-nchw"}
    assert {(r.dtype, r.provider) for r in rows} == {(d, p) for d in dtypes for p in providers}
    assert {r.mode for r in rows} == {"step" if case.op == "train" else "fwd"}
    for r in rows:
        assert r.checked == (f"at {case.batch}x{case.side}x{case.side}" if KERNEL else "no kernel")
        assert r.flops > 0 and r.bytes > 0 and r.peak_bytes > 0
        assert r.share == pytest.approx(r.flops / r.p50_ms / 1e6 / r.gemm_gflops)


@pytest.mark.skipif(not KERNEL, reason="without a kernel there is nothing that could be wrong")
@pytest.mark.parametrize("op", models.MODELS)
def test_a_wrong_model_is_not_timed(op: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part that PyTorch computes right and the fused model wrong."""
    from snapgen import decoder
    from snapgen_kernels import decoder_block, resblock

    module, in_place = decoder_block if op == "decoder" else resblock, decoder.apply_block
    places = [(m, n) for m in list(sys.modules.values()) if m.__name__.startswith("snapgen")
              for n, value in vars(m).items() if value is module]  # fmt: skip
    assert places
    with plain():  # the yardstick knows the right one
        pass
    for place, attribute in places:
        monkeypatch.setattr(place, attribute, lambda *a, **k: 1.01 * module(*a, **k))
    monkeypatch.setattr(decoder, "apply_block", lambda *a, **k: (1.01 * in_place(*a, **k)[0], None))
    out = tmp_path / "rows.csv"
    code, text = run("--small", "--suite", op, "--case", "small", "--dtype", "fp32", "--out", str(out))
    assert code == 1, text
    assert f"wrong: {op}-small" in text and "allowed" in text
    assert not out.exists()


def test_inside_plain_no_op_of_ours_is_called() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    import snapgen_kernels

    seen: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    before = snapgen_kernels.sepconv
    case = replace(SMALL["denoiser-small-float32"], dtype=torch.bfloat16)
    network, inputs = models.build(case), models.feeds(case)
    with plain(), torch.no_grad(), Watch():
        assert snapgen_kernels.sepconv is not before
        models.run(network, inputs)
    assert snapgen_kernels.sepconv is before
    assert not [name for name in seen if "snapgen" in name]
    norms = [name for name in seen if "native_group_norm" in name]
    assert norms, "the norm is PyTorch's own"


def test_the_readme_suite_has_every_op_and_every_model() -> None:
    plan = make_plan(command.parse(("--suite", "readme")), Console(file=StringIO()))
    assert {case.op for case in plan.cases} == {*cases.OPS, *models.MODELS}
    assert {case.dtype for case in plan.cases} == {torch.float32, torch.bfloat16}
    everything = make_plan(command.parse(("--suite", "all")), Console(file=StringIO()))
    assert {str(case) for case in plan.cases} < {str(case) for case in everything.cases}


def test_models_count_what_info_counts() -> None:
    from snapgen.config import PRESETS
    from snapgen.info import decoder_counts, denoiser_counts

    decoder, denoiser = (
        next(c for c in models.CASES if str(c).startswith(n)) for n in ("decoder-1024", "denoiser-t2i-128")
    )
    flops, moved = models.costs(decoder)
    counted = decoder_counts(PRESETS["t2i-1024"])[""]
    assert flops == 2 * counted.macs
    assert moved == 4 * (counted.params + 16 * 128 * 128 + 3 * 1024 * 1024)
    flops, _ = models.costs(denoiser)
    short = 2 * denoiser_counts(PRESETS["t2i-1024"].denoiser)[""].macs  # with 77 tokens for 333
    assert short < flops < 1.05 * short
    half = models.costs(replace(decoder, dtype=torch.bfloat16))
    assert half == (models.costs(decoder)[0], moved // 2)


def test_a_training_step_trains_and_is_the_same_for_all() -> None:
    case, losses = SMALL["train-latents-float32"], {}
    for layout in ("channels_last", "contiguous"):
        with plain():
            step = models.training(case, layout=layout)
            losses[layout] = [step().item() for _ in range(4)]
    step = models.training(case)
    losses["fused"] = [step().item() for _ in range(4)]
    assert len(set(losses["fused"])) == 4
    for found in losses.values():
        assert found == pytest.approx(losses["channels_last"], rel=1e-3)


# ---- timing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("seconds", "rounds"), [(1e-6, 3), (1.0, 5)])
def test_providers_take_turns(seconds: float, rounds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """At least five rounds, three where one takes longer than all were meant to."""
    from bench import timing

    order: list[str] = []
    monkeypatch.setattr(timing, "_MOST", 5)

    def step(name: str) -> list:
        return [lambda: order.append(name)]

    found = interleaved({name: step(name) for name in "abc"}, Clock("cpu"), seconds)
    turns = [order[i : i + 3] for i in range(len(order) - 3 * rounds, len(order), 3)]
    assert all(sorted(turn) == list("abc") for turn in turns)
    assert {turn[0] for turn in turns} == set("abc"), "each one comes first in its turn"
    assert all(len(times) == rounds for times in found.values())
    order.clear()
    interleaved({name: step(name) for name in "abc"}, Clock("cpu"), seconds, warm=True)
    assert len(order) == 3 * rounds


def test_nobody_follows_a_runtime_with_threads_of_its_own_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from bench import timing

    order: list[str] = []
    monkeypatch.setattr(timing, "_MOST", 12)
    monkeypatch.setattr(timing.time, "sleep", lambda seconds: order.append("rest"))

    def step(name: str) -> list:
        return [lambda: order.append(name)]

    interleaved({name: step(name) for name in "abcd"}, Clock("cpu"), 10.0, warm=True, own_threads=("b",))
    pairs = set(pairwise(order))
    assert {after for before, after in pairs if before == "b"} == {"rest"}
    assert {after for before, after in pairs if before == "a"} == set("bcd"), "every round has an order of its own"


def test_peak_memory_counts_what_is_held_at_once() -> None:
    x = torch.ones(1 << 18)  # 1 MiB
    step = inference_step(Prepared(lambda: (x + 1) * 2))
    peak = peak_bytes(step, "cpu")
    assert 2 << 20 <= peak < (2 << 20) + 4096
    y = torch.ones(1 << 18, requires_grad=True)
    trained = peak_bytes(training_step(Prepared(lambda: y.exp(), (y,))), "cpu")
    assert 2 << 20 <= trained < (2 << 20) + 4096  # the output, kept for the backward, and the gradient


def test_peak_memory_leaves_out_what_replaces_what_was_there() -> None:
    kept = [torch.ones(1 << 18)]  # 1 MiB

    def replace_it() -> None:
        kept[0] = kept[0] + 1

    assert 2 << 20 > peak_bytes([replace_it], "cpu", twice=True) >= 1 << 20
    more: list[torch.Tensor] = []
    assert 2 << 20 > peak_bytes([lambda: more.append(torch.ones(1 << 18))], "cpu", twice=True) >= 1 << 20


# ---- malloc ----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(malloc.state() == "none", reason="malloc is not glibc's")
def test_python_starts_anew_with_malloc_as_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in malloc.TUNED:
        monkeypatch.delenv(name, raising=False)
    assert malloc.state() == "stock"
    assert malloc.command("stock", ["--quick"]) is None
    anew = malloc.command("tuned", ["--quick"])
    assert anew is not None
    arguments, environment = anew
    assert arguments == [sys.executable, "-m", "bench", "--quick"]
    assert malloc.state(environment) == "tuned"
    for name, value in malloc.TUNED.items():
        monkeypatch.setenv(name, value)
    assert malloc.command("tuned", []) is None
    back = malloc.command("stock", [])
    assert back is not None and malloc.state(back[1]) == "stock"
    monkeypatch.setenv("MALLOC_TOP_PAD_", "1")
    assert malloc.state() == "other"


@pytest.mark.skipif(malloc.state() == "none", reason="malloc is not glibc's")
@pytest.mark.parametrize("wanted", ["tuned", "stock"])
def test_the_command_records_its_malloc(wanted: str, tmp_path: Path) -> None:
    out = tmp_path / "rows.csv"
    arguments = [
        *TINY,
        "--dtype",
        "fp32",
        "--mode",
        "fwd",
        "--providers",
        "eager",
        "--malloc",
        wanted,
        "--threads",
        "1",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "bench", *arguments, "--out", str(out)],
        cwd=machine.ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert [r.malloc for r in read(out)] == [wanted]
    assert [r.threads for r in read(out)] == [1]


# ---- files -----------------------------------------------------------------------------------------------------------


def test_rows_survive_the_file(tmp_path: Path) -> None:
    rows = [row(), row(provider="eager, with a comma", p50_ms=1.2345678)]
    append(tmp_path / "a" / "rows.csv", rows)
    assert read(tmp_path / "a" / "rows.csv") == [rows[0], replace(rows[1], p50_ms=1.23457)]


def test_a_failed_write_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "rows.csv"
    append(out, [row()])
    before = out.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space left on the disk while writing"):
        append(out, [row()])
    assert out.read_bytes() == before
    assert list(tmp_path.iterdir()) == [out]


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    other = tmp_path / "other.csv"
    other.write_text("op,speed\nresblock,1\n")
    with pytest.raises(ValueError, match=r"other\.csv: its columns differ .*speed.* move it away"):
        append(other, [row()])
    with pytest.raises(ValueError, match=r"other\.csv, line 2: no value for case"):
        read(other)
    torn = tmp_path / "torn.csv"
    append(torn, [row()])
    torn.write_text(torn.read_text().replace(",5,", ",five,"))
    with pytest.raises(ValueError, match=r"torn\.csv, line 2: .*five"):
        read(torn)


def test_only_the_latest_run_is_compared() -> None:
    old, new = "2026-01-01T00:00:00+00:00", "2026-01-02T00:00:00+00:00"
    rows = [
        row(date=old, p50_ms=9.0), row(date=old, provider="compile", p50_ms=0.1),
        row(date=new, p50_ms=2.0), row(date=new, provider="eager", p50_ms=5.0),
        row(date=new, provider="eager-nchw", p50_ms=3.0), row(date=new, malloc="stock", provider="eager", p50_ms=8.0),
    ]  # fmt: skip
    tuned, stock = compare(rows)
    assert tuned.speedup == pytest.approx(1.5)
    assert tuned.best_peer is not None and tuned.best_peer.provider == "eager-nchw"
    assert stock.fused is None and stock.speedup is None


def test_tables_are_rewritten_between_the_markers_and_then_up_to_date(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    readme, results = tmp_path / "README.md", tmp_path / "results"
    readme.write_text(f"# Title\n\n{tables.BEGIN}\nold\n{tables.END}\n\nmore\n")
    here = (str(readme), "--results", str(results))
    assert tables.main(here) == 0
    assert "No rows are recorded yet" in readme.read_text()
    rows = [row(), row(provider="eager", p50_ms=3.0), row(mode="bwd", p50_ms=0.5), row(mode="fwd+bwd", p50_ms=77.7)]
    append(results / "machine.csv", rows)
    assert tables.main((*here, "--check")) == 1
    assert "not up to date" in capsys.readouterr().err
    assert "No rows" in readme.read_text(), "--check writes nothing"
    assert tables.main(here) == 0
    text = readme.read_text()
    assert text.startswith("# Title\n") and text.endswith("\nmore\n")
    assert "| op | case | dtype | mode | fused | eager | gain | GEMM | floor |" in text
    assert "| `resblock` | 256ch-128 | fp32 | fwd | **2.00** | 3.00 | 1.50x | 26% | 50% |" in text
    assert "| `resblock` | 256ch-128 | fp32 | bwd | **0.500** |  |  | 105% | 200% |" in text
    assert "77.7" not in text
    assert tables.main((*here, "--check")) == 0
    assert tables.main(here) == 0
    assert readme.read_text() == text


def test_whole_models_have_a_table_and_a_stock_malloc_a_column() -> None:
    model = dict(op="decoder", case="512px")
    rows = [
        row(**model, p50_ms=2.0, peak_bytes=100), row(**model, provider="eager", p50_ms=3.0, peak_bytes=400),
        row(**model, malloc="stock", p50_ms=4.0), row(**model, malloc="stock", provider="eager", p50_ms=20.0),
        row(),
    ]  # fmt: skip
    text = tables.tables(rows)
    assert "| model | case | dtype | mode | fused | eager | gain | stock | GEMM | floor | memory |" in text
    assert "| `decoder` | 512px | fp32 | fwd | **2.00** | 3.00 | 1.50x | 5.00x | 26% | 50% | 0.25x |" in text
    assert "| op | case | dtype | mode | fused | gain | GEMM | floor |" in text
    assert "malloc stock" not in text, "one machine, one table of each kind"
    assert "malloc stock" in tables.tables(rows[2:4])


def test_tables_need_their_markers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    readme = tmp_path / "README.md"
    assert tables.main((str(readme), "--results", str(tmp_path))) == 2
    for text in ("nothing", f"{tables.END}\n{tables.BEGIN}", f"{tables.BEGIN}\n{tables.BEGIN}\n{tables.END}"):
        readme.write_text(text)
        assert tables.main((str(readme), "--results", str(tmp_path))) == 2
        assert "needs the line" in capsys.readouterr().err
        assert readme.read_text() == text


def test_pictures_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "machine.csv"
    append(file, [row(dtype=d, mode=m, provider=p, p50_ms=1.0 + len(p)) for d in ("fp32", "bf16")
                  for m in ("fwd", "bwd", "fwd+bwd") for p in ("fused", "eager")])  # fmt: skip
    assert plot.main([str(file)]) == 0
    drawn = {path.name: path for path in tmp_path.iterdir() if path != file}
    names = {f"machine-tuned-2-{n}.{s}" for n in ("speedup", "roofline") for s in ("svg", "png")}
    assert set(drawn) == names
    speedup = drawn["machine-tuned-2-speedup.svg"].read_bytes()
    with Image.open(drawn["machine-tuned-2-roofline.png"]) as picture:
        assert len(picture.convert("RGB").resize((200, 150)).getcolors(200 * 150)) > 20
    assert plot.main([str(file), "--folder", str(tmp_path / "docs")]) == 0
    assert {path.name for path in (tmp_path / "docs").iterdir()} == names
    assert plot.main([str(file)]) == 0
    assert drawn["machine-tuned-2-speedup.svg"].read_bytes() == speedup, "the same rows give the same file"


def test_columns_name_everything_the_design_asks_for() -> None:
    asked = "op case provider mode dtype p20_ms p50_ms p80_ms bytes flops floor_ms device threads malloc torch triton "
    assert set((asked + "python snapgen commit date").split()) <= set(COLUMNS)


def test_the_file_is_named_after_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_processor", lambda: "AMD EPYC (TM) 9B14")
    name = machine.results_file("cpu").name
    assert name.startswith("amd-epyc-tm-9b14-") and name.endswith(".csv")
    assert set(name.removesuffix(".csv")) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")


def test_a_peer_that_computes_something_else_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    from bench.providers.eager import Eager

    prepare = Eager.prepare

    def wrong(self: Eager, case: Case, device: str, train: bool) -> Prepared:
        right = prepare(self, case, device, train)
        return right if self.name == "eager" else Prepared(lambda: 1.1 * right.call(), right.leaves)  # type: ignore[operator]

    monkeypatch.setattr(Eager, "prepare", wrong)
    code, text = run(*TINY, "--dtype", "fp32", "--providers", "eager,eager-nchw", "--mode", "fwd")
    assert code == 0, text
    assert "not timed: eager-nchw: its outputs are not eager's: relative error 0.1" in text
    assert "1 rows" in text


def _measured(provider: str, ms: float, peak: int, **other: object) -> Row:
    return row(**{**dict(op="decoder", case="1024px", provider=provider, p50_ms=ms, peak_bytes=peak), **other})


def test_goals_are_judged_by_the_latest_rows() -> None:
    full = 4 * 128 * 1024 * 1024
    rows = [
        _measured("fused", 100.0, full, flops=8e9, gemm_gflops=100.0),  # 80 of 100 GFLOP/s
        _measured("fused-low", 140.0, int(1.25 * full)),
        _measured("eager", 150.0, 4 * full),
        _measured("openvino", 130.0, -1),
        _measured("fused", 100.0, full, malloc="stock"),
        _measured("eager", 400.0, full, malloc="stock"),
    ]
    text = goals.table(rows)
    for line in (
        "| 75% of the matrix product's rate | **80% of the matrix product's rate** | reached |",
        "| 1.40x the best peer | 1.30x the best of eager, openvino | missed |",
        "| at most 0.33x eager's peak memory | **0.25x eager's peak memory** | reached |",
        "| at most low memory: 1.30 full-size images | **1.25 full-size images** | reached |",
        "| at most low memory: 1.35x the time | 1.40x the time | missed |",
        "| 5.00x eager, malloc as it comes | 4.00x eager, malloc as it comes | missed |",
    ):
        assert line in text
    assert "No rows" in goals.table([])
