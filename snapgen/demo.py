"""The main job behind `make demo`: draw, score, time, export, count, and write it all to one report.html.

Sections run in order, each on its own; one that cannot run for a known reason (an optional package is missing) says so
in the report. Everything else that goes wrong stops the demo.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from rich.console import Console

from snapgen import io, report
from snapgen.pipeline import SnapGenPipeline
from snapgen.report import Html, Section
from snapgen.sections import DISTILLED, MANY, SECTIONS, Run


def run(
    out: str | Path,
    *,
    per_skill: int = 25,
    console: Console | None = None,
    checkpoint: str | Path = "tiny",
    only: Sequence[str] = (),
) -> Path:
    """Run the demo; returns the path of its report.

    Args:
        out: folder to write to; files of an earlier run are replaced, each whole or not at all.
        per_skill: captions for each of the six skills when scoring.
        checkpoint: a folder, or the name of a shipped one.
        only: names of SECTIONS; by default all.

    Raises:
        ValueError: an argument does not fit.
        RuntimeError: the benchmark failed, as it does when a fused op is wrong.
    """
    out, console, begun = Path(out).resolve(), console or Console(), time.perf_counter()
    if per_skill < 1:
        raise ValueError(f"per_skill: got {per_skill}; must be at least 1")
    unknown = [name for name in only if name not in SECTIONS]
    if unknown:
        raise ValueError(f"only: got {', '.join(map(repr, unknown))}; allowed are {', '.join(SECTIONS)}")
    chosen = {name: section for name, section in SECTIONS.items() if not only or name in only}
    _quiet()
    pipe = SnapGenPipeline.from_pretrained(checkpoint)
    few = SnapGenPipeline.from_pretrained(DISTILLED) if checkpoint == "tiny" else pipe
    state = Run(out, str(checkpoint), pipe, per_skill, few)
    console.print(
        f"[bold]SnapGen demo[/]: {', '.join(chosen)}; into {out}; about 2 minutes for all on 2 cores",
        soft_wrap=True,
        highlight=False,
    )
    sections = []
    for number, (name, make) in enumerate(chosen.items(), 1):
        place, start = f"{number}/{len(chosen)}", time.perf_counter()
        with console.status(f"{place}  {name}") as status:
            state.say = lambda text, place=place, name=name: status.update(f"{place}  {name}: {text}")  # type: ignore[misc]
            made = make(state)
        seconds = time.perf_counter() - start
        sections.append(dataclasses.replace(made, name=name, seconds=seconds))
        console.print(
            f"[green]{place}[/]  {name:9}{report.duration(seconds):>12}  {made.summary}",
            soft_wrap=True,
            highlight=False,
        )
    whole = time.perf_counter() - begun
    path = out / "report.html"
    io.write_text(path, _page(state, sections, whole))
    console.print(f"wrote {path} in {report.duration(whole)}; open it in a browser", soft_wrap=True, highlight=False)
    return path


def _page(state: Run, sections: Sequence[Section], seconds: float) -> str:
    from snapgen import info

    parts = [state.pipe.denoiser, state.pipe.decoder, state.pipe.text_encoder]
    params = sum(p.numel() for module in parts if module is not None for p in module.parameters())
    side = state.pipe.denoiser.config.sample_size * state.pipe.decoder.upscale
    lead = report.paragraph(
        f"SnapGen (CVPR 2025) draws 1024×1024 pictures from text on a phone with 0.38 billion parameters. This page "
        f"shows its architecture small: a {side}×{side} model, trained on a CPU with the code of this repository on "
        f"captions of coloured shapes. Every picture and figure here was made on this machine by the run that wrote it."
    )
    figures = [
        *state.figures,
        (info.si(params), "parameters: denoiser, text encoder and decoder"),
        (report.duration(seconds), "for everything on this page"),
    ]
    hero = [report.figures(figures)]
    if state.hero:
        hero += [
            Html(state.hero),
            report.paragraph(
                f"Prompts that training never showed, {MANY} steps, first try of seed 0. A program reads each picture "
                f"and says whether it shows what was asked: ",
                Html('<span class="right">✓</span> or <span class="wrong">✗</span>'),
                "; hover for its reason.",
            ),
        ]
    colophon = report.join(
        Html("<h2>This machine</h2>\n"),
        report.table(["", ""], info.machine().items(), left=2),
        Html(f'<p class="made">{report.code("snapgen info --device")}'
             f"<span>{report.text(datetime.now().astimezone().strftime('%Y-%m-%d %H:%M %Z'))}</span></p>\n"),
    )  # fmt: skip
    return report.page("SnapGen", lead, report.join(*hero), sections, colophon)


def _quiet() -> None:
    """Keep the bars of the libraries that load checkpoints off the terminal, which shows our own progress."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
