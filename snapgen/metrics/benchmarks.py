"""Drawing for benchmarks: pictures of prompts, each of a noise of its own, into files. Run again, it goes on.

Pictures appear whole or not at all, so one that is there is done.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console
from rich.progress import track

from snapgen import io, seeds


@dataclass(frozen=True, kw_only=True)
class DrawConfig:
    """How to draw. It is recorded with the pictures, which no other goes on with."""

    steps: int | None = None
    """Euler steps; by default the checkpoint's own."""
    guidance: float | None = None
    """Classifier-free guidance scale; by default the checkpoint's own."""
    per_prompt: int = 4
    """Pictures of each prompt."""
    batch_size: int = 8
    """Pictures drawn at once; without effect on them."""
    seed: int = 0
    """Decides the noise."""

    def __post_init__(self) -> None:
        for name in ("steps", "per_prompt", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: got {value}; must be at least 1")

    def of(self, pipe: Any) -> DrawConfig:
        """The same, with what was left open as `pipe` draws by itself."""
        steps = pipe.config.steps if self.steps is None else self.steps
        guidance = pipe.config.guidance if self.guidance is None else self.guidance
        return dataclasses.replace(self, steps=steps, guidance=guidance)

    def record(self) -> dict[str, Any]:
        """What decides the pictures, for JSON."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "batch_size"}


def claim(out: Path, record: dict[str, Any]) -> None:
    """Record what is drawn into `out`, or check that it holds the same.

    Raises:
        ValueError: it holds pictures drawn in another way.
    """
    path = out / "drawn.json"
    if path.exists():
        there = io.read_json(path)
        wrong = [key for key in sorted(record.keys() | there.keys()) if record.get(key) != there.get(key)]
        if wrong:
            listed = "; ".join(f"{key} was {there.get(key)!r}, now {record.get(key)!r}" for key in wrong)
            raise ValueError(f"{out} holds pictures drawn in another way ({listed}); choose another directory")
    else:
        io.write_json(path, record)


def draw_files(
    pipe: Any, wanted: Sequence[tuple[int, str, Path]], config: DrawConfig, console: Console | None = None
) -> int:
    """Draw what is not there yet of (number of its noise, prompt, file); returns how many that were."""
    missing = [entry for entry in wanted if not entry[2].is_file()]
    parts = [missing[first : first + config.batch_size] for first in range(0, len(missing), config.batch_size)]
    quiet = getattr(pipe, "_progress_bar_config", {})
    pipe.set_progress_bar_config(disable=True)
    try:
        for part in track(parts, "drawing", console=console, disable=console is None):
            pictures = pipe(
                [prompt for _, prompt, _ in part],
                num_inference_steps=config.steps,
                guidance_scale=config.guidance,
                generator=[seeds.generator(config.seed, number) for number, _, _ in part],
            ).images
            for (_, _, path), picture in zip(part, pictures, strict=True):
                save(picture, path)
    finally:
        pipe.set_progress_bar_config(**quiet)
    return len(missing)


def save(picture: Image.Image, path: Path) -> None:
    """Write a picture whole or not at all."""
    with io.whole_file(path) as temporary:
        picture.save(temporary)


def mean(values: Iterable[float]) -> float:
    """The mean; there is at least one."""
    found = list(values)
    return sum(found) / len(found)
