"""What every op must pass, as functions of a :class:`~snapgen_kernels.testing.Case`. Tests call them; benchmarks call
:func:`check_values` before they time anything. Each raises AssertionError with the numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from snapgen_kernels._backend import use
from snapgen_kernels.testing import Case, Inputs

Function = Callable[[Inputs], Any]


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """``empty*`` is filled with NaN inside, also when C++ calls it: what a kernel forgets to write shows."""
    settings: Any = torch.utils.deterministic
    deterministic, fill = torch.are_deterministic_algorithms_enabled(), settings.fill_uninitialized_memory
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    # PyTorch fills memory only where its algorithms are to be deterministic; on CUDA it then refuses matrix products
    # unless the environment says CUBLAS_WORKSPACE_CONFIG, which would be too late here and is not what is asked.
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        settings.fill_uninitialized_memory = fill


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Runs with this many intra-op threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def outputs_of(value: Any) -> tuple[Tensor, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def _numbered(value: Any) -> dict[str, Tensor]:
    return {f"output {index}": output.detach() for index, output in enumerate(outputs_of(value))}


def leaves_of(case: Case, inputs: Inputs) -> dict[str, Tensor]:
    """The differentiable tensors among the inputs, by name."""
    return {n: inputs[n] for n in case.spec.op.differentiable if isinstance(inputs.get(n), Tensor)}


def in_double(inputs: Inputs) -> Inputs:
    """The same numbers in fp64, contiguous, with the same ``requires_grad``."""
    return {
        name: value.detach().double().contiguous().requires_grad_(value.requires_grad)
        if isinstance(value, Tensor) and value.is_floating_point()
        else value
        for name, value in inputs.items()
    }


def upstream_of(outputs: tuple[Tensor, ...], layout: str = "same") -> list[Tensor]:
    """Gradients to send back: laid out as the outputs, or (``strided``) deliberately not."""
    generator = torch.Generator().manual_seed(7)
    grads = [torch.randn(o.shape, generator=generator).to(o.device, o.dtype) for o in outputs]
    if layout == "strided":
        return [torch.stack((g, g), dim=-1)[..., 0] for g in grads]
    return [torch.empty_like(o).copy_(g) for o, g in zip(outputs, grads, strict=True)]


def run(case: Case, function: Function, inputs: Inputs, layout: str = "same") -> dict[str, Tensor]:
    """Outputs and all gradients of one call, by name."""
    outputs = outputs_of(function(inputs))
    leaves = leaves_of(case, inputs)
    upstream = [g.to(o.dtype) for g, o in zip(upstream_of(outputs, layout), outputs, strict=True)]
    grads = torch.autograd.grad(outputs, list(leaves.values()), upstream)
    found = _numbered(outputs)
    found.update({f"gradient of {name}": g for name, g in zip(leaves, grads, strict=True)})
    return found


def _exact(case: Case, inputs: Inputs) -> dict[str, Tensor]:
    """The reference in fp64 on the same numbers, with the gradients sent back rounded as the op's were."""
    wide = in_double(inputs)
    outputs = outputs_of(case.spec.reference(wide))
    leaves = leaves_of(case, wide)
    upstream = [g.to(case.dtype).double() for g in upstream_of(outputs)]
    grads = torch.autograd.grad(outputs, list(leaves.values()), upstream)
    found = _numbered(outputs)
    found.update({f"gradient of {name}": g for name, g in zip(leaves, grads, strict=True)})
    return found


