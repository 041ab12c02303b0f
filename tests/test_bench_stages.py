"""Where a model's time goes: every weight belongs to one part, costs are those of the whole, and the table adds up."""

from __future__ import annotations

import sys
import types
from dataclasses import replace
from io import StringIO

import pytest
import torch
from rich.console import Console

from bench import limits, models, picture, stages
from bench.cases import Cost
from bench.stages import Part, Stages, main, measure, parts_of, stage_of, table

SMALL = {case.op: case for case in models.CASES if not case.bench and case.name == "small"}


@pytest.mark.parametrize("op", ["denoiser", "decoder"])
def test_every_weight_belongs_to_one_part(op: str) -> None:
    network = models.without_memory(SMALL[op])
    owned = [id(p) for module in parts_of(network).values() for p in module.parameters()]
    assert sorted(owned) == sorted(id(p) for p in network.parameters())


@pytest.mark.parametrize("op", ["denoiser", "decoder"])
def test_parts_are_counted_and_timed(op: str) -> None:
    case = SMALL[op]
    parts, whole = measure(case, rounds=3)
    network, _ = models.network_and_feeds(case)
    called = list(parts_of(network))
    assert [part.name for part in parts] == called
    assert all(len(part.times) == 3 and part.ms > 0 for part in parts)
    assert 0 < sum(part.ms for part in parts) < 1.5 * whole  # medians of different passes
    assert sum(part.cost.flops for part in parts) == pytest.approx(models.costs(case)[0], rel=1e-3)
    weights = sum(p.numel() * p.element_size() for name in called for p in network.get_submodule(name).parameters())
    assert sum(part.cost.bytes for part in parts) > weights
    models.release()


def test_a_training_step_is_timed_by_the_loops_own_ranges() -> None:
    case = SMALL["train"]
    parts, whole = measure(case, rounds=3)
    assert [part.name for part in parts] == ["forward", "backward", "optimizer", "average"]
    assert all(len(part.times) == 3 and part.ms > 0 for part in parts)
    assert 0 < sum(part.ms for part in parts) < 1.5 * whole
    flops, _ = models.costs(case)
    forward, backward, optimizer, _ = (part.cost for part in parts)
    assert forward.flops + backward.flops == flops and 1.2 < backward.flops / forward.flops <= 2
    denoiser, text = (models.make_task(case)[0].modules[name] for name in ("denoiser", "text_encoder"))
    weights = sum(p.numel() for module in (denoiser, text) for p in module.parameters())
    assert optimizer.bytes == 7 * 4 * weights
    models.release()


def test_a_picture_is_timed_from_its_prompt_on() -> None:
    case = SMALL["picture"]
    parts, whole = measure(case, rounds=3)
    text, denoise, decode = parts
    assert [part.name for part in parts] == ["text", "denoise", "decode"]
    assert all(len(part.times) == 3 and part.ms > 0 for part in parts)
    assert 0 < sum(part.ms for part in parts) < 1.5 * whole
    once = models.costs(SMALL["decoder"])[0] * case.side**2 / SMALL["decoder"].side ** 2
    assert decode.cost.flops == pytest.approx(once, rel=1e-3)
    weights = sum(p.numel() for p in models.without_memory(SMALL["denoiser"]).parameters())
    assert denoise.cost.bytes == picture.STEPS * 4 * weights and text.cost.flops > 0
    pipe = picture.make_pipeline(case)
    tables = sum(m.weight.numel() for m in pipe.text_encoder.modules() if isinstance(m, torch.nn.Embedding))
    assert tables > 0 and text.cost.bytes == 4 * (sum(p.numel() for p in pipe.text_encoder.parameters()) - tables)
    words = len(picture.PROMPT.split()) + 2
    assert denoise.cost.flops == picture.STEPS * models.costs(replace(SMALL["denoiser"], tokens=words))[0]
    models.release()


