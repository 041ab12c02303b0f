"""WebDataset shards read from front to back: from slow disks, URLs, object storage and commands.

`snapgen.data.folder` reads local shards at random and is to be preferred where they are. Here shards are dealt out to
`lanes`, and each optimizer step takes the same number of samples from every lane. A lane reads its shards one after the
other, in an order of their own in each epoch, and shuffles within blocks. So sample p of a run is a function of (seed,
p, the shards, lanes, block, batch size) alone, on any number of processes and workers: a process reads the lanes that
its samples come from, and nothing of the others where it has them to itself.

A run that is resumed passes over what it has read, shard by shard where `counts` says how many samples each holds, else
by reading them again. Its position is exact as long as every shard gives the same samples as before. It is not where a
shard could not be read to its end, which is reported: its lane then went on with the next shard.
"""

from __future__ import annotations

import json
import logging
import re
import tarfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import count, islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from snapgen import seeds
from snapgen.data.buckets import Size
from snapgen.data.folder import (
    BROKEN,
    EXAMPLES,
    IMAGE_SUFFIXES,
    NO_PICTURE,
    Unusable,
    caption_in,
    load_image,
    numbered,
    shard_files,
    stacked,
)
from snapgen.data.loader import Batch, Share

LANES = 32  # at most, unless asked for
PAUSE = 1.0  # seconds before the first retry; twice as long before each further one

log = logging.getLogger(__name__)


class _Raw(NamedTuple):
    name: str  # shard and key
    image: bytes
    caption: bytes
    is_json: bool


class _Piece(NamedTuple):
    """What one worker has of a pass: places in the run, pictures, captions; and what it had to skip."""

    samples: list[tuple[int, Image.Image, str]]
    skipped: list[tuple[str, str]]  # reason, name


class WebDatasetStream:
    """Captioned pictures of WebDataset shards, as `WebDatasetShards` understands them, in streaming order.

    Args:
        shards: a URL (https:, s3: by "pipe:aws s3 cp ... -", gs:, ...), a command ("pipe:cat x.tar"), a tar file, each
            with a pattern such as {0000..0123}, a folder of tar files, or a list of these. All but files need the
            package webdataset. Tars may be compressed. Commands are run as they stand: take them from no stranger.
        resolution: central squares are cut to this many pixels a side.
        lanes: see above. By default the largest divisor of the batch size that is at most 32 and the number of shards.
            Where there are more processes than lanes, several read the same one: give as many as processes.
        block: samples that a lane shuffles among themselves, and holds undecoded.
        counts: samples of each shard by its name here, as :func:`count_samples` finds them, or a JSON file of that.
        retries: how often a shard that is not a file is opened anew after an error.

    Raises:
        ValueError: an argument does not fit, or the package webdataset is needed and missing.
        FileNotFoundError: a shard that is a file does not exist.
    """

    def __init__(
        self,
        shards: str | Path | Sequence[str | Path],
        resolution: int,
        *,
        lanes: int | None = None,
        block: int = 32,
        counts: Mapping[str, int] | Path | None = None,
        retries: int = 3,
    ) -> None:
        if resolution < 1:
            raise ValueError(f"resolution: got {resolution}; must be at least 1")
        if lanes is not None and lanes < 1:
            raise ValueError(f"lanes: got {lanes}; must be at least 1")
        if block < 1:
            raise ValueError(f"block: got {block}; must be at least 1")
        if retries < 0:
            raise ValueError(f"retries: got {retries}; must not be negative")
        given = [shards] if isinstance(shards, str | Path) else list(shards)
        self.source = ", ".join(map(str, given))
        self.shards = [name for item in given for name in _named(item)]
        if any(map(_remote, self.shards)):
            _webdataset()
        self.counts = _counted(counts)
        self.resolution, self.lanes, self.block, self.retries = resolution, lanes, block, retries
        self.skipped: Counter[str] = Counter()
        self._examples: dict[str, list[str]] = {}
        self._seen: set[tuple[str, str]] = set()

    def stream(self, share: Share, *, start: int, seed: int, workers: int = 0) -> Iterator[Batch]:
        """An endless stream of batches, beginning with the first forward pass of step `start`.

        Raises:
            ValueError: the lanes do not fit the batch or the shards, or no sample can be used.
        """
        lanes = self._lanes(share.batch_size)
        pieces = iter(DataLoader(_Pieces(self, lanes, share, start, seed), batch_size=None, num_workers=workers))
        passes = (positions for step in count(start) for positions in share.positions(step))
        for positions in passes:
            found = list(islice(pieces, max(1, workers)))
            for piece in found:
                self._note(piece.skipped)
            samples = sorted((sample for piece in found for sample in piece.samples), key=lambda sample: sample[0])
            images = stacked([image for _, image, _ in samples], Size(self.resolution, self.resolution))
            yield Batch(images=images, captions=[caption for _, _, caption in samples], positions=positions)

    def captions(self) -> Iterator[str]:
        """Every caption that can be read, from all shards once."""
        for name in self.shards:
            for raw in self._read(name):
                with suppress(Unusable):
                    yield caption_in(raw.caption, raw.is_json)

    def report(self) -> str:
        """What was skipped so far, by reason, with a few names each."""
        lines = [f"{self.source}: {len(self.shards)} shards, {self.skipped.total()} skipped so far"]
        for reason, found in self.skipped.most_common():
            names = self._examples[reason]
            lines.append(f"  {found:6d}  {reason}: {', '.join(names)}{', ...' if found > len(names) else ''}")
        return "\n".join(lines)

    def _lanes(self, batch_size: int) -> int:
        most = min(len(self.shards), batch_size)
        if self.lanes is None:
            return next(n for n in range(min(most, LANES), 0, -1) if batch_size % n == 0)
        if self.lanes > most or batch_size % self.lanes:
            raise ValueError(
                f"lanes: got {self.lanes}; must divide the batch size, {batch_size}, and be at most the number of "
                f"shards, {len(self.shards)}"
            )
        return self.lanes

    def _note(self, skipped: Sequence[tuple[str, str]]) -> None:
        """Count what was not met before, and log it; a worker leaves that to the main process."""
        for reason, name in skipped:
            if (reason, name) not in self._seen:
                self._seen.add((reason, name))
                self.skipped[reason] += 1
                examples = self._examples.setdefault(reason, [])
                if len(examples) < EXAMPLES:
                    examples.append(name)
                if get_worker_info() is None:
                    log.warning("%s: skipped %s (%s)", self.source, name, reason)

    def _read(self, shard: str) -> Iterator[_Raw]:
        """The complete samples of a shard. Notes of what is wrong go to `_note`."""
        given, wait = 0, PAUSE
        for attempt in range(self.retries + 1 if _remote(shard) else 1):
            if attempt:
                time.sleep(wait)
                wait *= 2
            try:
                for index, raw in enumerate(_samples(shard, self._note)):
                    if index == given:
                        given += 1
                        yield raw
                return
            except (OSError, EOFError, tarfile.TarError, ValueError) as error:
                failure = error
        self._note([("shard cannot be read to its end", f"{shard} ({failure}; {given} samples used)")])

    def _endless(self, lane: int, lanes: int, seed: int, first: int) -> Iterator[_Raw]:
        """A lane's samples from its `first` on."""
        left = first
        for epoch in count():
            order = torch.randperm(len(self.shards), generator=seeds.generator(seed, epoch)).tolist()
            met = 0
            for number in order[lane::lanes]:
                name = self.shards[number]
                known = self.counts.get(name)
                if known is not None and left >= known > 0:
                    left -= known
                    met += known
                    continue
                for raw in self._read(name):
                    met += 1
                    if left:
                        left -= 1
                    else:
                        yield raw
            # Which shards a lane has changes with the epoch; one without a sample is no reason to stop yet.
            if not met and epoch and not any(True for name in self.shards for _ in islice(self._read(name), 1)):
                raise ValueError(f"{self.source}: no sample of picture and caption\n{self.report()}")


