"""Batches of any dataset from any position: what step n trains on depends on (seed, n) alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from snapgen import seeds
from snapgen.data.buckets import BucketOrder, Buckets
from snapgen.devices import sent
from snapgen.text import TextEmbedding


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What one forward pass trains on: pictures and captions, or what was made of them beforehand."""

    captions: list[str]
    images: Tensor | None = None
    """Pictures [B, 3, H, W] in [-1, 1]."""
    latents: Tensor | None = None
    """Scaled latents [B, C, h, w], where they were computed beforehand."""
    text: TextEmbedding | None = None
    """Embedded captions, where they were computed beforehand."""
    positions: Sequence[int] = ()
    """The samples' places in the run, which decide over their noise (`seeds.Draws`)."""
    news: Sequence[tuple[int, str]] = ()
    """What a worker could not use since its last batch: index in the dataset and reason."""

    def __len__(self) -> int:
        return len(self.captions)

    def to(self, device: torch.device | str) -> Batch:
        """The same on another device."""

        def moved(value: Tensor | None) -> Tensor | None:
            return None if value is None else sent(value, device)

        text = self.text and TextEmbedding(*(moved(part) for part in self.text))  # type: ignore[arg-type]
        return replace(self, images=moved(self.images), latents=moved(self.latents), text=text)


@dataclass(frozen=True)
class Share:
    """What one process reads of every step: `batch_size` samples are dealt out in passes of `micro_batch` to `world`
    processes in turn.

    Raises:
        ValueError: the batch cannot be dealt out evenly.
    """

    batch_size: int
    micro_batch: int
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        if self.batch_size % (self.micro_batch * self.world):
            raise ValueError(
                f"batch_size: got {self.batch_size}; must be a multiple of micro_batch times the number of processes, "
                f"{self.micro_batch} x {self.world}"
            )

    @property
    def passes(self) -> int:
        """Forward passes of this process in a step."""
        return self.batch_size // (self.micro_batch * self.world)

    def positions(self, step: int) -> Iterator[range]:
        """Of each pass in step `step`, its samples' places in the run."""
        for turn in range(self.passes):
            first = step * self.batch_size + (turn * self.world + self.rank) * self.micro_batch
            yield range(first, first + self.micro_batch)


class _Places(Sampler[Any]):
    """For every forward pass from step `start` on, without end: places in the run, and the samples that stand there.

    Every epoch has an order of its own.

    Args:
        buckets: the bucket of every sample; a step's whole batch then comes from one (`data.buckets`).
    """

    def __init__(
        self,
        length: int,
        share: Share,
        start: int,
        seed: int,
        shuffle: bool,
        buckets: Sequence[int] | None = None,
    ) -> None:
        if length < 1:
            raise ValueError("data: the dataset is empty")
        self.length, self.share, self.start, self.seed, self.shuffle = length, share, start, seed, shuffle
        self.order = None if buckets is None else BucketOrder(buckets, share.batch_size, seed)

    def __iter__(self) -> Iterator[tuple[range, list[int]]]:
        if self.order is not None:
            for step in count(self.start):
                _, chosen = self.order(step)
                for positions in self.share.positions(step):
                    yield positions, [chosen[place % self.share.batch_size] for place in positions]
        step, epoch, order = self.start, -1, torch.empty(0)
        while True:
            for positions in self.share.positions(step):
                indices = []
                for place in positions:
                    if self.shuffle and place // self.length != epoch:
                        epoch = place // self.length
                        order = torch.randperm(self.length, generator=seeds.generator(self.seed, epoch))
                    offset = place % self.length
                    indices.append(int(order[offset]) if self.shuffle else offset)
                yield positions, indices
            step += 1


