"""Rectified flow: the straight path from data to noise, and the training loss on its velocity.

x_t = (1 - t) x_0 + t eps,  v = eps - x_0,  t in [0, 1], 1 is noise  (SD3, equations 12 to 14; SnapGen does the same).
"""

from __future__ import annotations

import torch
from torch import Tensor

TIMESTEP_SCALE = 1000.0  # diffusers' flow-matching schedulers count t in thousandths


def sample_t(count: int, *, shift: float = 1.0, generator: torch.Generator) -> Tensor:
    """Logit-normal(0, 1) times [count] in (0, 1), fp32, shifted towards noise for high resolutions.

    `shift` s maps t to s t / (1 + (s - 1) t) (SD3, section 5.3.2).
    """
    t = torch.sigmoid(torch.randn(count, generator=generator))
    return shift * t / (1 + (shift - 1) * t)


def interpolate(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t for x_0 and noise [B, ...] and t [B]."""
    t = t.to(x0.dtype).view(-1, *(1,) * (x0.ndim - 1))
    return torch.lerp(x0, noise, t)


def velocity(x0: Tensor, noise: Tensor) -> Tensor:
    """What the denoiser predicts: eps - x_0."""
    return noise - x0


def velocity_loss(predicted: Tensor, x0: Tensor, noise: Tensor) -> Tensor:
    """Mean squared error of the velocity, per sample: [B], fp32."""
    error = predicted.float() - velocity(x0, noise).float()
    return error.square().flatten(1).mean(1)
