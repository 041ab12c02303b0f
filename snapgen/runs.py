"""Training runs from the command line's words: preset, data and autoencoder by name, then the loop."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from snapgen import flow, io, parallel
from snapgen.conditioning import CachedText, Conditioning, FrozenText, JointText, Layout
from snapgen.config import PRESETS, SHIPPED, Preset, get_preset
from snapgen.data import embed
from snapgen.data.buckets import Buckets
from snapgen.data.cached import CachedDataset
from snapgen.data.digits import DigitsDataset
from snapgen.data.loader import open_dataset
from snapgen.data.shapes import VOCABULARY, ShapesDataset, eval_captions
from snapgen.decoder import TinyDecoder
from snapgen.mmdit import make_denoiser
from snapgen.settings import Source, TrainConfig
from snapgen.tasks import AutoencoderTask, DenoiserTask, Objective, build_autoencoder, build_denoiser
from snapgen.train import train


def train_denoiser(source: Source, config: TrainConfig, out: Path, console: Console) -> Path:
    """Train a denoiser by flow matching; returns the folder of what was exported.

    Raises:
        ValueError: an argument names nothing, or does not fit the preset.
        io.CheckpointError: weights are damaged or another model's.
    """
    task, dataset = denoiser_task(source, config.seed)
    exported = train(task, dataset, config, out, console=console)
    _report(dataset, console)
    return exported


def denoiser_task(
    source: Source,
    seed: int,
    objective: Callable[[nn.Module], Objective] | None = None,
    *,
    steps: int = 28,
    guidance: float = 4.0,
) -> tuple[DenoiserTask, Any]:
    """The task that `source` describes, with fresh weights or those of `init`, and its dataset.

    Args:
        objective: makes the loss, of the denoiser; flow matching unless given.
        steps, guidance: how sample grids are drawn, and what is exported unless it is told otherwise.
    """
    spec = get_preset(source.preset)
    resolution = source.resolution or spec.resolution
    unit = upscale(spec) * (spec.denoiser.get("patch_size") or 1 << (len(spec.denoiser["channels"]) - 1))
    if resolution < unit or resolution % unit:
        raise ValueError(f"resolution: got {resolution}; must be a multiple of {unit} for preset {spec.name}")
    dataset = _dataset(source, resolution, unit, seed)
    cached = isinstance(dataset, CachedDataset)
    torch.manual_seed(seed)
    own = spec.encoder is not None
    denoiser: nn.Module
    encoder: nn.Module | None
    decoder: nn.Module | None
    if own:
        words = vocabulary(dataset) if source.init is None else stored_words(source.init)
        denoiser, text_encoder, tokenizer = build_denoiser(spec, words)
        text: Conditioning = JointText(tokenizer, place(text_encoder), caption_dropout=source.caption_dropout)
        encoder, decoder = load_autoencoder(spec, source.autoencoder or shipped_autoencoder(spec))
    else:
        denoiser = make_denoiser(spec.denoiser)
        text = _frozen_text(source, spec, dataset)
        encoder = None if cached else _public_encoder(source, spec)
        decoder = None if source.decoder is None else load_decoder(spec, source.decoder)
    denoiser = place(denoiser)
    if source.init is not None:
        for name, module in {"denoiser": denoiser, **text.modules}.items():
            load_part(module, home(source.init) / name)
    task = DenoiserTask(
        spec,
        denoiser=denoiser,
        text=text,
        encoder=encoder and place(encoder),
        decoder=decoder and place(decoder),
        objective=objective and objective(denoiser),
        prompts=prompts(dataset) if own else tuple(islice(dataset.captions(), 8)),
        shift=flow.resolution_shift(spec.shift, resolution**2, spec.resolution**2),
        steps=steps,
        guidance=guidance,
        data={
            "data": source.data,
            "resolution": resolution,
            "buckets": source.buckets,
            "autoencoder": encoder and embed.fingerprint([encoder]),
            "init": None if source.init is None else embed.fingerprint([denoiser]),
        },
        side=resolution // upscale(spec),
    )
    return task, dataset


def home(checkpoint: str | Path) -> Path:
    """The folder of a checkpoint: itself, or that of a shipped one's name."""
    return SHIPPED / checkpoint if (SHIPPED / checkpoint).is_dir() else Path(checkpoint)


def stored_words(checkpoint: str | Path) -> list[str]:
    """The words of a checkpoint's tiny tokenizer, in their order.

    Raises:
        io.CheckpointError: it has no such tokenizer.
    """
    path = home(checkpoint) / "tokenizer" / "tokenizer.json"
    found = io.read_json(path).get("model", {}).get("vocab")
    if not isinstance(found, dict):
        raise io.CheckpointError(f"{path}: holds no vocabulary of words")
    return [word for word in sorted(found, key=found.__getitem__) if not word.startswith("<")]


def upscale(preset: Preset) -> int:
    """Pixels on a side of a latent cell."""
    return 1 << (len(preset.decoder["channels"]) - 1)


def load_part(module: nn.Module, folder: Path) -> None:
    """Read a module's weights from a folder that diffusers or transformers saved.

    Raises:
        io.CheckpointError: there are none, or they are another model's.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise io.CheckpointError(f"{folder}: holds no safetensors")
    tensors = {name: value for file in files for name, value in io.load_tensors(file).items()}
    io.load_strictly(module, tensors, folder, f"a {type(module).__name__} as it is trained here")


def load_decoder(preset: Preset, folder: Path) -> nn.Module:
    """A trained decoder of a preset, from its folder or a pipeline's."""
    home = folder / "decoder" if (folder / "decoder").is_dir() else folder
    decoder = TinyDecoder(**preset.decoder)
    load_part(decoder, home)
    return decoder


