"""How a pipeline is exported, in one place for the function and the command."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

PARTS = ("denoiser", "decoder", "text_encoder", "text_encoder_2", "text_encoder_3")
TARGETS = ("iOS17", "iOS18")


_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class Compression:
    """How weights are stored; see `snapgen.export.compress`."""

    text: str
    form: str | None  # of every weight that is compressed: "palette-8", -6, -4 or "int8"; None: chosen for each
    budget: int | None = None  # bytes of a part's weight files, where forms are chosen

    @classmethod
    def parse(cls, text: str) -> Compression:
        """From "palette-8", "palette-6", "palette-4", "int8", or "mixed:" and a size such as 150MB or 1.5GiB.

        Raises:
            ValueError: it is none of these.
        """
        if text in ("palette-8", "palette-6", "palette-4", "int8"):
            return cls(text, text)
        size = re.fullmatch(r"mixed:(\d+(?:\.\d+)?)([KMG]i?B)", text, re.IGNORECASE)
        if size is None or float(size[1]) == 0:
            raise ValueError(
                f"compress: got {text!r}; allowed are palette-8, palette-6, palette-4, int8, and mixed:SIZE with a "
                "size such as 150MB (10^6 bytes) or 150MiB (2^20)"
            )
        return cls(text, None, int(float(size[1]) * _UNITS[size[2].upper()]))

    @property
    def parts(self) -> tuple[str, ...]:
        """What is compressed where nothing else is asked for.

        Not the decoder: it is 1.4M weights of 380M, and every pixel shows its errors. A budget is the denoiser's alone.
        """
        return ("denoiser",) if self.budget is not None else tuple(part for part in PARTS if part != "decoder")


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

    compress: str | None = None
    """Store weights as palette-8, palette-6, palette-4, int8, or mixed:SIZE (mixed:150MB): bits chosen to fit."""

    compress_parts: tuple[str, ...] = ()
    """Parts to compress; by default all but the decoder, with mixed:SIZE the denoiser alone."""

    def __post_init__(self) -> None:
        for field in ("parts", "compress_parts"):
            names = getattr(self, field)
            for name in names:
                if name not in PARTS:
                    raise ValueError(f"{field}: unknown part {name!r}; choose from {', '.join(PARTS)}")
            if len(set(names)) != len(names):
                raise ValueError(f"{field}: {', '.join(names)} names one twice")
        if self.compress is not None:
            Compression.parse(self.compress)
        elif self.compress_parts:
            raise ValueError(f"compress_parts: got {', '.join(self.compress_parts)}, but no compress to say how")
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

    def compression(self, part: str) -> Compression | None:
        """How a part is compressed; None where it is not."""
        if self.compress is None:
            return None
        found = Compression.parse(self.compress)
        return found if part in (self.compress_parts or found.parts) else None


DEFAULTS = Options()

DTYPES = ("float16", "float32")


@dataclass(frozen=True, kw_only=True)
class CoreAIOptions:
    """What to export through Core AI, and for what.

    Raises:
        ValueError: a value is none of those allowed; names it.
    """

    parts: tuple[str, ...] = ()
    """Any of denoiser, decoder, text_encoder; by default all that the pipeline has."""

    batch: Literal[1, 2] = 2
    """Of the denoiser: 2 takes both halves of classifier-free guidance in one call, 1 takes them in two."""

    steps: int | None = None
    """Fix the number of Euler steps: the denoiser then takes their time embeddings, from Schedule.json, not times."""

    query_chunk: int | None = None
    """Attend with this many queries at a time, so that scores of large pictures fit the engine's memory."""

    dtype: Literal["float16", "float32"] = "float16"
    """Of weights, inputs, outputs and all between; the Neural Engine takes float16 alone."""

    check_seconds: float = 600.0
    """How long the check of one part may take. 0 checks nothing and keeps the assets as they are."""

    def __post_init__(self) -> None:
        self.of_parts()
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype: got {self.dtype!r}; allowed are {', '.join(DTYPES)}")
        if not 0 <= self.check_seconds < float("inf"):
            raise ValueError(f"check_seconds: got {self.check_seconds}; must be finite and not negative")

    def of_parts(self) -> Options:
        """The options that decide the form of the parts, whatever they are exported through."""
        return Options(parts=self.parts, batch=self.batch, steps=self.steps, query_chunk=self.query_chunk)


COREAI_DEFAULTS = CoreAIOptions()
