"""Rectified flow: the straight path from data to noise, and the training loss on its velocity.

x_t = (1 - t) x_0 + t eps,  v = eps - x_0,  t in [0, 1], 1 is noise  (SD3, equations 12 to 14; SnapGen does the same).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

TIMESTEP_SCALE = 1000.0  # diffusers' flow-matching schedulers count t in thousandths


def times(normal: Tensor, *, shift: float = 1.0) -> Tensor:
    """Logit-normal(0, 1) times in (0, 1) of standard normal numbers, shifted towards noise for high resolutions.

    `shift` s maps t to s t / (1 + (s - 1) t) (SD3, section 5.3.2).
    """
    return shifted(torch.sigmoid(normal), shift)


def shifted(t: Tensor, shift: float) -> Tensor:
    """Times t in [0, 1] as a schedule with this `shift` has them: s t / (1 + (s - 1) t)."""
    return shift * t / (1 + (shift - 1) * t)


def resolution_shift(shift: float, pixels: int, base: int) -> float:
    """The shift for pictures of `pixels` pixels, of one for `base` pixels (SD3, equation 23).

    Noise hides less of a larger picture: at equal certainty t / (1 - t) grows with the square root of the pixels.
    """
    return shift * math.sqrt(pixels / base)


def interpolate(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t for x_0 and noise [B, ...] and t [B]."""
    return torch.lerp(x0, noise, per_sample(t, x0))


def clean(x_t: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """x_0 = x_t - t v, of a point on the path [B, ...], the velocity there and t [B]."""
    return x_t - per_sample(t, x_t) * v


def velocity(x0: Tensor, noise: Tensor) -> Tensor:
    """What the denoiser predicts: eps - x_0."""
    return noise - x0


def velocity_loss(predicted: Tensor, x0: Tensor, noise: Tensor) -> Tensor:
    """Mean squared error of the velocity, per sample: [B], fp32."""
    error = predicted.float() - velocity(x0, noise).float()
    return error.square().flatten(1).mean(1)


def per_sample(t: Tensor, like: Tensor) -> Tensor:
    """t [B] with as many axes as `like` [B, ...], in its dtype."""
    return t.to(like.dtype).view(-1, *(1,) * (like.ndim - 1))