def _dataset(source: Source, resolution: int, unit: int, seed: int) -> Any:
    bucketing = Buckets(resolution=resolution, unit=unit) if source.buckets else None
    return open_dataset(source.data, resolution, seed=seed, bucketing=bucketing)


def _frozen_text(source: Source, spec: Preset, dataset: Any) -> Conditioning:
    dropout = dict(caption_dropout=source.caption_dropout, encoder_dropout=source.encoder_dropout)
    if isinstance(dataset, CachedDataset) and dataset.empty is not None:
        width = dataset.empty.context.shape[-1]
        if width != spec.denoiser["context_dim"]:
            raise ValueError(
                f"data: the cache's captions are {width} wide; preset {spec.name} takes {spec.denoiser['context_dim']}"
            )
        record = dataset.index["text"]
        layout = Layout(tuple((a, b) for a, b in record["clips"]), "tokens" in record["parts"])
        return CachedText(dataset.empty, layout=layout, **dropout)
    if source.clip_l is None and source.clip_g is None and source.gemma is None:
        raise ValueError(
            f"preset: {spec.name} reads frozen text encoders; name --clip-l, --clip-g and --gemma (any of them), or a "
            f"cache of their outputs as --data"
        )
    encoders = embed.load_text(
        clip_l=source.clip_l,
        clip_g=source.clip_g,
        gemma=source.gemma,
        context_dim=spec.denoiser["context_dim"],
        device=parallel.own_device(),
    )
    return FrozenText(encoders, **dropout)


def _public_encoder(source: Source, spec: Preset) -> Any:
    if source.autoencoder is None:
        raise ValueError(
            f"preset: {spec.name} draws in the latents of a public autoencoder; name its folder as --autoencoder, or a "
            f"cache of latents as --data"
        )
    encoder = embed.load_encoder(source.autoencoder)
    wanted = (spec.decoder.get("scaling_factor", 1.0), spec.decoder.get("shift_factor", 0.0))
    if (encoder.scale, encoder.shift) != wanted:
        raise ValueError(
            f"autoencoder: its scale and shift are {encoder.scale}, {encoder.shift}; preset {spec.name} has "
            f"{wanted[0]}, {wanted[1]}"
        )
    return encoder.module


def train_autoencoder(preset: str, data: str, config: TrainConfig, out: Path, console: Console) -> Path:
    """Train a preset's encoder and decoder; returns the folder that holds both."""
    spec = get_preset(preset)
    dataset = open_dataset(data, spec.resolution, seed=config.seed)
    torch.manual_seed(config.seed)
    encoder, decoder = build_autoencoder(spec)
    pictures, _ = _shown(dataset, spec.resolution).batch(range(8))
    pictures = pictures.to(parallel.own_device())
    own = {"data": data}
    task = AutoencoderTask(spec, encoder=place(encoder), decoder=place(decoder), pictures=pictures, data=own)
    exported = train(task, dataset, config, out, console=console)
    _report(dataset, console)
    return exported


def shipped_autoencoder(preset: Preset) -> str:
    """The shipped checkpoint whose latents a preset draws in.

    Raises:
        ValueError: there is none.
    """
    for folder in sorted(SHIPPED.iterdir()):
        own = PRESETS.get(folder.name)
        if own is not None and (own.encoder, own.decoder) == (preset.encoder, preset.decoder):
            return folder.name
    raise ValueError(
        f"autoencoder: preset {preset.name} has none that is shipped; train one (snapgen train-autoencoder --preset "
        f"{preset.name}) and name its export/ folder"
    )


def load_autoencoder(preset: Preset, source: str) -> tuple[nn.Module, nn.Module]:
    """Encoder and decoder of `preset` from a shipped checkpoint's name or a folder with encoder/ and decoder/.

    Raises:
        io.CheckpointError: there is none, or it belongs to another preset.
    """
    folder = home(source)
    encoder, decoder = build_autoencoder(preset)
    for name, module in (("encoder", encoder), ("decoder", decoder)):
        path = folder / name / "diffusion_pytorch_model.safetensors"
        io.load_strictly(module, io.load_tensors(path), path, f"the {name} of preset {preset.name}")
    return encoder, decoder


def vocabulary(dataset: Any) -> list[str]:
    """The words for the tiny text encoder: the shapes world's, or those of the dataset's own captions."""
    if isinstance(dataset, ShapesDataset):
        return list(VOCABULARY)
    # The tiny tokenizer splits words and punctuation the same way.
    return sorted({word for caption in dataset.captions() for word in re.findall(r"\w+|[^\w\s]+", caption.lower())})


def prompts(dataset: Any) -> list[str]:
    """For sample grids: the dataset's own, where it has some; else unseen captions of the shapes world."""
    if hasattr(dataset, "prompts"):
        return list(dataset.prompts)
    return [caption for skill in ("colors", "position", "color_attr") for caption in eval_captions(skill, 4)]


def _shown(dataset: Any, resolution: int) -> Any:
    """The pictures that an autoencoder's progress is shown on: digits if it learns them, else unseen shapes."""
    if isinstance(dataset, DigitsDataset):
        return DigitsDataset(resolution, split="test")
    return ShapesDataset(resolution, split="test")


def place(module: nn.Module) -> nn.Module:
    """The module on this process's device, with images in channels_last."""
    device = parallel.own_device()
    return module.to(device=device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _report(dataset: Any, console: Console) -> None:
    """Say what the dataset skipped, if it counts that."""
    if hasattr(dataset, "report"):
        console.print(dataset.report())
