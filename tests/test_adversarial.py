"""Step distillation: each formula by hand, who gets gradients and who moves, R1 against finite differences, runs."""

import dataclasses
import math
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import tyro
from small_models import QUIET, denoiser_task
from small_teachers import small_teacher, taught_task
from test_distill import batch
from test_train import assert_same, config, data, weights
from torch import nn

from snapgen import io
from snapgen.config import SHIPPED
from snapgen.distill.adversarial import (
    AdversarialDistillation,
    Heads,
    StepOptions,
    discriminator_loss,
    few_steps,
    generator_loss,
    r1,
    spread,
)
from snapgen.distill.command import TeacherOptions, distill_steps
from snapgen.distill.scaling import Scaling
from snapgen.parallel import Processes
from snapgen.pipeline import SnapGenPipeline
from snapgen.sampler import make_scheduler, set_steps
from snapgen.seeds import Draws
from snapgen.settings import Source
from snapgen.state import TrainState
from snapgen.tasks import DenoiserTask
from snapgen.text import TextEmbedding
from snapgen.train import TrainConfig, optimizer_step, share_of, train

pytestmark = pytest.mark.method


def few(**changes) -> DenoiserTask:
    """A task of step distillation with heads after all three blocks."""
    scaling = changes.pop("scaling", Scaling())

    def make(teacher, student):
        torch.manual_seed(4)
        teacher.guidance = 3.0
        return AdversarialDistillation(teacher, student, options=StepOptions(head_width=8, **changes), scaling=scaling)

    return taught_task(make)


def test_a_phase_asks_for_no_gradients_of_what_it_does_not_move():
    task = few()
    asked = {}

    def listening(phase):
        def loss(*args):
            named = {name: [p.requires_grad for p in module.parameters()] for name, module in task.modules.items()}
            asked[phase.name] = {name for name, flags in named.items() if all(flags)}
            assert asked[phase.name] == {name for name, flags in named.items() if any(flags)}
            return phase.loss(*args)

        return dataclasses.replace(phase, loss=loss)

    phases = [listening(phase) for phase in task.phases()]
    task.phases = lambda: phases
    settings = config(steps=1)
    state = TrainState(task, settings)
    optimizer_step(task, settings, state, iter([batch()]), share_of(settings, state.group))
    assert asked == {phase.name: set(phase.modules) for phase in phases}
    assert all(p.requires_grad for module in task.modules.values() for p in module.parameters())


# ---- formulas --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_times_are_those_of_the_sampler(steps, shift):
    even = [1 - index / steps for index in range(steps)]
    expected = [shift * t / (1 + (shift - 1) * t) for t in even]
    assert few_steps(steps, shift).tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_teacher_takes_its_own_steps_to_the_students_next_time(shift):
    task = few(student_steps=2, teacher_steps=3)
    task.shift = shift
    objective, schedule = task.objective, few_steps(2, shift)
    drawn = objective._drawn(task, schedule, batch(), Draws(0, 0, range(2)))
    text = objective.teacher.read(drawn.noised.captions)
    taught = objective._taught(task, drawn, text)
    scheduler = make_scheduler(shift)
    times = set_steps(scheduler, 6, "cpu")
    assert (times[::3] / 1000).tolist() == pytest.approx(schedule.tolist())
    for sample, step in enumerate(drawn.step.tolist()):
        x = start = drawn.noised.x_t[sample : sample + 1]
        own = TextEmbedding(*(part[sample : sample + 1] for part in text))
        for index in range(3 * step, 3 * step + 3):
            velocity, _ = objective.teacher.velocity(x, times[index : index + 1] / 1000, own)
            x = x + (scheduler.sigmas[index + 1] - scheduler.sigmas[index]) * velocity
        following = 0 if step else schedule[1]
        torch.testing.assert_close(
            taught[sample], ((start - x) / (schedule[step] - following))[0], rtol=1e-4, atol=1e-5
        )


