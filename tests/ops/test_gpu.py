"""The Triton kernels on a GPU: the contract's checks in every dtype and layout, CUDA graphs, streams, indices past
2^31, every config. Needs torch, triton, pytest and hypothesis alone."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import snapgen_kernels
from snapgen_kernels import _backend, checks
from snapgen_kernels.attention import reference as attention_reference
from snapgen_kernels.decoding import apply_block
from snapgen_kernels.decoding import reference as norm_silu_conv_reference
from snapgen_kernels.qk_norm_rope import reference as qk_norm_rope_reference
from snapgen_kernels.testing import LAYOUTS, SPECS, Case, Inputs, bench_cases, small_cases
from tests.ops import configs

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

if torch.cuda.is_available():  # cuBLAS asks for it where determinism is asked for, which filling empty tensors does
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
OPS = [op for op, spec in SPECS.items() if "cuda" in _backend.KERNELS[spec.op.name]]
# Those of tokens, not of images.
TOKENS = ("qk_norm_rope", "attention", "geglu")
# Those whose kernels take channels_last alone.
LAST_ONLY = [op for op in OPS if op != "group_norm_silu" and op not in TOKENS]
SMALL = [case for op in OPS for case in small_cases(op)]
SMALL += [replace(case, dtype=torch.float16) for case in SMALL if case.dtype == torch.float32 and not case.offset]


def _first(op: str) -> Case:
    """A case with everything that the op can take."""
    return next((case for case in small_cases(op) if case.name in ("all", "shortcut", "self")), small_cases(op)[0])


def _stream_of(case: Case) -> str:
    """The input that flows through the op."""
    return "x" if case.op not in ("qk_norm_rope", "attention") else "q"


FIRST = [replace(_first(op), dtype=dtype) for op in OPS for dtype in FLOATS]
# Attention launches other kernels where keys are masked, and where there is rotation without a norm.
MORE = [case for op in OPS if op == "attention" for case in small_cases(op) if case.name in ("masked", "rope-only")]
FIRST += MORE
PLAIN = [case for case in FIRST if case.dtype == torch.float32]
# The model's first and last stage, its self-attention and a cross-attention of many queries.
NAMES = (
    "256ch-128",
    "896ch-32",
    "160ch-128",
    "896-2688-1024",
    "self-14x64-1024",
    "cross-14x64-333",
    "cross-8x64-4096-333",
)
MODEL = [case for op in OPS for case in bench_cases(op) if case.name in NAMES]
MODEL = [case for case in MODEL if case.dtype == torch.bfloat16]
ops = pytest.mark.parametrize("op", OPS)


@pytest.fixture(autouse=True)
def _exact_convolutions() -> Any:
    """PyTorch's convolutions in fp32, not tf32: they set the bound."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def _fused(inputs: Inputs, case: Case) -> Any:
    with snapgen_kernels.use("fused"):
        return case.spec.public(inputs)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_outputs_and_gradients(case: Case) -> None:
    checks.check_gradients(case, DEVICE, case.spec.registered)
    checks.check_gradients(case, DEVICE, case.spec.registered, layout="strided")


@pytest.mark.parametrize("case", [c for c in SMALL if c.layout == "channels_last"], ids=str)
def test_the_public_function_runs_the_kernel(case: Case) -> None:
    checks.check_values(case, DEVICE, lambda inputs: _fused(inputs, case))


@pytest.mark.parametrize("case", MODEL, ids=str)
def test_shapes_of_the_model(case: Case) -> None:
    checks.check_gradients(case, DEVICE, case.spec.registered)


@pytest.mark.parametrize("case", FIRST + MODEL, ids=str)
def test_repeats_bitwise(case: Case) -> None:
    checks.check_repeats(case, DEVICE, counts=(1,))


@pytest.mark.parametrize("case", FIRST, ids=str)
def test_an_empty_batch(case: Case) -> None:
    empty = replace(case, dims={**case.dims, "B": 0})
    checks.check_gradients(empty, DEVICE, case.spec.registered)


@pytest.mark.parametrize("case", FIRST, ids=str)
def test_opcheck(case: Case) -> None:
    checks.check_opcheck(case, DEVICE)


