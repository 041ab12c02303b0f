"""The loop: resumed runs are bitwise those left alone, and nothing that goes wrong loses more than a step."""

import errno
import multiprocessing
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_models import QUIET, SMALL, autoencoder_task, denoiser_task
from torch import nn
from torch.distributed.checkpoint import HuggingFaceStorageWriter

from snapgen import io
from snapgen.data.loader import Share, batches, open_dataset
from snapgen.data.shapes import ShapesDataset
from snapgen.tasks import Phase
from snapgen.train import TrainConfig, learning_rate, train


def config(**changes) -> TrainConfig:
    base = dict(steps=7, batch_size=4, warmup=2, save_every=3, sample_every=100, log_every=2)
    return TrainConfig(**{**base, **changes})


def data() -> ShapesDataset:
    return ShapesDataset(32, length=1000)


def weights(out: Path) -> dict[str, torch.Tensor]:
    newest = max((out / "checkpoints").glob("step-*"))
    return {name: tensor for file in newest.glob("*.safetensors") for name, tensor in io.load_tensors(file).items()}


def assert_same(one: Path, other: Path) -> None:
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys() and len(a) > 100
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different


@pytest.mark.parametrize("make", [denoiser_task, autoencoder_task])
def test_a_run_stopped_by_ctrl_c_goes_on_bitwise(tmp_path, make):
    before = signal.getsignal(signal.SIGINT)
    train(make(), data(), config(), tmp_path / "alone", console=QUIET)

    class Stopped(ShapesDataset):
        read = 0

        def batch(self, indices):
            self.read += 1
            if self.read == 5:
                os.kill(os.getpid(), signal.SIGINT)
            return super().batch(indices)

    with pytest.raises(KeyboardInterrupt, match="stopped at step 5"):
        train(make(), Stopped(32, length=1000), config(), tmp_path / "stopped", console=QUIET)
    exported = train(make(), data(), config(), tmp_path / "stopped", console=QUIET)
    assert_same(tmp_path / "alone", tmp_path / "stopped")
    assert exported.is_dir() and list((tmp_path / "stopped" / "samples").glob("*.png"))
    # Ctrl-C means what it meant before, once training is over.
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.complete
def test_a_killed_run_goes_on_bitwise(tmp_path):
    script = """
import os, sys
sys.path.insert(0, sys.argv[2])
import torch
torch.set_num_threads(1)
import test_train as t
class Killed(t.ShapesDataset):
    read = 0
    def batch(self, indices):
        self.read += 1
        if self.read == 6:
            os.kill(os.getpid(), 9)
        return super().batch(indices)
t.train(t.denoiser_task(), Killed(32, length=1000), t.config(), t.Path(sys.argv[1]), console=t.QUIET)
"""
    killed = tmp_path / "killed"
    run = subprocess.run([sys.executable, "-c", script, str(killed), str(Path(__file__).parent)], capture_output=True)
    assert run.returncode == -signal.SIGKILL, run.stderr.decode()
    # A checkpoint that was being written when the kill came has a hidden name.
    assert {p.name for p in (killed / "checkpoints").glob("step-*")} <= {"step-0000003"}
    train(denoiser_task(), data(), config(), killed, console=QUIET)
    train(denoiser_task(), data(), config(), tmp_path / "alone", console=QUIET)
    assert_same(tmp_path / "alone", killed)


def test_a_finished_run_is_not_trained_further(tmp_path):
    train(denoiser_task(), data(), config(), tmp_path, console=QUIET)
    before = weights(tmp_path)
    train(denoiser_task(), data(), config(), tmp_path, console=QUIET)
    after = weights(tmp_path)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_another_configuration_needs_another_directory(tmp_path):
    train(denoiser_task(), data(), config(steps=2), tmp_path, console=QUIET)
    with pytest.raises(ValueError, match=r"lr was 0.001, now 0.01"):
        train(denoiser_task(), data(), config(steps=2, lr=0.01), tmp_path, console=QUIET)
    with pytest.raises(ValueError, match="steps was 2, now 9"):
        train(denoiser_task(), data(), config(steps=9), tmp_path, console=QUIET)
    with pytest.raises(ValueError, match="task was"):
        train(autoencoder_task(), data(), config(steps=2), tmp_path, console=QUIET)


