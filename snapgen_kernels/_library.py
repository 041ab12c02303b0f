"""Registration of ops with PyTorch, once for all contract files.

:func:`register` makes two ops of one description: ``snapgen::<op>`` and ``snapgen::<op>_backward``. Both have a schema,
a default implementation on every device (the reference), a fake implementation and an autograd formula. Kernels are
added per
device: C++ from the extension (key CPU), Triton through the ``cuda`` arguments (key CUDA, which is also ROCm's).

The schema of the backward op follows from the forward's: the gradients of the differentiable outputs, then all forward
arguments, then the saved outputs, then ``bool[] needs`` with one entry per differentiable argument. It returns one
tensor per differentiable argument, empty where the gradient is not needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.library import Library

from snapgen_kernels import _backend

LIBRARY = Library("snapgen", "FRAGMENT")


class CostCase(Protocol):
    """What an op's ``cost`` reads of a case: named sizes (B, C, H, W, ...) and the dtype."""

    @property
    def dims(self) -> Mapping[str, int]: ...

    @property
    def dtype(self) -> torch.dtype: ...


@dataclass(frozen=True)
class Op:
    """What :func:`register` made: names, and the argument order of the forward op."""

    name: str
    arguments: tuple[str, ...]
    differentiable: tuple[str, ...]
    outputs: int
    saved: int
    reference: Callable[..., Any]
    keep_outputs: bool

    def kept(self, results: Sequence[Tensor]) -> Sequence[Tensor]:
        """What of the forward's results the backward op takes."""
        return results if self.keep_outputs else results[self.outputs :]

    def values(self, arguments: Sequence[Any], names: Sequence[str]) -> list[Any]:
        return [arguments[self.arguments.index(name)] for name in names]


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def like(tensor: Tensor, layout: Tensor) -> Tensor:
    """``tensor`` with the strides and dtype of ``empty_like(layout)``, copied only where it has others."""
    dense = layout.is_contiguous() or layout.is_contiguous(memory_format=torch.channels_last)  # empty_like keeps these
    if dense and tensor.stride() == layout.stride() and tensor.dtype == layout.dtype:
        return tensor
    target = torch.empty_like(layout)
    return tensor if tensor.stride() == target.stride() and tensor.dtype == target.dtype else target.copy_(tensor)


def _owned(gradient: Tensor | None, argument: Tensor, foreign: Sequence[Tensor]) -> Tensor:
    """A gradient as an op may return it: laid out like its argument and sharing no memory with another tensor."""
    if gradient is None:
        return torch.zeros_like(argument)
    result = like(gradient, argument)
    storages = {tensor.untyped_storage().data_ptr() for tensor in foreign}
    return result.clone() if result.untyped_storage().data_ptr() in storages else result


class _AutogradInsideKernel:
    """Lets an op's implementation use autograd, which the dispatcher has switched off by the time it is called."""

    def __enter__(self) -> None:
        keys = torch._C.DispatchKey
        excluded = torch._C._dispatch_tls_local_exclude_set()
        for key in (keys.AutogradFunctionality, keys.ADInplaceOrView):
            excluded = excluded.remove(key)
        self._guard = torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded)
        self._guard.__enter__()
        self._grad = torch.enable_grad()
        self._grad.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._grad.__exit__(*error)
        self._guard.__exit__(*error)


def _reference_vjp(op: Op, grads: Sequence[Tensor], arguments: Sequence[Any], needs: Sequence[bool]) -> list[Tensor]:
    """The backward op's default: autograd through the reference."""
    wanted = [name for name, need in zip(op.differentiable, needs, strict=True) if need]
    with _AutogradInsideKernel():
        leaves = list(arguments)
        for name in wanted:
            index = op.arguments.index(name)
            leaves[index] = leaves[index].detach().requires_grad_()
        outputs = _as_tuple(op.reference(*leaves))[: op.outputs]
        # An output that no wanted argument reaches is not part of the graph.
        reached = [(o, g) for o, g in zip(outputs, grads, strict=True) if o.requires_grad]
        inputs = op.values(leaves, wanted)
        found = iter(
            torch.autograd.grad([o for o, _ in reached], inputs, [g for _, g in reached], allow_unused=True)
            if reached
            else [None] * len(inputs)
        )
    results: list[Tensor] = []
    for name, need in zip(op.differentiable, needs, strict=True):
        argument = op.values(arguments, [name])[0]
        foreign = [*grads, *(a for a in arguments if isinstance(a, Tensor)), *results]
        results.append(_owned(next(found), argument, foreign) if need else grads[0].new_empty(0))
    return results


