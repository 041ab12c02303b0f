"""A preset small enough to train in a test, and its tasks."""

import os

import torch
from rich.console import Console

from snapgen.conditioning import JointText
from snapgen.config import PRESETS, Preset
from snapgen.data.shapes import VOCABULARY
from snapgen.tasks import AutoencoderTask, DenoiserTask, build_autoencoder, build_denoiser

TINY = PRESETS["tiny"]
SMALL = Preset(
    name="small",
    about="for tests",
    resolution=32,
    denoiser=dict(TINY.denoiser, sample_size=4, channels=(32, 32), num_heads=(1, 1), context_dim=32, pooled_dim=32),
    decoder=dict(TINY.decoder, channels=(32, 32, 16, 16), blocks=(1, 1, 1, 0)),
    encoder=dict(TINY.encoder, channels=(32, 32), blocks=(1, 1)),
    text=dict(hidden_size=32, layers=1, heads=2, max_tokens=16),
)
QUIET = Console(file=open(os.devnull, "w"))  # noqa: SIM115 - lives as long as the tests


def denoiser_task() -> DenoiserTask:
    torch.manual_seed(0)
    encoder, decoder = build_autoencoder(SMALL)
    denoiser, text_encoder, tokenizer = build_denoiser(SMALL, VOCABULARY)
    return DenoiserTask(
        SMALL,
        denoiser=denoiser,
        text=JointText(tokenizer, text_encoder),
        encoder=encoder,
        decoder=decoder,
        prompts=("a red circle", "two stars"),
        steps=2,
    )


def autoencoder_task() -> AutoencoderTask:
    torch.manual_seed(0)
    encoder, decoder = build_autoencoder(SMALL)
    return AutoencoderTask(SMALL, encoder=encoder, decoder=decoder, pictures=torch.zeros(2, 3, 32, 32))
