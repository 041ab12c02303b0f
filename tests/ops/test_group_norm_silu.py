"""GroupNorm + SiLU beyond the common contract: hostile numbers, hostile shapes, every instruction set, frozen
inputs."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import snapgen_kernels
from snapgen_kernels import checks
from snapgen_kernels._backend import extension
from snapgen_kernels.group_norm_silu import GroupNormSiLU, _reference_with_statistics, group_norm_silu, reference
from snapgen_kernels.testing import LAYOUTS, Case, small_cases
from tests.ops.variants import VARIANTS, forced


@given(
    batch=st.integers(0, 3),
    groups=st.sampled_from([1, 2, 3, 5]),
    per_group=st.integers(1, 9),
    height=st.integers(1, 13),
    width=st.integers(1, 13),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    layout=st.sampled_from(LAYOUTS),
    offset=st.sampled_from([0.0, 3.0]),
)
def test_any_shape_layout_and_dtype(
    batch: int, groups: int, per_group: int, height: int, width: int, dtype: torch.dtype, layout: str, offset: float
) -> None:
    dims = {"B": batch, "C": groups * per_group, "H": height, "W": width, "G": groups}
    case = Case("group_norm_silu", "drawn", dims, dtype, layout, offset=offset)
    if per_group * height * width <= 2:
        # Normalising one or two values leaves no freedom: the exact gradient of x is (nearly) zero, what is left is
        # noise.
        checks.check_values(case)
        return
    checks.check_gradients(case, function=case.spec.registered)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fp64_is_the_reference_to_fp64_rounding(layout: str) -> None:
    dims = {"B": 2, "C": 12, "H": 9, "W": 7, "G": 3}
    case = Case("group_norm_silu", "double", dims, torch.float64, layout, offset=5.0)
    inputs = case.inputs(requires_grad=True)
    mine, right = checks.run(case, case.spec.registered, inputs), checks.run(case, case.spec.reference, inputs)
    for name, value in right.items():
        torch.testing.assert_close(mine[name], value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_instruction_set(variant: str) -> None:
    module = extension().module
    if module is not None and not module.variants()[variant]:
        with pytest.raises(RuntimeError, match=variant):
            module.force_variant(variant)
    with forced(variant):
        for case in small_cases("group_norm_silu"):
            checks.check_gradients(case)
            checks.check_repeats(case)


def test_unknown_instruction_set_is_named() -> None:
    module = extension().module
    if module is None:
        pytest.skip("the C++ extension is not built")
    with pytest.raises(ValueError, match="mmx"):
        module.force_variant("mmx")


@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_large_mean_loses_no_accuracy(layout: str) -> None:
    """Mean 1000, deviation 1, many chunks: a one-pass variance would be wrong by 10%; ours errs as PyTorch's
    two-pass."""
    case = Case("group_norm_silu", "mean", {"B": 1, "C": 64, "H": 61, "W": 53, "G": 4}, layout=layout, offset=1000.0)
    inputs = case.inputs()
    exact = reference(**checks.in_double(inputs))
    plain = case.spec.eager({**inputs, "x": inputs["x"].contiguous()})
    mine = case.spec.registered(inputs)
    if "cpu" in case.spec.kernels():
        checks.assert_close("large mean", mine, plain, exact)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_saved_statistics(layout: str) -> None:
    """mean and rstd, of whichever kernel serves the op and of the default implementation."""
    dims = {"B": 2, "C": 12, "H": 9, "W": 7, "G": 3}
    case = Case("group_norm_silu", "statistics", dims, layout=layout, offset=2.0)
    inputs = case.inputs()
    groups = inputs["x"].double().reshape(2, 3, -1)
    mean, rstd = groups.mean(-1), (groups.var(-1, correction=0) + inputs["eps"]).rsqrt()
    registered = torch.ops.snapgen.group_norm_silu(*case.spec.arguments(inputs))
    for found in (registered, _reference_with_statistics(*case.spec.arguments(inputs))):
        torch.testing.assert_close(found[1].double(), mean, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(found[2].double(), rstd, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_and_inf_reach_the_output(value: float, layout: str, dtype: torch.dtype) -> None:
    case = Case("group_norm_silu", "nan", {"B": 2, "C": 32, "H": 3, "W": 5, "G": 2}, dtype, layout=layout)
    inputs = case.inputs()
    inputs["x"][1, 3, 1, 2] = value
    y = case.spec.public(inputs)
    assert y[1, :16].isnan().all() and not y[0].isnan().any() and not y[1, 16:].isnan().any()


@pytest.mark.parametrize("scale", [1e-20, 1e15, 60.0])
def test_extreme_scales(scale: float) -> None:
    """Deep in both tails of SiLU, and where the variance is near the ends of fp32."""
    x = torch.randn(2, 16, 7, 9) * (scale if scale != 60.0 else 1)
    weight = torch.full((16,), 60.0 if scale == 60.0 else 1.0)
    bias = torch.zeros(16)
    exact = reference(x.double(), 4, weight.double(), bias.double())
    checks.assert_close("extreme", group_norm_silu(x, 4, weight, bias), reference(x, 4, weight, bias), exact)


@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16])
def test_bf16_input_takes_parameters_of_either_dtype(parameters: torch.dtype) -> None:
    x = torch.randn(2, 12, 5, 4, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(12, dtype=parameters, requires_grad=True)
    bias = torch.randn(12, dtype=parameters, requires_grad=True)
    y = group_norm_silu(x, 3, weight, bias)
    grads = torch.autograd.grad(y, (x, weight, bias), torch.ones_like(y))
    wide = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    exact = reference(wide[0], 3, wide[1], wide[2])
    right = torch.autograd.grad(exact, wide, torch.ones_like(exact))
    for mine, expected, argument in zip(grads, right, (x, weight, bias), strict=True):
        assert mine.dtype == argument.dtype
        checks.assert_close("gradient", mine, expected.to(argument.dtype), expected)


@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
@pytest.mark.parametrize("mode", ["auto", "reference"])
def test_frozen_input_still_gives_parameter_gradients(layout: str, mode: str) -> None:
    case = Case("group_norm_silu", "frozen", {"B": 2, "C": 12, "H": 5, "W": 7, "G": 3}, layout=layout)
    inputs = case.inputs(requires_grad=True)
    full = checks.run(case, case.spec.public, inputs)
    frozen = {**inputs, "x": inputs["x"].detach()}
    with snapgen_kernels.use(mode):
        y = case.spec.public(frozen)
    weight, bias = torch.autograd.grad(y, (frozen["weight"], frozen["bias"]), checks.upstream_of((y,)))
    torch.testing.assert_close(weight, full["gradient of weight"])
    torch.testing.assert_close(bias, full["gradient of bias"])
    assert y.stride() == inputs["x"].stride()


@pytest.mark.parametrize("shape", [(0, 8, 3, 3), (2, 8, 0, 3), (2, 8, 3, 0)])
def test_empty(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, requires_grad=True)
    weight, bias = torch.ones(8, requires_grad=True), torch.zeros(8, requires_grad=True)
    y = torch.ops.snapgen.group_norm_silu(x, 2, weight, bias, 1e-5)[0]
    grads = torch.autograd.grad(y, (x, weight, bias), torch.ones_like(y))
    assert y.shape == shape and grads[0].shape == shape
    assert not grads[1].any() and not grads[2].any()


@pytest.mark.skipif(extension().module is None, reason="the C++ extension is not built; PyTorch does not promise this")
def test_batch_of_one_is_the_batch() -> None:
    x = torch.randn(5, 24, 6, 7).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(24), torch.randn(24)
    together = group_norm_silu(x, 4, weight, bias)
    for index in range(5):
        assert torch.equal(together[index], group_norm_silu(x[index : index + 1], 4, weight, bias)[0])


def test_module_is_a_group_norm_with_silu() -> None:
    mine, plain = GroupNormSiLU(4, 16), torch.nn.GroupNorm(4, 16)
    plain.load_state_dict(mine.state_dict())
    x = torch.randn(2, 16, 4, 4)
    torch.testing.assert_close(mine(x), torch.nn.functional.silu(plain(x)))


def test_third_derivative_goes_through_the_reference() -> None:
    def third(function: object) -> Tensor:
        torch.manual_seed(3)
        x = torch.randn(1, 4, 2, 3, dtype=torch.float64, requires_grad=True)
        weight, bias = torch.randn(4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
        value = function(x, 2, weight, bias, 1e-5).pow(2).sum()  # type: ignore[operator]
        for _ in range(2):
            (grad,) = torch.autograd.grad(value, x, create_graph=True)
            value = grad.pow(2).sum()
        return torch.autograd.grad(value, x)[0]

    torch.testing.assert_close(third(lambda *a: torch.ops.snapgen.group_norm_silu(*a)[0]), third(reference))
