"""The benchmark of the transformer's ops on a GPU, without one: what is run, and that its peers compute the same."""

import sys
from itertools import takewhile
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import blocks, cases, goals, limits
from bench.agreement import Yardstick
from bench.providers import Unusable, all_providers, flex, sdpa
from bench.providers.choice import fastest
from bench.providers.flex import Flex, block_mask
from bench.providers.liger import Liger
from bench.timing import Clock, Prepared, Untimed, training_step
from snapgen_kernels import checks, costs, token_costs
from snapgen_kernels.testing import SPECS, Case, Inputs, bench_cases
from tests.bench_runs import run

SELF = Case("attention", "self", {"B": 2, "N": 12, "H": 3, "D": 16, "M": 12, "rope": 1})
CROSS = Case("attention", "cross", {"B": 2, "N": 7, "H": 2, "D": 8, "M": 5})
MASKED = Case("attention", "masked", {"B": 1, "N": 5, "H": 2, "D": 8, "M": 11, "mask": 1})
RAGGED = Case("attention", "ragged", {"B": 3, "N": 140, "H": 2, "D": 8, "M": 150, "mask": 1})
rotary = SPECS["qk_norm_rope"].eager


def test_the_suite_of_attention_is_what_has_goals() -> None:
    code, text = run("--device", "cuda", "--suite", "attention", "--dry-run")
    assert code == 0, text
    ops, subset = cases.named(("attention",), "cuda")
    chosen = cases.select("cuda", ops, ("bf16",), quick=False, small=False, subset=subset)
    with_goals = {(goal.op, goal.case) for goal in goals.GPU_GOALS if goal.op in ops}
    assert {(case.op, case.name) for case in chosen} == with_goals
    for case in chosen:
        assert case.name.endswith(f"-b{case.dims['B']}") and case.name in text
    assert cases.named(("attention",), "cpu") == (("attention",), None), "on a CPU it is the op"


def test_the_plan_shows_what_each_kernel_moves_and_computes() -> None:
    """At an H200's rates, forward and backward, with their sums and the op's own floor."""
    _, text = run("--device", "cuda", "--suite", "attention", "--dry-run")
    ops, subset = cases.named(("attention",), "cuda")
    known = [case for case in cases.select("cuda", ops, ("bf16",), quick=False, small=False, subset=subset)
             if case.op in token_costs.OPS]  # fmt: skip
    assert {case.op for case in known} == {"attention", "qk_norm_rope", "geglu"}
    for case in known:
        below = [line.split() for line in text[text.index(f"{case.op} {case.name} bf16") :].splitlines()[1:]]
        table = list(
            takewhile(lambda line: not line or line[0] in ("mode", "fwd", "bwd") or set(line[0]) == {"─"}, below)
        )
        for mode in ("fwd", "bwd"):
            found = token_costs.kernels(case.op, case.dims, 2, mode)
            lines = [line for line in table if line[:1] == [mode]]
            assert len(lines) == len(found) + 2, "each kernel, their sum and the op"
            for line, kernel in zip(lines, found, strict=False):
                assert " ".join(line).startswith(f"{mode} {kernel.name} {kernel.launches} ")
                assert line[-1] == f"{1e6 * kernel.floor(costs.H200):.1f}"
            assert lines[-2][:2] == [mode, "all"] and lines[-1][1:4] == ["the", "op", "itself"]
            assert lines[-2][-1] == f"{1e6 * costs.total(found, costs.H200):.1f}"


