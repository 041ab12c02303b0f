"""Recipes are commands that exist, with options that exist, and their batches can be dealt out on 8 and on 256 GPUs."""

import dataclasses
import functools
import json
import os
import re
import runpy
import shlex
import subprocess
from pathlib import Path

import pytest

from snapgen import cli
from snapgen.data.loader import Share
from snapgen.plan import make_plan

pytestmark = pytest.mark.method

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "recipes").glob("*.sh"))


def commands(recipe: Path, folder: Path) -> list[list[str]]:
    """The words of every command of a recipe, as the shell has them."""
    (folder / "python").write_text('#!/bin/sh\nprintf "%s\\n" "$*"\n')
    (folder / "python").chmod(0o755)
    done = subprocess.run(
        ["bash", str(recipe)],
        capture_output=True,
        text=True,
        check=True,
        cwd=folder,
        env={**os.environ, "LAUNCH": "echo", "PATH": f"{folder}:{os.environ['PATH']}"},
    )
    lines = [shlex.split(line) for line in done.stdout.splitlines()]
    assert all(line[:2] == ["-m", "snapgen"] for line in lines)
    assert len(lines) >= len(re.findall(r"-m snapgen ", recipe.read_text()))  # loops run theirs several times
    return [line[2:] for line in lines]


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """What every command was told, in place of its work."""
    told: list[dict] = []

    def instead(command):
        @functools.wraps(command)
        def record(**settings):
            told.append({"command": command.__name__, **settings})

        return record

    groups = {}
    for name, (stand_in, about, load) in cli.GROUPS.items():
        loaded = load()
        own = {key: instead(value) for key, value in loaded.items()} if isinstance(loaded, dict) else instead(loaded)
        groups[name] = (stand_in, about, lambda own=own: own)
    monkeypatch.setattr(cli, "GROUPS", groups)
    monkeypatch.setattr(cli, "COMMANDS", {name: instead(command) for name, command in cli.COMMANDS.items()})
    return told


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_command_of_a_recipe_parses_and_can_be_dealt_out(recipe, tmp_path, parsed):
    lines = commands(recipe, tmp_path)
    for words in lines:
        cli.main(words)
    assert len(parsed) == len(lines)
    worlds = (1,) if recipe.stem == "shapes" else (8, 256)  # the small one is for one process
    for settings in parsed:
        config = settings.get("config")
        if dataclasses.is_dataclass(config) and hasattr(config, "micro_batch"):
            for world in worlds:
                Share(config.batch_size, config.micro_batch or config.batch_size // world, 0, world)


@pytest.mark.parametrize("world", [8, 256])
@pytest.mark.parametrize("recipe", ["imagenet-256", "t2i-1024"])
def test_the_large_runs_fit_into_a_gpu(recipe, world, tmp_path, parsed):
    for words in commands(ROOT / "recipes" / f"{recipe}.sh", tmp_path):
        cli.main(words)
    plans = [
        make_plan(settings["source"], settings["config"], world)
        for settings in parsed
        if settings["command"] in ("train", "distill", "distill_steps")
    ]
    assert plans and all(plan.total < 70 * 2**30 for plan in plans), "more than a GPU of 80 GB holds"


def test_every_recipe_is_listed():
    listed = (ROOT / "recipes" / "README.md").read_text()
    assert RECIPES and all(f"`{recipe.name}`" in listed for recipe in RECIPES)


def test_scores_of_several_seeds(tmp_path, capsys, monkeypatch):
    scores = {"runs-0": 0.5, "runs-1": 0.7}
    for folder, score in scores.items():
        path = tmp_path / folder / "alone" / "scores.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"28 steps": {"colors": score, "overall": score / 2}}))
    monkeypatch.setattr("sys.argv", ["table.py", *(str(tmp_path / folder) for folder in scores)])
    runpy.run_path(str(ROOT / "recipes" / "table.py"), run_name="__main__")
    said = capsys.readouterr().out
    assert "alone, 28 steps" in said and "0.60 ± 0.10" in said and "0.30 ± 0.05" in said and "2 seed(s)" in said
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr("sys.argv", ["table.py", str(tmp_path / "empty")])
    with pytest.raises(ValueError, match=r"holds no \*/scores.json"):
        runpy.run_path(str(ROOT / "recipes" / "table.py"), run_name="__main__")
