"""The residual block beyond the common contract: shortcuts, saved tensors, every instruction set, threads, strides."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import snapgen_kernels
from snapgen_kernels import checks
from snapgen_kernels.testing import LAYOUTS, Case, small_cases
from tests.ops.variants import on_each_variant

BOTH = (torch.float32, torch.bfloat16)


@given(
    batch=st.integers(0, 3),
    groups=st.sampled_from([1, 2, 3]),
    inputs=st.integers(1, 9),
    middle=st.integers(1, 12),
    outputs=st.integers(1, 33),
    same=st.booleans(),
    height=st.integers(1, 11),
    width=st.integers(1, 11),
    dtype=st.sampled_from(BOTH),
    layout=st.sampled_from(LAYOUTS),
)
def test_any_shape_layout_and_dtype(
    batch: int,
    groups: int,
    inputs: int,
    middle: int,
    outputs: int,
    same: bool,
    height: int,
    width: int,
    dtype: torch.dtype,
    layout: str,
) -> None:
    channels = groups * inputs
    sizes = {"B": batch, "C": channels, "M": groups * middle, "O": channels if same else outputs, "G": groups}
    case = Case("resblock", "drawn", {**sizes, "H": height, "W": width}, dtype, layout)
    with checks.poisoned_memory():
        checks.check_values(case, function=case.spec.registered)


CUTS = {
    "wider": {"B": 2, "C": 48, "M": 96, "O": 72, "H": 33, "W": 35, "G": 8},
    "same": {"B": 1, "C": 40, "M": 80, "O": 40, "H": 67, "W": 71, "G": 8},
    "tiles": {"B": 1, "C": 600, "M": 1040, "O": 600, "H": 4, "W": 70, "G": 8},
    "samples": {"B": 9, "C": 24, "M": 48, "O": 32, "H": 4, "W": 4, "G": 8},
}


@pytest.mark.parametrize("dtype", BOTH, ids=str)
@pytest.mark.parametrize("name", CUTS)
def test_cuts_of_the_image(name: str, dtype: torch.dtype) -> None:
    case = Case("resblock", name, CUTS[name], dtype)
    with checks.poisoned_memory():
        checks.check_values(case, function=case.spec.registered)
    inputs = case.inputs()
    results = []
    for count in (1, 2, 5):
        with checks.threads(count):
            results.append(torch.ops.snapgen.resblock(*case.spec.arguments(inputs)))
    for other in results[1:]:
        for first, value in zip(results[0], other, strict=True):
            assert "cpu" not in case.spec.kernels() or torch.equal(first, value)


@on_each_variant
def test_every_instruction_set() -> None:
    for case in small_cases("resblock"):
        checks.check_values(case, function=case.spec.registered)
    for dtype in BOTH:
        for name in ("wider", "same", "samples"):
            case = Case("resblock", name, CUTS[name], dtype)
            checks.check_values(case, function=case.spec.registered)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", BOTH, ids=str)
def test_saved_tensors(layout: str, dtype: torch.dtype) -> None:
    """h is the first half's output; the statistics are those of x, and of h as it is stored."""
    case = Case("resblock", "saved", {"B": 2, "C": 12, "M": 36, "O": 20, "H": 19, "W": 17, "G": 3}, dtype, layout)
    inputs = case.inputs()
    _, h, *statistics = torch.ops.snapgen.resblock(*case.spec.arguments(inputs))
    names = ("norm1_weight", "norm1_bias", "shift")
    half = (inputs["x"], inputs["dw1_weight"], inputs["pw1_weight"], None, None, *(inputs[n] for n in names), None)
    first = torch.ops.snapgen.sepconv(*half, 3, 1e-5, 1, False)[0]
    assert torch.equal(h, first) and h.is_contiguous(memory_format=torch.channels_last)
    expected = []
    for image in (inputs["x"], h):
        groups = image.double().reshape(2, 3, -1)
        expected += [groups.mean(-1), (groups.var(-1, correction=0) + 1e-5).rsqrt()]
    for found, right in zip(statistics, expected, strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), right, rtol=1e-6, atol=1e-6)


def test_statistics_of_a_middle_tensor_far_from_zero() -> None:
    """A shift of 1000: sums of plain squares would lose every digit of the variance."""
    case = Case("resblock", "shifted", {"B": 1, "C": 16, "M": 32, "O": 16, "H": 23, "W": 21, "G": 4})
    inputs = case.inputs()
    inputs["shift"] = inputs["shift"] + 1000.0
    exact = case.spec.reference(checks.in_double(inputs))
    checks.assert_close("shifted", case.spec.registered(inputs), case.spec.eager(inputs), exact)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", BOTH, ids=str)
def test_nan_and_inf_reach_the_output(value: float, dtype: torch.dtype) -> None:
    case = Case("resblock", "nan", {"B": 2, "C": 8, "M": 16, "O": 8, "H": 5, "W": 6, "G": 2}, dtype)
    inputs = case.inputs()
    inputs["x"][1, 3, 1, 2] = value
    y = case.spec.registered(inputs)
    assert y[0].isfinite().all() and y[1].isnan().all()


def test_norms_that_differ_go_to_pytorch() -> None:
    case = Case("resblock", "norms", {"B": 1, "C": 8, "M": 16, "O": 8, "H": 3, "W": 4, "G": 4})
    i = case.inputs()
    norm1 = snapgen_kernels.Norm(4, i["norm1_weight"], i["norm1_bias"], 1e-5)
    norm2 = snapgen_kernels.Norm(2, i["norm2_weight"], i["norm2_bias"], 1e-6)
    weights = (norm1, i["dw1_weight"], i["pw1_weight"], norm2, i["dw2_weight"], i["pw2_weight"])
    assert snapgen_kernels.resblock(i["x"], i["shift"], *weights).shape == i["x"].shape
    with snapgen_kernels.use("fused"), pytest.raises(snapgen_kernels.FusedUnavailable, match="norm1 and norm2 differ"):
        snapgen_kernels.resblock(i["x"], i["shift"], *weights)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_what_the_kernels_do_not_take(dtype: torch.dtype) -> None:
    case = Case("resblock", "dtype", {"B": 1, "C": 4, "M": 8, "O": 4, "H": 3, "W": 3, "G": 2}, dtype)
    inputs = case.inputs()
    assert case.spec.public(inputs).dtype == dtype
    with (
        snapgen_kernels.use("fused"),
        pytest.raises(snapgen_kernels.FusedUnavailable, match="on cpu; the kernels take"),
    ):
        case.spec.public(inputs)