class _Lane:
    """A lane's samples by their place in it, asked for in ascending order."""

    def __init__(self, source: WebDatasetStream, lane: int, lanes: int, seed: int, first: int) -> None:
        self.source, self.seed, self.stream = source, seed, -(1 << 20) - lane  # streams of buckets lie above
        self.turn = first // source.block - 1
        self.raw = source._endless(lane, lanes, seed, (self.turn + 1) * source.block)
        self.held: list[_Raw] = []

    def at(self, place: int) -> tuple[Image.Image, str]:
        """The sample at `place`, or of its block the next one that can be used."""
        block = self.source.block
        while self.turn < place // block:
            found = list(islice(self.raw, block))
            self.turn += 1
            order = torch.randperm(block, generator=seeds.generator(self.seed, self.turn, self.stream)).tolist()
            self.held = [found[index] for index in order]
        for step in range(block):
            raw = self.held[(place + step) % block]
            try:
                caption = caption_in(raw.caption, raw.is_json)
                try:
                    return load_image(raw.image, self.source.resolution), caption
                except BROKEN as error:
                    raise Unusable(NO_PICTURE) from error
            except Unusable as unusable:
                self.source._note([(str(unusable), raw.name)])
        raise ValueError(
            f"{self.source.source}: {block} samples in a row cannot be used; a larger block looks further\n"
            f"{self.source.report()}"
        )


