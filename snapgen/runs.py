"""Training runs from the command line's words: preset, data and autoencoder by name, then the loop."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from snapgen import io
from snapgen.conditioning import JointText
from snapgen.config import SHIPPED, Preset, get_preset
from snapgen.data.digits import DigitsDataset
from snapgen.data.loader import open_dataset
from snapgen.data.shapes import VOCABULARY, ShapesDataset, eval_captions
from snapgen.tasks import AutoencoderTask, DenoiserTask, build_autoencoder, build_denoiser
from snapgen.train import TrainConfig, train


def train_denoiser(preset: str, data: str, autoencoder: str, config: TrainConfig, out: Path, console: Console) -> Path:
    """Train a preset's denoiser and text encoder; returns the exported pipeline's folder.

    Raises:
        ValueError: the preset has no text encoder of its own to train, or an argument names nothing.
    """
    spec = get_preset(preset)
    if spec.encoder is None:
        raise ValueError(
            f"preset: {preset} is trained on the latents and embeddings of frozen public models, which this command "
            f"does not load; it trains 'tiny'"
        )
    encoder, decoder = load_autoencoder(spec, autoencoder)
    dataset = open_dataset(data, spec.resolution, seed=config.seed)
    torch.manual_seed(config.seed)
    denoiser, text_encoder, tokenizer = build_denoiser(spec, vocabulary(dataset))
    task = DenoiserTask(
        spec,
        denoiser=_place(denoiser),
        text=JointText(tokenizer, _place(text_encoder)),
        encoder=_place(encoder),
        decoder=_place(decoder),
        prompts=prompts(dataset),
    )
    exported = train(task, dataset, config, out, console=console)
    _report(dataset, console)
    return exported


def train_autoencoder(preset: str, data: str, config: TrainConfig, out: Path, console: Console) -> Path:
    """Train a preset's encoder and decoder; returns the folder that holds both."""
    spec = get_preset(preset)
    dataset = open_dataset(data, spec.resolution, seed=config.seed)
    torch.manual_seed(config.seed)
    encoder, decoder = build_autoencoder(spec)
    pictures, _ = _shown(dataset, spec.resolution).batch(range(8))
    task = AutoencoderTask(spec, encoder=_place(encoder), decoder=_place(decoder), pictures=pictures.to(_device()))
    exported = train(task, dataset, config, out, console=console)
    _report(dataset, console)
    return exported


def load_autoencoder(preset: Preset, source: str) -> tuple[nn.Module, nn.Module]:
    """Encoder and decoder of `preset` from a shipped checkpoint's name or a folder with encoder/ and decoder/.

    Raises:
        io.CheckpointError: there is none, or it belongs to another preset.
    """
    folder = SHIPPED / source if (SHIPPED / source).is_dir() else Path(source)
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


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _place(module: nn.Module) -> nn.Module:
    return module.to(device=_device()).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _report(dataset: Any, console: Console) -> None:
    """Say what the dataset skipped, if it counts that."""
    if hasattr(dataset, "report"):
        console.print(dataset.report())
