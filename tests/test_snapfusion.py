"""SnapFusion: the arithmetic of its diffusion and of step distillation, its UNet, and SD's weights in it."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler
from hypothesis import given
from hypothesis import strategies as st
from small_fusion import fusion_task, small_fusion
from small_models import QUIET
from test_train import assert_same, config, data
from torch import nn
from weights import random_weights

from snapgen import vp
from snapgen.conditioning import CachedText
from snapgen.data.loader import Batch
from snapgen.distill.snapfusion import BlockSkipping, StepDistillation, VPrediction, guided_velocity, scaled_to
from snapgen.evaluate import draw
from snapgen.pipeline import SnapGenPipeline
from snapgen.sampler import sample
from snapgen.seeds import Draws
from snapgen.text import TextEmbedding
from snapgen.train import train

pytestmark = pytest.mark.method

# ---- the diffusion ---------------------------------------------------------------------------------------------------


def rates(t: int) -> tuple[float, float]:
    """a_t and s_t by Stable Diffusion's definition, in fp64, from nothing of ours."""
    product = 1.0
    low, high = math.sqrt(0.00085), math.sqrt(0.012)
    for index in range(t + 1):
        product *= 1 - (low + (high - low) * index / 999) ** 2
    return math.sqrt(product), math.sqrt(1 - product)


def column(*values: float) -> torch.Tensor:
    return torch.tensor(values).view(-1, 1, 1, 1)


def test_rates_are_those_of_stable_diffusion():
    own = vp.Schedule().rates(torch.tensor([-1, 0, 500, 999]), torch.zeros(4, 1))
    assert own.a.flatten().tolist() == pytest.approx([1.0, *(rates(t)[0] for t in (0, 500, 999))], rel=1e-5)
    # The scheduler's alphas are fp32: 1 - alpha_0 = 8.5e-4 is known to 2^-24 / 8.5e-4, its root to half of that.
    assert own.s.flatten().tolist() == pytest.approx([0.0, *(rates(t)[1] for t in (0, 500, 999))], rel=3.5e-5)


def test_noise_velocity_and_clean_by_hand():
    schedule, t = vp.Schedule(), torch.tensor([300])
    a, s = rates(300)
    x, noise = column(0.7), column(-1.2)
    z, v = schedule.noised(x, noise, t), schedule.velocity(x, noise, t)
    assert z.item() == pytest.approx(a * 0.7 + s * -1.2, rel=1e-5)
    assert v.item() == pytest.approx(a * -1.2 - s * 0.7, rel=1e-5)
    assert schedule.clean(z, v, t).item() == pytest.approx(0.7, rel=1e-4)


def test_a_ddim_step_by_hand_and_by_diffusers():
    schedule = vp.Schedule()
    (a, s), (b, r) = rates(749), rates(624)
    z, v = 0.4, -0.9
    by_hand = b * (a * z - s * v) + r * (s * z + a * v)
    stepped = schedule.ddim(column(z), column(v), torch.tensor([749]), torch.tensor([624]))
    assert stepped.item() == pytest.approx(by_hand, rel=1e-5)
    scheduler = vp.make_scheduler()
    scheduler.set_timesteps(8)
    assert scheduler.step(column(v), 749, column(z)).prev_sample.item() == pytest.approx(by_hand, rel=1e-5)
    end = schedule.ddim(column(z), column(v), torch.tensor([124]), torch.tensor([vp.CLEAN]))
    scheduler.set_timesteps(8)
    assert scheduler.step(column(v), 124, column(z)).prev_sample.item() == pytest.approx(end.item(), rel=1e-5)


@given(st.integers(1, 1000))
def test_times_are_the_schedulers(steps):
    times = vp.step_times(steps)
    scheduler = vp.make_scheduler()
    scheduler.set_timesteps(steps)
    assert times[:-1] == scheduler.timesteps.tolist()[:steps]
    assert times[0] == 999 and times[-1] == vp.CLEAN and len(times) == steps + 1
    assert all(later < earlier for earlier, later in zip(times, times[1:], strict=False))


