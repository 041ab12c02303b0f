"""SnapFusion's training (NeurIPS 2023): v-prediction, step distillation with and without guidance, and robust training
by leaving blocks out. Objectives for :class:`FusionTask`, for the loop in `snapgen.train`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from snapgen import vp
from snapgen.data.loader import Batch
from snapgen.flow import per_sample
from snapgen.fusion_unet import FusionUNet
from snapgen.sampler import concatenate
from snapgen.seeds import Draws
from snapgen.tasks import DenoiserTask, Figures, Loss, Noised, Phase
from snapgen.text import TextEmbedding


class FusionTask(DenoiserTask):
    """Training of a :class:`FusionUNet`, on the discrete times of `snapgen.vp`. `Noised.t` holds these, int64 [B].

    Args:
        others: as of `DenoiserTask`; `steps` are DDIM's.
    """

    name = "snapfusion"

    def __init__(self, preset: Any, **others: Any) -> None:
        super().__init__(preset, **{"objective": VPrediction(), **others})
        self.schedule = vp.Schedule()

    def record(self) -> dict[str, Any]:
        config = self.modules["denoiser"].config
        return {**super().record(), "blocks": {name: config[name] for name in ("down", "mid", "up")}}

    @cached_property
    def flops(self) -> float:
        """Operations of the denoiser's forward and backward pass for a sample."""
        from snapgen.fusion_presets import fusion_counts

        return 3 * 2 * fusion_counts(self.modules["denoiser"].config)[""].macs

    def noised(self, batch: Batch, draws: Draws, t: Tensor | None = None) -> Noised:
        """The batch at times `t`, int64 [B], drawn evenly from all unless given."""
        x0 = self.latents(batch)
        text, captions = self.text.embed(batch, draws, self.call, x0.device)
        noise = draws.normal(*x0.shape[1:])
        if t is None:
            t = (draws.uniform() * vp.TIMES).long()
        return Noised(x0, noise, t, self.schedule.noised(x0, noise, t), text, captions)

    def predict(self, x_t: Tensor, t: Tensor, text: TextEmbedding) -> Tensor:
        """The denoiser's v at x_t [B, C, h, w] and t, int64 [B]."""
        return velocity(self.call["denoiser"], x_t, t, text)

    def unconditional(self, count: int, device: torch.device) -> TextEmbedding:
        """The empty caption, embedded, `count` times."""
        return self.text.read([""] * count, self.call, device)

    def pipeline(self, modules: Mapping[str, nn.Module] | None = None) -> Any:
        pipe = super().pipeline(modules)
        pipe.register_modules(scheduler=vp.make_scheduler())
        return pipe


class VPrediction:
    """L_ori = E || v^(t, z_t, c) - v ||^2 (SnapFusion, section 2), t even over all times."""

    modules: dict[str, nn.Module] = {}  # noqa: RUF012 - an empty one, for all

    def phases(self, task: Any) -> Sequence[Phase]:
        def loss(batch: Batch, draws: Draws) -> tuple[Tensor, Figures]:
            noised = task.noised(batch, draws)
            predicted = task.predict(noised.x_t, noised.t, noised.text)
            return _squared(predicted, task.schedule.velocity(noised.x0, noised.noise, noised.t)).mean(), {}

        return (Phase(name="denoiser", modules=task.student, loss=loss),)

    def record(self) -> dict[str, Any]:
        return {"objective": "v-prediction"}


