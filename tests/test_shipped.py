"""The checkpoint that ships: small enough, plain safetensors, and as good as its card says."""

import json

import pytest

from snapgen.config import SHIPPED
from snapgen.data.shapes import SKILLS
from snapgen.evaluate import score_shapes
from snapgen.pipeline import SnapGenPipeline


def test_it_is_small_and_holds_no_pickle():
    files = [path for path in (SHIPPED / "tiny").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 12e6
    assert {path.suffix for path in files} == {".safetensors", ".json", ".md"}


@pytest.mark.parametrize("steps", [28, 4])
def test_its_scores_are_those_recorded(steps):
    """Other captions and noise than the recorded ones, so within four standard errors of both together."""
    recorded = json.loads((SHIPPED / "tiny" / "scores.json").read_text())
    assert recorded["28 steps"]["overall"] >= 0.9 > recorded["untrained, 28 steps"]["overall"]
    count = 12
    pipe = SnapGenPipeline.from_pretrained("tiny")
    measured = score_shapes(pipe, steps=steps, guidance=3.0, per_skill=count, seed=7)
    there = recorded[f"{steps} steps"]
    variance = sum(there[s] * (1 - there[s]) * (1 / count + 1 / 100) for s in SKILLS) / len(SKILLS) ** 2
    assert abs(measured["overall"] - there["overall"]) <= 4 * variance**0.5