@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_each_gradient_alone(case: Case) -> None:
    """What is not needed is left out, and the rest is what it is beside the others."""
    inputs = case.inputs(DEVICE, requires_grad=True)
    full = checks.run(case, case.spec.registered, inputs)
    for name in checks.leaves_of(case, inputs):
        alone = {k: v.detach() if isinstance(v, Tensor) else v for k, v in inputs.items()}
        alone[name].requires_grad_()
        outputs = checks.outputs_of(case.spec.registered(alone))
        (gradient,) = torch.autograd.grad(outputs, [alone[name]], checks.upstream_of(outputs))
        torch.testing.assert_close(gradient, full[f"gradient of {name}"], msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_second_derivatives_go_through_the_reference(case: Case) -> None:
    inputs = case.inputs(DEVICE, requires_grad=True)
    leaves = list(checks.leaves_of(case, inputs).values())

    def penalty(function: Callable[[Inputs], Any]) -> tuple[Tensor, ...]:
        output = checks.outputs_of(function(inputs))[0]
        first = torch.autograd.grad(output.square().mean(), leaves[0], create_graph=True)[0]
        return torch.autograd.grad(first.square().sum(), leaves, allow_unused=True, materialize_grads=True)

    for mine, plain in zip(penalty(case.spec.registered), penalty(case.spec.reference), strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-3, atol=1e-5 * plain.abs().max().item() + 1e-9)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("case", FIRST, ids=str)
def test_compiles_as_one_graph(case: Case, backend: str) -> None:
    checks.check_compile(case, DEVICE, backend)


# PyTorch's own attention does without tf32 and sets no bound for it: see the next test.
@pytest.mark.parametrize("op", [op for op in OPS if op != "attention"])
def test_tf32_only_where_pytorch_would(op: str) -> None:
    """Allowed: within the bound of PyTorch's own tf32. Not allowed: the test above, against fp32."""
    case = next((c for c in bench_cases(op) if c.dtype == torch.float32), None)
    assert case is not None
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    try:
        checks.check_gradients(case, DEVICE, case.spec.registered)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.skipif("attention" not in OPS, reason="has no GPU kernel")
@pytest.mark.parametrize(
    "dims", [{"M": 77, "mask": 1}, {"M": 77}, {"M": 70, "rope": 1}], ids=["masked", "cross", "self"]
)
@pytest.mark.parametrize("dim", [64, 100, 128])
def test_attention_in_tf32(dim: int, dims: dict[str, int]) -> None:
    """Every config, forward and backward; the bound is that of the formula written out, whose products PyTorch runs in
    tf32."""
    case = Case("attention", "tf32", {"B": 2, "N": 70, "H": 3, "D": dim, **dims})
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    try:
        choices = configs.choices_of(case, DEVICE)
        assert {choice[-1][0] for choice in choices} >= {
            "attention", "attention_query_gradient", "attention_key_gradient"
        }  # fmt: skip
        inputs = case.inputs(DEVICE, requires_grad=True)
        plain = checks.run(case, case.spec.reference, inputs)
        exact = checks.run(case, case.spec.reference, checks.in_double(inputs))
        for choice in choices:
            with configs.forced(choice):
                mine = checks.run(case, case.spec.registered, inputs)
            for name, value in exact.items():
                checks.assert_close(f"{choice}: {name}", mine[name], plain[name], value)
    finally:
        matmul.fp32_precision = before


# ---- memory formats and reasons --------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", LAST_ONLY)
def test_channels_first_is_named(op: str, caplog: pytest.LogCaptureFixture) -> None:
    case = replace(_first(op), layout="contiguous")
    inputs = case.inputs(DEVICE)
    with snapgen_kernels.use("fused"), pytest.raises(snapgen_kernels.FusedUnavailable, match="channels_last"):
        case.spec.public(inputs)
    _backend._log_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="snapgen_kernels"):
        for _ in range(2):
            case.spec.public(inputs)
    assert [record.getMessage().startswith(f"{op} runs in PyTorch") for record in caplog.records].count(True) == 1
    assert "channels_last" in caplog.text
    checks.check_values(case, DEVICE)


