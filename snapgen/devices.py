"""Copies to a device that nobody waits for."""

from __future__ import annotations

import torch
from torch import Tensor


def sent(value: Tensor, device: torch.device | str) -> Tensor:
    """``value`` on a device. To a GPU it goes from pinned memory: a copy from any other holds the processor up until
    the GPU has done all that came before. To a CPU it is waited for."""
    if torch.device(device).type != "cuda":
        return value.to(device)
    return (value if value.is_cuda else value.pin_memory()).to(device, non_blocking=True)