def test_the_student_is_called_at_those_times():
    task = few(student_steps=4)
    seen = []
    task.modules["denoiser"].register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    pipe = task.pipeline(task.modules)
    pipe.set_progress_bar_config(disable=True)
    pipe("a red circle", num_inference_steps=4, guidance_scale=1, output_type="latent")
    drawn = torch.stack([t.reshape(()) for t in seen])
    torch.testing.assert_close(drawn, few_steps(4, task.shift) * 1000)
    seen.clear()
    objective = task.objective
    for seed in range(6):
        objective._drawn(task, few_steps(4, task.shift), batch(), Draws(seed, 0, range(2)))
    trained = torch.cat(seen)
    assert set(trained.tolist()) == set(drawn.tolist())


def test_losses_by_hand():
    real, fake = (
        [torch.tensor([[2.0, 0.0]]), torch.tensor([[-1.0]])],
        [torch.tensor([[-2.0, 1.0]]), torch.tensor([[0.5]])],
    )
    # hinge: heads (max(0, 1-2) + max(0, 1-2) + max(0, 1-0) + max(0, 1+1)) / 2 = 3 / 2 and 2 + 1.5; their mean.
    assert discriminator_loss(real, fake, "hinge").tolist() == pytest.approx([(1.5 + 3.5) / 2])
    assert generator_loss(fake, "hinge").tolist() == pytest.approx([(0.5 - 0.5) / 2])

    def sigmoid(x):
        return 1 / (1 + math.exp(-x))

    first = -(math.log(sigmoid(2)) + math.log(sigmoid(0)) + math.log(1 - sigmoid(-2)) + math.log(1 - sigmoid(1))) / 2
    second = -(math.log(sigmoid(-1)) + math.log(1 - sigmoid(0.5)))
    assert discriminator_loss(real, fake, "non-saturating").tolist() == pytest.approx([(first + second) / 2])
    third = -(math.log(sigmoid(-2)) + math.log(sigmoid(1))) / 2
    assert generator_loss(fake, "non-saturating").tolist() == pytest.approx([(third - math.log(sigmoid(0.5))) / 2])


def test_r1_by_hand():
    # D = mean over places of w . f, so its gradient is w / places at every place.
    features = torch.randn(2, 3, 2, 2, requires_grad=True)
    w = torch.tensor([1.0, -2.0, 0.5])
    logits = torch.einsum("bchw,c->bhw", features, w).flatten(1)
    assert r1([logits], [features]).tolist() == pytest.approx([w.square().sum().item() / 4] * 2)


def test_gradients_of_r1_against_finite_differences():
    torch.manual_seed(1)
    heads = Heads([3, 2], 4).double()
    inputs = [torch.randn(2, 3, 3, 2, dtype=torch.float64), torch.randn(2, 2, 2, 2, dtype=torch.float64)]
    names = [name for name, _ in heads.named_parameters()]

    def penalty(*parameters):
        features = [each.clone().requires_grad_() for each in inputs]
        logits = torch.func.functional_call(heads, dict(zip(names, parameters, strict=True)), (features,))
        return r1(logits, features)

    parameters = [p.detach().clone().requires_grad_() for p in heads.parameters()]
    assert torch.autograd.gradcheck(penalty, parameters)
    penalty(*parameters).sum().backward()
    assert any(p.grad is not None and p.grad.abs().max() > 1e-6 for p in parameters)


def test_heads_stand_at_the_ends_of_equal_parts():
    names = [str(index) for index in range(38)]
    assert spread(names, 4) == ("8", "18", "27", "37")
    assert spread(names[:3], 4) == ("0", "1", "2")
    assert few().objective.layers == tuple(f"transformer.transformer_blocks.{index}" for index in range(3))


