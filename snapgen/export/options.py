"""How a pipeline is exported, in one place for the function and the command."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

PARTS = ("denoiser", "decoder", "text_encoder", "text_encoder_2", "text_encoder_3")
TARGETS = ("iOS17", "iOS18")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to export, and for what.

    Raises:
        ValueError: a value is none of those allowed; names it.
    """

    parts: tuple[str, ...] = ()
    """Any of denoiser, decoder, text_encoder (CLIP-L, or the one that was trained along), text_encoder_2 (CLIP-G) and
    text_encoder_3 (Gemma-2); by default all that the pipeline has."""

    target: Literal["iOS17", "iOS18"] = "iOS17"
    """Oldest system that runs the packages (iOS18 with macOS 15)."""

    batch: Literal[1, 2] = 2
    """Of the denoiser: 2 takes both halves of classifier-free guidance in one call, 1 takes them in two."""

    steps: int | None = None
    """Fix the number of Euler steps: the denoiser then takes their time embeddings, from Schedule.json, not times."""

    query_chunk: int | None = None
    """Attend with this many queries at a time, so that scores of large pictures fit the engine's memory."""

    chunks: bool = False
    """Cut the denoiser into two packages, for phones that cannot load it whole."""

    def __post_init__(self) -> None:
        for name in self.parts:
            if name not in PARTS:
                raise ValueError(f"parts: unknown part {name!r}; choose from {', '.join(PARTS)}")
        if len(set(self.parts)) != len(self.parts):
            raise ValueError(f"parts: {', '.join(self.parts)} names one twice")
        if self.target not in TARGETS:
            raise ValueError(f"target: got {self.target!r}; allowed are {', '.join(TARGETS)}")
        if self.batch not in (1, 2):
            raise ValueError(f"batch: got {self.batch!r}; allowed are 1 and 2")
        for name in ("steps", "query_chunk"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: got {value}; must be at least 1")


DEFAULTS = Options()
