"""The benchmark of the transformer's ops on a GPU, without one: what is run, and that its peers compute the same."""

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import blocks, cases, goals, limits
from bench.providers import Unusable, all_providers, liger, sdpa
from bench.providers.flex import Flex, attend
from bench.providers.liger import Liger
from bench.timing import training_step
from snapgen_kernels import checks
from snapgen_kernels.testing import SPECS, Case, Inputs, bench_cases
from tests.test_bench_cuda import run

SELF = Case("attention", "self", {"B": 2, "N": 12, "H": 3, "D": 16, "M": 12, "rope": 1})
CROSS = Case("attention", "cross", {"B": 2, "N": 7, "H": 2, "D": 8, "M": 5})
MASKED = Case("attention", "masked", {"B": 1, "N": 5, "H": 2, "D": 8, "M": 11, "mask": 1})
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
    assert "without masks" in str(Flex().unfit(MASKED, "cuda", False))
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
    found, prepared = sdpa.fastest(inputs, asked, "cpu", train, rotary)
    assert found in {f"{kernel}-{form}" for kernel in ("flash", "math") for form in sdpa._FORMS}
    torch.testing.assert_close(prepared.call(), SELF.spec.eager(inputs))
    if train:
        for part in training_step(prepared):
            part()
    monkeypatch.setattr(sdpa, "_BACKENDS", {"cudnn": sdpa._BACKENDS["cudnn"]})
    with pytest.raises(Unusable, match="none of scaled_dot_product_attention's kernels takes it: cudnn-one-head"):
        sdpa.fastest(inputs, asked, "cpu", train, rotary)


def test_the_version_names_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sdpa, "compiled_rotary", lambda: rotary)
    provider = sdpa.Sdpa()
    prepared = provider.prepare(CROSS, "cpu", False)
    torch.testing.assert_close(prepared.call(), CROSS.spec.eager(CROSS.inputs()))
    torch_version, kernel = provider.version.split()
    assert torch_version == torch.__version__ and kernel.split("-")[0] in ("flash", "math")


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("case", [SELF, CROSS], ids=str)
def test_flex_attention_is_eagers(case: Case) -> None:
    inputs = case.inputs()
    torch.testing.assert_close(attend(inputs), case.spec.eager(inputs))


class _RMSNorm:
    """As Liger's, on the CPU."""

    @staticmethod
    def apply(x: Tensor, weight: Tensor, eps: float, offset: float, casting: str, in_place: bool) -> Tensor:
        assert offset == 0 and casting == "llama" and not in_place
        return torch.nn.functional.rms_norm(x, x.shape[-1:], weight, eps)


class _Rope:
    @staticmethod
    def apply(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        """Halves against halves, of [B, H, N, D]; newer releases return the tables too."""

        def turn(x: Tensor) -> Tensor:
            first, second = x.chunk(2, -1)
            return x * cos[:, None] + torch.cat((-second, first), -1) * sin[:, None]

        assert torch.equal(cos[..., : cos.shape[-1] // 2], cos[..., cos.shape[-1] // 2 :])
        return turn(q), turn(k), cos, sin


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
    found = torch.autograd.grad(outputs, prepared.leaves, upstream)
    for name, theirs, mine in zip(leaves, expected, found, strict=True):
        torch.testing.assert_close(mine if name == "v" else liger._neighbours(mine), theirs)
