"""`snapgen cache`: latents and embedded captions of a dataset, computed once."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

from rich.console import Console
from tyro.conf import OmitArgPrefixes, Positional, Suppress, arg

from snapgen.data.buckets import Buckets
from snapgen.data.cache import CacheConfig, write_cache
from snapgen.data.cached import CachedDataset
from snapgen.data.embed import load_encoder, load_text
from snapgen.data.loader import open_dataset
from snapgen.parallel import own_device

DEFAULTS = CacheConfig()


def main_cache(
    data: Positional[str],
    *,
    out: Annotated[Path, arg(aliases=["-o"])],
    resolution: int = 256,
    buckets: bool = False,
    unit: int = 32,
    ratio: float = 2.0,
    autoencoder: str | None = None,
    clip_l: Path | None = None,
    clip_g: Path | None = None,
    gemma: Path | None = None,
    t5: Path | None = None,
    max_tokens: int = 256,
    context_dim: int | None = None,
    precision: Literal["fp32", "bf16"] = "fp32",
    config: OmitArgPrefixes[CacheConfig] = DEFAULTS,
    console: Suppress[Console | None] = None,
) -> bool:
    """Compute the latents and embedded captions of a dataset into a folder of shards. Run the same command to resume.

    Under torchrun, or with RANK and WORLD_SIZE set by hand on several machines that share the folder, each process
    takes its part. Returns whether the cache is complete now.

    Args:
        data: "shapes" will not do, being endless; any other dataset of `snapgen train`.
        out: The cache's folder.
        resolution: Side of the pictures, or of the square whose area the buckets have.
        buckets: Keep aspect ratios; by default the central square is taken.
        unit: Sides of buckets are multiples of this.
        ratio: Longest side of a bucket over its shortest.
        autoencoder: Folder of a diffusers AutoencoderKL, or a checkpoint with an encoder of ours.
        clip_l: Folder of CLIP-L's text model and tokenizer.
        clip_g: Folder of CLIP-G's.
        gemma: Folder of Gemma-2.
        t5: Folder of T5's encoder, for a teacher.
        max_tokens: Tokens of Gemma-2's or T5's part.
        context_dim: Width of the context; by default that of the widest part.
        precision: Arithmetic of the encoders: fp32 or bf16.
        config: How the cache is laid out.

    Raises:
        ValueError: an argument does not fit, or `out` holds another cache.
    """
    console = console or Console()
    if data == "shapes":
        raise ValueError("data: got 'shapes', which is endless and drawn faster than it is read; cache another")
    device = own_device()
    text = None
    if any(folder is not None for folder in (clip_l, clip_g, gemma, t5)):
        text = load_text(
            clip_l=clip_l,
            clip_g=clip_g,
            gemma=gemma,
            t5=t5,
            max_tokens=max_tokens,
            context_dim=context_dim,
            device=device,
            dtype=precision,
        )
    encoder = None if autoencoder is None else load_encoder(autoencoder, device=device, dtype=precision)
    bucketing = Buckets(resolution=resolution, unit=unit, ratio=ratio) if buckets else None
    complete = write_cache(
        open_dataset(data, resolution, bucketing=bucketing),
        out,
        encoder=encoder,
        text=text,
        config=config,
        rank=int(os.environ.get("RANK", "0")),
        world=int(os.environ.get("WORLD_SIZE", "1")),
        console=console,
    )
    console.print(CachedDataset(out).report() if complete else f"{out}: this process's part is done")
    return complete
