"""GroupNorm + SiLU's Triton kernels under every choice that the launchers can make: tiles, groups of samples, 64-bit
offsets, the fast formulas. Under Triton's interpreter, in a process of its own; the rules are plain Python."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from snapgen_kernels import checks
from snapgen_kernels.group_norm_silu import statistics
from snapgen_kernels.testing import Case, bench_cases
from tests.ops.inside import INSIDE, MISSING, assert_passes, inside, marks, outside

pytestmark = marks

NAME = "group_norm_silu"
MODEL = [case for case in bench_cases(NAME) if case.dtype == torch.bfloat16 and "ch-" in case.name]
DIMS = {"B": 3, "C": 40, "H": 7, "W": 9, "G": 4}


@outside
def test_under_the_interpreter() -> None:
    assert_passes(__file__)


@pytest.fixture
def kernels() -> Iterator[ModuleType]:
    from snapgen_kernels._triton import group_norm_silu, tuning

    tuning.forget()
    yield group_norm_silu
    tuning.forget()


@pytest.fixture(autouse=True, scope="module")
def _right_bf16() -> None:
    if INSIDE and not MISSING:
        from tests.ops.interpreter import mend_bf16

        mend_bf16()


class _Kernels(torch.autograd.Function):
    """The launchers on CPU tensors, as the op would call them on a GPU."""

    @staticmethod
    def forward(ctx, x, num_groups, weight, bias, eps):  # type: ignore[no-untyped-def]
        from snapgen_kernels._triton import group_norm_silu as kernels

        y, mean, rstd = kernels.forward(x, num_groups, weight, bias, eps)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.rest = (num_groups, eps)
        return y

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        from snapgen_kernels._triton import group_norm_silu_backward as kernels

        x, weight, bias, mean, rstd = ctx.saved_tensors
        groups, eps = ctx.rest
        dx, dweight, dbias = kernels.backward(dy, x, groups, weight, bias, eps, mean, rstd, [True] * 3)
        return dx, None, dweight, dbias, None


def _call(inputs: dict[str, Any]) -> Tensor:
    return _Kernels.apply(inputs["x"], inputs["num_groups"], inputs["weight"], inputs["bias"], inputs["eps"])


def _results(case: Case) -> dict[str, Tensor]:
    with checks.poisoned_memory():
        return checks.run(case, _call, case.inputs(requires_grad=True))


@inside
@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
@pytest.mark.parametrize("samples", [1, 2])
def test_groups_of_samples_change_no_bit(kernels: ModuleType, layout: str, samples: int) -> None:
    from snapgen_kernels._triton import tuning

    case = Case(NAME, "groups", DIMS, layout=layout)
    whole, group = _results(case), kernels.Group(samples)
    with tuning.forced(f"{NAME}.forward", group), tuning.forced(f"{NAME}.backward", group):
        for name, value in _results(case).items():
            assert torch.equal(value, whole[name]), name


@inside
@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_a_sample_does_not_depend_on_its_batch(kernels: ModuleType, layout: str) -> None:
    inputs = Case(NAME, "batch", DIMS, layout=layout).inputs()
    together = _call(inputs)
    for index in range(DIMS["B"]):
        assert torch.equal(_call({**inputs, "x": inputs["x"][index : index + 1]})[0], together[index])


TILES = {"channels_last": ("CHANNELS_LAST", "NARROW"), "contiguous": ("CONTIGUOUS", "SMALL")}


@inside
@pytest.mark.parametrize("layout", TILES)
def test_every_tile(kernels: ModuleType, layout: str) -> None:
    """Masked in both directions, and whole tiles; in bf16, since the interpreter adds hundreds of values one by one,
    with more fp32 error than a GPU's tree."""
    from snapgen_kernels._triton import tuning

    for tile in [tile for name in TILES[layout] for tile in getattr(kernels, name)]:
        whole = {"B": 1, "C": 2 * tile.block_c, "H": tile.block_p // 8, "W": 8, "G": 4}
        with contextlib.ExitStack() as stack:
            for which in ("moments", "apply", "sums", "gradient"):
                stack.enter_context(tuning.forced(f"{NAME}.{which}", tile))
            for dims in (DIMS, whole):
                case = Case(NAME, f"tile-{tile}", dims, torch.bfloat16, layout, bench=True)
                checks.check_gradients(case, function=_call)


@inside
@pytest.mark.parametrize("layout", TILES)
def test_long_offsets(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch, layout: str) -> None:
    """Those of tiles that span more than 2^31 elements give the same bits."""
    case = Case(NAME, "long", DIMS, layout=layout)
    short = _results(case)
    monkeypatch.setattr(kernels, "MAX_OFFSET", 0)
    assert kernels.image_of(case.inputs()["x"]).constants(kernels.SMALL[0])["LONG"]
    for name, value in _results(case).items():
        assert torch.equal(value, short[name]), name


@inside
def test_the_fast_formulas(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an exact tanh in place of the instruction, which the interpreter has not."""
    from snapgen_kernels._triton import common, group_norm_silu_backward
    from tests.ops.interpreter import exact_tanh

    monkeypatch.setattr(common, "tanh_approx", exact_tanh)
    monkeypatch.setattr(group_norm_silu_backward, "tanh_approx", exact_tanh)
    called: list[torch.dtype] = []
    monkeypatch.setattr(common, "fast", lambda dtype: called.append(dtype) or True)
    checks.check_gradients(Case(NAME, "fast", DIMS, torch.bfloat16), function=_call)
    assert called


@inside
@pytest.mark.parametrize("layout", ["channels_last", "contiguous", "sliced"])
def test_moments_alone(kernels: ModuleType, layout: str) -> None:
    x = Case(NAME, "moments", DIMS, layout=layout, offset=50.0).inputs()["x"]
    for mine, exact in zip(kernels.moments(x, 4, 1e-5), statistics(x.double(), 4, 1e-5), strict=True):
        torch.testing.assert_close(mine.double(), exact, rtol=1e-5, atol=0)
    for nothing in kernels.moments(x[:, :, :0], 4, 1e-5):
        assert nothing.shape == (3, 4) and nothing.isnan().all()


@inside
def test_merging_chunks_of_a_producer(kernels: ModuleType) -> None:
    """Chunks of 16 pixels whose last is shorter, with statistics as another kernel would write them."""
    x = Case(NAME, "merge", DIMS, offset=50.0).inputs()["x"].double()
    chunks = x.flatten(2).split(16, dim=2)
    means = torch.stack([chunk.mean(2) for chunk in chunks], dim=1)
    squares = torch.stack([chunk.var(2, correction=0) * chunk.shape[2] for chunk in chunks], dim=1)
    part = torch.stack((means, squares)).float()
    found = kernels.merge_moments(part, DIMS["H"] * DIMS["W"], 16, 4, 1e-5)
    for mine, exact in zip(found, statistics(x, 4, 1e-5), strict=True):
        torch.testing.assert_close(mine.double(), exact, rtol=1e-5, atol=0)


@inside
def test_frozen_inputs(kernels: ModuleType) -> None:
    """Each gradient alone equals that of a full backward."""
    from snapgen_kernels._triton.group_norm_silu_backward import backward

    case = Case(NAME, "needs", DIMS)
    inputs = case.inputs()
    _, mean, rstd = kernels.forward(*case.spec.arguments(inputs))
    arguments = (torch.ones_like(inputs["x"]), *case.spec.arguments(inputs), mean, rstd)
    full = backward(*arguments, [True] * 3)
    for index in range(3):
        needs = [index == other for other in range(3)]
        found = backward(*arguments, needs)
        for other in range(3):
            assert torch.equal(found[other], full[other]) if needs[other] else found[other].numel() == 0


@inside
def test_tuning(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every choice is measured, and results stay right when the slowest by rule wins."""
    from snapgen_kernels._triton import tuning

    monkeypatch.setenv("SNAPGEN_CACHE", str(tmp_path))
    monkeypatch.setattr(tuning, "_device_name", lambda index: "NVIDIA H200")
    tuning.forget()
    count = 0

    def timer(function: Any) -> float:
        nonlocal count
        function()
        count += 1
        return -float(count)  # the last candidate wins

    case = Case(NAME, "tuning", DIMS)
    with tuning.tuning(timer):
        checks.check_gradients(case, function=_call)
    tiles = len(kernels._tiles(40, 63, True, 4))
    groups = len(kernels._groups(3, 1, 100))
    assert count == 4 * tiles + 2 * groups
    measured = count
    image = kernels.image_of(case.inputs()["x"])
    assert kernels.chosen(f"{NAME}.moments", image, print) == kernels._tiles(40, 63, True, 4)[-1]
    checks.check_gradients(case, function=_call)
    assert count == measured, "an ordinary call measures nothing"


@outside
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("channels", [1, 8, 32, 33, 48, 64, 65, 96, 256, 320, 896, 1792])
def test_rules_choose_among_compiled_candidates(channels: int, last: bool, dtype: torch.dtype) -> None:
    from snapgen_kernels._triton import group_norm_silu as kernels
    from snapgen_kernels._triton import group_norm_silu_backward

    def listed(file: ModuleType) -> set[tuple[Any, ...]]:
        return {
            (c["BLOCK_P"], c["BLOCK_C"], build.options["num_warps"], "s_c" in c)
            for build in file.builds(dtype, True)
            if build.divisible
            for c in [build.constants]
        }

    compiled = listed(kernels) & listed(group_norm_silu_backward)
    for pixels in (1, 63, 512, 1024, 16384):
        size = (channels, pixels, last, dtype.itemsize)
        assert kernels._reading(*size) in kernels._tiles(*size)
        assert kernels._writing(*size) in kernels._tiles(*size)
        assert {(*tile, last) for tile in kernels._tiles(*size)} <= compiled


@outside
@pytest.mark.parametrize("case", MODEL, ids=str)
def test_one_sample_fills_the_gpu(case: Case) -> None:
    """At batch 1 there are two programs for each of 132 multiprocessors, in both passes."""
    import triton

    from snapgen_kernels._triton import group_norm_silu as kernels

    channels, pixels = case.dims["C"], case.dims["H"] * case.dims["W"]
    for rule in (kernels._reading, kernels._writing):
        tile = rule(channels, pixels, True, 2)
        programs = triton.cdiv(channels, tile.block_c) * triton.cdiv(pixels, tile.block_p)
        assert programs >= 264 or tile.block_p * tile.block_c * 2 < 10_000, (tile, programs)


@outside
def test_groups_fit_in_the_cache() -> None:
    from snapgen_kernels._triton import group_norm_silu as kernels

    sample, cached = 256 * 128 * 128 * 2, 60 << 20
    assert kernels._groups(1, sample, cached) == (kernels.Group(1),)
    assert kernels._group_rule(16, sample, cached) == 4
    assert kernels._group_rule(16, 2 * sample, cached) == 2
    assert kernels._group_rule(5, sample, cached) == 3, "two groups of nearly equal size"
    assert kernels._group_rule(16, cached, cached) == 16, "a sample that does not fit gains nothing from a group"
    assert kernels._groups(16, sample, cached) == tuple(map(kernels.Group, (4, 2, 8, 16)))
