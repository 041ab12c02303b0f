"""Whole models in the benchmark: checked, timed, counted, and plain PyTorch where they are peers."""

import sys
from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode

import bench.__main__ as command
from bench import cases, models, providers
from bench.goals import GPU_GOALS
from bench.options import UsageError
from bench.plain import plain
from bench.results import read
from bench.session import make_plan
from snapgen import graphs
from tests.bench_runs import KERNEL, run

pytestmark = pytest.mark.usefixtures("quick_limits")

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
    assert {case.op for case in plan.cases} == {*cases.OPS, *models.MODELS} - {"picture"}  # which is a GPU's
    assert {case.dtype for case in plan.cases} == {torch.float32, torch.bfloat16}
    everything = make_plan(command.parse(("--suite", "all")), Console(file=StringIO()))
    assert {str(case) for case in plan.cases} < {str(case) for case in everything.cases}


def test_a_gpu_is_timed_at_the_sizes_of_its_goals() -> None:
    plan = make_plan(command.parse(("--suite", "model", "--device", "cuda")), Console(file=StringIO()))
    chosen = {(case.op, case.name, case.device) for case in plan.cases}
    assert chosen == {
        ("decoder", "1024px", "cuda"), ("denoiser", "t2i-128x128-b2", "cuda"), ("picture", "1024px-4", "cuda"),
        ("train", "t2i-128x128-b8", "cuda"), ("train", "imagenet-256-b256", "cuda"),
    }  # fmt: skip
    assert {(op, name) for op, name, _ in chosen} <= {(goal.op, goal.case) for goal in GPU_GOALS}
    assert {case.dtype for case in plan.cases} == {torch.bfloat16}
    large = {case.name for case in models.CASES if case.gpu}
    assert not [c for c in cases.select_models("cpu", models.MODELS, ("fp32",), quick=False, small=False, subset=None)
                if c.name in large]  # fmt: skip
    with pytest.raises(UsageError, match="--suite"):
        make_plan(command.parse(("--suite", "model")), Console(file=StringIO()))


def test_whole_models_are_left_out_without_their_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.session._lacking", lambda: ["diffusers"])
    with pytest.raises(UsageError, match="whole models need diffusers"):
        make_plan(command.parse(("--suite", "model", "--device", "cuda")), Console(file=StringIO()))
    text = StringIO()
    plan = make_plan(command.parse(("--suite", "all", "--device", "cuda")), Console(file=text, width=200))
    assert {case.op for case in plan.cases} == {*cases.OPS}
    assert "whole models are left out: they need diffusers" in text.getvalue()


def test_a_picture_is_its_steps_and_its_decoding() -> None:
    case = SMALL["picture-small-float32"]
    network, (latents, time, context, pooled) = models.build(case), models.feeds(case)
    with torch.no_grad():
        x = latents
        for thousandths in (500.0, 375.0, 250.0, 125.0):
            velocity = network.denoiser(x, thousandths, context, None, pooled, return_dict=False)[0]
            x = x - 0.125 * velocity
        expected = network.decoder(x)
        torch.testing.assert_close(models.run(network, (latents, time, context, pooled)), expected)
    pictures, denoiser, decoder = (
        models.costs(SMALL[f"{op}-small-float32"])[0] for op in ("picture", "denoiser", "decoder")
    )
    assert pictures == 4 * denoiser + 4 * decoder  # whose own small case has a fourth of the latents


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


@pytest.mark.complete
@pytest.mark.skipif(not KERNEL, reason="needs the kernels")
def test_models_are_timed_inside_torch_compile(tmp_path: Path) -> None:
    """As one graph, and with the results of plain PyTorch, or nothing would be timed."""
    case, out = SMALL["denoiser-small-float32"], tmp_path / "rows.csv"
    code, text = run(
        "--small", "--suite", case.op, "--case", case.name, "--seconds", "0.02", "--out", str(out),
        "--providers", "fused,fused-compile,eager", "--dtype", "fp32",
    )  # fmt: skip
    assert code == 0 and "fused-compile" in {row.provider for row in read(out)}, text


@pytest.mark.skipif(not KERNEL, reason="without a kernel nothing of ours is timed")
def test_what_is_compiled_is_compared_with_eager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = models.fused
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)

    def wrong(network: torch.nn.Module, **how: bool) -> Callable[..., torch.Tensor]:
        run = right(network, **how)
        return (lambda *activations: 1.01 * run(*activations)) if how.get("compiled") else run

    monkeypatch.setattr(models, "fused", wrong)
    code, text = run(
        "--small", "--suite", "denoiser", "--seconds", "0.02", "--out", str(tmp_path / "rows.csv"),
        "--providers", "fused-compile,eager", "--dtype", "fp32",
    )  # fmt: skip
    assert code == 0 and "not timed: fused-compile: its outputs are not eager's" in text, text
    assert {row.provider for row in read(tmp_path / "rows.csv")} == {"eager"}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", ["decoder-small-float32", "denoiser-small-float32", "picture-small-float32"])
def test_graphs_hold_what_is_run_without_them(name: str, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU. Its memory is told by the function, since what a graph holds is nothing new to the allocator."""
    recorded: list[Callable[..., torch.Tensor]] = []

    class Watched:
        def __init__(self, function: Callable[..., torch.Tensor], module: torch.nn.Module) -> None:
            self.function = function

        def __call__(self, *inputs: torch.Tensor | None) -> torch.Tensor:
            recorded.append(self.function)
            return self.function(*inputs)

    monkeypatch.setattr(graphs, "Graphed", Watched)
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)
    case = replace(SMALL[name], device="cuda")
    network, activations = models.build(SMALL[name]), models.feeds(SMALL[name])
    monkeypatch.setattr(models, "network_and_feeds", lambda case: (network, activations))
    with torch.no_grad():
        prepared = providers.fused._model(case, compiled=compiled)
        assert prepared.graphs and prepared.ungraphed is not None
        torch.testing.assert_close(prepared.call(), models.run(network, activations), rtol=1e-4, atol=1e-5)
        assert len(recorded) == (5 if case.op == "picture" else 1)
        torch.testing.assert_close(prepared.ungraphed(), prepared.call())
        assert len(recorded) == (10 if case.op == "picture" else 2), "the first of the two was no graph"


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


@pytest.mark.complete
def test_a_training_step_inside_torch_compile_has_the_same_losses() -> None:
    plainly, compiled = (models.training(SMALL["train-latents-float32"], mode=mode) for mode in (None, "default"))
    expected = [plainly().item() for _ in range(4)]
    assert [compiled().item() for _ in range(4)] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)])
def test_backward_of_a_convolution_costs_the_forward_for_each_gradient(groups: int, needs: tuple[bool, bool]) -> None:
    x, weight = torch.randn(2, 8, 6, 5), torch.randn(16, 8 // groups, 3, 3)
    x.requires_grad_(needs[0])
    weight.requires_grad_(needs[1])
    forward = 2 * (2 * 16 * 6 * 5) * (8 // groups * 9)
    mapping = {torch.ops.aten.convolution_backward: models._backward_flops}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        y = torch.nn.functional.conv2d(x, weight, padding=1, groups=groups)
        assert counter.get_total_flops() == forward
        y.sum().backward()
    assert counter.get_total_flops() == forward * (1 + sum(needs))