def test_a_run_may_be_lengthened_before_its_cooldown(tmp_path):
    train(denoiser_task(), data(), config(steps=8, cooldown=0.5), tmp_path / "alone", console=QUIET)

    class Stopped(ShapesDataset):
        read = 0

        def batch(self, indices):
            self.read += 1
            if self.read == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().batch(indices)

    with pytest.raises(KeyboardInterrupt):
        train(
            denoiser_task(), Stopped(32, length=1000), config(steps=20, cooldown=0.5), tmp_path / "cut", console=QUIET
        )
    train(denoiser_task(), data(), config(steps=8, cooldown=0.5), tmp_path / "cut", console=QUIET)
    assert_same(tmp_path / "alone", tmp_path / "cut")


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    real, calls = HuggingFaceStorageWriter.write_data, []

    def filling(self, plan, planner):
        written = real(self, plan, planner)
        calls.append(self.path)
        if len(calls) == 2:  # the second checkpoint
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return written

    monkeypatch.setattr(HuggingFaceStorageWriter, "write_data", filling)
    with pytest.raises(OSError, match=r"no space left on the disk while writing .*step-0000006"):
        train(denoiser_task(), data(), config(), tmp_path, console=QUIET)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-0000003"]
    monkeypatch.undo()
    train(denoiser_task(), data(), config(), tmp_path, console=QUIET)
    train(denoiser_task(), data(), config(), tmp_path / "alone", console=QUIET)
    assert_same(tmp_path / "alone", tmp_path)


def test_a_damaged_checkpoint_is_named(tmp_path):
    train(denoiser_task(), data(), config(steps=2), tmp_path, console=QUIET)
    (path,) = (tmp_path / "checkpoints" / "step-0000002").glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(io.CheckpointError, match=r"safetensors: truncated"):
        train(denoiser_task(), data(), config(steps=2), tmp_path, console=QUIET)


class Regression:
    """A task whose steps can be computed by hand: y = w x with the picture's mean as x and 3 x as target."""

    name, preset = "regression", SMALL

    def __init__(self, spoil=lambda step, loss: loss, *, uneven=False):
        self.modules = {"line": nn.Linear(1, 1, bias=False)}
        self.call = dict(self.modules)
        self.averaged = ("line",)
        self.spoil, self.uneven, self.steps, self.drawn = spoil, uneven, 0, []
        nn.init.constant_(self.modules["line"].weight, 1.0)

    def phases(self):
        return (Phase(name="line", modules=("line",), loss=self.loss, uneven=self.uneven),)

    def record(self):
        return {}

    def loss(self, batch, draws):
        self.drawn += [tuple(row) for row in draws.normal(4).tolist()]
        x = batch.images.mean((1, 2, 3)).unsqueeze(1)
        self.steps += 1
        return self.spoil(self.steps, (self.call["line"](x) - 3 * x).square().mean()), {}

    def sample_grid(self, path, seed):
        self.averaged_weight = float(self.modules["line"].weight)

    def export(self, path, modules):
        io.save_tensors(path / "line.safetensors", modules["line"].state_dict())


def test_accumulated_gradients_are_those_of_the_large_batch(tmp_path):
    results, drawn = [], []
    for micro_batch in (8, 4, 2):
        task = Regression()
        out = tmp_path / str(micro_batch)
        train(task, data(), config(steps=3, batch_size=8, micro_batch=micro_batch), out, console=QUIET)
        results.append(task.modules["line"].weight.item())
        drawn.append(task.drawn)
    assert results[0] != 1.0
    assert results == pytest.approx([results[0]] * 3, rel=1e-6)
    assert drawn[0] == drawn[1] == drawn[2]  # noise belongs to samples, not to batches


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e6])
def test_a_broken_gradient_changes_nothing_and_is_counted(tmp_path, bad):
    plan = config(steps=120, warmup=1, lr=1e-4, save_every=200, spike=5.0)
    broken = Regression(lambda step, loss: loss * (bad if step == 110 else 1))
    train(broken, data(), plan, tmp_path / "broken", console=QUIET)
    assert weights(tmp_path / "broken")["guard/line"][2] == 1  # skipped
    assert weights(tmp_path / "broken")["optimizer/line/line.weight/step"] == 119
    assert weights(tmp_path / "broken")["model/line.weight"].isfinite().all()
    # Where gradients are uneven by design, large ones are taken.
    uneven = Regression(lambda step, loss: loss * (bad if step == 110 else 1), uneven=True)
    train(uneven, data(), plan, tmp_path / "uneven", console=QUIET)
    assert weights(tmp_path / "uneven")["guard/line"][2] == (0 if bad == 1e6 else 1)
    # The first steps have no average to be measured against: only what is not finite is skipped.
    early = Regression(lambda step, loss: loss * (bad if step == 10 else 1))
    train(early, data(), plan, tmp_path / "early", console=QUIET)
    assert weights(tmp_path / "early")["guard/line"][2] == (0 if bad == 1e6 else 1)


