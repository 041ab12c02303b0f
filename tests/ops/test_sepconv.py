"""The separable convolution beyond the common contract: shapes that cut images in every way, every instruction set,
strides, threads, NaN."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import snapgen_kernels
from snapgen_kernels import checks
from snapgen_kernels._backend import extension
from snapgen_kernels.group_norm_silu import Norm
from snapgen_kernels.sepconv import sepconv
from snapgen_kernels.testing import LAYOUTS, Case, small_cases
from tests.ops.variants import on_each_variant

BOTH = (torch.float32, torch.bfloat16)


@given(
    batch=st.integers(0, 3),
    groups=st.sampled_from([0, 1, 3]),
    per_group=st.integers(1, 13),
    outputs=st.integers(1, 40),
    height=st.integers(1, 13),
    width=st.integers(1, 13),
    stride=st.sampled_from([1, 2]),
    upsample=st.booleans(),
    extras=st.booleans(),
    dtype=st.sampled_from(BOTH),
    layout=st.sampled_from(LAYOUTS),
)
def test_any_shape_layout_and_dtype(
    batch: int,
    groups: int,
    per_group: int,
    outputs: int,
    height: int,
    width: int,
    stride: int,
    upsample: bool,
    extras: bool,
    dtype: torch.dtype,
    layout: str,
) -> None:
    channels = max(groups, 1) * per_group
    flags = {"bias": int(extras), "shift": int(extras), "residual": int(extras)}
    sizes = {"B": batch, "C": channels, "H": height, "W": width, "O": outputs, "G": groups}
    case = Case("sepconv", "drawn", {**sizes, **flags, "stride": stride, "upsample": int(upsample)}, dtype, layout)
    with checks.poisoned_memory():
        checks.check_values(case, function=case.spec.registered)


# Several tiles beside each other, several units in a panel, samples that share a panel, rests of every kind.
CUTS = {
    "tiles": {"B": 1, "C": 1056, "H": 3, "W": 75, "O": 40},
    "tiles-stride": {"B": 2, "C": 1040, "H": 5, "W": 131, "O": 24, "stride": 2},
    "tiles-up": {"B": 1, "C": 1060, "H": 2, "W": 37, "O": 33, "upsample": 1},
    "tiles-up-stride": {"B": 1, "C": 1060, "H": 3, "W": 71, "O": 33, "upsample": 1, "stride": 2},
    "wide": {"B": 1, "C": 5, "H": 3, "W": 600, "O": 3},
    "units": {"B": 1, "C": 33, "H": 67, "W": 71, "O": 130},
    "samples": {"B": 7, "C": 64, "H": 5, "W": 5, "O": 96},
    "as-it-is": {"B": 2, "C": 64, "H": 19, "W": 23, "O": 40, "G": 0},
    "as-it-is-stride": {"B": 2, "C": 96, "H": 20, "W": 24, "O": 40, "G": 0, "stride": 2},
    "as-it-is-tiles": {"B": 1, "C": 1056, "H": 3, "W": 75, "O": 40, "G": 0},
    "as-it-is-tiles-stride": {"B": 1, "C": 1056, "H": 5, "W": 131, "O": 24, "G": 0, "stride": 2},
    "as-it-is-pixel": {"B": 2, "C": 32, "H": 1, "W": 1, "O": 24, "G": 0, "stride": 2},
    "as-it-is-column": {"B": 2, "C": 32, "H": 5, "W": 2, "O": 24, "G": 0},
    "few-pixels": {"B": 3, "C": 200, "H": 1, "W": 1, "O": 300},
}

EXTRAS = {"bias": 1, "shift": 1, "residual": 1, "G": 1}


@pytest.mark.parametrize("dtype", BOTH, ids=str)
@pytest.mark.parametrize("name", CUTS)
def test_cuts_of_the_image(name: str, dtype: torch.dtype) -> None:
    case = Case("sepconv", name, {**EXTRAS, **CUTS[name]}, dtype)
    with checks.poisoned_memory():
        checks.check_values(case, function=case.spec.registered)
    inputs = case.inputs()
    results = []
    for count in (1, 2, 5):
        with checks.threads(count):
            results.append(torch.ops.snapgen.sepconv(*case.spec.arguments(inputs)))
    for other in results[1:]:
        for first, value in zip(results[0], other, strict=True):
            assert "cpu" not in case.spec.kernels() or torch.equal(first, value)


@on_each_variant
def test_every_instruction_set() -> None:
    for case in small_cases("sepconv"):
        checks.check_values(case, function=case.spec.registered)
    for dtype in BOTH:
        for name in ("units", "samples", "tiles-up", "as-it-is", "as-it-is-stride", "as-it-is-column"):
            case = Case("sepconv", name, {**EXTRAS, **CUTS[name]}, dtype)
            checks.check_values(case, function=case.spec.registered)


def test_large_mean_loses_no_accuracy() -> None:
    case = Case("sepconv", "mean", {"B": 1, "C": 32, "H": 31, "W": 29, "O": 16, "G": 4}, offset=1000.0)
    checks.check_values(case, function=case.spec.registered)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", BOTH, ids=str)
def test_saved_statistics(layout: str, dtype: torch.dtype) -> None:
    case = Case("sepconv", "saved", {"B": 2, "C": 12, "H": 9, "W": 7, "O": 5, "G": 3}, dtype, layout, offset=2.0)
    inputs = case.inputs()
    groups = inputs["x"].double().reshape(2, 3, -1)
    _, mean, rstd = torch.ops.snapgen.sepconv(*case.spec.arguments(inputs))
    assert mean.dtype == rstd.dtype == torch.float32
    torch.testing.assert_close(mean.double(), groups.mean(-1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(rstd.double(), (groups.var(-1, correction=0) + 1e-5).rsqrt(), rtol=1e-6, atol=1e-6)
    inputs.update(norm_weight=None, norm_bias=None)
    assert [s.numel() for s in torch.ops.snapgen.sepconv(*case.spec.arguments(inputs))[1:]] == [0, 0]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", BOTH, ids=str)
@pytest.mark.parametrize(
    "flags",
    [{}, {"C": 32}, {"C": 32, "stride": 2}, {"stride": 2}, {"upsample": 1}, {"upsample": 1, "stride": 2}],
    ids=str,
)
def test_nan_and_inf_reach_the_pixels_that_see_them(value: float, dtype: torch.dtype, flags: dict[str, int]) -> None:
    case = Case("sepconv", "nan", {"B": 2, "C": 20, "H": 7, "W": 9, "O": 18, **flags}, dtype)
    inputs = case.inputs()
    inputs["x"][1, 3, 4, 5] = value
    mine, right = case.spec.registered(inputs), case.spec.reference(inputs)
    assert 0 < right.isfinite().logical_not().sum() < right.numel() // 2
    assert torch.equal(mine.isfinite(), right.isfinite())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_take_their_group_along(value: float) -> None:
    case = Case("sepconv", "nan", {"B": 2, "C": 20, "H": 7, "W": 9, "O": 18, "G": 2})
    inputs = case.inputs()
    inputs["x"][1, 3, 4, 5] = value
    y = case.spec.registered(inputs)
    assert y[0].isfinite().all() and y[1].isnan().all()


def test_empty_batch() -> None:
    x = torch.randn(0, 8, 5, 4).contiguous(memory_format=torch.channels_last)
    norm = Norm(2, torch.ones(8), torch.zeros(8))
    y = sepconv(x, torch.randn(8, 1, 3, 3), torch.randn(6, 8, 1, 1), norm=norm, stride=2)
    assert y.shape == (0, 6, 3, 2)


def test_the_output_keeps_the_memory_format_of_x() -> None:
    case = Case("sepconv", "format", {"B": 2, "C": 8, "H": 5, "W": 6, "O": 12})
    plain, last = case.inputs(), case.inputs()
    plain["x"] = plain["x"].contiguous()
    a, b = case.spec.registered(plain), case.spec.registered(last)
    assert a.is_contiguous() and b.is_contiguous(memory_format=torch.channels_last) and torch.equal(a, b)


@pytest.mark.parametrize("dtype", BOTH, ids=str)
def test_weights_may_change_in_place(dtype: torch.dtype) -> None:
    case = Case("sepconv", "update", {"B": 1, "C": 24, "H": 6, "W": 5, "O": 40}, dtype)
    inputs = case.inputs()
    case.spec.registered(inputs)
    with torch.no_grad():
        inputs["pw_weight"][0].zero_()
        inputs["dw_weight"].mul_(2)
    y = case.spec.registered(inputs)
    assert not y[:, 0].any()
    checks.assert_close("updated", y, case.spec.eager(inputs), case.spec.reference(checks.in_double(inputs)))


def test_a_sample_alone_is_the_sample_in_the_batch() -> None:
    case = Case("sepconv", "batch", {"B": 5, "C": 24, "H": 6, "W": 7, "O": 20, "G": 4, "shift": 1})
    inputs = case.inputs()
    together = case.spec.registered(inputs)
    for i in range(5):
        alone = case.spec.registered({**inputs, "x": inputs["x"][i : i + 1], "shift": inputs["shift"][i : i + 1]})
        assert "cpu" not in case.spec.kernels() or torch.equal(alone[0], together[i])


def test_norm_weights_in_fp32_beside_bf16() -> None:
    case = Case("sepconv", "mixed", {"B": 2, "C": 24, "H": 6, "W": 7, "O": 20, "G": 4}, torch.bfloat16)
    inputs = case.inputs()
    wide = {**inputs, "norm_weight": inputs["norm_weight"].float(), "norm_bias": inputs["norm_bias"].float()}
    assert torch.equal(case.spec.registered(wide), case.spec.registered(inputs))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_what_the_kernels_do_not_take(dtype: torch.dtype) -> None:
    case = Case("sepconv", "dtype", {"B": 1, "C": 4, "H": 3, "W": 3, "O": 2, "G": 2}, dtype)
    inputs = case.inputs()
    assert case.spec.public(inputs).dtype == dtype
    with (
        snapgen_kernels.use("fused"),
        pytest.raises(snapgen_kernels.FusedUnavailable, match="on cpu; the kernels take"),
    ):
        case.spec.public(inputs)
    inputs = Case("sepconv", "dtype", {"B": 1, "C": 4, "H": 3, "W": 3, "O": 2}).inputs()
    with snapgen_kernels.use("fused"), pytest.raises(snapgen_kernels.FusedUnavailable, match="pw_weight"):
        case.spec.public({**inputs, "pw_weight": inputs["pw_weight"].bfloat16()})


def test_the_primitive_names_what_does_not_fit() -> None:
    if extension().module is None:
        pytest.skip("the C++ extension is not built")
    from snapgen_kernels._cpu import packed

    def call(x: Tensor, pw: Tensor) -> None:
        y, add = torch.empty(1, 6, 5, 4).contiguous(memory_format=torch.channels_last), torch.zeros(1, 6)
        dw = torch.randn(8, 1, 3, 3)
        nothing = (None,) * 7
        torch.ops.snapgen_cpu.sepconv(x, dw, None, pw, add, *nothing, 1, False, y, None, None, 0.0)

    x, weight = torch.randn(1, 8, 5, 4), torch.randn(6, 8, 1, 1)
    call(x.contiguous(memory_format=torch.channels_last), packed(weight, "b"))
    with pytest.raises(RuntimeError, match=r"x does not fit .* channels_last"):
        call(x, packed(weight, "b"))
    with pytest.raises(RuntimeError, match="pw is not packed"):
        call(x.contiguous(memory_format=torch.channels_last), weight)