@ops
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_output_keeps_the_memory_format(op: str, layout: str) -> None:
    case = replace(_first(op), layout=layout)
    mine, fake = (checks.outputs_of(case.spec.registered(case.inputs(device))) for device in (DEVICE, "meta"))
    assert [o.stride() for o in mine] == [o.stride() for o in fake]


# Not "masked": its last sample has no key, and is zero whatever its queries are.
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("case", [case for case in FIRST if case.name != "masked"], ids=str)
def test_nan_and_inf_reach_their_own_sample_alone(case: Case, value: float) -> None:
    case = replace(case, dims={**case.dims, "B": 2})
    inputs = case.inputs(DEVICE)
    stream = inputs[_stream_of(case)]
    stream[(1, *[0] * (stream.dim() - 1))] = value
    y = checks.outputs_of(case.spec.registered(inputs))[0]
    assert y[0].isfinite().all() and not y[1].isfinite().all()


# ---- streams, devices, graphs ----------------------------------------------------------------------------------------


def _leaves(case: Case, seed: int) -> list[Tensor]:
    other = replace(case, seed=seed)
    return [t.detach() for t in checks.leaves_of(case, other.inputs(DEVICE)).values()]


def _both(case: Case, inputs: Inputs) -> list[Tensor]:
    return list(checks.run(case, case.spec.registered, inputs).values())


def _only_forward(case: Case, inputs: Inputs) -> list[Tensor]:
    with torch.no_grad():
        return list(checks.outputs_of(case.spec.registered(inputs)))


def _on_a_stream_of_its_own(function: Callable[[], Any]) -> Any:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        result = function()
    torch.cuda.current_stream().wait_stream(stream)
    return result


@pytest.mark.parametrize("call", [_only_forward, _both], ids=["forward", "both"])
@pytest.mark.parametrize("case", [*FIRST, *MODEL[:1]], ids=str)
def test_cuda_graphs(case: Case, call: Callable[[Case, Inputs], list[Tensor]]) -> None:
    """A replay with other numbers in the inputs gives, bitwise, what a call gives on them."""
    inputs = case.inputs(DEVICE, requires_grad=True)
    places = list(checks.leaves_of(case, inputs).values())
    upstream = checks.upstream_of(checks.outputs_of(case.spec.registered(inputs)))
    static = _with_upstream(case, upstream, call)
    _on_a_stream_of_its_own(lambda: [static(inputs) for _ in range(3)])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = static(inputs)
    for seed in (11, 12):
        with torch.no_grad():
            for place, value in zip(places, _leaves(case, seed), strict=True):
                place.copy_(value)
        graph.replay()
        replayed = [t.clone() for t in captured]
        for mine, expected in zip(replayed, static(inputs), strict=True):
            assert torch.equal(mine, expected)


def _with_upstream(
    case: Case, upstream: list[Tensor], call: Callable[[Case, Inputs], list[Tensor]]
) -> Callable[[Inputs], list[Tensor]]:
    """``call`` with gradients that lie on the GPU beforehand: a capture copies nothing from the host."""
    if call is _only_forward:
        return lambda inputs: call(case, inputs)

    def both(inputs: Inputs) -> list[Tensor]:
        outputs = checks.outputs_of(case.spec.registered(inputs))
        leaves = list(checks.leaves_of(case, inputs).values())
        return [*(o.detach() for o in outputs), *torch.autograd.grad(outputs, leaves, upstream)]

    return both


@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_kernels_run_on_the_current_stream(case: Case) -> None:
    """The input is made late, on a stream of its own; a kernel on another stream would read what was there before."""
    inputs = case.inputs(DEVICE)
    expected = _only_forward(case, inputs)
    name = _stream_of(case)
    late = {**inputs, name: torch.full_like(inputs[name], float("nan"))}

    def delayed() -> list[Tensor]:
        torch.cuda._sleep(200_000_000)
        late[name].copy_(inputs[name])
        return _only_forward(case, late)

    for mine, right in zip(_on_a_stream_of_its_own(delayed), expected, strict=True):
        assert torch.equal(mine, right)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("case", FIRST, ids=str)
def test_a_device_that_is_not_the_current_one(case: Case) -> None:
    assert torch.cuda.current_device() == 0
    expected = _both(case, case.inputs("cuda:0", requires_grad=True))
    for mine, right in zip(_both(case, case.inputs("cuda:1", requires_grad=True)), expected, strict=True):
        assert mine.device.index == 1 and torch.equal(mine.cpu(), right.cpu())


