"""Real images with captions from disk: folders of pictures and WebDataset shards.

Both are map-style and deterministic: an index always gives the same image and caption, so that a resumed run sees what
an uninterrupted one would have seen. Shards are indexed once by their tar headers and then read at random.

What cannot be used is never dropped in silence: each is counted by reason, logged and listed by `report()`. Missing
partners show at the start. A broken picture or caption shows when it is first read (at the start with `verify=True`);
the next usable pair then stands in, the same one every time. Where a DataLoader has workers, each counts and logs what
it meets itself, so that only `verify=True` gives one whole report.

Only pictures, text and JSON are ever opened: shard members of any other kind (.pyd, .pth, ...) are not read, let alone
unpickled.
"""

from __future__ import annotations

import io
import json
import logging
import re
import struct
import tarfile
import zlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import ExifTags, Image

from .buckets import NONE, Buckets, Size, fitted
from .shapes import Sample

if TYPE_CHECKING:
    from torch import Tensor

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
_FORMATS = ("JPEG", "PNG", "WEBP")
OTHER_IMAGES = (".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".heif", ".jxl", ".jp2")
_CAPTION_FILES = ("captions.jsonl", "metadata.jsonl")
_CAPTION_KEYS = ("caption", "text")
_UPRIGHT = {  # EXIF orientation -> what sets the picture upright; Pillow's exif_transpose trips over odd EXIF entries
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
NO_PICTURE = "image is broken or not JPEG, PNG or WebP"
_HEAD = 1 << 16  # bytes of a picture's file in which its size is looked for
EXAMPLES = 3  # named in the report for each reason
# What Pillow raises on damaged files: UnidentifiedImageError is an OSError, a broken PNG chunk a SyntaxError.
BROKEN = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, zlib.error,
           Image.DecompressionBombError)  # fmt: skip

log = logging.getLogger(__name__)


class Unusable(Exception):
    """One pair cannot be used; the argument is the reason under which it is counted."""


def load_image(data: bytes, size: int | Size) -> Image.Image:
    """Decode a JPEG, PNG or WebP file and cut its middle to `size` (a number: that square), RGB, upright, no
    transparency."""
    size = Size(size, size) if isinstance(size, int) else size
    with Image.open(io.BytesIO(data), formats=_FORMATS) as opened:
        opened.draft("RGB", (2 * max(size), 2 * max(size)))  # JPEG alone: decodes large pictures at a fraction
        turn = _UPRIGHT.get(opened.getexif().get(ExifTags.Base.Orientation, 1))
        picture = opened.transpose(turn) if turn is not None else opened
        if picture.has_transparency_data:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        picture = picture.convert("RGB")
    return fitted(picture, size)


def image_size(data: bytes) -> Size:
    """Height and width of a JPEG, PNG or WebP file once it is upright, from its header."""
    with Image.open(io.BytesIO(data), formats=_FORMATS) as opened:
        # Asked for the EXIF of a PNG that has none before its pixels, Pillow decodes them all.
        exif = {} if opened.format == "PNG" and "exif" not in opened.info else opened.getexif()
        turned = exif.get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
        return Size(opened.width, opened.height) if turned else Size(opened.height, opened.width)


def caption_in(data: bytes, is_json: bool) -> str:
    """The caption of a text file, or of a JSON file's "caption" or "text"; Unusable, with the reason, if it is none."""
    if not is_json:
        return _text(data)
    try:
        entry = json.loads(data)
    except (ValueError, RecursionError):
        raise Unusable("caption is not JSON") from None
    if not isinstance(entry, dict):
        raise Unusable('no "caption" or "text"')
    return _caption_of(entry)


def _text(data: bytes) -> str:
    try:
        text = data.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        raise Unusable("caption is not UTF-8 text") from None
    return _checked(text)


def _checked(caption: object) -> str:
    # JSON can hold half a surrogate pair, which no tokenizer can encode.
    if not isinstance(caption, str) or any(c == "\0" or "\ud800" <= c <= "\udfff" for c in caption):
        raise Unusable("caption is not text")
    if not caption.strip():
        raise Unusable("caption is empty")
    return caption.strip()


class CaptionedImages(ABC):
    """What folders and shards share: reading by index, standing in for broken pairs, counting and reporting.

    With `bucketing`, every picture's header is read at the start: `buckets` holds the index in `sizes` of each pair (-1
    where it cannot be used), and pairs of one bucket alone may be asked for together.
    """

    buckets: list[int]  # where there is bucketing

    def __init__(self, source: str, resolution: int, bucketing: Buckets | None = None) -> None:
        if resolution < 1:
            raise ValueError(f"resolution {resolution}: must be at least 1")
        if bucketing is not None and bucketing.resolution != resolution:
            raise ValueError(f"bucketing: its resolution is {bucketing.resolution}, the dataset's {resolution}")
        self.source, self.resolution, self.bucketing = source, resolution, bucketing
        self.sizes = (Size(resolution, resolution),) if bucketing is None else bucketing.sizes
        self.skipped: Counter[str] = Counter()  # reason -> pairs
        self._examples: dict[str, list[str]] = {}
        self._unusable: set[int] = set()
        self._news: list[tuple[int, str]] = []

    @abstractmethod
    def __len__(self) -> int:
        """Number of pairs found, broken ones that have not been read yet included."""

    @abstractmethod
    def _name(self, index: int) -> str:
        """What a report calls one pair."""

    @abstractmethod
    def _read(self, index: int, most: int = -1) -> tuple[bytes, str]:
        """The image file (its first `most` bytes) and the caption of one pair, or Unusable."""

    def _skip(self, reason: str, name: str) -> None:
        self.skipped[reason] += 1
        examples = self._examples.setdefault(reason, [])
        if len(examples) < EXAMPLES:
            examples.append(name)

    def _opened(self, verify: bool) -> None:
        """Last step of every constructor."""
        if self.bucketing is not None:
            self.buckets = [self._bucket(index, self.bucketing) for index in range(len(self))]
        if verify:
            for index in range(len(self)):
                self._try(index)
        if len(self) == len(self._unusable):
            raise ValueError(f"{self.source}: no usable pair of image and caption\n{self.report()}")
        if self.skipped:
            log.warning("%s", self.report())

    def _try(self, index: int) -> tuple[Image.Image, str] | None:
        if index in self._unusable:
            return None
        try:
            data, caption = self._read(index)
            try:
                return load_image(data, self._size(index)), caption
            except BROKEN as error:
                raise Unusable(NO_PICTURE) from error
        except Unusable as unusable:
            self._cannot(index, str(unusable))
            return None

    def _cannot(self, index: int, reason: str) -> None:
        self._unusable.add(index)
        self._news.append((index, reason))
        self._skip(reason, self._name(index))

    def news(self) -> list[tuple[int, str]]:
        """Pairs found to be unusable since the last call, with the reasons."""
        found, self._news = self._news, []
        return found

    def note(self, found: Sequence[tuple[int, str]]) -> None:
        """Take over what a copy of this dataset in another process found: its `news`."""
        for index, reason in found:
            if index not in self._unusable:
                self._cannot(index, reason)

    def _bucket(self, index: int, bucketing: Buckets) -> int:
        try:
            for most in (_HEAD, -1):  # a header may be longer than most are
                data, _ = self._read(index, most)
                with suppress(*BROKEN):
                    return bucketing.nearest(*image_size(data))
            raise Unusable(NO_PICTURE)
        except Unusable as unusable:
            self._cannot(index, str(unusable))
            return NONE

    def _size(self, index: int) -> Size:
        return self.sizes[0] if self.bucketing is None else self.sizes[self.buckets[index]]

    def _pair(self, index: int, bucket: int) -> tuple[Image.Image, str, int] | None:
        """The pair or its stand-in: the next of the same bucket; None if all of that cannot be used."""
        count = len(self)
        for step in range(count):
            candidate = (index + step) % count
            if self.bucketing is not None and self.buckets[candidate] != bucket:
                continue
            known = candidate in self._unusable
            loaded = self._try(candidate)
            if loaded is not None:
                return (*loaded, candidate)
            if not known:
                log.warning("%s: skipped %s", self.source, self._name(candidate))
        return None

    def __getitem__(self, index: int) -> Sample:
        """Image as float32 [3, H, W] in [-1, 1], caption, and the index of the pair that was really read."""
        images, captions, used = self._stack([index])
        return {"image": images[0], "caption": captions[0], "index": used[0]}

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, list[str]]:
        """Pairs `indices` as images, float32 [B, 3, H, W] in [-1, 1], and captions.

        Raises:
            ValueError: they are not of one bucket, or nothing can be used.
        """
        return self._stack(indices)[:2]

    def usable(self, indices: Sequence[int]) -> tuple[Tensor, list[str]]:
        """As `batch`, but with nothing in the place of pairs that cannot be used, which are counted."""
        found = [pair for pair in (self._try(index) for index in indices) if pair is not None]
        size = self._size(indices[0]) if indices else self.sizes[0]
        return stacked([picture for picture, _ in found], size), [caption for _, caption in found]

    def _stack(self, indices: Sequence[int]) -> tuple[Tensor, list[str], list[int]]:
        size, pairs = self._of_one_bucket(list(map(int, indices)))
        images = stacked([picture for picture, _, _ in pairs], size)
        return images, [caption for _, caption, _ in pairs], [used for _, _, used in pairs]

    def _of_one_bucket(self, indices: Sequence[int]) -> tuple[Size, list[tuple[Image.Image, str, int]]]:
        for index in indices:
            if not 0 <= index < len(self):
                raise IndexError(f"index {index} is outside [0, {len(self)})")
        asked = {0} if self.bucketing is None else {self.buckets[index] for index in indices}
        if len(asked) > 1:
            raise ValueError(f"indices: got pairs of {len(asked)} buckets; must be of one")
        first = asked.pop() if asked else 0
        # A bucket of which nothing can be used is stood in for by the next one, for all of the batch.
        for turn in range(len(self.sizes)):
            bucket = (first + turn) % len(self.sizes)
            pairs = []
            for index in indices:
                pair = self._pair(index, bucket)
                if pair is None:
                    break
                pairs.append(pair)
            else:
                return self.sizes[bucket], pairs
        raise ValueError(f"{self.source}: no usable pair of image and caption\n{self.report()}")

    def captions(self) -> Iterator[str]:
        """Every caption that can be read; its image may still turn out broken."""
        for index in range(len(self)):
            try:
                yield self._read(index)[1]
            except Unusable:
                continue

    def report(self) -> str:
        """What was found and what was skipped so far, by reason, with a few names each."""
        lines = [f"{self.source}: {len(self) - len(self._unusable)} pairs in use, {self.skipped.total()} skipped"]
        for reason, count in self.skipped.most_common():
            names = self._examples[reason]
            lines.append(f"  {count:6d}  {reason}: {', '.join(names)}{', ...' if count > len(names) else ''}")
        return "\n".join(lines)


