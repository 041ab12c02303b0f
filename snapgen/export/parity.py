"""The gate of every export: a package's numbers, run by the interpreter, against the model's own in fp32.

Inputs are real: pictures of the shapes world through the pipeline's encoder (noise where it has none), noised to
several times, with the captions through its text encoders (noise where it has none). The figure is

    PSNR = 10 log10(max(reference)^2 / mean((output - reference)^2))   in dB,

the peak being the largest magnitude of the reference; the worst case counts.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from snapgen import flow
from snapgen.export.denoiser import time_embeddings
from snapgen.export.interpreter import Chain
from snapgen.export.tools import ParityError
from snapgen.text import TextEmbedding
from snapgen_kernels import use

FLOORS = {"denoiser": 45.0, "decoder": 55.0, "text_encoder": 45.0}  # dB, for fp16 packages
TIMES = (1.0, 20 / 28, 10 / 28, 1 / 28)  # of the cases: steps of a 28-step run; 1000 t is not exact in fp16


@dataclass(frozen=True)
class Cases:
    """Inputs that a pipeline meets, one per entry of `TIMES`; fp32, on the CPU."""

    captions: tuple[str, ...]
    noisy: Tensor  # [cases, C, H, W], latents at time t
    clean: Tensor  # [cases, C, H, W]
    empty: TextEmbedding  # of the empty prompt, batch 1
    text: TextEmbedding  # of the captions, padded to the exported length


def psnr(output: Tensor, reference: Tensor) -> float:
    """dB, with the largest magnitude of `reference` as peak; -inf if `output` is not finite."""
    output, reference = output.double(), reference.double()
    if not output.isfinite().all():
        return float("-inf")
    error = (output - reference).square().mean()
    return float(10 * torch.log10(reference.abs().max().square() / error))


@torch.no_grad()
def make_cases(pipe: Any, tokens: int, height: int, width: int) -> Cases:
    """Captioned scenes of the shapes world as latents of `height` x `width`, and their text in `tokens` tokens."""
    from snapgen.data.shapes import render_batch, sample_scene

    count = len(TIMES)
    scenes = [sample_scene(index, seed=1, split="test") for index in range(count)]
    captions = tuple(scene.caption for scene in scenes)
    generator = torch.Generator().manual_seed(0)
    config = pipe.denoiser.config
    noise = torch.randn(count, config.in_channels, height, width, generator=generator)
    clean = torch.randn(noise.shape, generator=generator)
    with use("reference"):
        if pipe.encoder is not None:
            # Square pictures, cropped in latent space to the exported shape.
            pixels = torch.from_numpy(render_batch(scenes, max(height, width) * pipe.decoder.upscale))
            pictures = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
            scaling = pipe.decoder.config
            encoded = plain(pipe.encoder)(pictures)[..., :height, :width]
            clean = (encoded - scaling.shift_factor) * scaling.scaling_factor
        if has_text(pipe):
            text, empty = pipe.encode_prompt(captions), pipe.encode_prompt([""])
        else:
            text, empty = _random_text(config, count, tokens, generator), _random_text(config, 1, 2, generator)
    noisy = flow.interpolate(clean, noise, torch.tensor(TIMES))
    return Cases(captions, noisy, clean, _padded(empty, tokens), _padded(text, tokens))


def has_text(pipe: Any) -> bool:
    """Whether the pipeline has any text encoder."""
    return any(getattr(pipe, name) is not None for name in ("text_encoder", "text_encoder_2", "text_encoder_3"))


def _random_text(config: Any, batch: int, tokens: int, generator: torch.Generator) -> TextEmbedding:
    """Noise in place of embedded prompts; each a token shorter than the one before."""
    context = torch.randn(batch, tokens, config.context_dim, generator=generator)
    mask = torch.arange(tokens) < (tokens - torch.arange(batch)).clamp(min=1)[:, None]
    pooled = None if config.pooled_dim is None else torch.randn(batch, config.pooled_dim, generator=generator)
    return TextEmbedding(context, mask, pooled)


def plain(module: nn.Module) -> nn.Module:
    """`module` if it is in fp32, on the CPU and in eval mode; otherwise a copy that is."""
    tensors = [*module.parameters(), *module.buffers()]
    if not module.training and all(t.device.type == "cpu" and t.dtype in (torch.float32, torch.int64) for t in tensors):
        return module
    # nn.Module's own `to`: that of diffusers' models warns of every change of dtype.
    return nn.Module.to(copy.deepcopy(module), "cpu", torch.float32).eval()


@dataclass(frozen=True)
class Case:
    """One call of a part: what it takes, and what the model gives in fp32."""

    name: str
    inputs: dict[str, Tensor]  # as the package takes them
    outputs: dict[str, Tensor]
    counts: dict[str, Tensor] = field(default_factory=dict)  # output -> bool mask of its rows that mean anything

    def compare(self, outputs: Mapping[str, Tensor]) -> float:
        """PSNR of a call's outputs, the worst of them."""
        figures = []
        for name, reference in self.outputs.items():
            got = outputs[name]
            if name in self.counts:
                got, reference = got[self.counts[name]], reference[self.counts[name]]
            figures.append(psnr(got, reference))
        return min(figures)