@pytest.mark.parametrize("log_every", [2, 100])
def test_gradients_that_stay_broken_stop_the_run(tmp_path, log_every):
    plan = config(steps=200, save_every=2, log_every=log_every, patience=10)
    task = Regression(lambda step, loss: loss * (float("nan") if step > 4 else 1))
    with pytest.raises(
        FloatingPointError, match=rf"step {14 if log_every == 2 else 100}: the last \d+ steps were skipped"
    ):
        train(task, data(), plan, tmp_path, console=QUIET)
    tensors = weights(tmp_path)
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    assert tensors["optimizer/line/line.weight/step"] == 4


def test_first_adamw_step_and_average_by_hand(tmp_path):
    task = Regression()
    train(
        task,
        data(),
        config(steps=1, warmup=1, cooldown=0.0, lr=0.1, weight_decay=0.5, ema=0.9),
        tmp_path,
        console=QUIET,
    )
    # AdamW's first step is lr in the gradient's direction, after decay by lr * weight_decay.
    by_hand = 1.0 * (1 - 0.1 * 0.5) + 0.1
    assert task.modules["line"].weight.item() == pytest.approx(by_hand, rel=1e-5)
    decay = min(0.9, 2 / 11)
    assert task.averaged_weight == pytest.approx(decay * 1.0 + (1 - decay) * by_hand, rel=1e-5)


def test_every_sample_has_noise_of_its_own(tmp_path):
    drawn = {}
    for seed in (0, 1):
        task = Regression()
        train(task, data(), config(steps=5, seed=seed), tmp_path / str(seed), console=QUIET)
        drawn[seed] = task.drawn
    assert [len(set(noise)) for noise in drawn.values()] == [20, 20]
    assert not set(drawn[0]) & set(drawn[1])


def test_learning_rate_rises_stays_and_falls():
    plan = config(steps=100, warmup=10, cooldown=0.2, lr=2.0)
    assert [learning_rate(plan, step) for step in (0, 4, 9, 50, 80, 90, 99)] == pytest.approx(
        [0.2, 1.0, 2.0, 2.0, 2.0, 1.0, 0.1]
    )