class _Pieces(IterableDataset[_Piece]):
    """For every pass, the samples of the lanes that are this worker's."""

    def __init__(self, source: WebDatasetStream, lanes: int, share: Share, start: int, seed: int) -> None:
        self.source, self.lanes, self.share, self.start, self.seed = source, lanes, share, start, seed

    def __iter__(self) -> Iterator[_Piece]:
        worker = get_worker_info()
        number, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        width = self.share.batch_size // self.lanes
        # In steps the same places are this process's, so its lanes are those of the first.
        places = [place % self.share.batch_size for positions in self.share.positions(0) for place in positions]
        mine = sorted({place // width for place in places})[number::workers]
        open_lanes: dict[int, _Lane] = {}
        reported = set(self.source._seen)
        for step in count(self.start):
            for positions in self.share.positions(step):
                samples = []
                for position in positions:
                    lane, offset = divmod(position - step * self.share.batch_size, width)
                    if lane not in mine:
                        continue
                    place = step * width + offset
                    if lane not in open_lanes:
                        open_lanes[lane] = _Lane(self.source, lane, self.lanes, self.seed, place)
                    samples.append((position, *open_lanes[lane].at(place)))
                new = self.source._seen - reported
                reported |= new
                yield _Piece(samples, sorted(new))


def count_samples(shards: str | Path | Sequence[str | Path]) -> dict[str, int]:
    """How many complete samples each shard holds, by its name; reads them all once.

    Raises:
        ValueError: a shard cannot be read to its end; names it.
    """
    given = [shards] if isinstance(shards, str | Path) else list(shards)
    found = {}
    for name in (name for item in given for name in _named(item)):
        try:
            found[name] = sum(1 for _ in _samples(name, lambda skipped: None))
        except (OSError, EOFError, tarfile.TarError) as error:
            raise ValueError(f"shard {name}: cannot be read to its end ({error})") from error
    return found


def _samples(shard: str, note: Any) -> Iterator[_Raw]:
    """The samples of a shard that have a picture and a caption; members of a sample follow each other."""
    key = ""
    parts: dict[str, bytes] = {}
    file: Any = _Counted(_opened(shard))
    try:
        with tarfile.open(fileobj=file, mode="r|*") as tar:
            for info in tar:
                tar.members = []  # type: ignore[attr-defined]  # would grow with the shard
                folder, _, name = info.name.rpartition("/")
                stem, dot, suffix = name.partition(".")
                if not info.isreg() or info.issparse() or not stem or not dot or name.startswith("__"):
                    continue
                own = f"{folder}/{stem}" if folder else stem
                if own != key:
                    yield from _complete(shard, key, parts, note)
                    key, parts = own, {}
                # Nothing but pictures and captions is even read.
                if suffix.lower() in ("txt", "json", *(known[1:] for known in IMAGE_SUFFIXES)):
                    member = tar.extractfile(info)
                    assert member is not None
                    parts.setdefault(suffix.lower(), member.read())
            while file.read(1 << 16):  # a command that is not read to its end fails
                pass
            # A whole tar ends with empty blocks; one that was cut between two members is no error to tarfile.
            plain = getattr(tar.fileobj, "comptype", "tar") == "tar"
            if plain and file.count < tar.offset + tarfile.BLOCKSIZE:
                raise tarfile.ReadError("cut short")
        yield from _complete(shard, key, parts, note)
    except BaseException:  # of reading, or that no more is wanted
        with suppress(OSError):  # which a command that was cut off raises
            file.close()
        raise
    file.close()  # which raises where a command failed


class _Counted:
    """A stream that counts what was read."""

    def __init__(self, file: Any) -> None:
        self.file, self.count = file, 0

    def read(self, size: int) -> bytes:
        found = self.file.read(size)
        self.count += len(found)
        return found

    def close(self) -> None:
        self.file.close()


def _complete(shard: str, key: str, parts: Mapping[str, bytes], note: Any) -> Iterator[_Raw]:
    if not key:
        return
    image = next((parts[known[1:]] for known in IMAGE_SUFFIXES if known[1:] in parts), None)
    caption = parts.get("txt", parts.get("json"))
    name = f"{Path(shard).name}/{key}"
    if image is None or caption is None:
        note([("no image (.jpg, .png, .webp)" if image is None else "no caption (.txt, .json)", name)])
    else:
        yield _Raw(name, image, caption, "txt" not in parts)


def _remote(shard: str) -> bool:
    return re.match(r"[a-z][a-z0-9+.-]+:", shard) is not None


def _named(item: str | Path) -> list[str]:
    """The shards of a pattern, folder or file."""
    if _remote(str(item)):
        return numbered(str(item))
    return [str(path) for path in shard_files(item)]


def _opened(shard: str) -> Any:
    return _webdataset()(shard, "rb") if _remote(shard) else open(shard, "rb")


def _webdataset() -> Any:
    """What opens URLs."""
    try:
        from webdataset import gopen
    except ModuleNotFoundError:
        raise ValueError(
            "data: shards that are not files need the package webdataset, which is not installed"
        ) from None
    return gopen


def _counted(counts: Mapping[str, int] | Path | None) -> dict[str, int]:
    if counts is None:
        return {}
    try:
        found = json.loads(counts.read_text(encoding="utf-8")) if isinstance(counts, Path) else dict(counts)
    except ValueError as error:
        raise ValueError(f"counts: {counts} is not JSON ({error})") from error
    if not isinstance(found, dict) or not all(type(n) is int and n >= 0 for n in found.values()):
        raise ValueError("counts: must hold a number of samples for the name of each shard")
    return found
