"""Triton kernels without a GPU, under Triton's interpreter. The interpreter must be chosen before triton is imported,
so the tests run in processes of their own, which the first test here starts. In them the ops' CPU kernels are the
Triton launchers, so that what is tested is the registered op: its autograd formula, its schema, its launchers."""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from snapgen_kernels import _backend, checks
from snapgen_kernels.testing import LAYOUTS, SPECS, Case

INSIDE = os.environ.get("TRITON_INTERPRET") == "1"
MISSING = importlib.util.find_spec("triton") is None

pytestmark = [pytest.mark.interpreter, pytest.mark.skipif(MISSING, reason="triton is not installed")]
inside = pytest.mark.skipif(not INSIDE, reason="runs in the processes that test_under_the_interpreter starts")

# The files of snapgen_kernels/_triton with an op's forward and backward.
FILES = {
    "group_norm_silu": ("group_norm_silu", "group_norm_silu"),
    "sepconv": ("sepconv", "sepconv_backward"),
    "resblock": ("resblock", "resblock_backward"),
    "qk_norm_rope": ("qk_norm_rope", "qk_norm_rope_backward"),
    "attention": ("attention", "attention_backward"),
}
WRITTEN = [
    op
    for op, files in FILES.items()
    if all(importlib.util.find_spec(f"snapgen_kernels._triton.{file}") is not None for file in files)
]
# One process each, so that they run side by side.
GROUPS = {
    "group_norm_silu": "group_norm_silu or many_chunks",
    "qk_norm_rope": "qk_norm_rope",
    "attention": "attention",
    "sepconv": "sepconv",
    "resblock": "resblock and not sepconv",
}

# Few pixels but in "long": the interpreter sums an axis one by one in fp32, where a GPU adds in a tree.
SIZES = {
    "group_norm_silu": {
        "small": {"B": 2, "C": 12, "H": 5, "W": 7, "G": 3},
        "one-pixel": {"B": 3, "C": 8, "H": 1, "W": 1, "G": 2},
        "one-group-prime": {"B": 1, "C": 17, "H": 13, "W": 11, "G": 1},
        "wide": {"B": 1, "C": 160, "H": 5, "W": 6, "G": 4},
        "middle": {"B": 1, "C": 72, "H": 9, "W": 11, "G": 4},
        "long": {"B": 1, "C": 6, "H": 37, "W": 41, "G": 2},
    },
    "sepconv": {
        "all": {"B": 2, "C": 8, "H": 6, "W": 7, "O": 12, "G": 4, "bias": 1, "shift": 1, "residual": 1},
        "plain": {"B": 2, "C": 16, "H": 9, "W": 8, "O": 32},
        "odd": {"B": 1, "C": 17, "H": 11, "W": 7, "O": 33, "G": 1, "shift": 1},
        "stride": {"B": 1, "C": 6, "H": 9, "W": 10, "O": 5, "stride": 2, "bias": 1},
        "upsample": {"B": 1, "C": 8, "H": 6, "W": 12, "O": 4, "G": 2, "upsample": 1, "residual": 1},
        "one-pixel": {"B": 1, "C": 4, "H": 1, "W": 1, "O": 3, "G": 1, "shift": 1},
        "wide": {"B": 1, "C": 136, "H": 7, "W": 10, "O": 144, "G": 8, "shift": 1},
    },
    "resblock": {
        "shortcut": {"B": 2, "C": 8, "M": 24, "O": 12, "H": 6, "W": 7, "G": 2},
        "same": {"B": 1, "C": 16, "M": 32, "O": 16, "H": 9, "W": 8, "G": 4},
        "odd": {"B": 1, "C": 15, "M": 33, "O": 17, "H": 7, "W": 11, "G": 3},
        "wide": {"B": 1, "C": 72, "M": 144, "O": 72, "H": 7, "W": 10, "G": 8},
    },
    "attention": {
        "self": {"B": 2, "N": 47, "H": 3, "D": 64, "M": 47, "rope": 1},
        "cross": {"B": 2, "N": 37, "H": 2, "D": 24, "M": 150},
        "masked": {"B": 3, "N": 35, "H": 2, "D": 20, "M": 77, "mask": 1},
        "no-norm": {"B": 1, "N": 64, "H": 2, "D": 32, "M": 128, "norm": 0},
        "rope-only": {"B": 1, "N": 70, "H": 1, "D": 8, "M": 70, "norm": 0, "rope": 1},
        "one-key": {"B": 1, "N": 40, "H": 3, "D": 16, "M": 1, "norm": 0},
        "one-token": {"B": 2, "N": 1, "H": 1, "D": 16, "M": 5},
        "wide-head": {"B": 1, "N": 33, "H": 2, "D": 100, "M": 33, "rope": 1},
    },
    "qk_norm_rope": {
        "self": {"B": 2, "N": 45, "H": 3, "D": 64, "M": 45, "rope": 1},
        "cross": {"B": 2, "N": 37, "H": 2, "D": 24, "M": 41},
        "odd-head": {"B": 1, "N": 70, "H": 5, "D": 20, "M": 70, "rope": 1},
        "wide-head": {"B": 1, "N": 20, "H": 2, "D": 200, "M": 20, "rope": 1},
        "one-token": {"B": 1, "N": 1, "H": 1, "D": 64, "M": 1, "rope": 1},
    },
}
# Whose memory format changes what is launched: every size runs contiguous too.
BOTH_FORMATS = ("group_norm_silu",)
launched: list[str] = []
NARROW = (torch.float16, torch.bfloat16)


