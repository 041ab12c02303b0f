"""SnapGen's denoiser: SDXL's UNet, thinner and shorter, of separable residual blocks and multi-query attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from snapgen.layers import Downsample, Rope, SpatialTransformer, Upsample, make_res_block
from snapgen_kernels import GroupNormSiLU, rope_2d


@dataclass
class UNetOutput(BaseOutput):
    """`sample` [B, in_channels, H, W]: the predicted velocity eps - x_0."""

    sample: Tensor


class SnapGenUNet(ModelMixin, ConfigMixin):
    """Velocity of the rectified flow, from noisy latents, time and text (SnapGen, section 3.1).

    Stages run from high to low resolution. Each down stage has `layers_per_block` residual blocks, each up stage one
    more; each is followed by a spatial transformer of the stage's depth (0: none). The middle is a residual block, a
    transformer, a residual block.

    Args:
        sample_size: latent height and width that it is trained at. Other sizes work: RoPE tables follow the input.
        in_channels: latent channels.
        channels: width of each stage.
        num_heads: query heads of each stage; `head_dim` wide each.
        transformer_layers_down, transformer_layers_up: transformer blocks after each residual block, per stage in
            the order of `channels` in both.
        self_attention: per stage, whether its transformer blocks have self-attention; the middle follows the last.
        context_dim: channels of the text tokens.
        pooled_dim: width of the pooled text embedding added to the time embedding; None for none.
        temb_dim: width of the time embedding.
        conv: "expanded" (separable, twice as wide in the middle), "separable", or "dense".
        kv_heads: "one" for multi-query attention, "all" for multi-head.
        qk_norm: RMSNorm of queries and keys. rope: 2-D RoPE in self-attention.
        norm_groups: groups of every GroupNorm.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        *,
        sample_size: int,
        in_channels: int,
        channels: tuple[int, ...],
        num_heads: tuple[int, ...],
        context_dim: int,
        head_dim: int = 64,
        layers_per_block: int = 2,
        transformer_layers_down: tuple[int, ...] = (1, 2, 4),
        transformer_layers_mid: int = 4,
        transformer_layers_up: tuple[int, ...] = (0, 2, 4),
        self_attention: tuple[bool, ...] = (False, False, True),
        ff_ratio: float = 3,
        temb_dim: int = 256,
        pooled_dim: int | None = None,
        conv: str = "expanded",
        kv_heads: str = "one",
        qk_norm: bool = True,
        rope: bool = True,
        norm_groups: int = 32,
    ) -> None:
        super().__init__()
        per_stage = dict(
            num_heads=num_heads,
            transformer_layers_down=transformer_layers_down,
            transformer_layers_up=transformer_layers_up,
            self_attention=self_attention,
        )
        for name, value in per_stage.items():
            if len(value) != len(channels):
                raise ValueError(f"{name}: got {len(value)} entries for the {len(channels)} stages of `channels`")
        if rope and kv_heads != "one":
            raise ValueError("rope: needs kv_heads='one'; RoPE is built on the multi-query path")

        def transformer(stage: int, depth: int) -> nn.Module | None:
            if depth == 0:
                return None
            return SpatialTransformer(
                channels[stage],
                context_dim,
                depth,
                norm_groups=norm_groups,
                num_heads=num_heads[stage],
                head_dim=head_dim,
                self_attention=self_attention[stage],
                ff_ratio=ff_ratio,
                kv_heads=kv_heads,
                qk_norm=qk_norm,
            )

        def res(in_width: int, out_width: int) -> nn.Module:
            return make_res_block(conv, in_width, out_width, temb_dim, norm_groups)

        self.time_proj = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(256, temb_dim)
        self.pooled_embedding = None if pooled_dim is None else TimestepEmbedding(pooled_dim, temb_dim)
        self.conv_in = nn.Conv2d(in_channels, channels[0], 3, padding=1)

        last = len(channels) - 1
        width = channels[0]
        skips = [width]
        self.down: Any = nn.ModuleList()
        for stage, out in enumerate(channels):
            layers = nn.ModuleList()
            for _ in range(layers_per_block):
                layers.append(UNetLayer(res(width, out), transformer(stage, transformer_layers_down[stage])))
                width = out
                skips.append(width)
            sampler = Downsample(width, conv) if stage < last else None
            if sampler is not None:
                skips.append(width)
            self.down.append(UNetStage(layers, sampler))

        self.mid = UNetMid(res(width, width), transformer(last, transformer_layers_mid), res(width, width))

        self.up: Any = nn.ModuleList()  # from the lowest resolution upwards
        for stage in reversed(range(len(channels))):
            layers = nn.ModuleList()
            for _ in range(layers_per_block + 1):
                layers.append(
                    UNetLayer(
                        res(width + skips.pop(), channels[stage]), transformer(stage, transformer_layers_up[stage])
                    )
                )
                width = channels[stage]
            self.up.append(UNetStage(layers, Upsample(width, conv) if stage > 0 else None))

        self.norm_out = GroupNormSiLU(norm_groups, width)
        self.conv_out = nn.Conv2d(width, in_channels, 3, padding=1)
        self.gradient_checkpointing = False

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor | None = None,
        pooled_projections: Tensor | None = None,
        return_dict: bool = True,
    ) -> UNetOutput | tuple[Tensor]:
        """Predict the velocity.

        Args:
            sample: noisy latents [B, in_channels, H, W]; H and W multiples of 2**(stages - 1).
            timestep: 1000 * t with t in [0, 1] (1 is pure noise): a number or [B].
            encoder_hidden_states: text tokens [B, L, context_dim].
            encoder_attention_mask: bool [B, L], True where a token counts.
            pooled_projections: pooled text [B, pooled_dim], needed if and only if the model has `pooled_dim`.

        Raises:
            ValueError: a shape does not fit, or `pooled_projections` is missing or not wanted.
        """
        check_inputs(self.config, sample, encoder_hidden_states, pooled_projections)
        timestep = torch.as_tensor(timestep, device=sample.device).expand(sample.shape[0])
        temb = self.time_embedding(self.time_proj(timestep).to(sample.dtype))
        if self.pooled_embedding is not None and pooled_projections is not None:
            temb = temb + self.pooled_embedding(pooled_projections.to(sample.dtype))

        height, width = sample.shape[-2:]
        ropes = [
            rope_2d(height >> stage, width >> stage, self.config.head_dim, device=sample.device)
            if self.config.rope and self.config.self_attention[stage]
            else None
            for stage in range(len(self.config.channels))
        ]

        context, mask = encoder_hidden_states, encoder_attention_mask
        x = self.conv_in(sample.contiguous(memory_format=torch.channels_last))
        skips = [x]
        for stage, down in enumerate(self.down):
            for layer in down.layers:
                x = self._run(layer, x, temb, context, mask, ropes[stage])
                skips.append(x)
            if down.sampler is not None:
                x = down.sampler(x)
                skips.append(x)
        x = self._run(self.mid, x, temb, context, mask, ropes[-1])
        for up, rope in zip(self.up, reversed(ropes), strict=True):
            for layer in up.layers:
                x = self._run(layer, torch.cat((x, skips.pop()), dim=1), temb, context, mask, rope)
            if up.sampler is not None:
                x = up.sampler(x)
        x = self.conv_out(self.norm_out(x))
        return UNetOutput(sample=x) if return_dict else (x,)

    def _run(self, layer: nn.Module, *args: Any) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(layer, *args)
        return layer(*args)


