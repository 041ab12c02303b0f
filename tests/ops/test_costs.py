"""The arithmetic of the GPU kernels: by hand at one shape, and what must hold at every shape."""

import ast
import importlib
import math
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from snapgen_kernels import costs, decoder_costs, token_costs
from snapgen_kernels.costs import FORMS, H200, Half, Kernel, choose_plan, forward, kernels, samples_in_cache, total
from snapgen_kernels.testing import Case, bench_cases

BLOCK = {"B": 8, "C": 256, "M": 512, "O": 256, "H": 128, "W": 128, "G": 32}
CASES = [case for op in costs.OPS for case in bench_cases(op) if case.dtype == torch.bfloat16]
OF_TOKENS = [case for op in token_costs.OPS for case in bench_cases(op) if case.dtype == torch.bfloat16]
sizes = st.integers(1, 300)


@pytest.mark.parametrize("module", [costs, token_costs, decoder_costs], ids=["pictures", "tokens", "decoder"])
def test_it_looks_at_no_device(module: ModuleType) -> None:
    tree = ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))
    imported = {a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
    imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported -= {"snapgen_kernels.costs"}
    assert not [name for name in imported if name.split(".")[0] in ("torch", "triton", "snapgen_kernels")]


def test_a_residual_block_by_hand() -> None:
    unit = 8 * 128 * 128 * 256 * 2  # bytes of one tensor of 256 channels
    found = {kernel.name: kernel for kernel in kernels("resblock", BLOCK, 2, "fwd")}
    weights, partials = 256 * 512 * 2, 8 * 256 * 8 * 128
    assert found["1: moments"].bytes == unit + partials
    assert found["1: merge"].bytes == partials
    assert found["1: depthwise"].bytes == 2 * unit
    assert found["1: product"].bytes == 3 * unit + weights + 2 * partials  # x's half, and twice as many channels out
    assert "2: moments" not in found, "the first product leaves the statistics"
    assert found["2: depthwise"].bytes == 4 * unit
    assert found["2: product"].bytes == 4 * unit + weights  # the residual as well
    flops = 2 * 8 * 128 * 128 * 256 * 512
    assert found["1: product"].products == found["2: product"].products == flops
    # Each thread scans four columns, 16 rows down: six columns and 18 rows of inputs.
    assert found["1: depthwise"].special == unit // 2 * 6 // 4 * 18 // 16
    fused = {kernel.name: kernel for kernel in kernels("resblock", BLOCK, 2, "fwd", "fused")}
    assert fused["1: fused"].special == 9 * 2 * unit // 2, "nine taps, for each of two blocks of outputs"
    assert fused["2: fused"].bytes == 4 * unit + weights


def test_a_backward_adds_what_passes_beside_the_block() -> None:
    unit = 8 * 128 * 128 * 256 * 2
    names = [kernel.name for kernel in kernels("resblock", BLOCK, 2, "bwd")]
    assert names[0] == "2: depthwise" and names[-1] == "1: norm gradient"
    found = {kernel.name: kernel for kernel in kernels("resblock", BLOCK, 2, "bwd")}
    assert found["1: norm gradient"].bytes == 4 * unit and found["2: norm gradient"].bytes == 6 * unit
    assert found["2: depthwise backward"].bytes == 6 * unit
    blocked = {kernel.name: kernel for kernel in kernels("resblock", BLOCK, 2, "bwd", "blocked")}
    assert blocked["2: depthwise backward"].bytes == 4 * unit and blocked["2: depthwise backward"].cached == 2 * unit
    assert blocked["2: product of dy"].launches == 8 and blocked["1: product of dy"].launches == 3
    projected = [kernel.name for kernel in kernels("resblock", {**BLOCK, "O": 512}, 2, "bwd")]
    assert set(projected) - set(names) == {"2: shortcut of dy", "2: shortcut weight gradient"}


def test_a_norm_reads_its_input_twice_unless_it_stays_in_the_cache() -> None:
    dims = {"B": 16, "C": 256, "H": 128, "W": 128, "G": 32}
    unit = 16 * 128 * 128 * 256 * 2
    _, _, whole = kernels("group_norm_silu", dims, 2, "fwd")
    first, _, apply = kernels("group_norm_silu", dims, 2, "fwd", "blocked")
    assert (whole.bytes, whole.cached, whole.launches) == (2 * unit, 0, 1)
    assert (apply.bytes, apply.cached, apply.launches) == (unit, unit, 6) and first.launches == 6
    assert kernels("group_norm_silu", {**dims, "B": 1}, 2, "fwd")[2].cached == unit // 16
    gradient = {kernel.name: kernel for kernel in kernels("group_norm_silu", dims, 2, "bwd")}["gradient"]
    assert gradient.bytes == 3 * unit


def test_fp32_products_run_on_vector_units_and_need_two_special_results() -> None:
    half, single = (kernels("resblock", BLOCK, size, "fwd") for size in (2, 4))
    for narrow, wide in zip(half, single, strict=True):
        assert wide.flops == narrow.flops and wide.products == 0
        assert wide.special == 2 * narrow.special


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_cannot_beat_the_op(case: Case) -> None:
    flops, moved = case.cost()
    op = max(flops / H200.products, moved / H200.copy)
    for form in FORMS:
        assert total(kernels(case.op, case.dims, 2, "fwd", form), H200) > 0.95 * op
    assert total(kernels(case.op, case.dims, 2, "bwd"), H200) > op


def test_a_kernel_takes_as_long_as_its_slowest_part() -> None:
    for changed in ("bytes", "products", "vector", "special"):
        kernel = Kernel("one", 4300)._replace(**{changed: 10**12})
        rate = H200.copy if changed == "bytes" else getattr(H200, changed)
        assert kernel.floor(H200) == pytest.approx(1e12 / rate)
        assert kernel.seconds(H200) >= kernel.floor(H200) + H200.launch
    assert Kernel("one", 0, cached=10**12).floor(H200) == pytest.approx(1e12 / H200.l2)


def test_plans_of_the_model() -> None:
    """Nine taps a pixel are more instructions than fusion saves bytes; short blocks are not worth their launches."""
    block = choose_plan(8, 256, 512, 128, 128, 2)
    assert (block.form, block.samples) == ("split", 8)
    assert choose_plan(8, 512, 512, 64, 64, 2, norm=False, upsample=True).form == "split"
    # Another GPU, another plan: where instructions cost nothing, fusion wins; with a larger cache, long blocks do.
    quick = H200._replace(special=1e20, vector=1e20, instructions=1e20)
    assert choose_plan(8, 256, 512, 128, 128, 2, rates=quick).form == "fused"
    assert choose_plan(8, 256, 512, 128, 128, 4, rates=quick).form == "split", "fp32 is never fused"
    large = H200._replace(cache=80 << 20)
    assert choose_plan(16, 512, 256, 128, 128, 2, rates=large).samples == 4
    assert choose_plan(16, 512, 256, 128, 128, 2, rates=large._replace(launch=1e-4)).samples == 16
    assert choose_plan(8, 256, 512, 128, 128, 2) is block, "a launch looks its plan up"


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 40), sizes, sizes, sizes, sizes, st.sampled_from((2, 4)), st.booleans(), st.sampled_from((1, 2)))
def test_every_shape_has_a_plan(
    batch: int, channels: int, outputs: int, height: int, width: int, itemsize: int, norm: bool, stride: int
) -> None:
    plan = choose_plan(batch, channels, outputs, height, width, itemsize, norm=norm, stride=stride, residual=True)
    assert plan.form in ("split", "fused") and 0 < plan.seconds < math.inf
    assert min(batch, 1) <= plan.samples <= batch


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), sizes, sizes)
def test_blocks_are_even_and_fit(batch: int, channels: int, side: int) -> None:
    half = Half(batch, channels, channels, side, side, 2)
    samples = samples_in_cache(batch, half.scratch)
    if samples < batch:
        assert half.scratch * samples <= H200.cache * batch
        assert samples * (math.ceil(batch / samples) - 1) < batch
        blocked = forward(half, "blocked")
        assert {kernel.launches for kernel in blocked if kernel.name in ("depthwise", "product")} == {
            math.ceil(batch / samples)
        }
    else:
        assert half.scratch <= H200.cache or half.scratch > H200.cache * batch


