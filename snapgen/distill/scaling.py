"""How a distillation loss is weighed against the task's own (SnapGen, section 3.3).

S(L_task, L_kd) = lambda(t) L_task + (1 - lambda(t)) |L_task| / |L_kd| L_kd

per sample, with lambda(t) = Phi(rho(t)) of the logit-normal density rho of the training times. In the middle of the
path real data weigh more, at both of its ends the teacher does. The quotient brings the teacher's loss to the task's
size and has no gradient. The paper does not say what the normalisation Phi is; ours is rho over its maximum.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

FLOOR = 1e-8  # of |L_kd| in the quotient: below it the student has reached the teacher, and nothing is to be blown up


def density(t: Tensor) -> Tensor:
    """rho(t): the logit-normal(0, 1) density at times t in [0, 1] (SD3, equation 19); fp32, 0 at both ends."""
    return phi(t) * 4 / math.sqrt(2 * math.pi)


def phi(t: Tensor) -> Tensor:
    """Phi(rho(t)) = rho(t) / max rho, at times t in [0, 1]: 1 in the middle, 0 at both ends; fp32.

    With l = logit(t): rho = exp(-l^2 / 2) / (sqrt(2 pi) t (1 - t)), which is largest at 1/2, so that
    Phi = exp(-l^2 / 2) / (4 t (1 - t)) = exp(-l^2 / 2) cosh(l / 2)^2.
    """
    logit = torch.logit(t.float(), eps=1e-7)
    return torch.exp(-logit.square() / 2) * torch.cosh(logit / 2).square()


def scaled(task: Tensor, distilled: Tensor, share: Tensor) -> Tensor:
    """S(L_task, L_kd) for losses [B] and lambda [B]: [B]."""
    ratio = task.detach().abs() / distilled.detach().abs().clamp_min(FLOOR)
    return share * task + (1 - share) * ratio * distilled


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """How a distillation loss joins the task's.

    Raises:
        ValueError: a setting is not allowed.
    """

    scaling: Literal["timestep", "constant"] = "timestep"
    """By time, as above, or with one weight for all times: L_task + kd_weight * L_kd."""
    kd_weight: float = 1.0
    """Of the distillation loss where the scaling is constant."""

    def __post_init__(self) -> None:
        if self.scaling not in ("timestep", "constant"):
            raise ValueError(f"scaling: got {self.scaling!r}; allowed are timestep and constant")
        if not (math.isfinite(self.kd_weight) and self.kd_weight >= 0):
            raise ValueError(f"kd_weight: got {self.kd_weight}; must be finite and not negative")

    def __call__(self, task: Tensor, distilled: Tensor, t: Tensor) -> Tensor:
        """Both losses [B] at times t [B] as one: [B]."""
        if self.scaling == "timestep":
            return scaled(task, distilled, phi(t))
        return task + self.kd_weight * distilled

    def record(self) -> dict[str, Any]:
        """What decides the weights, for JSON."""
        return {"scaling": self.scaling, "kd_weight": self.kd_weight}