def assert_close(name: str, mine: Tensor, eager: Tensor, exact: Tensor) -> None:
    """Error against fp64 at most twice eager's, plus one ulp of the largest value: at the worst element, and in the
    mean."""
    assert mine.shape == exact.shape, f"{name}: shape {tuple(mine.shape)}, expected {tuple(exact.shape)}"
    if exact.numel() == 0:
        return
    ulp = torch.finfo(mine.dtype).eps * exact.abs().max().item()
    mine_error, eager_error = (mine.double() - exact).abs(), (eager.double() - exact).abs()
    for which in ("max", "mean"):
        found, allowed = getattr(mine_error, which)().item(), 2 * getattr(eager_error, which)().item() + ulp
        assert found <= allowed, f"{name}: {which} error {found:.3g} against fp64; allowed {allowed:.3g}"
    if exact.numel() >= 256 and eager_error.max().item() < 0.1 * exact.abs().max().item():
        m, x = mine.double().flatten(), exact.flatten()
        cosine = (torch.dot(m, x) / (m.norm() * x.norm())).item()
        assert cosine > 0.99, f"{name}: cosine with fp64 is {cosine:.4f}"


def _draws(case: Case) -> list[Case]:
    """The case with other random numbers: the worst of few elements is luck, in eager's error as in ours, so that
    errors are taken over more draws the fewer pixels or tokens there are."""
    places = math.prod(max(case.dims.get(name, 1), 1) for name in ("B", "N", "H", "W"))
    draws = 1 if case.bench else 24 if places <= 16 else 8 if places <= 64 else 3
    return [replace(case, seed=case.seed + draw) for draw in range(draws)]


def _joined(results: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([result[name] for result in results]) for name in results[0]}


def check_values(case: Case, device: str = "cpu", function: Function | None = None) -> None:
    """Outputs against fp64 within the derived bound. ``function`` defaults to the public one."""
    mine, eager, exact = [], [], []
    with torch.no_grad():
        for draw in _draws(case):
            inputs = draw.inputs(device)
            mine.append(_numbered((function or case.spec.public)(inputs)))
            eager.append(_numbered(case.spec.eager(inputs)))
            exact.append(_numbered(case.spec.reference(in_double(inputs))))
    ours, plain, right = _joined(mine), _joined(eager), _joined(exact)
    for name, value in right.items():
        assert ours[name].dtype == case.dtype, f"{case}: {name} has dtype {ours[name].dtype}"
        assert_close(f"{case}: {name}", ours[name], plain[name], value)


def check_reference(case: Case) -> None:
    """The reference and plain PyTorch are the same function: outputs and gradients agree in fp64."""
    inputs = in_double(case.inputs(requires_grad=True))
    mine, plain = run(case, case.spec.reference, inputs), run(case, case.spec.eager, inputs)
    for name, value in plain.items():
        torch.testing.assert_close(mine[name], value, rtol=1e-9, atol=1e-9, msg=f"{case}: {name} differs in fp64")


def check_gradients(case: Case, device: str = "cpu", function: Function | None = None, layout: str = "same") -> None:
    """Outputs and every gradient against fp64 within the derived bound, in NaN-filled fresh memory."""
    mine, eager, exact = [], [], []
    for draw in _draws(case):
        inputs = draw.inputs(device, requires_grad=True)
        with poisoned_memory():
            mine.append(run(case, function or case.spec.public, inputs, layout))
        eager.append(run(case, case.spec.eager, inputs))
        exact.append(_exact(case, inputs))
    ours, plain, right = _joined(mine), _joined(eager), _joined(exact)
    for name, value in right.items():
        assert_close(f"{case}: {name}", ours[name], plain[name], value)


def _of_leaves(case: Case, function: Function) -> tuple[Callable[..., Any], tuple[Tensor, ...]]:
    inputs = in_double(case.inputs(requires_grad=True))
    leaves = leaves_of(case, inputs)

    def call(*values: Tensor) -> Any:
        return function({**inputs, **dict(zip(leaves, values, strict=True))})

    return call, tuple(leaves.values())


def check_gradcheck(case: Case) -> None:
    """Numerical derivatives in fp64 of the registered op and of the reference (fast mode: random projections)."""
    for function in (case.spec.registered, case.spec.reference):
        torch.autograd.gradcheck(*_of_leaves(case, function), fast_mode=True)


