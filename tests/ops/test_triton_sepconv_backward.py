"""The Triton backward of sepconv and resblock without a GPU, under Triton's interpreter, in a process of its own (see
test_triton.py). Where a test is about the backward's own kernels, PyTorch stands in for the forward's."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from snapgen_kernels import checks
from snapgen_kernels.testing import LAYOUTS, Case, Inputs
from tests.ops.inside import INSIDE, MISSING, assert_passes, inside, marks, outside

pytestmark = marks
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@outside
def test_under_the_interpreter() -> None:
    assert_passes(__file__)


def _launcher(op: str) -> Callable[..., tuple[Tensor, ...]]:
    from snapgen_kernels._triton import resblock_backward, sepconv_backward

    return {"sepconv": sepconv_backward.backward, "resblock": resblock_backward.backward}[op]


class _Backward(torch.autograd.Function):
    """The registered forward on the CPU, and the Triton launcher of its backward."""

    @staticmethod
    def forward(ctx: Any, op: str, *arguments: Any) -> Tensor:
        with torch.no_grad():
            y, *saved = getattr(torch.ops.snapgen, op)(*arguments)
        ctx.op, ctx.arguments, ctx.saved = op, arguments, saved
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        spec = Case(ctx.op, "", {}).spec.op
        needs = [ctx.needs_input_grad[1 + spec.arguments.index(name)] for name in spec.differentiable]
        found = _launcher(ctx.op)(dy, *ctx.arguments, *ctx.saved, needs)
        by_name = dict(zip(spec.differentiable, zip(needs, found, strict=True), strict=True))
        return None, *(by_name[n][1] if n in by_name and by_name[n][0] else None for n in spec.arguments)


def _function(case: Case) -> Callable[[Inputs], Tensor]:
    return lambda inputs: _Backward.apply(case.op, *case.spec.arguments(inputs))


def _gradients(case: Case, inputs: Inputs, needs: list[bool]) -> tuple[Tensor, ...]:
    arguments = [a.detach() if isinstance(a, Tensor) else a for a in case.spec.arguments(inputs)]
    y, *saved = getattr(torch.ops.snapgen, case.op)(*arguments)
    with checks.poisoned_memory():
        return _launcher(case.op)(*checks.upstream_of((y,)), *arguments, *saved, needs)


@pytest.fixture(autouse=True, scope="module")
def _right_bf16() -> None:
    if INSIDE and not MISSING:
        from tests.ops.interpreter import mend_bf16

        mend_bf16()


def _depthwise(x: Tensor, taps: Tensor, dw_bias: Tensor | None, norm: Any, stride: int, upsample: bool) -> Tensor:
    a = x.float()
    if norm is not None:
        per_group = x.shape[1] // norm.num_groups
        mean, rstd = (t.repeat_interleave(per_group, 1)[:, :, None, None] for t in norm[:2])
        weight, bias = (t.float()[:, None, None] for t in norm[2:4])
        a = F.silu((a - mean) * rstd * weight + bias)
    a = F.interpolate(a, scale_factor=2.0) if upsample else a
    bias = None if dw_bias is None else dw_bias.float()
    d = F.conv2d(a, taps.t().reshape(-1, 1, 3, 3).float(), bias, stride, 1, groups=x.shape[1])
    return d.to(x.dtype).contiguous(memory_format=torch.channels_last)


def _pointwise(d: Tensor, weight: Tensor, *, transposed: bool = False) -> Tensor:
    matrix = weight.float().flatten(1)
    y = torch.einsum("bohw,oc->bchw" if transposed else "bchw,oc->bohw", d.float(), matrix)
    return y.to(d.dtype).contiguous(memory_format=torch.channels_last)


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    from snapgen_kernels._triton import resblock_backward, sepconv_backward

    monkeypatch.setattr(sepconv_backward, "depthwise", _depthwise)
    monkeypatch.setattr(sepconv_backward, "pointwise", _pointwise)
    monkeypatch.setattr(resblock_backward, "pointwise", _pointwise)


FLAGS = {
    "plain": {},
    "bias": {"bias": 1},
    "normed": {"G": 3, "shift": 1},
    "all": {"G": 2, "bias": 1, "shift": 1, "residual": 1},
    "down": {"stride": 2, "bias": 1},
    "down-normed": {"stride": 2, "G": 3},
    "up": {"upsample": 1, "bias": 1, "shift": 1},
    "up-normed": {"upsample": 1, "G": 2},
    "up-down": {"upsample": 1, "stride": 2, "G": 2},
}
SIZES = {"small": {"B": 2, "C": 12, "O": 20, "H": 5, "W": 7}, "one-pixel": {"B": 2, "C": 6, "O": 5, "H": 1, "W": 1}}
CASES = [Case("sepconv", name, SIZES["small"] | flags) for name, flags in FLAGS.items()]
CASES += [Case("sepconv", name, SIZES["small"] | FLAGS[name], t) for name in ("all", "up") for t in FLOATS[1:]]
CASES += [Case("sepconv", "layout", SIZES["small"] | FLAGS["all"], layout=layout) for layout in LAYOUTS[1:]]
CASES += [Case("sepconv", "wide", {"B": 1, "C": 72, "O": 80, "H": 6, "W": 19, "G": 4, "shift": 1}, torch.bfloat16)]
CASES += [Case("sepconv", "one-pixel", SIZES["one-pixel"] | flags) for flags in ({"bias": 1}, {"stride": 2})]
CASES += [Case("sepconv", "one-pixel", SIZES["one-pixel"] | {"G": 2, "shift": 1, "residual": 1})]
BLOCKS = {
    "identity": {"B": 2, "C": 8, "M": 16, "O": 8, "H": 5, "W": 4, "G": 4},
    "shortcut": {"B": 2, "C": 8, "M": 24, "O": 12, "H": 3, "W": 6, "G": 2},
}
CASES += [Case("resblock", name, dims, dtype) for name, dims in BLOCKS.items() for dtype in FLOATS]
CASES += [Case("resblock", "layout", BLOCKS["shortcut"], layout=layout) for layout in LAYOUTS[1:]]


@inside
@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case}-{sorted(case.dims.items())}")
def test_gradients(case: Case) -> None:
    checks.check_gradients(case, function=_function(case), layout="strided" if case.layout == "sliced" else "same")


@inside
@pytest.mark.usefixtures("stand_ins")
def test_tuning_leaves_the_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every candidate runs twice before the fastest, here the first, gives the result."""
    from snapgen_kernels._triton import tuning

    monkeypatch.setenv("SNAPGEN_CACHE", str(tmp_path))
    case = Case("resblock", "tuned", BLOCKS["shortcut"])
    inputs = case.inputs()
    needs = [True] * len(case.spec.op.differentiable)
    launched: list[str] = []

    def timer(function: Any) -> float:
        function()
        function()
        launched.append(str(function.args[0]))
        return float(len(launched))

    tuning.forget()
    with tuning.tuning(timer):
        tuned = _gradients(case, inputs, needs)
    again = _gradients(case, inputs, needs)
    tuning.forget()
    plain = _gradients(case, inputs, needs)
    assert len(set(launched)) > 6
    for name, mine, repeated, right in zip(case.spec.op.differentiable, tuned, again, plain, strict=True):
        assert torch.equal(mine, repeated), name
        torch.testing.assert_close(mine, right, rtol=1e-4, atol=1e-4, msg=name)