def test_a_gpu_is_held_up_until_its_work_is_queued(monkeypatch: pytest.MonkeyPatch) -> None:
    """One and a half times as long as the processor took to queue a call after the first two, and never for long."""
    now, calls, slept = [0.0], [], []

    def call() -> None:
        calls.append(now[0])
        now[0] += 10.0 if len(calls) < 3 else 0.02

    monkeypatch.setattr(stages.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "_sleep", slept.append)
    ahead = stages._queueing(call, "cuda")
    assert len(calls) == 3 and slept == []
    ahead()
    assert slept == [pytest.approx(0.03 * 2e9, rel=1e-3)]
    calls.clear()
    stages._queueing(call, "cuda")()  # its third call is quick again
    monkeypatch.setattr(stages, "_LONGEST_HOLD", 0.001)
    calls.clear()
    stages._queueing(call, "cuda")()
    assert slept[-1] == int(0.001 * 2e9)
    calls.clear()
    stages._queueing(call, "cpu")()
    assert len(calls) == 2 and len(slept) == 3


def test_large_text_encoders_have_the_published_sizes() -> None:
    with torch.device("meta"):
        counts = [sum(p.numel() for p in picture._large(name).parameters()) for name in ("clip-l", "clip-g", "gemma-2")]
    assert [round(count / 1e6) for count in counts] == [124, 695, 2614]


def test_the_next_gap_is_the_largest_above_its_floor() -> None:
    rates = limits.Limits({"fp32": 1e9}, ((1 << 28, 1e9),))  # 1e6 FLOPs or bytes are a millisecond
    parts = [
        Part("up.0.layers.0.res", "SepResBlock", Cost(2_000_000, 10), [5.0, 4.0, 3.0]),
        Part("up.0.layers.1.res", "SepResBlock", Cost(10, 1_000_000), [2.0]),
        Part("conv_in", "Conv2d", Cost(6_000_000, 10), [6.5]),
    ]
    found, gap = table(parts, 13.0, rates, torch.float32, "stage")
    assert gap == "next: up.0, 3.000 ms above its floor (23% of the whole)"
    columns = [list(column.cells) for column in found.columns]
    assert columns[0] == ["up.0", "conv_in", stages.REST] and columns[2] == ["6.000", "6.500", "0.500"]
    assert columns[5] == ["2.00x", "1.08x", ""]
    assert table(parts, 13.0, rates, torch.float32, "op")[1].startswith("next: SepResBlock, 3.000 ms")
    assert table(parts, 13.0, rates, torch.float32, "part")[1].startswith("next: up.0.layers.0.res, 2.000 ms")
    assert [stage_of(name) for name in ("down.1.layers.0", "mid.res1", "conv_in")] == ["down.1", "mid", "conv_in"]


def test_ranges_are_named_after_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    class Range:
        def __init__(self, name: str, domain: str) -> None:
            seen.append(name)

        def __enter__(self) -> None: ...

        def __exit__(self, *_: object) -> None: ...

    fake = types.ModuleType("nvtx")
    fake.annotate = Range  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "nvtx", fake)
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: fake)
    measure(SMALL["decoder"], rounds=1, nvtx=True)
    assert {"conv_in", "stages.0.0", "upsamplers.1", "conv_out"} <= set(seen)
    models.release()


@pytest.mark.usefixtures("quick_limits")
@pytest.mark.parametrize(
    "options",
    [
        Stages(preset="tiny", side=2, rounds=1),
        Stages(preset="tiny", side=2, plain=True),
        Stages("train", "tiny"),
        Stages("picture", "tiny", side=8, batch=2, by="op"),
    ],
)
def test_the_command_prints_the_table(options: Stages) -> None:
    text = StringIO()
    assert main(options, Console(file=text, width=120)) == 0
    row = {"train": "backward", "picture": "pictures a second"}.get(options.model, "up.0")
    assert row in text.getvalue() and "next: " in text.getvalue()


@pytest.mark.parametrize(
    "wrong", [dict(preset="huge"), dict(preset="tiny-teacher"), dict(side=0), dict(side=3), dict(rounds=0)]
)
def test_what_cannot_be_measured_is_refused(wrong: dict) -> None:
    text = StringIO()
    assert main(Stages(**wrong), Console(file=text, width=120)) == 2
    assert f"--{next(iter(wrong))}" in text.getvalue()
