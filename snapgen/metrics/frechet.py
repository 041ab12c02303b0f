"""Fréchet distance between two sets of pictures, by the features of a network (FID; Heusel et al. 2017).

Both sets' features are taken for Gaussians, of means m1, m2 and covariances C1, C2. Their squared distance is
|m1 - m2|^2 + tr C1 + tr C2 - 2 tr (C1^1/2 C2 C1^1/2)^1/2, computed in fp64 from streamed statistics.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from snapgen import io


class Statistics:
    """Mean and covariance of features that arrive in parts, fp64 (Chan et al. 1983: about the means throughout)."""

    def __init__(self, width: int) -> None:
        self.count = 0
        self.mean = torch.zeros(width, dtype=torch.float64)
        self._squares = torch.zeros(width, width, dtype=torch.float64)  # sum of (x - mean) (x - mean)^T

    def add(self, features: Tensor) -> None:
        """Take in features [B, width].

        Raises:
            ValueError: they have another shape, or are not finite.
        """
        if features.ndim != 2 or features.shape[1] != len(self.mean):
            raise ValueError(f"features: got shape {tuple(features.shape)}; must be [B, {len(self.mean)}]")
        if not features.isfinite().all():
            raise ValueError("features: some are not finite")
        if not len(features):
            return
        x = features.double().cpu()
        mean = x.mean(0)
        centered, delta = x - mean, mean - self.mean
        total = self.count + len(x)
        self._squares += centered.T @ centered + torch.outer(delta, delta) * (self.count * len(x) / total)
        self.mean = self.mean + delta * (len(x) / total)
        self.count = total

    @property
    def covariance(self) -> Tensor:
        """Unbiased, [width, width] fp64.

        Raises:
            ValueError: fewer than two features were taken in.
        """
        if self.count < 2:
            raise ValueError(f"statistics: got {self.count} pictures; a covariance needs at least 2")
        return self._squares / (self.count - 1)

    def save(self, path: Path, about: str) -> None:
        """Keep them, with a word on the network they are of."""
        tensors = {"mean": self.mean, "squares": self._squares, "count": torch.tensor(self.count)}
        io.save_tensors(path, tensors, {"network": about})

    @classmethod
    def load(cls, path: Path, about: str) -> Statistics:
        """Read what `save` kept.

        Raises:
            io.CheckpointError: it is damaged, or of another network than `about` says.
        """
        from safetensors import safe_open

        tensors = io.load_tensors(path)
        with safe_open(path, framework="pt") as file:
            network = (file.metadata() or {}).get("network")
        if tensors.keys() != {"mean", "squares", "count"}:
            raise io.CheckpointError(f"{path}: holds no statistics of features")
        if network != about:
            raise io.CheckpointError(f"{path}: statistics of features of {network}; must be of {about}")
        found = cls(len(tensors["mean"]))
        found.mean, found._squares, found.count = tensors["mean"], tensors["squares"], int(tensors["count"])
        return found


def statistics(features: Iterable[Tensor]) -> Statistics:
    """Statistics of features [B, width] that arrive in parts.

    Raises:
        ValueError: there are none.
    """
    found = None
    for part in features:
        found = found or Statistics(part.shape[1])
        found.add(part)
    if found is None:
        raise ValueError("statistics: got no picture")
    return found


def frechet_distance(first: Statistics, second: Statistics) -> float:
    """The squared Fréchet distance of two Gaussians, what FID reports.

    Raises:
        ValueError: the features have other widths, or there are fewer than two of them.
    """
    if first.mean.shape != second.mean.shape:
        raise ValueError(f"statistics: got features of width {len(first.mean)} and {len(second.mean)}; must be one")
    apart = (first.mean - second.mean).square().sum()
    one, two = first.covariance, second.covariance
    # tr (C1 C2)^1/2 by symmetric matrices alone: C1^1/2 C2 C1^1/2 has the eigenvalues of C1 C2, none of them negative.
    values, vectors = torch.linalg.eigh(one)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    mixed = root @ two @ root
    spread = torch.linalg.eigvalsh((mixed + mixed.T) / 2).clamp(min=0).sqrt().sum()
    return float(apart + one.trace() + two.trace() - 2 * spread)


def fid(drawn: Iterable[Tensor], real: Iterable[Tensor] | Statistics, network: Any) -> float:
    """FID of pictures that arrive in batches [B, 3, H, W] in [-1, 1], by a network of `snapgen.metrics.features`."""
    reference = real if isinstance(real, Statistics) else statistics(network(batch) for batch in real)
    return frechet_distance(statistics(network(batch) for batch in drawn), reference)
