"""Class prompts: scikit-learn's handwritten digits, which need no download, and folders of classes as of ImageNet.

A class becomes a caption ("a photo of a tench"), so that a text-to-image model draws classes without another input.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from snapgen.data.folder import IMAGE_SUFFIXES, OTHER_IMAGES, CaptionedImages, Unusable, beginning
from snapgen.data.shapes import Sample

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from snapgen.data.buckets import Buckets

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SIDE = 8  # pixels on a side of the originals
WHITE = 16  # their brightest value
SPLITS = ("train", "test")
TEST_SHARE = 0.25
SPLIT_SEED = 0  # one split for all, so that nothing is ever scored on what it was trained on
CLASS_FILES = ("classes.txt", "LOC_synset_mapping.txt", "imagenet_class_index.json")


def digit_caption(digit: int) -> str:
    """The class prompt of a digit."""
    return f"a photo of the digit {NAMES[digit]}"


def load_digits(split: str) -> tuple[np.ndarray, np.ndarray]:
    """The originals of a split: uint8 [N, 8, 8] in 0..16, and their digits, int64 [N].

    1347 are for training, 450 for tests, each digit in the same share (UCI's "Optical Recognition of Handwritten
    Digits", its test part, as scikit-learn has it: 1797 pictures of 13 writers).

    Raises:
        ValueError: there is no such split, or scikit-learn is not installed.
    """
    if split not in SPLITS:
        raise ValueError(f"split: got {split!r}; must be one of {', '.join(SPLITS)}")
    try:
        from sklearn import datasets
        from sklearn.model_selection import train_test_split
    except ModuleNotFoundError:
        raise ValueError("data: the digits come with scikit-learn, which is not installed") from None
    found = datasets.load_digits()
    parts = train_test_split(
        found.images.astype("uint8"),
        found.target.astype("int64"),
        test_size=TEST_SHARE,
        random_state=SPLIT_SEED,
        stratify=found.target,
    )
    place = SPLITS.index(split)
    return parts[place], parts[2 + place]


def enlarged(originals: np.ndarray, resolution: int) -> Tensor:
    """Originals [N, 8, 8] in 0..16 as pictures, fp32 [N, 3, R, R] in [-1, 1], interpolated bilinearly.

    Raises:
        ValueError: `resolution` is not a multiple of 8.
    """
    import torch

    if resolution < SIDE or resolution % SIDE:
        raise ValueError(f"resolution: got {resolution}; must be a multiple of {SIDE}")
    small = torch.from_numpy(originals).float().div(WHITE / 2).sub(1)[:, None]
    large = torch.nn.functional.interpolate(small, size=(resolution, resolution), mode="bilinear")
    return large.expand(-1, 3, -1, -1).contiguous()


def reduced(pictures: Tensor) -> Tensor:
    """Pictures [N, 3, R, R] in [-1, 1] at the originals' size and range, fp32 [N, 8, 8] in 0..16: means of cells.

    Raises:
        ValueError: R is not a multiple of 8.
    """
    if pictures.ndim != 4 or pictures.shape[2] != pictures.shape[3] or pictures.shape[2] % SIDE:
        raise ValueError(f"pictures: got shape {tuple(pictures.shape)}; must be [N, 3, R, R], R a multiple of {SIDE}")
    grey = pictures.float().mean(1)
    cell = grey.shape[-1] // SIDE
    return grey.unflatten(1, (SIDE, cell)).unflatten(3, (SIDE, cell)).mean((2, 4)).add(1).mul(WHITE / 2)


class DigitsDataset:
    """Handwritten digits as pictures with class prompts. Map-style; an index always gives the same picture.

    Raises:
        ValueError: there is no such split, `resolution` is not a multiple of 8, or scikit-learn is not installed.
    """

    prompts = tuple(digit_caption(digit) for digit in range(10))
    """For sample grids."""

    def __init__(self, resolution: int = 32, split: str = "train") -> None:
        originals, self.digits = load_digits(split)
        self.resolution, self.split = resolution, split
        self.images = enlarged(originals, resolution)  # [N, 3, R, R]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:
        images, captions = self.batch([index])
        return {"image": images[0], "caption": captions[0], "index": index}

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, list[str]]:
        """Digits `indices` as images, fp32 [B, 3, R, R] in [-1, 1], and captions."""
        for index in indices:
            if not 0 <= index < len(self):
                raise IndexError(f"index {index} is outside [0, {len(self)})")
        return self.images[list(indices)], [digit_caption(self.digits[index]) for index in indices]

    def captions(self) -> Iterator[str]:
        """Every caption."""
        return (digit_caption(digit) for digit in self.digits)


# --- folders of classes ---------------------------------------------------------------------------------------------


class ClassFolders(CaptionedImages):
    """Pictures in a folder for each class, captioned "a photo of a {name}": ImageNet's layout.

    Names come from a file in `root`: classes.txt or LOC_synset_mapping.txt with lines "folder name, other names"
    ("n01440764 tench, Tinca tinca"; the first name counts), or imagenet_class_index.json,
    {"0": ["n01440764", "tench"], ...}. Pictures may lie deeper in their class's folder. A split of ImageNet is given
    as its own folder; the file of names may then stand beside or up to three folders above it.

    Args:
        bucketing: buckets of other aspect ratios; by default every picture's central square is taken.

    Raises:
        FileNotFoundError: there is no such folder, or no file of names.
        NotADirectoryError: `root` is a file.
        ValueError: the file of names is damaged, or no picture can be used.
    """

    def __init__(
        self, root: str | Path, resolution: int, *, verify: bool = False, bucketing: Buckets | None = None
    ) -> None:
        super().__init__(str(root), resolution, bucketing)
        self.root = Path(root)
        if not self.root.exists():
            raise FileNotFoundError(f"class folder {self.source} does not exist")
        if not self.root.is_dir():
            raise NotADirectoryError(f"class folder {self.source} is a file, not a folder")
        names = class_names(_names_file(self.root))
        self._pairs: list[tuple[Path, str]] = []
        for folder in sorted(p for p in self.root.iterdir() if p.is_dir() and not p.name.startswith(".")):
            if folder.name not in names:
                self._skip("folder is no class in the file of names", folder.name)
                continue
            for path in sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".")):
                if path.suffix.lower() in IMAGE_SUFFIXES:
                    self._pairs.append((path, class_caption(names[folder.name])))
                elif path.suffix.lower() in OTHER_IMAGES:
                    self._skip("format is not JPEG, PNG or WebP", str(path.relative_to(self.root)))
        self.prompts = tuple(class_caption(name) for name in list(dict.fromkeys(names.values()))[:16])
        self._opened(verify)

    def __len__(self) -> int:
        return len(self._pairs)

    def _name(self, index: int) -> str:
        return str(self._pairs[index][0].relative_to(self.root))

    def _read(self, index: int, most: int = -1) -> tuple[bytes, str]:
        path, caption = self._pairs[index]
        try:
            return beginning(path, most), caption
        except OSError as error:
            raise Unusable(f"file cannot be read ({error.strerror})") from error


def class_caption(name: str) -> str:
    """The class prompt of a class's name."""
    return f"a photo of a {name}"


def class_names(path: Path) -> dict[str, str]:
    """Folder to name of each class, in the file's order.

    Raises:
        ValueError: a line, or the JSON, is not of the form that :class:`ClassFolders` describes.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            return {folder: name.replace("_", " ") for folder, name in json.loads(text).values()}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: damaged, holds no class names ({error})") from error
    found = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        match = re.fullmatch(r"(\S+)\s+([^,]*[^,\s])\s*(,.*)?", line.strip())
        if match is None:
            raise ValueError(f"{path}:{number}: got {line[:60]!r}; must be a folder, a space and its class's name")
        found[match[1]] = match[2]
    if not found:
        raise ValueError(f"{path}: holds no class names")
    return found


def _names_file(root: Path) -> Path:
    places = [root, *root.resolve().parents[:3]]
    for place in places:
        for name in CLASS_FILES:
            if (place / name).is_file():
                return place / name
    raise FileNotFoundError(f"class folder {root}: no file of class names in it or above it ({', '.join(CLASS_FILES)})")
