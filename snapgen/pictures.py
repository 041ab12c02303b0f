"""Tensors to pictures, and pictures to one captioned grid."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from snapgen import io

_CAPTION = 30  # pixels below each picture


def to_pictures(images: Tensor) -> list[Image.Image]:
    """Pictures [B, 3, H, W] in [-1, 1] as PIL images; values outside are clipped."""
    pixels = ((images.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(picture) for picture in pixels]


def grid(
    pictures: Sequence[Image.Image], *, captions: Sequence[str] = (), columns: int = 0, size: int = 128
) -> Image.Image:
    """Pictures in rows, each `size` pixels wide, with captions below if given. `columns` 0 makes it about square."""
    if not pictures:
        raise ValueError("pictures: there are none to draw")
    columns = columns or math.ceil(math.sqrt(len(pictures)))
    rows = math.ceil(len(pictures) / columns)
    gap, footer = 8, _CAPTION if captions else 0
    sheet = Image.new("RGB", (gap + columns * (size + gap), gap + rows * (size + footer + gap)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=11)
    for index, picture in enumerate(pictures):
        left, top = gap + index % columns * (size + gap), gap + index // columns * (size + footer + gap)
        sheet.paste(picture.resize((size, size), Image.Resampling.BICUBIC), (left, top))
        if captions:
            draw.multiline_text(
                (left + size // 2, top + size + 2),
                _wrapped(captions[index], draw, font, size),
                fill="#222222",
                font=font,
                anchor="ma",
                align="center",
                spacing=1,
            )
    return sheet


def save_grid(pictures: Sequence[Image.Image], path: str | Path, **options: Any) -> None:
    """`grid`, written whole or not at all."""
    sheet = grid(pictures, **options)
    with io.whole_file(path) as temporary:
        sheet.save(temporary)


def _wrapped(text: str, draw: ImageDraw.ImageDraw, font: Any, width: int) -> str:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if draw.textlength(longer, font=font) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return "\n".join(lines)
