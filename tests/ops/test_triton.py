"""Triton kernels without a GPU, under Triton's interpreter. The interpreter must be chosen before triton is imported,
so the tests run in processes of their own, which the first test here starts. In them the ops' CPU kernels are the
Triton launchers, so that what is tested is the registered op: its autograd formula, its schema, its launchers."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from snapgen_kernels import _backend, checks
from snapgen_kernels.testing import LAYOUTS, SPECS, Case
from tests.ops.inside import INSIDE, MISSING, assert_passes, inside, marks, outside

pytestmark = marks

# The files of snapgen_kernels/_triton with an op's forward and backward.
FILES = {
    "group_norm_silu": ("group_norm_silu", "group_norm_silu_backward"),
    "sepconv": ("sepconv", "sepconv_backward"),
    "resblock": ("resblock", "resblock_backward"),
    "geglu": ("geglu", "geglu"),
    "qk_norm_rope": ("qk_norm_rope", "qk_norm_rope_backward"),
    "attention": ("attention", "attention_backward"),
    "decoder_block": ("decoder_block", "decoder_block_backward"),
}
# One process each, so that they run side by side.
GROUPS = {
    "group_norm_silu": "group_norm_silu or many_chunks",
    "qk_norm_rope": "qk_norm_rope",
    "attention": "attention",
    "sepconv": "sepconv",
    "resblock": "resblock and not sepconv",
    "geglu": "geglu",
    "decoder_block": "decoder_block",
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
        "up": {"B": 1, "C": 6, "H": 5, "W": 17, "O": 4, "upsample": 1, "bias": 1},
        "up-down": {"B": 1, "C": 4, "H": 3, "W": 5, "O": 3, "G": 2, "stride": 2, "upsample": 1},
        "one-pixel": {"B": 1, "C": 4, "H": 1, "W": 1, "O": 3, "G": 1, "shift": 1},
        "wide": {"B": 1, "C": 136, "H": 7, "W": 10, "O": 144, "G": 8, "shift": 1},
    },
    "resblock": {
        "shortcut": {"B": 2, "C": 8, "M": 24, "O": 12, "H": 6, "W": 7, "G": 2},
        "same": {"B": 1, "C": 16, "M": 32, "O": 16, "H": 9, "W": 8, "G": 4},
        "one-pixel": {"B": 2, "C": 4, "M": 8, "O": 4, "H": 1, "W": 1, "G": 1},
        "odd": {"B": 1, "C": 15, "M": 33, "O": 17, "H": 7, "W": 11, "G": 3},
        "wide": {"B": 1, "C": 72, "M": 144, "O": 72, "H": 7, "W": 10, "G": 8},
    },
    "geglu": {
        "small": {"B": 2, "N": 5, "C": 12, "F": 7},
        "no-bias": {"B": 1, "N": 3, "C": 8, "F": 16, "bias": 0},
        "not-kept": {"B": 3, "N": 37, "C": 70, "F": 45, "keep": 0},
        "not-kept-no-bias": {"B": 1, "N": 9, "C": 33, "F": 12, "keep": 0, "bias": 0},
        "one-token": {"B": 1, "N": 1, "C": 1, "F": 1},
        "wide": {"B": 1, "N": 150, "C": 136, "F": 140},
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
    "decoder_block": {
        "block": {"B": 1, "C": 16, "M": 32, "H": 4, "W": 6, "G": 4},
        "low": {"B": 1, "C": 15, "M": 33, "H": 3, "W": 18, "G": 3, "low": 1},
        "pixel": {"B": 1, "C": 4, "M": 8, "H": 1, "W": 1, "G": 1},
        "wide": {"B": 2, "C": 80, "M": 144, "H": 3, "W": 4, "G": 8},
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
NARROWED = ("all", "stride", "upsample", "shortcut", "same", "self", "cross", "masked", "block")


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
        few = name in ("all", "one-pixel", "one-token") or (op == "geglu" and name == "small")
        case = Case(op, name, dims) if cheap or few else _once(Case(op, name, dims))
        yield from (replace(case, layout=layout) for layout in LAYOUTS[: 2 if op in BOTH_FORMATS else 1])
    for name in ("small", "long", "not-kept") if cheap or op == "geglu" else NARROWED:
        if name in SIZES[op]:
            yield from (_once(Case(op, name, SIZES[op][name], dtype)) for dtype in NARROW)
    for layout in LAYOUTS[2 if op in BOTH_FORMATS else 1 :]:
        yield _once(replace(_first(op), layout=layout))


CASES = [case for op in FILES for case in _cases(op)]
ops = pytest.mark.parametrize("op", list(FILES))


@outside
@pytest.mark.parametrize("group", GROUPS)
def test_under_the_interpreter(group: str) -> None:
    assert_passes(__file__, GROUPS[group])


@pytest.fixture(autouse=True, scope="module")
def _launchers_on_cpu() -> Iterator[None]:
    if not INSIDE or MISSING:
        yield
        return
    from tests.ops.interpreter import mend_bf16

    mend_bf16()
    _backend.extension()  # before the launchers take its place: loading it registers kernels
    with torch.library._scoped_library("snapgen", "IMPL") as library:
        for op in FILES:
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
@pytest.mark.parametrize("op", ["qk_norm_rope", "attention"])
def test_no_heads(op: str) -> None:
    case = _first(op)
    checks.check_gradients(_once(replace(case, dims={**case.dims, "H": 0})), function=case.spec.registered)


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


FUSED = {
    "up": Case("sepconv", "up", {"B": 2, "C": 16, "H": 5, "W": 6, "O": 32, "upsample": 1, "bias": 1}),
    "down": Case("sepconv", "down", {"B": 1, "C": 32, "H": 9, "W": 7, "O": 16, "stride": 2}),
    "block": Case("resblock", "block", {"B": 2, "C": 16, "M": 48, "O": 32, "H": 7, "W": 9, "G": 4}),
}


@inside
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", FUSED.values(), ids=lambda case: f"{case.op}-{case.name}")
def test_both_steps_in_one_kernel(case: Case, dtype: torch.dtype) -> None:
    from snapgen_kernels._triton import sepconv, tuning

    with tuning.forced("sepconv", sepconv.Plan(True, 1)):
        checks.check_gradients(_once(replace(case, dtype=dtype)), function=case.spec.registered)


@inside
@pytest.mark.parametrize("op", ["sepconv", "resblock", "decoder_block"])
def test_one_tanh_for_a_sigmoid(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The form of bf16 on NVIDIA, with an instruction as inaccurate as that one may be, keeps to the same bound."""
    from snapgen_kernels._triton import common
    from tests.ops.interpreter import rough_tanh

    names = [name.split(".")[-1] for name in sys.modules if name.startswith("snapgen_kernels._triton.")]
    for module in (importlib.import_module(f"snapgen_kernels._triton.{name}") for name in names):
        if hasattr(module, "tanh_approx"):
            monkeypatch.setattr(module, "tanh_approx", rough_tanh)
    asked: list[torch.dtype] = []
    monkeypatch.setattr(common, "fast", lambda dtype: asked.append(dtype) or True)
    checks.check_gradients(_once(replace(_first(op), dtype=torch.bfloat16)), function=SPECS[op].registered)
    assert asked


