"""SnapFusion and decoder training from the command line's words: each function is a command for tyro."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from rich.console import Console
from tyro.conf import OmitArgPrefixes, Positional, arg

from snapgen.distill.fusion_settings import DecoderConfig, EvolveConfig
from snapgen.train import TrainConfig

console = Console()
Out = Annotated[Path, arg(aliases=["-o"])]
Train = OmitArgPrefixes[TrainConfig]


def train_fusion(
    *,
    out: Out,
    preset: str | None = None,
    init: str | None = None,
    data: str = "shapes",
    autoencoder: str = "tiny",
    keep_blocks: float = 1.0,
    config: Train = TrainConfig(),  # noqa: B008 - frozen
) -> None:
    """Train SnapFusion's denoiser to predict velocities (v-prediction). Run the same command again to resume.

    Args:
        out: The run's folder: checkpoints, sample grids, TensorBoard, and at the end export/ for `snapgen generate`.
        preset: Which denoiser (tiny-fusion by default; with init, that one's own unless given).
        init: Begin with the weights of this pipeline's folder, as far as the preset has its blocks.
        data: "shapes", a folder of pictures and captions, or WebDataset shards (.tar).
        autoencoder: Without init: whose latents, by a shipped checkpoint's name or a folder.
        keep_blocks: Probability that a block is executed (robust training); 1 leaves none out.
        config: How to train.
    """
    from snapgen.distill import fusion_runs

    fusion_runs.train_fusion(
        out=out,
        preset=preset,
        init=init,
        data=data,
        autoencoder=autoencoder,
        keep_blocks=keep_blocks,
        config=config,
        console=console,
    )


def distill_fusion(
    *,
    out: Out,
    teacher: str,
    init: str | None = None,
    student_steps: int = 8,
    cfg_probability: float = 0.1,
    guidance: tuple[float, float] = (2.0, 14.0),
    gamma: float = 0.2,
    data: str = "shapes",
    config: Train = TrainConfig(),  # noqa: B008
) -> None:
    """Teach a denoiser to do in N steps what its teacher does in 2N. Run the same command again to resume.

    Args:
        out: The run's folder.
        teacher: A pipeline's folder (export/ of `snapgen fusion train` or of an earlier distillation).
        init: The student before distillation, a pipeline's folder; the teacher itself by default.
        student_steps: N, the steps that the student will take.
        cfg_probability: Share of steps that take the guided (CFG-aware) loss.
        guidance: Bounds of its guidance scale.
        gamma: Weight of the original loss beside the distillation's.
        data: "shapes", a folder of pictures and captions, or WebDataset shards (.tar).
        config: How to train.
    """
    from snapgen.distill import fusion_runs

    fusion_runs.distill_fusion(
        out=out,
        teacher=teacher,
        init=init,
        student_steps=student_steps,
        cfg_probability=cfg_probability,
        guidance=guidance,
        gamma=gamma,
        data=data,
        config=config,
        console=console,
    )


def evolve(
    checkpoint: Positional[str],
    *,
    out: Out,
    plan: OmitArgPrefixes[EvolveConfig],
    table: Path | None = None,
    repeats: int = 30,
    keep_blocks: float = 0.9,
    data: str = "shapes",
    draw_steps: int = 8,
    guidance: float = 4.0,
    per_skill: int = 25,
    config: Train = TrainConfig(steps=500, save_every=250),  # noqa: B008
) -> None:
    """Evolve a denoiser's blocks by quality for each millisecond, with robust training between rounds.

    Quality is the score of the shapes world. Run the same command again to resume.

    Args:
        checkpoint: A pipeline's folder (export/ of `snapgen fusion train`).
        out: The evolution's folder: rounds, latency.json, report.json, and at the end export/.
        plan: How to evolve.
        table: Latencies by kind of block, as JSON; measured on this machine where not given.
        repeats: Calls of each block when latencies are measured.
        keep_blocks: Probability that a block is executed in robust training.
        data: "shapes", a folder of pictures and captions, or WebDataset shards (.tar).
        draw_steps: Steps of the pictures that are scored.
        guidance: Their guidance scale.
        per_skill: Captions for each of the six skills.
        config: How to train in each round.
    """
    from snapgen.distill import fusion_runs

    fusion_runs.evolve(
        checkpoint=checkpoint,
        out=out,
        plan=plan,
        table=table,
        repeats=repeats,
        keep_blocks=keep_blocks,
        data=data,
        draw_steps=draw_steps,
        guidance=guidance,
        per_skill=per_skill,
        config=config,
        console=console,
    )


def train_decoder(
    *,
    out: Out,
    preset: str = "tiny",
    encoder: str = "tiny",
    decoder: Path | None = None,
    data: str = "shapes",
    held_out: str | None = None,
    pictures: int = 64,
    loss: OmitArgPrefixes[DecoderConfig] = DecoderConfig(),  # noqa: B008
    config: Train = TrainConfig(),  # noqa: B008
) -> None:
    """Train a decoder for a frozen encoder's latents. Run the same command again to resume.

    Args:
        out: The run's folder; at the end export/ has decoder/, encoder/ and report.json with PSNR and SSIM.
        preset: Whose decoder, and at what size of pictures.
        encoder: A shipped checkpoint's name, a pipeline's or an encoder's folder, or one of diffusers' AutoencoderKL.
        decoder: Begin with this decoder's weights (and arrangement) instead of fresh ones.
        data: "shapes", a folder of pictures and captions, or WebDataset shards (.tar).
        held_out: Pictures for the report, likewise; needed unless data is "shapes".
        pictures: How many of these.
        loss: What the pictures are compared by.
        config: How to train.
    """
    from snapgen.distill import fusion_runs

    fusion_runs.train_decoder(
        out=out,
        preset=preset,
        encoder=encoder,
        decoder=decoder,
        data=data,
        held_out=held_out,
        pictures=pictures,
        loss=loss,
        config=config,
        console=console,
    )


def distill_decoder(
    *,
    out: Out,
    teacher: str,
    decoder: Path,
    prompts: str = "shapes",
    held_out: str | None = None,
    draw_steps: int = 50,
    guidance: float = 7.5,
    config: Train = TrainConfig(),  # noqa: B008
) -> None:
    """Teach a decoder another's pictures, of latents drawn from prompts: no pictures are needed. Resumes likewise.

    Args:
        out: The run's folder; at the end export/ has decoder/ and report.json with PSNR and SSIM to the teacher's.
        teacher: A pipeline's folder, or a shipped one's name: it draws the latents, and its decoder is imitated.
        decoder: The student (a folder of `snapgen decoder prune`).
        prompts: "shapes", or a text file with a prompt on each line.
        held_out: Prompts for the report, a text file; needed unless prompts is "shapes".
        draw_steps: Steps of a latent.
        guidance: Its guidance scale.
        config: How to train.
    """
    from snapgen.distill import fusion_runs

    fusion_runs.distill_decoder(
        out=out,
        teacher=teacher,
        decoder=decoder,
        prompts=prompts,
        held_out=held_out,
        draw_steps=draw_steps,
        guidance=guidance,
        config=config,
        console=console,
    )


def prune_decoder(source: Positional[Path], *, out: Out, share: float = 0.5) -> None:
    """Keep the most important half of a decoder's channels (SnapFusion); train it after that.

    Args:
        source: A decoder's or a pipeline's folder, or one of diffusers' AutoencoderKL.
        out: Folder for the pruned decoder.
        share: Of the channels that stay.
    """
    from snapgen.distill import fusion_runs

    fusion_runs.prune_decoder(source=source, out=out, share=share, console=console)


def import_sd(source: Positional[Path], *, out: Out, preset: str | None = None) -> None:
    """Stable Diffusion 1.5 from a folder of diffusers as a pipeline of ours, for `snapgen fusion train --init`.

    Args:
        source: The folder that has unet/, vae/, text_encoder/ and tokenizer/.
        out: Folder for the pipeline.
        preset: Put the weights into this arrangement of blocks ("snapfusion") instead of its own.
    """
    from snapgen.distill import fusion_runs

    fusion_runs.import_sd(source=source, out=out, preset=preset, console=console)
