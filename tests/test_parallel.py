"""Two processes train as one does: DDP and FSDP2, checkpoints read by other numbers of processes, a lost worker."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from snapgen import io
from snapgen.pipeline import SnapGenPipeline
from snapgen.state import stored_shapes

pytestmark = [pytest.mark.method, pytest.mark.complete]

SCRIPT = Path(__file__).parent / "parallel_run.py"
# The same sums in another order: each weight moves by its rounding, and the loss by the sum of these.
ROUNDING = 2e-5


def run(out: Path, *, kind="ddp", steps=6, world=1, stop_at=0, restarts=0, **environment) -> dict[str, float]:
    arguments = [str(SCRIPT), str(out), kind, str(steps), *([str(stop_at)] if stop_at else [])]
    command = [sys.executable, *arguments]
    if world > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
        command = [sys.executable, *launcher, f"--max-restarts={restarts}", *arguments]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def close(one: dict[str, float], other: dict[str, float], rel: float = ROUNDING) -> None:
    assert one.keys() == other.keys() and one
    for step, loss in one.items():
        assert loss == pytest.approx(other[step], rel=rel), step


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    out = tmp_path_factory.mktemp("alone")
    return out, run(out)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_have_the_losses_of_one(tmp_path, alone, kind):
    out, losses = alone
    close(run(tmp_path, kind=kind, world=2), losses)
    # What they export is whole, and the same up to rounding.
    there = SnapGenPipeline.from_pretrained(tmp_path / "export")
    here = SnapGenPipeline.from_pretrained(out / "export")
    for part in ("denoiser", "text_encoder"):
        theirs = getattr(there, part).state_dict()
        for name, weight in getattr(here, part).state_dict().items():
            # Attention does not see the keys' bias, whose gradient is rounding alone; AdamW makes steps of it.
            if not name.endswith("k_proj.bias"):
                torch.testing.assert_close(theirs[name], weight, rtol=0, atol=2e-4, msg=name)
    assert [p.name for p in (tmp_path / "samples").iterdir()] == ["step-0000006.png"]


@pytest.mark.parametrize("first, second", [(("fsdp", 2), ("ddp", 1)), (("ddp", 1), ("fsdp", 2))])
def test_a_run_goes_on_with_another_number_of_processes(tmp_path, alone, first, second):
    before = run(tmp_path, kind=first[0], world=first[1], steps=3)
    record = json.loads((tmp_path / "config.json").read_text())
    assert record["steps"] == 3
    after = run(tmp_path, kind=second[0], world=second[1], steps=6)
    assert sorted(map(int, after)) == [4, 5, 6]
    close(before | after, alone[1])


def test_small_passes_are_the_large_batch(tmp_path, alone):
    close(run(tmp_path, kind="fsdp", world=2, MICRO="2"), alone[1])


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_distillation_has_the_losses_of_one_process(tmp_path, kind):
    losses = run(tmp_path / "one", steps=4, TASK="knowledge")
    close(run(tmp_path / "two", kind=kind, steps=4, world=2, TASK="knowledge", MICRO="2"), losses)


def test_what_is_computed_again_changes_no_bit(tmp_path, alone):
    assert run(tmp_path, RECOMPUTE="1") == alone[1]


def test_a_lost_worker_is_replaced_from_the_last_checkpoint(tmp_path, alone):
    # The sixth batch of the second process kills it; torchrun starts both again.
    losses = run(tmp_path, world=2, stop_at=6, restarts=1)
    assert "6" in losses and int(min(losses, key=int)) in (1, 4)  # the checkpoint of step 3 was written by then, or not
    close(losses, {step: alone[1][step] for step in losses})


def test_checkpoints_are_dealt_out_and_whole(tmp_path):
    run(tmp_path, kind="fsdp", world=2, steps=3)
    (folder,) = (tmp_path / "checkpoints").glob("step-*")
    parts = sorted(folder.glob("*.safetensors"))
    assert len(parts) == 2
    halves = [sum(t.numel() for name, t in io.load_tensors(part).items() if name.startswith("ema/")) for part in parts]
    assert min(halves) > 0.3 * sum(halves)
    export = io.load_tensors(tmp_path / "export" / "denoiser" / "diffusion_pytorch_model.safetensors")
    shapes = stored_shapes(folder)
    for name, weight in export.items():
        assert shapes[f"ema/denoiser.{name}"] == tuple(weight.shape)


def test_drawing_leaves_no_trace(tmp_path, alone):
    # Drawing gathers averaged weights, which must not be those of the next step.
    close(run(tmp_path, kind="fsdp", world=2, SAMPLE_EVERY="1"), alone[1])


def test_an_autoencoder_is_dealt_out_too(tmp_path, alone):
    # The spread of the latents, a twentieth of whose loss counts, is that of a pass, not of the whole batch.
    one = run(tmp_path / "one", TASK="autoencoder")
    close(run(tmp_path / "two", kind="fsdp", world=2, TASK="autoencoder"), one, rel=1e-3)