# ---- sizes -----------------------------------------------------------------------------------------------------------

# One sample of more than 2^31 elements in x, and how many times its bytes the test takes.
LARGE = {
    "group_norm_silu": ({"C": 64, "W": 4096, "G": 8}, 10),
    "sepconv": ({"C": 64, "W": 4096, "O": 64, "G": 8, "shift": 1, "residual": 1}, 14),
    "resblock": ({"C": 64, "M": 128, "O": 64, "W": 4096, "G": 8}, 24),
    "decoder_block": ({"C": 64, "M": 128, "W": 4096, "G": 8}, 24),
}
TILE = 8  # rows
LIMIT = 2**31


def _tiled(case: Case, times: int) -> Inputs:
    """Inputs whose images are one tile, repeated downwards: group statistics are the tile's own."""
    inputs = case.inputs(DEVICE, requires_grad=True)
    for name, value in inputs.items():
        if (
            isinstance(value, Tensor)
            and value.dim() == 4
            and tuple(value.shape[2:]) == (case.dims["H"], case.dims["W"])
        ):
            image = value.detach().permute(0, 2, 3, 1).repeat(1, times, 1, 1).permute(0, 3, 1, 2)
            inputs[name] = image.requires_grad_(value.requires_grad)
    return inputs


def _image_gradients(case: Case, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """y, and the gradient of x for a y that is sent back."""
    y = case.spec.registered(inputs)
    return y.detach(), torch.autograd.grad(y, inputs["x"], y.detach())[0]


def _check_repeated(case: Case, times: int) -> None:
    """The last tile of many is the last of three, and one in the middle that of three, but for rounding."""
    many = _image_gradients(case, _tiled(case, times))
    three = _image_gradients(case, _tiled(case, 3))
    height = case.dims["H"]
    for name, large, small in zip(("y", "gradient of x"), many, three, strict=True):
        allowed = 4 * torch.finfo(large.dtype).eps * small.abs().max().item()
        middle = times // 2 * height
        for mine, right in (
            (large[:, :, -height:], small[:, :, -height:]),
            (large[:, :, middle : middle + height], small[:, :, height : 2 * height]),
            (large[:, :, :height], small[:, :, :height]),
        ):
            error = (mine.float() - right.float()).abs().max().item()
            assert error <= allowed, f"{name}: error {error:.3g}; allowed {allowed:.3g}"


def _needs_memory(wanted: int) -> None:
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0]
    if free < wanted:
        pytest.skip(f"needs {wanted / 2**30:.0f} GiB of GPU memory; {free / 2**30:.0f} GiB are free")


@pytest.mark.parametrize("op", [op for op in OPS if op in LARGE])
def test_indices_past_2_to_the_31(op: str) -> None:
    dims, factor = LARGE[op]
    case = Case(op, "large", {"B": 1, "H": TILE, **dims}, torch.bfloat16)
    times = math.ceil(LIMIT / (dims["C"] * TILE * dims["W"])) + 1
    _needs_memory(factor * times * dims["C"] * TILE * dims["W"] * 2)
    _check_repeated(case, times)
    torch.cuda.empty_cache()


@pytest.mark.skipif("decoder_block" not in OPS, reason="has no GPU kernel")
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_decoder_block_in_several_bands(dtype: torch.dtype) -> None:
    from snapgen_kernels._triton import decoder_block as kernels

    dims = {"B": 2, "C": 32, "M": 96, "H": 300, "W": 1500, "G": 8, "low": 1}
    case = Case("decoder_block", "bands", dims, dtype, bench=True)
    plan = kernels.plans(case.inputs("meta")["x"], dims["M"], True)[1]
    assert plan.samples == 1 and dims["H"] / plan.rows > 2
    checks.check_gradients(case, DEVICE, case.spec.registered)
    checks.check_repeats(case, DEVICE, counts=(1,))


