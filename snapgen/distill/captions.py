"""Embeddings of captions, computed once: a teacher whose text encoders need not be in memory while it teaches."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from snapgen import io
from snapgen.text import TextEmbedding

Reader = Callable[[Sequence[str]], TextEmbedding]  # captions to what a teacher is conditioned on


class CaptionStore:
    """A reader that looks captions up among embeddings computed beforehand: one safetensors file for each.

    Args:
        folder: of :func:`store_captions`.
    """

    def __init__(self, folder: Path, device: torch.device | str = "cpu") -> None:
        if not folder.is_dir():
            raise ValueError(f"captions: {folder} is no folder of embedded captions")
        self.folder, self.device = folder, device

    def __call__(self, captions: Sequence[str]) -> TextEmbedding:
        found = [self._one(caption) for caption in captions]
        length = max(len(row["context"]) for row in found)
        padded = [{**row, **{name: _longer(row[name], length) for name in ("context", "mask")}} for row in found]
        stacked = {name: torch.stack([row[name] for row in padded]).to(self.device) for name in padded[0]}
        return TextEmbedding(stacked["context"], stacked["mask"], stacked.get("pooled"))

    def _one(self, caption: str) -> dict[str, Tensor]:
        file = stored_caption(self.folder, caption)
        if not file.is_file():
            raise ValueError(f"captions: {self.folder} has no embedding of {caption[:60]!r}")
        return io.load_tensors(file)


def store_captions(reader: Reader, captions: Sequence[str], folder: Path, *, batch_size: int = 16) -> int:
    """Embed captions into `folder`, one file for each; those that are there stay. Returns how many were added.

    The empty caption is needed for caption dropout and guidance, so it is always among them.
    """
    wanted = [text for text in dict.fromkeys(("", *captions)) if not stored_caption(folder, text).is_file()]
    for start in range(0, len(wanted), batch_size):
        part = wanted[start : start + batch_size]
        with torch.no_grad():
            text = reader(part)
        for index, caption in enumerate(part):
            tensors = {"context": text.context[index], "mask": text.mask[index]}
            if text.pooled is not None:
                tensors["pooled"] = text.pooled[index]
            io.save_tensors(stored_caption(folder, caption), tensors)
    return len(wanted)


def stored_caption(folder: Path, caption: str) -> Path:
    """Where a caption's embedding is kept."""
    name = hashlib.sha256(caption.encode()).hexdigest()
    return folder / name[:2] / f"{name}.safetensors"


def _longer(tensor: Tensor, length: int) -> Tensor:
    """A tensor [L, ...] with zeros behind it: [length, ...]."""
    longer = tensor.new_zeros(length, *tensor.shape[1:])
    longer[: len(tensor)] = tensor
    return longer
