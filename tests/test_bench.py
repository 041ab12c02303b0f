"""The benchmark end to end on small cases: it refuses wrong ops, keeps provenance, and says what it leaves out."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from bench import cases, limits
from bench.providers import NAMES, all_providers
from bench.results import read
from bench.runner import Plan, check
from bench.timing import Prepared
from snapgen_kernels import FusedUnavailable, _backend
from snapgen_kernels.testing import CASES, SPECS, Case, bench_cases, small_cases
from tests.bench_runs import KERNEL, TINY, run

pytestmark = pytest.mark.usefixtures("quick_limits")


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
    assert "not timed: all: left out: the 0 s were over" in text


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
        (("--providers", "eager,tvm"), "--providers is 'tvm'; allowed: fused, fused-compile, fused-low, eager"),
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


@pytest.mark.parametrize("wrong", ["outputs", "gradients"])
@pytest.mark.parametrize("mode", ["fwd", "train"])
def test_a_peer_that_computes_something_else_is_not_timed(
    mode: str, wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients matter where they are timed."""
    from bench.providers.eager import Eager

    prepare = Eager.prepare

    def wrongly(self: Eager, case: Case, device: str, train: bool) -> Prepared:
        right = prepare(self, case, device, train)

        def call() -> torch.Tensor:
            y = right.call()
            assert isinstance(y, torch.Tensor)
            return 1.1 * y if wrong == "outputs" else 0.9 * y + 0.1 * y.detach()

        return right if self.name == "eager" else Prepared(call, right.leaves)

    monkeypatch.setattr(Eager, "prepare", wrongly)
    code, text = run(*TINY, "--dtype", "fp32", "--providers", "eager,eager-nchw", "--mode", mode)
    assert code == 0, text
    refused = wrong == "outputs" or mode == "train"
    assert (f"not timed: eager-nchw: its {wrong} are not eager's: relative error 0.1" in text) == refused
    rows = (1 if mode == "fwd" else 2) * (1 if refused else 2)
    assert f"{rows} rows" in text
