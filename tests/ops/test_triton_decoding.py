"""What a decoder's inference adds on the GPU, under Triton's interpreter, in a process of its own (see test_triton.py):
statistics of the norm after the last block out of its product, and the last layer."""

import importlib
import importlib.util
import math
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from snapgen_kernels import Norm, checks
from snapgen_kernels.decoder_block import Weights
from snapgen_kernels.decoding import reference
from snapgen_kernels.testing import LAYOUTS, Case, _laid_out
from tests.ops.inside import INSIDE, MISSING, assert_passes, inside, marks, outside

pytestmark = marks
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@outside
def test_under_the_interpreter() -> None:
    assert_passes(__file__)


@pytest.fixture(autouse=True, scope="module")
def _right_bf16() -> None:
    if INSIDE and not MISSING:
        from tests.ops.interpreter import mend_bf16

        mend_bf16()


def _head(shape: tuple[int, ...], outputs: int, dtype: torch.dtype, layout: str = "channels_last") -> tuple:
    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64).to(dtype)

    channels = shape[1]
    norm = Norm(math.gcd(channels, 4), draw(channels), draw(channels), 1e-6)
    return (
        _laid_out(draw(*shape), layout),
        norm,
        draw(outputs, channels, 3, 3) / (9 * channels) ** 0.5,
        draw(outputs),
    )


def _check_head(x: Tensor, norm: Norm, weight: Tensor, bias: Tensor, statistics: tuple | None = None) -> Tensor:
    from snapgen_kernels._triton.norm_conv import norm_conv

    with checks.poisoned_memory():
        mine = norm_conv(x, norm, weight, bias, statistics)
    wide = Norm(norm.num_groups, norm.weight.double(), norm.bias.double(), norm.eps)
    exact = reference(x.double(), wide, weight.double(), bias.double())
    checks.assert_close("norm_conv", mine, reference(x, norm, weight, bias), exact)
    return mine


@inside
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("outputs", [1, 3])
def test_last_layer(outputs: int, dtype: torch.dtype) -> None:
    """Several tiles and several blocks of channels; a row longer than a block of the sum."""
    for shape in ((2, 20, 7, 13), (1, 80, 2, 300)):
        _check_head(*_head(shape, outputs, dtype))


