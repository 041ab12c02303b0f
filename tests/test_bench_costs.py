"""What a case costs at least, what the machine can do at most, and how large a case is checked."""

import math

import pytest

from bench import cases, limits
from snapgen_kernels.testing import Case, bench_cases


@pytest.mark.parametrize("case", [c for op in cases.OPS for c in bench_cases(op)], ids=str)
def test_every_case_has_costs_and_a_floor(case: Case) -> None:
    for device in ("cpu", "cuda"):
        rates, found = limits.assumed(device), cases.costs(case)
        for cost in found.values():
            assert cost.flops > 0 and cost.bytes > 0
            assert 0 < rates.floor_ms(cost, case.dtype) < math.inf
        assert found["fwd+bwd"].flops == found["fwd"].flops + found["bwd"].flops
        assert found["bwd"].bytes > found["fwd"].bytes


def test_the_backward_moves_inputs_and_gradients_once() -> None:
    case = Case("group_norm_silu", "drawn", {"B": 2, "C": 8, "H": 3, "W": 5, "G": 2})
    size = 2 * 8 * 3 * 5 * 4
    # x and dy are read, dx is written; weight and bias are read, their gradients written.
    assert cases.costs(case)["bwd"].bytes == 3 * size + 4 * 8 * 4


def test_limits_are_measured() -> None:
    rates = limits.measure("cpu", ("fp32",), 0.05)
    assert rates.measured
    assert 1e9 < rates.gemm["fp32"] < 1e14
    assert all(1e8 < rate < 1e13 for _, rate in rates.copy)
    sizes = [size for size, _ in rates.copy]
    assert rates.copy_rate(1) == rates.copy[0][1] and rates.copy_rate(1 << 40) == rates.copy[-1][1]
    between = rates.copy_rate(2 * sizes[0])
    assert min(rates.copy[0][1], rates.copy[1][1]) <= between <= max(rates.copy[0][1], rates.copy[1][1])


def test_large_pictures_are_checked_at_a_smaller_size() -> None:
    large = next(case for case in bench_cases("decoder_block") if case.name == "128ch-1024")
    smaller = cases.to_check(large, 1 << 24)
    assert smaller.dims["H"] * smaller.dims["W"] * smaller.dims["M"] <= 1 << 24
    assert (smaller.dims["C"], smaller.dims["M"]) == (large.dims["C"], large.dims["M"])
    fitting = next(case for case in bench_cases("resblock") if case.name == "256ch-128")
    assert cases.to_check(fitting, 1 << 24) is fitting
    tokens = bench_cases("attention")[0]
    assert cases.to_check(tokens, 1) is tokens
