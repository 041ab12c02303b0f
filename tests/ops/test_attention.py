"""Multi-query attention beyond the common contract: every instruction set, any size, masks, hostile numbers."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import snapgen_kernels
from snapgen_kernels import checks
from snapgen_kernels.attention import _composed, _reference_with_statistics, attention, reference
from snapgen_kernels.qk_norm_rope import reference as qk_norm_rope_reference
from snapgen_kernels.qk_norm_rope import rope_2d
from snapgen_kernels.testing import LAYOUTS, Case, small_cases
from tests.ops.variants import VARIANTS, built, forced

DTYPES = [torch.float32, torch.bfloat16]

# More than one block of keys and of queries, in both passes, and none of them full.
RAGGED = {"B": 2, "N": 150, "H": 3, "D": 24, "M": 301}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_instruction_set(variant: str) -> None:
    with forced(variant):
        for case in small_cases("attention"):
            checks.check_gradients(case, function=case.spec.registered)
            checks.check_repeats(case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_several_blocks_in_every_instruction_set(variant: str, dtype: torch.dtype) -> None:
    with forced(variant):
        for extra in ({}, {"mask": 1}, {"D": 64, "M": 150, "rope": 1}, {"norm": 0, "D": 40}):
            checks.check_gradients(Case("attention", "ragged", {**RAGGED, **extra}, dtype))


@given(
    batch=st.integers(0, 3),
    tokens=st.integers(0, 40),
    heads=st.integers(1, 5),
    dim=st.integers(1, 70),
    keys=st.integers(0, 80),
    kind=st.sampled_from(["rope", "norm", "mask", "plain"]),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
)
def test_any_shape_layout_and_dtype(
    batch: int, tokens: int, heads: int, dim: int, keys: int, kind: str, dtype: torch.dtype, layout: str
) -> None:
    if kind == "rope":
        dim, keys = max(dim // 4 * 4, 4), tokens  # what rope_2d makes
    dims = {"B": batch, "N": tokens, "H": heads, "D": dim, "M": keys}
    dims |= {"rope": int(kind == "rope"), "norm": int(kind != "plain"), "mask": int(kind == "mask")}
    case = Case("attention", "drawn", dims, dtype, layout)
    if keys < 3 or (kind != "plain" and dim < 4):
        # The norm of one number is its sign, and one key takes all: the exact gradients are (nearly) zero.
        checks.check_values(case, function=case.spec.registered)
        return
    checks.check_gradients(case, function=case.spec.registered)


@pytest.mark.parametrize("count", [2, 5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_share_the_work_without_a_trace(count: int, dtype: torch.dtype) -> None:
    """More rows than a chunk of the backward pass holds."""
    case = Case("attention", "chunks", {"B": 1, "N": 450, "H": 5, "D": 16, "M": 450, "rope": 1}, dtype)
    checks.check_repeats(case, counts=(1, count))
    checks.check_gradients(case)


def _inputs(dtype: torch.dtype = torch.float32, keys: int = 70, tokens: int = 9) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = ((2, tokens, 3, 16), (2, keys, 16), (2, keys, 16))
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("scale", [0.0, 1e-3, 40.0, -0.25, -40.0, 1000.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_scales_of_any_size_and_sign(scale: float, dtype: torch.dtype, normed: bool) -> None:
    """Small scores take the path without a running maximum, large ones the other; both run over several key blocks."""
    q, k, v = _inputs(dtype, keys=600, tokens=90)
    ones = torch.ones(16, dtype=dtype) if normed else None
    exact = reference(
        q.double(), k.double(), v.double(), None, *(2 * (None if ones is None else ones.double(),)), scale=scale
    )
    normal = (q, k) if ones is None else qk_norm_rope_reference(q, k, ones, ones)
    mine = attention(q, k, v, scale=scale, q_weight=ones, k_weight=ones)
    checks.assert_close("scale", mine, _composed(*normal, v, None, scale), exact)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_where_scores_are_large(dtype: torch.dtype) -> None:
    leaves = [t.requires_grad_() for t in _inputs(dtype, keys=600, tokens=90)]
    wide = [t.detach().double().requires_grad_() for t in leaves]

    def gradients(o: Tensor, values: list[Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(o, values, torch.ones_like(o).cumsum(-1) / 16)

    mine_all = gradients(attention(*leaves, scale=8.0), leaves)
    plain_all = gradients(_composed(*leaves, None, 8.0), leaves)
    exact = gradients(reference(*wide, scale=8.0), wide)
    for mine, plain, right in zip(mine_all, plain_all, exact, strict=True):
        checks.assert_close("gradient", mine, plain, right)


@built
@pytest.mark.parametrize("where", ["q", "k", "v"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_inf_go_where_the_reference_sends_them(where: str, value: float, dtype: torch.dtype) -> None:
    q, k, v = _inputs(dtype)
    {"q": q[1, 4, 1], "k": k[1, 40], "v": v[1, 40]}[where][5] = value
    mine, right = (
        attention(q, k, v),
        reference(q.float(), k.float(), v.float()),
    )  # in bf16 oneDNN spreads NaN to a neighbour
    assert torch.equal(mine.isnan(), right.isnan()) and torch.equal(mine.isinf(), right.isinf())
    assert not mine.isfinite().all() and mine[0].isfinite().all()


@built
@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_keys_are_not_read(dtype: torch.dtype) -> None:
    """The result is that of the allowed keys alone, wherever they stand, whatever the others hold."""
    q, k, v = (t.requires_grad_() for t in _inputs(dtype))
    mask = torch.rand(2, 70, generator=torch.Generator().manual_seed(5)) < 0.4
    mask[1] = False
    o = attention(q, k, v, key_mask=mask)
    grads = torch.autograd.grad(o, (q, k, v), torch.ones_like(o))
    alone = attention(q[:1], k[:1, mask[0]], v[:1, mask[0]])
    assert torch.equal(o[:1], alone) and not o[1].any()
    for grad in grads:
        assert not grad[1].any()
    for grad, right in zip(grads, torch.autograd.grad(alone, (q, k, v), torch.ones_like(alone)), strict=True):
        assert torch.equal(grad[0], right[0])
    with torch.no_grad():
        k[~mask], v[~mask] = float("nan"), float("inf")
    assert torch.equal(attention(q, k, v, key_mask=mask), o)


@pytest.mark.parametrize("mask", [False, True])
def test_saved_logsumexp(mask: bool) -> None:
    """Of whichever kernel serves the op, and of the default implementation."""
    dims = {"B": 3, "N": 7, "H": 2, "D": 8, "M": 300, "mask": int(mask)}
    case = Case("attention", "statistics", dims)
    inputs = case.inputs()
    exact = _reference_with_statistics(*case.spec.arguments(checks.in_double(inputs)))[1]
    registered = torch.ops.snapgen.attention(*case.spec.arguments(inputs))
    for found in (registered, _reference_with_statistics(*case.spec.arguments(inputs))):
        torch.testing.assert_close(found[1].double(), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("weights", DTYPES)
def test_bf16_rows_take_weights_of_either_dtype(weights: torch.dtype) -> None:
    q, k, v = _inputs(torch.bfloat16)
    leaves = [t.requires_grad_() for t in (q, k, v, *(torch.rand(2, 16) + 0.5).to(weights).unbind())]

    def gradients(function: object, values: list[Tensor]) -> tuple[Tensor, ...]:
        q, k, v, q_weight, k_weight = values
        o = function(q, k, v, q_weight=q_weight, k_weight=k_weight)  # type: ignore[operator]
        return torch.autograd.grad(o, values, torch.ones_like(o).cumsum(-1) / 16)

    exact = gradients(reference, [t.detach().double().requires_grad_() for t in leaves])
    for mine, plain, right in zip(gradients(attention, leaves), gradients(reference, leaves), exact, strict=True):
        assert mine.dtype == plain.dtype
        checks.assert_close("gradient", mine, plain, right)


def test_what_the_kernels_do_not_take_is_said() -> None:
    q, k, v = _inputs()
    cos, sin = rope_2d(3, 3, 16)
    for cast in (torch.float16, torch.float64):
        arguments = [t.to(cast) for t in (q, k[:, :9], v[:, :9])]
        right = reference(*(t.double() for t in arguments), cos=cos, sin=sin).to(cast)
        atol = 1e-3 if cast == torch.float16 else 1e-12
        torch.testing.assert_close(attention(*arguments, cos=cos, sin=sin), right, atol=atol, rtol=atol)
        with (
            snapgen_kernels.use("fused"),
            pytest.raises(snapgen_kernels.FusedUnavailable, match="attention: q has dtype"),
        ):
            attention(*arguments, cos=cos, sin=sin)


@pytest.mark.parametrize("shape", [(0, 4, 2, 5), (2, 0, 2, 5), (2, 4, 0, 5), (2, 4, 2, 0)])
def test_empty(shape: tuple[int, int, int, int]) -> None:
    batch, tokens, heads, keys = shape
    leaves = [
        torch.randn(s, requires_grad=True) for s in ((batch, tokens, heads, 8), (batch, keys, 8), (batch, keys, 8))
    ]
    o = attention(*leaves)
    grads = torch.autograd.grad(o, leaves, torch.ones_like(o))
    for grad, leaf in zip(grads, leaves, strict=True):
        assert grad.shape == leaf.shape and grad.isfinite().all()
        if 0 in shape:
            assert not grad.any()
    assert o.shape == (batch, tokens, heads, 8) and not o.any()


def test_a_mask_elsewhere_is_refused() -> None:
    q, k, v = _inputs(torch.float32)
    mask = torch.ones(k.shape[:2], dtype=torch.bool, device="meta")
    with pytest.raises(ValueError, match="key_mask is on device meta; the first input is on cpu"):
        attention(q, k, v, key_mask=mask)


@built
def test_autocast_settles_the_dtypes_before_they_are_compared() -> None:
    """What a rotation left in fp32 goes with values in bf16; weights in fp16 go with neither."""
    q, k, v = _inputs(torch.float32)
    weights = torch.ones(2, q.shape[-1])
    with torch.autocast("cpu", torch.bfloat16), snapgen_kernels.use("fused"):
        o = attention(q, k, v.bfloat16(), q_weight=weights[0], k_weight=weights[1])
        assert torch.equal(
            o, attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), q_weight=weights[0], k_weight=weights[1])
        )
        with pytest.raises(snapgen_kernels.FusedUnavailable, match="q_weight has dtype"):
            attention(q, k, v, q_weight=weights[0].half(), k_weight=weights[1].half())
