"""`snapgen distill` and `snapgen distill-steps`: runs of both objectives from the command line's words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from rich.console import Console
from tyro.conf import Fixed, OmitArgPrefixes, Suppress, arg

from snapgen import io
from snapgen.conditioning import JointText
from snapgen.config import SHIPPED, Preset, get_preset
from snapgen.data.loader import open_dataset
from snapgen.data.shapes import eval_captions
from snapgen.distill.adversarial import AdversarialDistillation, StepOptions
from snapgen.distill.features import LayerPair
from snapgen.distill.knowledge import KnowledgeDistillation
from snapgen.distill.scaling import Scaling
from snapgen.distill.teacher import Quantization, Teacher, fingerprint, load_teacher
from snapgen.mmdit import make_denoiser
from snapgen.parallel import own_device
from snapgen.runs import load_autoencoder, place, vocabulary
from snapgen.tasks import DenoiserTask, Objective, build_denoiser
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
    preset: str = "tiny",
    data: str = "shapes",
    autoencoder: str = "tiny",
    student: str | None = None,
    output: bool = True,
    layers: tuple[str, ...] = ("last:last",),
    scaling: OmitArgPrefixes[Scaling] = Scaling(),  # noqa: B008 - frozen
    config: OmitArgPrefixes[TrainConfig] = TrainConfig(),  # noqa: B008
    console: Suppress[Fixed[Console | None]] = None,
) -> Path:
    """Train a denoiser on data and on a teacher's velocity and features. Run the same command again to resume.

    Args:
        out: The run's folder: checkpoints, sample grids, TensorBoard, and at the end export/.
        teacher: The teacher.
        preset: Which model is the student.
        data: "shapes", a folder of pictures and captions, or WebDataset shards (.tar).
        autoencoder: Whose latents: a shipped checkpoint's name, or the export/ folder of `snapgen train-autoencoder`.
        student: A checkpoint to begin from; by default fresh weights.
        output: Distil the velocity.
        layers: Distil features: TEACHER:STUDENT or TEACHER:STUDENT:PROJECTOR, with names of modules, or "last" for the
            last transformer layer; projectors are linear, conv and mlp. None given: output alone.
        scaling: How the teacher's losses are weighed against the task's own.
        config: How to train.

    Returns:
        The exported pipeline's folder.
    """

    def objective(taught: Teacher, denoiser: Any, record: dict[str, Any]) -> Objective:
        pairs = [LayerPair.parse(text, taught.network, denoiser) for text in layers]
        return KnowledgeDistillation(taught, denoiser, output=output, pairs=pairs, scaling=scaling, record=record)

    return _run(preset, data, autoencoder, student, teacher, objective, config, out, console)


def distill_steps(
    *,
    out: Annotated[Path, arg(aliases=["-o"])],
    student: str,
    teacher: OmitArgPrefixes[TeacherOptions],
    preset: str = "tiny",
    data: str = "shapes",
    autoencoder: str = "tiny",
    layers: tuple[str, ...] = (),
    options: OmitArgPrefixes[StepOptions] = StepOptions(),  # noqa: B008 - frozen
    scaling: OmitArgPrefixes[Scaling] = Scaling(),  # noqa: B008
    config: OmitArgPrefixes[TrainConfig] = TrainConfig(lr=1e-4),  # noqa: B008
    console: Suppress[Fixed[Console | None]] = None,
) -> Path:
    """Teach a trained denoiser to draw in a few steps, without guidance. Run the same command again to resume.

    Draw from it with its own number of steps: `snapgen generate ... --steps 4 --guidance 1`.

    Args:
        out: The run's folder: checkpoints, sample grids, TensorBoard, and at the end export/.
        student: The checkpoint to begin from.
        teacher: The teacher; its guidance is folded into the student.
        preset: Which model is the student.
        data: "shapes", a folder of pictures and captions, or WebDataset shards (.tar).
        autoencoder: Whose latents: a shipped checkpoint's name, or the export/ folder of `snapgen train-autoencoder`.
        layers: The teacher's layers after which heads judge; by default the ends of four equal parts of its
            transformer layers.
        options: Steps and the adversarial game.
        scaling: How the teacher's loss is weighed against the task's own.
        config: How to train.

    Returns:
        The exported pipeline's folder.
    """

    def objective(taught: Teacher, denoiser: Any, record: dict[str, Any]) -> Objective:
        return AdversarialDistillation(taught, denoiser, options=options, layers=layers, scaling=scaling, record=record)

    # Nobody draws from such a student with guidance, so it need not know the empty caption.
    words = (preset, data, autoencoder, student, teacher)
    return _run(*words, objective, config, out, console, caption_dropout=0.0, steps=options.student_steps, guidance=1.0)


def _run(
    preset: str,
    data: str,
    autoencoder: str,
    student: str | None,
    teacher: TeacherOptions,
    objective: Callable[[Teacher, Any, dict[str, Any]], Objective],
    config: TrainConfig,
    out: Path,
    console: Console | None,
    *,
    caption_dropout: float = 0.1,
    steps: int = 28,
    guidance: float = 4.0,
) -> Path:
    """A run of a preset's denoiser by an objective, which is made of the teacher and the denoiser."""
    spec = get_preset(preset)
    if spec.encoder is None:
        raise ValueError(
            f"preset: {preset} is trained on the latents and embeddings of frozen public models, which this command "
            f"does not load; it trains 'tiny'"
        )
    encoder, decoder = (place(module) for module in load_autoencoder(spec, autoencoder))
    dataset = open_dataset(data, spec.resolution, seed=config.seed)
    torch.manual_seed(config.seed)
    denoiser, text_encoder, tokenizer, record = starting_point(spec, student, vocabulary(dataset))
    denoiser, text_encoder = place(denoiser), place(text_encoder)
    task = DenoiserTask(
        spec,
        denoiser=denoiser,
        text=JointText(tokenizer, text_encoder, caption_dropout=caption_dropout),
        encoder=encoder,
        decoder=decoder,
        objective=objective(teacher.load(), denoiser, record),
        prompts=[caption for skill in ("colors", "position", "color_attr") for caption in eval_captions(skill, 4)],
        steps=steps,
        guidance=guidance,
    )
    exported = train(task, dataset, config, out, console=console)
    if console is not None and hasattr(dataset, "report"):
        console.print(dataset.report())
    return exported


def starting_point(spec: Preset, student: str | None, words: Sequence[str]) -> tuple[Any, Any, Any, dict[str, Any]]:
    """Denoiser, text encoder and tokenizer of a checkpoint, or of a preset with fresh weights; and what a run records.

    Raises:
        io.CheckpointError: the checkpoint is damaged, or of another preset.
        ValueError: it has no text encoder that is trained along.
    """
    if student is None:
        return *build_denoiser(spec, words), {"student": None}
    from snapgen.pipeline import load

    pipe = load(student)
    if not pipe.config.joint_text:
        raise ValueError(f"student: {student} has no text encoder that is trained with the denoiser")
    own = make_denoiser(spec.denoiser)
    io.load_strictly(own, pipe.denoiser.state_dict(), student, f"the denoiser of preset {spec.name}")
    folder = SHIPPED / student if (SHIPPED / student).is_dir() else Path(student)
    return own, pipe.text_encoder, pipe.tokenizer, {"student": fingerprint(folder)}
