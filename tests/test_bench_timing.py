"""Who is timed when, what memory is counted, and with which malloc."""

import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from bench import machine, malloc
from bench.results import read
from bench.timing import Clock, Prepared, inference_step, interleaved, peak_bytes, training_step
from tests.bench_runs import TINY

# ---- timing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("seconds", "rounds"), [(1e-6, 3), (1.0, 5)])
def test_providers_take_turns(seconds: float, rounds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """At least five rounds, three where one takes longer than all were meant to."""
    from bench import timing

    order: list[str] = []
    monkeypatch.setattr(timing, "_MOST", 5)

    def step(name: str) -> list:
        return [lambda: order.append(name)]

    found = interleaved({name: step(name) for name in "abc"}, Clock("cpu"), seconds)
    turns = [order[i : i + 3] for i in range(len(order) - 3 * rounds, len(order), 3)]
    assert all(sorted(turn) == list("abc") for turn in turns)
    assert {turn[0] for turn in turns} == set("abc"), "each one comes first in its turn"
    assert all(len(times) == rounds for times in found.values())
    order.clear()
    interleaved({name: step(name) for name in "abc"}, Clock("cpu"), seconds, warm=True)
    assert len(order) == 3 * rounds


def test_nobody_follows_a_runtime_with_threads_of_its_own_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from bench import timing

    order: list[str] = []
    monkeypatch.setattr(timing, "_MOST", 12)
    monkeypatch.setattr(timing.time, "sleep", lambda seconds: order.append("rest"))

    def step(name: str) -> list:
        return [lambda: order.append(name)]

    interleaved({name: step(name) for name in "abcd"}, Clock("cpu"), 10.0, warm=True, own_threads=("b",))
    pairs = set(pairwise(order))
    assert {after for before, after in pairs if before == "b"} == {"rest"}
    assert {after for before, after in pairs if before == "a"} == set("bcd"), "every round has an order of its own"


def test_peak_memory_counts_what_is_held_at_once() -> None:
    x = torch.ones(1 << 18)  # 1 MiB
    step = inference_step(Prepared(lambda: (x + 1) * 2))
    peak = peak_bytes(step, "cpu")
    assert 2 << 20 <= peak < (2 << 20) + 4096
    y = torch.ones(1 << 18, requires_grad=True)
    trained = peak_bytes(training_step(Prepared(lambda: y.exp(), (y,))), "cpu")
    assert 2 << 20 <= trained < (2 << 20) + 4096  # the output, kept for the backward, and the gradient


def test_peak_memory_leaves_out_what_replaces_what_was_there() -> None:
    kept = [torch.ones(1 << 18)]  # 1 MiB

    def replace_it() -> None:
        kept[0] = kept[0] + 1

    assert 2 << 20 > peak_bytes([replace_it], "cpu", twice=True) >= 1 << 20
    more: list[torch.Tensor] = []
    assert 2 << 20 > peak_bytes([lambda: more.append(torch.ones(1 << 18))], "cpu", twice=True) >= 1 << 20


# ---- malloc ----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(malloc.state() == "none", reason="malloc is not glibc's")
def test_python_starts_anew_with_malloc_as_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in malloc.TUNED:
        monkeypatch.delenv(name, raising=False)
    assert malloc.state() == "stock"
    assert malloc.command("stock", ["--quick"]) is None
    anew = malloc.command("tuned", ["--quick"])
    assert anew is not None
    arguments, environment = anew
    assert arguments == [sys.executable, "-m", "bench", "--quick"]
    assert malloc.state(environment) == "tuned"
    for name, value in malloc.TUNED.items():
        monkeypatch.setenv(name, value)
    assert malloc.command("tuned", []) is None
    back = malloc.command("stock", [])
    assert back is not None and malloc.state(back[1]) == "stock"
    monkeypatch.setenv("MALLOC_TOP_PAD_", "1")
    assert malloc.state() == "other"


@pytest.mark.skipif(malloc.state() == "none", reason="malloc is not glibc's")
@pytest.mark.parametrize("wanted", ["tuned", "stock"])
def test_the_command_records_its_malloc(wanted: str, tmp_path: Path) -> None:
    out = tmp_path / "rows.csv"
    arguments = [
        *TINY,
        "--dtype",
        "fp32",
        "--mode",
        "fwd",
        "--providers",
        "eager",
        "--malloc",
        wanted,
        "--threads",
        "1",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "bench", *arguments, "--out", str(out)],
        cwd=machine.ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert [r.malloc for r in read(out)] == [wanted]
    assert [r.threads for r in read(out)] == [1]
