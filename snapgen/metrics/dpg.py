"""DPG-Bench: whether pictures show all that a long prompt says, asked question by question (Hu et al. 2024, ELLA).

Prompts are a folder of .txt files, whose names are the prompts' identifiers. Pictures are drawn as the benchmark
expects them, the four of a prompt as a 2x2 sheet <identifier>.png, so that its own program can judge them. Or a
:class:`Questioner` is handed in with the benchmark's dpg_bench.csv, and the scores are computed here.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from PIL import Image
from rich.console import Console
from rich.progress import track

from snapgen.metrics.benchmarks import DrawConfig, claim, draw_files, mean, save

COLUMNS = ("item_id", "proposition_id", "dependency", "category_broad", "question_natural_language")


class Questioner(Protocol):
    """What answers questions on pictures: the benchmark takes mPLUG-large."""

    def answer(self, picture: Image.Image, question: str) -> str:
        """The answer; "yes" counts, anything else does not."""
        ...


class Question(NamedTuple):
    """One of a prompt's questions."""

    number: int
    text: str
    needs: tuple[int, ...]  # numbers of the questions without whose "yes" this one has none
    category: str  # entity, attribute, relation, global, other


def read_prompts(folder: Path) -> dict[str, str]:
    """Prompts by identifier, in the order of their names.

    Raises:
        ValueError: the folder does not exist or holds none, or a file is no text or empty; names it.
    """
    if not folder.is_dir():
        raise ValueError(f"prompts: {folder} is no folder; it is part of ELLA (dpg_bench/prompts)")
    found = {}
    for path in sorted(folder.glob("*.txt"), key=lambda path: (not path.stem.isdigit(), path.stem.zfill(12))):
        try:
            found[path.stem] = path.read_text(encoding="utf-8").strip()
        except UnicodeDecodeError as error:
            raise ValueError(f"prompts: {path} is no text ({error})") from error
        if not found[path.stem]:
            raise ValueError(f"prompts: {path} is empty")
    if not found:
        raise ValueError(f"prompts: {folder} holds no .txt file")
    return found


def draw(pipe: Any, prompts: Mapping[str, str], out: Path, config: DrawConfig, console: Console | None = None) -> None:
    """Draw the benchmark's pictures: single ones into out/single, and from them the sheets into out/sheets; goes on
    where it was stopped.

    Raises:
        ValueError: `out` holds pictures that were drawn in another way, or `per_prompt` is neither 1 nor 4.
    """
    if config.per_prompt not in (1, 4):
        raise ValueError(f"per_prompt: got {config.per_prompt}; a sheet holds 1 or 4 pictures")
    config = config.of(pipe)
    claim(out, {"benchmark": "DPG-Bench", "prompts": len(prompts), **config.record()})
    count = config.per_prompt
    files = {name: [out / "single" / f"{name}-{sample}.png" for sample in range(count)] for name in prompts}
    wanted = [
        (number * count + sample, prompts[name], path)
        for number, (name, paths) in enumerate(files.items())
        for sample, path in enumerate(paths)
    ]
    draw_files(pipe, wanted, config, console)
    for name, paths in files.items():
        if not (out / "sheets" / f"{name}.png").is_file():
            save(sheet([Image.open(path) for path in paths]), out / "sheets" / f"{name}.png")


def sheet(pictures: Sequence[Image.Image]) -> Image.Image:
    """One picture, or four as a 2x2 sheet."""
    if len(pictures) == 1:
        return pictures[0].copy()
    width, height = pictures[0].size
    found = Image.new("RGB", (2 * width, 2 * height))
    for number, picture in enumerate(pictures):
        found.paste(picture, (number % 2 * width, number // 2 * height))
    return found


def read_questions(path: Path) -> dict[str, list[Question]]:
    """The questions of dpg_bench.csv by prompt.

    Raises:
        ValueError: it does not exist, or a line is not as it must be; names it.
    """
    if not path.is_file():
        raise ValueError(f"questions: {path} does not exist; it is part of ELLA (dpg_bench/dpg_bench.csv)")
    found: dict[str, list[Question]] = {}
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
        if missing:
            raise ValueError(f"questions: {path} has no column {', '.join(missing)}")
        for row in reader:
            try:
                needs = tuple(int(number) for number in row["dependency"].split(",") if int(number))
                question = Question(
                    int(row["proposition_id"]), row["question_natural_language"], needs, row["category_broad"].strip()
                )
            except (ValueError, TypeError, AttributeError) as error:
                raise ValueError(f"{path}:{reader.line_num}: no question ({error})") from error
            found.setdefault(row["item_id"], []).append(question)
    return found


def score(
    sheets: Path,
    questions: Mapping[str, Sequence[Question]],
    questioner: Questioner,
    *,
    pictures: int = 4,
    console: Console | None = None,
) -> dict[str, Any]:
    """Ask about the sheets in a folder.

    Args:
        pictures: on a sheet, 1 or 4.

    Returns:
        overall: 100 times the mean over prompts, of the mean over their pictures, of the share of questions that were
            answered "yes" and whose requirements were, too. categories: 100 times the share of "yes" by category,
            requirements aside, over all pictures (the benchmark's program takes each prompt's last picture alone).
        prompts: how many. without_picture: the prompts that have none.

    Raises:
        ValueError: no prompt has a picture, or `pictures` is neither 1 nor 4.
    """
    if pictures not in (1, 4):
        raise ValueError(f"pictures: got {pictures}; a sheet holds 1 or 4")
    prompts, missing = [], []
    by_category: dict[str, list[bool]] = {}
    for name, asked in track(questions.items(), "asking", console=console, disable=console is None):
        path = sheets / f"{name}.png"
        if not path.is_file():
            missing.append(name)
            continue
        with Image.open(path) as opened:
            parts = cut(opened.convert("RGB"), pictures)
        shares = []
        for part in parts:
            answers = {question.number: questioner.answer(part, question.text) == "yes" for question in asked}
            shares.append(share(asked, answers))
            for question in asked:
                by_category.setdefault(question.category, []).append(answers[question.number])
        prompts.append(mean(shares))
    if not prompts:
        raise ValueError(f"pictures: {sheets} holds none of the prompts' (such as {next(iter(questions), '0')}.png)")
    return {
        "overall": 100 * mean(prompts),
        "categories": {name: 100 * mean(found) for name, found in sorted(by_category.items())},
        "prompts": len(prompts),
        "without_picture": missing,
    }


def share(questions: Sequence[Question], answers: Mapping[int, bool]) -> float:
    """The share of questions that hold: answered "yes", and so were all that they need, in turn."""
    holds: dict[int, bool] = {}
    for question in questions:  # those that others need come first
        needed = all(holds.get(number, answers.get(number, False)) for number in question.needs)
        holds[question.number] = answers[question.number] and needed
    return mean(holds.values())


def cut(picture: Image.Image, pictures: int) -> list[Image.Image]:
    """The pictures on a sheet, row by row."""
    if pictures == 1:
        return [picture]
    width, height = picture.width // 2, picture.height // 2
    corners = [(column * width, row * height) for row in (0, 1) for column in (0, 1)]
    return [picture.crop((left, top, left + width, top + height)) for left, top in corners]
