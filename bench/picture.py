"""A pipeline with random weights, text encoders included: what a picture takes from prompt to pixels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from bench import models
from bench.models import ModelCase
from snapgen.config import PRESETS

PROMPT = "a green star above a red ring"
STEPS = 4  # without guidance, as a distilled student draws


def make_pipeline(case: ModelCase) -> Any:
    """The case's preset as a `SnapGenPipeline` in the case's dtype on its device. The large presets read with CLIP-L,
    CLIP-G and Gemma-2-2b of the published sizes; their tokens are of a vocabulary of our own, padded to theirs'
    lengths."""
    from snapgen.data.shapes import VOCABULARY
    from snapgen.pipeline import SnapGenPipeline
    from snapgen.sampler import make_scheduler
    from snapgen.text import build_tiny_text

    preset = PRESETS[case.preset]
    parts: dict[str, Any] = {name: models.build(replace(case, op=name)) for name in ("denoiser", "decoder")}
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        if "encoders" in preset.text:
            tokenizer, _ = build_tiny_text(VOCABULARY, hidden_size=8, layers=1, heads=1, max_tokens=77)
            for number, name in zip(("", "_2", "_3"), preset.text["encoders"], strict=False):
                parts[f"tokenizer{number}"], parts[f"text_encoder{number}"] = tokenizer, _large(name)
        else:
            tokenizer, encoder = build_tiny_text(VOCABULARY, **preset.text)
            parts |= {"joint_text": True, "tokenizer": tokenizer, "text_encoder": encoder}
    for name, part in parts.items():
        if name.startswith("text_encoder"):
            parts[name] = part.to(case.dtype).eval()
    pipe = SnapGenPipeline(scheduler=make_scheduler(preset.shift), **parts).to(case.device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _large(name: str) -> nn.Module:
    """A text encoder of the published size, random."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, Gemma2Config, Gemma2Model

    if name == "gemma-2":
        return Gemma2Model(Gemma2Config())
    width, layers, activation = {"clip-l": (768, 12, "quick_gelu"), "clip-g": (1280, 32, "gelu")}[name]
    config = CLIPTextConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        hidden_act=activation,
    )
    return CLIPTextModelWithProjection(config)


def draw(pipe: Any, case: ModelCase) -> Any:
    """Pictures of the case, as a tensor."""
    pixels = case.side * pipe.decoder.upscale
    noise = torch.Generator().manual_seed(0)
    options = dict(num_inference_steps=STEPS, guidance_scale=1.0, generator=noise, height=pixels, width=pixels)
    return pipe([PROMPT] * case.batch, output_type="pt", **options).images
