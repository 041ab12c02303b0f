"""Training data: the shapes world and handwritten digits (no download), folders, WebDataset shards, and caches of them.

Names are resolved on first use, so that importing this package loads neither torch nor Pillow.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .cached import CachedDataset
    from .digits import ClassFolders, DigitsDataset
    from .folder import ImageFolder, WebDatasetShards
    from .shapes import ShapesDataset
    from .stream import WebDatasetStream

_HOMES = {
    "CachedDataset": ".cached",
    "ClassFolders": ".digits",
    "DigitsDataset": ".digits",
    "ImageFolder": ".folder",
    "ShapesDataset": ".shapes",
    "WebDatasetShards": ".folder",
    "WebDatasetStream": ".stream",
}

__all__ = [
    "CachedDataset",
    "ClassFolders",
    "DigitsDataset",
    "ImageFolder",
    "ShapesDataset",
    "WebDatasetShards",
    "WebDatasetStream",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name], __name__), name)
