"""How a pipeline is exported, in one place for the function and the command."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

PARTS = ("denoiser", "decoder", "text_encoder")
TARGETS = ("iOS17", "iOS18")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to export, and for what.

    Raises:
        ValueError: a value is none of those allowed; names it.
    """

    parts: tuple[str, ...] = ()
    """Any of denoiser, decoder, text_encoder; by default all that the pipeline has."""

    target: Literal["iOS17", "iOS18"] = "iOS17"
    """Oldest system that runs the packages (iOS18 with macOS 15)."""

    batch: Literal[1, 2] = 2
    """Of the denoiser: 2 takes both halves of classifier-free guidance in one call, 1 takes them in two."""

    height: int | None = None
    """Pixels of the picture; by default what the model was trained at."""

    width: int | None = None
    """Pixels of the picture; by default what the model was trained at."""

    sizes: tuple[str, ...] = ()
    """Several sizes of the picture, HEIGHTxWIDTH in pixels: functions of one package, which share weights (iOS18)."""

    batches: tuple[Literal[1, 2], ...] = ()
    """1 2: the denoiser with both batches, as functions of one package, which share weights (iOS18)."""

    tokens: int | None = None
    """Length of the text context; by default what the text encoders give."""

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
        for size in self.sizes:
            if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", size):
                raise ValueError(f"sizes: got {size!r}; a size is HEIGHTxWIDTH in pixels, such as 1024x768")
        for batch in self.batches:
            if batch not in (1, 2):
                raise ValueError(f"batches: got {batch!r}; allowed are 1 and 2")
        for name, values in (("sizes", self.sizes), ("batches", self.batches)):
            if len(set(values)) != len(values):
                raise ValueError(f"{name}: {', '.join(map(str, values))} names one twice")
        if self.sizes and (self.height is not None or self.width is not None):
            raise ValueError("sizes: leave out height and width, or name that size among the sizes")
        if (len(self.sizes) > 1 or len(self.batches) > 1) and self.target != "iOS18":
            raise ValueError(
                f"{'sizes' if len(self.sizes) > 1 else 'batches'}: several functions in one package need target iOS18; "
                f"got {self.target}"
            )
        for name in ("height", "width", "tokens", "steps", "query_chunk"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: got {value}; must be at least 1")


DEFAULTS = Options()