@pytest.mark.parametrize("gan", ["hinge", "non-saturating"])
def test_both_losses_by_their_formulas(gan):
    task = few(gan=gan, gan_weight=0.7, r1=0.4, student_steps=2)
    objective, heads = task.objective, task.modules["heads"]
    teacher, network = objective.teacher, objective.teacher.network
    generator, discriminator = task.phases()
    assert (generator.name, generator.modules) == ("generator", ("denoiser", "text_encoder"))
    assert (discriminator.name, discriminator.modules) == ("discriminator", ("heads",))
    assert generator.betas == discriminator.betas == (0.0, 0.99)

    def sampled(seed):
        """The same numbers, in the order in which they are drawn."""
        draws = Draws(seed, 0, range(2))
        t = torch.tensor([1.0, 0.5])[(draws.uniform() * 2).long()]
        noised = task.noised(batch(), draws, t)
        velocity = task.velocity(noised)
        x0 = noised.x_t - t.view(2, 1, 1, 1) * velocity
        return draws, noised, velocity, x0

    def judged(x0, draws, text):
        s = torch.sigmoid(draws.normal())
        noise = draws.normal(8, 4, 4)
        x_s = (1 - s).view(2, 1, 1, 1) * x0 + s.view(2, 1, 1, 1) * noise
        tokens = []
        handles = [
            block.register_forward_hook(lambda _, __, out: tokens.append(out[1]))
            for block in network.transformer.transformer_blocks
        ]
        network(x_s, s * 1000, text.context, text.mask, text.pooled)
        for handle in handles:
            handle.remove()
        return [each.transpose(1, 2).unflatten(2, (4, 4)) for each in tokens]

    with torch.no_grad():
        draws, noised, velocity, x0 = sampled(5)
        text, empty = teacher.read(noised.captions), teacher.read([""] * 2)
        logits = [head(f).flatten(1) for head, f in zip(heads.heads, judged(x0, draws, text), strict=True)]
        game = sum((-x if gan == "hinge" else nn.functional.softplus(-x)).mean(1) for x in logits) / 3
        conditional = network(noised.x_t, noised.t * 1000, text.context, text.mask, text.pooled).sample
        without = network(noised.x_t, noised.t * 1000, empty.context, empty.mask, empty.pooled).sample
        own = (velocity - noised.noise + noised.x0).square().mean((1, 2, 3))
        distilled = (velocity - without - 3 * (conditional - without)).square().mean((1, 2, 3))
        # lambda is 1 at t = 1/2 and 0 at t = 1, where S is |L_task| / |L_kd| L_kd.
        expected = 0.7 * game + own
        loss, figures = generator.loss(batch(), Draws(5, 0, range(2)))
    assert loss.item() == pytest.approx(expected.mean().item(), rel=1e-4)
    assert figures["output_kd"].item() == pytest.approx(distilled.mean().item(), rel=1e-4)

    draws, noised, _, x0 = sampled(6)
    fakes = [f.detach() for f in judged(x0, draws, text)]
    reals = [f.detach().requires_grad_() for f in judged(noised.x0, draws, text)]
    fake = [head(f).flatten(1) for head, f in zip(heads.heads, fakes, strict=True)]
    real = [head(f).flatten(1) for head, f in zip(heads.heads, reals, strict=True)]
    gradients = torch.autograd.grad(sum(each.mean(1) for each in real).sum() / 3, reals)
    penalty = sum(g.square().sum((1, 2, 3)) for g in gradients)
    game = discriminator_loss(real, fake, gan)
    loss, figures = discriminator.loss(batch(), Draws(6, 0, range(2)))
    assert loss.item() == pytest.approx((game + 0.2 * penalty).mean().item(), rel=1e-4)
    assert figures["r1"].item() == pytest.approx(penalty.mean().item(), rel=1e-4)
    assert figures["real"].item() == pytest.approx(torch.stack([x.mean() for x in real]).mean().item(), rel=1e-3)


# ---- who learns ------------------------------------------------------------------------------------------------------


def test_the_game_alone_teaches_the_student_through_the_teacher():
    # Without L_task and L_kd the only way to the student is through heads and teacher.
    task = few(student_steps=1)
    objective = task.objective
    drawn = objective._drawn(task, few_steps(1, 1.0), batch(), Draws(0, 0, range(2)))
    text = objective.teacher.read(drawn.noised.captions)
    features = objective._judged(task, drawn.x0, Draws(1, 0, range(2)), text)
    generator_loss(task.modules["heads"](features), "hinge").mean().backward()
    student = task.modules["denoiser"]
    assert all(p.grad is not None and p.grad.any() for p in student.parameters())
    assert all(p.grad is None and not p.requires_grad for p in objective.teacher.network.parameters())