@inside
@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    height=st.integers(1, 5),
    width=st.integers(1, 11),
    channels=st.integers(1, 40),
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from(FLOATS),
)
def test_last_layer_of_odd_sizes(height: int, width: int, channels: int, layout: str, dtype: torch.dtype) -> None:
    # Errors of few outputs are luck: several samples.
    _check_head(*_head((32 // min(32, height * width) + 2, channels, height, width), 3, dtype, layout))


@inside
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_last_layer_in_bands(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every bit of the whole image; a repeat, every bit of the first."""
    from snapgen_kernels._triton import norm_conv as kernels

    arguments = _head((3, 12, 4, 5), 3, dtype)
    plans = (kernels.Plan(3, 4), kernels.Plan(3, 4), kernels.Plan(2, 4), kernels.Plan(1, 3), kernels.Plan(1, 1))
    found = []
    for plan in plans:
        monkeypatch.setattr(kernels, "plans", lambda *_, plan=plan: ((plan,), plan))
        found.append(_check_head(*arguments))
    for other in found[1:]:
        assert torch.equal(found[0], other)


@inside
def test_plans_keep_their_scratch_small() -> None:
    """Of the decoder's picture the whole at once; of four times as many pixels too; of sixteen, bands of rows."""
    from snapgen_kernels._triton import norm_conv as kernels

    row = 4 * 27 * 1024
    for batch, side, samples in ((1, 1024, 1), (16, 1024, 4), (1, 2048, 1), (4, 256, 4)):
        x = torch.empty((batch, 128, side, side), device="meta")
        candidates, rule = kernels.plans(x, 3)
        assert rule == kernels.Plan(samples, side) and rule in candidates
        assert all(p.samples * p.rows * side // 1024 * row <= kernels.SCRATCH for p in candidates)
    rule = kernels.plans(torch.empty((1, 128, 4096, 4096), device="meta"), 3)[1]
    assert rule.samples == 1 and 1000 < rule.rows < 4096


@inside
def test_last_layer_takes_statistics_and_empty_batches() -> None:
    from snapgen_kernels._triton.norm_conv import norm_conv

    x, norm, weight, bias = _head((2, 12, 5, 7), 3, torch.float32)
    groups = x.double().reshape(2, norm.num_groups, -1)
    known = groups.mean(-1).float(), (groups.var(-1, correction=0) + norm.eps).rsqrt().float()
    _check_head(x, norm, weight, bias, known)
    doubled = norm_conv(x, norm, weight, bias, (known[0], 2 * known[1]))
    assert not torch.allclose(doubled, norm_conv(x, norm, weight, bias, known), atol=0.1)
    assert norm_conv(x[:0], norm, weight, bias, None).shape == (0, 3, 5, 7)
    assert norm_conv(x[:, :, :0], norm, weight, bias, None).shape == (2, 3, 0, 7)


@inside
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_last_layer_keeps_what_is_not_finite_in_its_sample(value: float) -> None:
    from snapgen_kernels._triton.norm_conv import norm_conv

    x, norm, weight, bias = _head((2, 8, 5, 7), 3, torch.float32)
    x[1, 3, 2, 4] = value
    y = norm_conv(x, norm, weight, bias, None)
    assert y[0].isfinite().all() and torch.equal(y.isnan(), reference(x, norm, weight, bias).isnan())


@inside
def test_last_layer_with_one_tanh_for_a_sigmoid(monkeypatch: pytest.MonkeyPatch) -> None:
    """The form of bf16 on NVIDIA, with an instruction as inaccurate as that one may be, keeps to the same bound."""
    from snapgen_kernels._triton import common, norm_conv
    from tests.ops.interpreter import rough_tanh

    names = [name.split(".")[-1] for name in sys.modules if name.startswith("snapgen_kernels._triton.")]
    for module in (importlib.import_module(f"snapgen_kernels._triton.{name}") for name in names):
        if hasattr(module, "tanh_approx"):
            monkeypatch.setattr(module, "tanh_approx", rough_tanh)
    monkeypatch.setattr(norm_conv.common, "fast", lambda dtype: True)
    assert common.fast(torch.bfloat16)
    _check_head(*_head((2, 32, 9, 11), 3, torch.bfloat16))


BLOCKS = {
    "whole": {"B": 2, "C": 16, "M": 32, "H": 6, "W": 16, "G": 4},
    "ragged": {"B": 1, "C": 15, "M": 33, "H": 5, "W": 9, "G": 3},
}


@inside
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("dims", BLOCKS.values(), ids=list(BLOCKS))
def test_blocks_tell_the_next_norm(
    dims: dict[str, int], low_memory: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """y is what the op gives, to the bit; the statistics are those of y. Low memory: two bands, whose four rows are
    whole tiles where they have 16 pixels."""
    from snapgen_kernels._triton import decoder_block as kernels

    case = Case("decoder_block", "told", dims, dtype, offset=3.0, bench=True)
    inputs = case.inputs()
    x, num_groups, eps, memory = inputs["x"], dims["G"], inputs["eps"], 0 if low_memory else None
    weights = Weights(*(inputs[name] for name in Weights._fields))
    if low_memory:
        short = kernels.Plan(1, 4)
        monkeypatch.setattr(kernels, "plans", lambda *_: ((short,), short))
    with checks.poisoned_memory():
        y, told = kernels.apply(x, weights, num_groups, eps, memory, (num_groups, 1e-5), None)
        alone, nothing = kernels.apply(x, weights, num_groups, eps, memory, None, None)
    expected = kernels.forward(x, *weights, num_groups, eps, low_memory, False)[0]
    assert torch.equal(y, expected) and torch.equal(alone, expected) and nothing is None
    checks.assert_close("y", y, case.spec.eager(inputs), case.spec.reference(checks.in_double(inputs)))
    if low_memory and dims["W"] % 16:
        assert told is None
        return
    assert told is not None
    groups = y.double().reshape(dims["B"], num_groups, -1)
    deviation = (groups.var(-1, correction=0) + 1e-5).sqrt()
    slack = 16 * torch.finfo(torch.float32).eps * (groups.abs().amax(-1) / deviation).max().item()
    assert ((told[0].double() - groups.mean(-1)) / deviation).abs().max() <= slack
    torch.testing.assert_close(told[1].double() * deviation, torch.ones_like(deviation), rtol=slack, atol=0)


@inside
def test_blocks_without_samples_tell_nothing() -> None:
    from snapgen_kernels._triton import decoder_block as kernels

    case = Case("decoder_block", "empty", {**BLOCKS["whole"], "B": 0})
    inputs = case.inputs()
    weights = Weights(*(inputs[name] for name in Weights._fields))
    y, told = kernels.apply(inputs["x"], weights, 4, 1e-6, None, (4, 1e-6), None)
    assert y.shape == inputs["x"].shape and told is None


@inside
@pytest.mark.parametrize("low_memory", [False, True])
def test_a_decoder_draws_by_these_kernels(low_memory: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """`forward` without gradients and `decode`: no pass for the last norm's statistics, and no normalised image."""
    pytest.importorskip("diffusers")
    from snapgen.decoder import TinyDecoder
    from snapgen_kernels import _backend, decoding
    from snapgen_kernels._triton import decoder_block, norm_conv

    torch.manual_seed(4)
    decoder = TinyDecoder(latent_channels=2, channels=(16, 16), blocks=(1, 1), norm_groups=4).eval()
    latents = torch.randn(1, 2, 3, 4)
    with torch.no_grad():
        expected = decoder.conv_out(decoder.norm_out(_by_modules(decoder, latents)))
    launched: list[str] = []

    def noted(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arguments: launched.append(function.__name__) or function(*arguments)

    kernels = noted(decoder_block.apply), noted(norm_conv.norm_conv)
    monkeypatch.setattr(decoding, "_kernels", lambda device_type: kernels)
    monkeypatch.setattr(_backend, "missing_kernel", lambda op, device_type: None)
    monkeypatch.setattr(norm_conv, "moments", None)
    told: list[float] = []
    with torch.no_grad():
        pictures = decoder(latents), decoder.decode(latents, low_memory=low_memory, progress=lambda *n: told.append(n))
    assert launched == ["apply", "apply", "norm_conv"] * 2 and told[-1][0] == told[-1][1]
    for mine in pictures:
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5)


def _by_modules(decoder: Any, latents: Tensor) -> Tensor:
    x = decoder.conv_in(latents)
    for index, stage in enumerate(decoder.stages):
        for block in stage:
            x = block(x)
        if index < len(decoder.upsamplers):
            x = decoder.upsamplers[index](x)
    return x
