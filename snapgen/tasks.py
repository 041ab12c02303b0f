"""What can be trained: a task owns its modules, turns a batch into losses, and draws a sample grid.

The loop in `snapgen.train` knows nothing but this interface. A denoiser's task is handed its objective (flow matching
here, distillation in `snapgen.distill`), which brings further modules and phases of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from snapgen import flow
from snapgen.conditioning import Conditioning
from snapgen.config import Preset
from snapgen.data.embed import raw_latents
from snapgen.data.loader import Batch
from snapgen.seeds import Draws
from snapgen.text import TextEmbedding, build_tiny_text

Figures = dict[str, Tensor]  # what is reported beside the loss: scalars, detached
Loss = Callable[[Batch, Draws], tuple[Tensor, Figures]]  # mean over the batch


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A part of every optimizer step: one loss and the modules that it moves, with an optimizer of their own.

    Gradients that reach other modules are thrown away.
    """

    name: str
    modules: tuple[str, ...]
    """Names of the task's modules."""
    loss: Loss
    lr: float = 1.0
    """Times the run's learning rate."""
    betas: tuple[float, float] | None = None
    """AdamW's moments, where they are not the run's."""
    unused: bool = False
    """Some parameters may have no gradient in a step."""
    uneven: bool = False
    """Gradients of some steps are larger than of others by orders of magnitude, by design: size alone is no damage."""


class Task(Protocol):
    """What the training loop is handed.

    Attributes:
        modules: what is trained and saved, under its names; whatever else a task holds is frozen.
        call: the same names, what to call for a forward pass: the loop puts data-parallel wrappers here.
        averaged: names of the modules whose averaged weights are kept, drawn with and exported.
    """

    name: str
    preset: Preset
    modules: dict[str, Any]
    call: dict[str, Any]

    @property
    def averaged(self) -> Sequence[str]: ...

    def phases(self) -> Sequence[Phase]:
        """The parts of an optimizer step, in order."""
        ...

    def record(self) -> dict[str, Any]:
        """What else decides the weights, for JSON; a run may not be resumed with another."""
        ...

    def sample_grid(self, path: Path, seed: int) -> None:
        """Draw what the modules can do now into a picture file."""
        ...

    def export(self, path: Path, modules: Mapping[str, nn.Module]) -> None:
        """Save `modules`, whole and averaged, in diffusers' format."""
        ...


class Noised(NamedTuple):
    """A batch on its way from data to noise (`snapgen.flow`)."""

    x0: Tensor  # [B, C, h, w], scaled latents
    noise: Tensor
    t: Tensor  # [B]
    x_t: Tensor
    text: TextEmbedding
    captions: list[str]  # those left by dropout, for a teacher that reads them itself


class Objective(Protocol):
    """A loss for denoisers.

    Attributes:
        modules: what it trains beside the denoiser (projectors, discriminator heads), by name.
    """

    modules: dict[str, nn.Module]

    def phases(self, task: DenoiserTask) -> Sequence[Phase]: ...

    def record(self) -> dict[str, Any]: ...


class FlowMatching:
    """Pre-training: the rectified flow's velocity, times logit-normal (SnapGen, section 3.3; SD3, equation 19)."""

    modules: dict[str, nn.Module] = {}  # noqa: RUF012 - an empty one, for all

    def phases(self, task: DenoiserTask) -> Sequence[Phase]:
        def loss(batch: Batch, draws: Draws) -> tuple[Tensor, Figures]:
            noised = task.noised(batch, draws)
            return flow.velocity_loss(task.velocity(noised), noised.x0, noised.noise).mean(), {}

        return (Phase(name="denoiser", modules=task.student, loss=loss),)

    def record(self) -> dict[str, Any]:
        return {"objective": "flow matching"}


