"""The arithmetic of the GPU kernels: by hand at one shape, and what must hold at every shape."""

import ast
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from snapgen_kernels import costs
from snapgen_kernels.costs import FORMS, H200, Half, Kernel, choose_plan, forward, kernels, samples_in_cache, total
from snapgen_kernels.testing import Case, bench_cases

BLOCK = {"B": 8, "C": 256, "M": 512, "O": 256, "H": 128, "W": 128, "G": 32}
CASES = [case for op in costs.OPS for case in bench_cases(op) if case.dtype == torch.bfloat16]
sizes = st.integers(1, 300)


def test_it_looks_at_no_device() -> None:
    tree = ast.parse(Path(str(costs.__file__)).read_text(encoding="utf-8"))
    imported = {a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
    imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
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
