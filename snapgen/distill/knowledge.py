"""Multi-level knowledge distillation across architectures (SnapGen, section 3.3).

L = S(L_task, L_kd) + S(L_task, L_featkd),  L_kd = || v_teacher - v_student ||^2,  L_featkd as in `features`
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from snapgen import flow
from snapgen.data.loader import Batch
from snapgen.distill.features import LayerPair, Projectors, Taps, feature_loss
from snapgen.distill.scaling import Scaling
from snapgen.distill.teacher import Teacher
from snapgen.seeds import Draws
from snapgen.tasks import DenoiserTask, Figures, Phase

CELLS = 8  # side of the latents that find out how wide features are


class KnowledgeDistillation:
    """The objective of a `DenoiserTask` whose denoiser also learns from a teacher.

    Of several layer pairs each has an S of its own, and their mean is the feature term: with one pair the paper's
    formula, with more our choice, since features of different layers differ in size by orders of magnitude.

    Args:
        teacher: frozen; of the student's latents.
        student: the task's denoiser, to look up layers and their widths. Projectors are drawn from PyTorch's global
            generator and stand where the student does.
        output: distil the velocity.
        pairs: distil the features of these layers; none for output alone.
        scaling: S.
        record: what else decides the weights (where the student began), for JSON.

    Raises:
        ValueError: neither `output` nor `pairs`, the latents differ, a layer does not exist, or the features of a pair
            cannot be brought to one grid.
    """

    def __init__(
        self,
        teacher: Teacher,
        student: nn.Module,
        *,
        output: bool = True,
        pairs: Sequence[LayerPair] = (),
        scaling: Scaling = Scaling(),  # noqa: B008 - frozen
        record: Mapping[str, Any] | None = None,
    ) -> None:
        if not output and not pairs:
            raise ValueError("output: is off and there are no layers; nothing is left to distil")
        check_latents(teacher, student)
        self.teacher, self.output, self.pairs, self.scaling = teacher, output, tuple(pairs), scaling
        self.compiles = not self.pairs  # features are tapped by hooks
        self.modules: dict[str, nn.Module] = {}
        if self.pairs:
            self.modules["projectors"] = projectors(teacher, student, self.pairs)
        self._record = dict(record or {})

    def record(self) -> dict[str, Any]:
        return {
            "objective": "knowledge distillation",
            "output": self.output,
            "layers": [[pair.teacher, pair.student, pair.projector] for pair in self.pairs],
            **self.scaling.record(),
            **self.teacher.record,
            **self._record,
        }

    def phases(self, task: DenoiserTask) -> Sequence[Phase]:
        def loss(batch: Batch, draws: Draws) -> tuple[Tensor, Figures]:
            return self.loss(task, batch, draws)

        return (Phase(name="denoiser", modules=(*task.student, *self.modules), loss=loss),)

    def loss(self, task: DenoiserTask, batch: Batch, draws: Draws) -> tuple[Tensor, Figures]:
        """L on a batch, its mean over the samples; figures are the losses that it is made of, unscaled."""
        noised = task.noised(batch, draws)
        theirs = [pair.teacher for pair in self.pairs]
        ours = [pair.student for pair in self.pairs]
        text = self.teacher.read(noised.captions)
        taught, targets = self.teacher.velocity(noised.x_t, noised.t, text, theirs)
        # The wrapper of a data-parallel run is called, the module inside it is tapped.
        with Taps(task.modules["denoiser"], ours) as taps:
            velocity = task.velocity(noised)
        own = flow.velocity_loss(velocity, noised.x0, noised.noise)
        figures: Figures = {"task": own.detach().mean()}
        total = torch.zeros_like(own)
        if self.output:
            distilled = velocity_distance(velocity, taught)
            total = total + self.scaling(own, distilled, noised.t)
            figures["output_kd"] = distilled.detach().mean()
        if self.pairs:
            features = task.call["projectors"](taps.grids(ours, noised.x_t.shape[-2:]))
            losses = [feature_loss(*both) for both in zip(targets, features, strict=True)]
            total = total + torch.stack([self.scaling(own, each, noised.t) for each in losses]).mean(0)
            figures["feature_kd"] = torch.stack([each.detach().mean() for each in losses]).mean()
        return total.mean(), figures


def velocity_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """L_kd: mean squared difference of two velocities, per sample: [B], fp32."""
    return (student.float() - teacher.float()).square().flatten(1).mean(1)


def check_latents(teacher: Teacher, student: nn.Module) -> None:
    """Refuse a teacher of other latents than the student's."""
    own = student.config.in_channels  # type: ignore[union-attr]
    if teacher.channels != own:
        raise ValueError(f"teacher: its latents have {teacher.channels} channels, the student's have {own}")


@torch.no_grad()
def projectors(teacher: Teacher, student: nn.Module, pairs: Sequence[LayerPair]) -> Projectors:
    """Fresh projectors as wide as the features of both, which a first forward pass on small latents tells.

    Raises:
        ValueError: a layer does not exist, or its features are no grid.
    """
    config: Any = student.config
    parameter = next(student.parameters())
    latents = torch.zeros(1, config.in_channels, CELLS, CELLS, device=parameter.device)
    t = torch.full((1,), 0.5, device=parameter.device)
    _, targets = teacher.velocity(latents, t, teacher.read([""]), [pair.teacher for pair in pairs])
    ours = [pair.student for pair in pairs]
    with Taps(student, ours) as taps:
        student(
            latents.to(parameter.dtype),
            t * flow.TIMESTEP_SCALE,
            torch.zeros(1, 2, config.context_dim, device=parameter.device, dtype=parameter.dtype),
            torch.ones(1, 2, dtype=torch.bool, device=parameter.device),
            None if config.pooled_dim is None else torch.zeros(1, config.pooled_dim, device=parameter.device),
        )
    features = taps.grids(ours, (CELLS, CELLS))
    widths = [[grid.shape[1] for grid in grids] for grids in (features, targets)]
    return Projectors(pairs, *widths).to(parameter.device)
