"""What a run reports, and where to."""

import types
from pathlib import Path

import pytest
import torch
from PIL import Image
from small_models import QUIET, denoiser_task
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_train import config, data

from snapgen.logs import Journal, peak_memory, peak_rate, progress
from snapgen.train import train

CPU = torch.device("cpu")


class Page:
    """In Weights & Biases' place."""

    def __init__(self, **settings):
        self.settings, self.logged, self.finished = settings, [], False

    def log(self, figures, step):
        self.logged.append((step, figures))

    def finish(self):
        self.finished = True


def test_figures_reach_every_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pages: list[Page] = []

    def init(**settings):
        pages.append(Page(**settings))
        return pages[-1]

    stand_in = types.SimpleNamespace(init=init, Image=lambda picture: ("picture", picture.size))
    monkeypatch.setitem(__import__("sys").modules, "wandb", stand_in)
    shown = []
    journal = Journal(tmp_path / "run", {"lr": 0.1}, lambda step, text: shown.append((step, text)), wandb="project")
    journal.report(7, {"loss": 0.25}, {"lr": 0.1}, "30 images/s")
    Image.new("RGB", (8, 6)).save(tmp_path / "grid.png")
    journal.picture(7, tmp_path / "grid.png")
    journal.close()
    assert shown == [(7, "loss 0.2500  30 images/s")]
    (page,) = pages
    assert (
        page.settings["project"] == "project" and len(page.settings["id"]) == 16 and page.settings["resume"] == "allow"
    )
    assert page.logged == [(7, {"loss": 0.25, "lr": 0.1}), (7, {"samples": ("picture", (8, 6))})] and page.finished
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(7, 0.25)]
    assert events.Images("samples")[0].step == 7


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(ValueError, match="wandb: got 'project', but the package wandb is not installed"):
        Journal(tmp_path, {}, lambda *_: None, wandb="project")


def test_a_run_reports_speed_memory_and_share_of_the_rate(tmp_path: Path) -> None:
    train(denoiser_task(), data(), config(steps=4), tmp_path, console=QUIET)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    last = {name: events.Scalars(name)[-1].value for name in events.Tags()["scalars"]}
    assert last["images_per_second"] > 0 and last["skipped_steps"] == 0
    assert 0 < last["mfu"] < 1
    assert last["memory"] > 1e8  # PyTorch alone has more
    assert {"loss", "grad_norm", "lr"} <= last.keys()


def test_rates_and_memory() -> None:
    rate = peak_rate(CPU, torch.float32)
    assert rate is not None and 1e8 < rate < 1e14
    assert peak_memory(CPU) > 1e8


def test_no_console_no_line() -> None:
    with progress(None, 10, 0) as show:
        show(1, "text")
