"""Reading a cache of latents and embedded captions, which `snapgen.data.cache` wrote."""

from __future__ import annotations

import json
import logging
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from snapgen import io
from snapgen.data.cache import VERSION, checksum
from snapgen.data.loader import Batch
from snapgen.text import TextEmbedding

OPEN = 64  # shards that a reader keeps open

log = logging.getLogger(__name__)


class _Shard(NamedTuple):
    file: str
    bucket: int
    samples: int
    sha256: str


class CachedDataset:
    """Latents and embedded captions from a cache. Map-style: an index always gives the same sample.

    A shard that is damaged is reported and counted, and its samples are stood in for by the next of the same bucket
    (of the next bucket, where nothing of it is left), the same ones every time; nothing else is lost.

    Args:
        folder: of :func:`write_cache`.
        verify: check all shards now; otherwise each when it is first read, by every process that does (a loader's
            workers each report what they meet, so only this gives one whole report).

    Attributes:
        buckets: the bucket of every sample.
        empty: the empty caption, embedded (batch 1, fp32), or None where the cache holds no captions' embeddings.

    Raises:
        io.CheckpointError: there is no complete cache, or its index is damaged.
        ValueError: no shard can be read.
    """

    def __init__(self, folder: str | Path, *, verify: bool = False) -> None:
        self.folder = Path(folder)
        if not (self.folder / "index.json").is_file():
            unfinished = (self.folder / "cache.json").is_file()
            state = (
                "is not complete; run the same `snapgen cache` again" if unfinished else "holds no cache (index.json)"
            )
            raise io.CheckpointError(f"{folder}: {state}")
        self.index = io.read_json(self.folder / "index.json")
        if self.index.get("version") != VERSION:
            raise io.CheckpointError(f"{folder}: version {self.index.get('version')} of a cache; {VERSION} is read")
        self.sizes = [tuple(size) for size in self.index["sizes"]]
        self.skipped: Counter[str] = Counter(self.index["skipped"])
        self.broken: dict[int, str] = {}  # shard -> why
        self._shards = [_Shard(**entry) for entry in self.index["shards"]]
        counts = [shard.samples for shard in self._shards]
        self._ends = list(accumulate(counts))  # of each shard, the index of its last sample + 1
        self.buckets = torch.tensor([shard.bucket for shard in self._shards]).repeat_interleave(torch.tensor(counts))
        self._open: dict[int, Any] = {}
        self._good: set[int] = set()
        self.empty = self._read_empty()
        if verify:
            for number in range(len(self._shards)):
                self._shard(number)
            if len(self.broken) == len(self._shards):
                raise ValueError(f"{folder}: no shard can be read\n{self.report()}")

    def _read_empty(self) -> TextEmbedding | None:
        if not self.index["text"]:
            return None
        path = self.folder / "empty.safetensors"
        found = io.load_tensors(path)
        if checksum(path) != self.index["empty"]:
            raise io.CheckpointError(f"{path}: damaged, its checksum is another")
        return _embedding(found)

    def __len__(self) -> int:
        return len(self.buckets)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # open files stay with their process

    def batch(self, indices: Sequence[int]) -> Batch:
        """Samples of one bucket: captions, latents [B, C, h, w] and embedded captions, fp32.

        Raises:
            ValueError: they are not of one bucket, or no shard can be read.
        """
        for index in indices:
            if not 0 <= index < len(self):
                raise IndexError(f"index {index} is outside [0, {len(self)})")
        if len(self.buckets[list(indices)].unique()) > 1:
            raise ValueError("indices: got samples of several buckets; must be of one")
        rows = [self._row(*self._usable(int(index))) for index in indices]
        stacked = {name: torch.stack([row[name] for row in rows]) for name in rows[0] if name != "captions"}
        return Batch(
            captions=[row["captions"] for row in rows],
            latents=stacked["latents"].float() if "latents" in stacked else None,
            text=_embedding(stacked) if "context" in stacked else None,
        )

    def captions(self) -> Iterator[str]:
        """Every caption whose shard can be read."""
        for number, shard in enumerate(self._shards):
            opened = self._shard(number)
            if opened is not None:
                yield from opened[1][: shard.samples]

    def report(self) -> str:
        """What is in use, and what is not, by reason."""
        lost = sum(self._shards[number].samples for number in self.broken)
        lines = [f"{self.folder}: {len(self) - lost} samples in use, {self.skipped.total()} skipped when it was made"]
        lines += [f"  {count:6d}  {reason}" for reason, count in self.skipped.most_common()]
        for number, reason in sorted(self.broken.items()):
            shard = self._shards[number]
            lines.append(f"  {shard.samples:6d}  {shard.file}: {reason}")
        return "\n".join(lines)

    def _usable(self, index: int) -> tuple[int, int]:
        """Shard and row of a sample or of its stand-in."""
        number = bisect_right(self._ends, index)
        row = index - self._ends[number] + self._shards[number].samples
        if self._shard(number) is not None:
            return number, row
        ids = sorted({shard.bucket for shard in self._shards})
        turn = ids.index(self._shards[number].bucket)
        for bucket in ids[turn:] + ids[:turn]:
            # Shards of a bucket in their order, from the broken one on.
            own = [n for n, shard in enumerate(self._shards) if shard.bucket == bucket]
            own = [n for n in own if n > number] + [n for n in own if n <= number]
            for candidate in own:
                if self._shard(candidate) is not None:
                    return candidate, row % self._shards[candidate].samples
        raise ValueError(f"{self.folder}: no shard can be read\n{self.report()}")

    def _row(self, number: int, row: int) -> dict[str, Any]:
        opened = self._shard(number)
        assert opened is not None
        file, captions = opened
        found: dict[str, Any] = {name: file.get_slice(name)[row] for name in file.keys() if name != "captions"}  # noqa: SIM118
        return {**found, "captions": captions[row]}

    def _shard(self, number: int) -> Any:
        """The open file of a shard and its captions; None if it is damaged."""
        if number in self.broken:
            return None
        if number not in self._open:
            shard = self._shards[number]
            path = self.folder / shard.file
            try:
                if number not in self._good and checksum(path) != shard.sha256:
                    return self._breaks(number, "its checksum is another")
                file = safe_open(path, framework="pt")
                captions = json.loads(file.get_tensor("captions").numpy().tobytes())
            except (OSError, SafetensorError) as error:
                return self._breaks(number, f"cannot be read ({error})")
            self._good.add(number)
            if len(self._open) >= OPEN:
                del self._open[next(iter(self._open))]
            self._open[number] = (file, captions)
        return self._open[number]

    def _breaks(self, number: int, reason: str) -> None:
        self.broken[number] = reason
        shard = self._shards[number]
        log.warning("%s: %s; others stand in for its %d samples", self.folder / shard.file, reason, shard.samples)


def _embedding(tensors: dict[str, Tensor]) -> TextEmbedding:
    pooled = tensors.get("pooled")
    return TextEmbedding(tensors["context"].float(), tensors["mask"], None if pooled is None else pooled.float())