def test_impossible_steps_are_named():
    with pytest.raises(ValueError, match="steps: got 0"):
        vp.step_times(0)


def test_the_weight_is_the_signal_to_noise_ratio_down_to_one():
    a, s = rates(50)
    assert a * a > s * s
    weights = vp.Schedule().weight(torch.tensor([50, 900])).tolist()
    assert weights == pytest.approx([a * a / (s * s), 1.0], rel=1e-5)


# ---- step distillation -----------------------------------------------------------------------------------------------

TEXT = TextEmbedding(torch.zeros(1, 1, 1), torch.ones(1, 1, dtype=torch.bool), None)


class Gaussian(nn.Module):
    """The exact denoiser where data are N(0, c^2): x^ = a c^2 z / (a^2 c^2 + s^2), so v^ = (a z - x^) / s."""

    def __init__(self, c: float) -> None:
        super().__init__()
        self.c = c

    def forward(self, z, t, context, mask, pooled, return_dict=False):
        a, s = vp.Schedule().rates(t, z)
        x = a * self.c**2 * z / (a**2 * self.c**2 + s**2)
        return ((a * z - x) / s,)


def gaussian_step(z: float, t: int, to: int, c: float) -> float:
    """A DDIM step with the exact denoiser, by hand: to b x^ + r eps^ with eps^ = (z - a x^) / s."""
    (a, s), (b, r) = rates(t), rates(to) if to >= 0 else (1.0, 0.0)
    x = a * c * c * z / (a * a * c * c + s * s)
    return b * x + r * (z - a * x) / s


class Scripted:
    """What a task gives an objective: a batch that is all known."""

    def __init__(self, net, z: float = 0.8) -> None:
        self.call = {"denoiser": net}
        self.schedule, self.z = vp.Schedule(), z

    def noised(self, batch, draws, t):
        from snapgen.tasks import Noised

        x0, noise = column(*[0.5] * len(t)), column(*[-0.3] * len(t))
        return Noised(x0, noise, t, column(*[self.z] * len(t)), self.embedded(len(t), 1.0), batch.captions)

    def embedded(self, count, value):
        return TextEmbedding(torch.full((count, 1, 1), value), torch.ones(count, 1, dtype=torch.bool), None)

    def unconditional(self, count, device):
        return self.embedded(count, 0.0)


@pytest.mark.parametrize("k", [0, 3, 7])
def test_the_target_by_hand_for_an_exact_teacher(k):
    """Two steps of the teacher, worked out for a Gaussian, give the target that the loss compares x^(s) with."""
    objective = StepDistillation(Gaussian(0.5), steps=8, cfg_probability=0, gamma=0)
    t, middle, end = (999 - 125 * k, vp.step_times(16)[2 * k + 1], 874 - 125 * k)
    assert objective.times[k].tolist() == [t, middle, end if k < 7 else vp.CLEAN]
    final = end if k < 7 else vp.CLEAN
    landed = gaussian_step(gaussian_step(0.8, t, middle, 0.5), middle, final, 0.5)
    (a, s), (b, r) = rates(t), rates(final) if k < 7 else (1.0, 0.0)
    target = (landed - r / s * 0.8) / (b - r / s * a)

    class Student(nn.Module):
        def forward(self, z, *_, **__):
            return (torch.full_like(z, 0.25),)

    objective.times = objective.times[k : k + 1].expand(8, 3)
    loss, figures = objective.loss(Scripted(Student()), Batch(captions=["a"] * 2), Draws(0, 0, range(2)))
    by_hand = max(a * a / (s * s), 1) * (a * 0.8 - s * 0.25 - target) ** 2
    assert loss.item() == pytest.approx(by_hand, rel=2e-3)
    assert figures.keys() == {"distillation"}


