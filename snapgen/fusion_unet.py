"""SnapFusion's denoiser: Stable Diffusion's UNet as lists of blocks, so that single ones can be left out or added.

A layer is written as its blocks in order, R for a residual block and A for a cross-attention block (self-attention,
cross-attention, feed-forward): "RA", "RAA", "R", or "" for one that passes its input on. A down layer ends in a skip
connection; an up layer begins with one, which its R reads beside the input, and which is dropped where it has no R.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin, Transformer2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.downsampling import Downsample2D
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from snapgen.unet import UNetOutput, check_inputs


@dataclass(frozen=True)
class Place:
    """One block: its kind (R or A), the stage that it stands in, and its widths."""

    kind: str
    stage: int
    """0 is the highest resolution; the middle has the last stage's."""
    width_in: int
    """Channels of its input, without a skip."""
    width_skip: int
    """Channels of the skip that it reads, or 0."""
    width_out: int

    @property
    def skippable(self) -> bool:
        """Whether the identity can stand in for it: an R that changes the width cannot be left out."""
        return self.width_in == self.width_out

    @property
    def repeatable(self) -> bool:
        """Whether a copy can follow it: not where it reads a skip, which there is one of."""
        return self.skippable and not self.width_skip


class FusionUNet(ModelMixin, ConfigMixin):
    """Velocity v = a eps - s x of a variance-preserving diffusion (`snapgen.vp`) from noisy latents, time and text
    (SnapFusion, section 3.1). Called like `SnapGenUNet`.

    Args:
        sample_size: latent height and width that it is trained at.
        in_channels: latent channels.
        channels: width of each stage, from high to low resolution.
        down: the layers of each stage, in the order of `channels`, on the way down.
        mid: the middle's blocks.
        up: the layers of each stage, from low to high resolution; each stage has one more than on the way down.
        num_heads: of the attention in every stage.
        context_dim: channels of the text tokens.
        pooled_dim: width of the pooled text embedding added to the time embedding; None for none, as in SD.
        norm_groups: groups of every GroupNorm.

    Attributes:
        places: every block by its module's path.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        *,
        sample_size: int,
        in_channels: int,
        channels: tuple[int, ...],
        down: tuple[tuple[str, ...], ...],
        mid: str,
        up: tuple[tuple[str, ...], ...],
        context_dim: int,
        num_heads: int = 8,
        pooled_dim: int | None = None,
        norm_groups: int = 32,
    ) -> None:
        super().__init__()
        _check_layers(channels, down, mid, up)
        temb_dim = 4 * channels[0]
        last = len(channels) - 1
        places: dict[str, Place] = {}

        def layer(path: str, blocks: str, stage: int, width: int, skip: int = 0) -> FusionLayer:
            out, built = channels[stage], []
            for index, kind in enumerate(blocks):
                skip_here = skip if index == 0 and kind == "R" else 0
                if kind == "A" and width != out:
                    raise ValueError(f"{path}: got {blocks!r}; must begin with R, for it changes {width} to {out}")
                places[f"{path}.blocks.{index}"] = Place(kind, stage, width, skip_here, out)
                if kind == "R":
                    built.append(_res(width + skip_here, out, temb_dim, norm_groups))
                else:
                    built.append(_attention(out, num_heads, context_dim, norm_groups))
                width = out
            if width != out:
                raise ValueError(f"{path}: got {blocks!r}; must begin with R, for it changes {width} to {out}")
            return FusionLayer(built)

        self.time_proj = Timesteps(channels[0], flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(channels[0], temb_dim)
        self.pooled_embedding = None if pooled_dim is None else TimestepEmbedding(pooled_dim, temb_dim)
        self.conv_in = nn.Conv2d(in_channels, channels[0], 3, padding=1)

        width, skips = channels[0], [channels[0]]
        self.down_stages: Any = nn.ModuleList()
        for stage, out in enumerate(channels):
            layers = []
            for index, blocks in enumerate(down[stage]):
                layers.append(layer(f"down_stages.{stage}.layers.{index}", blocks, stage, width))
                width = out
                skips.append(out)
            sampler = None
            if stage < last:
                sampler = Downsample2D(width, use_conv=True, out_channels=width, padding=1, name="op")
                skips.append(width)
            self.down_stages.append(FusionStage(layers, sampler))

        self.middle: Any = layer("middle", mid, last, width)

        self.up_stages: Any = nn.ModuleList()
        for turn, stage in enumerate(reversed(range(len(channels)))):
            layers = []
            for index, blocks in enumerate(up[turn]):
                layers.append(layer(f"up_stages.{turn}.layers.{index}", blocks, stage, width, skips.pop()))
                width = channels[stage]
            self.up_stages.append(
                FusionStage(layers, Upsample2D(width, use_conv=True, out_channels=width) if stage > 0 else None)
            )

        self.norm_out = nn.GroupNorm(norm_groups, width, eps=1e-5)
        self.conv_out = nn.Conv2d(width, in_channels, 3, padding=1)
        self.gradient_checkpointing = False
        self.places = places
        self.skipped: frozenset[str] = frozenset()

    @contextmanager
    def without(self, names: Iterable[str]) -> Iterator[None]:
        """While open, the identity stands in for these blocks (SnapFusion, equation 5).

        Raises:
            ValueError: one of them is no block of this net, or changes the width.
        """
        skipped = frozenset(names)
        for name in sorted(skipped):
            if name not in self.places:
                raise ValueError(f"names: got {name!r}; must be one of {', '.join(self.places)}")
            if not self.places[name].skippable:
                raise ValueError(f"names: got {name!r}, which changes the width; the identity cannot stand in for it")
        before, self.skipped = self.skipped, skipped
        try:
            yield
        finally:
            self.skipped = before

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
            timestep: 0 to 999, the noisiest: a number or [B].
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
        text = (encoder_hidden_states, encoder_attention_mask)

        x = self.conv_in(sample.contiguous(memory_format=torch.channels_last))
        skips = [x]
        for stage, down in enumerate(self.down_stages):
            for index, layer in enumerate(down.layers):
                x = self._run(f"down_stages.{stage}.layers.{index}", layer, x, None, temb, text)
                skips.append(x)
            if down.sampler is not None:
                x = down.sampler(x)
                skips.append(x)
        x = self._run("middle", self.middle, x, None, temb, text)
        for stage, up in enumerate(self.up_stages):
            for index, layer in enumerate(up.layers):
                x = self._run(f"up_stages.{stage}.layers.{index}", layer, x, skips.pop(), temb, text)
            if up.sampler is not None:
                x = up.sampler(x)
        x = self.conv_out(nn.functional.silu(self.norm_out(x)))
        return UNetOutput(sample=x) if return_dict else (x,)

    def _run(
        self,
        path: str,
        layer: nn.Module,
        x: Tensor,
        skip: Tensor | None,
        temb: Tensor,
        text: tuple[Tensor, Tensor | None],
    ) -> Tensor:
        for index, block in enumerate(layer.blocks):  # type: ignore[arg-type]
            if f"{path}.blocks.{index}" in self.skipped:
                continue
            if isinstance(block, ResnetBlock2D):
                joined = torch.cat((x, skip), dim=1) if index == 0 and skip is not None else x
                if self.gradient_checkpointing and torch.is_grad_enabled():
                    x = self._gradient_checkpointing_func(block, joined, temb)
                else:
                    x = block(joined, temb)
            else:  # diffusers' transformer does its own checkpointing
                context, mask = text
                x = block(x, encoder_hidden_states=context, encoder_attention_mask=mask, return_dict=False)[0]
        return x


class FusionLayer(nn.Module):
    """The blocks between two skips. The net calls them, for some may be left out."""

    def __init__(self, blocks: Iterable[nn.Module]) -> None:
        super().__init__()
        self.blocks: Any = nn.ModuleList(blocks)


class FusionStage(nn.Module):
    """The layers of one resolution and the sampler that leaves it."""

    def __init__(self, layers: Iterable[nn.Module], sampler: nn.Module | None) -> None:
        super().__init__()
        self.layers: Any = nn.ModuleList(layers)
        self.sampler = sampler


def _res(width: int, out: int, temb_dim: int, groups: int) -> ResnetBlock2D:
    return ResnetBlock2D(in_channels=width, out_channels=out, temb_channels=temb_dim, groups=groups, eps=1e-5)


def _attention(width: int, heads: int, context_dim: int, groups: int) -> Transformer2DModel:
    return Transformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=width // heads,
        in_channels=width,
        num_layers=1,
        cross_attention_dim=context_dim,
        norm_num_groups=groups,
    )


def _check_layers(
    channels: tuple[int, ...], down: tuple[tuple[str, ...], ...], mid: str, up: tuple[tuple[str, ...], ...]
) -> None:
    for name, stages in (("down", down), ("up", up)):
        if len(stages) != len(channels):
            raise ValueError(f"{name}: got {len(stages)} stages; must be the {len(channels)} of `channels`")
        form = r"[RA]*" if name == "down" else r"R?A*"
        for stage, layers in enumerate(stages):
            for layer in layers:
                if not re.fullmatch(form, layer):
                    wanted = "blocks R and A" if name == "down" else "at most one R, then A"
                    raise ValueError(f"{name}: got the layer {layer!r} in stage {stage}; must be {wanted}")
    if not re.fullmatch(r"[RA]*", mid):
        raise ValueError(f"mid: got {mid!r}; must be blocks R and A")
    for stage, (coming, leaving) in enumerate(zip(down, reversed(up), strict=True)):
        if len(leaving) != len(coming) + 1:
            raise ValueError(
                f"up: got {len(leaving)} layers in the stage of {channels[stage]} channels; must be {len(coming) + 1}, "
                f"one for each skip"
            )
