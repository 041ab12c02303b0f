"""`snapgen distill knowledge` and `snapgen distill steps`: runs of both objectives from the command line's words."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from rich.console import Console
from tyro.conf import Fixed, OmitArgPrefixes, Suppress, arg

from snapgen.distill.adversarial import AdversarialDistillation, StepOptions
from snapgen.distill.features import LayerPair
from snapgen.distill.knowledge import KnowledgeDistillation
from snapgen.distill.scaling import Scaling
from snapgen.distill.teacher import Quantization, Teacher, fingerprint, load_teacher
from snapgen.parallel import own_device
from snapgen.runs import denoiser_task, home
from snapgen.settings import Source
from snapgen.tasks import Objective
from snapgen.train import TrainConfig, train

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class TeacherOptions:
    """Which teacher, and how it is held in memory."""

    teacher: str
    """A folder: export/ of a training run (of `tiny-teacher`, or any model of ours), a diffusers pipeline of Stable
    Diffusion 3 or 3.5, or a bare diffusers transformer; or a shipped checkpoint's name."""
    guidance: float = 1.0
    """Classifier-free guidance folded into its velocity; 1 for none."""
    teacher_dtype: Literal["fp32", "bf16"] | None = None
    """Of its weights; bf16 for Stable Diffusion 3 and bare transformers, fp32 for ours, unless given."""
    quantization: Quantization | None = None
    """8-bit weights by bitsandbytes or torchao, which must be installed."""
    sharded: bool = False
    """Under torchrun: deal its weights out over the processes."""
    captions: Path | None = None
    """A folder of its embeddings of all captions; its text encoders are then not loaded."""

    def load(self) -> Teacher:
        """The teacher, on this process's device, without the progress bars of the libraries that read it."""
        import diffusers
        import transformers

        for library in (diffusers, transformers):
            library.utils.logging.disable_progress_bar()
        return load_teacher(
            self.teacher,
            guidance=self.guidance,
            dtype=None if self.teacher_dtype is None else DTYPES[self.teacher_dtype],
            quantization=self.quantization,
            sharded=self.sharded,
            captions=self.captions,
            device=own_device(),
        )


def distill(
    *,
    out: Annotated[Path, arg(aliases=["-o"])],
    teacher: OmitArgPrefixes[TeacherOptions],
    source: OmitArgPrefixes[Source] = Source(),  # noqa: B008 - frozen
    output: bool = True,
    layers: tuple[str, ...] = ("last:last",),
    scaling: OmitArgPrefixes[Scaling] = Scaling(),  # noqa: B008
    config: OmitArgPrefixes[TrainConfig] = TrainConfig(),  # noqa: B008
    console: Suppress[Fixed[Console | None]] = None,
) -> Path:
    """Train a denoiser on data and on a teacher's velocity and features. Run the same command again to resume.

    Args:
        out: The run's folder: checkpoints, sample grids, TensorBoard, and at the end export/.
        teacher: The teacher.
        source: The student, and its data.
        output: Distil the velocity.
        layers: Distil features: TEACHER:STUDENT or TEACHER:STUDENT:PROJECTOR, with names of modules, or "last" for the
            last transformer layer; projectors are linear, conv and mlp. None given: output alone.
        scaling: How the teacher's losses are weighed against the task's own.
        config: How to train.

    Returns:
        The folder of what was exported.
    """
    taught, record = teacher.load(), _record(source)

    def objective(denoiser: Any) -> Objective:
        pairs = [LayerPair.parse(text, taught.network, denoiser) for text in layers]
        return KnowledgeDistillation(taught, denoiser, output=output, pairs=pairs, scaling=scaling, record=record)

    task, dataset = denoiser_task(source, config.seed, objective)
    return train(task, dataset, config, out, console=console)


def distill_steps(
    *,
    out: Annotated[Path, arg(aliases=["-o"])],
    teacher: OmitArgPrefixes[TeacherOptions],
    source: OmitArgPrefixes[Source] = Source(init="tiny", caption_dropout=0.0),  # noqa: B008 - frozen
    layers: tuple[str, ...] = (),
    options: OmitArgPrefixes[StepOptions] = StepOptions(),  # noqa: B008
    scaling: OmitArgPrefixes[Scaling] = Scaling(),  # noqa: B008
    config: OmitArgPrefixes[TrainConfig] = TrainConfig(lr=1e-4),  # noqa: B008
    console: Suppress[Fixed[Console | None]] = None,
) -> Path:
    """Teach a trained denoiser to draw in a few steps, without guidance. Run the same command again to resume.

    What it exports draws in its own number of steps, without guidance, unless told otherwise.

    Args:
        out: The run's folder: checkpoints, sample grids, TensorBoard, and at the end export/.
        teacher: The teacher; its guidance is folded into the student.
        source: The student, trained already (`--init`), and its data. Nobody draws from it with guidance, so that it
            need not know the empty caption.
        layers: The teacher's layers after which heads judge; by default the ends of four equal parts of its
            transformer layers.
        options: Steps and the adversarial game.
        scaling: How the teacher's loss is weighed against the task's own.
        config: How to train.

    Returns:
        The folder of what was exported.
    """
    if source.init is None:
        raise ValueError("init: got none; a student that learns to draw in few steps has been trained before")
    taught, record = teacher.load(), _record(source)

    def objective(denoiser: Any) -> Objective:
        return AdversarialDistillation(taught, denoiser, options=options, layers=layers, scaling=scaling, record=record)

    task, dataset = denoiser_task(source, config.seed, objective, steps=options.student_steps, guidance=1.0)
    return train(task, dataset, config, out, console=console)


def _record(source: Source) -> dict[str, Any]:
    """What a run records of where its student begins."""
    return {"student": None if source.init is None else fingerprint(home(source.init))}


COMMANDS = {"knowledge": distill, "steps": distill_steps}