def stacked(pictures: Sequence[Image.Image], size: Size) -> Tensor:
    """Pictures of `size` as float32 [B, 3, H, W] in [-1, 1]."""
    import torch  # here, so that looking through a folder does not need it

    pixels = np.empty((len(pictures), *size, 3), np.uint8)
    for row, picture in zip(pixels, pictures, strict=True):
        row[:] = np.asarray(picture)
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    return images.to(torch.float32, memory_format=torch.contiguous_format).div_(127.5).sub_(1.0)


# --- folders --------------------------------------------------------------------------------------------------------


class ImageFolder(CaptionedImages):
    """Pictures anywhere under `root` with captions from one of two places.

    If `root` holds captions.jsonl or metadata.jsonl, their lines {"file_name": ..., "text": ...} name the pairs
    ("caption" does for "text"; a picture may have several lines). Otherwise cat.jpg has its caption in cat.txt beside
    it. Pairs are in the order of the lines, or sorted by path. Hidden files and folders are left alone.
    With `bucketing`, pictures keep their aspect ratio (`snapgen.data.buckets`).
    Raises FileNotFoundError, NotADirectoryError, or ValueError where no pair can be used.
    """

    def __init__(
        self, root: str | Path, resolution: int, *, verify: bool = False, bucketing: Buckets | None = None
    ) -> None:
        super().__init__(str(root), resolution, bucketing)
        self.root = Path(root)
        if not self.root.exists():
            raise FileNotFoundError(f"image folder {self.source} does not exist")
        if not self.root.is_dir():
            raise NotADirectoryError(f"image folder {self.source} is a file, not a folder")
        relative = sorted(p.relative_to(self.root) for p in self.root.rglob("*") if p.is_file())
        files = [p for p in relative if not any(part.startswith(".") for part in p.parts)]
        for path in files:
            if path.suffix.lower() in OTHER_IMAGES:
                self._skip("format is not JPEG, PNG or WebP", str(path))
        images = [p for p in files if p.suffix.lower() in IMAGE_SUFFIXES]
        listings = [name for name in _CAPTION_FILES if (self.root / name).is_file()]
        self._pairs: list[tuple[Path, str | Path]] = []  # the image, and its caption or the file that holds it
        if listings:
            for name in listings:
                self._pairs += self._listed(name)
            named = {image for image, _ in self._pairs}
            for path in images:
                if path not in named:
                    self._skip(f"not in {' or '.join(listings)}", str(path))
        else:
            texts = {p for p in files if p.suffix.lower() == ".txt"}
            by_stem = {text.with_suffix(""): text for text in sorted(texts)}
            for path in images:
                text = by_stem.get(path.with_suffix(""))
                if text is None:
                    self._skip("no caption file beside it", str(path))
                else:
                    self._pairs.append((path, text))
            stems = {path.with_suffix("") for path in images}
            for text in sorted(texts):
                if text.with_suffix("") not in stems:
                    self._skip("caption without an image", str(text))
        self._opened(verify)

    def _listed(self, name: str) -> Iterator[tuple[Path, str | Path]]:
        inside = self.root.resolve()
        for number, line in enumerate((self.root / name).read_bytes().splitlines(), 1):
            if not line.strip():
                continue
            try:
                try:
                    entry = json.loads(line)
                except (ValueError, RecursionError):  # bad JSON, not UTF-8, or nested without end
                    raise Unusable("line is not JSON") from None
                if not isinstance(entry, dict) or not isinstance(entry.get("file_name"), str):
                    raise Unusable('line has no "file_name"')
                path = Path(entry["file_name"])
                target = (self.root / path).resolve()
                if not target.is_relative_to(inside):
                    raise Unusable("file_name leads out of the folder")
                if not target.is_file():
                    raise Unusable("file_name does not exist")
                yield Path(*[part for part in path.parts if part != "."]), _caption_of(entry)
            except Unusable as unusable:
                self._skip(str(unusable), f"{name}:{number}")

    def __len__(self) -> int:
        return len(self._pairs)

    def _name(self, index: int) -> str:
        return str(self._pairs[index][0])

    def _read(self, index: int, most: int = -1) -> tuple[bytes, str]:
        image, caption = self._pairs[index]
        try:
            if isinstance(caption, Path):
                caption = _text((self.root / caption).read_bytes())
            return beginning(self.root / image, most), caption
        except OSError as error:
            raise Unusable(f"file cannot be read ({error.strerror})") from error


