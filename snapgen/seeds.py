"""Generators that depend on a seed and a place in a run alone, so that nothing has to be saved to go on from there."""

from __future__ import annotations

import torch


def generator(seed: int, index: int) -> torch.Generator:
    """A CPU generator for place `index` of the run with this `seed`.

    PyTorch's CPU generator reads only the low 32 bits of its seed, so both are mixed into these: seeds are 2^32 / phi
    apart, which keeps the ranges of different seeds from meeting.
    """
    return torch.Generator().manual_seed((seed * 0x9E3779B1 + index) & 0xFFFFFFFF)
