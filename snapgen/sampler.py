"""Sampling: diffusers' flow-match Euler, or its DDIM, with classifier-free guidance, in any number of steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from snapgen.text import TextEmbedding


def make_scheduler(shift: float = 1.0) -> Any:
    """Flow-match Euler scheduler with the timestep shift that the model was trained with."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(shift=shift)


def set_steps(scheduler: Any, steps: int, device: torch.device | str) -> Tensor:
    """Prepare `steps` steps from pure noise; returns their timesteps [steps].

    Euler's times are evenly spaced, 1 to 1/steps, before the scheduler's shift: the last step ends at 0 exactly and
    none is spent between the scheduler's smallest sigma and 0, which matters at 4 steps. DDIM's are its own.
    """
    if steps < 1:
        raise ValueError(f"num_inference_steps: got {steps}; must be at least 1")
    if not hasattr(scheduler, "sigmas"):
        scheduler.set_timesteps(steps, device=device)
        return scheduler.timesteps
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1.0 / steps, steps), device=device)
    return scheduler.timesteps


def concatenate(unconditional: TextEmbedding, conditional: TextEmbedding) -> TextEmbedding:
    """Both on the batch axis, contexts padded (and masked) to the longer of the two."""
    length = max(unconditional.context.shape[1], conditional.context.shape[1])

    def padded(text: TextEmbedding) -> tuple[Tensor, Tensor]:
        missing = length - text.context.shape[1]
        return (
            torch.nn.functional.pad(text.context, (0, 0, 0, missing)),
            torch.nn.functional.pad(text.mask, (0, missing)),
        )

    (context_a, mask_a), (context_b, mask_b) = padded(unconditional), padded(conditional)
    if unconditional.pooled is None or conditional.pooled is None:
        pooled = None
    else:
        pooled = torch.cat((unconditional.pooled, conditional.pooled))
    return TextEmbedding(torch.cat((context_a, context_b)), torch.cat((mask_a, mask_b)), pooled)


def sample(
    denoiser: Callable[..., Any],
    scheduler: Any,
    latents: Tensor,
    text: TextEmbedding,
    *,
    steps: int,
    guidance_scale: float,
    negative: TextEmbedding | None,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Go from noise `latents` [B, C, H, W] to data, along the flow or by DDIM as the scheduler does.

    With guidance w != 1, v = v_neg + w (v - v_neg), both in one forward of batch 2B (Ho and Salimans, 2022).
    """
    guided = guidance_scale != 1.0
    if guided:
        if negative is None:
            raise ValueError("negative: an embedding is needed when guidance_scale is not 1")
        text = concatenate(negative, text)
    for index, timestep in enumerate(set_steps(scheduler, steps, latents.device)):
        doubled = torch.cat((latents, latents)) if guided else latents
        predicted = denoiser(
            doubled.to(text.context.dtype), timestep, text.context, text.mask, text.pooled, return_dict=False
        )[0].float()
        if guided:
            negative_part, positive_part = predicted.chunk(2)
            predicted = torch.lerp(negative_part, positive_part, guidance_scale)
        latents = scheduler.step(predicted, timestep, latents, return_dict=False)[0]
        if on_step is not None:
            on_step(index, latents)
    return latents