@inside
@pytest.mark.parametrize(("low", "dtype"), [(0, torch.float32), (1, torch.bfloat16)])
def test_decoder_block_in_bands(low: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bands of rows of one sample at a time give every bit of the whole image; a large mean, ragged tiles."""
    from snapgen_kernels._triton import decoder_block as kernels
    from snapgen_kernels._triton import depthwise, tuning

    dims = {"B": 1 + low, "C": 4, "M": 8, "H": 6, "W": 5, "G": 2, "low": low}
    case = Case("decoder_block", "bands", dims, dtype, offset=0.0 if low else 100.0)
    inputs = case.inputs()
    arguments = case.spec.arguments({**inputs, "keep_middle": False})
    scan = depthwise.DepthwiseConfig(1, 8, 4, 1, 0)
    found = []
    for plan in (kernels.Plan(1 + low, 6), kernels.Plan(1, 4)):
        monkeypatch.setattr(kernels, "plans", lambda *_, plan=plan: ((plan,), plan))
        with (
            tuning.forced("depthwise", scan),
            tuning.forced("depthwise_moments", scan),
            checks.poisoned_memory(),
        ):
            found.append(torch.ops.snapgen.decoder_block(*arguments))
    for whole, banded in zip(*found, strict=True):
        assert torch.equal(whole, banded)
    y, _, mean, rstd = found[0]
    wide = {**checks.in_double(inputs), "keep_middle": True}
    exact = case.spec.contract._reference_with_saved(*case.spec.arguments(wide))
    checks.assert_close("y", y, case.spec.eager(inputs), exact[0])
    deviation = 1 / exact[3]
    # Half an ulp of each value of the middle image, which the convolutions round once each.
    slack = 2 * torch.finfo(dtype).eps * exact[1].abs().max() / deviation.min()
    assert ((mean - exact[2]) / deviation).abs().max() <= slack
    assert (rstd * deviation - 1).abs().max() <= slack


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


@inside
@pytest.mark.parametrize("dtype", [torch.float32, *NARROW], ids=str)
@pytest.mark.parametrize("keep", [0, 1])
def test_geglu_in_tiles_that_divide_nothing(keep: int, dtype: torch.dtype) -> None:
    """Several tiles in every direction, the last of each cut off, and several chunks of several tiles."""
    from snapgen_kernels._triton import geglu as kernels
    from snapgen_kernels._triton import tuning

    dims = {"B": 3, "N": 35, "C": 37, "F": 41, "keep": keep}
    case = _once(Case("geglu", "tiles", dims, dtype))
    small = kernels.Config(32, 16, 16, 4, 2)
    with (
        tuning.forced("geglu", small),
        tuning.forced("geglu_anew_gradient", small),
        tuning.forced("geglu_gradient", kernels.GradientConfig(16, 16, 4)),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(kernels, "PROGRAMS", 1)
        patch.setattr(kernels.common, "processors", lambda _: 8)
        checks.check_gradients(case, function=case.spec.registered)
        checks.check_repeats(case, counts=(1,))


@inside
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("keep", [False, True])
def test_geglu_keeps_what_is_not_finite_in_its_token(keep: bool, value: float) -> None:
    """A bias that is not finite reaches no gradient beyond what the formula says, past the last token either."""
    case = Case("geglu", "ends", {"B": 1, "N": 37, "C": 9, "F": 5, "keep": int(keep)})
    inputs = case.inputs(requires_grad=True)
    with torch.no_grad():
        inputs["x"][0, 33, 7] = value
    mine = checks.run(case, case.spec.registered, inputs)
    right = checks.run(case, case.spec.reference, inputs)
    with torch.no_grad():
        inputs["x"][0, 33, 7] = 0.0
        inputs["bias"][8] = value
    mine |= {f"bias: {k}": v for k, v in checks.run(case, case.spec.registered, inputs).items()}
    right |= {f"bias: {k}": v for k, v in checks.run(case, case.spec.reference, inputs).items()}
    for name, expected in right.items():
        assert torch.equal(mine[name].isfinite(), expected.isfinite()), name


@inside
def test_geglu_in_tf32_only_where_linear_layers_are() -> None:
    """Not where convolutions alone are, as is PyTorch's default."""
    from snapgen_kernels._triton import common

    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        found = []
        for matmul.fp32_precision in ("ieee", "tf32"):
            found.append([common.linear_precision(dtype) for dtype in (torch.float32, torch.bfloat16)])
    finally:
        matmul.fp32_precision = before
    assert before != "tf32" and found == [["ieee", "ieee"], ["tf32", "ieee"]]


@inside
def test_geglu_splits_its_weight_gradient_so_that_no_round_is_nearly_empty() -> None:
    """Of the model's widest weight: 147 tiles for 132 multiprocessors."""
    from snapgen_kernels._triton import weight_gradient

    config = weight_gradient.Config(256, 128, 32, 8, 4)
    few, many = (torch.empty((1, 5376, tokens, 1), device="meta") for tokens in (300, 16384))
    assert weight_gradient._splits(config, few, 896) == 1
    splits = weight_gradient._splits(config, many, 896)
    rounds = 147 * splits / 132
    assert 1 < splits <= weight_gradient.MAX_SPLITS and rounds / -(-rounds // 1) > 0.85
