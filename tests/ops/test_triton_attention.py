"""The Triton kernels of attention, norm and rotation without a GPU: properties, masks, hostile numbers, several tiles
in every direction, indices past 2^31. Under Triton's interpreter, in a process of its own (see test_triton.py)."""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from snapgen_kernels import checks
from snapgen_kernels.attention import _composed, _reference_with_statistics, reference
from snapgen_kernels.qk_norm_rope import reference as qk_norm_rope_reference
from snapgen_kernels.qk_norm_rope import rope_2d
from snapgen_kernels.testing import Case, Inputs
from tests.ops.inside import INSIDE, MISSING, assert_passes, inside, marks, outside

pytestmark = marks
DTYPES = [torch.float32, torch.bfloat16]


@outside
def test_under_the_interpreter() -> None:
    assert_passes(__file__)


@pytest.fixture(autouse=True, scope="module")
def _right_bf16() -> None:
    if INSIDE and not MISSING:
        from tests.ops.interpreter import mend_bf16

        mend_bf16()


class _Kernels(torch.autograd.Function):
    """The launchers on CPU tensors, as the op would call them on a GPU."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        from snapgen_kernels._triton import attention as kernels

        o, lse = kernels.forward(*arguments)
        ctx.arguments, ctx.saved = arguments, (o, lse)
        return o

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> Any:  # type: ignore[override]
        from snapgen_kernels._triton import attention_backward as kernels

        needs = [ctx.needs_input_grad[i] for i in (0, 1, 2, 4, 5)]
        dq, dk, dv, dwq, dwk = kernels.backward(do, *ctx.arguments, *ctx.saved, needs)
        found = (dq, dk, dv, None, dwq, dwk, None, None, None, None)
        return tuple(g if need else None for g, need in zip(found, ctx.needs_input_grad, strict=True))


def _attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    names = ("key_mask", "q_weight", "k_weight", "cos", "sin", "scale")
    return _Kernels.apply(q, k, v, *(options.get(name) for name in names), options.get("eps", 1e-6))


def _run(inputs: Inputs) -> Tensor:
    return _Kernels.apply(*Case("attention", "", {}).spec.arguments(inputs))


@contextlib.contextmanager
def _tiles(rows: int, keys: int) -> Iterator[None]:
    """Tiles of so many rows and keys, and few tokens in those of norm and rotation."""
    from snapgen_kernels._triton import tuning
    from snapgen_kernels._triton.attention import Config
    from snapgen_kernels._triton.qk_norm_rope import Config as RowConfig

    with contextlib.ExitStack() as stack:
        for kernel in ("attention", "attention_query_gradient", "attention_key_gradient"):
            stack.enter_context(tuning.forced(kernel, Config(rows, keys, 4, 2)))
        for kernel in ("qk_norm_rope", "qk_norm_rope_backward"):
            stack.enter_context(tuning.forced(kernel, RowConfig(128, 4)))
        yield


@inside
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "extra", [{"M": 45}, {"M": 37, "mask": 1}, {"M": 29, "N": 29, "rope": 1}], ids=["cross", "masked", "self"]
)
def test_several_tiles_and_parts(extra: dict[str, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    from snapgen_kernels._triton import attention_backward, common

    monkeypatch.setattr(attention_backward, "MIN_TILES", 1)
    monkeypatch.setattr(common, "processors", lambda _: 3)  # several tiles of tokens a program, several heads
    case = Case("attention", "tiles", {"B": 2, "N": 21, "H": 3, "D": 16, **extra}, dtype, bench=True)
    with _tiles(16, 16):
        checks.check_gradients(case, function=_run)
        inputs = case.inputs(requires_grad=True)
        first, again = checks.run(case, _run, inputs), checks.run(case, _run, inputs)
    assert all(torch.equal(first[name], again[name]) for name in first)


def _inputs(dtype: torch.dtype = torch.float32, keys: int = 70, tokens: int = 9) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = ((2, tokens, 3, 16), (2, keys, 16), (2, keys, 16))
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def _gradients(o: Tensor, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(o, leaves, torch.ones_like(o).cumsum(-1) / 16)


@inside
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("scale", [0.0, 1e-3, -0.25, -40.0, 1000.0])
@pytest.mark.parametrize("kind", ["whole", "tail", "masked"])
def test_scales_of_any_size_and_sign(scale: float, normed: bool, kind: str) -> None:
    keys = 99 if kind == "tail" else 128
    q, k, v = _inputs(keys=keys)
    ones = torch.ones(16) if normed else None
    mask = torch.arange(keys).expand(2, -1) < 99 if kind == "masked" else None
    wide = None if ones is None else ones.double()
    exact = reference(q.double(), k.double(), v.double(), mask, wide, wide, scale=scale)
    normal = (q, k) if ones is None else qk_norm_rope_reference(q, k, ones, ones)
    mine = _attention(q, k, v, scale=scale, q_weight=ones, k_weight=ones, key_mask=mask)
    checks.assert_close("scale", mine, _composed(*normal, v, mask, scale), exact)


@inside
@pytest.mark.parametrize("kind", ["plain", "norm", "rope"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_keys_are_not_read(dtype: torch.dtype, kind: str) -> None:
    """Their gradients are exactly zero, and NaN there changes nothing; a sample without a key gives zeros."""
    q, k, v = _inputs(dtype, tokens=70)
    weights = [torch.rand(2, 16).to(dtype) + 0.5 for _ in range(2)] if kind != "plain" else []
    leaves = [t.requires_grad_() for t in (q, k, v, *(w[0].clone() for w in weights))]
    options: dict[str, Any] = dict(zip(("q_weight", "k_weight"), leaves[3:], strict=True)) if weights else {}
    if kind == "rope":
        options |= dict(zip(("cos", "sin"), rope_2d(7, 10, 16), strict=True))
    mask = torch.rand(2, 70, generator=torch.Generator().manual_seed(5)) < 0.4
    mask[1] = False

    def both() -> tuple[Tensor, ...]:
        o = _attention(*leaves[:3], key_mask=mask, **options)
        return o, *_gradients(o, leaves)

    clean = both()
    o, _, dk, dv = clean[:4]
    assert o[0].any() and not o[1].any()
    assert not dk[~mask].any() and not dv[~mask].any() and dk[mask].any() and dv[mask].any()
    with torch.no_grad():
        k[~mask], v[~mask] = float("nan"), float("inf")
    for again, before in zip(both(), clean, strict=True):
        assert torch.equal(again, before)


@inside
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("keys", [1, 15, 63, 65, 77])
def test_keys_beyond_the_end_have_no_weight(keys: int, dtype: torch.dtype) -> None:
    """Those of zeros that fill the last tile, where every score is below zero: next to them real keys would have no
    weight, and theirs would be infinite. Not in fp32, where the rounding of lse outweighs that of such scores."""
    q, k, v = _inputs(dtype, keys=keys)
    leaves = [t.requires_grad_() for t in (q.abs() + 5, -k.abs() - 5, v)]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    plain = [t.detach().clone().requires_grad_() for t in leaves]
    with checks.poisoned_memory():
        found = [_attention(*leaves)]
        found += _gradients(found[0], leaves)
    right, eager = reference(*exact), reference(*plain)
    names = ("o", "dq", "dk", "dv")
    for name, mine, theirs, value in zip(
        names, found, [eager, *_gradients(eager, plain)], [right, *_gradients(right, exact)], strict=True
    ):
        if keys > 1 or name in ("o", "dv"):  # of one key, exact gradients of scores are zero, and ours noise
            checks.assert_close(name, mine, theirs, value)
        assert mine.isfinite().all(), name


@inside
@pytest.mark.parametrize(
    "wanted", [(False, True, False), (False, False, True), (False, True, True), (True, False, False)]
)
def test_only_what_is_wanted_is_written(wanted: tuple[bool, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """One set of parts for each gradient of keys, and one launch that adds them; the bits are those of all together."""
    from snapgen_kernels._triton import attention_backward

    leaves = [t.requires_grad_() for t in _inputs()]
    o = _attention(*leaves)
    full = _gradients(o, leaves)
    made: list[Tensor] = []
    added: list[int] = []
    new_parts, add_parts = attention_backward.new_parts, attention_backward.add_parts
    monkeypatch.setattr(attention_backward, "new_parts", lambda *a: made.append(new_parts(*a)) or made[-1])
    monkeypatch.setattr(attention_backward, "add_parts", lambda *a: added.append(len(a) - 1) or add_parts(*a))
    some = [t.detach().requires_grad_(need) for t, need in zip(leaves, wanted, strict=True)]
    asked = [t for t in some if t.requires_grad]
    found = _gradients(_attention(*some), asked)
    sets = sum(wanted[1:])
    assert [len(parts) for parts in made] == added == ([sets] if sets else [])
    for mine, right in zip(found, [g for g, need in zip(full, wanted, strict=True) if need], strict=True):
        assert torch.equal(mine, right) and mine.storage_offset() == 0


@inside
@pytest.mark.parametrize(("shared", "stages"), [(99 << 10, 2), (163 << 10, 3), (227 << 10, 3)])
def test_fewer_stages_where_shared_memory_is_small(shared: int, stages: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from snapgen_kernels._triton import attention, common

    seen: list[attention.Config] = []

    def choose(kernel: str, key: Any, candidates: Any, default: Any, launch: Any) -> Any:
        seen.extend((*candidates, default))
        return default

    monkeypatch.setattr(common, "shared_bytes", lambda _: shared)
    monkeypatch.setattr(attention.tuning, "choose", choose)
    _attention(*_inputs(torch.bfloat16))
    assert seen and {config.num_stages for config in seen} == {stages}


@inside
def test_few_keys_take_a_narrow_tile() -> None:
    from snapgen_kernels._triton import attention, attention_backward

    def chosen(keys: int) -> tuple[int, int]:
        forward = attention.filling(attention.CONFIGS, 8, 1 << 16, keys, 132)
        return forward.block_n, attention.fitting(attention_backward.KEY_CONFIGS, keys)[0].block_n

    assert [chosen(keys) for keys in (1, 33, 64)] == [(64, 64)] * 3
    assert [chosen(keys) for keys in (65, 77, 333, 4096)] == [(128, 128)] * 4


@inside
@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_in_another_order(dtype: torch.dtype) -> None:
    """Without rotation: queries permuted permute the output, keys permuted leave it as it is."""
    q, k, v = _inputs(dtype, keys=40, tokens=40)
    weight = torch.rand(16).to(dtype) + 0.5
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    plain = _attention(q, k, v, q_weight=weight, k_weight=weight)
    assert torch.equal(_attention(q[:, order], k, v, q_weight=weight, k_weight=weight), plain[:, order])
    moved = _attention(q, k[:, order], v[:, order], q_weight=weight, k_weight=weight)
    torch.testing.assert_close(moved, plain, rtol=0, atol=4 * torch.finfo(dtype).eps * plain.abs().max().item())


@inside
def test_rotated_scores_depend_on_relative_positions_alone() -> None:
    """The same tokens on another part of the grid attend alike."""
    q, k, v = _inputs(keys=20, tokens=20)

    def at(row: int, column: int) -> Tensor:
        tables = (t.view(40, 40, 16)[row : row + 4, column : column + 5].reshape(20, 16) for t in rope_2d(40, 40, 16))
        cos, sin = tables
        return _attention(q, k, v, cos=cos, sin=sin)

    torch.testing.assert_close(at(33, 21), at(0, 0), rtol=0, atol=1e-5)
    cos, sin = rope_2d(20, 1, 16)
    assert not torch.allclose(_attention(q, k, v, cos=cos, sin=sin), at(0, 0), atol=1e-2)


@inside
@pytest.mark.parametrize("shape", [(0, 4, 2, 5), (2, 0, 2, 5), (2, 4, 0, 5), (2, 4, 2, 0)])
def test_empty(shape: tuple[int, int, int, int]) -> None:
    batch, tokens, heads, keys = shape
    sizes = ((batch, tokens, heads, 8), (batch, keys, 8), (batch, keys, 8))
    leaves = [torch.randn(size, requires_grad=True) for size in sizes]
    with checks.poisoned_memory():
        o = _attention(*leaves)
        grads = torch.autograd.grad(o, leaves, torch.ones_like(o), allow_unused=True, materialize_grads=True)
    assert o.shape == sizes[0] and not o.any()
    for grad, leaf in zip(grads, leaves, strict=True):
        assert grad.shape == leaf.shape and not grad.any()


@inside
@pytest.mark.parametrize("mask", [False, True])
def test_saved_logsumexp(mask: bool) -> None:
    from snapgen_kernels._triton import attention as kernels

    case = Case("attention", "statistics", {"B": 3, "N": 7, "H": 2, "D": 8, "M": 300, "mask": int(mask)})
    inputs = case.inputs()
    exact = _reference_with_statistics(*case.spec.arguments(checks.in_double(inputs)))[1]
    found = kernels.forward(*case.spec.arguments(inputs))[1]
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=1e-6)


@inside
def test_no_eps() -> None:
    """Rows beyond the end are not normalised to NaN, nor are masked ones."""
    q, k, v = (t.requires_grad_() for t in _inputs(keys=21))
    mask = torch.arange(21).expand(2, -1) < 11
    o = _attention(q, k, v, key_mask=mask, q_weight=torch.ones(16), k_weight=torch.ones(16), eps=0.0)
    assert all(t.isfinite().all() for t in (o, *_gradients(o, [q, k, v])))


@inside
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_nan_and_inf_go_where_the_reference_sends_them(where: str, value: float) -> None:
    q, k, v = _inputs()
    {"q": q[1, 4, 1], "k": k[1, 40], "v": v[1, 40]}[where][5] = value
    mine, right = _attention(q, k, v), reference(q, k, v)
    assert torch.equal(mine.isfinite(), right.isfinite())
    assert not mine.isfinite().all() and mine[0].isfinite().all()


# ---- sizes past 2^31: only the last program of each launch runs, on memory that is touched nowhere else -------------


@pytest.fixture
def last_program(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], contextlib.AbstractContextManager[None]]]:
    from triton.runtime import interpreter

    builder, executor = interpreter.interpreter_builder, interpreter.GridExecutor
    plain = executor.__init__

    @contextlib.contextmanager
    def active() -> Iterator[None]:
        real: list[tuple[int, ...]] = []

        def init(self: Any, function: Any, names: Any, grid: Any, hooks: Any = ()) -> None:
            plain(self, function, names, (1,), hooks)
            real[:] = [(*grid, 1, 1)[:3]]

        with monkeypatch.context() as patch:
            patch.setattr(executor, "__init__", init)
            patch.setattr(executor, "_restore_args_dev", lambda *_: None)  # it would copy the memory onto itself
            patch.setattr(builder, "set_grid_dim", lambda *_: setattr(builder, "grid_dim", real[0]))
            patch.setattr(builder, "set_grid_idx", lambda *_: setattr(builder, "grid_idx", [n - 1 for n in real[0]]))
            yield

    yield active


def _untouched(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype)


@inside
def test_rows_past_2_to_the_31_elements(last_program: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from snapgen_kernels._triton import attention, attention_backward

    tail, heads, dim = 256, 14, 64
    tokens = 2**31 // (heads * dim) // 256 * 256 + tail
    assert tokens * heads * dim > 2**31
    generator = torch.Generator().manual_seed(3)
    small_q, small_do = (torch.randn(1, tail, heads, dim, generator=generator).bfloat16() for _ in range(2))
    k, v = (torch.randn(1, 128, dim, generator=generator).bfloat16() for _ in range(2))
    q, do = _untouched(1, tokens, heads, dim), _untouched(1, tokens, heads, dim)
    q[:, -tail:], do[:, -tail:] = small_q, small_do
    rest = (None, None, None, None, None, None, 1e-6)
    with _tiles(512, 128):
        small_o, small_lse = attention.forward(small_q, k, v, *rest)
    with last_program(), _tiles(512, 128):
        o, lse = attention.forward(q, k, v, *rest)
    assert torch.equal(o[0, -2:], small_o[0, -2:]) and torch.equal(lse[0, -2:], small_lse[0, -2:])
    o[:, -tail:], lse[:, -tail:] = small_o, small_lse
    # A part of each tile of rows, so that the last is of rows whose delta is known; they are not added.
    monkeypatch.setattr(attention_backward, "PROGRAMS", 1 << 30)
    monkeypatch.setattr(attention_backward, "MIN_TILES", 1)

    def last_parts(parts: torch.Tensor, *found: torch.Tensor) -> None:
        for own, out in zip(parts.chunk(len(found)), found, strict=True):
            out.copy_(own[-1].view(out.shape))

    monkeypatch.setattr(attention_backward, "add_parts", last_parts)
    needs = [True, True, True, False, False]
    with _tiles(512, 128):
        small = attention_backward.backward(small_do, small_q, k, v, *rest, small_o, small_lse, needs)
    with last_program(), _tiles(512, 128):
        large = attention_backward.backward(do, q, k, v, *rest, o, lse, needs)
    assert torch.equal(large[0][0, -2:], small[0][0, -2:])
    for mine, right in zip(large[1:3], small[1:3], strict=True):
        assert torch.equal(mine, right) and mine.any()


@inside
def test_tables_past_2_to_the_31_elements(last_program: Any) -> None:
    from snapgen_kernels._triton import qk_norm_rope, qk_norm_rope_backward

    dim, tail = 64, 32
    tokens = 2**31 // dim + tail
    cos, sin = (_untouched(tokens, dim, dtype=torch.float32) for _ in range(2))
    q, dy = _untouched(1, tokens, 1, dim), _untouched(1, tokens, 1, dim)
    k = _untouched(1, 0, dim)
    small = [torch.randn(tail, dim) for _ in range(4)]
    for large, piece in zip((cos, sin, q[0, :, 0], dy[0, :, 0]), small, strict=True):
        large[-tail:] = piece
    weight = torch.rand(dim)

    def tables(first: int) -> qk_norm_rope.Rotation:
        return qk_norm_rope.Rotation(cos[first:], sin[first:])

    first = tokens - tail
    right, _ = qk_norm_rope.apply(q[:, first:], None, weight, weight, tables(first), 1e-6)
    needs = (True, False, False, False)
    right_dq = qk_norm_rope_backward.gradients(
        dy[:, first:], k, q[:, first:], k, weight, weight, tables(first), 1e-6, needs
    ).q
    with last_program():
        mine, _ = qk_norm_rope.apply(q, None, weight, weight, tables(0), 1e-6)
        dq = qk_norm_rope_backward.gradients(dy, k, q, k, weight, weight, tables(0), 1e-6, needs).q
    assert dq is not None and right_dq is not None
    assert torch.equal(mine[0, -8:], right[0, -8:]) and mine[0, -8:].any()
    assert torch.equal(dq[0, -8:], right_dq[0, -8:]) and dq[0, -8:].any()
    assert math.isfinite(dq[0, -8:].float().sum().item())
