"""The gate of every export: a package's numbers, run by the interpreter, against the model's own in fp32.

Inputs are real: pictures of the shapes world through the pipeline's encoder (noise where it has none), noised to
several times, with the captions through its text encoder. The figure is

    PSNR = 10 log10(max(reference)^2 / mean((output - reference)^2))   in dB,

the peak being the largest magnitude of the reference; the worst case counts.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from snapgen import flow
from snapgen.export.interpreter import Chain
from snapgen.export.tools import ParityError
from snapgen.text import TextEmbedding, encode_clip, encode_gemma
from snapgen_kernels import use

# dB, for fp16 packages
FLOORS = {"denoiser": 45.0, "decoder": 55.0, "text_encoder": 45.0, "text_encoder_2": 45.0, "text_encoder_3": 45.0}
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
        text, empty = pipe.encode_prompt(captions), pipe.encode_prompt([""])
    noisy = flow.interpolate(clean, noise, torch.tensor(TIMES))
    return Cases(captions, noisy, clean, _padded(empty, tokens), _padded(text, tokens))


def plain(module: nn.Module) -> nn.Module:
    """`module` if it is in fp32, on the CPU and in eval mode; otherwise a copy that is."""
    tensors = [*module.parameters(), *module.buffers()]
    if not module.training and all(t.device.type == "cpu" and t.dtype in (torch.float32, torch.int64) for t in tensors):
        return module
    # nn.Module's own `to`: that of diffusers' models warns of every change of dtype.
    return nn.Module.to(copy.deepcopy(module), "cpu", torch.float32).eval()


@torch.no_grad()
def compare(name: str, program: Any, pipe: Any, cases: Cases) -> dict[str, float]:
    """PSNR of a part in each case; `program` is the part's packages (`Chain`), or whatever takes and gives the same."""
    with use("reference"):
        return _COMPARISONS[name](program, pipe, cases)


def check(name: str, program: Chain, pipe: Any, cases: Cases) -> float:
    """Worst PSNR of a part over the cases.

    Args:
        name: one of `snapgen.export.options.PARTS`.
        program: the part's packages.

    Raises:
        ParityError: it is below the part's floor in `FLOORS`.
    """
    figures = compare(name, program, pipe, cases)
    worst = min(figures, key=lambda case: figures[case])
    if figures[worst] < FLOORS[name]:
        raise ParityError(
            f"{name}: the exported program is {figures[worst]:.1f} dB from the model at {worst}; the floor is "
            f"{FLOORS[name]:.0f} dB. Its weights or activations may leave the range of fp16. Nothing was written"
        )
    return figures[worst]


def _denoiser(program: Chain, pipe: Any, cases: Cases) -> dict[str, float]:
    model = plain(pipe.denoiser)
    batch = program.inputs["sample"][0][0]
    figures = {}
    for index, time in enumerate(TIMES):
        sample = cases.noisy[index : index + 1].expand(batch, -1, -1, -1)
        timestep = torch.full((batch,), time * flow.TIMESTEP_SCALE)
        text = _row(cases.text, index)
        if batch == 2:
            text = _joined(cases.empty, text)
        reference = model(sample, timestep, text.context, text.mask, text.pooled, return_dict=False)[0]
        inputs = {
            "sample": sample,
            "timestep": timestep,
            "encoder_hidden_states": text.context.transpose(1, 2)[:, :, None],
            "encoder_attention_mask": text.mask[:, None, None],
        }
        if text.pooled is not None and "pooled_projections" in program.inputs:
            inputs["pooled_projections"] = text.pooled
        figures[f"t = {time:.3f}"] = psnr(program(inputs)["velocity"], reference)
    return figures


def _decoder(program: Chain, pipe: Any, cases: Cases) -> dict[str, float]:
    model: Any = plain(pipe.decoder)
    batch = program.inputs["z"][0][0]
    figures = {}
    for index, caption in enumerate(cases.captions):
        z = cases.clean[index : index + 1].expand(batch, -1, -1, -1)
        figures[f"{caption!r}"] = psnr(program({"z": z})["image"], model.decode(z))
    return figures


def _text_encoder(program: Chain, pipe: Any, cases: Cases) -> dict[str, float]:
    if not pipe.config.joint_text:
        return _clip(program, pipe.tokenizer, plain(pipe.text_encoder), cases)
    batch, tokens = program.inputs["input_ids"][0]
    figures = {}
    for index, caption in enumerate(cases.captions):
        ids = pipe.tokenizer(caption, padding="max_length", max_length=tokens, return_tensors="pt").input_ids
        outputs = program({"input_ids": ids.expand(batch, -1)})
        text = _row(cases.text, index)
        states = outputs["last_hidden_state"][:1][text.mask]
        figures[f"{caption!r}"] = psnr(states, text.context[text.mask])
        if text.pooled is not None:
            figures[f"{caption!r}, pooled"] = psnr(outputs["pooled_outputs"][:1], text.pooled)
    return figures


def _text_encoder_2(program: Chain, pipe: Any, cases: Cases) -> dict[str, float]:
    return _clip(program, pipe.tokenizer_2, plain(pipe.text_encoder_2), cases)


def _clip(program: Chain, tokenizer: Any, model: nn.Module, cases: Cases) -> dict[str, float]:
    batch, tokens = program.inputs["input_ids"][0]
    figures = {}
    for caption in (*cases.captions, ""):
        ids = tokenizer(caption, padding="max_length", max_length=tokens, truncation=True, return_tensors="pt")
        outputs = program({"input_ids": ids.input_ids.expand(batch, -1)})
        states, pooled = encode_clip([(tokenizer, model)], [caption], "cpu")
        # Every row: the denoiser's mask leaves out none of CLIP's.
        figures[f"{caption!r}"] = psnr(outputs["hidden_embeds"][:1], states)
        figures[f"{caption!r}, pooled"] = psnr(outputs["pooled_outputs"][:1], pooled)
    return figures


def _text_encoder_3(program: Chain, pipe: Any, cases: Cases) -> dict[str, float]:
    batch, tokens = program.inputs["input_ids"][0]
    tokenizer, model = pipe.tokenizer_3, plain(pipe.text_encoder_3)
    figures = {}
    for caption in (*cases.captions, ""):
        ids = tokenizer(caption, padding="max_length", max_length=tokens, truncation=True, return_tensors="pt")
        states, mask = encode_gemma(tokenizer, model, [caption], tokens, "cpu")
        inputs = {
            "input_ids": ids.input_ids.expand(batch, -1),
            "attention_mask": mask[:, None, None].expand(batch, -1, -1, -1),
        }
        figures[f"{caption!r}"] = psnr(program(inputs)["last_hidden_state"][:1][mask], states[mask])
    return figures


_COMPARISONS = {
    "denoiser": _denoiser,
    "decoder": _decoder,
    "text_encoder": _text_encoder,
    "text_encoder_2": _text_encoder_2,
    "text_encoder_3": _text_encoder_3,
}


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
