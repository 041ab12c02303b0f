"""What the commands in `snapgen.distill.fusion_command` run."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from snapgen import io
from snapgen.conditioning import JointText, PipelineText
from snapgen.config import SHIPPED, Preset, get_preset
from snapgen.data.embed import fingerprint
from snapgen.data.loader import open_dataset
from snapgen.data.shapes import ShapesDataset, eval_captions
from snapgen.distill import evolve as evolution
from snapgen.distill.decoder import DecoderDistillation, DecoderTask, Prompts
from snapgen.distill.fusion_settings import DecoderConfig, EvolveConfig
from snapgen.distill.latency import LatencyTable, measure
from snapgen.distill.prune import prune_decoder as pruned
from snapgen.distill.snapfusion import BlockSkipping, FusionTask, StepDistillation, VPrediction
from snapgen.evaluate import score_shapes
from snapgen.fusion_load import import_stable_diffusion, load_decoder, load_encoder
from snapgen.fusion_presets import build_fusion, get_fusion_preset
from snapgen.fusion_unet import FusionUNet
from snapgen.fusion_weights import inherit
from snapgen.info import si
from snapgen.parallel import own_device
from snapgen.pipeline import SnapGenPipeline, load
from snapgen.runs import load_autoencoder, place, vocabulary
from snapgen.text import build_tiny_text
from snapgen.train import TrainConfig, train


def train_fusion(
    *,
    out: Path,
    preset: str | None,
    init: str | None,
    data: str,
    autoencoder: str,
    keep_blocks: float,
    config: TrainConfig,
    console: Console,
) -> None:
    """See `fusion_command.train_fusion`."""
    torch.manual_seed(config.seed)
    objective = VPrediction() if keep_blocks == 1 else BlockSkipping(VPrediction(), keep=keep_blocks)
    if init is None:
        task, dataset = _fresh(get_fusion_preset(preset or "tiny-fusion"), data, autoencoder, objective, config)
    else:
        pipe = _fusion_pipeline("init", init)
        net = pipe.denoiser
        if preset is not None:
            net = build_fusion(get_fusion_preset(preset))
            left = inherit(net, pipe.denoiser)
            console.print(f"{len(net.places) - len(left)} of {len(net.places)} blocks have the weights of {init}")
        dataset = open_dataset(data, _resolution(pipe), seed=config.seed)
        text = JointText(pipe.tokenizer, pipe.text_encoder) if pipe.config.joint_text else PipelineText(pipe)
        task = _task(pipe, net, text, objective, data)
    exported = train(task, dataset, config, out, console=console)
    console.print(f"trained; wrote {exported}")


def distill_fusion(
    *,
    out: Path,
    teacher: str,
    init: str | None,
    student_steps: int,
    cfg_probability: float,
    guidance: tuple[float, float],
    gamma: float,
    data: str,
    config: TrainConfig,
    console: Console,
) -> None:
    """See `fusion_command.distill_fusion`."""
    torch.manual_seed(config.seed)
    pipe = _fusion_pipeline("teacher", teacher)
    if init is None:
        net = copy.deepcopy(pipe.denoiser)
    else:
        student = _fusion_pipeline("init", init)
        _check_same_text(student, pipe, init, teacher)
        net = student.denoiser
    objective = StepDistillation(
        pipe.denoiser,
        steps=student_steps,
        cfg_probability=cfg_probability,
        guidance=guidance,
        gamma=gamma,
        source=str(teacher),
    )
    dataset = open_dataset(data, _resolution(pipe), seed=config.seed)
    task = _task(pipe, net, PipelineText(pipe), objective, data, steps=student_steps)
    exported = train(task, dataset, config, out, console=console)
    console.print(f"distilled; draw with: snapgen generate ... --checkpoint {exported}")


def evolve(
    *,
    checkpoint: str,
    out: Path,
    plan: EvolveConfig,
    table: Path | None,
    repeats: int,
    keep_blocks: float,
    data: str,
    draw_steps: int,
    guidance: float,
    per_skill: int,
    config: TrainConfig,
    console: Console,
) -> None:
    """See `fusion_command.evolve`."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("evolve: runs in one process; start it without torchrun")
    torch.manual_seed(config.seed)
    pipe = _fusion_pipeline("checkpoint", checkpoint)
    dataset = open_dataset(data, _resolution(pipe), seed=config.seed)
    times = _latencies(pipe.denoiser, table, out / "latency.json", repeats, console)

    def training(net: FusionUNet, folder: Path) -> FusionUNet:
        objective = BlockSkipping(VPrediction(), keep=keep_blocks)
        task = _task(pipe, place(net), PipelineText(pipe), objective, data, steps=draw_steps)
        exported = train(task, dataset, config, folder, console=console)
        return place(load(exported).denoiser)  # type: ignore[return-value]

    def quality(net: FusionUNet) -> float:
        scores = score_shapes(
            pipe.having(denoiser=net), steps=draw_steps, guidance=guidance, per_skill=per_skill, seed=config.seed
        )
        return scores["overall"]

    record = dict(
        checkpoint=str(checkpoint), keep_blocks=keep_blocks, scored=[draw_steps, guidance, per_skill], data=data
    )
    net = evolution.evolve(
        place(pipe.denoiser),  # type: ignore[arg-type]
        quality=quality,
        training=training,
        table=times,
        config=plan,
        out=out,
        record=record,
        console=console,
    )
    with io.whole_directory(out / "export") as folder:
        pipe.having(denoiser=net).save_pretrained(folder)
    final = io.read_json(out / "report.json")["final"]
    console.print(
        f"evolved to {final['latency']:.2f} ms ({'within' if final['met'] else 'above'} {plan.latency:g} ms), quality "
        f"{final['quality']:.3f}; every round stands in {out / 'report.json'}"
    )


