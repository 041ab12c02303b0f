"""Training data: the captioned shapes world (no download) and folders or WebDataset shards of image + caption.

Names are resolved on first use, so that importing this package loads neither torch nor Pillow.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .folder import ImageFolder, WebDatasetShards
    from .shapes import ShapesDataset

_HOMES = {"ShapesDataset": ".shapes", "ImageFolder": ".folder", "WebDatasetShards": ".folder"}

__all__ = ["ImageFolder", "ShapesDataset", "WebDatasetShards"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name], __name__), name)
