"""The parts of a pipeline in the form that is exported: static shapes, fp16 at the borders, engine-friendly inside.

Each is built from the trained module, takes copies of its weights through load hooks (every weight must find its
place), and leaves the trained one as it was. Shapes as in `snapgen.export.modules`; the denoiser is in
`snapgen.export.denoiser`, the text encoder in `snapgen.export.text`.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from snapgen.export import modules as m
from snapgen.export.tools import ExportError
from snapgen_kernels import SepConv2d


@dataclass(frozen=True)
class Feature:
    """One input or output of an exported part: its name, what it holds, and an example that fixes shape and dtype."""

    name: str
    about: str
    example: Tensor


class Part(nn.Module):
    """What the exporter needs to know of a part besides how to run it.

    Attributes:
        file: name of its package; Apple's ml-stable-diffusion looks for the same names.
        about: one sentence for the package's metadata.
        inputs: in the order of `forward`'s arguments, under their names.
        outputs: name and meaning, in order.
    """

    file: str
    about: str
    inputs: tuple[Feature, ...]
    outputs: tuple[tuple[str, str], ...]

    def converting(self) -> contextlib.AbstractContextManager[None]:
        """What is different about the part while it is converted; nothing of it stays."""
        return contextlib.nullcontext()

    def arguments(self) -> dict[str, Tensor]:
        """Examples of the inputs, as `forward` takes them by name."""
        return {feature.name: feature.example for feature in self.inputs}


class Decoder(Part):
    """`TinyDecoder.decode` for latents of one size: takes the denoiser's latents as they are."""

    file = "VAEDecoder.mlpackage"
    about = "SnapGen tiny decoder: the denoiser's latents to a picture"
    stages: Any

    def __init__(self, trained: Any, *, batch: int, height: int, width: int) -> None:
        super().__init__()
        config = trained.config
        self.scaling, self.shift = float(config.scaling_factor), float(config.shift_factor)
        self.conv_in = conv(trained.conv_in)
        self.stages = nn.ModuleList(nn.ModuleList(map(_decoder_block, stage)) for stage in trained.stages)
        self.upsamplers = nn.ModuleList(map(sepconv, trained.upsamplers))
        self.norm_out = group_norm(trained.norm_out)
        self.conv_out = conv(trained.conv_out)
        take_weights(self, trained)
        z = torch.zeros(batch, config.latent_channels, height, width, dtype=torch.float16)
        self.inputs = (Feature("z", "Latents as the denoiser leaves them [B, C, H, W]", z),)
        self.outputs = (("image", f"Pictures [B, 3, {trained.upscale}H, {trained.upscale}W], -1 to 1, not clipped"),)

    def forward(self, z: Tensor) -> Tensor:
        x = z.float()
        if self.scaling != 1.0:
            x = x * (1.0 / self.scaling)
        if self.shift != 0.0:
            x = x + self.shift
        x = self.conv_in(x)
        for index, stage in enumerate(self.stages):
            for block in stage:
                x = block(x)
            if index < len(self.upsamplers):
                x = self.upsamplers[index](x)
        return self.conv_out(m.silu(self.norm_out(x))).half()


def conv(trained: Any) -> nn.Conv2d:
    sizes = trained.in_channels, trained.out_channels, trained.kernel_size
    return nn.Conv2d(*sizes, padding=trained.padding, bias=trained.bias is not None)


def group_norm(trained: Any) -> m.GroupNorm:
    return m.GroupNorm(trained.num_groups, trained.num_channels, trained.eps)


def sepconv(trained: Any) -> m.SepConv:
    if not isinstance(trained, SepConv2d):
        raise ExportError("denoiser: dense samplers are a step of the ablation ladder; exported are separable ones")
    return m.SepConv(
        trained.depthwise.in_channels,
        trained.pointwise.out_channels,
        stride=trained.stride,
        upsample=trained.upsample,
        dw_bias=trained.depthwise.bias is not None,
    )


def _decoder_block(trained: Any) -> m.DecoderBlock:
    norm = trained.norm
    return m.DecoderBlock(trained.depthwise1.in_channels, norm.num_channels, norm.num_groups, norm.eps)


def take_weights(
    part: Part, trained: nn.Module, sliced: dict[str, int] | None = None, left_out: str | None = None
) -> None:
    """Copy the trained weights, in fp32 on the CPU; every one must be taken, but those that start with `left_out`.

    `sliced` keeps the first rows of some.
    """
    weights = {
        name: tensor.detach().to("cpu", torch.float32)
        for name, tensor in trained.state_dict().items()
        if left_out is None or not name.startswith(left_out)
    }
    for name, rows in (sliced or {}).items():
        weights[name] = weights[name][:rows]
    part.load_state_dict(weights)
    part.requires_grad_(False).eval()
