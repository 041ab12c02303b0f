"""Frozen models that pictures and captions are passed through once, beforehand: autoencoders and text encoders.

All are loaded from local folders; only safetensors are read.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from snapgen import io
from snapgen.config import SHIPPED
from snapgen.text import CLIP_TOKENS, TextEmbedding, encode_clip, encode_gemma, join

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class LatentEncoder:
    """Pictures to the latents that a denoiser is trained on.

    Args:
        module: a `TinyEncoder`, or diffusers' `AutoencoderKL`, whose distribution's mean is taken (the paper does not
            say whether it samples; a mean needs no random numbers, and half the memory of mean and spread).
        scale, shift: a latent z is stored as (z - shift) * scale.
    """

    module: Any
    scale: float
    shift: float

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] in [-1, 1] to scaled latents [B, C, h, w], fp32 on the CPU."""
        return ((raw_latents(self.module, images) - self.shift) * self.scale).cpu()

    def record(self) -> dict[str, Any]:
        """What it is, for JSON."""
        own = {"kind": type(self.module).__name__, "scale": self.scale, "shift": self.shift}
        return {**own, "dtype": str(self.module.dtype), "weights": fingerprint([self.module])}


def raw_latents(module: Any, images: Tensor) -> Tensor:
    """Unscaled latents [B, C, h, w], fp32, of pictures [B, 3, H, W] in [-1, 1], by an encoder as of `LatentEncoder`."""
    place = next(module.parameters())
    images = images.to(place.device, place.dtype)
    return (module.encode(images).latent_dist.mode() if hasattr(module, "encode") else module(images)).float()


def load_encoder(source: str | Path, *, device: torch.device | str = "cpu", dtype: str = "fp32") -> LatentEncoder:
    """The encoder of a folder: an autoencoder of diffusers (or a pipeline with one in vae/), or encoder/ and decoder/
    of a checkpoint of ours, by its folder or a shipped one's name.

    Raises:
        io.CheckpointError: there is none, or it is damaged.
        ValueError: `dtype` is neither fp32 nor bf16.
    """
    from diffusers import AutoencoderKL

    from snapgen.decoder import TinyEncoder

    if dtype not in DTYPES:
        raise ValueError(f"dtype: got {dtype!r}; allowed are {', '.join(DTYPES)}")
    folder = SHIPPED / source if (SHIPPED / source).is_dir() else Path(source)
    kind: Any
    if (folder / "encoder" / "config.json").is_file():
        settings = io.read_json(folder / "decoder" / "config.json")
        kind, home = TinyEncoder, folder / "encoder"
    else:
        home = next((home for home in (folder, folder / "vae") if (home / "config.json").is_file()), folder)
        if not (home / "config.json").is_file():
            raise io.CheckpointError(f"{folder}: holds no encoder (encoder/, vae/ or an autoencoder's config.json)")
        kind, settings = AutoencoderKL, io.read_json(home / "config.json")
    named = io.read_json(home / "config.json").get("_class_name")
    if named != kind.__name__:
        raise io.CheckpointError(f"{home}: holds a {named}; must be a {kind.__name__}")
    for file in home.glob("*.safetensors"):
        io.check_tensors(file)
    try:
        module = kind.from_pretrained(home, use_safetensors=True, torch_dtype=DTYPES[dtype])
    except OSError as error:
        raise io.CheckpointError(f"{home}: cannot be loaded ({error})") from error
    scale, shift = settings.get("scaling_factor"), settings.get("shift_factor")
    return LatentEncoder(
        module=module.to(device).eval().requires_grad_(False),
        scale=1.0 if scale is None else float(scale),
        shift=0.0 if shift is None else float(shift),
    )