@given(st.floats(-2, 2), st.floats(-2, 2), st.integers(0, 7))
def test_a_student_that_makes_the_teachers_two_steps_in_one_has_no_loss(z, v, k):
    """The target is the x of whatever v leads to the same end in one step."""
    schedule, times = vp.Schedule(), vp.step_times(8)
    t, end = torch.tensor([times[k]]), torch.tensor([times[k + 1]])
    there = schedule.ddim(column(z), column(v), t, end)
    target = schedule.one_step_target(column(z), there, t, end)
    assert target.item() == pytest.approx(schedule.clean(column(z), column(v), t).item(), abs=2e-4)


class Guided(nn.Module):
    """v = weight * (caption or not) + 0.1: captions are told by their one number, 1 or 0."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))

    def forward(self, z, t, context, mask, pooled, return_dict=False):
        return ((self.weight * context[:, :, :1, None] + 0.1).expand_as(z),)


def test_guidance_combines_two_predictions():
    task = Scripted(None)
    v, plain = guided_velocity(
        Guided(2.0),
        column(0.0, 0.0),
        torch.tensor([5, 5]),
        task.embedded(2, 1.0),
        task.embedded(2, 0.0),
        torch.tensor([3.0, 7.5]),
    )
    # w v(c) - (w - 1) v(none) with v(c) = 2.1, v(none) = 0.1
    assert v.flatten().tolist() == pytest.approx([3 * 2.1 - 2 * 0.1, 7.5 * 2.1 - 6.5 * 0.1])
    assert plain.flatten().tolist() == pytest.approx([2.1, 2.1])


def test_guided_the_teacher_and_the_student_have_the_same_w():
    """By hand, with w known: a range of one value."""
    objective = StepDistillation(Guided(0.2), steps=8, cfg_probability=1, guidance=(5.0, 5.0), gamma=0)
    objective.times = objective.times[2:3].expand(8, 3)
    t, middle, end = objective.times[0].tolist()
    loss, _ = objective.loss(Scripted(Guided(0.3)), Batch(captions=["a"]), Draws(0, 0, range(1)))
    (a, s), (m, q), (b, r) = rates(t), rates(middle), rates(end)
    v = 5 * (0.2 + 0.1) - 4 * 0.1  # the teacher's, the same everywhere
    halfway = m * (a * 0.8 - s * v) + q * (s * 0.8 + a * v)
    landed = b * (m * halfway - q * v) + r * (q * halfway + m * v)
    target = (landed - r / s * 0.8) / (b - r / s * a)
    student = a * 0.8 - s * (5 * (0.3 + 0.1) - 4 * 0.1)
    assert loss.item() == pytest.approx(max(a * a / (s * s), 1) * (student - target) ** 2, rel=2e-3)
    drawn, seen = StepDistillation(Guided(0.2), steps=8, cfg_probability=1), []

    class Recorded(Guided):
        def forward(self, z, t, context, mask, pooled, return_dict=False):
            seen.append(context.flatten().tolist())
            return super().forward(z, t, context, mask, pooled, return_dict)

    drawn.loss(Scripted(Recorded(0.2)), Batch(captions=["a"] * 4), Draws(0, 0, range(4)))
    assert seen == [[0.0] * 4 + [1.0] * 4]  # one pass: without captions, then with


def test_w_is_even_in_its_range_and_each_samples_own(monkeypatch):
    import snapgen.distill.snapfusion as module

    scales, real = [], module.guided_velocity

    def recorded(net, z, t, text, empty, scale):
        scales.append(scale)
        return real(net, z, t, text, empty, scale)

    monkeypatch.setattr(module, "guided_velocity", recorded)
    objective = StepDistillation(Guided(0.2), steps=8, cfg_probability=1)
    objective.loss(Scripted(Guided(0.2)), Batch(captions=["a"] * 500), Draws(0, 0, range(500)))
    first, second, student = scales
    assert torch.equal(first, second) and torch.equal(first, student)
    assert first.min() >= 2 and first.max() <= 14 and first.unique().numel() > 490
    assert first.mean().item() == pytest.approx(8, abs=3 * 12 / math.sqrt(12 * 500))


def test_a_share_of_the_steps_is_guided():
    objective = StepDistillation(Guided(0.2), steps=8, cfg_probability=0.3)
    widths = []

    class Counted(Guided):
        def forward(self, z, *others, **named):
            widths.append(len(z))
            return super().forward(z, *others, **named)

    for step in range(300):
        objective.loss(Scripted(Counted(0.2)), Batch(captions=["a"]), Draws(0, step, [step]))
    share = widths.count(2) / 300
    assert share == pytest.approx(0.3, abs=3 * math.sqrt(0.3 * 0.7 / 300))


def test_the_original_loss_is_brought_to_the_magnitude_of_the_other():
    original = torch.tensor([4.0, 0.5], requires_grad=True)
    other = torch.tensor([1.0, 3.0], requires_grad=True)
    scaled = scaled_to(original, other)
    assert scaled.tolist() == [1.0, 3.0]
    scaled.sum().backward()
    assert original.grad.tolist() == [0.25, 6.0] and other.grad is None


def test_gamma_adds_its_share():
    def loss(gamma):
        objective = StepDistillation(Gaussian(0.5), steps=8, cfg_probability=0, gamma=gamma)
        return objective.loss(Scripted(Guided(0.3)), Batch(captions=["a"] * 3), Draws(0, 0, range(3)))[0].item()

    assert loss(0.2) == pytest.approx(1.2 * loss(0.0), rel=1e-5)


@pytest.mark.parametrize(("probability", "uneven"), [(0.0, False), (0.1, True), (1.0, False)])
def test_rare_guided_steps_do_not_look_broken(probability, uneven):
    objective = StepDistillation(small_fusion(), cfg_probability=probability)
    (phase,) = objective.phases(None)
    assert phase.uneven == uneven
    (phase,) = BlockSkipping(objective).phases(None)
    assert phase.uneven == uneven


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_gradients_reach_the_student_alone(probability):
    objective = StepDistillation(small_fusion(), steps=4, cfg_probability=probability)
    task = fusion_task(objective, frozen=True, net=random_weights(small_fusion()))
    assert task.modules.keys() == {"denoiser"}
    (phase,) = task.phases()
    images, captions = data().batch(range(2))
    phase.loss(Batch(images=images, captions=captions), Draws(0, 0, range(2)))[0].backward()
    assert all(p.grad is not None and p.grad.norm() > 0 for p in task.modules["denoiser"].parameters())
    frozen = [objective.teacher, task.encoder, task.decoder, task.text.pipe.text_encoder]
    assert all(p.grad is None and not p.requires_grad for net in frozen for p in net.parameters())


def test_the_empty_caption_of_every_kind_of_text():
    joint, frozen = fusion_task(), fusion_task(frozen=True)
    wanted = joint.unconditional(1, torch.device("cpu"))
    cached = fusion_task()
    cached.text = CachedText(TextEmbedding(*(part.detach() for part in wanted)))
    for task in (joint, frozen, cached):
        found = task.unconditional(3, torch.device("cpu"))
        for part, one in zip(found, wanted, strict=True):
            assert torch.allclose(part.float(), one.float().expand(3, *one.shape[1:]), atol=1e-6)


def test_a_loss_is_the_mean_over_its_samples():
    """So that any number of processes and passes give the same gradient."""
    objective = StepDistillation(random_weights(small_fusion()), steps=4, cfg_probability=0.5)
    task = fusion_task(objective, frozen=True)
    images, captions = data().batch(range(4))

    def loss(places):
        batch = Batch(images=images[places], captions=[captions[p] for p in places])
        return task.phases()[0].loss(batch, Draws(0, 3, places))[0].item()

    assert loss([0, 1, 2, 3]) == pytest.approx((loss([0, 1]) + loss([2, 3])) / 2, rel=1e-4)


@pytest.mark.parametrize(
    "change", [dict(cfg_probability=1.5), dict(guidance=(3.0, 2.0)), dict(gamma=-1.0), dict(steps=501)]
)
def test_wrong_settings_are_named(change):
    with pytest.raises(ValueError, match=f"{next(iter(change))}: got"):
        StepDistillation(Gaussian(1.0), **change)


def test_all_passes_of_a_step_leave_out_the_same_blocks():
    task = fusion_task(BlockSkipping(VPrediction(), keep=0.6))
    net, seen = task.modules["denoiser"], []
    real = net.forward

    def forward(*inputs, **named):
        seen.append(net.skipped)
        return real(*inputs, **named)

    net.forward = forward
    (phase,) = task.phases()
    assert phase.unused and phase.modules == ("denoiser", "text_encoder")
    images, captions = data().batch(range(2))
    for step in range(40):
        for position in (0, 1):
            batch = Batch(images=images[position : position + 1], captions=captions[position : position + 1])
            phase.loss(batch, Draws(0, step, [position + 2 * step]))
    assert net.skipped == frozenset()
    assert seen[::2] == seen[1::2] and len(set(seen)) > 10
    skippable = {name for name, place in net.places.items() if place.skippable}
    assert set().union(*seen) == skippable
    share = sum(map(len, seen)) / (len(seen) * len(skippable))
    assert share == pytest.approx(0.4, abs=3 * math.sqrt(0.4 * 0.6 / (40 * len(skippable))))
    with pytest.raises(ValueError, match="keep: got 0"):
        BlockSkipping(VPrediction(), keep=0)


# ---- through the loop and the pipeline -------------------------------------------------------------------------------


def test_the_loss_of_v_prediction():
    """The loss of a prediction of nothing is E v^2, of the right one 0."""
    task = fusion_task()
    images, captions = data().batch(range(3))
    noised = task.noised(Batch(images=images, captions=captions), Draws(0, 0, range(3)))
    v = task.schedule.velocity(noised.x0, noised.noise, noised.t)
    task.predict = lambda *_: v
    loss = task.phases()[0].loss(Batch(images=images, captions=captions), Draws(0, 0, range(3)))[0]
    assert loss.item() == 0
    task.predict = lambda *_: torch.zeros_like(v)
    loss = task.phases()[0].loss(Batch(images=images, captions=captions), Draws(0, 0, range(3)))[0]
    assert loss.item() == pytest.approx(v.square().mean().item(), rel=1e-5)
    assert noised.t.dtype == torch.int64 and torch.equal(
        noised.x_t, task.schedule.noised(noised.x0, noised.noise, noised.t)
    )


def make(kind):
    if kind == "v":
        return fusion_task(BlockSkipping(VPrediction(), keep=0.7))
    return fusion_task(StepDistillation(random_weights(small_fusion()), steps=4, cfg_probability=0.5), frozen=True)


@pytest.mark.parametrize("kind", ["v", "steps"])
def test_a_resumed_run_is_bitwise_that_of_one_left_alone(tmp_path, kind):
    plan = config(steps=4, save_every=2, cooldown=0.0)
    train(make(kind), data(), plan, tmp_path / "alone", console=QUIET)
    train(make(kind), data(), config(steps=2, save_every=2, cooldown=0.0), tmp_path / "cut", console=QUIET)
    exported = train(make(kind), data(), plan, tmp_path / "cut", console=QUIET)
    assert_same(tmp_path / "alone", tmp_path / "cut")
    pipe = SnapGenPipeline.from_pretrained(exported)
    assert isinstance(pipe.scheduler, DDIMScheduler) and pipe.scheduler.config.prediction_type == "v_prediction"
    pictures = draw(pipe, ["a red circle", "two stars"], steps=2, guidance=2.0, seed=0)
    assert [picture.size for picture in pictures] == [(32, 32)] * 2


def test_the_pipeline_takes_the_steps_of_the_formula():
    """Two guided DDIM steps by the formula are what the pipeline's latents are."""
    task = fusion_task(frozen=True, net=random_weights(small_fusion()))
    pipe = task.pipeline({"denoiser": task.modules["denoiser"]})
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 8, 4, 4)
    drawn = pipe("a red circle", num_inference_steps=2, guidance_scale=3.0, latents=noise, output_type="latent").images
    text, empty = pipe.encode_prompt(["a red circle"]), task.unconditional(1, noise.device)
    z, times = noise, vp.step_times(2)
    with torch.no_grad():
        for t, end in zip(times, times[1:], strict=False):
            v, _ = guided_velocity(pipe.denoiser, z, torch.tensor([t]), text, empty, torch.tensor([3.0]))
            z = task.schedule.ddim(z, v, torch.tensor([t]), torch.tensor([end]))
    assert torch.allclose(drawn, z, rtol=1e-3, atol=1e-4)