def register(
    name: str,
    schema: str,
    *,
    outputs: int,
    saved: int = 0,
    keep_outputs: bool = False,
    differentiable: tuple[str, ...],
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    cast: tuple[str, ...] = (),
    kernels: tuple[str, ...] = (),
    cpu: Callable[..., Any] | None = None,
    cpu_backward: Callable[..., Any] | None = None,
    cuda: Callable[..., Any] | None = None,
    cuda_backward: Callable[..., Any] | None = None,
    unsupported: Callable[..., str | None] | None = None,
) -> Op:
    """Register ``snapgen::name`` and ``snapgen::name_backward``.

    Args:
        schema: the forward's arguments in schema syntax, without parentheses and without defaults.
        outputs: how many outputs are differentiable; they come first.
        saved: how many outputs follow that only the backward reads (statistics).
        keep_outputs: the backward op takes the differentiable outputs too, before the saved ones.
        differentiable: names of the arguments that can have a gradient.
        reference: takes the forward's arguments; returns its ``outputs + saved`` outputs, built of differentiable aten
        ops.
        fake: the same on fake tensors: shapes, dtypes, strides.
        cast: names of the arguments that autocast turns into its dtype (those of convolutions and products).
        kernels: device types with fused kernels.
        cpu, cpu_backward: launchers of the C++ kernels; ``cpu_backward`` takes the backward op's arguments.
        cuda, cuda_backward: likewise, of the Triton kernels.
        unsupported: called with the forward's arguments; None, or why the launchers do not take them (fp64, say): the
            reference runs then, as it does where there is no extension or no Triton.
    """
    arguments = tuple(part.split()[-1] for part in schema.split(","))
    op = Op(name, arguments, differentiable, outputs, saved, reference, keep_outputs)
    count = outputs + saved
    LIBRARY.define(f"{name}({schema}) -> {'Tensor' if count == 1 else '(' + ', '.join(['Tensor'] * count) + ')'}")
    plain = ", ".join(part.strip() for part in schema.split(","))
    grads = ", ".join(f"Tensor grad_{i}" for i in range(outputs))
    kept = "".join(f", Tensor output_{i}" for i in range(outputs if keep_outputs else 0))
    kept += "".join(f", Tensor saved_{i}" for i in range(saved))
    gradients = ", ".join(["Tensor"] * len(differentiable))
    LIBRARY.define(f"{name}_backward({grads}, {plain}{kept}, bool[] needs) -> ({gradients})")

    def forward_default(*args: Any) -> Any:
        results = _as_tuple(reference(*args))
        shapes = _as_tuple(fake(*args))
        mine = [*args]
        laid_out = tuple(
            _owned(r, s, [a for a in mine if isinstance(a, Tensor)]) for r, s in zip(results, shapes, strict=True)
        )
        return laid_out if count > 1 else laid_out[0]

    def split(args: Sequence[Any]) -> tuple[list[Tensor], list[Any], list[bool]]:
        return list(args[:outputs]), list(args[outputs : outputs + len(arguments)]), list(args[-1])

    def backward_default(*args: Any) -> tuple[Tensor, ...]:
        return tuple(_reference_vjp(op, *split(args)))

    def backward_fake(*args: Any) -> tuple[Tensor, ...]:
        gradients, forward_args, needs = split(args)
        values = op.values(forward_args, differentiable)
        return tuple(
            torch.empty_like(value) if need else gradients[0].new_empty(0)
            for value, need in zip(values, needs, strict=True)
        )

    LIBRARY.impl(name, forward_default, "CompositeExplicitAutograd")
    LIBRARY.impl(f"{name}_backward", backward_default, "CompositeExplicitAutograd")
    torch.library.register_fake(f"snapgen::{name}", fake, lib=LIBRARY)
    torch.library.register_fake(f"snapgen::{name}_backward", backward_fake, lib=LIBRARY)
    _register_autograd(op, split)
    if cast:
        _register_autocast(op, cast)

    def on(device_type: str, launcher: Callable[..., Any], default: Callable[..., Any], first: int) -> Any:
        def launch(*args: Any) -> Any:
            objection = _backend.missing_kernel(name, device_type)
            if objection is None and unsupported is not None:
                objection = unsupported(*args[first : first + len(arguments)])
            return launcher(*args) if objection is None else default(*args)

        return launch

    default, launchers = (
        (forward_default, backward_default),
        {"cpu": (cpu, cpu_backward), "cuda": (cuda, cuda_backward)},
    )
    for device_type, pair in launchers.items():
        for index, launcher in enumerate(pair):
            if launcher is not None:
                suffix = ("", "_backward")[index]
                if device_type == "cuda":
                    launcher = on_its_device(f"snapgen::{name}{suffix}", launcher)
                kernel = on(device_type, launcher, default[index], index * outputs)
                LIBRARY.impl(name + suffix, kernel, device_type.upper())
    _backend.KERNELS[name] = kernels
    return op


