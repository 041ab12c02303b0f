"""Training with the fused operations goes where training without them goes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import pytest
import torch

import snapgen_kernels
from bench.models import ModelCase, make_task
from snapgen import parallel
from snapgen.conditioning import CachedText
from snapgen.data.loader import Batch, Share, batches
from snapgen.runs import denoiser_task
from snapgen.settings import Source, TrainConfig
from snapgen.text import TextEmbedding
from snapgen.train import TrainState, optimizer_step, share_of

pytestmark = pytest.mark.method

# The preset `tiny` from seed 0 on the first 96 pictures of the shapes world, in fp32.
GOLDEN = (1.980671, 2.146351, 2.133125, 1.717916, 2.036508, 1.905758, 2.033385, 1.912959, 1.618288, 1.936039, 1.735754,
          1.74635)  # fmt: skip


@pytest.fixture(autouse=True)
def _on_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose sums the recorded losses have."""
    monkeypatch.setattr(parallel, "own_device", lambda: torch.device("cpu"))


def losses(mode: str, steps: int, **changes) -> list[float]:
    """Of every step of a short run."""
    config = TrainConfig(**{**dict(steps=steps, batch_size=8, warmup=4, lr=2e-3), **changes})
    task, data = denoiser_task(Source(preset="tiny"), config.seed)
    state = TrainState(task, config)
    share = share_of(config, state.group)
    stream = batches(data, share, start=0, seed=config.seed)
    with snapgen_kernels.use(mode):
        return [optimizer_step(task, config, state, stream, share)["loss"].item() for _ in range(steps)]


def half_width_losses(mode: str, steps: int, micro_batch: int = 4) -> list[float]:
    """Of `t2i-1024` with every width halved, on the same four latents of 8x8 with new noise at every step."""
    task, batch = make_task(ModelCase("train", "half", "t2i-1024", 8, batch=4, tokens=20, narrow=2))
    task.text = CachedText(TextEmbedding(batch.text.context[:1], None, batch.text.pooled[:1]))
    config = TrainConfig(steps=steps, batch_size=4, micro_batch=micro_batch, warmup=4, lr=5e-4)
    state = TrainState(task, config)

    def passes() -> Iterator[Batch]:
        for first in itertools.count(step=micro_batch):
            some = slice(first % 4, first % 4 + micro_batch)
            text = TextEmbedding(batch.text.context[some], None, batch.text.pooled[some])
            positions = range(first, first + micro_batch)
            yield Batch(captions=[""] * micro_batch, latents=batch.latents[some], text=text, positions=positions)

    stream, share = passes(), Share(4, micro_batch)
    with snapgen_kernels.use(mode):
        return [optimizer_step(task, config, state, stream, share)["loss"].item() for _ in range(steps)]


def distance(one: list[float], two: list[float]) -> float:
    """Root mean square of the differences."""
    return math.sqrt(sum((a - b) ** 2 for a, b in zip(one, two, strict=True)) / len(one))


@pytest.mark.parametrize("mode", ["auto", "reference"])
def test_first_losses_are_the_recorded_ones(mode: str) -> None:
    """Whatever changes them changes the model, the data or the training of all who use them."""
    assert losses(mode, len(GOLDEN)) == pytest.approx(GOLDEN, rel=1e-4)


@pytest.mark.complete
def test_fused_training_stays_as_near_as_another_order_of_sums() -> None:
    """Rounding sends two runs apart in time; the fused one may go no further than a reference whose gradients are
    summed in two parts."""
    plain, parts, fused = losses("reference", 200), losses("reference", 200, micro_batch=4), losses("auto", 200)
    assert sum(plain[-20:]) < 0.7 * sum(plain[:20])
    assert 0 < distance(fused, plain) <= 2 * distance(parts, plain)
    assert abs(sum(fused[-50:]) - sum(plain[-50:])) <= 50 * 2 * distance(parts, plain)


@pytest.mark.complete
def test_so_does_the_large_model_at_half_width() -> None:
    plain, parts, fused = (
        half_width_losses("reference", 20),
        half_width_losses("reference", 20, micro_batch=2),
        half_width_losses("auto", 20),
    )
    assert sum(plain[-5:]) < 0.95 * sum(plain[:5])
    assert 0 < distance(fused, plain) <= 2 * distance(parts, plain)