def test_the_sampler_follows_the_probability_flow():
    """Of N(0, c^2) the flow's end is known: z_T c / sqrt(a_T^2 c^2 + s_T^2); many steps come near it."""
    a, s = rates(999)
    noise = column(1.3, -0.4)
    text = TextEmbedding(torch.zeros(2, 1, 1), torch.ones(2, 1, dtype=torch.bool), None)
    options = dict(guidance_scale=1.0, negative=None)
    for steps, error in ((500, 0.01), (50, 0.1)):
        drawn = sample(Gaussian(0.5), vp.make_scheduler(), noise, text, steps=steps, **options)
        assert torch.allclose(drawn, noise * 0.5 / math.sqrt(a * a * 0.25 + s * s), rtol=error)


def test_training_brings_the_student_to_its_teacher(tmp_path):
    """The distillation's loss, on one batch, before and after: by more than half in 40 steps."""

    def task():
        teacher = random_weights(small_fusion())
        return fusion_task(StepDistillation(teacher, steps=2, cfg_probability=0, gamma=0), frozen=True)

    def error(made):
        images, captions = data().batch(range(16))
        with torch.no_grad():
            return made.phases()[0].loss(Batch(images=images, captions=captions), Draws(5, 0, range(16)))[0].item()

    made = task()
    before = error(made)
    train(made, data(), config(steps=40, lr=4e-3), tmp_path, console=QUIET)
    assert error(made) < before / 2


