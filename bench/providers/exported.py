"""Plain PyTorch code as a module with its weights inside and its activations as inputs, for other runtimes."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from bench import models
from bench.models import ModelCase
from bench.plain import plain
from snapgen_kernels import rope_2d
from snapgen_kernels.testing import Case, Inputs

# What changes from call to call; all else is part of the model.
_ACTIVATIONS = ("x", "q", "k", "v", "shift", "residual", "key_mask")


class _Baked(nn.Module):
    def __init__(self, case: Case, inputs: Inputs, names: tuple[str, ...]) -> None:
        super().__init__()
        self.case, self.names = case, names
        self.constants = {name: value for name, value in inputs.items() if name not in names}

    def forward(self, *activations: Tensor) -> object:
        return self.case.spec.eager({**self.constants, **dict(zip(self.names, activations, strict=True))})


def _unflatten(x: Tensor, dim: int, sizes: Sequence[int]) -> Tensor:
    at, shape = dim % x.dim(), [int(size) for size in x.shape]
    return x.reshape([*shape[:at], *(int(size) for size in sizes), *shape[at + 1 :]])


def _flatten(x: Tensor, start_dim: int = 0, end_dim: int = -1) -> Tensor:
    first, last, shape = start_dim % x.dim(), end_dim % x.dim(), [int(size) for size in x.shape]
    return x.reshape([*shape[:first], math.prod(shape[first : last + 1]), *shape[last + 1 :]])


@contextmanager
def _constant_shapes() -> Iterator[None]:
    """Sizes as constants: the exporter to ONNX takes negative dimensions of these two for others where it has lost a
    tensor's rank."""
    with mock.patch.object(Tensor, "unflatten", _unflatten), mock.patch.object(Tensor, "flatten", _flatten):
        yield


class _Constant(nn.Module):
    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value

    def forward(self, *_: Tensor) -> Tensor:
        return self.value


class _Model(nn.Module):
    """A whole model. A denoiser's sines and cosines are constants: of its time, which a tracer takes for one anyway,
    and of its rotations, which runtimes would compute in bf16."""

    def __init__(self, network: Any, side: int, time: Tensor | None) -> None:
        super().__init__()
        self.network, self.time = network, time
        self.rotations: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        if time is not None:
            sizes = [(side >> stage, side >> stage) for stage in range(len(network.config.channels))]
            self.rotations = {size: rope_2d(*size, network.config.head_dim) for size in sizes}
            network.time_proj = _Constant(network.time_proj(time))

    def forward(self, sample: Tensor, *text: Tensor) -> Tensor:
        from snapgen import unet  # here, since an op alone is exported without diffusers

        def constant(height: int, width: int, head_dim: int, device: Any) -> tuple[Tensor, Tensor]:
            return self.rotations[int(height), int(width)]

        with plain(), _constant_shapes(), mock.patch.object(unet, "rope_2d", constant):
            return models.run(self.network, (sample,) if self.time is None else (sample, self.time, *text))


def exported(case: Case | ModelCase) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The module and the activations to feed it, in fp32 and contiguous: runtimes lay out and narrow by themselves."""
    if isinstance(case, ModelCase):
        network, activations = models.network_and_feeds(case)
        # A copy of the parts, with the weights themselves where they are fp32 already.
        network = models.contiguous(network, case) if case.dtype == torch.float32 else copy.deepcopy(network)
        sample, *rest = (value.float().contiguous() for value in activations)
        model = _Model(nn.Module.float(network), case.side, rest[0] if rest else None)
        return model.eval(), (sample, *rest[1:])
    inputs: Inputs = {
        name: value.float().contiguous() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in case.inputs().items()
    }
    names = tuple(name for name in _ACTIVATIONS if isinstance(inputs.get(name), Tensor))
    return _Baked(case, inputs, names).eval(), tuple(inputs[name] for name in names)