def _first(op: str) -> Case:
    name, dims = next(iter(SIZES[op].items()))
    return Case(op, name, dims)


def _once(case: Case) -> Case:
    """Checked on one draw of random numbers instead of several: the interpreter is slow."""
    return replace(case, bench=True)


def _cases(op: str) -> Iterator[Case]:
    """Every size in fp32; the other dtypes and layouts where they differ."""
    cheap = op == "group_norm_silu"
    for name, dims in SIZES[op].items():
        # The worst of few elements is luck, so that few pixels need many draws.
        case = (
            Case(op, name, dims) if cheap or name in ("all", "one-pixel", "one-token") else _once(Case(op, name, dims))
        )
        yield from (replace(case, layout=layout) for layout in LAYOUTS[: 2 if op in BOTH_FORMATS else 1])
    for name in (
        ("small", "long") if cheap else ("all", "stride", "upsample", "shortcut", "same", "self", "cross", "masked")
    ):
        if name in SIZES[op]:
            yield from (_once(Case(op, name, SIZES[op][name], dtype)) for dtype in NARROW)
    for layout in LAYOUTS[2 if op in BOTH_FORMATS else 1 :]:
        yield _once(replace(_first(op), layout=layout))


CASES = [case for op in WRITTEN for case in _cases(op)]
ops = pytest.mark.parametrize("op", WRITTEN)


@pytest.mark.skipif(INSIDE, reason="is the parent process")
@pytest.mark.parametrize("group", GROUPS)
def test_under_the_interpreter(group: str) -> None:
    if group not in WRITTEN:
        pytest.skip(f"no Triton kernels of {group} yet")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__)), "-k", GROUPS[group]]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout, done.stdout


@pytest.fixture(autouse=True, scope="module")
def _launchers_on_cpu() -> Iterator[None]:
    if not INSIDE or MISSING:
        yield
        return
    from tests.ops.interpreter import mend_bf16

    mend_bf16()
    _backend.extension()  # before the launchers take its place: loading it registers kernels
    with torch.library._scoped_library("snapgen", "IMPL") as library:
        for op in WRITTEN:
            forward, backward = (importlib.import_module(f"snapgen_kernels._triton.{file}") for file in FILES[op])
            library.impl(op, _noted(op, forward.forward), "CPU", allow_override=True)
            library.impl(f"{op}_backward", _noted(f"{op}_backward", backward.backward), "CPU", allow_override=True)
        yield


def _noted(name: str, launcher: Callable[..., Any]) -> Callable[..., Any]:
    def launch(*arguments: Any) -> Any:
        launched.append(name)
        return launcher(*arguments)

    return launch


@inside
@pytest.mark.parametrize("case", CASES, ids=str)
def test_outputs_and_gradients(case: Case) -> None:
    checks.check_gradients(case, function=case.spec.registered)


@inside
@ops
def test_upstream_gradients_with_gaps(op: str) -> None:
    checks.check_gradients(_once(_first(op)), function=SPECS[op].registered, layout="strided")


@inside
@ops
def test_repeats_bitwise(op: str) -> None:
    launched.clear()
    checks.check_repeats(replace(_first(op), dtype=torch.bfloat16), counts=(1,))
    assert launched == [op, f"{op}_backward"] * 2  # no other kernel took the call


@inside
@ops
def test_an_empty_batch(op: str) -> None:
    case = _first(op)
    checks.check_gradients(replace(case, dims={**case.dims, "B": 0}), function=case.spec.registered)


@inside
@ops
@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_metadata(op: str, layout: str) -> None:
    checks.check_metadata(replace(_first(op), dtype=torch.bfloat16, layout=layout))


@inside
@ops
def test_some_gradients_alone(op: str) -> None:
    """What is not needed is left out, and the rest is what it is beside the others."""
    case = _first(op)
    inputs = case.inputs(requires_grad=True)
    full = checks.run(case, case.spec.registered, inputs)
    leaves = list(checks.leaves_of(case, inputs))
    for names in (leaves[:1], leaves[1::2], leaves[2::2]):
        some = {k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
        asked = [some[name].requires_grad_() for name in names]
        outputs = checks.outputs_of(case.spec.registered(some))
        found = torch.autograd.grad(outputs, asked, checks.upstream_of(outputs))
        torch.testing.assert_close(dict(zip(names, found, strict=True)), {n: full[f"gradient of {n}"] for n in names})


@inside
@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_many_chunks_are_merged(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """group_norm_silu with more pixels than MAX_CHUNKS tiles (lowered here), a large mean, a repeat."""
    from snapgen_kernels._triton import group_norm_silu as kernels

    monkeypatch.setattr(kernels, "MAX_CHUNKS", 5)
    monkeypatch.setattr(kernels, "MERGE_BLOCK", 2)
    dims = {"B": 1, "C": 12, "H": 67, "W": 61, "G": 3}
    case = Case("group_norm_silu", "chunks", dims, layout=layout, offset=300.0)
    inputs = case.inputs(requires_grad=True)
    function = case.spec.registered
    first, again = checks.run(case, function, inputs), checks.run(case, function, inputs)
    exact = checks.run(case, case.spec.reference, checks.in_double(inputs))
    plain = checks.run(case, case.spec.eager, {**inputs, "x": inputs["x"].detach().contiguous().requires_grad_()})
    for name, value in exact.items():
        assert torch.equal(first[name], again[name]), name
        checks.assert_close(name, first[name], plain[name], value)
