"""Packed operands and products with them, on every instruction set that this machine has."""

import gc
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from snapgen_kernels import _backend

C = _backend.extension().module
pytestmark = pytest.mark.skipif(C is None, reason="the C++ extension is not built")
VARIANTS = [name for name, usable in C.variants().items() if usable] if C is not None else []


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> Iterator[str]:
    C.force_variant(request.param)
    yield request.param
    C.force_variant(None)


def _product(a: Tensor, b: Tensor) -> Tensor:
    out = torch.full((a.shape[0], b.shape[1]), float("nan"), dtype=a.dtype)
    torch.ops.snapgen_cpu.product(a, torch.ops.snapgen_cpu.pack(b), out)
    return out


def _assert_right(mine: Tensor, a: Tensor, b: Tensor) -> None:
    """A sum of K products in fp32 is off by at most K ulp of the sum of magnitudes; then one rounding to the dtype."""
    exact, magnitude = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    bound = magnitude * (a.shape[1] * 2.0**-23) + exact.abs() * torch.finfo(a.dtype).eps
    assert ((mine.double() - exact).abs() <= bound).all()


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_product_of_any_size_and_stride(data: st.DataObject) -> None:
    rows, depth, columns = (data.draw(st.integers(0, 70)) for _ in range(3))
    dtype = data.draw(st.sampled_from((torch.float32, torch.bfloat16)))
    C.force_variant(data.draw(st.sampled_from(VARIANTS)))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))

    def matrix(m: int, n: int) -> Tensor:
        layout = data.draw(st.sampled_from(("plain", "transposed", "sliced")))
        if layout == "transposed":
            return torch.randn(n, m, generator=generator).to(dtype).t()
        return (
            torch.randn(m, 2 * n, generator=generator).to(dtype)[:, ::2]
            if layout == "sliced"
            else torch.randn(m, n, generator=generator).to(dtype)
        )

    try:
        a, b = matrix(rows, depth), matrix(depth, columns)
        _assert_right(_product(a, b), a, b)
    finally:
        C.force_variant(None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_sums(variant: str, dtype: torch.dtype) -> None:
    a, b = torch.randn(45, 2100).to(dtype), torch.randn(2100, 40).to(dtype)
    _assert_right(_product(a, b), a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_and_infinity_stay_in_their_rows_and_columns(variant: str, dtype: torch.dtype) -> None:
    a, b = torch.randn(40, 35).to(dtype), torch.randn(35, 50).to(dtype)
    plain = _product(a, b)
    a[3, 34], b[7, 49] = float("nan"), float("inf")
    mine = _product(a, b)
    assert mine[3].isnan().all()
    rest = [i for i in range(40) if i != 3]
    assert mine[rest, 49].isinf().all()
    assert torch.equal(mine[rest, :49], plain[rest, :49])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_do_not_depend_on_their_neighbours(variant: str, dtype: torch.dtype) -> None:
    """What lets threads share the rows in any way: a row's result is bitwise the same alone and among others."""
    a, b = torch.randn(67, 1500).to(dtype), torch.randn(1500, 33).to(dtype)
    whole = _product(a, b)
    for first, last in ((0, 1), (5, 22), (14, 67)):
        assert torch.equal(_product(a[first:last], b), whole[first:last])


def test_packs_follow_their_weight() -> None:
    from snapgen_kernels._cpu import _packs, packed

    weight = torch.nn.Parameter(torch.randn(40, 24, 1, 1))
    before = len(_packs)
    pack = packed(weight, "b")
    assert packed(weight, "b") is pack
    assert len(_packs) == before + 1
    with torch.no_grad():
        weight.mul_(2)
    doubled = packed(weight, "b")
    torch.testing.assert_close(doubled.float(), 2 * pack.float())
    weight.data.mul_(0.5)  # passes the version counter by
    assert torch.equal(packed(weight, "b"), pack)
    other = packed(weight, "bt")
    assert len(_packs) == before + 2
    x = torch.randn(5, 40)
    out = torch.empty(5, 24)
    torch.ops.snapgen_cpu.product(x, other, out)
    _assert_right(out.detach(), x, weight.detach().flatten(1))
    del weight
    gc.collect()
    assert len(_packs) == before


def test_a_pack_of_another_set_or_size_is_refused() -> None:
    pack = torch.ops.snapgen_cpu.pack(torch.randn(8, 200))
    with pytest.raises(RuntimeError, match="packed is not of this size"):
        torch.ops.snapgen_cpu.product(torch.randn(3, 9), pack, torch.empty(3, 200))