@inside
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("flags", ["all", "down-normed", "up-normed", "up-down", "bias"])
def test_many_chunks_are_merged(flags: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of rows, splits of pixels, blocks of samples; a large mean; a repeat: exact and bitwise equal."""
    from snapgen_kernels._triton import depthwise_backward, group_norm_silu, sepconv_backward, tuning, weight_gradient

    monkeypatch.setattr(group_norm_silu, "MERGE_BLOCK", 2)
    monkeypatch.setattr(depthwise_backward, "MIN_ROWS", 2)
    monkeypatch.setattr(weight_gradient, "MIN_PIXELS", 16)
    monkeypatch.setattr(weight_gradient, "ADD_CONFIGS", [weight_gradient.AddConfig(2, 64, 4)] * 2)
    case = Case("sepconv", "chunks", {"B": 3, "C": 12, "O": 8, "H": 9, "W": 21} | FLAGS[flags], offset=100.0)
    inputs = case.inputs(requires_grad=True)
    function = _function(case)
    with tuning.forced("sepconv_backward", sepconv_backward.Plan(2)):
        first, again = checks.run(case, function, inputs), checks.run(case, function, inputs)
        for name, value in first.items():
            assert torch.equal(value, again[name]), name
        checks.check_gradients(case, function=function)


@inside
@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("case", [CASES[3], CASES[0], CASES[-1], Case("resblock", "i", BLOCKS["identity"])], ids=str)
def test_each_gradient_alone(case: Case) -> None:
    """Only what is asked for is there, and it is what it is among all."""
    inputs = case.inputs()
    names = case.spec.op.differentiable
    present = [isinstance(inputs[name], Tensor) for name in names]
    every = _gradients(case, inputs, present)
    for index, name in enumerate(names):
        if not present[index]:
            continue
        alone = _gradients(case, inputs, [i == index for i in range(len(names))])
        assert [g.numel() > 0 for g in alone] == [i == index for i in range(len(names))], name
        assert alone[index].stride() == torch.empty_like(inputs[name]).stride()
        torch.testing.assert_close(alone[index], every[index], rtol=1e-4, atol=1e-5, msg=name)


@inside
def test_partial_sums_inside_and_outside_of_the_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sums of dy come from the weight gradient where its splits are parts of samples, else from their own pass."""
    from snapgen_kernels._triton import common, weight_gradient

    monkeypatch.setattr(common, "precision", lambda dtype: "ieee")
    dy, d = (torch.randn(3, c, 5, 8).contiguous(memory_format=torch.channels_last) for c in (70, 20))
    exact = dy.double().sum((2, 3))
    monkeypatch.setattr(weight_gradient, "MIN_PIXELS", 16)
    counts = []
    for programs in (2, 0):
        monkeypatch.setattr(weight_gradient, "MAX_PROGRAMS", programs)
        parts = weight_gradient.weight_parts(dy, d, True)
        assert parts.weight is not None and parts.sums is not None
        counts.append(parts.weight.shape[0])
        torch.testing.assert_close(parts.sums.view(3, -1, 70).sum(1), exact.float())
        product = torch.einsum("bohw,bchw->oc", dy.double(), d.double()).float()
        torch.testing.assert_close(parts.weight.sum(0), product)
    assert counts[0] >= 3 > counts[1] == 1


@inside
@pytest.mark.parametrize("op", ["sepconv", "resblock"])
@pytest.mark.parametrize("size", [{"B": 0}, {"H": 0}])
def test_empty(op: str, size: dict[str, int]) -> None:
    dims = (BLOCKS["shortcut"] if op == "resblock" else SIZES["small"] | FLAGS["all"]) | size
    case = Case(op, "empty", dims)
    inputs = case.inputs()
    names = case.spec.op.differentiable
    if "H" in size:  # a convolution of nothing is an error, the launcher's own answer is not
        arguments, dy = case.spec.arguments(inputs), inputs["x"].new_empty(2, dims["O"], 0, dims["W"])
        saved = [torch.empty(0)] * case.spec.op.saved
        found = _launcher(op)(dy, *arguments, *saved, [True] * len(names))
    else:
        found = _gradients(case, inputs, [True] * len(names))
    for name, gradient in zip(names, found, strict=True):
        assert gradient.shape == inputs[name].shape and not gradient.any(), name


@inside
@pytest.mark.usefixtures("stand_ins")
@settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batch=st.integers(1, 2),
    channels=st.sampled_from([2, 6, 34]),
    outputs=st.sampled_from([1, 5, 33]),
    height=st.integers(1, 6),
    width=st.integers(1, 9),
    flags=st.sampled_from(sorted(FLAGS)),
    dtype=st.sampled_from(FLOATS),
    layout=st.sampled_from(LAYOUTS),
)
def test_any_sepconv(
    batch: int, channels: int, outputs: int, height: int, width: int, flags: str, dtype: torch.dtype, layout: str
) -> None:
    dims = {"B": batch, "C": channels, "O": outputs, "H": height, "W": width} | FLAGS[flags]
    groups = 2 if "G" in dims and channels // 2 * height * width > 2 else 0
    dims = {name: value for name, value in dims.items() if name != "G"} | ({"G": groups} if groups else {})
    case = replace(Case("sepconv", "drawn", dims, dtype), layout=layout)
    checks.check_gradients(case, function=_function(case), layout="strided")