class StepDistillation:
    """2N steps of a teacher taught to a student of N: SnapFusion, section 4.

    From a time t of the student's N, the teacher takes two DDIM steps, t -> t' -> t''. The x that would bring the
    student there in one is the target of x^(s) = a_t z_t - s_t v^(s):

        L_dstl = max(a_t^2 / s_t^2, 1) || x^(s) - (z_{t''} - (s_{t''}/s_t) z_t) / (a_{t''} - (s_{t''}/s_t) a_t) ||^2

    Vanilla, v^ is the prediction for the caption. Guided (CFG-aware), on both sides and at all three places it is
    w v^(c) - (w - 1) v^(none) with the same w, uniform in `guidance` for each sample.

        L = L_dstl + gamma (|L_dstl| / |L_ori|) L_ori

    with the ratio detached. The paper says that L_ori is scaled to L_dstl's magnitude, not over what: here, for each
    sample, at the same z_t, so that a loss does not depend on who else is in the batch and L_ori needs no further
    forward pass. Which of the two losses a step takes is decided for the whole step.

    Args:
        teacher: frozen; a FusionUNet that reads the same captions through the same text encoder.
        steps: N.
        cfg_probability: share of steps that take the guided loss.
        guidance: w's bounds.
        gamma: weight of L_ori; 0 leaves it out.
        source: what the teacher was loaded from, for the run's record.
    """

    modules: dict[str, nn.Module] = {}  # noqa: RUF012 - an empty one, for all

    def __init__(
        self,
        teacher: nn.Module,
        *,
        steps: int = 8,
        cfg_probability: float = 0.1,
        guidance: tuple[float, float] = (2.0, 14.0),
        gamma: float = 0.2,
        source: str = "",
    ) -> None:
        if not 0 <= cfg_probability <= 1:
            raise ValueError(f"cfg_probability: got {cfg_probability}; must lie in [0, 1]")
        if not guidance[0] <= guidance[1]:
            raise ValueError(f"guidance: got {guidance}; must be (lowest, highest)")
        if gamma < 0:
            raise ValueError(f"gamma: got {gamma}; must not be negative")
        if not 1 <= steps <= vp.TIMES // 2:
            raise ValueError(f"steps: got {steps}; must be in 1 to {vp.TIMES // 2}, the teacher taking twice as many")
        self.teacher = teacher.requires_grad_(False).eval()
        self.steps, self.cfg_probability, self.guidance, self.gamma = steps, cfg_probability, guidance, gamma
        self.source = source
        own, theirs = vp.step_times(steps), vp.step_times(2 * steps)
        # Per step of the student: t, t', t''.
        self.times = torch.tensor([(own[k], theirs[2 * k + 1], own[k + 1]) for k in range(steps)])

    def phases(self, task: Any) -> Sequence[Phase]:
        def loss(batch: Batch, draws: Draws) -> tuple[Tensor, Figures]:
            return self.loss(task, batch, draws)

        # Guided losses are far larger than plain ones: were they rare, each would look like a broken gradient.
        mixed = 0 < self.cfg_probability < 1
        return (Phase(name="denoiser", modules=("denoiser",), loss=loss, uneven=mixed),)

    def record(self) -> dict[str, Any]:
        return {
            "objective": "step distillation",
            "student_steps": self.steps,
            "cfg_probability": self.cfg_probability,
            "guidance": list(self.guidance),
            "gamma": self.gamma,
            "teacher": self.source,
        }

    def loss(self, task: FusionTask, batch: Batch, draws: Draws) -> tuple[Tensor, Figures]:
        """The mean loss, and L_dstl and L_ori as figures."""
        guided = float(draws.common()) < self.cfg_probability
        count = len(batch)
        step = (draws.uniform() * self.steps).long()
        t, middle, end = self.times.to(step.device)[step].unbind(1)
        low, high = self.guidance
        scale = (low + (high - low) * draws.uniform()) if guided else None
        noised = task.noised(batch, draws, t)
        text = TextEmbedding(*(part if part is None else part.detach() for part in noised.text))  # type: ignore[arg-type]
        z, schedule = noised.x_t, task.schedule
        empty = task.unconditional(count, z.device) if guided else None
        with torch.no_grad():
            halfway = schedule.ddim(z, guided_velocity(self.teacher, z, t, text, empty, scale)[0], t, middle)
            v = guided_velocity(self.teacher, halfway, middle, text, empty, scale)[0]
            target = schedule.one_step_target(z, schedule.ddim(halfway, v, middle, end), t, end)
        v, plain = guided_velocity(task.call["denoiser"], z, t, text, empty, scale)
        distilled = schedule.weight(t) * _squared(schedule.clean(z, v, t), target)
        figures = {"distillation": distilled.mean().detach()}
        if self.gamma == 0:
            return distilled.mean(), figures
        original = _squared(plain, schedule.velocity(noised.x0, noised.noise, t))
        figures["original"] = original.mean().detach()
        return (distilled + self.gamma * scaled_to(original, distilled)).mean(), figures


class BlockSkipping:
    """Robust training: in every step each block is executed or replaced by the identity (SnapFusion, equation 5), all
    processes and passes leaving out the same. Blocks that change the width are always executed.

    Args:
        objective: what is trained meanwhile.
        keep: probability that a block is executed. The paper gives none; 0.9 is our choice.
    """

    def __init__(self, objective: Any, *, keep: float = 0.9) -> None:
        if not 0 < keep <= 1:
            raise ValueError(f"keep: got {keep}; must lie in (0, 1]")
        self.objective, self.keep = objective, keep
        self.compiles = keep == 1  # other blocks in every step
        self.modules: dict[str, nn.Module] = objective.modules

    def phases(self, task: Any) -> Sequence[Phase]:
        def skipping(inner: Loss) -> Loss:
            def loss(batch: Batch, draws: Draws) -> tuple[Tensor, Figures]:
                net: FusionUNet = task.modules["denoiser"]
                names = [name for name, place in net.places.items() if place.skippable]
                drawn = draws.common(len(names)).tolist()
                with net.without(name for name, number in zip(names, drawn, strict=True) if number >= self.keep):
                    return inner(batch, draws)

            return loss

        return tuple(
            replace(phase, loss=skipping(phase.loss), unused=True) if "denoiser" in phase.modules else phase
            for phase in self.objective.phases(task)
        )

    def record(self) -> dict[str, Any]:
        return {**self.objective.record(), "keep_blocks": self.keep}


def velocity(net: nn.Module, z: Tensor, t: Tensor, text: TextEmbedding) -> Tensor:
    """What `net` predicts at z [B, C, h, w] and t, int64 [B]; fp32."""
    return net(z, t, text.context, text.mask, text.pooled, return_dict=False)[0].float()


def guided_velocity(
    net: nn.Module, z: Tensor, t: Tensor, text: TextEmbedding, empty: TextEmbedding | None, scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    """w v(c) - (w - 1) v(none) with w = `scale` [B], and v(c) alone; without a scale both are v(c).

    Both predictions come from one forward pass of twice the batch.
    """
    if scale is None or empty is None:
        v = velocity(net, z, t, text)
        return v, v
    both = velocity(net, torch.cat((z, z)), torch.cat((t, t)), concatenate(empty, text))
    without, conditional = both.chunk(2)
    w = per_sample(scale, conditional)
    return w * conditional - (w - 1) * without, conditional


def scaled_to(loss: Tensor, other: Tensor) -> Tensor:
    """`loss` [B] at the magnitude of `other` [B], each for itself; only `loss` passes gradients."""
    return loss * (other / loss.clamp(min=torch.finfo(loss.dtype).tiny)).detach()


def _squared(predicted: Tensor, wanted: Tensor) -> Tensor:
    """Mean squared error of each sample: [B], fp32."""
    return (predicted.float() - wanted.float()).square().flatten(1).mean(1)
