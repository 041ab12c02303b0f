"""Batches of any dataset from any position: step n's batch depends on (seed, n) alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from snapgen import seeds

Batch = tuple[Tensor, list[str]]  # pictures [B, 3, H, W] in [-1, 1], captions


class _BatchIndices(Sampler[list[int]]):
    """Indices of batch `start`, `start` + 1, ... without end; every epoch has an order of its own."""

    def __init__(self, length: int, batch_size: int, start: int, seed: int, shuffle: bool) -> None:
        if length < 1:
            raise ValueError("data: the dataset is empty")
        self.length, self.batch_size, self.start, self.seed, self.shuffle = length, batch_size, start, seed, shuffle

    def __iter__(self) -> Iterator[list[int]]:
        position, epoch, order = self.start * self.batch_size, -1, torch.empty(0)
        while True:
            indices = []
            for place in range(position, position + self.batch_size):
                if self.shuffle and place // self.length != epoch:
                    epoch = place // self.length
                    order = torch.randperm(self.length, generator=seeds.generator(self.seed, epoch))
                offset = place % self.length
                indices.append(int(order[offset]) if self.shuffle else offset)
            position += self.batch_size
            yield indices


class _Batched(Dataset[Batch]):
    """A dataset whose item is a whole batch, drawn by the dataset's own `batch` where it has one."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __getitem__(self, indices: Sequence[int]) -> Batch:
        if hasattr(self.data, "batch"):
            return self.data.batch(indices)
        items = [self.data[index] for index in indices]
        return torch.stack([item["image"] for item in items]), [item["caption"] for item in items]


def open_dataset(source: str, resolution: int, *, seed: int = 0) -> Any:
    """The dataset that `source` names.

    Args:
        source: "shapes" for the procedural world; a folder of pictures with captions; or one or more WebDataset shards
            (a .tar file, or a pattern such as "data/{000..127}.tar").

    Raises:
        ValueError: it is none of these.
    """
    from snapgen.data.folder import ImageFolder, WebDatasetShards
    from snapgen.data.shapes import ShapesDataset

    if source == "shapes":
        return ShapesDataset(resolution, seed=seed, length=1 << 40)
    folder = Path(source)
    if source.endswith(".tar") or (folder.is_dir() and any(folder.glob("*.tar"))):
        return WebDatasetShards(source, resolution)
    if folder.is_dir():
        return ImageFolder(source, resolution)
    raise ValueError(f"data: got {source!r}; must be 'shapes', a folder, or WebDataset shards ending in .tar")


def batches(data: Any, batch_size: int, *, start: int, seed: int, workers: int = 0) -> Iterator[Batch]:
    """An endless stream of batches, beginning with batch number `start`.

    Args:
        data: map-style with `__len__`, and `__getitem__` giving {"image", "caption"} or `batch(indices)`; a
            procedural one says `procedural = True` and is read in order, being random already. Or iterable, giving
            such items; then `start` batches are read and passed over.
    """
    if hasattr(data, "__getitem__"):
        indices = _BatchIndices(len(data), batch_size, start, seed, shuffle=not getattr(data, "procedural", False))
        yield from DataLoader(_Batched(data), batch_size=None, sampler=indices, num_workers=workers)
    else:
        yield from _from_stream(data, batch_size, start)


def _from_stream(data: Any, batch_size: int, start: int) -> Iterator[Batch]:
    passed, items = 0, []
    while True:
        empty = True
        for item in data:
            empty = False
            if passed < start * batch_size:
                passed += 1
                continue
            items.append(item)
            if len(items) == batch_size:
                yield torch.stack([i["image"] for i in items]), [i["caption"] for i in items]
                items = []
        if empty:
            raise ValueError("data: the stream gave no item")
