"""Scores of a pipeline: the shapes world's six skills on captions that training never showed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from snapgen import seeds
from snapgen.checker import score
from snapgen.data.shapes import SKILLS, eval_captions
from snapgen.pipeline import SnapGenPipeline

Scores = dict[str, float]  # each skill, and "overall", their mean: shares in [0, 1]


def unseen_captions(per_skill: int, seed: int) -> tuple[list[str], list[str]]:
    """`per_skill` captions of each skill and their skills; none occurs in training, but for `single_object`'s six."""
    captions = [(caption, skill) for skill in SKILLS for caption in eval_captions(skill, per_skill, seed)]
    return [caption for caption, _ in captions], [skill for _, skill in captions]


def draw(
    pipe: SnapGenPipeline,
    captions: Sequence[str],
    *,
    steps: int,
    guidance: float,
    seed: int,
    batch_size: int = 50,
    console: Console | None = None,
) -> list[Any]:
    """One picture for each caption. Each has a noise of its own, so the batch size does not change what is drawn."""
    quiet = pipe._progress_bar_config if hasattr(pipe, "_progress_bar_config") else {}
    pipe.set_progress_bar_config(disable=True)
    pictures: list[Any] = []
    try:
        starts = range(0, len(captions), batch_size)
        for start in track(starts, f"drawing, {steps} steps", console=console, disable=console is None):
            part = captions[start : start + batch_size]
            noise = [seeds.generator(seed, start + index) for index in range(len(part))]
            pictures += pipe(part, num_inference_steps=steps, guidance_scale=guidance, generator=noise).images
    finally:
        pipe.set_progress_bar_config(**quiet)
    return pictures


def score_shapes(
    pipe: SnapGenPipeline,
    *,
    steps: int,
    guidance: float,
    per_skill: int,
    seed: int = 0,
    console: Console | None = None,
) -> Scores:
    """The share of pictures that show what an unseen caption says, per skill and overall.

    Args:
        steps: Euler steps. guidance: classifier-free guidance scale.
        per_skill: captions per skill; the standard error of a skill's score p is sqrt(p (1 - p) / per_skill).

    Raises:
        ValueError: `per_skill` is less than 1.
    """
    if per_skill < 1:
        raise ValueError(f"per_skill: got {per_skill}; must be at least 1")
    captions, skills = unseen_captions(per_skill, seed)
    pictures = draw(pipe, captions, steps=steps, guidance=guidance, seed=seed, console=console)
    return score(pictures, captions, skills)


def untrained(pipe: SnapGenPipeline, seed: int) -> SnapGenPipeline:
    """The pipeline with fresh weights in its denoiser and text encoder, as training found them; the rest is shared."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        denoiser = type(pipe.denoiser).from_config(pipe.denoiser.config)
        text_encoder = type(pipe.text_encoder)(pipe.text_encoder.config)
    fresh = {
        name: module.eval().to(device=pipe.device).to(memory_format=torch.channels_last)
        for name, module in (("denoiser", denoiser), ("text_encoder", text_encoder))
    }
    return pipe.having(**fresh)


def print_scores(scores: Mapping[str, Scores], console: Console) -> None:
    """A table with one row for each named set of scores."""
    table = Table(title="Share right, unseen captions of the shapes world")
    table.add_column("")
    for skill in (*SKILLS, "overall"):
        table.add_column(skill.replace("_", " "), justify="right")
    for name, row in scores.items():
        table.add_row(name, *(f"{row[skill]:.2f}" for skill in (*SKILLS, "overall")))
    console.print(table)