# ---- the decoder's block ---------------------------------------------------------------------------------------------

DECODER = {"B": 1, "C": 128, "M": 384, "H": 1024, "W": 1024, "G": 32}
OF_DECODER = [case for case in bench_cases("decoder_block") if case.dtype == torch.bfloat16]


def test_a_decoder_block_by_hand() -> None:
    unit, flops = 1024 * 1024 * 128 * 2, 2 * 1024 * 1024 * 128 * 384
    weights, moments = 128 * 384 * 2, 8 * 384 * (1024 // 16) * (1024 // 32)
    found = {kernel.name: kernel for kernel in decoder_costs.kernels("decoder_block", DECODER, 2, "fwd")}
    assert [kernel.bytes for kernel in found.values()] == [
        2 * unit, 4 * unit + weights, 6 * unit + moments, moments + 8 * 384, 5 * unit + weights,
    ]  # fmt: skip
    assert found["1: product"].products == found["2: product"].products == flops
    assert found["2: product"].special == 3 * unit // 2, "one tanh for each value of the middle"
    wide = decoder_costs.kernels("decoder_block", {**DECODER, "C": 160, "M": 480}, 2, "fwd")[-1]
    assert wide.special == 2 * 1024 * 1024 * 480, "for each of two blocks of outputs"
    low = decoder_costs.kernels("decoder_block", DECODER, 2, "fwd", "low memory")
    assert sum(kernel.bytes for kernel in low) == 4 * unit + 3 * weights + 2 * moments + 8 * 384
    assert sum(kernel.products for kernel in low) == 3 * flops
    assert sum(kernel.launches for kernel in low) == 7 * 24 + 1
    backward = decoder_costs.kernels("decoder_block", DECODER, 2, "bwd")
    assert sum(kernel.bytes for kernel in backward) == pytest.approx((11 + 13 * 3) * unit, rel=0.02)
    assert sum(kernel.products for kernel in backward) == 5 * flops


@pytest.mark.parametrize("case", OF_DECODER, ids=str)
def test_kernels_of_the_decoder_cannot_beat_the_op(case: Case) -> None:
    for itemsize in (2, 4):
        flops, moved = replace(case, dtype=torch.float32 if itemsize == 4 else torch.bfloat16).cost()
        for mode, form in (("fwd", "whole"), ("fwd", "low memory"), ("bwd", "whole")):
            found = decoder_costs.kernels(case.op, case.dims, itemsize, mode, form)
            assert sum(kernel.bytes for kernel in found) >= moved
            assert sum(kernel.flops for kernel in found) >= 0.99 * flops  # biases and the residual are left out
            assert (sum(kernel.products for kernel in found) > 0) == (itemsize == 2)


# The kernels of each name.
DECODER_LAUNCHED = {
    "1: depthwise": "depthwise_kernel",
    "1: product": "pointwise_kernel",
    "2: depthwise": "depthwise_kernel",
    "merge": "merge_tiles_kernel",
    "2: product": "normed_product_kernel",
    "2: product of dy": "gradient_product_kernel",
    "2: weight gradient": "weight_gradient_kernel",
    "1: weight gradient": "weight_gradient_kernel",
    "sum of partials": "add_parts_kernel",
    "norm gradient": "norm_gradient_kernel",
    "2: depthwise backward": "depthwise_backward_kernel",
    "1: depthwise backward": "depthwise_backward_kernel",
    "1: product of dy": "pointwise_kernel",
}
DECODER_FILES = ("decoder_block", "decoder_block_backward", "depthwise", "depthwise_backward", "norm_backward",
                 "normed_product", "pointwise", "weight_gradient", "group_norm_silu_backward")  # fmt: skip


def test_kernels_of_the_decoder_are_those_that_are_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their launchers, watched: the same kernels in the same order, and the bytes of the tensors that each is given."""
    pytest.importorskip("triton")
    launches: list[tuple[str, int]] = []
    modules = {name: importlib.import_module(f"snapgen_kernels._triton.{name}") for name in (*DECODER_FILES, "tuning")}
    for module in modules.values():
        for name, value in list(vars(module).items()):
            if name.endswith("_kernel"):
                monkeypatch.setattr(module, name, Watched(value, launches))
    monkeypatch.setattr(modules["tuning"], "choose", lambda kernel, key, candidates, default, launch: default)
    dims = {"B": 2, "C": 128, "M": 384, "H": 128, "W": 256, "G": 32}
    case = Case("decoder_block", "watched", dims, torch.bfloat16)
    arguments = case.spec.arguments(case.inputs())
    y, *saved = modules["decoder_block"].forward(*arguments)
    split = len(launches)
    modules["decoder_block_backward"].backward(y, *arguments, *saved, [True] * 9)
    for mode, seen in (("fwd", launches[:split]), ("bwd", launches[split:])):
        left = [entry for entry in seen if entry[0] not in ("merge_sums_kernel", "parameters_kernel")]
        for kernel in decoder_costs.kernels(case.op, dims, 2, mode):
            if (mode, kernel.name) == ("bwd", "merge"):
                continue
            (name, moved), *left = left
            assert name == DECODER_LAUNCHED[kernel.name], kernel.name
            if name == "depthwise_backward_kernel":
                (added, _), *left = left
                assert added == "add_parts_kernel"  # of its weights' gradients
            if name == "norm_gradient_kernel":
                moved += saved[0].nbytes  # written where da was read
            # Weights by channel and parts of their gradients are left out.
            assert kernel.bytes == pytest.approx(moved, rel=0.02), kernel.name
        assert not left


# ---- tokens ----------------------------------------------------------------------------------------------------------


def test_self_attention_by_hand() -> None:
    dims = {"B": 16, "N": 1024, "H": 14, "D": 64, "M": 1024, "rope": 1}
    one, keys, tables, rows = 16 * 1024 * 14 * 64 * 2, 16 * 1024 * 64 * 2, 2 * 1024 * 64 * 4, 16 * 1024 * 14
    ready, attention = token_costs.kernels("attention", dims, 2, "fwd")
    assert (ready.name, ready.bytes) == ("keys", 2 * keys + tables), (
        "whole tiles of unmasked values stay where they are"
    )
    assert attention.bytes == 2 * one + 2 * keys + 4 * rows + tables
    assert attention.products == 4 * rows * 1024 * 64 and attention.special == rows * 1024
    assert attention.vector == 4 * rows * 1024 + 7 * one // 2, "the scores, and norm and rotation of the queries"
    found = {kernel.name: kernel for kernel in token_costs.kernels("attention", dims, 2, "bwd")}
    assert list(found) == ["queries", "keys", "query gradient", "key gradient", "sum of partials", "norm gradient",
                           "sum of weights' partials"]  # fmt: skip
    assert found["query gradient"].bytes == 4 * one + 2 * keys + 12 * rows
    assert found["query gradient"].products + found["key gradient"].products == 3.5 * attention.products
    # 16 samples of 8 tiles of keys: three splits each fill 132 processors twice.
    assert found["key gradient"].bytes == 2 * one + 2 * keys + 8 * rows + 2 * 3 * 4 * keys // 2


def test_cross_attention_pads_its_keys() -> None:
    dims = {"B": 4, "N": 4096, "H": 8, "D": 64, "M": 333}
    ready, attention = token_costs.kernels("attention", dims, 2, "fwd")
    given, padded = 4 * 333 * 64 * 2, 4 * 384 * 64 * 2
    assert ready.bytes == 2 * given + 2 * padded
    assert attention.products == 4 * (4 * 4096 * 8) * 333 * 64, "what pads is no work that has to be done"
    plain = {**dims, "M": 384, "norm": 0}
    names = [kernel.name for kernel in token_costs.kernels("attention", plain, 2, "fwd")]
    assert names == ["attention"], "nothing to make ready"
    names = [kernel.name for kernel in token_costs.kernels("attention", plain, 2, "bwd")]
    assert names == ["query gradient", "key gradient", "sum of partials"]


def test_norm_and_gate_by_hand() -> None:
    dims = {"B": 16, "N": 1024, "H": 14, "D": 64, "M": 1024, "rope": 1}
    elements, tables = 16 * 1024 * 15 * 64, 2 * 1024 * 64 * 4
    (forward_,) = token_costs.kernels("qk_norm_rope", dims, 2, "fwd")
    assert (forward_.bytes, forward_.vector) == (4 * elements + tables, 7 * elements)
    gradient, added = token_costs.kernels("qk_norm_rope", dims, 2, "bwd")
    assert gradient.bytes == 6 * elements + tables + added.bytes - 2 * 64 * 2 and added.bytes < 0.02 * gradient.bytes
    dims, outputs = {"B": 16, "N": 1024, "C": 896, "F": 2688}, 16 * 1024 * 2688
    (gated,) = token_costs.kernels("geglu", dims, 2, "fwd")
    assert gated.products == 4 * outputs * 896 and gated.special == outputs
    found = {kernel.name: kernel for kernel in token_costs.kernels("geglu", dims, 2, "bwd")}
    assert found["product of dh"].products == found["weight gradient"].products == gated.products
    assert found["product of dh"].bytes == (2 * outputs + 2 * 2688 * 896 + 16 * 1024 * 896) * 2
    assert 10 * outputs < found["gate gradient"].bytes < 10.1 * outputs and not found["gate gradient"].products


@pytest.mark.parametrize("case", OF_TOKENS, ids=str)
def test_kernels_of_tokens_cannot_beat_the_op(case: Case) -> None:
    """Not by bytes, not by products: the op's floor is the least of any implementation."""
    for dtype in (torch.bfloat16, torch.float32):
        flops, moved = replace(case, dtype=dtype).cost()
        for mode in ("fwd", "bwd"):
            found = token_costs.kernels(case.op, case.dims, dtype.itemsize, mode)
            assert sum(kernel.bytes for kernel in found) >= moved
            assert sum(kernel.flops for kernel in found) >= flops
            of_products = sum(kernel.products for kernel in found)
            assert (of_products > 0) == (dtype == torch.bfloat16 and case.op != "qk_norm_rope")


ODD = [
    Case("attention", "masked", {"B": 3, "N": 135, "H": 2, "D": 20, "M": 277, "mask": 1}, torch.bfloat16),
    Case("attention", "no-norm", {"B": 2, "N": 640, "H": 2, "D": 32, "M": 128, "norm": 0}, torch.bfloat16),
    Case("attention", "rope-only", {"B": 1, "N": 700, "H": 1, "D": 8, "M": 700, "norm": 0, "rope": 1}, torch.bfloat16),
    Case("geglu", "no-bias", {"B": 1, "N": 300, "C": 128, "F": 640, "bias": 0}, torch.bfloat16),
]
# The kernels of each name.
LAUNCHED = {
    "keys": "keys_kernel",
    "attention": "attention_kernel",
    "queries": "norm_rope_kernel",
    "q and k": "norm_rope_kernel",
    "query gradient": "query_gradient_kernel",
    "key gradient": "key_gradient_kernel",
    "sum of partials": "add_parts_kernel",
    "norm gradient": "norm_rope_backward_kernel",
    "sum of weights' partials": "add_weights_kernel",
    "product and gate": "geglu_kernel",
    "gate gradient": "geglu_gradient_kernel",
    "product of dh": "pointwise_kernel",
    "weight gradient": "weight_gradient_kernel",
    "sum of bias's partials": "add_parts_kernel",
}
FILES = ("attention", "attention_backward", "qk_norm_rope", "qk_norm_rope_backward", "geglu", "weight_gradient",
         "pointwise")  # fmt: skip


class Watched:
    """Stands in for a kernel: notes the tensors of each launch, and computes nothing."""

    def __init__(self, kernel: Any, launches: list[tuple[str, int]]) -> None:
        self.name, self.arguments, self.launches = kernel.fn.__name__, kernel.arg_names, launches

    def __getitem__(self, grid: object) -> Any:
        def launch(*given: Any, **flags: Any) -> None:
            named = dict(zip(self.arguments, given, strict=False))
            if self.name == "keys_kernel" and named["p_new_v"] is None:
                del named["p_v"]  # not read
            tensors = {value.data_ptr(): value.nbytes for value in named.values() if isinstance(value, torch.Tensor)}
            self.launches.append((self.name, sum(tensors.values())))

        return launch


@pytest.mark.parametrize("case", [*OF_TOKENS, *ODD], ids=str)
def test_kernels_of_tokens_are_those_that_are_launched(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their launchers, watched: the same kernels in the same order, and the bytes of the tensors that each is given."""
    pytest.importorskip("triton")
    launches: list[tuple[str, int]] = []
    modules = {name: importlib.import_module(f"snapgen_kernels._triton.{name}") for name in (*FILES, "tuning")}
    for module in modules.values():
        for name, value in list(vars(module).items()):
            if name in LAUNCHED.values():
                monkeypatch.setattr(module, name, Watched(value, launches))
    monkeypatch.setattr(modules["tuning"], "choose", lambda kernel, key, candidates, default, launch: default)
    i = case.inputs()
    if case.op == "geglu":
        forward_ = (i["x"], i["weight"], i["bias"])
        modules["geglu"].forward(*forward_, False)
        split = len(launches)
        h = i["x"].new_empty((*i["x"].shape[:2], i["weight"].shape[0]))
        dy = h[..., : case.dims["F"]].contiguous()
        modules["geglu"].backward(dy, *forward_, True, h, [True, True, i["bias"] is not None])
    elif case.op == "qk_norm_rope":
        given = (i["q"], i["k"], i["q_weight"], i["k_weight"], i["cos"], i["sin"], i["eps"])
        modules["qk_norm_rope"].forward(*given)
        split = len(launches)
        dq, dk = i["q"].clone(), i["k"].clone()
        modules["qk_norm_rope_backward"].backward(dq, dk, *given, [True] * 4)
    else:
        names = ("q", "k", "v", "key_mask", "q_weight", "k_weight", "cos", "sin", "scale", "eps")
        given = tuple(i[name] for name in names)
        o, lse = modules["attention"].forward(*given)
        split = len(launches)
        modules["attention_backward"].backward(o.clone(), *given, o, lse, [True] * 5)
    for mode, seen in (("fwd", launches[:split]), ("bwd", launches[split:])):
        left = list(seen)
        for kernel in token_costs.kernels(case.op, case.dims, 2, mode):
            mine, left = left[: kernel.launches], left[kernel.launches :]
            assert [name for name, _ in mine] == [LAUNCHED[kernel.name]] * kernel.launches, kernel.name
            moved = sum(each for _, each in mine)
            # The weights of norms and the biases, which are left out, are a part in a hundred where all is small.
            assert kernel.bytes == pytest.approx(moved, rel=0.01), kernel.name
        assert not left
