"""Step distillation by a latent diffusion-GAN: the student learns to draw in 1, 2, 4 or 8 steps (SnapGen, section 3.4).

min_G max_D  E log D_T(x_s) + E log(1 - D_T(x~_s))  +  S(L_task, L_kd)

The student G is shown x_t at the times of its few Euler steps and says x~_0 = x_t - t v. Real x_0 and x~_0 are noised
anew to a time s, and D_T judges them there: the frozen teacher, with a trained head after each of the chosen blocks.
The paper's text leaves open which times, blocks, heads and form of the loss; here s is logit-normal as in pre-training,
a head is three convolutions that judge every place of the grid, and the loss is the hinge loss or the non-saturating
one.

Guidance is folded into the student: L_kd has the teacher's guided velocity as its target, or the mean of several on the
way to the student's next time (`teacher_steps`, ours). The student is drawn without guidance.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from snapgen import flow
from snapgen.data.loader import Batch
from snapgen.distill.features import transformers
from snapgen.distill.knowledge import CELLS, check_latents, velocity_distance
from snapgen.distill.scaling import Scaling
from snapgen.distill.teacher import Teacher
from snapgen.sampler import make_scheduler, set_steps
from snapgen.seeds import Draws
from snapgen.tasks import DenoiserTask, Figures, Noised, Phase

LOSSES = ("hinge", "non-saturating")


@dataclass(frozen=True, kw_only=True)
class StepOptions:
    """How steps are distilled.

    Raises:
        ValueError: a setting is not allowed.
    """

    student_steps: int = 4
    """Euler steps that the student is to draw in: 1, 2, 4, 8 or any number."""
    teacher_steps: int = 1
    """Euler steps of the teacher that L_kd has the student take at once. 1 is the paper's: the teacher's velocity where
    the student stands. With more, the mean velocity along the teacher's way to the student's next time, as in
    progressive distillation (Salimans and Ho, 2022)."""
    gan: Literal["hinge", "non-saturating"] = "hinge"
    """The loss of student and heads."""
    gan_weight: float = 1.0
    """Of the adversarial loss beside S(L_task, L_kd)."""
    head_width: int = 128
    """Channels inside a head."""
    head_lr: float = 1.0
    """The heads' learning rate, times the run's."""
    head_betas: tuple[float, float] = (0.0, 0.99)
    """Moments of the heads' optimizer."""
    student_betas: tuple[float, float] = (0.0, 0.99)
    """Moments of the student's."""
    r1: float = 0.0
    """Weight gamma of the gradient penalty on real samples; 0 for none."""

    def __post_init__(self) -> None:
        for name in ("student_steps", "teacher_steps", "head_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}; must be at least 1")
        if self.gan not in LOSSES:
            raise ValueError(f"gan: got {self.gan!r}; allowed are {' and '.join(LOSSES)}")
        for name in ("gan_weight", "head_lr", "r1"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ValueError(f"{name}: got {getattr(self, name)}; must be finite and not negative")


class Drawn(NamedTuple):
    """What the student made of a batch."""

    noised: Noised
    step: Tensor  # [B], int64: which of its steps the student is at
    velocity: Tensor  # [B, C, h, w]
    x0: Tensor  # [B, C, h, w]


class AdversarialDistillation:
    """The objective of a `DenoiserTask` whose denoiser, trained already, learns to draw in few steps.

    Phases are the generator (the student alone moves) and the discriminator (the heads alone do).

    Args:
        teacher: frozen; its velocity is the target of L_kd, with guidance if it has any, its features D's trunk.
        student: the task's denoiser. Heads are drawn from PyTorch's global generator and stand where it does.
        layers: names of the teacher's layers after which heads stand; by default the ends of four equal parts of its
            transformer layers.
        scaling: S.
        record: what else decides the weights (where the student began), for JSON.

    Raises:
        ValueError: the latents differ, a layer does not exist, or gives no grid.
    """

    def __init__(
        self,
        teacher: Teacher,
        student: nn.Module,
        *,
        options: StepOptions = StepOptions(),
        layers: Sequence[str] = (),
        scaling: Scaling = Scaling(),  # noqa: B008 - frozen
        record: Mapping[str, Any] | None = None,
    ) -> None:
        check_latents(teacher, student)
        self.teacher, self.options, self.scaling = teacher, options, scaling
        self.compiles = options.r1 == 0  # compiled modules are not differentiated twice
        self.layers = tuple(layers) or spread(transformers(teacher.network), 4)
        device = next(student.parameters()).device
        latents = torch.zeros(1, teacher.channels, CELLS, CELLS, device=device)
        t = torch.full((1,), 0.5, device=device)
        _, grids = teacher.velocity(latents, t, teacher.read([""]), self.layers)
        self.modules: dict[str, nn.Module] = {
            "heads": Heads([grid.shape[1] for grid in grids], options.head_width).to(device)
        }
        self._record = dict(record or {})

    def record(self) -> dict[str, Any]:
        options = self.options
        return {
            "objective": "adversarial step distillation",
            "student_steps": options.student_steps,
            "teacher_steps": options.teacher_steps,
            "gan": options.gan,
            "gan_weight": options.gan_weight,
            "head_width": options.head_width,
            "head_lr": options.head_lr,
            "head_betas": list(options.head_betas),
            "student_betas": list(options.student_betas),
            "r1": options.r1,
            "layers": list(self.layers),
            **self.scaling.record(),
            **self.teacher.record,
            **self._record,
        }

    def phases(self, task: DenoiserTask) -> Sequence[Phase]:
        options = self.options
        schedule = few_steps(options.student_steps, task.shift)

        def generator(batch: Batch, draws: Draws) -> tuple[Tensor, Figures]:
            return self.generator_loss(task, schedule, batch, draws)

        def discriminator(batch: Batch, draws: Draws) -> tuple[Tensor, Figures]:
            return self.discriminator_loss(task, schedule, batch, draws)

        return (
            Phase(name="generator", modules=task.student, loss=generator, betas=options.student_betas),
            Phase(
                name="discriminator",
                modules=("heads",),
                loss=discriminator,
                lr=options.head_lr,
                betas=options.head_betas,
            ),
        )

    def generator_loss(
        self, task: DenoiserTask, schedule: Tensor, batch: Batch, draws: Draws
    ) -> tuple[Tensor, Figures]:
        """The student's: its part of the game, and S(L_task, L_kd) at the same x_t."""
        drawn = self._drawn(task, schedule, batch, draws)
        noised = drawn.noised
        text = self.teacher.read(noised.captions)
        game = generator_loss(task.call["heads"](self._judged(task, drawn.x0, draws, text)), self.options.gan)
        taught = self._taught(task, drawn, text)
        own = flow.velocity_loss(drawn.velocity, noised.x0, noised.noise)
        distilled = velocity_distance(drawn.velocity, taught)
        loss = self.options.gan_weight * game + self.scaling(own, distilled, noised.t)
        figures = {"gan": game, "task": own, "output_kd": distilled}
        return loss.mean(), {name: value.detach().mean() for name, value in figures.items()}

    def discriminator_loss(
        self, task: DenoiserTask, schedule: Tensor, batch: Batch, draws: Draws
    ) -> tuple[Tensor, Figures]:
        """The heads': real against drawn samples, and R1 where it is asked for."""
        with torch.no_grad():
            drawn = self._drawn(task, schedule, batch, draws)
            text = self.teacher.read(drawn.noised.captions)
            false = self._judged(task, drawn.x0, draws, text)
            true = self._judged(task, drawn.noised.x0, draws, text)
        if self.options.r1:
            # FSDP's hooks know one backward pass; the gradients of a second are silently wrong.
            if isinstance(task.modules["heads"], FSDPModule):
                raise ValueError("r1: differentiates twice, which FSDP does not; train with --parallel ddp, or r1 0")
            true = [grid.requires_grad_() for grid in true]
        # Both at once, so that a data-parallel wrapper is called once.
        logits = task.call["heads"]([torch.cat(both) for both in zip(true, false, strict=True)])
        real, fake = (list(part) for part in zip(*(both.chunk(2) for both in logits), strict=True))
        game = discriminator_loss(real, fake, self.options.gan)
        figures = {"real": mean_logit(real), "fake": mean_logit(fake)}
        loss = game
        if self.options.r1:
            penalty = r1(real, true)
            loss = loss + self.options.r1 / 2 * penalty
            figures["r1"] = penalty
        return loss.mean(), {name: value.detach().mean() for name, value in figures.items()}

    def _drawn(self, task: DenoiserTask, schedule: Tensor, batch: Batch, draws: Draws) -> Drawn:
        """x~_0 = x_t - t v at one of the student's times for each sample, all equally likely."""
        step = (draws.uniform() * len(schedule)).long()
        t = schedule.to(step.device)[step]
        noised = task.noised(batch, draws, t)
        velocity = task.velocity(noised)
        return Drawn(noised, step, velocity, flow.clean(noised.x_t, velocity.float(), t))

    def _taught(self, task: DenoiserTask, drawn: Drawn, text: Any) -> Tensor:
        """L_kd's target [B, C, h, w]: the mean of the teacher's velocities on its way to the student's next time."""
        noised, finer = drawn.noised, self.options.teacher_steps
        # The student's times are every `finer`-th of these.
        times = few_steps(self.options.student_steps * finer, task.shift).to(drawn.step.device)
        times = torch.cat((times, times.new_zeros(1)))
        x, t = noised.x_t, noised.t
        for part in range(finer):
            velocity, _ = self.teacher.velocity(x, t, text)
            if finer == 1:
                return velocity
            following = times[drawn.step * finer + part + 1]
            x, t = x - flow.per_sample(t - following, x) * velocity, following
        return (noised.x_t - x) / flow.per_sample(noised.t - t, x)

    def _judged(self, task: DenoiserTask, x0: Tensor, draws: Draws, text: Any) -> list[Tensor]:
        """The trunk's features [B, C, h, w] of x_0 noised to a time of its own."""
        s = flow.times(draws.normal(), shift=task.shift)
        x_s = flow.interpolate(x0, draws.normal(*x0.shape[1:]), s)
        return self.teacher.features(x_s, s, text, self.layers)


class Heads(nn.Module):
    """What judges the teacher's features: one head for each layer, a logit for every place of its grid.

    A head is 1x1, GroupNorm, SiLU, 3x3, GroupNorm, SiLU, 1x1. Plain PyTorch, so that the gradient penalty can be
    differentiated.

    Args:
        channels: of each layer's features. width: inside the heads.
    """

    def __init__(self, channels: Sequence[int], width: int) -> None:
        super().__init__()
        groups = math.gcd(32, max(1, width // 4))
        self.heads = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(own, width, 1),
                nn.GroupNorm(groups, width),
                nn.SiLU(),
                nn.Conv2d(width, width, 3, padding=1),
                nn.GroupNorm(groups, width),
                nn.SiLU(),
                nn.Conv2d(width, 1, 1),
            )
            for own in channels
        )

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Logits [B, h * w] of each layer's features [B, C, h, w]."""
        dtype = self.heads[0][0].weight.dtype  # type: ignore[index]
        return [head(feature.to(dtype)).flatten(1) for head, feature in zip(self.heads, features, strict=True)]


def few_steps(steps: int, shift: float) -> Tensor:
    """The times t, falling from 1, at which the sampler calls a denoiser in this many Euler steps: [steps], fp32."""
    return set_steps(make_scheduler(shift), steps, "cpu").float() / flow.TIMESTEP_SCALE


def spread(names: Sequence[str], parts: int) -> tuple[str, ...]:
    """The last of each of `parts` equal parts of `names`; all of them where there are fewer."""
    parts = min(parts, len(names))
    return tuple(names[len(names) * (part + 1) // parts - 1] for part in range(parts))


def generator_loss(fake: Sequence[Tensor], kind: str) -> Tensor:
    """The student's loss, from logits [B, n] of each head: [B], fp32, mean over places, then over heads.

    hinge: -D(x~); non-saturating: -log sigmoid D(x~) (Goodfellow et al. 2014).
    """
    return _mean([-logits if kind == "hinge" else nn.functional.softplus(-logits) for logits in _wide(fake)])


def discriminator_loss(real: Sequence[Tensor], fake: Sequence[Tensor], kind: str) -> Tensor:
    """The heads' loss, from logits [B, n] of each head: [B], fp32.

    hinge: max(0, 1 - D(x)) + max(0, 1 + D(x~)); non-saturating: -log sigmoid D(x) - log(1 - sigmoid D(x~)).
    """
    if kind == "hinge":
        both = [torch.relu(1 - x) + torch.relu(1 + y) for x, y in zip(_wide(real), _wide(fake), strict=True)]
    else:
        softplus = nn.functional.softplus
        both = [softplus(-x) + softplus(y) for x, y in zip(_wide(real), _wide(fake), strict=True)]
    return _mean(both)


def mean_logit(logits: Sequence[Tensor]) -> Tensor:
    """D as one number for each sample, of logits [B, n] of each head: [B], fp32, mean over places, then over heads."""
    return _mean(_wide(logits))


def r1(real: Sequence[Tensor], features: Sequence[Tensor]) -> Tensor:
    """|| grad D ||^2 on real samples, with respect to the heads' inputs (Mescheder et al. 2018, equation 9): [B].

    Differentiable. The loss takes gamma / 2 of it. D is :func:`mean_logit`; the penalty ends at the features, since
    the trunk is frozen (our choice).

    Args:
        real: logits [B, n] of each head.
        features: what they were computed from, requiring gradients.
    """
    gradients = torch.autograd.grad(mean_logit(real).sum(), list(features), create_graph=True)
    return torch.stack([gradient.square().flatten(1).sum(1) for gradient in _wide(gradients)]).sum(0)


def _wide(logits: Sequence[Tensor]) -> list[Tensor]:
    """In fp32; fp64 stays."""
    return [each if each.dtype == torch.float64 else each.float() for each in logits]


def _mean(values: Sequence[Tensor]) -> Tensor:
    return torch.stack([value.mean(1) for value in values]).mean(0)