def test_the_heads_loss_reaches_the_heads_alone():
    task = few(r1=1.0)
    _, discriminator = task.phases()
    loss, _ = discriminator.loss(batch(), Draws(0, 0, range(2)))
    loss.backward()
    assert all(p.grad is not None for p in task.modules["heads"].parameters())
    assert all(p.grad.any() for name, p in task.modules["heads"].named_parameters() if "weight" in name)
    for other in (task.modules["denoiser"], task.modules["text_encoder"], task.objective.teacher.network):
        assert all(p.grad is None for p in other.parameters())


@pytest.mark.parametrize("still", ["generator", "discriminator"])
def test_each_phase_moves_its_own(still):
    from dataclasses import replace

    from snapgen.data.loader import batches
    from snapgen.state import TrainState

    task = few()
    phases = [replace(phase, lr=0.0) if phase.name == still else phase for phase in task.phases()]
    task.phases = lambda: phases
    plan = config(warmup=1)
    share = share_of(plan, TrainState(task, plan).group)
    before = {name: {k: p.clone() for k, p in m.state_dict().items()} for name, m in task.modules.items()}
    teacher = {name: p.clone() for name, p in task.objective.teacher.network.state_dict().items()}
    state = TrainState(task, plan)
    figures = optimizer_step(task, plan, state, batches(data(), share, start=0, seed=0), share)
    moved = {
        name
        for name, module in task.modules.items()
        if any(not torch.equal(p, before[name][key]) for key, p in module.state_dict().items())
    }
    assert moved == ({"heads"} if still == "generator" else {"denoiser", "text_encoder"})
    assert all(torch.equal(p, teacher[name]) for name, p in task.objective.teacher.network.state_dict().items())
    assert {"generator/loss", "generator/gan", "discriminator/real", "discriminator/grad_norm"} <= figures.keys()


def test_heads_learn_to_tell_and_the_student_to_deceive():
    task = few(student_steps=1)
    _, discriminator = task.phases()
    heads = torch.optim.AdamW(task.modules["heads"].parameters(), lr=1e-2)
    told = []
    for _ in range(60):
        loss, figures = discriminator.loss(batch(), Draws(0, 0, range(2)))
        heads.zero_grad()
        loss.backward()
        heads.step()
        told.append(figures["real"] - figures["fake"])
    assert told[-1] > told[0] + 1
    student = torch.optim.AdamW(task.modules["denoiser"].parameters(), lr=1e-3)
    seen = []
    for _ in range(20):
        drawn = task.objective._drawn(task, few_steps(1, 1.0), batch(), Draws(0, 0, range(2)))
        text = task.objective.teacher.read(drawn.noised.captions)
        features = task.objective._judged(task, drawn.x0, Draws(0, 1, range(2)), text)
        game = generator_loss(task.modules["heads"](features), "hinge").mean()
        student.zero_grad()
        game.backward()
        student.step()
        seen.append(game.item())
    assert seen[-1] < seen[0] - 0.5


# ---- runs ------------------------------------------------------------------------------------------------------------


@pytest.mark.complete
def test_a_run_stopped_goes_on_bitwise(tmp_path):
    train(few(r1=0.1), data(), config(), tmp_path / "alone", console=QUIET)

    class Stopped(type(data())):
        read = 0

        def batch(self, indices):
            self.read += 1
            if self.read == 5:
                os.kill(os.getpid(), signal.SIGINT)
            return super().batch(indices)

    with pytest.raises(KeyboardInterrupt):
        train(few(r1=0.1), Stopped(32, length=1000), config(), tmp_path / "stopped", console=QUIET)
    train(few(r1=0.1), data(), config(), tmp_path / "stopped", console=QUIET)
    assert_same(tmp_path / "alone", tmp_path / "stopped")
    there = weights(tmp_path / "alone")
    assert "optimizer/discriminator/heads.heads.0.0.weight/exp_avg" in there
    with pytest.raises(ValueError, match=r"r1 was 0.1, now 0.2"):
        train(few(r1=0.2), data(), config(), tmp_path / "alone", console=QUIET)


def test_bf16_runs(tmp_path):
    train(few(r1=0.1), data(), config(steps=2, dtype="bf16"), tmp_path, console=QUIET)
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path).values())