@pytest.mark.parametrize(
    "change",
    [
        dict(steps=0),
        dict(batch_size=0),
        dict(dtype="fp16"),
        dict(cooldown=1.5),
        dict(ema=1.0),
        dict(spike=0.5),
        dict(micro_batch=0),
        dict(patience=0),
        dict(grad_clip=0.0),
        dict(lr=0.0),
    ],
)
def test_wrong_settings_are_named(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        config(**change)


def test_bf16_trains(tmp_path):
    for dtype in ("fp32", "bf16"):
        train(denoiser_task(), data(), config(steps=3, dtype=dtype), tmp_path / dtype, console=QUIET)
    wide, narrow = weights(tmp_path / "fp32"), weights(tmp_path / "bf16")
    assert all(tensor.dtype == torch.float32 for tensor in narrow.values())
    torch.manual_seed(0)
    start = denoiser_task().modules["denoiser"].state_dict()
    moved = {name: (wide[f"model/denoiser.{name}"] - weight).norm() for name, weight in start.items()}
    apart = {name: (wide[f"model/denoiser.{name}"] - narrow[f"model/denoiser.{name}"]).norm() for name in start}
    # Rounded to 8 bits of mantissa, the steps differ, but by a part of themselves.
    assert 0 < sum(apart.values()) < 0.5 * sum(moved.values())


class Numbered:
    """A map-style dataset whose pictures carry their index."""

    def __len__(self):
        return 10

    def __getitem__(self, index):
        return {"image": torch.full((3, 2, 2), float(index)), "caption": str(index)}


def test_batches_from_any_position_are_those_of_the_whole_stream():
    def take(start, count):
        stream = batches(Numbered(), Share(4, 4), start=start, seed=3)
        return [[int(caption) for caption in next(stream).captions] for _ in range(count)]

    whole = take(0, 10)
    for start in range(10):
        assert take(start, 10 - start) == whole[start:]
    flat = [index for batch in whole for index in batch]
    for epoch in range(4):
        assert sorted(flat[epoch * 10 : epoch * 10 + 10]) == list(range(10))
    assert flat[:10] != flat[10:20]


@pytest.mark.parametrize("shuffled", [True, False])
def test_processes_share_the_batches_of_one(shuffled):
    data = Numbered()
    data.procedural = not shuffled

    def take(share):
        stream = batches(data, share, start=2, seed=3)
        return [next(stream) for _ in range(2 * share.passes)]

    (alone,) = {tuple(caption for batch in take(Share(12, 12)) for caption in batch.captions)}
    places = {}
    for rank in range(2):
        for batch in take(Share(12, 3, rank, 2)):
            places |= dict(zip(batch.positions, batch.captions, strict=True))
    assert sorted(places) == list(range(24, 48))
    assert tuple(places[place] for place in sorted(places)) == alone


def test_a_batch_that_cannot_be_dealt_out_is_named():
    with pytest.raises(ValueError, match=r"batch_size: got 10; must be a multiple of .* 4 x 2"):
        Share(10, 4, 0, 2)


def test_a_stream_is_passed_over_to_its_position():
    class Stream:
        def __iter__(self):
            for index in range(5):
                yield Numbered()[index]

    stream = batches(Stream(), Share(2, 2), start=2, seed=0)
    assert [next(stream).captions for _ in range(3)] == [["4", "0"], ["1", "2"], ["3", "4"]]
    with pytest.raises(ValueError, match="no item"):
        next(batches([].__iter__(), Share(2, 2), start=0, seed=0))


def test_unknown_data_is_named(tmp_path):
    with pytest.raises(ValueError, match="data: got 'circles'"):
        open_dataset("circles", 64)


@pytest.mark.parametrize("damaged", ["{", "[]", "{}"])
def test_a_damaged_state_or_record_is_named(tmp_path, damaged):
    train(autoencoder_task(), data(), config(), tmp_path, console=QUIET)
    state = next(tmp_path.glob("checkpoints/*/state.json"))
    whole = state.read_text()
    for checkpoint in tmp_path.glob("checkpoints/*/state.json"):
        checkpoint.write_text(damaged)
    with pytest.raises(io.CheckpointError, match=r"state\.json: damaged"):
        train(autoencoder_task(), data(), config(), tmp_path, console=QUIET)
    state.write_text(whole)
    (tmp_path / "config.json").write_text(damaged)
    with pytest.raises(ValueError, match=r"config\.json: damaged|holds another run"):
        train(autoencoder_task(), data(), config(), tmp_path, console=QUIET)


def _saving_every_step(out: str) -> Path:
    torch.set_num_threads(1)
    plan = config(steps=300, save_every=1, log_every=50, keep=3, ema=0.9)
    return train(Regression(), data(), plan, Path(out), console=QUIET)


@pytest.mark.complete
def test_twenty_kills_at_random_moments_change_no_bit(tmp_path):
    # Processes are forked from one that has loaded everything, and killed after a while that is drawn.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "torch._dynamo", "torch.utils.tensorboard"])
    killed, draw, reached = str(tmp_path / "killed"), random.Random(0), []
    for _ in range(20):
        process = context.Process(target=_saving_every_step, args=(killed,))
        process.start()
        process.join(draw.uniform(0.2, 1.2))
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)  # 0: it had come to its end
        reached += [int(path.name.split("-")[1]) for path in sorted(Path(killed).glob("checkpoints/step-*"))[-1:]]
    assert len(set(reached)) > 3, f"too few kills came after a checkpoint: {reached}"
    assert reached == sorted(reached)  # nothing that was saved is lost
    _saving_every_step(killed)
    _saving_every_step(str(tmp_path / "alone"))
    one, other = weights(tmp_path / "alone"), weights(tmp_path / "killed")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert not list(Path(killed).glob("checkpoints/.*"))