def check_gradgradcheck(case: Case) -> None:
    """Second derivatives in fp64 of the registered op and of the reference."""
    for function in (case.spec.registered, case.spec.reference):
        torch.autograd.gradgradcheck(*_of_leaves(case, function), fast_mode=True)


def check_opcheck(case: Case, device: str = "cpu") -> None:
    """PyTorch's own checks of schema, fake tensors, autograd registration and AOT dispatch; forward and backward op."""
    arguments = case.spec.arguments(case.inputs(device, requires_grad=True))
    torch.library.opcheck(getattr(torch.ops.snapgen, case.op), tuple(arguments))
    check_metadata(case, device)


def check_metadata(case: Case, device: str = "cpu") -> None:
    """What both ops return is as their fake implementations say (dtype, strides, offset), and nothing else is
    written."""
    inputs, op = case.inputs(device), case.spec.op
    forward, backward = (getattr(torch.ops.snapgen, name) for name in (op.name, f"{op.name}_backward"))
    arguments = case.spec.arguments(inputs)
    utils = ("test_schema", "test_faketensor")
    torch.library.opcheck(forward, tuple(arguments), test_utils=utils)
    outputs = outputs_of(forward(*arguments))
    upstream = upstream_of(outputs[: op.outputs])
    present = [isinstance(inputs[name], Tensor) for name in op.differentiable]
    for needs in (present, [p and i % 2 == 0 for i, p in enumerate(present)]):
        torch.library.opcheck(backward, (*upstream, *arguments, *op.kept(outputs), needs), test_utils=utils)


def check_compile(case: Case, device: str = "cpu", backend: str = "aot_eager") -> None:
    """``torch.compile(fullgraph=True)`` of the public function: values, strides and gradients of the plain call."""
    inputs = case.inputs(device, requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(case.spec.public, fullgraph=True, backend=backend)
    plain, traced = outputs_of(case.spec.public(inputs)), outputs_of(compiled(inputs))
    for p, t in zip(plain, traced, strict=True):
        assert p.stride() == t.stride(), f"{case}: strides {t.stride()} compiled, {p.stride()} plain"
    plain_results, traced_results = run(case, case.spec.public, inputs), run(case, compiled, inputs)
    exact = _exact(case, inputs)
    for name, value in exact.items():
        assert_close(f"{case}: compiled {name}", traced_results[name], plain_results[name], value)


def check_repeats(case: Case, device: str = "cpu", counts: tuple[int, ...] = (1, 2, 5)) -> None:
    """Bitwise the same outputs and gradients on a repeat, and for each number of threads where a kernel of ours
    runs."""
    inputs = case.inputs(device, requires_grad=True)
    function = case.spec.registered
    with threads(counts[0]):
        first, again = run(case, function, inputs), run(case, function, inputs)
    for name, value in first.items():
        assert torch.equal(value, again[name]), f"{case}: {name} differs between two runs"
    if device in case.spec.kernels():
        for count in counts[1:]:
            with threads(count):
                other = run(case, function, inputs)
            for name, value in first.items():
                assert torch.equal(value, other[name]), f"{case}: {name} differs between 1 and {count} threads"


def check_reference_mode(case: Case) -> None:
    """``use("reference")`` gives the reference's numbers and leaves no op of ours in an exported graph."""

    class Module(torch.nn.Module):
        def forward(self, tensors: dict[str, Tensor]) -> Any:
            return case.spec.public({**inputs, **tensors})

    inputs = case.inputs()
    tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
    with use("reference"):
        mine = outputs_of(case.spec.public(inputs))
        graph = torch.export.export(Module(), (tensors,)).graph
    for m, r in zip(mine, outputs_of(case.spec.reference(inputs)), strict=True):
        assert torch.equal(m, r), f"{case}: use('reference') and the reference differ"
    ours = [str(node.target) for node in graph.nodes if "snapgen" in str(node.target)]
    assert not ours, f"{case}: the exported graph holds {ours}"