def test_the_shipped_student_learns_few_steps_from_itself(tmp_path):
    words = shlex.split(
        "--init tiny --teacher tiny --guidance 4 --student-steps 2 --head-width 16 --steps 2 --batch-size 2 "
        "--warmup 1 --lr 1e-5 --sample-every 100 --ema 0"
    )
    exported = tyro.cli(distill_steps, args=["-o", str(tmp_path / "run"), *words])
    pipe = SnapGenPipeline.from_pretrained(exported)
    pipe.set_progress_bar_config(disable=True)
    drawn = pipe("a red circle", num_inference_steps=2, guidance_scale=1, output_type="pt").images
    assert drawn.shape == (1, 3, 64, 64)
    # It began where it was told to: two steps of at most 1e-5 each, Adam's, leave it near.
    began = io.load_tensors(SHIPPED / "tiny" / "denoiser" / "diffusion_pytorch_model.safetensors")
    apart = [(p - began[name].float()).abs().max() for name, p in pipe.denoiser.state_dict().items()]
    assert 0 < max(apart) < 1e-3
    assert list((tmp_path / "run" / "samples").glob("*.png"))
    there = io.read_json(tmp_path / "run" / "config.json")
    assert there["student"] == there["teacher"] and there["caption_dropout"] == 0.0


def test_wrong_students_and_settings_are_named(tmp_path):
    with pytest.raises(ValueError, match="gan: got 'wasserstein'; allowed are hinge and non-saturating"):
        StepOptions(gan="wasserstein")
    with pytest.raises(ValueError, match="student_steps: got 0"):
        StepOptions(student_steps=0)
    with pytest.raises(ValueError, match="r1: got -1"):
        StepOptions(r1=-1.0)
    with pytest.raises(ValueError, match=r"has none called 'blocks\.9'"):
        AdversarialDistillation(small_teacher(), denoiser_task().modules["denoiser"], layers=["blocks.9"])
    settings = dict(teacher=TeacherOptions(teacher="tiny"), config=TrainConfig(steps=1), console=QUIET)
    with pytest.raises(io.CheckpointError, match="nowhere"):
        distill_steps(out=tmp_path, source=Source(init="nowhere"), **settings)
    with pytest.raises(ValueError, match="init: got none"):
        distill_steps(out=tmp_path, source=Source(), **settings)
    with pytest.raises(ValueError, match="preset: t2i-1024"):
        distill_steps(out=tmp_path, source=Source(init="tiny", preset="t2i-1024"), **settings)
    with pytest.raises(io.CheckpointError, match="does not fit a MMDiT"):
        distill_steps(out=tmp_path, source=Source(init="tiny", preset="tiny-teacher", autoencoder="tiny"), **settings)


# ---- many processes --------------------------------------------------------------------------------------------------


@pytest.mark.complete
@pytest.mark.slow
def test_two_processes_distil_as_one(tmp_path):
    from distill_run import OBJECTIVES, steps

    script = Path(__file__).parent / "distill_run.py"
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", str(script), str(tmp_path)]
    paths = os.pathsep.join([str(script.parent.parent), str(script.parent)])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    run = subprocess.run([sys.executable, *command], capture_output=True, env=environment, timeout=120)
    assert run.returncode == 0, run.stderr.decode()[-3000:]
    for name, make in OBJECTIVES.items():
        alone = steps(make(), Processes("ddp", 0, 1, torch.device("cpu")))
        start = {f"{key}.{n}": p for key, module in make().modules.items() for n, p in module.named_parameters()}
        for kind in ("ddp", "fsdp"):
            if (kind, name) == ("fsdp", "penalty"):
                assert "r1: differentiates twice, which FSDP does not" in (tmp_path / "fsdp-penalty.txt").read_text()
                continue
            found = io.load_tensors(tmp_path / f"{kind}-{name}.safetensors")
            assert found.keys() == alone.keys()
            moved = sum((alone[n] - start[n]).square().sum() for n in alone).sqrt()
            apart = sum((alone[n] - found[n]).square().sum() for n in alone).sqrt()
            # AdamW's first steps divide by the gradient's size, which magnifies rounding where it is near zero.
            assert moved > 0 and apart < 1e-2 * moved, (kind, name)