def test_a_block_is_the_models() -> None:
    """Given its weights, and with our ops or PyTorch's."""
    from snapgen.layers import TransformerBlock

    case = next(case for case in blocks.CASES if not case.bench)
    d, inputs = case.dims, case.inputs()
    kind: dict[str, Any] = dict(self_attention=True, ff_ratio=d["F"] / d["C"], kv_heads="one", qk_norm=True)
    model = TransformerBlock(d["C"], d["T"], d["H"], head_dim=d["D"], **kind)
    names = {"ff.proj_in.weight": "in_weight", "ff.proj_in.bias": "in_bias"}
    names |= {f"ff.proj_out.{kind}": f"out3_{kind}" for kind in ("weight", "bias")}
    for number in "123":
        names |= {f"norm{number}.{kind}": f"norm{number}_{kind}" for kind in ("weight", "bias")}
    for number in "12":
        names |= {f"attn{number}.to_{part}.weight": f"{part}{number}" for part in "qkv"}
        names |= {f"attn{number}.norm_{part}.weight": f"{part}{number}_norm" for part in "qk"}
        names |= {f"attn{number}.to_out.{kind}": f"out{number}_{kind}" for kind in ("weight", "bias")}
    model.load_state_dict({theirs: inputs[ours] for theirs, ours in names.items()})
    assert set(names.values()) == set(blocks.OP.differentiable) - {"x"}
    right = model(inputs["x"], inputs["context"], None, (inputs["cos"], inputs["sin"]))
    for function in (case.spec.public, case.spec.eager, case.spec.reference):
        torch.testing.assert_close(function(inputs), right)
    checks.check_gradients(case)


def test_a_block_has_costs_and_is_tuned_as_its_ops() -> None:
    for case in blocks.CASES:
        found = cases.costs(case)
        assert limits.assumed("cuda").floor_ms(found["fwd"], case.dtype) > 0
        assert found["fwd"].bytes < found["bwd"].bytes
        inside = [Case(op, "inside", dims) for op, dims in case.parts()]
        products = sum(part.cost()[0] for part in inside)
        assert products < found["fwd"].flops < 4 * products
        assert {part.op for part in inside} == set(case.ops)


def test_peers_say_what_they_take() -> None:
    everyone = all_providers()
    qk, attention, geglu = (bench_cases(op)[0] for op in ("qk_norm_rope", "attention", "geglu"))
    for name, taken in (("sdpa", [attention]), ("flex", [attention]), ("liger", [qk, attention])):
        provider = everyone[name]
        for case in (qk, attention, geglu):
            assert (provider.unfit(case, "cuda", True) is None) == (case in taken)
        assert "CUDA only" in str(provider.absent("cpu"))
    assert Flex().unfit(MASKED, "cuda", False) is None
    no_norm = Case("attention", "plain", {**CROSS.dims, "norm": 0})
    assert "with the norms" in str(Liger().unfit(no_norm, "cuda", False))


