"""Training of a decoder: on pictures with a frozen encoder (SnapGen, section 3.2), or by another decoder on latents
drawn from prompts, without any picture (SnapFusion, section 3.2)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from snapgen import io
from snapgen.config import Preset
from snapgen.data.loader import Batch
from snapgen.data.shapes import MIXES, SKILLS, captions
from snapgen.distill.fusion_settings import DecoderConfig
from snapgen.distill.perceptual import PatchDiscriminator, VGG16Features, hinge_discriminator, hinge_generator
from snapgen.metrics.pictures import psnr, ssim
from snapgen.sampler import sample
from snapgen.seeds import Draws
from snapgen.tasks import Figures, Phase


class DecoderTask:
    """A decoder learns to draw what a frozen encoder read.

    Args:
        encoder: pictures [B, 3, H, W] in [-1, 1] to unscaled latents.
        decoder: trained; `upscale` pixels a latent cell.
        pictures: held out, [N, 3, H, W]: for the sample grid and the final report.
        data: what of the data decides the weights, for the run's record.
    """

    name = "decoder"

    def __init__(
        self,
        preset: Preset,
        *,
        encoder: nn.Module,
        decoder: Any,
        pictures: Tensor,
        config: DecoderConfig | None = None,
        data: Mapping[str, Any] | None = None,
    ) -> None:
        self.preset, self.pictures, self.data = preset, pictures, dict(data or {})
        self.config = config or DecoderConfig()
        for _, side in self.config.crops:
            # 11 pixels are SSIM's window.
            if side < 11 or side % decoder.upscale or side > min(pictures.shape[-2:]):
                raise ValueError(
                    f"crops: got a side of {side} pixels; must be a multiple of {decoder.upscale} from 11 to "
                    f"{min(pictures.shape[-2:])}"
                )
        self.encoder: Any = encoder.requires_grad_(False).eval()
        self.modules: dict[str, Any] = {"decoder": decoder}
        if self.config.adversarial:
            device = next(decoder.parameters()).device
            self.modules["discriminator"] = PatchDiscriminator(self.config.discriminator_width).to(device)
        self.call: dict[str, Any] = dict(self.modules)
        self.vgg: VGG16Features | None = None
        if self.config.perceptual:
            assert self.config.vgg is not None
            self.vgg = VGG16Features(self.config.vgg).to(next(decoder.parameters()).device)

    @property
    def averaged(self) -> Sequence[str]:
        return ("decoder",)

    def phases(self) -> Sequence[Phase]:
        drawing = Phase(name="decoder", modules=("decoder",), loss=self.loss)
        if not self.config.adversarial:
            return (drawing,)
        # Adam without momentum of the first kind, as hinge GANs are trained (Miyato et al., 2018).
        judging = Phase(name="discriminator", modules=("discriminator",), loss=self.judge, betas=(0.0, 0.9))
        return (drawing, judging)

    def record(self) -> dict[str, Any]:
        config = dataclasses.asdict(self.config)
        own = {"vgg": config["vgg"] and str(config["vgg"]), "decoder": _arguments(self.modules["decoder"])}
        return {**config, **own, **self.data}

    def cropped(self, batch: Batch, draws: Draws) -> Tensor:
        """The batch's pictures, or a crop of each at a place of its own, on the grid of the latents."""
        images = batch.images
        if images is None:
            raise ValueError("data: has no pictures to train a decoder on")
        side = self.config.crop(draws.step)
        if side is None or side >= min(images.shape[-2:]):
            return images
        unit = self.modules["decoder"].upscale
        cells = torch.tensor([(length - side) // unit + 1 for length in images.shape[-2:]])
        corners = (draws.uniform(2).cpu() * cells).long() * unit
        return torch.stack(
            [image[:, y : y + side, x : x + side] for image, (y, x) in zip(images, corners.tolist(), strict=True)]
        )

    def loss(self, batch: Batch, draws: Draws) -> tuple[Tensor, Figures]:
        """The decoder's loss, and PSNR and SSIM of the crops."""
        config = self.config
        real = self.cropped(batch, draws)
        drawn = self.call["decoder"](self._latents(real)).float()
        difference = (drawn - real).flatten(1)
        loss = config.l1 * difference.abs().mean(1) + config.l2 * difference.square().mean(1)
        figures: Figures = {}
        if self.vgg is not None:
            distance = self.vgg.distance(drawn, real)
            figures["perceptual"] = distance.mean().detach()
            loss = loss + config.perceptual * distance
        if config.adversarial and draws.step >= config.adversarial_from:
            adversarial = hinge_generator(self.call["discriminator"](drawn).float())
            figures["adversarial"] = adversarial.mean().detach()
            loss = loss + config.adversarial * adversarial
        return loss.mean(), {**figures, **_likeness(drawn, real)}

    def judge(self, batch: Batch, draws: Draws) -> tuple[Tensor, Figures]:
        """The discriminator's loss, on pictures that the decoder draws meanwhile."""
        real = self.cropped(batch, draws)
        with torch.no_grad():
            drawn = self.call["decoder"](self._latents(real)).float()
        judged = self.call["discriminator"](torch.cat((real, drawn))).float()
        return hinge_discriminator(*judged.chunk(2)).mean(), {}

    def sample_grid(self, path: Path, seed: int) -> None:
        with torch.no_grad():
            drawn = self.modules["decoder"](self._latents(self.pictures)).float()
        _save_pairs(self.pictures, drawn, path)

    def export(self, path: Path, modules: Mapping[str, nn.Module]) -> None:
        """Write decoder/, encoder/ where it can be saved, and report.json."""
        decoder = modules["decoder"]
        decoder.save_pretrained(path / "decoder")  # type: ignore[operator]
        if hasattr(self.encoder, "save_pretrained"):
            self.encoder.save_pretrained(path / "encoder")
        real = self.pictures.cpu()
        drawn = torch.cat([decoder(self._latents(part).cpu()).float() for part in self.pictures.split(16)])
        io.write_json(path / "report.json", {"held out": report(drawn, real)})

    @torch.no_grad()
    def _latents(self, pictures: Tensor) -> Tensor:
        return self.encoder(pictures).float()


class DecoderDistillation:
    """A decoder learns another's pictures of latents that a denoiser draws from prompts; there are no real pictures.

    L = || D(z) - D_teacher(z) ||^2 with z sampled by the teacher pipeline (SnapFusion, section 3.2: DDIM in 50 steps).
    Where the data carry latents, these are taken.

    Args:
        teacher: a `SnapGenPipeline`: its text encoder and denoiser draw, its decoder is imitated.
        decoder: trained.
        steps, guidance: with which latents are drawn. The paper gives 50 steps and no guidance for this; 7.5 is what it
            draws with elsewhere.
        prompts: held out: for the sample grid and the final report.
        source: what the teacher was loaded from, for the run's record.
        data: what of the data decides the weights, for the same.
    """

    name = "decoder distillation"

    def __init__(
        self,
        preset: Preset,
        *,
        teacher: Any,
        decoder: Any,
        prompts: Sequence[str],
        steps: int = 50,
        guidance: float = 7.5,
        source: str = "",
        data: Mapping[str, Any] | None = None,
    ) -> None:
        wanted, own = teacher.decoder, decoder
        if wanted.config.latent_channels != own.config.latent_channels or wanted.upscale != own.upscale:
            raise ValueError(
                f"decoder: takes {own.config.latent_channels} latent channels at 1/{own.upscale}; must be the "
                f"teacher's {wanted.config.latent_channels} at 1/{wanted.upscale}"
            )
        if not prompts:
            raise ValueError("prompts: there are none to report on")
        self.preset, self.teacher, self.prompts = preset, teacher, tuple(prompts)
        self.steps, self.guidance, self.source, self.data = steps, guidance, source, dict(data or {})
        for part in teacher.components.values():
            if isinstance(part, nn.Module):
                part.requires_grad_(False).eval()
        self.modules: dict[str, Any] = {"decoder": decoder}
        self.call: dict[str, Any] = dict(self.modules)

    @property
    def averaged(self) -> Sequence[str]:
        return ("decoder",)

    def phases(self) -> Sequence[Phase]:
        return (Phase(name="decoder", modules=("decoder",), loss=self.loss),)

    def record(self) -> dict[str, Any]:
        decoder = _arguments(self.modules["decoder"])
        return {"teacher": self.source, "sampling": [self.steps, self.guidance], "decoder": decoder, **self.data}

    def loss(self, batch: Batch, draws: Draws) -> tuple[Tensor, Figures]:
        """Mean squared error between both decoders' pictures, and their likeness."""
        if batch.latents is not None:
            latents = self._unscaled(batch.latents)
        else:
            config = self.teacher.denoiser.config
            noise = draws.normal(config.in_channels, config.sample_size, config.sample_size)
            latents = self.drawn(batch.captions, noise)
        with torch.no_grad():
            wanted = self.teacher.decoder(latents).float()
        drawn = self.call["decoder"](latents).float()
        return (drawn - wanted).square().mean(), _likeness(drawn, wanted)

    @torch.no_grad()
    def drawn(self, prompts: Sequence[str], noise: Tensor) -> Tensor:
        """Unscaled latents [B, C, h, w] of prompts and noise of that shape."""
        text = self.teacher.encode_prompt(list(prompts))
        negative = self.teacher.encode_prompt([""] * len(prompts)) if self.guidance != 1.0 else None
        latents = sample(
            self.teacher.denoiser,
            self.teacher.scheduler,
            noise,
            text,
            steps=self.steps,
            guidance_scale=self.guidance,
            negative=negative,
        )
        return self._unscaled(latents)

    def sample_grid(self, path: Path, seed: int) -> None:
        latents = self._held_out(seed)[:8]
        with torch.no_grad():
            wanted, drawn = self.teacher.decoder(latents).float(), self.modules["decoder"](latents).float()
        _save_pairs(wanted, drawn, path)

    def export(self, path: Path, modules: Mapping[str, nn.Module]) -> None:
        """Write decoder/ and report.json: likeness to the teacher's pictures of held-out prompts."""
        decoder = modules["decoder"]
        decoder.save_pretrained(path / "decoder")  # type: ignore[operator]
        latents = self._held_out(0)
        with torch.no_grad():
            wanted = torch.cat([self.teacher.decoder(part).float().cpu() for part in latents.split(16)])
            drawn = torch.cat([decoder(part.cpu()).float() for part in latents.split(16)])
        io.write_json(path / "report.json", {"against the teacher": report(drawn, wanted)})

    def _held_out(self, seed: int) -> Tensor:
        config = self.teacher.denoiser.config
        draws = Draws(seed, 0, range(len(self.prompts)), self.teacher.device, phase=1)  # other noise than training's
        return self.drawn(self.prompts, draws.normal(config.in_channels, config.sample_size, config.sample_size))

    def _unscaled(self, latents: Tensor) -> Tensor:
        config = self.teacher.decoder.config
        return latents.float() / config.scaling_factor + config.shift_factor


class Prompts:
    """A dataset of captions alone.

    Args:
        captions: at least one.
    """

    def __init__(self, captions: Sequence[str]) -> None:
        self.lines = [caption for caption in captions if caption.strip()]
        if not self.lines:
            raise ValueError("prompts: there are none")

    @classmethod
    def of(cls, source: str) -> Prompts:
        """Those of "shapes" (training's captions), or the lines of a text file.

        Raises:
            ValueError: it is neither.
        """
        if source == "shapes":
            return cls([caption for kind in (*SKILLS, *MIXES) for caption in captions(kind)])
        if not Path(source).is_file():
            raise ValueError(f"prompts: got {source!r}; must be 'shapes' or a text file with a prompt on each line")
        return cls(Path(source).read_text(encoding="utf-8").splitlines())

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, index: int) -> str:
        return self.lines[index]

    def batch(self, indices: Sequence[int]) -> Batch:
        """Captions `indices`, without pictures."""
        return Batch(captions=[self.lines[index] for index in indices])


def report(drawn: Tensor, real: Tensor) -> dict[str, float]:
    """PSNR in dB and SSIM of pictures [N, 3, H, W] in [-1, 1]: means, and N.

    Pictures are clipped to their range first, as they are when they are saved.
    """
    drawn = drawn.clamp(-1, 1)
    return {"psnr": float(psnr(drawn, real).mean()), "ssim": float(ssim(drawn, real).mean()), "pictures": len(real)}


def _likeness(drawn: Tensor, real: Tensor) -> Figures:
    drawn = drawn.detach()
    return {"psnr": psnr(drawn, real).mean().float(), "ssim": ssim(drawn, real).mean().float()}


def _arguments(module: Any) -> dict[str, Any]:
    return {name: value for name, value in module.config.items() if not name.startswith("_")}


def _save_pairs(above: Tensor, below: Tensor, path: Path) -> None:
    from snapgen.pictures import save_grid, to_pictures

    save_grid(to_pictures(torch.cat((above, below))), path, columns=len(above))
