"""The decoder's block beyond the common contract: tasks of several bands and tiles, memory, every instruction set; its
in-place form and the decoder's last layer."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from snapgen_kernels import DecoderBlock, FusedUnavailable, Norm, checks, use
from snapgen_kernels._backend import extension, missing_kernel
from snapgen_kernels.decoding import apply_block, norm_silu_conv, reference
from snapgen_kernels.testing import LAYOUTS, Case, _laid_out, small_cases
from tests.ops.variants import VARIANTS, forced

MISSING = missing_kernel("decoder_block", "cpu")
needs_kernel = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
# Several bands; several tiles; ragged blocks of channels; the model's widths.
SHAPES = [
    {"B": 1, "C": 16, "M": 48, "H": 70, "W": 37, "G": 4},
    {"B": 2, "C": 8, "M": 16, "H": 3, "W": 3500, "G": 2},
    {"B": 2, "C": 20, "M": 40, "H": 19, "W": 3, "G": 5},
    {"B": 1, "C": 128, "M": 384, "H": 40, "W": 200, "G": 32},
]
DTYPES = [torch.float32, torch.bfloat16]


def _block(case: Case, inputs: dict) -> DecoderBlock:
    block = DecoderBlock(case.dims["C"], expansion=case.dims["M"] // case.dims["C"], num_groups=case.dims["G"])
    for parameter, name in zip(block.weights(), case.spec.op.differentiable[1:], strict=True):
        parameter.data = inputs[name]
    return block


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set(variant: str, dtype: torch.dtype) -> None:
    with forced(variant):
        for case in small_cases("decoder_block"):
            checks.check_gradients(case)
        for low in (0, 1):
            case = Case("decoder_block", "tasks", {**SHAPES[0], "low": low}, dtype, bench=True)
            checks.check_values(case)
            checks.check_repeats(case)


@needs_kernel
@pytest.mark.parametrize("dims", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_low_memory_changes_no_statistic(dims: dict[str, int], dtype: torch.dtype) -> None:
    case = Case("decoder_block", "modes", dims, dtype, bench=True)
    checks.check_values(case)
    inputs = case.inputs()
    found = [
        torch.ops.snapgen.decoder_block(*case.spec.arguments({**inputs, "low_memory": low, "keep_middle": False}))
        for low in (False, True)
    ]
    for stored, computed in zip(found[0][2:], found[1][2:], strict=True):
        assert torch.equal(stored, computed)
    if dtype == torch.float32:  # bf16 rounds the middle image where it is stored
        assert torch.equal(found[0][0], found[1][0])
    checks.check_values(Case("decoder_block", "low", {**dims, "low": 1}, dtype, bench=True))


@needs_kernel
@pytest.mark.parametrize("dims", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["channels_last", "transposed"])
def test_in_place(dims: dict[str, int], dtype: torch.dtype, layout: str) -> None:
    """Writing over x changes no bit, whatever is kept; statistics of the output are those of the output."""
    case = Case("decoder_block", "inplace", dims, dtype, layout=layout, bench=True)
    inputs = case.inputs()
    block = _block(case, inputs)
    norm = Norm(4, torch.ones(dims["C"], dtype=dtype), torch.zeros(dims["C"], dtype=dtype), 1e-5)
    middle = dims["M"] * dims["B"] * dims["H"] * dims["W"] * inputs["x"].element_size()
    # Some bands are kept and some computed twice: which of bf16's are rounded in memory then varies from row to row.
    mixed = [middle - 1] if dtype == torch.float32 else []
    for memory in (None, 0, *mixed):
        with torch.no_grad():
            expected = block(inputs["x"], low_memory=memory == 0)
        x = inputs["x"].clone()
        shares: list[float] = []
        y, statistics = apply_block(block, x, memory=memory, next_norm=norm, progress=shares.append)
        assert torch.equal(y, expected)
        if layout == "channels_last":
            assert y.data_ptr() == x.data_ptr()
        assert shares == sorted(shares) and shares[-1] == 1.0 and len(shares) > 1
        assert statistics is not None
        groups = y.double().reshape(dims["B"], 4, -1)
        deviation = (groups.var(-1, correction=0) + 1e-5).sqrt()
        # y was rounded after its statistics were taken: half an ulp of its values at most, and fp32's own.
        slack = torch.finfo(dtype).eps * (groups.abs().amax(-1) / deviation).max().item()
        assert ((statistics[0].double() - groups.mean(-1)) / deviation).abs().max() <= slack
        torch.testing.assert_close(statistics[1].double() * deviation, torch.ones_like(deviation), rtol=slack, atol=0)


@needs_kernel
@given(
    height=st.integers(1, 37),
    width=st.integers(1, 23),
    channels=st.integers(1, 37),
    groups=st.sampled_from([1, 2]),
    low=st.integers(0, 1),
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from(DTYPES),
)
def test_odd_sizes(
    height: int, width: int, channels: int, groups: int, low: int, layout: str, dtype: torch.dtype
) -> None:
    dims = {"B": 1, "C": channels, "M": 2 * channels, "H": height, "W": width, "G": groups, "low": low}
    checks.check_values(Case("decoder_block", "odd", dims, dtype, layout=layout))


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("shape", [(0, 8, 3, 3), (2, 8, 0, 3), (2, 8, 3, 0)])
def test_empty(shape: tuple[int, ...], low: bool) -> None:
    if extension().module is None and shape[0]:
        pytest.skip("PyTorch's convolution refuses pictures without pixels")
    block = DecoderBlock(8, num_groups=2)
    assert block(torch.randn(shape), low_memory=low).shape == shape
    assert apply_block(block, torch.randn(shape))[0].shape == shape


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_inf_reach_their_sample_alone(value: float, low: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    block = DecoderBlock(16, num_groups=2).to(dtype)
    x = torch.randn(2, 16, 9, 11).to(dtype)
    x[1, 3, 4, 5] = value
    with torch.no_grad():
        y = block(x, low_memory=low)
        with use("reference"):
            expected = block(x)
    assert torch.equal(y.isnan(), expected.isnan()) and y[1].isnan().any() and not y[0].isnan().any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes_go_to_pytorch_and_say_so(dtype: torch.dtype) -> None:
    block, x = DecoderBlock(8, num_groups=2).to(dtype), torch.randn(1, 8, 3, 3).to(dtype)
    assert block(x).dtype == dtype
    with use("fused"), pytest.raises(FusedUnavailable, match=str(dtype) if MISSING is None else "decoder_block"):
        block(x)


def test_low_memory_training_has_the_same_gradients() -> None:
    torch.manual_seed(2)
    block = DecoderBlock(16, num_groups=4)
    x = torch.randn(2, 16, 9, 7, requires_grad=True)
    leaves = (x, *block.parameters())
    plain, low = (torch.autograd.grad(block(x, low_memory=m).square().sum(), leaves) for m in (False, True))
    for one, other in zip(plain, low, strict=True):
        torch.testing.assert_close(one, other)


# ---- the last layer ------------------------------------------------------------------------------------------


def _head(batch: int, channels: int, height: int, width: int, outputs: int, dtype: torch.dtype, layout: str) -> tuple:
    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64).to(dtype)

    x = _laid_out(draw(batch, channels, height, width), layout)
    norm = Norm(math.gcd(channels, 4), draw(channels), draw(channels), 1e-6)
    return x, norm, draw(outputs, channels, 3, 3) / (9 * channels) ** 0.5, draw(outputs)


def _check_head(x: Tensor, norm: Norm, weight: Tensor, bias: Tensor) -> None:
    mine, eager = norm_silu_conv(x, norm, weight, bias), reference(x, norm, weight, bias)
    wide = Norm(norm.num_groups, norm.weight.double(), norm.bias.double(), norm.eps)
    exact = reference(x.double(), wide, weight.double(), bias.double())
    checks.assert_close("norm_silu_conv", mine, eager, exact)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("outputs", [1, 3, 5])
def test_last_layer(variant: str, dtype: torch.dtype, outputs: int) -> None:
    with forced(variant):
        for shape in ((2, 20, 37, 41), (1, 32, 3, 600)):
            arguments = _head(*shape, outputs, dtype, "channels_last")
            _check_head(*arguments)
            first = norm_silu_conv(*arguments)
            for count in (2, 5):
                with checks.threads(count):
                    assert torch.equal(first, norm_silu_conv(*arguments))


@given(
    height=st.integers(1, 19),
    width=st.integers(1, 19),
    channels=st.integers(1, 20),
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from(DTYPES),
)
def test_last_layer_of_odd_sizes(height: int, width: int, channels: int, layout: str, dtype: torch.dtype) -> None:
    # Errors of few outputs are luck: several samples.
    _check_head(*_head(64 // min(64, height * width) + 3, channels, height, width, 3, dtype, layout))


def test_last_layer_takes_statistics_and_empty_batches() -> None:
    x, norm, weight, bias = _head(2, 12, 5, 7, 3, torch.float32, "channels_last")
    groups = x.reshape(2, norm.num_groups, -1)
    known = groups.mean(-1), (groups.var(-1, correction=0) + norm.eps).rsqrt()
    torch.testing.assert_close(
        norm_silu_conv(x, norm, weight, bias, statistics=known), reference(x, norm, weight, bias)
    )
    assert norm_silu_conv(x[:0], norm, weight, bias).shape == (0, 3, 5, 7)


@pytest.mark.parametrize("dtype", DTYPES)
def test_under_autocast_weights_are_cast(dtype: torch.dtype) -> None:
    """Weights are fp32 and x is what a convolution gives under autocast: kernels called directly cast nothing."""
    torch.manual_seed(3)
    block = DecoderBlock(16, num_groups=4)
    head = _head(1, 16, 9, 7, 3, torch.float32, "channels_last")
    x = torch.randn(1, 16, 9, 7).to(dtype)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y, statistics = apply_block(block, x, next_norm=head[1])
        pictures = norm_silu_conv(y, *head[1:])
        expected = block(x)
        if MISSING is None:
            with use("fused"):  # the block's own op casts
                assert torch.equal(apply_block(block, x)[0], expected)
    assert statistics is None and pictures.dtype == torch.bfloat16
    assert torch.equal(y, expected)
    right = reference(expected.float(), *head[1:])
    assert (pictures - right).norm() / right.norm() < 4 * torch.finfo(torch.bfloat16).eps


def test_last_layer_names_what_does_not_fit() -> None:
    x, norm, weight, bias = _head(1, 12, 5, 7, 3, torch.float32, "channels_last")
    with pytest.raises(ValueError, match=r"weight has shape \(3, 11, 3, 3\)"):
        norm_silu_conv(x, norm, weight[:, :11], bias)
    with pytest.raises(ValueError, match="bias has shape"):
        norm_silu_conv(x, norm, weight, bias[:2])
    wrong = torch.zeros(1, 2), torch.ones(1, 2)
    with pytest.raises(ValueError, match=r"statistics: mean has shape \(1, 2\); expected \(1, 4\)"):
        norm_silu_conv(x, norm, weight, bias, statistics=wrong)
    known = torch.zeros(1, 4), torch.ones(1, 4, dtype=torch.float64)
    with pytest.raises(TypeError, match="statistics: rstd has dtype"):
        norm_silu_conv(x, norm, weight, bias, statistics=known)
    with torch.no_grad(), pytest.raises(ValueError, match="dw1_weight has shape"):
        apply_block(DecoderBlock(8, num_groups=2), x)