def train_decoder(
    *,
    out: Path,
    preset: str,
    encoder: str,
    decoder: Path | None,
    data: str,
    held_out: str | None,
    pictures: int,
    loss: DecoderConfig,
    config: TrainConfig,
    console: Console,
) -> None:
    """See `fusion_command.train_decoder`."""
    _check_parallel(config)
    spec = get_preset(preset)
    torch.manual_seed(config.seed)
    dataset = open_dataset(data, spec.resolution, seed=config.seed)
    frozen = load_encoder(SHIPPED / encoder if (SHIPPED / encoder).is_dir() else encoder)
    net = _decoder(spec, decoder)
    if net.config.latent_channels != frozen.config.latent_channels:
        raise ValueError(
            f"encoder: {encoder} makes {frozen.config.latent_channels} latent channels; "
            f"the decoder takes {net.config.latent_channels}"
        )
    task = DecoderTask(
        spec,
        encoder=place(frozen),
        decoder=place(net),
        pictures=_held_out(data, held_out, spec.resolution, pictures).to(own_device()),
        config=loss,
        data={"data": data, "encoder": fingerprint([frozen])},
    )
    exported = train(task, dataset, config, out, console=console)
    found = io.read_json(exported / "report.json")["held out"]
    console.print(f"trained; on {found['pictures']} pictures PSNR {found['psnr']:.2f} dB, SSIM {found['ssim']:.3f}")


def distill_decoder(
    *,
    out: Path,
    teacher: str,
    decoder: Path,
    prompts: str,
    held_out: str | None,
    draw_steps: int,
    guidance: float,
    config: TrainConfig,
    console: Console,
) -> None:
    """See `fusion_command.distill_decoder`."""
    _check_parallel(config)
    torch.manual_seed(config.seed)
    pipe = load(teacher)
    _place_all(pipe)
    if prompts == "shapes" and held_out is None:
        reported: Sequence[str] = [
            c for skill in ("colors", "position", "color_attr") for c in eval_captions(skill, 16)
        ]
    elif held_out is None:
        raise ValueError("held_out: got none; prompts of your own need others to report on")
    else:
        reported = Prompts.of(held_out).lines
    task = DecoderDistillation(
        _named(pipe),
        teacher=pipe,
        decoder=place(load_decoder(decoder)),
        prompts=reported,
        steps=draw_steps,
        guidance=guidance,
        source=str(teacher),
        data={"data": prompts},
    )
    exported = train(task, Prompts.of(prompts), config, out, console=console)
    found = io.read_json(exported / "report.json")["against the teacher"]
    console.print(f"distilled; to the teacher's pictures PSNR {found['psnr']:.2f} dB, SSIM {found['ssim']:.3f}")


def prune_decoder(*, source: Path, out: Path, share: float, console: Console) -> None:
    """See `fusion_command.prune_decoder`."""
    whole = load_decoder(SHIPPED / source if (SHIPPED / source).is_dir() else source)
    small = pruned(whole, share=share)
    with io.whole_directory(out) as folder:
        small.save_pretrained(folder)
    before, after = (sum(p.numel() for p in net.parameters()) for net in (whole, small))
    console.print(f"{si(before)} parameters became {si(after)} ({before / after:.1f} times fewer); wrote {out}")


def import_sd(*, source: Path, out: Path, preset: str | None, console: Console) -> None:
    """See `fusion_command.import_sd`."""
    pipe, left = import_stable_diffusion(source, preset)
    with io.whole_directory(out) as folder:
        pipe.save_pretrained(folder)
    places = len(pipe.denoiser.places)
    console.print(f"wrote {out}: {places - len(left)} of {places} blocks have Stable Diffusion's weights")


