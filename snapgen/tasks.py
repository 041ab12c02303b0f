"""What can be trained: a task owns its modules, turns a batch into a loss, and draws a sample grid.

The loop in `snapgen.train` knows nothing but this interface, so that a new objective is a new task.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from snapgen import flow
from snapgen.config import Preset
from snapgen.text import build_tiny_text, encode_tiny


class Task(Protocol):
    """An objective for the training loop.

    `modules` are trained, averaged and saved, under their names; whatever else a task holds is frozen.
    """

    name: str
    preset: Preset
    modules: dict[str, nn.Module]

    def loss(
        self, images: Tensor, captions: Sequence[str], generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean loss of a batch of pictures [B, 3, H, W] in [-1, 1], and further figures to report."""
        ...

    def sample_grid(self, path: Path, seed: int) -> None:
        """Draw what the modules can do now into a picture file."""
        ...

    def export(self, path: Path) -> None:
        """Save the modules as they are now in diffusers' format."""
        ...


class DenoiserTask:
    """Pre-training of a denoiser: velocity loss of the rectified flow on latents, with caption dropout for guidance.

    Args:
        encode: pictures to scaled latents, frozen.
        caption_dropout: share of captions replaced by the empty one (classifier-free guidance, Ho and Salimans 2022).
    """

    name = "denoiser"

    def __init__(
        self,
        preset: Preset,
        *,
        denoiser: nn.Module,
        text_encoder: nn.Module,
        tokenizer: Any,
        encoder: nn.Module,
        decoder: Any,
        caption_dropout: float = 0.1,
        prompts: Sequence[str] = (),
    ) -> None:
        self.preset = preset
        self.modules = {"denoiser": denoiser, "text_encoder": text_encoder}
        self.tokenizer = tokenizer
        self.encoder = encoder.requires_grad_(False).eval()
        self.decoder = decoder.requires_grad_(False).eval()
        self.caption_dropout = caption_dropout
        self.prompts = tuple(prompts)

    def loss(
        self, images: Tensor, captions: Sequence[str], generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            config = self.decoder.config
            x0 = (self.encoder(images).float() - config.shift_factor) * config.scaling_factor
        kept = torch.rand(len(captions), generator=generator) >= self.caption_dropout
        captions = [caption if keep else "" for caption, keep in zip(captions, kept.tolist(), strict=True)]
        text = encode_tiny(self.tokenizer, self.modules["text_encoder"], captions, images.device)
        noise = torch.randn(x0.shape, generator=generator).to(x0)
        t = flow.sample_t(len(captions), shift=self.preset.shift, generator=generator).to(x0.device)
        predicted = self.modules["denoiser"](
            flow.interpolate(x0, noise, t),
            t * flow.TIMESTEP_SCALE,
            text.context,
            text.mask,
            text.pooled,
            return_dict=False,
        )[0]
        return flow.velocity_loss(predicted, x0, noise).mean(), {}

    def pipeline(self) -> Any:
        """The modules as a pipeline, sharing their weights."""
        from snapgen.pipeline import SnapGenPipeline
        from snapgen.sampler import make_scheduler

        return SnapGenPipeline(
            denoiser=self.modules["denoiser"],
            decoder=self.decoder,
            encoder=self.encoder,
            scheduler=make_scheduler(self.preset.shift),
            text_encoder=self.modules["text_encoder"],
            tokenizer=self.tokenizer,
            joint_text=True,
        )

    def sample_grid(self, path: Path, seed: int) -> None:
        from snapgen.pictures import save_grid

        pipe = self.pipeline()
        pipe.set_progress_bar_config(disable=True)
        pictures = pipe(
            list(self.prompts), num_inference_steps=28, generator=torch.Generator().manual_seed(seed)
        ).images
        save_grid(pictures, path, captions=self.prompts)

    def export(self, path: Path) -> None:
        self.pipeline().save_pretrained(path)


class AutoencoderTask:
    """Encoder and decoder of a preset whose latents are our own.

    Reconstruction by L1 and L2, latents held near zero mean and unit spread per channel (so that they need no scaling
    factor), and noise on the latents so that the decoder forgives a denoiser's small errors.
    """

    name = "autoencoder"
    latent_noise = 0.1

    def __init__(self, preset: Preset, *, encoder: nn.Module, decoder: nn.Module, pictures: Tensor) -> None:
        self.preset = preset
        self.modules: dict[str, Any] = {"encoder": encoder, "decoder": decoder}
        self.pictures = pictures  # [B, 3, H, W], for the sample grid

    def loss(
        self, images: Tensor, captions: Sequence[str], generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        latents = self.modules["encoder"](images).float()
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        drawn = self.modules["decoder"](latents + self.latent_noise * noise).float()
        squared = (drawn - images).square().mean()
        absolute = (drawn - images).abs().mean()
        mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
        spread = (mean.square() + (std - 1).square()).mean()
        # Pictures span 2, so the peak is 2 and PSNR = 10 log10(4 / MSE).
        psnr = 10 * torch.log10(4 / squared.detach())
        return absolute + 2 * squared + 0.05 * spread, {"psnr": psnr}

    @torch.no_grad()
    def sample_grid(self, path: Path, seed: int) -> None:
        from snapgen.pictures import save_grid, to_pictures

        drawn = self.modules["decoder"](self.modules["encoder"](self.pictures))
        both = torch.cat((self.pictures, drawn.float()))
        save_grid(to_pictures(both), path, columns=len(self.pictures))

    def export(self, path: Path) -> None:
        for name, module in self.modules.items():
            module.save_pretrained(path / name)


def build_autoencoder(preset: Preset) -> tuple[nn.Module, nn.Module]:
    """Encoder and decoder of `preset` with fresh weights.

    Raises:
        ValueError: the preset draws in another autoencoder's latents.
    """
    from snapgen.decoder import TinyDecoder, TinyEncoder

    if preset.encoder is None:
        raise ValueError(f"preset: {preset.name} uses the latents of a frozen autoencoder; it has no encoder to train")
    return TinyEncoder(**preset.encoder), TinyDecoder(**preset.decoder)


def build_denoiser(preset: Preset, words: Sequence[str]) -> tuple[nn.Module, nn.Module, Any]:
    """Denoiser, text encoder and tokenizer of a preset that trains its own text encoder, with fresh weights."""
    from snapgen.unet import SnapGenUNet

    tokenizer, text_encoder = build_tiny_text(words, **preset.text)
    return SnapGenUNet(**preset.denoiser), text_encoder, tokenizer