@torch.no_grad()
def measure(name: str, program: Chain, pipe: Any, cases: Cases) -> list[tuple[Case, float]]:
    """Every case of a part, with the PSNR of the program's outputs.

    Args:
        name: "denoiser", "decoder" or "text_encoder".
        program: the part's packages.
    """
    with use("reference"):
        return [(case, case.compare(program(case.inputs))) for case in _CASES[name](program.inputs, pipe, cases)]


def hold(name: str, figures: Mapping[str, float], floor: float) -> float:
    """The worst of the figures (case -> dB).

    Raises:
        ParityError: it is below `floor`.
    """
    worst = min(figures, key=lambda case: figures[case])
    if figures[worst] < floor:
        raise ParityError(
            f"{name}: the exported program is {figures[worst]:.1f} dB from the model at {worst}; the floor is "
            f"{floor:.0f} dB. Its weights or activations may leave the range of fp16. Nothing was written"
        )
    return figures[worst]


def check(name: str, program: Chain, pipe: Any, cases: Cases) -> float:
    """Worst PSNR of a part over the cases.

    Raises:
        ParityError: it is below the part's floor in `FLOORS`.
    """
    return hold(name, {case.name: figure for case, figure in measure(name, program, pipe, cases)}, FLOORS[name])


Borders = Mapping[str, tuple[tuple[int, ...], torch.dtype]]


def _denoiser(borders: Borders, pipe: Any, cases: Cases) -> Iterator[Case]:
    model = plain(pipe.denoiser)
    batch = borders["sample"][0][0]
    for index, time in enumerate(TIMES):
        sample = cases.noisy[index : index + 1].expand(batch, -1, -1, -1)
        timestep = torch.full((batch,), time * flow.TIMESTEP_SCALE)
        text = _row(cases.text, index)
        if batch == 2:
            text = _joined(cases.empty, text)
        reference = model(sample, timestep, text.context, text.mask, text.pooled, return_dict=False)[0]
        inputs = {
            "sample": sample,
            "encoder_hidden_states": text.context.transpose(1, 2)[:, :, None],
            "encoder_attention_mask": text.mask[:, None, None],
        }
        if "time_embedding" in borders:
            inputs["time_embedding"] = time_embeddings(model, timestep[:1])[None, None]
        else:
            inputs["timestep"] = timestep
        if text.pooled is not None and "pooled_projections" in borders:
            inputs["pooled_projections"] = text.pooled
        yield Case(f"t = {time:.3f}", inputs, {"velocity": reference})


def _decoder(borders: Borders, pipe: Any, cases: Cases) -> Iterator[Case]:
    model: Any = plain(pipe.decoder)
    batch = borders["z"][0][0]
    for index, caption in enumerate(cases.captions):
        z = cases.clean[index : index + 1].expand(batch, -1, -1, -1)
        yield Case(f"{caption!r}", {"z": z}, {"image": model.decode(z)})


def _text_encoder(borders: Borders, pipe: Any, cases: Cases) -> Iterator[Case]:
    batch, tokens = borders["input_ids"][0]
    for index, caption in enumerate(cases.captions):
        ids = pipe.tokenizer(caption, padding="max_length", max_length=tokens, return_tensors="pt").input_ids
        text = _row(cases.text, index)
        outputs = {"last_hidden_state": text.context.expand(batch, -1, -1)}
        if text.pooled is not None:
            outputs["pooled_outputs"] = text.pooled.expand(batch, -1)
        counts = {"last_hidden_state": text.mask.expand(batch, -1)}
        yield Case(f"{caption!r}", {"input_ids": ids.expand(batch, -1)}, outputs, counts)


_CASES = {"denoiser": _denoiser, "decoder": _decoder, "text_encoder": _text_encoder}


def _padded(text: TextEmbedding, tokens: int) -> TextEmbedding:
    missing = tokens - text.context.shape[1]
    context = nn.functional.pad(text.context.float().cpu(), (0, 0, 0, missing))
    pooled = None if text.pooled is None else text.pooled.float().cpu()
    return TextEmbedding(context, nn.functional.pad(text.mask.cpu(), (0, missing)), pooled)


def _row(text: TextEmbedding, index: int) -> TextEmbedding:
    pooled = None if text.pooled is None else text.pooled[index : index + 1]
    return TextEmbedding(text.context[index : index + 1], text.mask[index : index + 1], pooled)


def _joined(first: TextEmbedding, second: TextEmbedding) -> TextEmbedding:
    pooled = None if first.pooled is None or second.pooled is None else torch.cat((first.pooled, second.pooled))
    return TextEmbedding(torch.cat((first.context, second.context)), torch.cat((first.mask, second.mask)), pooled)


def summary(figures: Mapping[str, float]) -> str:
    """One line: each part's PSNR and its floor."""
    return ", ".join(f"{name} {value:.1f} dB (floor {FLOORS[name]:.0f})" for name, value in figures.items())