class _Batched(Dataset[Batch]):
    """A dataset whose item is a whole batch, drawn by the dataset's own `batch` where it has one."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __getitem__(self, place: tuple[range, Sequence[int]]) -> Batch:
        batch = self._read(*place)
        if get_worker_info() is not None and hasattr(self.data, "news"):
            return replace(batch, news=self.data.news())
        return batch

    def _read(self, positions: Sequence[int], indices: Sequence[int]) -> Batch:
        if not hasattr(self.data, "batch"):
            return _collated([self.data[index] for index in indices], positions)
        found = self.data.batch(indices)
        if isinstance(found, Batch):
            return replace(found, positions=positions)
        images, captions = found
        return Batch(images=images, captions=captions, positions=positions)


def _collated(items: Sequence[Any], positions: Sequence[int]) -> Batch:
    images, captions = torch.stack([item["image"] for item in items]), [item["caption"] for item in items]
    return Batch(images=images, captions=captions, positions=positions)


def open_dataset(source: str, resolution: int, *, seed: int = 0, bucketing: Buckets | None = None) -> Any:
    """The dataset that `source` names.

    Args:
        source: "shapes" for the procedural world; "digits" for scikit-learn's; "imagenet:PATH" for a folder of class
            folders; a folder of pictures with captions; one or more WebDataset shards (a .tar file, or a pattern such
            as "data/{000..127}.tar"); shards to be streamed: a URL, "pipe:" and a command, or "stream:" and shards; or
            the folder of a cache (`snapgen cache`).
        bucketing: keep the pictures' aspect ratios, each in its bucket; by default their central squares are taken.

    Raises:
        ValueError: it is none of these, or its pictures are all square and `bucketing` has no use.
    """
    from snapgen.data.digits import ClassFolders, DigitsDataset
    from snapgen.data.folder import ImageFolder, WebDatasetShards
    from snapgen.data.shapes import ShapesDataset
    from snapgen.data.stream import WebDatasetStream

    if bucketing is not None and source in ("shapes", "digits"):
        raise ValueError(f"data: the pictures of {source!r} are all square; buckets have no use")
    if source == "shapes":
        return ShapesDataset(resolution, seed=seed, length=1 << 40)
    if source == "digits":
        return DigitsDataset(resolution)
    if source.startswith("imagenet:"):
        return ClassFolders(source.removeprefix("imagenet:"), resolution, bucketing=bucketing)
    if source.startswith(("stream:", "pipe:")) or "://" in source:
        if bucketing is not None:
            raise ValueError(f"data: got {source!r}; streamed shards have no buckets, which need every picture's size")
        return WebDatasetStream(source.removeprefix("stream:"), resolution)
    folder = Path(source)
    if (folder / "cache.json").is_file():
        return _cached(folder, resolution, bucketing)
    if source.endswith(".tar") or (folder.is_dir() and any(folder.glob("*.tar"))):
        return WebDatasetShards(source, resolution, bucketing=bucketing)
    if folder.is_dir():
        return ImageFolder(source, resolution, bucketing=bucketing)
    raise ValueError(
        f"data: got {source!r}; must be 'shapes', 'digits', 'imagenet:FOLDER', a folder, WebDataset shards ending "
        f"in .tar, a URL of some, or a cache"
    )


def _cached(folder: Path, resolution: int, bucketing: Buckets | None) -> Any:
    from snapgen.data.cached import CachedDataset

    data = CachedDataset(folder)
    if data.index["data"]["resolution"] not in (None, resolution):
        raise ValueError(f"data: the cache {folder} was made at {data.index['data']['resolution']}, not {resolution}")
    if bucketing is not None and list(map(tuple, bucketing.sizes)) != data.sizes:
        raise ValueError(f"data: the cache {folder} has buckets of its own, {data.sizes}; leave `bucketing` out")
    return data


def batches(data: Any, share: Share, *, start: int, seed: int, workers: int = 0) -> Iterator[Batch]:
    """An endless stream of batches, beginning with the first forward pass of step `start`.

    Args:
        data: map-style with `__len__`, and `__getitem__` giving {"image", "caption"} or `batch(indices)` giving a
            `Batch` or pictures and captions; a procedural one says `procedural = True` and is read in order, being
            random already; one with `buckets`, the bucket of every sample, has each step's batch from one of them; one
            with `news()` and `note(news)` is told here what its copies in workers could not use.
            Or with `stream(share, start=, seed=, workers=)`, which gives the batches themselves. Or iterable, giving
            such items; then what comes before `start` is read and passed over.
        share: this process's part of every step.
    """
    if hasattr(data, "stream"):
        yield from data.stream(share, start=start, seed=seed, workers=workers)
    elif hasattr(data, "batch") or hasattr(data, "__getitem__"):
        shuffle = not getattr(data, "procedural", False)
        places = _Places(len(data), share, start, seed, shuffle, getattr(data, "buckets", None))
        for batch in DataLoader(_Batched(data), batch_size=None, sampler=places, num_workers=workers):
            if batch.news:
                data.note(batch.news)
            yield batch
    else:
        yield from _from_stream(data, share, start)


def _from_stream(data: Any, share: Share, start: int) -> Iterator[Batch]:
    """Samples of an iterable dataset in its order, over and over."""
    wanted = (positions for step in count(start) for positions in share.positions(step))
    positions, items = next(wanted), []
    for place, item in enumerate(_again(data)):
        if place < positions[0]:
            continue
        items.append(item)
        if len(items) == len(positions):
            yield _collated(items, positions)
            positions, items = next(wanted), []


def _again(data: Any) -> Iterator[Any]:
    while True:
        empty = True
        for item in data:
            empty = False
            yield item
        if empty:
            raise ValueError("data: the stream gave no item")
