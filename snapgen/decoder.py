"""The tiny decoder (SnapGen, section 3.2) and, for models whose latents are our own, an encoder of the same blocks.

The decoder has no attention, one GroupNorm a block, separable convolutions, fewer blocks at high resolution, and no
convolution in any shortcut: a stage keeps its width, and the upsampler that leaves it changes channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from snapgen_kernels import DecoderBlock, GroupNormSiLU, Norm, SepConv2d, malloc_keeps_pages
from snapgen_kernels.decoding import apply_block, norm_silu_conv, runs_directly

Progress = Callable[[int, int], None]


def _check_stages(channels: tuple[int, ...], blocks: tuple[int, ...]) -> None:
    if len(channels) != len(blocks):
        raise ValueError(f"blocks: got {len(blocks)} entries for the {len(channels)} stages of `channels`")


def _block(width: int, expansion: int, norm_groups: int) -> DecoderBlock:
    # A width such as 112 does not divide into 32 groups; the largest count that both allow then stands in.
    return DecoderBlock(width, expansion=expansion, num_groups=math.gcd(norm_groups, expansion * width))


class TinyDecoder(ModelMixin, ConfigMixin):
    """Latents [B, latent_channels, H, W] to pictures [B, 3, 8H, 8W] in [-1, 1] (8 for four stages).

    Args:
        latent_channels: 16 for SD3's latents.
        channels: width of each stage, from low to high resolution.
        blocks: residual blocks of each stage.
        expansion: width of a block's middle over its width.
        scaling_factor, shift_factor: a latent z of the autoencoder enters the denoiser as
            (z - shift_factor) * scaling_factor; `decode` undoes that.
    """

    gathered_whole = True  # under FSDP2: blocks are applied without being called

    @register_to_config
    def __init__(
        self,
        *,
        latent_channels: int = 16,
        channels: tuple[int, ...] = (160, 160, 128, 128),
        blocks: tuple[int, ...] = (4, 2, 2, 1),
        expansion: int = 3,
        norm_groups: int = 32,
        scaling_factor: float = 1.0,
        shift_factor: float = 0.0,
    ) -> None:
        super().__init__()
        _check_stages(channels, blocks)
        self.conv_in = nn.Conv2d(latent_channels, channels[0], 3, padding=1)
        self.stages: Any = nn.ModuleList(
            nn.ModuleList(_block(width, expansion, norm_groups) for _ in range(depth))
            for width, depth in zip(channels, blocks, strict=True)
        )
        self.upsamplers = nn.ModuleList(
            SepConv2d(width, following, upsample=True, dw_bias=True)
            for width, following in zip(channels[:-1], channels[1:], strict=True)
        )
        self.norm_out = GroupNormSiLU(math.gcd(norm_groups, channels[-1]), channels[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(channels[-1], 3, 3, padding=1)

    @property
    def upscale(self) -> int:
        """Pixels per latent cell along a side."""
        return 1 << len(self.upsamplers)

    def forward(self, latents: Tensor) -> Tensor:
        """Decode unscaled latents [B, latent_channels, H, W] to pictures [B, 3, upscale*H, upscale*W].

        Raises:
            ValueError: the latents have another number of channels.
        """
        if runs_directly(latents):
            return self._draw(latents)
        x = self._entered(latents)
        for index, stage in enumerate(self.stages):
            for block in stage:
                x = block(x)
            if index < len(self.upsamplers):
                x = self.upsamplers[index](x)
        return self.conv_out(self.norm_out(x))

    @torch.no_grad()
    def decode(self, latents: Tensor, *, low_memory: bool | None = None, progress: Progress | None = None) -> Tensor:
        """Decode the denoiser's latents, without gradients: undo the scaling, then what `forward` computes.

        Args:
            low_memory: compute the blocks' middle images twice rather than hold them. On a CPU: hold about 1.25 images
                of the last stage's width at full size, rather than a third of what plain PyTorch holds (3.3), a little
                slower. None: on a CPU whose malloc gives memory back at once
                (:func:`snapgen_kernels.malloc_keeps_pages`); page faults then cost more than computing twice.
            progress: called with (done, total), multiply-accumulates of the decoder, as the work advances.
        """
        unscaled = latents / self.config.scaling_factor + self.config.shift_factor
        return self._draw(unscaled, low_memory=low_memory, progress=progress)

    def _entered(self, latents: Tensor) -> Tensor:
        if latents.ndim != 4 or latents.shape[1] != self.config.latent_channels:
            raise ValueError(
                f"latents: got shape {tuple(latents.shape)}; expected [B, {self.config.latent_channels}, H, W]"
            )
        return self.conv_in(latents.contiguous(memory_format=torch.channels_last))

    def _norm(self) -> Norm:
        return Norm(self.norm_out.num_groups, self.norm_out.weight, self.norm_out.bias, self.norm_out.eps)

    def _draw(self, latents: Tensor, *, low_memory: bool | None = None, progress: Progress | None = None) -> Tensor:
        """What `forward` computes, without gradients: the last block leaves the statistics of the norm after it, and on
        a CPU every block writes over its input."""
        x, norm = self._entered(latents), self._norm()
        parts: list[tuple[nn.Module, int]] = []  # with the multiply-accumulates of each
        pixels = x.shape[0] * x.shape[2] * x.shape[3]
        for index, stage in enumerate(self.stages):
            parts += [(block, pixels * _weights(block)) for block in stage]
            if index < len(self.upsamplers):
                pixels *= 4
                parts.append((self.upsamplers[index], pixels * _weights(self.upsamplers[index])))
        total = sum(macs for _, macs in parts) + pixels * _weights(self.conv_out)
        # In images of the last width. Low memory: the last upsampler's input and output, which nothing can do without.
        # Otherwise a third of plain PyTorch, whose last block holds its input and three middle images at once.
        on_cpu = x.device.type == "cpu"
        if low_memory is None:
            low_memory = on_cpu and not malloc_keeps_pages()
        images = 5 / 4 if low_memory else (1 + 3 * self.config.expansion) / 3
        budget = int(images * pixels * self.config.channels[-1] * x.element_size()) if on_cpu else 0
        done, statistics = 0, None
        for index, (part, macs) in enumerate(parts):
            if isinstance(part, DecoderBlock):
                x, statistics = apply_block(
                    part,
                    x,
                    memory=max(0, budget - x.numel() * x.element_size()) if on_cpu or low_memory else None,
                    next_norm=norm if index + 1 == len(parts) else None,
                    progress=_share_of(progress, done, macs, total),
                )
            else:
                x, statistics = part(x), None
            done += macs
            if progress is not None:
                progress(done, total)
        assert self.conv_out.bias is not None
        pictures = norm_silu_conv(x, norm, self.conv_out.weight, self.conv_out.bias, statistics=statistics)
        if progress is not None:
            progress(total, total)
        return pictures


def _weights(module: nn.Module) -> int:
    """Weights of the convolutions: the multiply-accumulates of a pixel."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.ndim == 4)