def losses_of_a_run(out: Path) -> dict[int, float]:
    """Three steps with blocks left out and guided losses; on as many processes as there are."""
    from snapgen import train as training

    losses, real = {}, training._Meter.report

    def report(self):
        losses[self.run.state.step] = float(self.run.group.mean(self.totals["loss"])) / self.count
        real(self)

    objective = StepDistillation(random_weights(small_fusion()), steps=4, cfg_probability=0.5, guidance=(1.5, 2.0))
    plan = config(steps=3, save_every=3, log_every=1, cooldown=0.0, lr=2e-3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training._Meter, "report", report)
        train(fusion_task(BlockSkipping(objective, keep=0.7), frozen=True), data(), plan, out, console=QUIET)
    return losses


@pytest.mark.complete
def test_two_processes_have_the_losses_of_one(tmp_path):
    script = f"""
import json, os, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch
torch.set_num_threads(1)
from test_snapfusion import Path, losses_of_a_run
losses = losses_of_a_run(Path({str(tmp_path / "two")!r}))
if os.environ["RANK"] == "0":
    Path({str(tmp_path / "losses.json")!r}).write_text(json.dumps(losses))
"""
    (tmp_path / "run.py").write_text(script)
    done = subprocess.run(
        [
            sys.executable,
            *["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"],
            str(tmp_path / "run.py"),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent.parent)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    two = {int(step): loss for step, loss in json.loads((tmp_path / "losses.json").read_text()).items()}
    one = losses_of_a_run(tmp_path / "one")
    # The same sums in another order: the loss moves by the rounding of its terms and of the weights.
    assert two == pytest.approx(one, rel=2e-5) and len(one) == 3
