"""RMSNorm + RoPE beyond the common contract: every instruction set, any size, hostile numbers, mixed dtypes."""

from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import snapgen_kernels
from snapgen_kernels import checks
from snapgen_kernels.qk_norm_rope import qk_norm_rope, reference, rope_2d
from snapgen_kernels.testing import LAYOUTS, Case, small_cases
from tests.ops.variants import VARIANTS, forced


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_instruction_set(variant: str) -> None:
    with forced(variant):
        for case in small_cases("qk_norm_rope"):
            checks.check_gradients(case, function=case.spec.registered)
            checks.check_repeats(case)


@given(
    batch=st.integers(0, 3),
    tokens=st.integers(0, 9),
    heads=st.integers(1, 5),
    dim=st.integers(1, 40),
    rope=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    layout=st.sampled_from(LAYOUTS),
)
def test_any_shape_layout_and_dtype(
    batch: int, tokens: int, heads: int, dim: int, rope: bool, dtype: torch.dtype, layout: str
) -> None:
    if rope:
        dim = max(dim // 4 * 4, 4)  # what rope_2d makes
    dims = {"B": batch, "N": tokens, "H": heads, "D": dim, "M": tokens if rope else tokens + 2, "rope": int(rope)}
    case = Case("qk_norm_rope", "drawn", dims, dtype, layout)
    if dim < 4:
        # The norm of one number is its sign: the exact gradient is (nearly) zero, what is left is noise.
        checks.check_values(case)
        return
    checks.check_gradients(case, function=case.spec.registered)


def test_rotation_of_an_even_head_that_is_no_multiple_of_four() -> None:
    q, k = torch.randn(2, 5, 3, 22), torch.randn(2, 5, 22)
    weight, angles = torch.randn(22), torch.randn(5, 11).repeat_interleave(2, dim=-1)
    arguments = (q, k, weight, weight, angles.cos(), angles.sin())
    exact = reference(*(t.double() for t in arguments))
    for mine, plain, right in zip(qk_norm_rope(*arguments), reference(*arguments), exact, strict=True):
        checks.assert_close("even head", mine, plain, right)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_and_inf_stay_in_their_row(value: float, dtype: torch.dtype) -> None:
    q, k = torch.randn(2, 6, 3, 20, dtype=dtype), torch.randn(2, 6, 20, dtype=dtype)
    q[1, 2, 1, 7] = value
    cos, sin = rope_2d(2, 3, 20)
    weight = torch.ones(20, dtype=dtype)
    mine, _ = qk_norm_rope(q, k, weight, weight, cos, sin)
    right, _ = reference(q, k, weight, weight, cos, sin)
    assert torch.equal(mine.isnan(), right.isnan()) and torch.equal(mine.isinf(), right.isinf())
    assert mine[1, 2, 1].isnan().any() and int(mine.isnan().any(-1).sum()) == 1


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_bf16_rows_take_weights_of_either_dtype(weights: torch.dtype) -> None:
    q = torch.randn(2, 6, 3, 16, dtype=torch.bfloat16, requires_grad=True)
    k = torch.randn(2, 6, 16, dtype=torch.bfloat16, requires_grad=True)
    q_weight, k_weight = (torch.randn(16, dtype=weights, requires_grad=True) for _ in range(2))
    leaves = (q, k, q_weight, k_weight)

    def gradients(function: Callable[..., tuple[Tensor, Tensor]], values: Sequence[Tensor]) -> tuple[Tensor, ...]:
        outputs = function(*values)
        return torch.autograd.grad(outputs, values, [torch.ones_like(o) for o in outputs])

    exact = gradients(reference, [t.detach().double().requires_grad_() for t in leaves])
    for mine, plain, right in zip(gradients(qk_norm_rope, leaves), gradients(reference, leaves), exact, strict=True):
        assert mine.dtype == plain.dtype
        checks.assert_close("gradient", mine, plain, right)


def test_what_the_kernels_do_not_take_is_said() -> None:
    q, k, weight = torch.randn(1, 2, 1, 8), torch.randn(1, 2, 8), torch.ones(8)
    cases = ((q.half(), k.half(), weight.half()), (q.double(), k.double(), weight.double()), (q, k, weight.double()))
    for arguments in ((*a, a[2]) for a in cases):
        for mine, right in zip(qk_norm_rope(*arguments), reference(*arguments), strict=True):
            assert torch.equal(mine, right)
        with (
            snapgen_kernels.use("fused"),
            pytest.raises(snapgen_kernels.FusedUnavailable, match=r"qk_norm_rope: (q|q_weight) has dtype"),
        ):
            qk_norm_rope(*arguments)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_many_chunks_for_any_number_of_threads(count: int) -> None:
    """More rows than two chunks hold: sums of the weights' gradients are those of one thread, bit for bit."""
    case = Case("qk_norm_rope", "chunks", {"B": 2, "N": 63, "H": 5, "D": 24, "M": 63, "rope": 1})
    checks.check_repeats(case, counts=(1, count))
    checks.check_gradients(case, function=case.spec.registered)
