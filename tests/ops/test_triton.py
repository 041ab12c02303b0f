"""Triton kernels without a GPU, under Triton's interpreter. The interpreter must be chosen before triton is imported,
so the tests run in a process of their own, which the first test here starts."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from snapgen_kernels import checks
from snapgen_kernels.testing import LAYOUTS, Case

INSIDE = os.environ.get("TRITON_INTERPRET") == "1"
MISSING = importlib.util.find_spec("triton") is None

pytestmark = [pytest.mark.interpreter, pytest.mark.skipif(MISSING, reason="triton is not installed")]
inside = pytest.mark.skipif(not INSIDE, reason="runs in the process that test_under_the_interpreter starts")

# Few pixels but in "long": the interpreter sums an axis one by one in fp32, where a GPU adds in a tree.
SIZES = {
    "small": {"B": 2, "C": 12, "H": 5, "W": 7, "G": 3},
    "one-pixel": {"B": 3, "C": 8, "H": 1, "W": 1, "G": 2},
    "one-group-prime": {"B": 1, "C": 17, "H": 13, "W": 11, "G": 1},
    "wide": {"B": 1, "C": 160, "H": 5, "W": 6, "G": 4},
    "middle": {"B": 1, "C": 72, "H": 9, "W": 11, "G": 4},
    "long": {"B": 1, "C": 6, "H": 37, "W": 41, "G": 2},
}
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
# Every size in fp32 and both memory formats (which covers every config); the other dtypes and layouts where they
# differ.
CASES = [Case("group_norm_silu", name, dims, layout=layout) for name, dims in SIZES.items() for layout in LAYOUTS[:2]]
CASES += [Case("group_norm_silu", "small", SIZES["small"], dtype, layout) for dtype in FLOATS for layout in LAYOUTS]
CASES += [Case("group_norm_silu", "long", SIZES["long"], dtype) for dtype in FLOATS[1:]]


@pytest.mark.skipif(INSIDE, reason="is the parent process")
def test_under_the_interpreter() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout, done.stdout


class _Kernels(torch.autograd.Function):
    """The Triton launchers on CPU tensors, as the op would call them on a GPU."""

    @staticmethod
    def forward(ctx, x, num_groups, weight, bias, eps):  # type: ignore[no-untyped-def]
        from snapgen_kernels._triton import group_norm_silu as kernels

        y, mean, rstd = kernels.forward(x, num_groups, weight, bias, eps)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.rest = (num_groups, eps)
        return y

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        from snapgen_kernels._triton import group_norm_silu as kernels

        x, weight, bias, mean, rstd = ctx.saved_tensors
        groups, eps = ctx.rest
        needs = [True, True, True]
        dx, dweight, dbias = kernels.backward(dy, x, groups, weight, bias, eps, mean, rstd, needs)
        return dx, None, dweight, dbias, None


def _run(inputs: dict) -> Tensor:
    return _Kernels.apply(inputs["x"], inputs["num_groups"], inputs["weight"], inputs["bias"], inputs["eps"])


@pytest.fixture(autouse=True, scope="module")
def _right_bf16() -> None:
    if INSIDE and not MISSING:
        from tests.ops.interpreter import mend_bf16

        mend_bf16()


@inside
@pytest.mark.parametrize("case", CASES, ids=str)
def test_group_norm_silu(case: Case) -> None:
    checks.check_gradients(case, function=_run)


@inside
@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_many_chunks_are_merged(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """More pixels than MAX_CHUNKS tiles (lowered here), a large mean, a repeat: exact and bitwise equal."""
    from snapgen_kernels._triton import group_norm_silu as kernels

    monkeypatch.setattr(kernels, "MAX_CHUNKS", 5)
    monkeypatch.setattr(kernels, "MERGE_BLOCK", 2)
    dims = {"B": 1, "C": 12, "H": 67, "W": 61, "G": 3}
    case = Case("group_norm_silu", "chunks", dims, layout=layout, offset=300.0)
    inputs = case.inputs(requires_grad=True)
    first, again = checks.run(case, _run, inputs), checks.run(case, _run, inputs)
    exact = checks.run(case, case.spec.reference, checks.in_double(inputs))
    plain = checks.run(case, case.spec.eager, {**inputs, "x": inputs["x"].detach().contiguous().requires_grad_()})
    for name, value in exact.items():
        assert torch.equal(first[name], again[name]), name
        checks.assert_close(name, first[name], plain[name], value)


@inside
def test_empty() -> None:
    x = torch.randn(0, 8, 3, 3, requires_grad=True)
    weight, bias = torch.ones(8, requires_grad=True), torch.zeros(8, requires_grad=True)
    y = _Kernels.apply(x, 2, weight, bias, 1e-5)
    dx, dweight, dbias = torch.autograd.grad(y, (x, weight, bias), torch.ones_like(y))
    assert y.shape == dx.shape == x.shape and not dweight.any() and not dbias.any()