def beginning(path: Path, most: int) -> bytes:
    """The first `most` bytes of a file; all of it if that is negative."""
    with path.open("rb") as file:
        return file.read(most)


def _caption_of(entry: dict[str, object]) -> str:
    for key in _CAPTION_KEYS:
        if key in entry:
            return _checked(entry[key])
    raise Unusable('no "caption" or "text"')


# --- shards ---------------------------------------------------------------------------------------------------------


class _Member(NamedTuple):
    offset: int
    size: int


class _Pair(NamedTuple):
    shard: Path
    key: str
    image: _Member
    caption: _Member
    is_json: bool


class WebDatasetShards(CaptionedImages):
    """Tar shards in WebDataset's layout: members that share a name up to the first dot of its last part are a sample.

    `shards` is a tar file, a folder of them, a numeric brace pattern ("train-{0000..0123}.tar"), or a list of these.
    The image is .jpg, .jpeg, .png or .webp; the caption .txt, or "caption" or "text" of .json. Tars must be
    uncompressed and local, since samples are read at random (`snapgen.data.stream` reads others). With `bucketing`,
    pictures keep their aspect ratio. Raises FileNotFoundError, or ValueError where no pair can be used.
    """

    def __init__(
        self,
        shards: str | Path | Sequence[str | Path],
        resolution: int,
        *,
        verify: bool = False,
        bucketing: Buckets | None = None,
    ) -> None:
        given = [shards] if isinstance(shards, str | Path) else list(shards)
        super().__init__(", ".join(str(item) for item in given), resolution, bucketing)
        self.shards = [path for item in given for path in shard_files(item)]
        self._pairs: list[_Pair] = []
        for shard in self.shards:
            self._index(shard)
        self._opened(verify)

    def _index(self, shard: Path) -> None:
        samples: dict[str, dict[str, _Member]] = {}
        length, end = shard.stat().st_size, 0
        try:
            with tarfile.open(shard, "r:") as tar:
                for info in tar:
                    end = info.offset_data + -(-info.size // 512) * 512
                    folder, _, name = info.name.rpartition("/")
                    stem, dot, suffix = name.partition(".")
                    # Sparse members are not contiguous; names with __ are WebDataset's own notes.
                    if not info.isreg() or info.issparse() or not stem or not dot or name.startswith("__"):
                        continue
                    sample = samples.setdefault(f"{folder}/{stem}" if folder else stem, {})
                    if suffix.lower() in sample:
                        self._skip("two members of one name", f"{shard.name}/{info.name}")
                    elif info.offset_data + info.size <= length:
                        sample[suffix.lower()] = _Member(info.offset_data, info.size)
        except (tarfile.TarError, EOFError) as error:
            self._skip(f"shard is not an uncompressed tar, or is damaged ({error})", shard.name)
        else:
            if length < end + 512:  # a whole tar ends with empty blocks
                self._skip("shard is cut short, its samples so far are used", shard.name)
        for key, members in samples.items():
            image = next((members[s[1:]] for s in IMAGE_SUFFIXES if s[1:] in members), None)
            caption = members.get("txt", members.get("json"))
            if image is None or caption is None:
                self._skip("no image (.jpg, .png, .webp)" if image is None else "no caption (.txt, .json)",
                           f"{shard.name}/{key}")  # fmt: skip
            else:
                self._pairs.append(_Pair(shard, key, image, caption, "txt" not in members))

    def __len__(self) -> int:
        return len(self._pairs)

    def _name(self, index: int) -> str:
        return f"{self._pairs[index].shard.name}/{self._pairs[index].key}"

    def _read(self, index: int, most: int = -1) -> tuple[bytes, str]:
        pair = self._pairs[index]
        parts = []
        try:
            with pair.shard.open("rb") as file:
                for member, limit in ((pair.caption, -1), (pair.image, most)):
                    file.seek(member.offset)
                    parts.append(file.read(member.size if limit < 0 else min(limit, member.size)))
        except OSError as error:
            raise Unusable(f"shard cannot be read ({error.strerror})") from error
        return parts[1], caption_in(parts[0], pair.is_json)


def numbered(pattern: str) -> list[str]:
    """All names of a numeric brace pattern: "a-{08..10}" is a-08, a-09, a-10."""
    braces = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if not braces:
        return [pattern]
    first, last = braces.groups()
    numbers = [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
    return [name for n in numbers for name in numbered(pattern[: braces.start()] + n + pattern[braces.end() :])]


def shard_files(item: str | Path) -> list[Path]:
    """The tar files that a name means: a file, a folder of some, or a numeric brace pattern of either."""
    text = str(item)
    if numbered(text) != [text]:
        return [path for name in numbered(text) for path in shard_files(name)]
    path = Path(item)
    if path.is_dir():
        found = sorted(p for p in path.glob("*.tar") if not p.name.startswith("."))
        if not found:
            raise FileNotFoundError(f"shard folder {text} holds no .tar file")
        return found
    if not path.is_file():
        raise FileNotFoundError(f"shard {text} does not exist")
    return [path]