# ---- what they share -------------------------------------------------------------------------------------------------


def _fresh(spec: Preset, data: str, autoencoder: str, objective: Any, config: TrainConfig) -> tuple[FusionTask, Any]:
    """A task with fresh weights, text encoder included, and its dataset."""
    if spec.encoder is None:
        raise ValueError(
            f"preset: {spec.name} is trained on Stable Diffusion's latents and text; give init, a folder of "
            f"`snapgen fusion import`"
        )
    encoder, decoder = load_autoencoder(spec, autoencoder)
    dataset = open_dataset(data, spec.resolution, seed=config.seed)
    tokenizer, text_encoder = build_tiny_text(vocabulary(dataset), **spec.text)
    task = FusionTask(
        spec,
        denoiser=place(build_fusion(spec)),
        text=JointText(tokenizer, place(text_encoder)),
        encoder=place(encoder),
        decoder=place(decoder),
        objective=objective,
        prompts=_prompts(),
        data={"data": data, "autoencoder": fingerprint([encoder])},
    )
    return task, dataset


def _task(
    pipe: SnapGenPipeline, net: nn.Module, text: JointText | PipelineText, objective: Any, data: str, steps: int = 28
) -> FusionTask:
    """A task in a pipeline's latents, on `data`."""
    return FusionTask(
        _named(pipe),
        denoiser=place(net),
        text=text,
        encoder=pipe.encoder,
        decoder=pipe.decoder,
        objective=objective,
        prompts=_prompts(),
        steps=steps,
        guidance=pipe.config.guidance,
        data={"data": data, "init": fingerprint([net])},
    )


def _fusion_pipeline(argument: str, source: str) -> SnapGenPipeline:
    """A pipeline with a denoiser of SnapFusion's kind, on this process's device."""
    pipe = load(source)
    if not isinstance(pipe.denoiser, FusionUNet):
        raise ValueError(
            f"{argument}: {source} has a {type(pipe.denoiser).__name__}; must be a pipeline of `snapgen fusion train`"
        )
    if pipe.encoder is None:
        raise ValueError(f"{argument}: {source} has no encoder, which training needs")
    _place_all(pipe)
    return pipe


def _place_all(pipe: SnapGenPipeline) -> None:
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            place(part)


def _check_same_text(student: SnapGenPipeline, teacher: SnapGenPipeline, ours: str, theirs: str) -> None:
    own, other = student.text_encoder.state_dict(), teacher.text_encoder.state_dict()
    if own.keys() != other.keys() or not all(torch.equal(own[name], other[name]) for name in own):
        # Another text encoder makes a much worse teacher (SnapFusion, section 5).
        raise ValueError(f"init: {ours} reads captions by another text encoder than {theirs}; they must share it")


def _named(pipe: SnapGenPipeline) -> Preset:
    """What a run in a pipeline's latents says of itself."""
    denoiser, decoder = (
        {name: value for name, value in part.config.items() if not name.startswith("_")}
        for part in (pipe.denoiser, pipe.decoder)
    )
    return Preset(name="pipeline", about="", resolution=_resolution(pipe), denoiser=denoiser, decoder=decoder)


def _resolution(pipe: SnapGenPipeline) -> int:
    return pipe.denoiser.config.sample_size * pipe.decoder.upscale


def _prompts() -> list[str]:
    return [caption for skill in ("colors", "position", "color_attr") for caption in eval_captions(skill, 4)]


def _latencies(net: FusionUNet, given: Path | None, kept: Path, repeats: int, console: Console) -> LatencyTable:
    """The table that was given, or that of an earlier call, or one measured now."""
    if given is not None:
        return LatencyTable.load(given)
    if not kept.is_file():
        measure(net, repeats=repeats).save(kept)
    found = LatencyTable.load(kept)
    console.print(f"{found.total(net):.2f} ms a forward pass on {found.device}")
    return found


def _check_parallel(config: TrainConfig) -> None:
    if config.parallel == "fsdp":
        raise ValueError("parallel: got fsdp; a decoder is small and draws with whole weights: must be ddp")


def _decoder(spec: Preset, source: Path | None) -> Any:
    from snapgen.decoder import TinyDecoder

    return TinyDecoder(**spec.decoder) if source is None else load_decoder(source)


def _held_out(data: str, source: str | None, resolution: int, count: int) -> torch.Tensor:
    if source is None and data != "shapes":
        raise ValueError("held_out: got none; data of your own need other pictures to report on")
    if source is None or source == "shapes":
        return ShapesDataset(resolution, split="test").batch(range(count))[0]
    dataset = open_dataset(source, resolution)
    return torch.stack([dataset[index]["image"] for index in range(min(count, len(dataset)))])