def _share_of(progress: Progress | None, done: int, macs: int, total: int) -> Callable[[float], None] | None:
    return None if progress is None else lambda share: progress(done + int(share * macs), total)


class TinyEncoder(ModelMixin, ConfigMixin):
    """Pictures [B, 3, 8H, 8W] in [-1, 1] to latents [B, latent_channels, H, W] for the `tiny` preset.

    The mirror of `TinyDecoder`: `channels` and `blocks` run from low to high resolution here too. The first convolution
    takes two strides of 2 at once, since most of the cost of an encoder is in its full-resolution layers.
    """

    gathered_whole = True  # under FSDP2: blocks are applied without being called

    @register_to_config
    def __init__(
        self,
        *,
        latent_channels: int = 8,
        channels: tuple[int, ...] = (96, 64),
        blocks: tuple[int, ...] = (2, 2),
        expansion: int = 2,
        norm_groups: int = 16,
    ) -> None:
        super().__init__()
        _check_stages(channels, blocks)
        widths = channels[::-1]
        self.conv_in = nn.Conv2d(3, widths[0], 8, stride=4, padding=2)
        self.stages: Any = nn.ModuleList(
            nn.ModuleList(_block(width, expansion, norm_groups) for _ in range(depth))
            for width, depth in zip(widths, blocks[::-1], strict=True)
        )
        self.downsamplers = nn.ModuleList(
            SepConv2d(width, following, stride=2, dw_bias=True)
            for width, following in zip(widths[:-1], widths[1:], strict=True)
        )
        self.norm_out = GroupNormSiLU(math.gcd(norm_groups, widths[-1]), widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], latent_channels, 3, padding=1)

    def forward(self, pictures: Tensor) -> Tensor:
        """Encode pictures [B, 3, H, W]; H and W multiples of the downscale (8 for two stages)."""
        multiple = 4 << len(self.downsamplers)
        if pictures.ndim != 4 or pictures.shape[1] != 3 or pictures.shape[2] % multiple or pictures.shape[3] % multiple:
            raise ValueError(
                f"pictures: got shape {tuple(pictures.shape)}; expected [B, 3, H, W], H and W multiples of {multiple}"
            )
        x = self.conv_in(pictures.contiguous(memory_format=torch.channels_last))
        for index, stage in enumerate(self.stages):
            for block in stage:
                x = block(x)
            if index < len(self.downsamplers):
                x = self.downsamplers[index](x)
        return self.conv_out(self.norm_out(x))
