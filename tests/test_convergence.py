"""Training with the fused operations goes where training without them goes."""

from __future__ import annotations

import math

import pytest

import snapgen_kernels
from snapgen.data.loader import batches
from snapgen.runs import denoiser_task
from snapgen.settings import Source, TrainConfig
from snapgen.train import TrainState, optimizer_step, share_of

pytestmark = pytest.mark.method

# The preset `tiny` from seed 0 on the first 96 pictures of the shapes world, in fp32.
GOLDEN = (2.430156, 2.141146, 2.124468, 1.946143, 1.780021, 2.136954, 2.029533, 1.713498, 1.907189, 1.65473, 1.661458,
          1.840619)  # fmt: skip


def losses(mode: str, steps: int, **changes) -> list[float]:
    """Of every step of a short run."""
    config = TrainConfig(**{**dict(steps=steps, batch_size=8, warmup=4, lr=2e-3), **changes})
    task, data = denoiser_task(Source(preset="tiny"), config.seed)
    state = TrainState(task, config)
    share = share_of(config, state.group)
    stream = batches(data, share, start=0, seed=config.seed)
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
