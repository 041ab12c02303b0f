"""Latents and embedded captions, computed once and kept in shards of safetensors with checksums.

A shard is a function of the data, the encoders and its number. So a run that was killed anywhere is taken up again by
running the same command, and gives the same bytes; and processes share the work without talking to each other: each
takes every n-th shard, and whoever finds all of them there writes the index.

A folder holds
    empty.safetensors            the empty caption, embedded, where captions are
    shard-00000.safetensors ...  latents [n, C, h, w], scaled as the denoiser takes them; context [n, L, D],
                                 mask [n, L] and pooled [n, P]; captions, a JSON list as UTF-8 bytes
    shard-00000.json ...         its SHA-256, bucket, samples, and what could not be used, by reason
    index.json                   all of that, once the cache is complete
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from snapgen import io
from snapgen.data.buckets import NONE
from snapgen.data.embed import DTYPES, FrozenText, LatentEncoder
from snapgen.text import TextEmbedding

VERSION = 1


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """How a cache is laid out. All of it but `workers` decides its bytes."""

    shard_size: int = 1024
    """Samples of a shard."""
    batch_size: int = 16
    """Samples that the encoders are given at once."""
    dtype: str = "bf16"
    """What is stored: bf16 or fp32."""
    workers: int = 0
    """Processes that read pictures; 0 reads in this one."""

    def __post_init__(self) -> None:
        for name in ("shard_size", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}; must be at least 1")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype: got {self.dtype!r}; allowed are {', '.join(DTYPES)}")


def write_cache(
    data: Any,
    out: Path,
    *,
    encoder: LatentEncoder | None,
    text: FrozenText | None,
    config: CacheConfig = CacheConfig(),
    rank: int = 0,
    world: int = 1,
    console: Console | None = None,
) -> bool:
    """Compute this process's shards that are not there yet. Returns whether the cache is complete now.

    Args:
        data: a map-style dataset of `snapgen.data`. Pairs that it cannot use are left out and counted.
        encoder, text: what is computed; either may be None.
        rank, world: this process takes shards rank, rank + world, ...

    Raises:
        ValueError: neither encoder is given, or `out` holds another cache.
        OSError: the disk is full; what was finished stays.
        FloatingPointError: an encoder gave values that are not finite.
    """
    if encoder is None and text is None:
        raise ValueError("cache: neither an encoder of pictures nor one of captions is given")
    if not 0 <= rank < world:
        raise ValueError(f"rank: got {rank} of {world} processes")
    plan = _plan(data, config.shard_size)
    opened = dict(sorted(getattr(data, "skipped", Counter()).items()))  # found unusable when it was opened
    record = {
        "version": VERSION,
        "data": _described(data),
        "sizes": [list(size) for size in getattr(data, "sizes", ())],
        "encoder": encoder and encoder.record(),
        "text": text and text.record(),
        "shard_size": config.shard_size,
        "batch_size": config.batch_size,
        "dtype": config.dtype,
        "skipped_at_opening": opened,
    }
    _claim(out, record)
    if world == 1:  # what a killed run was writing; of shards, whoever writes them looks himself
        for left in (left for name in ("cache", "empty", "index") for left in out.glob(f".{name}-*")):
            left.unlink(missing_ok=True)
    store = DTYPES[config.dtype]
    if text is not None:
        _write_empty(out, text, store)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    own = [number for number in range(len(plan)) if number % world == rank]
    with Progress(*columns, console=console, disable=console is None) as bar:
        line = bar.add_task("samples", total=sum(len(plan[number][1]) for number in own))
        for number in own:
            bucket, indices = plan[number]
            if not _finished(out, number):
                _write_shard(out, number, bucket, data, indices, encoder, text, config)
            bar.advance(line, len(indices))
    return _write_index(out, record, len(plan))


def _plan(data: Any, shard_size: int) -> list[tuple[int, list[int]]]:
    """Each shard's bucket and samples."""
    buckets = getattr(data, "buckets", None)
    if buckets is None:
        members: dict[int, Sequence[int]] = {0: range(len(data))}
    else:
        found: dict[int, list[int]] = {}
        for index, bucket in enumerate(buckets):
            if bucket != NONE:
                found.setdefault(int(bucket), []).append(index)
        members = dict(sorted(found.items()))
    return [
        (bucket, list(own[first : first + shard_size]))
        for bucket, own in members.items()
        for first in range(0, len(own), shard_size)
    ]


def _described(data: Any) -> dict[str, Any]:
    """What dataset this is: its kind, length, resolution, and a checksum over its samples' names, where it has any."""
    found = {"kind": type(data).__name__, "samples": len(data), "resolution": getattr(data, "resolution", None)}
    if hasattr(data, "_name"):
        digest = hashlib.sha256()
        for index in range(len(data)):
            digest.update(data._name(index).encode("utf-8", "surrogateescape") + b"\0")
        found["names"] = digest.hexdigest()
    return found