def _register_autograd(op: Op, split: Callable[[Sequence[Any]], tuple[list[Tensor], list[Any], list[bool]]]) -> None:
    """Autograd of the forward op (calls the backward op) and of the backward op (differentiates the reference
    twice)."""
    forward_name, backward_name = f"snapgen::{op.name}", f"snapgen::{op.name}_backward"
    backward_op = getattr(torch.ops.snapgen, f"{op.name}_backward")

    def keep(ctx: Any, values: Sequence[Any]) -> None:
        ctx.layout = [None if isinstance(value, Tensor) else (value,) for value in values]
        ctx.save_for_backward(*(value for value in values if isinstance(value, Tensor)))

    def kept(ctx: Any) -> list[Any]:
        tensors = iter(ctx.saved_tensors)
        return [next(tensors) if constant is None else constant[0] for constant in ctx.layout]

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        keep(ctx, (*inputs, *op.kept(_as_tuple(output))))
        ctx.mark_non_differentiable(*_as_tuple(output)[op.outputs :])
        ctx.set_materialize_grads(False)  # else zeros are made for every saved output, some as large as an image
        ctx.shapes = [(o.shape, o.dtype, o.device) for o in _as_tuple(output)[: op.outputs]]

    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        values = kept(ctx)
        needed = dict(zip(op.arguments, ctx.needs_input_grad, strict=False))
        needs = [bool(needed[name]) for name in op.differentiable]
        known = [
            torch.zeros(shape, dtype=dtype, device=device) if grad is None else grad
            for grad, (shape, dtype, device) in zip(grads, ctx.shapes, strict=False)
        ]
        found = dict(
            zip(op.differentiable, zip(needs, _as_tuple(backward_op(*known, *values, needs)), strict=True), strict=True)
        )
        result = [found[n][1] if n in found and found[n][0] else None for n in op.arguments]
        return tuple(result) if len(result) > 1 else result[0]

    def setup_twice(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        keep(ctx, inputs)

    def backward_twice(ctx: Any, *grad_grads: Tensor | None) -> Any:
        values = kept(ctx)
        grads, forward_args, needs = split(values)
        deeper = torch.is_grad_enabled()  # a third derivative is asked for: stay connected to the graph
        with torch.enable_grad():

            def leaf(value: Any) -> Any:
                if not (isinstance(value, Tensor) and value.is_floating_point()):
                    return value
                return value.view_as(value) if deeper and value.requires_grad else value.detach().requires_grad_()

            grads, forward_args = [leaf(g) for g in grads], [leaf(a) for a in forward_args]
            outputs = _as_tuple(op.reference(*forward_args))[: op.outputs]
            wanted = [n for n, need in zip(op.differentiable, needs, strict=True) if need]
            reached = [(o, g) for o, g in zip(outputs, grads, strict=True) if o.requires_grad]
            first = torch.autograd.grad(
                [o for o, _ in reached],
                op.values(forward_args, wanted),
                [g for _, g in reached],
                create_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
            pairs = [
                (f, gg)
                for f, gg in zip(first, [g for g, need in zip(grad_grads, needs, strict=True) if need], strict=True)
                if gg is not None and f.requires_grad
            ]
            targets = [v for v in (*grads, *forward_args) if isinstance(v, Tensor) and v.requires_grad]
            second = iter(
                torch.autograd.grad(
                    [p[0] for p in pairs], targets, [p[1] for p in pairs], create_graph=deeper, allow_unused=True
                )
                if pairs
                else [None] * len(targets)
            )
        asked = ctx.needs_input_grad
        result: list[Tensor | None] = []
        for index, value in enumerate((*grads, *forward_args)):
            grad = next(second) if isinstance(value, Tensor) and value.requires_grad else None
            result.append(grad if asked[index] else None)
        return (*result, *([None] * (len(values) - len(result))))

    torch.library.register_autograd(forward_name, backward, setup_context=setup, lib=LIBRARY)
    torch.library.register_autograd(backward_name, backward_twice, setup_context=setup_twice, lib=LIBRARY)


def _register_autocast(op: Op, cast: tuple[str, ...]) -> None:
    forward_op = getattr(torch.ops.snapgen, op.name)
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
        torch._C.DispatchKey.AutocastCUDA
    )

    def implementation(device_type: str) -> Callable[..., Any]:
        def autocast(*args: Any) -> Any:
            dtype = torch.get_autocast_dtype(device_type)
            values = list(args)
            for name in cast:
                index = op.arguments.index(name)
                if index < len(values):
                    value = values[index]
                    if isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64:
                        values[index] = value.to(dtype)
            with torch._C._ExcludeDispatchKeyGuard(keys):
                return forward_op(*values)

        return autocast

    LIBRARY.impl(op.name, implementation("cpu"), "AutocastCPU")
    LIBRARY.impl(op.name, implementation("cuda"), "AutocastCUDA")


def dtype_seen(tensor: Tensor) -> torch.dtype:
    """The dtype in which an op sees an argument that it leaves to autocast (``cast`` of :func:`register`)."""
    device_type = tensor.device.type
    if (
        tensor.dtype == torch.float64
        or device_type not in ("cpu", "cuda")
        or not torch.is_autocast_enabled(device_type)
    ):
        return tensor.dtype
    return torch.get_autocast_dtype(device_type)


def on_its_device(name: str, launcher: Callable[..., Any]) -> Callable[..., Any]:
    """The launcher with its first tensor's GPU as the current one, inside a profiler's range."""

    def launch(*args: Any) -> Any:
        with torch.cuda.device(args[0].device), _backend.profile_range(name):
            return launcher(*args)

    return launch


def check_image(op: str, name: str, x: Tensor) -> None:
    """Raise unless ``x`` is a floating-point [B, C, H, W] tensor."""
    if x.dim() != 4:
        raise ValueError(f"{op}: {name} has shape {tuple(x.shape)}; expected four dimensions [B, C, H, W]")
    if not x.is_floating_point():
        raise TypeError(f"{op}: {name} has dtype {x.dtype}; expected a floating-point dtype")


def check_shape(op: str, name: str, tensor: Tensor | None, shape: Sequence[int], like: Tensor | None = None) -> None:
    """Raise unless ``tensor`` (None passes) has this shape and, given ``like``, that tensor's device."""
    if tensor is None:
        return
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}; expected {tuple(shape)}")
    if not tensor.is_floating_point():
        raise TypeError(f"{op}: {name} has dtype {tensor.dtype}; expected a floating-point dtype")
    if like is not None and tensor.device != like.device:
        raise ValueError(f"{op}: {name} is on device {tensor.device}; the first input is on {like.device}")


def check_groups(op: str, channels: int, num_groups: int) -> None:
    if num_groups < 1 or channels % num_groups:
        raise ValueError(f"{op}: num_groups is {num_groups}; it must divide the {channels} channels of the input")
