"""Stable Diffusion's autoencoder in two: the decoder, called like the tiny one and of any width, and the encoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import Decoder, Encoder
from torch import Tensor, nn


class KLDecoder(ModelMixin, ConfigMixin):
    """The decoder of diffusers' AutoencoderKL: latents [B, latent_channels, H, W] to pictures [B, 3, 8H, 8W] in [-1, 1]
    (8 for four stages). An AutoencoderKL has one list of widths for both halves; this one can be pruned by itself.

    Args:
        latent_channels: 4 for Stable Diffusion.
        channels: width of each stage, from high to low resolution as AutoencoderKL's block_out_channels.
        layers_per_block: as AutoencoderKL's; a stage has one residual block more.
        norm_groups: groups of every GroupNorm.
        post_quant_conv: whether a 1x1 convolution stands before all else.
        mid_attention: whether the middle has self-attention.
        scaling_factor, shift_factor: a latent z of the autoencoder enters the denoiser as
            (z - shift_factor) * scaling_factor; `decode` undoes that.
    """

    @register_to_config
    def __init__(
        self,
        *,
        latent_channels: int = 4,
        channels: tuple[int, ...] = (128, 256, 512, 512),
        layers_per_block: int = 2,
        norm_groups: int = 32,
        post_quant_conv: bool = True,
        mid_attention: bool = True,
        scaling_factor: float = 0.18215,
        shift_factor: float = 0.0,
    ) -> None:
        super().__init__()
        self.decoder = Decoder(
            in_channels=latent_channels,
            out_channels=3,
            up_block_types=("UpDecoderBlock2D",) * len(channels),
            block_out_channels=tuple(channels),
            layers_per_block=layers_per_block,
            norm_num_groups=norm_groups,
            mid_block_add_attention=mid_attention,
        )
        self.quantized: Any = nn.Conv2d(latent_channels, latent_channels, 1) if post_quant_conv else None

    @classmethod
    def from_vae(cls, vae: Any) -> KLDecoder:
        """The decoder of a diffusers AutoencoderKL, with its weights.

        Raises:
            ValueError: it is an autoencoder of another kind.
        """
        config = _checked(vae).config
        own = cls(
            latent_channels=config.latent_channels,
            channels=tuple(config.block_out_channels),
            layers_per_block=config.layers_per_block,
            norm_groups=config.norm_num_groups,
            post_quant_conv=vae.post_quant_conv is not None,
            mid_attention=config.mid_block_add_attention,
            scaling_factor=config.scaling_factor,
            shift_factor=config.shift_factor or 0.0,
        )
        own.decoder.load_state_dict(vae.decoder.state_dict())
        if own.quantized is not None:
            own.quantized.load_state_dict(vae.post_quant_conv.state_dict())
        return own

    @property
    def upscale(self) -> int:
        """Pixels per latent cell along a side."""
        return 1 << (len(self.config.channels) - 1)

    def forward(self, latents: Tensor) -> Tensor:
        """Decode unscaled latents [B, latent_channels, H, W] to pictures [B, 3, upscale*H, upscale*W].

        Raises:
            ValueError: the latents have another number of channels.
        """
        if latents.ndim != 4 or latents.shape[1] != self.config.latent_channels:
            raise ValueError(
                f"latents: got shape {tuple(latents.shape)}; expected [B, {self.config.latent_channels}, H, W]"
            )
        return self.decoder(latents if self.quantized is None else self.quantized(latents))

    @torch.no_grad()
    def decode(
        self, latents: Tensor, *, low_memory: bool | None = None, progress: Callable[[int, int], None] | None = None
    ) -> Tensor:
        """Decode the denoiser's latents, without gradients: undo the scaling, then what `forward` computes.

        Args:
            low_memory: has no effect here.
            progress: called with (done, total) at the end.
        """
        pictures = self(latents / self.config.scaling_factor + self.config.shift_factor)
        if progress is not None:
            progress(1, 1)
        return pictures


class KLEncoder(ModelMixin, ConfigMixin):
    """The encoder of diffusers' AutoencoderKL, called like `TinyEncoder`: pictures [B, 3, 8H, 8W] in [-1, 1] to the
    mean of their unscaled latents [B, latent_channels, H, W] (8 for four stages).

    Args:
        latent_channels, channels, layers_per_block, norm_groups, mid_attention: as of `KLDecoder`.
        quant_conv: whether a 1x1 convolution stands behind all else.
    """

    @register_to_config
    def __init__(
        self,
        *,
        latent_channels: int = 4,
        channels: tuple[int, ...] = (128, 256, 512, 512),
        layers_per_block: int = 2,
        norm_groups: int = 32,
        quant_conv: bool = True,
        mid_attention: bool = True,
    ) -> None:
        super().__init__()
        self.encoder = Encoder(
            in_channels=3,
            out_channels=latent_channels,
            down_block_types=("DownEncoderBlock2D",) * len(channels),
            block_out_channels=tuple(channels),
            layers_per_block=layers_per_block,
            norm_num_groups=norm_groups,
            mid_block_add_attention=mid_attention,
            double_z=True,
        )
        self.quantized: Any = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1) if quant_conv else None

    @classmethod
    def from_vae(cls, vae: Any) -> KLEncoder:
        """The encoder of a diffusers AutoencoderKL, with its weights.

        Raises:
            ValueError: it is an autoencoder of another kind.
        """
        config = _checked(vae).config
        own = cls(
            latent_channels=config.latent_channels,
            channels=tuple(config.block_out_channels),
            layers_per_block=config.layers_per_block,
            norm_groups=config.norm_num_groups,
            quant_conv=vae.quant_conv is not None,
            mid_attention=config.mid_block_add_attention,
        )
        own.encoder.load_state_dict(vae.encoder.state_dict())
        if own.quantized is not None:
            own.quantized.load_state_dict(vae.quant_conv.state_dict())
        return own

    def forward(self, pictures: Tensor) -> Tensor:
        """Encode pictures [B, 3, H, W]; H and W multiples of the downscale."""
        moments = self.encoder(pictures)
        return (moments if self.quantized is None else self.quantized(moments)).chunk(2, dim=1)[0]


def _checked(vae: Any) -> Any:
    config = vae.config
    kinds = {*config.up_block_types, *config.down_block_types} - {"UpDecoderBlock2D", "DownEncoderBlock2D"}
    if type(vae).__name__ != "AutoencoderKL" or kinds or config.act_fn != "silu":
        raise ValueError(
            f"vae: got a {type(vae).__name__} of {', '.join(sorted(kinds)) or config.act_fn}; must be one of Stable "
            f"Diffusion's kind"
        )
    return vae
