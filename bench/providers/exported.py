"""Plain PyTorch code as a module with its weights inside and its activations as inputs, for other runtimes."""

from __future__ import annotations

from torch import Tensor, nn

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


def exported(case: Case) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The module and the activations to feed it, in fp32 and contiguous: runtimes lay out and narrow by themselves."""
    inputs: Inputs = {
        name: value.float().contiguous() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in case.inputs().items()
    }
    names = tuple(name for name in _ACTIVATIONS if isinstance(inputs.get(name), Tensor))
    return _Baked(case, inputs, names).eval(), tuple(inputs[name] for name in names)
