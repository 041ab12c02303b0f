"""The variance-preserving diffusion of Stable Diffusion and SnapFusion, in v-prediction.

z_t = a_t x + s_t eps,  v = a_t eps - s_t x,  a_t^2 + s_t^2 = 1  (Salimans and Ho, 2022; SnapFusion, section 2). So
x = a_t z_t - s_t v and eps = s_t z_t + a_t v, and a DDIM step is z_{t'} = a_{t'} x + s_{t'} eps.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

TIMES = 1000  # discrete times 0 to 999; 999 is the noisiest
CLEAN = -1  # the time before 0: no noise at all


class Rates(NamedTuple):
    """Signal a and noise s, shaped to multiply a batch [B, ...]."""

    a: Tensor
    s: Tensor


def make_scheduler() -> Any:
    """diffusers' DDIM for v-prediction on Stable Diffusion's betas (scaled linear, 0.00085 to 0.012).

    Its steps are spaced from the noisiest time ("trailing") and end at the clean latent, so that none of a few steps is
    spent where there is no noise left to take. SnapFusion does not say how it spaces its steps.
    """
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        num_train_timesteps=TIMES,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        set_alpha_to_one=True,
        clip_sample=False,
    )


def step_times(steps: int) -> list[int]:
    """The times of `steps` DDIM steps and where the last one ends: steps + 1 of them, from 999 to CLEAN.

    Those of the scheduler, so that a student is taught exactly the steps that it will take.

    Raises:
        ValueError: `steps` is not in 1 to 1000.
    """
    if not 1 <= steps <= TIMES:
        raise ValueError(f"steps: got {steps}; must be in 1 to {TIMES}")
    return [int(time) - 1 for time in np.round(np.arange(TIMES, 0, -TIMES / steps))[:steps]] + [CLEAN]


class Schedule:
    """Tables of a_t and s_t for t = -1 (clean) to 999, from a DDIM scheduler."""

    def __init__(self, scheduler: Any | None = None) -> None:
        alphas = (scheduler or make_scheduler()).alphas_cumprod.double()
        alphas = torch.cat((torch.ones(1, dtype=torch.float64), alphas))
        self._a, self._s = alphas.sqrt().float(), (1 - alphas).sqrt().float()

    def rates(self, t: Tensor, like: Tensor) -> Rates:
        """a_t and s_t of integer times t [B], with as many axes as `like` [B, ...]."""
        self._a, self._s = self._a.to(t.device), self._s.to(t.device)
        shape = (-1, *(1,) * (like.ndim - 1))
        return Rates(*(table[t + 1].view(shape) for table in (self._a, self._s)))

    def noised(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """z_t = a x + s eps."""
        a, s = self.rates(t, x)
        return a * x + s * noise

    def velocity(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """v = a eps - s x, what the denoiser predicts."""
        a, s = self.rates(t, x)
        return a * noise - s * x

    def clean(self, z: Tensor, v: Tensor, t: Tensor) -> Tensor:
        """x = a z - s v."""
        a, s = self.rates(t, z)
        return a * z - s * v

    def ddim(self, z: Tensor, v: Tensor, t: Tensor, to: Tensor) -> Tensor:
        """One deterministic DDIM step from time t to time `to`, each [B]."""
        a, s = self.rates(t, z)
        a_to, s_to = self.rates(to, z)
        return a_to * (a * z - s * v) + s_to * (s * z + a * v)

    def one_step_target(self, z: Tensor, end: Tensor, t: Tensor, to: Tensor) -> Tensor:
        """The x for which one DDIM step from z at time t lands on `end` at time `to`.

        (z_{t''} - (s_{t''} / s_t) z_t) / (a_{t''} - (s_{t''} / s_t) a_t)  (SnapFusion, section 4.2; Salimans and Ho,
        2022, appendix G).
        """
        a, s = self.rates(t, z)
        a_to, s_to = self.rates(to, z)
        return (end - s_to / s * z) / (a_to - s_to / s * a)

    def weight(self, t: Tensor) -> Tensor:
        """max(a^2 / s^2, 1), the truncated signal-to-noise ratio, of t [B]: [B]."""
        a, s = self.rates(t, t.float())
        return (a / s).square().clamp(min=1)