@pytest.mark.parametrize("form", list(sdpa._FORMS))
@pytest.mark.parametrize("case", [SELF, CROSS, MASKED], ids=str)
def test_every_form_of_attention_is_eagers(case: Case, form: str) -> None:
    inputs = case.inputs(requires_grad=True)
    mask = None if inputs["key_mask"] is None else inputs["key_mask"][:, None, None, :]

    def function(values: Inputs) -> Tensor:
        return sdpa._FORMS[form](*rotary(values), values["v"], mask, values["scale"])

    found = checks.run(case, function, inputs)
    for name, right in checks.run(case, case.spec.eager, inputs).items():
        torch.testing.assert_close(found[name], right, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("train", [False, True])
def test_the_fastest_kernel_is_chosen_of_those_that_take_the_case(train: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = SELF.inputs(requires_grad=train)
    asked = tuple(checks.leaves_of(SELF, inputs).values())
    found, prepared = fastest(sdpa.kernels(inputs, asked, rotary), SELF, "cpu", train, sdpa.WHAT)
    assert found in {f"{kernel}-{form}" for kernel in ("flash", "math") for form in sdpa._FORMS}
    torch.testing.assert_close(prepared.call(), SELF.spec.eager(inputs))
    if train:
        for part in training_step(prepared):
            part()
    monkeypatch.setattr(sdpa, "_BACKENDS", {"cudnn": sdpa._BACKENDS["cudnn"]})
    with pytest.raises(Unusable, match="none of scaled_dot_product_attention's kernels takes it: cudnn-one-head"):
        fastest(sdpa.kernels(inputs, asked, rotary), SELF, "cpu", train, sdpa.WHAT)


@pytest.mark.parametrize("train", [False, True])
def test_a_candidate_that_is_wrong_is_not_chosen_however_fast(train: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where only the gradients are wrong it may still be the fastest forward."""
    monkeypatch.setattr(Clock, "__call__", lambda clock, step: [float(calls.append(step) or len(calls))])
    calls: list[object] = []
    inputs = CROSS.inputs(requires_grad=train)
    leaves = tuple(checks.leaves_of(CROSS, inputs).values()) if train else ()

    def half() -> Tensor:
        right = CROSS.spec.eager(inputs)
        return 0.5 * right + 0.5 * right.detach()

    candidates = {
        "wrong": Prepared(lambda: 1.01 * CROSS.spec.eager(inputs), leaves),
        "half": Prepared(half, leaves),
        "right": Prepared(lambda: CROSS.spec.eager(inputs), leaves),
    }
    assert fastest(candidates, CROSS, "cpu", train, "these")[0] == ("right" if train else "half")
    only = {name: candidates[name] for name in ("wrong", "half")[: 2 if train else 1]}
    with pytest.raises(Unusable, match="none of these takes it: wrong: its outputs are not eager's: relative") as told:
        fastest(only, CROSS, "cpu", train, "these")
    assert ("half: its gradients are not eager's: relative error 0.5" in str(told.value)) == train


def test_the_version_names_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sdpa, "compiled_rotary", lambda: rotary)
    provider = sdpa.Sdpa()
    prepared = provider.prepare(CROSS, "cpu", False)
    torch.testing.assert_close(prepared.call(), CROSS.spec.eager(CROSS.inputs()))
    torch_version, kernel = provider.version.split()
    assert torch_version == torch.__version__ and kernel.split("-")[0] in ("flash", "math")


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("form", list(flex._FORMS))
@pytest.mark.parametrize("case", [SELF, CROSS, MASKED, RAGGED], ids=str)
def test_every_form_of_flex_attention_is_eagers(case: Case, form: str) -> None:
    inputs = case.inputs()
    attend, rows = flex._FORMS[form]
    mask = block_mask(inputs["key_mask"], rows(case.dims["N"], case.dims["H"]))
    assert (mask is None) == (inputs["key_mask"] is None)
    right = case.spec.reference(inputs)  # zeros where there is no key at all, as FlexAttention's
    torch.testing.assert_close(attend(inputs, mask), right)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_is_timed_in_every_form_and_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mask is made before, in each form's own size; the figure is the fastest one's."""
    compiled: list[tuple[str, str]] = []

    of_torch = torch.compile

    def compile_(function: Any, **how: Any) -> Any:
        if function not in (flex.grouped, flex.folded):  # FlexAttention's own, where it is not compiled
            return of_torch(function, **how)
        assert how["fullgraph"] and not how["dynamic"]
        compiled.append((function.__name__, how["mode"]))
        return function

    tried: list[dict[str, Prepared]] = []

    def choose(candidates: dict[str, Prepared], *rest: Any) -> tuple[str, Prepared]:
        tried.append(candidates)
        return fastest(candidates, *rest)

    monkeypatch.setattr(torch, "compile", compile_)
    monkeypatch.setattr(flex, "fastest", choose)
    provider = Flex()
    prepared = provider.prepare(MASKED, "cpu", False)
    modes = ("default", "max-autotune-no-cudagraphs")
    assert compiled == [(form, mode) for form in ("grouped", "folded") for mode in modes]
    torch_version, name = provider.version.split()
    assert torch_version == torch.__version__ and tried[0][name] is prepared
    assert set(tried[0]) == {f"{form}-{mode}" for form in flex._FORMS for mode in ("default", "max-autotune")}
    monkeypatch.setattr(flex, "create_block_mask", None)
    for one in tried[0].values():  # no mask is made in what is timed
        torch.testing.assert_close(one.call(), MASKED.spec.eager(MASKED.inputs()))


class _RMSNorm(torch.autograd.Function):
    """As Liger's, on the CPU: the gradient of x takes the place of the one from above."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float, casting: str, in_place: bool
    ) -> Tensor:
        assert offset == 0 and casting == "llama" and in_place
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return torch.nn.functional.rms_norm(x, x.shape[-1:], weight, eps)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        with torch.enable_grad():
            x, weight = (saved.detach().requires_grad_() for saved in ctx.saved_tensors)
            y = torch.nn.functional.rms_norm(x, x.shape[-1:], weight, ctx.eps)
            dx, dweight = torch.autograd.grad(y, (x, weight), dy)
        return dy.contiguous().copy_(dx), dweight, None, None, None, None


class _Rope(torch.autograd.Function):
    """Halves against halves, of [B, H, N, D] that lies as [B, N, H, D]: in place, forward and backward."""

    @staticmethod
    def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        turned = x * cos[:, None] + torch.cat((-second, first), -1) * sin[:, None]
        # What lies otherwise is copied first, and the copy turned.
        return x.transpose(1, 2).contiguous().copy_(turned.transpose(1, 2)).transpose(1, 2)

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        assert torch.equal(cos[..., : cos.shape[-1] // 2], cos[..., cos.shape[-1] // 2 :])
        ctx.save_for_backward(cos, sin)
        # Triton's writes are seen by no version counter.
        return tuple(_Rope.turn(x.detach(), cos, sin) for x in (q, k))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        return *(_Rope.turn(x, cos, -sin) for x in gradients), None, None


@pytest.fixture
def like_liger(monkeypatch: pytest.MonkeyPatch) -> None:
    modules: dict[str, dict[str, Any]] = {
        "liger_kernel": {},
        "liger_kernel.ops": {},
        "liger_kernel.ops.rms_norm": {"LigerRMSNormFunction": _RMSNorm},
        "liger_kernel.ops.rope": {"LigerRopeFunction": _Rope},
    }
    for name, members in modules.items():
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.usefixtures("like_liger")
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("op", ["qk_norm_rope", "attention"])
@pytest.mark.parametrize("dims", [SELF.dims, CROSS.dims], ids=["self", "cross"])
def test_ligers_order_of_channels_changes_nothing(op: str, dims: dict[str, int], train: bool) -> None:
    case = Case(op, "liger", dims)
    prepared = Liger().prepare(case, "cpu", train)
    inputs = case.inputs(requires_grad=True)
    outputs = prepared.outputs(prepared.call())
    right = checks.outputs_of(case.spec.eager(inputs))
    torch.testing.assert_close(outputs, right)
    if not train:
        return
    upstream = checks.upstream_of(right)
    leaves = checks.leaves_of(case, inputs)
    expected = torch.autograd.grad(right, list(leaves.values()), upstream)
    found = prepared.gradients(torch.autograd.grad(outputs, prepared.leaves, upstream))
    for theirs, mine in zip(expected, found, strict=True):
        torch.testing.assert_close(mine, theirs)
    Yardstick(case, "cpu", True).check(prepared)


@pytest.mark.usefixtures("like_liger")
@pytest.mark.parametrize("dims", [SELF.dims, CROSS.dims], ids=["self", "cross"])
@pytest.mark.parametrize("op", ["qk_norm_rope", "attention"])
def test_liger_may_overwrite_the_gradients_from_above(
    op: str, dims: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every repetition sends the same ones back, and putting them there is not timed."""
    prepared = Liger().prepare(Case(op, "liger", dims), "cpu", True)
    assert prepared.overwrites == (op == "qk_norm_rope")
    calls: list[tuple[list[Tensor], list[Tensor], tuple[Tensor, ...]]] = []
    grad = torch.autograd.grad

    def watched(outputs: Any, leaves: Any, upstream: list[Tensor], *rest: Any, **more: Any) -> tuple[Tensor, ...]:
        if leaves is not prepared.leaves:  # inside the norm
            return grad(outputs, leaves, upstream, *rest, **more)
        before = [gradient.clone() for gradient in upstream]
        found = grad(outputs, leaves, upstream)
        calls.append((before, [gradient.clone() for gradient in upstream], tuple(one.clone() for one in found)))
        return found

    monkeypatch.setattr(torch.autograd, "grad", watched)
    step = training_step(prepared)
    for _ in range(3):
        assert len(Clock("cpu")(step)) == 2, "forward and backward"
    overwritten = [not torch.equal(*pair) for pair in zip(calls[0][0], calls[0][1], strict=True)]
    assert all(overwritten) == any(overwritten) == prepared.overwrites
    for before, _, found in calls[1:]:
        for one, first in zip((*before, *found), (*calls[0][0], *calls[0][2]), strict=True):
            assert torch.equal(one, first)
    between = [isinstance(part, Untimed) for part in step]
    assert between == ([False, True, False] if prepared.overwrites else [False, False])