def check_inputs(config: Any, sample: Tensor, context: Tensor, pooled: Tensor | None) -> None:
    """Refuse what a UNet with this configuration does not take (`SnapGenUNet.forward`).

    Raises:
        ValueError: a shape does not fit, or `pooled` is missing or not wanted.
    """
    if sample.ndim != 4 or sample.shape[1] != config.in_channels:
        raise ValueError(f"sample: got shape {tuple(sample.shape)}; expected [B, {config.in_channels}, H, W]")
    multiple = 1 << (len(config.channels) - 1)
    if sample.shape[2] % multiple or sample.shape[3] % multiple:
        raise ValueError(f"sample: height and width must be multiples of {multiple}, got {tuple(sample.shape[2:])}")
    if context.ndim != 3 or context.shape[2] != config.context_dim or context.shape[0] != sample.shape[0]:
        raise ValueError(
            f"encoder_hidden_states: got shape {tuple(context.shape)}; "
            f"expected [{sample.shape[0]}, L, {config.context_dim}]"
        )
    if (pooled is None) != (config.pooled_dim is None):
        need = "is needed by" if pooled is None else "was given to"
        raise ValueError(f"pooled_projections: {need} a denoiser with pooled_dim={config.pooled_dim}")


class UNetLayer(nn.Module):
    """A residual block and, where the stage has one, a spatial transformer."""

    def __init__(self, res: nn.Module, transformer: nn.Module | None) -> None:
        super().__init__()
        self.res = res
        self.transformer = transformer

    def forward(self, x: Tensor, temb: Tensor, context: Tensor, mask: Tensor | None, rope: Rope | None) -> Tensor:
        x = self.res(x, temb)
        return x if self.transformer is None else self.transformer(x, context, mask, rope)


class UNetMid(nn.Module):
    """The lowest resolution's middle: residual block, transformer, residual block."""

    def __init__(self, res1: nn.Module, transformer: nn.Module | None, res2: nn.Module) -> None:
        super().__init__()
        self.res1 = res1
        self.transformer = transformer
        self.res2 = res2

    def forward(self, x: Tensor, temb: Tensor, context: Tensor, mask: Tensor | None, rope: Rope | None) -> Tensor:
        x = self.res1(x, temb)
        if self.transformer is not None:
            x = self.transformer(x, context, mask, rope)
        return self.res2(x, temb)


class UNetStage(nn.Module):
    """The layers of one resolution and the sampler that leaves it. Its parent calls the parts, to collect the skips."""

    def __init__(self, layers: nn.ModuleList, sampler: nn.Module | None) -> None:
        super().__init__()
        self.layers = layers
        self.sampler = sampler