class DenoiserTask:
    """Training of a denoiser on latents, by whatever `objective`.

    Args:
        text: what embeds captions.
        encoder: pictures to unscaled latents, frozen (`data.embed.raw_latents`); None where the data are latents.
        decoder: latents to pictures, frozen; without one no sample grids are drawn, and the export is no pipeline.
        objective: the loss; flow matching unless given.
        prompts: for the sample grid.
        shift: of the timesteps; the preset's unless given.
        steps, guidance: how the sample grid is drawn, and what is exported draws unless told otherwise.
        data: what of the data decides the weights, for the run's record.
        side: of the latents, in cells; the preset's unless given.
    """

    name = "denoiser"

    def __init__(
        self,
        preset: Preset,
        *,
        denoiser: nn.Module,
        text: Conditioning,
        encoder: nn.Module | None,
        decoder: Any | None,
        objective: Objective | None = None,
        prompts: Sequence[str] = (),
        shift: float | None = None,
        steps: int = 28,
        guidance: float = 4.0,
        data: Mapping[str, Any] | None = None,
        side: int | None = None,
    ) -> None:
        self.preset = preset
        self.data, self.side = dict(data or {}), side
        self.steps, self.guidance = steps, guidance
        self.objective: Objective = objective or FlowMatching()
        self.text = text
        self.modules: dict[str, Any] = {"denoiser": denoiser, **text.modules, **self.objective.modules}
        self.call: dict[str, Any] = dict(self.modules)
        self.encoder = encoder and encoder.requires_grad_(False).eval()
        self.decoder = decoder and decoder.requires_grad_(False).eval()
        self.scale = preset.decoder.get("scaling_factor", 1.0)
        self.offset = preset.decoder.get("shift_factor", 0.0)
        self.prompts = tuple(prompts)
        self.shift = preset.shift if shift is None else shift

    @cached_property
    def flops(self) -> float:
        """Operations of the denoiser's forward and backward pass for a sample."""
        from snapgen.info import denoiser_counts

        return 3 * 2 * denoiser_counts(self.preset.denoiser, self.side)[""].macs

    @property
    def student(self) -> tuple[str, ...]:
        """Names of the denoiser and of what is trained with it to read."""
        return ("denoiser", *self.text.modules)

    @property
    def averaged(self) -> tuple[str, ...]:
        return self.student

    @property
    def compiles(self) -> bool:
        """Whether torch.compile may compile its modules."""
        return getattr(self.objective, "compiles", True)

    def phases(self) -> Sequence[Phase]:
        return self.objective.phases(self)

    def record(self) -> dict[str, Any]:
        own = {"shift": self.shift, **self.text.record(), **self.objective.record()}
        return {**own, **self.data}

    @torch.no_grad()
    def latents(self, batch: Batch) -> Tensor:
        """Scaled latents [B, C, h, w], fp32."""
        if batch.latents is not None:
            return batch.latents.float()
        if self.encoder is None or batch.images is None:
            raise ValueError("data: has neither latents nor pictures that an encoder could read")
        return (raw_latents(self.encoder, batch.images) - self.offset) * self.scale

    def noised(self, batch: Batch, draws: Draws, t: Tensor | None = None) -> Noised:
        """The batch at times `t` [B], logit-normal ones unless given."""
        x0 = self.latents(batch)
        text, captions = self.text.embed(batch, draws, self.call, x0.device)
        noise = draws.normal(*x0.shape[1:])
        if t is None:
            t = flow.times(draws.normal(), shift=self.shift)
        return Noised(x0, noise, t, flow.interpolate(x0, noise, t), text, captions)

    def velocity(self, noised: Noised) -> Tensor:
        """What the denoiser says there: [B, C, h, w]."""
        return self.predict(noised.x_t, noised.t, noised.text)

    def predict(self, x_t: Tensor, t: Tensor, text: TextEmbedding) -> Tensor:
        """The denoiser's velocity at x_t [B, C, h, w] and t [B]."""
        return self.call["denoiser"](
            x_t, t * flow.TIMESTEP_SCALE, text.context, text.mask, text.pooled, return_dict=False
        )[0]

    def pipeline(self, modules: Mapping[str, nn.Module] | None = None) -> Any:
        """The task's modules, or others in their place, as a pipeline that shares their weights."""
        from snapgen.pipeline import SnapGenPipeline
        from snapgen.sampler import make_scheduler

        parts: dict[str, Any] = {name: (modules or self.modules)[name] for name in self.student}
        return SnapGenPipeline(
            decoder=self.decoder,
            encoder=self.encoder,
            scheduler=make_scheduler(self.shift),
            steps=self.steps,
            guidance=self.guidance,
            **parts,
            **self.text.components(),
        )

    def sample_grid(self, path: Path, seed: int) -> None:
        from snapgen.pictures import save_grid

        if self.decoder is None or not self.prompts:
            return
        pipe = self.pipeline()
        pipe.set_progress_bar_config(disable=True)
        pictures = pipe(
            list(self.prompts),
            num_inference_steps=self.steps,
            guidance_scale=self.guidance,
            generator=torch.Generator().manual_seed(seed),
        ).images
        save_grid(pictures, path, captions=self.prompts)

    def export(self, path: Path, modules: Mapping[str, nn.Module]) -> None:
        if self.decoder is not None:
            self.pipeline(modules).save_pretrained(path)
            return
        for name in self.student:
            modules[name].save_pretrained(path / name)  # type: ignore[operator]


class AutoencoderTask:
    """Encoder and decoder of a preset whose latents are our own.

    Reconstruction by L1 and L2, latents held near zero mean and unit spread per channel (so that they need no scaling
    factor), and noise on the latents so that the decoder forgives a denoiser's small errors.
    """

    name = "autoencoder"
    latent_noise = 0.1

    def __init__(
        self,
        preset: Preset,
        *,
        encoder: nn.Module,
        decoder: nn.Module,
        pictures: Tensor,
        data: Mapping[str, Any] | None = None,
    ) -> None:
        self.preset, self.data = preset, dict(data or {})
        self.modules: dict[str, Any] = {"encoder": encoder, "decoder": decoder}
        self.call: dict[str, Any] = dict(self.modules)
        self.pictures = pictures  # [B, 3, H, W], for the sample grid

    @property
    def averaged(self) -> Sequence[str]:
        return tuple(self.modules)

    def phases(self) -> Sequence[Phase]:
        return (Phase(name="autoencoder", modules=tuple(self.modules), loss=self.loss),)

    def record(self) -> dict[str, Any]:
        return self.data

    def loss(self, batch: Batch, draws: Draws) -> tuple[Tensor, Figures]:
        images = batch.images
        assert images is not None
        latents = self.call["encoder"](images).float()
        noise = draws.normal(*latents.shape[1:])
        drawn = self.call["decoder"](latents + self.latent_noise * noise).float()
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

    def export(self, path: Path, modules: Mapping[str, nn.Module]) -> None:
        for name, module in modules.items():
            module.save_pretrained(path / name)  # type: ignore[operator]


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
    from snapgen.mmdit import make_denoiser

    tokenizer, text_encoder = build_tiny_text(words, **preset.text)
    return make_denoiser(preset.denoiser), text_encoder, tokenizer
