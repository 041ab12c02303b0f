"""Copies to a device that nobody waits for."""

from __future__ import annotations

import torch
from torch import Tensor


def sent(value: Tensor, device: torch.device | str) -> Tensor:
    """``value`` on a device. To a GPU it goes from pinned memory: a copy from any other holds the processor up until
    the GPU has done all that came before."""
    if torch.device(device).type == "cuda" and not value.is_cuda:
        value = value.pin_memory()
    return value.to(device, non_blocking=True)
