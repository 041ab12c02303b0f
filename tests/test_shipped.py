"""The checkpoints that ship: small enough, plain safetensors, and as good as their cards say."""

import json

import pytest

from snapgen.config import SHIPPED
from snapgen.data.shapes import SKILLS
from snapgen.evaluate import score_shapes
from snapgen.pipeline import SnapGenPipeline

GOOD = {"tiny": 0.9, "tiny-4": 0.85}  # overall, as they draw by themselves


@pytest.mark.parametrize("name", sorted(path.name for path in SHIPPED.iterdir()))
def test_they_are_small_and_hold_no_pickle(name):
    files = [path for path in (SHIPPED / name).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 12e6
    assert {path.suffix for path in files} == {".safetensors", ".json", ".md"}
    assert name in GOOD


@pytest.mark.parametrize("name, steps", [("tiny", 28), ("tiny", 4), ("tiny-4", 4)])
def test_their_scores_are_those_recorded(name, steps):
    """Other captions and noise than the recorded ones, so within four standard errors of both together."""
    recorded = json.loads((SHIPPED / name / "scores.json").read_text())
    pipe = SnapGenPipeline.from_pretrained(name)
    if steps == pipe.config.steps:
        assert recorded[f"{steps} steps"]["overall"] >= GOOD[name]
    assert all(row["overall"] < 0.1 for key, row in recorded.items() if key.startswith("untrained"))
    count = 12
    measured = score_shapes(pipe, steps=steps, guidance=pipe.config.guidance, per_skill=count, seed=7)
    there = recorded[f"{steps} steps"]
    variance = sum(there[s] * (1 - there[s]) * (1 / count + 1 / 100) for s in SKILLS) / len(SKILLS) ** 2
    assert abs(measured["overall"] - there["overall"]) <= 4 * variance**0.5
