"""Weights for small models in tests."""

import torch
from torch import nn


def random_weights(module: nn.Module) -> nn.Module:
    """Weights as after training in that no norm or bias is trivial."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return module.eval()
