"""The C++ backward of sepconv and resblock beyond the common contract: every instruction set, odd sizes, partial
needs."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from snapgen_kernels import checks
from snapgen_kernels._backend import use
from snapgen_kernels.group_norm_silu import statistics
from snapgen_kernels.testing import LAYOUTS, Case, Inputs, small_cases
from tests.ops.variants import VARIANTS, built, forced

_DTYPES = [torch.float32, torch.bfloat16]


def _gradients(case: Case, inputs: Inputs, needs: list[bool]) -> dict[str, Tensor]:
    """What the backward op gives for the gradients that are asked for."""
    op = case.spec.op
    arguments = [a.detach() if isinstance(a, Tensor) else a for a in case.spec.arguments(inputs)]
    outputs = checks.outputs_of(getattr(torch.ops.snapgen, op.name)(*arguments))
    backward = getattr(torch.ops.snapgen, f"{op.name}_backward")
    found = backward(*checks.upstream_of(outputs[:1]), *arguments, *outputs[1:], needs)
    return {name: g for name, g, need in zip(op.differentiable, found, needs, strict=True) if need}


@pytest.mark.parametrize("op", ["sepconv", "resblock"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_instruction_set(op: str, variant: str) -> None:
    with forced(variant):
        for case in small_cases(op):
            checks.check_gradients(case, function=case.spec.registered)
            checks.check_repeats(case)


@given(
    batch=st.integers(1, 3),
    channels=st.sampled_from([2, 6, 16, 34, 64]),
    outputs=st.sampled_from([1, 5, 16, 33]),
    height=st.integers(1, 19),
    width=st.integers(1, 19),
    stride=st.sampled_from([1, 2]),
    upsample=st.sampled_from([0, 1]),
    groups=st.sampled_from([0, 2]),
    flags=st.tuples(st.sampled_from([0, 1]), st.sampled_from([0, 1]), st.sampled_from([0, 1])),
    dtype=st.sampled_from(_DTYPES),
    layout=st.sampled_from(LAYOUTS),
)
def test_any_sepconv(
    batch: int,
    channels: int,
    outputs: int,
    height: int,
    width: int,
    stride: int,
    upsample: int,
    groups: int,
    flags: tuple[int, int, int],
    dtype: torch.dtype,
    layout: str,
) -> None:
    dims = {"B": batch, "C": channels, "O": outputs, "H": height, "W": width, "stride": stride, "upsample": upsample}
    dims |= {"G": groups} if groups and channels // 2 * height * width > 2 else {}
    dims |= dict(zip(("bias", "shift", "residual"), flags, strict=True))
    checks.check_gradients(Case("sepconv", "drawn", dims, dtype, layout), function=None, layout="strided")


@built
@pytest.mark.parametrize("dtype", _DTYPES)
@pytest.mark.parametrize(
    "dims",
    [
        {"B": 1, "C": 200, "M": 72, "O": 200, "H": 47, "W": 3, "G": 8},  # strips and chunks that do not end even
        {"B": 35, "C": 16, "M": 48, "O": 24, "H": 4, "W": 4, "G": 4},  # several samples in a task
        {"B": 2, "C": 96, "M": 160, "O": 96, "H": 31, "W": 37, "G": 32},
    ],
)
def test_shapes_of_every_plan(dims: dict[str, int], dtype: torch.dtype) -> None:
    case = Case("resblock", "plan", dims, dtype)
    checks.check_gradients(case, function=case.spec.registered)
    checks.check_repeats(case)


@built
@pytest.mark.parametrize("dtype", _DTYPES)
@pytest.mark.parametrize(
    "flags",
    [
        {"stride": 2, "bias": 1, "shift": 1},
        {"upsample": 1, "bias": 1, "residual": 1},
        {"G": 8, "bias": 1, "shift": 1, "residual": 1},
    ],
)
def test_many_small_images(flags: dict[str, int], dtype: torch.dtype) -> None:
    """A few samples at a time go through the whole backward in cache."""
    case = Case("sepconv", "small-images", {"B": 19, "C": 24, "O": 40, "H": 5, "W": 7, **flags}, dtype)
    checks.check_gradients(case, function=case.spec.registered)
    checks.check_repeats(case)


@built
@pytest.mark.parametrize("op", ["sepconv", "resblock"])
def test_each_gradient_alone(op: str) -> None:
    """A gradient is as exact where no other is asked for; the compiler may round in another order there."""
    for case in (c for c in small_cases(op) if c.layout == "channels_last"):
        inputs = case.inputs(requires_grad=True)
        exact = checks._exact(case, inputs)
        present = [isinstance(inputs[name], Tensor) for name in case.spec.op.differentiable]
        every = _gradients(case, inputs, present)
        for index, name in enumerate(case.spec.op.differentiable):
            if present[index]:
                alone = _gradients(case, inputs, [i == index for i in range(len(present))])
                checks.assert_close(f"{case}: {name}", alone[name], every[name], exact[f"gradient of {name}"])


@built
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("upsample", [False, True])
@pytest.mark.parametrize("dtype", _DTYPES)
def test_plain_depthwise(stride: int, upsample: bool, dtype: torch.dtype) -> None:
    """The part that other ops use: no norm before it, something added to the gradient of x."""
    from snapgen_kernels._cpu import sepconv_backward as kernels

    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (
        torch.randn(shape, generator=generator).to(dtype) for shape in ((2, 7, 9, 40), (40, 1, 3, 3), (40,))
    )
    leaves = [t.double().requires_grad_() for t in (x, weight, bias)]

    def forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        a = x.permute(0, 3, 1, 2)
        a = torch.nn.functional.interpolate(a, scale_factor=2.0) if upsample else a
        return torch.nn.functional.conv2d(a, weight, bias, stride, 1, groups=40).permute(0, 2, 3, 1)

    d = forward(*leaves)
    dd, extra = (torch.randn(t.shape, generator=generator).to(dtype) for t in (d, x))
    exact = torch.autograd.grad(d, leaves, dd.double())
    eager_leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    eager = torch.autograd.grad(forward(*eager_leaves), eager_leaves, dd)
    found = kernels.depthwise(dd, x, weight, bias, stride=stride, upsample=upsample, extra=extra, d=True)
    assert found.x is not None and found.weight is not None and found.bias is not None and found.d is not None
    checks.assert_close("x", found.x, eager[0] + extra, exact[0] + extra.double())
    checks.assert_close("weight", found.weight, eager[1], exact[1])
    checks.assert_close("bias", found.bias, eager[2], exact[2])
    checks.assert_close("d", found.d, forward(x, weight, bias), d.detach())


@built
def test_nan_stays_in_its_group() -> None:
    """A NaN in x reaches the gradients of its own sample and group alone, and all of them."""
    x = torch.randn(2, 32, 6, 5).contiguous(memory_format=torch.channels_last)
    x[1, 3, 2, 2] = float("nan")
    parameters = [torch.randn(32, 1, 3, 3), torch.randn(8, 32, 1, 1), None, None, torch.ones(32), torch.zeros(32)]
    arguments = (x, *parameters, None, None, 2, 1e-5, 1, False)
    mean, rstd = statistics(x, 2, 1e-5)
    needs = [True, True, True, False, False, True, True, False, False]
    dx = torch.ops.snapgen.sepconv_backward(torch.randn(2, 8, 6, 5), *arguments, mean, rstd, needs)[0]
    assert dx[1, :16].isnan().all() and not dx[0].isnan().any() and not dx[1, 16:].isnan().any()


@built
def test_primitives_refuse_what_does_not_fit() -> None:
    from snapgen_kernels._cpu import sepconv_backward as kernels

    x = torch.randn(1, 4, 4, 16)
    with pytest.raises(RuntimeError, match="dd has"):
        kernels.depthwise(torch.randn(1, 4, 4, 8), x, torch.randn(16, 1, 3, 3))
    with pytest.raises(RuntimeError, match="float32 or bfloat16"):
        kernels.depthwise(x.half(), x.half(), torch.randn(16, 1, 3, 3).half())


@built
@pytest.mark.parametrize("op", ["sepconv", "resblock", "decoder_block"])
def test_autocast_keeps_the_fused_op(op: str) -> None:
    """fp32 weights do not send a call under autocast elsewhere: it is the bf16 op, and gradients come back in fp32."""
    case = next(c for c in small_cases(op) if c.layout == "channels_last")
    inputs = case.inputs(requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16), use("fused"):
        y = case.spec.public(inputs)
    assert y.dtype == torch.bfloat16
    leaves = checks.leaves_of(case, inputs)
    found = torch.autograd.grad(y, list(leaves.values()), torch.ones_like(y))
    narrow = {n: v.detach().bfloat16() if n in leaves and "norm" not in n else v for n, v in inputs.items()}
    narrow = {n: v.detach().requires_grad_(n in leaves) if isinstance(v, Tensor) else v for n, v in narrow.items()}
    plain = case.spec.registered(narrow)
    right = torch.autograd.grad(plain, [narrow[n] for n in leaves], torch.ones_like(plain))
    assert torch.equal(y, plain)
    for name, mine, expected in zip(leaves, found, right, strict=True):
        assert mine.dtype == torch.float32 and torch.equal(mine, expected.float()), name
