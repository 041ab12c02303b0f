"""GEGLU beyond the common contract: every instruction set, any size, hostile numbers, what is kept."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import snapgen_kernels
from snapgen_kernels import checks
from snapgen_kernels._backend import extension
from snapgen_kernels.geglu import geglu, reference
from snapgen_kernels.testing import LAYOUTS, Case, small_cases
from tests.ops.variants import VARIANTS, built, forced

DTYPES = (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_instruction_set(variant: str) -> None:
    with forced(variant):
        # Small ones, and more tokens, channels and features than a tile, a slice and a block hold.
        large = [Case("geglu", "large", {"B": 2, "N": 301, "C": 70, "F": 77}, dtype) for dtype in DTYPES]
        for case in (*small_cases("geglu"), *large):
            checks.check_gradients(case, function=case.spec.registered)
            checks.check_repeats(case)


@given(
    batch=st.integers(0, 3),
    tokens=st.integers(0, 70),
    channels=st.integers(1, 70),
    features=st.integers(1, 70),
    bias=st.booleans(),
    keep=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
)
def test_any_shape_layout_and_dtype(
    batch: int, tokens: int, channels: int, features: int, bias: bool, keep: bool, dtype: torch.dtype, layout: str
) -> None:
    dims = {"B": batch, "N": tokens, "C": channels, "F": features, "bias": int(bias), "keep": int(keep)}
    case = Case("geglu", "drawn", dims, dtype, layout)
    checks.check_gradients(case, function=case.spec.registered)


@built
@pytest.mark.parametrize("dtype", DTYPES)
def test_deep_products_and_many_chunks(dtype: torch.dtype) -> None:
    """dx sums over more features than a slice holds, dweight over more tokens; its columns are more than a group."""
    case = Case("geglu", "deep", {"B": 1, "N": 1100, "C": 1050, "F": 530}, dtype)
    checks.check_gradients(case, function=case.spec.registered)
    checks.check_repeats(case)


@built
@pytest.mark.parametrize("dtype", DTYPES)
def test_gelu_everywhere(dtype: torch.dtype) -> None:
    """Every gate from -12 to 12: the error function, its ends, and the gradient."""
    gates = torch.linspace(-12, 12, 40001).to(dtype)
    x = gates[None, :, None].clone().requires_grad_()
    weight = torch.tensor([[0.0], [1.0]], dtype=dtype)  # the value is 1, the gate x
    bias = torch.tensor([1.0, 0.0], dtype=dtype)
    mine = geglu(x, weight, bias)
    (gradient,) = torch.autograd.grad(mine.sum(), x)
    plain_x, exact_x = x.detach().clone().requires_grad_(), x.detach().double().requires_grad_()
    plain, exact = F.gelu(plain_x), F.gelu(exact_x)
    checks.assert_close("gelu", mine, plain, exact)
    (plain_gradient,), (exact_gradient,) = (
        torch.autograd.grad(y.sum(), v) for y, v in ((plain, plain_x), (exact, exact_x))
    )
    checks.assert_close("gradient", gradient, plain_gradient, exact_gradient)
    # Far from zero it is the identity or nothing, to the last bit.
    far = gates.float() > 6
    assert torch.equal(mine[0, far, 0].float(), gates[far].float())
    assert torch.equal(mine[0, gates.float() < -6, 0].float(), torch.zeros(int((gates.float() < -6).sum())))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_inf_stay_in_their_token(value: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(2, 40, 20, dtype=dtype), torch.randn(2 * 37, 20, dtype=dtype)
    x[1, 33, 7] = value
    mine, right = geglu(x, weight), reference(x, weight)
    assert torch.equal(mine.isnan(), right.isnan()) and torch.equal(mine.isinf(), right.isinf())
    assert not mine[0].isnan().any() and mine.isfinite().all(-1).sum() == 2 * 40 - 1


@pytest.mark.parametrize("gate", [math.nan, math.inf, -math.inf])
def test_gradients_at_the_ends(gate: float) -> None:
    def gradient(function: object) -> Tensor:
        x = torch.ones(1, 3, 1, requires_grad=True)
        bias = torch.tensor([0.5, gate])
        return torch.autograd.grad(function(x, torch.ones(2, 1), bias).sum(), x)[0]  # type: ignore[operator]

    mine, right = gradient(geglu), gradient(reference)
    assert torch.equal(mine.isnan(), right.isnan()), f"{mine} {right}"


@built
def test_only_what_a_backward_needs_is_kept() -> None:
    x, weight = torch.randn(1, 5, 8), torch.randn(6, 8, requires_grad=True)
    kept: list[tuple[int, ...]] = []

    def watched() -> torch.autograd.graph.saved_tensors_hooks:
        return torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t)

    with watched():
        geglu(x, weight)
    assert (1, 5, 6) in kept, "value and gate"
    kept.clear()
    with torch.no_grad(), watched():
        geglu(x, weight)
    assert not kept
    with torch.no_grad():
        assert torch.ops.snapgen.geglu(x, weight, None, False)[1].numel() == 0


@built
def test_weights_may_change_in_place() -> None:
    x, weight = torch.randn(1, 5, 8), torch.randn(6, 8)
    first = geglu(x, weight)
    weight.mul_(2)
    second = geglu(x, weight)
    assert not torch.equal(first, second)
    torch.testing.assert_close(second, reference(x, weight))


@built
@given(
    rows=st.integers(0, 700),
    m=st.integers(1, 150),
    n=st.integers(1, 80),
    dtype=st.sampled_from(DTYPES),
)
def test_sums_of_outer_products(rows: int, m: int, n: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(rows * 7 + m)
    a, b = torch.randn(rows, m, generator=generator).to(dtype), torch.randn(rows, n + 3, generator=generator).to(dtype)
    b, out = b[:, :n], torch.full((m, n), torch.nan, dtype=dtype)
    torch.ops.snapgen_cpu.outer(a, b, out)
    checks.assert_close("outer", out, torch.mm(a.t(), b), a.double().t() @ b.double())


def test_what_the_kernels_do_not_take_is_said() -> None:
    x, weight = torch.randn(1, 4, 8), torch.randn(6, 8)
    for arguments in ((x.half(), weight.half()), (x.double(), weight.double())):
        assert torch.equal(geglu(*arguments), reference(*arguments))
        with (
            snapgen_kernels.use("fused"),
            pytest.raises(snapgen_kernels.FusedUnavailable, match=r"geglu: x has dtype"),
        ):
            geglu(*arguments)
    if extension().module is not None:
        with (
            snapgen_kernels.use("fused"),
            pytest.raises(snapgen_kernels.FusedUnavailable, match=r"geglu: weight has dtype torch.bfloat16"),
        ):
            geglu(x, weight.bfloat16())


@pytest.mark.parametrize("given", DTYPES)
@pytest.mark.parametrize("training", [False, True])
def test_autocast_runs_in_bf16(training: bool, given: torch.dtype) -> None:
    """Whatever reaches the op, the kernel takes it: fp32 weights with a bf16 x too."""
    block = snapgen_kernels.GEGLUFeedForward(12, 20)
    x = torch.randn(2, 5, 12)
    mode = "auto" if extension().module is None else "fused"
    with torch.set_grad_enabled(training), torch.autocast("cpu", torch.bfloat16), snapgen_kernels.use(mode):
        y = block(x.to(given))
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), block(x), rtol=0.05, atol=0.05)
    if training:
        y.float().square().mean().backward()
        weight = block.proj_in.weight
        assert weight.grad is not None and weight.grad.dtype == torch.float32 and weight.grad.abs().sum() > 0


@built
def test_warmup_runs_the_kernel_of_either_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that keeps h for a backward, and the one of a call without gradients."""
    from snapgen_kernels._cpu import geglu as kernels

    seen: list[bool] = []
    plain = kernels.forward

    def noted(x: Tensor, weight: Tensor, bias: Tensor | None, keep: bool) -> tuple[Tensor, Tensor]:
        seen.append(keep)
        return plain(x, weight, bias, keep)

    monkeypatch.setattr(kernels, "forward", noted)
    shapes = {"geglu": [{"B": 1, "N": 3, "C": 8, "F": 5}]}
    snapgen_kernels.warmup(shapes, dtypes=(torch.float32,), progress=False)
    assert seen == [True, False]
    snapgen_kernels.warmup(shapes, dtypes=(torch.float32,), backward=False, progress=False)
    assert seen == [True, False, False]
