"""Scores of the same runs with several seeds, side by side: python recipes/table.py runs/shapes-0 runs/shapes-1 ..."""

from __future__ import annotations

import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

Scores = dict[str, list[float]]  # skill -> score of each seed


def collect(folders: list[Path]) -> dict[str, Scores]:
    """Scores by "RUN, STEPS steps" of every RUN/scores.json in the folders, in the order of the first one's.

    Raises:
        ValueError: a folder has no scores.
    """
    found: dict[str, Scores] = defaultdict(lambda: defaultdict(list))
    for folder in folders:
        paths = sorted(folder.glob("*/scores.json"), key=lambda path: path.stat().st_mtime)
        if not paths:
            raise ValueError(f"{folder}: holds no */scores.json")
        for path in paths:
            for steps, row in json.loads(path.read_text()).items():
                for skill, score in row.items():
                    found[f"{path.parent.name}, {steps}"][skill].append(score)
    return found


def cell(scores: list[float]) -> str:
    """Mean, and with several seeds half the distance between the best and the worst."""
    spread = f" ± {(max(scores) - min(scores)) / 2:.2f}" if len(scores) > 1 else ""
    return f"{statistics.mean(scores):.2f}{spread}"


def main() -> None:
    found = collect([Path(folder) for folder in sys.argv[1:]])
    table = Table(title=f"Share right, {max(len(next(iter(row.values()))) for row in found.values())} seed(s)")
    skills = list(next(iter(found.values())))
    for heading in ("run", *skills):
        table.add_column(heading.replace("_", " "), justify="left" if heading == "run" else "right")
    for run, row in found.items():
        table.add_row(run, *(cell(row[skill]) for skill in skills))
    Console().print(table)


if __name__ == "__main__":
    main()
