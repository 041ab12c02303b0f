"""Denoisers of SnapFusion's kind, in one table: Stable Diffusion 1.5's, the efficient one, and a tiny one.

Blocks per stage are SnapFusion's table 3 ("RA": a residual and a cross-attention block, see `snapgen.fusion_unet`).
What the table calls Mid, at 1/64, is SD's last down stage, its middle and its first up stage. Its four residual blocks
stand in the middle and on the way up, where three read the last down stage's skips: of the arrangements that SD's
topology allows the one with the most parameters. Built of SD's blocks the table has 777M, and could in no way have more
than 786M, where the paper says 848M. So there are two presets: `snapfusion-table` has the table's blocks, `snapfusion`
the stated parameters, by two further cross-attention blocks in the first up stage (8 for the table's 6), which is our
choice.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from snapgen.config import PRESETS, Preset

if TYPE_CHECKING:
    from snapgen.info import Count

_SD = dict(sample_size=64, in_channels=4, channels=(320, 640, 1280, 1280), context_dim=768)
_CLIP = dict(encoders=("clip-l",), max_tokens=77)
_DECODER = dict(PRESETS["imagenet-256"].decoder)  # our tiny decoder in SD's latents; SD's own is a KLDecoder
_DOWN = (("R", "R"), ("RA", "RA"), ("RAA",), ("", ""))
_UP_HIGH = (("RA", "RA", "RA"), ("R", "R", "R"))


def _efficient(name: str, about: str, first_up: tuple[str, ...], target: float | None) -> Preset:
    up = (("R", "R", "R"), first_up, *_UP_HIGH)
    return Preset(
        name=name,
        about=about,
        resolution=512,
        denoiser=dict(_SD, down=_DOWN, mid="RA", up=up),
        decoder=_DECODER,
        text=_CLIP,
        target_params=target,
    )


_TINY = PRESETS["tiny"]

FUSION_PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(
            name="sd15",
            about="Stable Diffusion 1.5's UNet, 512x512 pictures on a 64x64x4 latent, CLIP-L",
            resolution=512,
            denoiser=dict(
                _SD,
                down=(("RA", "RA"), ("RA", "RA"), ("RA", "RA"), ("R", "R")),
                mid="RAR",
                up=(("R", "R", "R"), ("RA", "RA", "RA"), ("RA", "RA", "RA"), ("RA", "RA", "RA")),
            ),
            decoder=_DECODER,
            text=_CLIP,
            target_params=860e6,
        ),
        _efficient("snapfusion", "SnapFusion's efficient UNet, fitted to its 848M", ("RAAAA", "RAAAA"), 848e6),
        _efficient("snapfusion-table", "SnapFusion's efficient UNet, by its table", ("RAAA", "RAAA"), None),
        Preset(
            name="tiny-fusion",
            about="the same kind of net for the shapes world, in the latents of `tiny`",
            resolution=_TINY.resolution,
            denoiser=dict(
                sample_size=8,
                in_channels=8,
                channels=(64, 128, 128),
                down=(("RA",), ("RA",), ("R",)),
                mid="RAR",
                up=(("R", "R"), ("RA", "RA"), ("RA", "RA")),
                num_heads=4,
                context_dim=128,
                pooled_dim=128,
                norm_groups=16,
            ),
            decoder=_TINY.decoder,
            encoder=_TINY.encoder,
            text=_TINY.text,
        ),
    )
}


def get_fusion_preset(name: str) -> Preset:
    """The preset called `name`.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in FUSION_PRESETS:
        raise ValueError(f"preset: unknown name {name!r}; choose one of {', '.join(sorted(FUSION_PRESETS))}")
    return FUSION_PRESETS[name]


def build_fusion(preset: Preset, **changes: Any) -> Any:
    """The preset's denoiser with fresh weights; `changes` replace its arguments."""
    from snapgen.fusion_unet import FusionUNet

    return FusionUNet(**{**preset.denoiser, **changes})


def fusion_counts(config: Mapping[str, Any]) -> dict[str, Count]:
    """Parameters and multiply-accumulates of the denoiser with these arguments and of its parts, by name; "" is all."""
    from snapgen.fusion_unet import FusionUNet
    from snapgen.info import TEXT_TOKENS, count

    with torch.device("meta"):
        net = FusionUNet(**{name: value for name, value in config.items() if not name.startswith("_")})
        own = net.config
        pooled = None if own.pooled_dim is None else torch.empty(1, own.pooled_dim)
        return count(
            net,
            torch.empty(1, own.in_channels, own.sample_size, own.sample_size),
            torch.zeros(1),
            torch.empty(1, TEXT_TOKENS, own.context_dim),
            pooled_projections=pooled,
        )