@pytest.mark.skipif("decoder_block" not in OPS, reason="has no GPU kernel")
def test_a_decoder_block_in_low_memory_holds_no_middle_image() -> None:
    from snapgen_kernels._triton import decoder_block as kernels

    dims = {"B": 1, "C": 128, "M": 384, "H": 1024, "W": 1024, "G": 32, "low": 1}
    case = Case("decoder_block", "low", dims, torch.bfloat16)
    inputs = case.inputs(DEVICE)
    with torch.no_grad():
        _fused(inputs, case)  # compiles
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        y = _fused(inputs, case)
        torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < y.nbytes + 2 * kernels.LOW_MEMORY


@pytest.mark.skipif("geglu" not in OPS, reason="has no GPU kernel")
@pytest.mark.parametrize("keep", [0, 1])
def test_geglu_of_more_than_2_to_the_31_values(keep: int) -> None:
    """The last tokens of many are those of few, to the last bit."""
    dims = {"B": 1, "C": 16, "F": 64, "keep": keep}
    few, many = 1 << 13, LIMIT // 128 + (1 << 13)
    _needs_memory(8 * many * 128 * 2)
    case = Case("geglu", "large", {**dims, "N": few}, torch.bfloat16)
    inputs = case.inputs(DEVICE, requires_grad=True)
    long = {**inputs, "x": inputs["x"].detach().repeat(1, many // few, 1).requires_grad_()}
    for mine, right in zip(_image_gradients(case, long), _image_gradients(case, inputs), strict=True):
        assert torch.equal(mine[:, -few:], right) and torch.equal(mine[:, :few], right)
    torch.cuda.empty_cache()


# Tokens of more than 2^31 numbers: sizes, what is repeated, bytes that the test takes for each number of q.
LONG = {
    "attention": ({"H": 14, "D": 64, "M": 77}, ("q",), 24),
    "qk_norm_rope": ({"H": 1, "D": 64, "rope": 1}, ("q", "k", "cos", "sin"), 48),
}


def _check_repeated_tokens(op: str, few: int, times: int) -> None:
    """The first and the last tokens of many are those of few, to the last bit; sums over them are so many times as
    large, but for rounding."""
    dims, names, _ = LONG[op]
    case = Case(op, "long", {"B": 1, "N": few, "M": few, **dims}, torch.bfloat16)
    inputs = case.inputs(DEVICE, requires_grad=True)
    many = dict(inputs)
    for name in names:
        value = inputs[name].detach()
        axis = value.dim() - 2 if name in ("k", "cos", "sin") else 1
        shape = [times if i == axis else 1 for i in range(value.dim())]
        many[name] = value.repeat(shape).requires_grad_(inputs[name].requires_grad)

    def both(tensors: Inputs) -> dict[str, Tensor]:
        outputs = checks.outputs_of(case.spec.registered(tensors))
        leaves = checks.leaves_of(case, tensors)
        found = torch.autograd.grad(outputs, list(leaves.values()), [o.detach() for o in outputs])
        return {f"output {i}": o.detach() for i, o in enumerate(outputs)} | dict(zip(leaves, found, strict=True))

    small, large = both(inputs), both(many)
    for name, right in small.items():
        mine = large[name]
        if mine.shape != right.shape:
            assert torch.equal(mine[:, -few:], right) and torch.equal(mine[:, :few], right), name
            continue
        allowed = 4 * torch.finfo(right.dtype).eps * right.abs().max().item()
        error = (mine.float() / times - right.float()).abs().max().item()
        assert error <= allowed, f"{name}: error {error:.3g}; allowed {allowed:.3g}"


@pytest.mark.parametrize("op", [op for op in OPS if op in LONG])
def test_tokens_past_2_to_the_31_values(op: str) -> None:
    few, per_token = 1 << 13, LONG[op][0]["H"] * LONG[op][0]["D"]
    times = LIMIT // (few * per_token) + 1
    _needs_memory(LONG[op][2] * times * few * per_token)
    _check_repeated_tokens(op, few, times)
    torch.cuda.empty_cache()


@pytest.mark.skipif("geglu" not in OPS, reason="has no GPU kernel")
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_gelu_everywhere(dtype: torch.dtype) -> None:
    """Every gate from -12 to 12: the error function of the GPU, its ends, and the gradient."""
    gates = torch.linspace(-12, 12, 40001, device=DEVICE).to(dtype)
    weight = torch.tensor([[0.0], [1.0]], dtype=dtype, device=DEVICE)  # the value is 1, the gate x
    bias = torch.tensor([1.0, 0.0], dtype=dtype, device=DEVICE)
    x, plain, exact = (v[None, :, None].clone().requires_grad_() for v in (gates, gates, gates.double()))
    mine = snapgen_kernels.geglu(x, weight, bias)
    eager, right = torch.nn.functional.gelu(plain), torch.nn.functional.gelu(exact)
    checks.assert_close("gelu", mine, eager, right)
    found = [torch.autograd.grad(y.sum(), leaf)[0] for y, leaf in ((mine, x), (eager, plain), (right, exact))]
    checks.assert_close("gradient", *found)
    assert torch.equal(mine[0, gates.float() > 6, 0], gates[gates.float() > 6])


def _exact_attention(inputs: Inputs, upstream: Tensor, step: int) -> dict[str, Tensor]:
    """Output and gradients in fp64, ``step`` tokens of queries at a time: all at once, scores would fill no GPU."""
    wide = checks.in_double(inputs)
    k, v, q_weight, k_weight = (wide[name] for name in ("k", "v", "q_weight", "k_weight"))
    cos, sin = wide["cos"], wide["sin"]
    outputs, queries = [], []
    sums = [torch.zeros_like(t) for t in (k, v, q_weight, k_weight)]
    for first in range(0, upstream.shape[1], step):
        rows = slice(first, first + step)
        q = wide["q"][:, rows].detach().requires_grad_()
        ends = [None if t is None else t[rows] for t in (cos, sin)]
        ready = qk_norm_rope_reference(q, q[:, :, 0], q_weight, k_weight, *ends)[0]
        keys = qk_norm_rope_reference(k[:, :, None], k, q_weight, k_weight, cos, sin)[1]
        o = attention_reference(ready, keys, v)
        dq, *rest = torch.autograd.grad(o, (q, k, v, q_weight, k_weight), upstream[:, rows].double())
        outputs.append(o.detach())
        queries.append(dq)
        for total, part in zip(sums, rest, strict=True):
            total += part
    found = (torch.cat(outputs, 1), torch.cat(queries, 1), *sums)
    names = ("output 0", *(f"gradient of {name}" for name in ("q", "k", "v", "q_weight", "k_weight")))
    return dict(zip(names, (t.detach() for t in found), strict=True))


def _check_long_attention(tokens: int, heads: int, rope: int, step: int) -> None:
    dims = {"B": 1, "N": tokens, "H": heads, "D": 64, "M": tokens, "rope": rope}
    case = Case("attention", "long", dims, torch.bfloat16)
    inputs = case.inputs(DEVICE, requires_grad=True)
    mine, plain = (checks.run(case, function, inputs) for function in (case.spec.registered, case.spec.eager))
    exact = _exact_attention(inputs, checks.upstream_of((mine["output 0"],))[0], step)
    assert exact.keys() == mine.keys()
    for name, value in exact.items():
        checks.assert_close(name, mine[name], plain[name], value)


@pytest.mark.skipif("attention" not in OPS, reason="attention has no GPU kernels")
@pytest.mark.parametrize("rope", [0, 1])
def test_65536_tokens(rope: int) -> None:
    """Output and every gradient within the bound, fp64 a few thousand rows at a time."""
    _needs_memory(40 << 30)
    _check_long_attention(65536, 14, rope, step=256)
    torch.cuda.empty_cache()


# ---- the decoder's inference -----------------------------------------------------------------------------------------


def _last_layer(batch: int, channels: int, side: int, dtype: torch.dtype) -> tuple[Any, ...]:
    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64).to(DEVICE, dtype)

    torch.manual_seed(0)
    x = draw(batch, channels, side, side).contiguous(memory_format=torch.channels_last)
    norm = snapgen_kernels.Norm(4, draw(channels), draw(channels), 1e-6)
    return x, norm, draw(3, channels, 3, 3) / (9 * channels) ** 0.5, draw(3)


def _exact_last_layer(x: Tensor, norm: Any, weight: Tensor, bias: Tensor) -> Tensor:
    wide = norm._replace(weight=norm.weight.double(), bias=norm.bias.double())
    return norm_silu_conv_reference(x.double(), wide, weight.double(), bias.double())


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(2, 128, 256), (1, 20, 37)], ids=str)
def test_the_last_layer_in_every_config(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    from snapgen_kernels._triton import norm_conv, tuning
    from snapgen_kernels._triton.pointwise import are_whole

    arguments = _last_layer(*shape, dtype)
    exact, plain = _exact_last_layer(*arguments), norm_silu_conv_reference(*arguments)
    plans, _ = norm_conv.plans(arguments[0], 3)
    choices = [("norm_conv", plan) for plan in (*plans, norm_conv.Plan(1, 5))]
    choices += [("norm_conv.taps", c) for c in norm_conv.taps_configs(dtype, "ieee", are_whole(shape[1]))]
    choices += [("norm_conv.sum", config) for config in norm_conv.SUM_CONFIGS]
    for kernel, config in choices:
        with tuning.forced(kernel, config), snapgen_kernels.use("fused"):
            found = [snapgen_kernels.norm_silu_conv(*arguments) for _ in range(2)]
        assert torch.equal(*found), (kernel, config)
        checks.assert_close(f"{kernel} {config}", found[0], plain, exact)


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_blocks_tell_the_next_norm(dtype: torch.dtype, low_memory: bool) -> None:
    """y is the op's, to the bit; the statistics are y's."""
    torch.manual_seed(1)
    block = snapgen_kernels.DecoderBlock(64, num_groups=8).to(DEVICE, dtype)
    x = torch.randn(2, 64, 512, 512, device=DEVICE).to(dtype).contiguous(memory_format=torch.channels_last)
    norm = snapgen_kernels.Norm(8, block.norm.weight[:64], block.norm.bias[:64], 1e-6)
    with torch.no_grad():
        expected = block(x, low_memory=low_memory)
        y, told = apply_block(block, x, memory=0 if low_memory else None, next_norm=norm)
    assert torch.equal(y, expected) and told is not None
    groups = y.double().reshape(2, 8, -1)
    deviation = (groups.var(-1, correction=0) + 1e-6).sqrt()
    slack = 16 * torch.finfo(torch.float32).eps * (groups.abs().amax(-1) / deviation).max().item()
    assert ((told[0].double() - groups.mean(-1)) / deviation).abs().max() <= slack
    torch.testing.assert_close(told[1].double() * deviation, torch.ones_like(deviation), rtol=slack, atol=0)


def test_the_last_layer_past_2_to_the_31_values() -> None:
    """In bands of rows: the last rows of many are those of few, of which the statistics are given."""
    _needs_memory(16 << 30)
    x, norm, weight, bias = _last_layer(1, 128, 8, torch.bfloat16)
    known = torch.zeros(1, 4, device=DEVICE), torch.ones(1, 4, device=DEVICE)
    small = x.repeat(1, 1, 2, 512).contiguous(memory_format=torch.channels_last)  # 16 rows of 4096 pixels
    large = torch.empty((1, 4104, 4096, 128), dtype=x.dtype, device=DEVICE).permute(0, 3, 1, 2)
    for top in range(0, 4104, 8):
        large[:, :, top : top + 8] = small[:, :, :8]
    mine, right = (snapgen_kernels.norm_silu_conv(i, norm, weight, bias, statistics=known) for i in (large, small))
    assert torch.equal(mine[:, :, -8:], right[:, :, -8:]) and torch.equal(mine[:, :, :8], right[:, :, :8])
    assert torch.equal(mine[:, :, 8:-8].unflatten(2, (-1, 8))[:, :, 100], mine[:, :, 8:16])
    torch.cuda.empty_cache()


# ---- configs ---------------------------------------------------------------------------------------------------------


@ops
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_config(op: str, dtype: torch.dtype) -> None:
    """Whatever is chosen, numbers are right and a repeat is bitwise equal."""
    for case in [_first(op), *(c for c in MODEL if c.op == op)]:
        case = replace(case, dtype=dtype)
        choices = configs.choices_of(case, DEVICE)
        assert choices
        for choice in choices:
            with configs.forced(choice):
                checks.check_gradients(case, DEVICE, case.spec.registered)
                checks.check_repeats(case, DEVICE, counts=(1,))