def _claim(out: Path, record: dict[str, Any]) -> None:
    """Record what this cache is, or check that `out` holds the same one."""
    out.mkdir(parents=True, exist_ok=True)
    path, own = out / "cache.json", json.loads(json.dumps(record))
    if path.exists():
        there = io.read_json(path)
        wrong = [key for key in sorted(own.keys() | there.keys()) if own.get(key) != there.get(key)]
        if wrong:
            listed = "; ".join(f"{key} was {there.get(key)!r}, now {own.get(key)!r}" for key in wrong)
            raise ValueError(f"{out} holds another cache ({listed}); choose another directory")
    elif any(out.glob("shard-*")):
        raise ValueError(f"{out} holds shards, but no cache.json that says of what; choose another directory")
    else:
        io.write_json(path, own)


def _write_empty(out: Path, text: FrozenText, store: torch.dtype) -> None:
    io.save_tensors(out / "empty.safetensors", _text_tensors(text([""]), store))


def _finished(out: Path, number: int) -> bool:
    """Whether a shard is there, whole and unharmed; removes what a killed run was writing of it."""
    for left in out.glob(f".{_stem(number)}-*"):
        left.unlink(missing_ok=True)
    note, shard = out / f"{_stem(number)}.json", out / f"{_stem(number)}.safetensors"
    if not note.is_file():
        return False
    recorded = io.read_json(note)["sha256"]
    return recorded is None or (shard.is_file() and checksum(shard) == recorded)


def _write_shard(
    out: Path,
    number: int,
    bucket: int,
    data: Any,
    indices: list[int],
    encoder: LatentEncoder | None,
    text: FrozenText | None,
    config: CacheConfig,
) -> None:
    store = DTYPES[config.dtype]
    parts: dict[str, list[Tensor]] = {}
    captions: list[str] = []
    skipped: Counter[str] = Counter()
    chunks = [indices[first : first + config.batch_size] for first in range(0, len(indices), config.batch_size)]
    # Read in the main process's own order, whatever the number of workers.
    reader = DataLoader(_Chunks(data), batch_size=None, sampler=chunks, num_workers=config.workers)
    for images, texts, reasons in reader:
        skipped.update(reasons)
        if not texts:
            continue
        captions += texts
        made: dict[str, Tensor] = {}
        if encoder is not None:
            made["latents"] = encoder(images).to(store)
        if text is not None:
            made |= _text_tensors(text(texts), store)
        for name, value in made.items():
            if value.is_floating_point() and not value.isfinite().all():
                raise FloatingPointError(f"cache: {name} of {texts[0][:60]!r} or the next are not finite")
            parts.setdefault(name, []).append(value)
    sha256 = None
    if captions:
        tensors = {name: torch.cat(values) for name, values in parts.items()}
        listed = json.dumps(captions, ensure_ascii=False).encode()
        tensors["captions"] = torch.frombuffer(bytearray(listed), dtype=torch.uint8)
        path = out / f"{_stem(number)}.safetensors"
        io.save_tensors(path, tensors)
        sha256 = checksum(path)
    note = {"bucket": bucket, "samples": len(captions), "sha256": sha256, "skipped": dict(sorted(skipped.items()))}
    io.write_json(out / f"{_stem(number)}.json", note)


class _Chunks(Dataset[Any]):
    """Of a list of indices: the pictures [B, 3, H, W] in [-1, 1] and captions that can be used, and a count of the
    reasons why others cannot."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __getitem__(self, indices: list[int]) -> tuple[Tensor, list[str], dict[str, int]]:
        if not hasattr(self.data, "usable"):
            return (*self.data.batch(indices), {})
        before = Counter(self.data.skipped)
        return (*self.data.usable(indices), dict(self.data.skipped - before))


def _text_tensors(text: TextEmbedding, store: torch.dtype) -> dict[str, Tensor]:
    found = {"context": text.context.to(store), "mask": text.mask}
    return found if text.pooled is None else {**found, "pooled": text.pooled.to(store)}


def _write_index(out: Path, record: dict[str, Any], shards: int) -> bool:
    """Write the index if every shard is there."""
    notes = [out / f"{_stem(number)}.json" for number in range(shards)]
    if not all(note.is_file() for note in notes):
        return False
    found = [io.read_json(note) for note in notes]
    listed = [
        {"file": f"{_stem(number)}.safetensors", **{key: note[key] for key in ("bucket", "samples", "sha256")}}
        for number, note in enumerate(found)
        if note["samples"]
    ]
    if not listed:
        raise ValueError(f"{out}: no sample of the data can be used")
    skipped = Counter(record["skipped_at_opening"])
    for note in found:
        skipped.update(note["skipped"])
    empty = out / "empty.safetensors"
    index = {
        **record,
        "shards": listed,
        "samples": sum(entry["samples"] for entry in listed),
        "skipped": dict(sorted(skipped.items())),
        "empty": checksum(empty) if record["text"] else None,
    }
    io.write_json(out / "index.json", index)
    return True


def checksum(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file: Any) -> str:  # Python 3.10
    digest = hashlib.sha256()
    while part := file.read(1 << 20):
        digest.update(part)
    return digest.hexdigest()


def _stem(number: int) -> str:
    return f"shard-{number:05d}"
