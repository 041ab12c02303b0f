"""Every preset, in one table.

A preset is a set of keyword arguments: `denoiser` for `snapgen.unet.SnapGenUNet` (or, with a `patch_size`, for
`snapgen.mmdit.MMDiT`), `decoder` for `snapgen.decoder.TinyDecoder`, `encoder` for `TinyEncoder` beside it (only where
we train one ourselves; the large presets encode with the frozen SD3 autoencoder), `text` for the text encoders. Nothing
else configures a model.

Sources: SnapGen (CVPR 2025), the authors' slides for parameter and FLOP counts. What the paper leaves open (width of
the time embedding, depth of the middle block, side of the first stage's cross-attention) is fitted to those counts; see
ARCHITECTURE.md.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SHIPPED = Path(__file__).parent / "checkpoints"  # a folder for each preset that ships with weights


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Keyword arguments of each part of one model, and the published figures that it is held to."""

    name: str
    about: str
    resolution: int  # pixels on a side of the pictures that it is trained to draw
    denoiser: dict[str, Any]
    decoder: dict[str, Any]
    encoder: dict[str, Any] | None = None
    text: dict[str, Any] = field(default_factory=dict)
    shift: float = 1.0  # flow-matching timestep shift at this resolution (SD3, section 5.3.2)
    target_params: float | None = None  # denoiser parameters
    target_macs: float | None = None  # multiply-accumulates of one denoiser forward at `resolution`


# Widths and depths are not published, and several hit the published 1.38M / 224 GMACs. This one has fewer blocks at
# high resolution, which is the paper's rule. Their quality after equal training has not been compared.
DECODER = dict(
    latent_channels=16,
    channels=(160, 160, 128, 128),
    blocks=(4, 2, 2, 1),
    expansion=3,
    scaling_factor=1.5305,
    shift_factor=0.0609,
)

_FULL = dict(
    channels=(256, 512, 896),
    num_heads=(4, 8, 14),
    head_dim=64,
    layers_per_block=2,
    transformer_layers_down=(1, 2, 4),
    transformer_layers_mid=4,
    transformer_layers_up=(0, 2, 4),
    self_attention=(False, False, True),
    ff_ratio=3,
    temb_dim=256,
    conv="expanded",
    kv_heads="one",
    qk_norm=True,
    rope=True,
)

_TINY_DECODER = dict(latent_channels=8, channels=(96, 64, 48, 32), blocks=(2, 2, 1, 1), expansion=2, norm_groups=16)
_TINY_ENCODER = dict(latent_channels=8, channels=(96, 64), blocks=(2, 2), expansion=2, norm_groups=16)
_TINY_TEXT = dict(hidden_size=128, layers=2, heads=4, max_tokens=16)
# Where objects go is decided near the noise, where without a shift few training times lie.
_TINY_SHIFT = 3.0

PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(
            name="tiny",
            about="64x64 pictures of the shapes world; trains on a laptop CPU, ships with the package",
            resolution=64,
            denoiser=dict(
                sample_size=8,
                in_channels=8,
                channels=(64, 128),
                num_heads=(2, 4),
                head_dim=32,
                layers_per_block=1,
                transformer_layers_down=(1, 1),
                transformer_layers_mid=2,
                transformer_layers_up=(0, 1),
                self_attention=(True, True),
                ff_ratio=3,
                temb_dim=128,
                context_dim=128,
                pooled_dim=128,
                conv="expanded",
                kv_heads="one",
                qk_norm=True,
                rope=True,
                norm_groups=16,
            ),
            decoder=_TINY_DECODER,
            encoder=_TINY_ENCODER,
            text=_TINY_TEXT,
            shift=_TINY_SHIFT,
        ),
        Preset(
            name="tiny-teacher",
            about="a transformer of SD3's kind on the latents of tiny, to teach it; trains in the same way",
            resolution=64,
            denoiser=dict(
                sample_size=8,
                in_channels=8,
                patch_size=2,
                num_layers=6,
                num_heads=4,
                head_dim=64,
                context_dim=128,
                pooled_dim=128,
                context_tokens=16,
            ),
            decoder=_TINY_DECODER,
            encoder=_TINY_ENCODER,
            text=_TINY_TEXT,
            shift=_TINY_SHIFT,
        ),
        Preset(
            name="digits",
            about="32x32 handwritten digits by class prompt: the proof on real pictures, which needs no download",
            resolution=32,
            denoiser=dict(
                sample_size=8,
                in_channels=4,
                channels=(64, 96),
                num_heads=(2, 3),
                head_dim=32,
                layers_per_block=1,
                transformer_layers_down=(1, 1),
                transformer_layers_mid=2,
                transformer_layers_up=(0, 1),
                self_attention=(True, True),
                ff_ratio=3,
                temb_dim=128,
                context_dim=64,
                pooled_dim=64,
                conv="expanded",
                kv_heads="one",
                qk_norm=True,
                rope=True,
                norm_groups=16,
            ),
            decoder=dict(latent_channels=4, channels=(64, 48, 32), blocks=(1, 1, 1), expansion=2, norm_groups=16),
            encoder=dict(latent_channels=4, channels=(64,), blocks=(2,), expansion=2, norm_groups=16),
            text=dict(hidden_size=64, layers=1, heads=2, max_tokens=10),
        ),
        Preset(
            name="imagenet-256",
            about="class prompts at 256x256 on a 32x32x4 latent, CLIP-L context",
            resolution=256,
            denoiser=dict(_FULL, sample_size=32, in_channels=4, context_dim=768),
            decoder=dict(DECODER, latent_channels=4, scaling_factor=0.18215, shift_factor=0.0),
            text=dict(encoders=("clip-l",), max_tokens=77),
            target_params=372e6,
            target_macs=38e9,
        ),
        Preset(
            name="t2i-1024",
            about="SnapGen: text to 1024x1024 pictures on a 128x128x16 latent, CLIP-L + CLIP-G + Gemma-2-2b",
            resolution=1024,
            denoiser=dict(_FULL, sample_size=128, in_channels=16, context_dim=2304, pooled_dim=2048),
            decoder=DECODER,
            text=dict(encoders=("clip-l", "clip-g", "gemma-2"), max_tokens=256),
            shift=3.0,
            target_params=379e6,
        ),
    )
}

# The ablation ladder (SnapGen, section 3.1 and its figure): each step changes flags of the step before.
# `published`: relative change in parameters and in MACs against the named earlier step, where the paper gives one.
LADDER: tuple[dict[str, Any], ...] = (
    dict(
        step="thin SDXL UNet",
        flags=dict(
            transformer_layers_down=(0, 2, 4),
            transformer_layers_up=(0, 2, 4),
            self_attention=(False, True, True),
            conv="dense",
            ff_ratio=4,
            kv_heads="all",
            qk_norm=False,
            rope=False,
            temb_dim=896,
        ),
    ),
    dict(
        step="no self-attention at high resolution",
        flags=dict(self_attention=(False, False, True)),
        published=dict(against=0, macs=-0.17),
    ),
    dict(step="separable convolutions", flags=dict(conv="separable"), published=dict(against=1, params=-0.24)),
    dict(
        step="expansion 2 in the separable blocks",
        flags=dict(conv="expanded"),
        published=dict(against=1, params=-0.15, macs=-0.27),
    ),
    dict(
        step="feed-forward ratio 4 -> 3",
        flags=dict(ff_ratio=3),
        published=dict(against=3, params=-0.12, macs=-0.12),
    ),
    dict(
        step="multi-query attention",
        flags=dict(kv_heads="one"),
        published=dict(against=4, params=-0.16, macs=-0.06),
    ),
    dict(
        step="cross-attention in the first stage, QK-RMSNorm, RoPE",
        flags=dict(transformer_layers_down=(1, 2, 4), qk_norm=True, rope=True),
    ),
    dict(step="256-wide time embedding (our fit to 372M)", flags=dict(temb_dim=256)),
)


def get_preset(name: str) -> Preset:
    """The preset called `name`.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in PRESETS:
        raise ValueError(f"preset: unknown name {name!r}; choose one of {', '.join(sorted(PRESETS))}")
    return PRESETS[name]