class FrozenText:
    """Captions to embeddings, by frozen encoders: CLIP states on the left, another encoder's tokens behind them.

    With Gemma-2 these are what SnapGen's denoiser reads, with T5 what an SD3 teacher reads.

    Args:
        clips: CLIP-L, CLIP-G, as (tokenizer, encoder); either or both.
        tokens: (tokenizer, encoder) of Gemma-2 or T5, or None.
        max_tokens: length of its part.
        attend_padding: its padding counts, as in SD3's use of T5.
        context_dim: width of the context; the wider of the two parts unless given.
    """

    def __init__(
        self,
        *,
        clips: Sequence[tuple[Any, nn.Module]] = (),
        tokens: tuple[Any, nn.Module] | None = None,
        max_tokens: int = 256,
        attend_padding: bool = False,
        context_dim: int | None = None,
    ) -> None:
        if not clips and tokens is None:
            raise ValueError("text encoders: none is given; at least one is needed")
        if max_tokens < 1:
            raise ValueError(f"max_tokens: got {max_tokens}; must be at least 1")
        self.clips, self.tokens, self.max_tokens, self.attend_padding = list(clips), tokens, max_tokens, attend_padding
        clip_width = sum(_config(encoder).hidden_size for _, encoder in self.clips)
        self.pooled_dim = sum(_config(encoder).projection_dim for _, encoder in self.clips) or None
        width = 0 if tokens is None else _width(tokens[1])
        self.context_dim = context_dim or max(clip_width, width)

    @property
    def modules(self) -> list[nn.Module]:
        return [encoder for _, encoder in (*self.clips, *([self.tokens] if self.tokens else []))]

    @property
    def clip_widths(self) -> list[list[int]]:
        """Widths of each CLIP's states and of its pooled projection."""
        configs = [_config(encoder) for _, encoder in self.clips]
        return [[config.hidden_size, config.projection_dim] for config in configs]

    @torch.no_grad()
    def __call__(self, captions: Sequence[str], device: torch.device | str = "cpu") -> TextEmbedding:
        """Embeddings of captions, on ``device``: context [B, L, context_dim], mask [B, L], pooled [B, pooled_dim], in
        the encoders' dtype. L is the same for all."""
        place = next(self.modules[0].parameters())
        clip = encode_clip(self.clips, captions, place.device) if self.clips else None
        tokens = None
        if self.tokens is not None:
            states, mask = encode_gemma(*self.tokens, captions, self.max_tokens, place.device)
            tokens = states, torch.ones_like(mask) if self.attend_padding else mask
        text = join(
            clip,
            tokens,
            context_dim=self.context_dim,
            pooled_dim=self.pooled_dim,
            batch=len(captions),
            device=place.device,
            dtype=place.dtype,
        )
        return TextEmbedding(*(None if part is None else part.to(device) for part in text))  # type: ignore[arg-type]

    def parts(self) -> dict[str, list[int]]:
        """Where each part's tokens lie in the context: [first, last + 1]."""
        clip = CLIP_TOKENS if self.clips else 0
        found = {"clip": [0, clip]} if clip else {}
        return found if self.tokens is None else {**found, "tokens": [clip, clip + self.max_tokens]}

    def record(self) -> dict[str, Any]:
        """What they are, for JSON."""
        return {
            "kinds": [type(module).__name__ for module in self.modules],
            "clips": self.clip_widths,
            "dtype": str(next(self.modules[0].parameters()).dtype),
            "weights": fingerprint(self.modules),
            "parts": self.parts(),
            "attend_padding": self.attend_padding,
        }


def load_text(
    *,
    clip_l: Path | None = None,
    clip_g: Path | None = None,
    gemma: Path | None = None,
    t5: Path | None = None,
    max_tokens: int = 256,
    context_dim: int | None = None,
    device: torch.device | str = "cpu",
    dtype: str = "fp32",
) -> FrozenText:
    """Text encoders of local folders that hold a model and its tokenizer; of a diffusers pipeline, name text_encoder*/,
    whose tokenizer*/ lies beside it.

    Raises:
        io.CheckpointError: a folder holds no such encoder.
        ValueError: none is given, or both Gemma-2 and T5.
    """
    from transformers import AutoModel, CLIPTextModelWithProjection, T5EncoderModel

    if gemma is not None and t5 is not None:
        raise ValueError("text encoders: got both gemma and t5; the student reads one and an SD3 teacher the other")

    def loaded(folder: Path, kind: Any) -> tuple[Any, nn.Module]:
        from transformers import AutoTokenizer

        if not (folder / "config.json").is_file():
            raise io.CheckpointError(f"{folder}: holds no text encoder (config.json)")
        for file in folder.glob("*.safetensors"):
            io.check_tensors(file)
        beside = folder.parent / re.sub("^text_encoder", "tokenizer", folder.name)
        home = beside if folder.name.startswith("text_encoder") and beside.is_dir() else folder
        try:
            tokenizer = AutoTokenizer.from_pretrained(home, local_files_only=True)
            module = kind.from_pretrained(folder, local_files_only=True, use_safetensors=True, dtype=DTYPES[dtype])
        except OSError as error:
            raise io.CheckpointError(f"{folder}: cannot be loaded ({error})") from error
        return tokenizer, module.to(device).eval().requires_grad_(False)

    clips = [loaded(folder, CLIPTextModelWithProjection) for folder in (clip_l, clip_g) if folder is not None]
    tokens = None
    if gemma is not None:
        tokens = loaded(gemma, AutoModel)
    elif t5 is not None:
        tokens = loaded(t5, T5EncoderModel)
    return FrozenText(
        clips=clips, tokens=tokens, max_tokens=max_tokens, attend_padding=t5 is not None, context_dim=context_dim
    )


def fingerprint(modules: Iterable[nn.Module]) -> str:
    """A SHA-256 over names, shapes and up to 64 evenly spaced values of every weight: other weights, another one."""
    digest = hashlib.sha256()
    for module in modules:
        for name, value in sorted(module.state_dict().items()):
            flat = value.detach().reshape(-1)
            picked = flat[torch.linspace(0, max(0, len(flat) - 1), min(64, len(flat))).long().to(flat.device)]
            digest.update(f"{name} {tuple(value.shape)}".encode())
            digest.update(picked.double().cpu().numpy().tobytes())
    return digest.hexdigest()


def _config(encoder: nn.Module) -> Any:
    return encoder.config


def _width(encoder: nn.Module) -> int:
    config = _config(encoder)
    return int(getattr(config, "hidden_size", 0) or config.d_model)
