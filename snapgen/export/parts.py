"""The parts of a pipeline in the form that is exported: static shapes, fp16 at the borders, engine-friendly inside.

Each is built from the trained module, takes copies of its weights through load hooks (every weight must find its
place), and leaves the trained one as it was. Shapes as in `snapgen.export.modules`; the text encoder is in
`snapgen.export.text`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from snapgen import unet
from snapgen.export import modules as m
from snapgen.export.tools import ExportError
from snapgen_kernels import MultiQueryAttention, SepConv2d, SepResBlock, rope_2d


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


class Denoiser(Part):
    """`SnapGenUNet` for latents of one size.

    Args:
        trained: the denoiser.
        batch: samples per call; 2 for classifier-free guidance in one call, 1 for two calls.
        height, width: of the latents.
        tokens: length of the text context.

    Raises:
        ExportError: it has layers of the ablation ladder (dense convolutions, one KV head per query head).
    """

    file = "Unet.mlpackage"
    about = "SnapGen denoiser: velocity of the rectified flow (noise minus data) for latents, time and text"
    frequencies: Tensor
    down: Any  # stages of layers; ModuleLists, which hide what is in them from the type checker
    up: Any

    def __init__(self, trained: Any, *, batch: int, height: int, width: int, tokens: int) -> None:
        super().__init__()
        config = trained.config
        multiple = 1 << (len(config.channels) - 1)
        if height % multiple or width % multiple:
            raise ExportError(f"latents of {height}x{width}: height and width must be multiples of {multiple}")
        self.conv_in = _conv(trained.conv_in)
        self.time_embedding = _embedding(trained.time_embedding)
        self.pooled_embedding = None if trained.pooled_embedding is None else _embedding(trained.pooled_embedding)
        rope = bool(config.rope)
        self.down = nn.ModuleList(_stage(stage, rope) for stage in trained.down)
        self.mid = _Mid(trained.mid, rope)
        self.up = nn.ModuleList(_stage(stage, rope) for stage in trained.up)
        self.norm_out = _group_norm(trained.norm_out)
        self.conv_out = _conv(trained.conv_out)

        half = trained.time_proj.num_channels // 2
        exponents = torch.arange(half, dtype=torch.float32) / (half - trained.time_proj.downscale_freq_shift)
        frequencies = torch.exp(-math.log(10000.0) * exponents) * trained.time_proj.scale
        self.register_buffer("frequencies", frequencies.reshape(1, -1, 1, 1), persistent=False)
        self.cos_first = trained.time_proj.flip_sin_to_cos
        for stage, attends in enumerate(config.self_attention):
            if rope and attends:
                tables = m.rope_tables(*rope_2d(height >> stage, width >> stage, config.head_dim))
                for name, table in zip(("cos", "sin"), tables, strict=True):
                    self.register_buffer(f"{name}_{stage}", table, persistent=False)
        take_weights(self, trained)

        half_precision = torch.float16
        self.inputs = (
            Feature(
                "sample",
                "Noisy latents [B, C, H, W]; with guidance the unconditional half first",
                torch.zeros(batch, config.in_channels, height, width, dtype=half_precision),
            ),
            # fp16 holds times near 1000 to half a unit only, and the fastest sinusoid turns by a radian per unit.
            Feature("timestep", "1000 * t of each sample [B], t from 1 (noise) to 0", torch.zeros(batch)),
            Feature(
                "encoder_hidden_states",
                "Text tokens, channels first [B, D, 1, L]",
                torch.zeros(batch, config.context_dim, 1, tokens, dtype=half_precision),
            ),
            Feature(
                "encoder_attention_mask",
                "1 where a text token counts, 0 where it is padding [B, 1, 1, L]; at least one 1 per sample",
                torch.ones(batch, 1, 1, tokens, dtype=half_precision),
            ),
        )
        if config.pooled_dim is not None:
            pooled = torch.zeros(batch, config.pooled_dim, dtype=half_precision)
            self.inputs += (Feature("pooled_projections", "Pooled text [B, P]", pooled),)
        self.outputs = (("velocity", "Predicted velocity [B, C, H, W]"),)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor,
        pooled_projections: Tensor | None = None,
    ) -> Tensor:
        angles = timestep.reshape(-1, 1, 1, 1) * self.frequencies
        waves = (torch.cos(angles), torch.sin(angles))
        temb = self.time_embedding(torch.cat(waves if self.cos_first else waves[::-1], dim=1))
        if self.pooled_embedding is not None and pooled_projections is not None:
            pooled = pooled_projections.float().reshape(*pooled_projections.shape, 1, 1)
            temb = temb + self.pooled_embedding(pooled)
        temb = m.silu(temb)
        context = encoder_hidden_states.float()
        bias = ((1.0 - encoder_attention_mask.float()) * m.MASKED).permute(0, 3, 1, 2)  # [B, L, 1, 1]

        x = self.conv_in(sample.float())
        skips = [x]
        for stage, down in enumerate(self.down):
            for layer in down.layers:
                x = layer(x, temb, context, bias, self._rope(stage))
                skips.append(x)
            if down.sampler is not None:
                x = down.sampler(x)
                skips.append(x)
        last = len(self.down) - 1
        x = self.mid(x, temb, context, bias, self._rope(last))
        for index, up in enumerate(self.up):
            for layer in up.layers:
                x = layer(torch.cat((x, skips.pop()), dim=1), temb, context, bias, self._rope(last - index))
            if up.sampler is not None:
                x = up.sampler(x)
        return self.conv_out(m.silu(self.norm_out(x))).half()

    def _rope(self, stage: int) -> tuple[Tensor, Tensor] | None:
        if not hasattr(self, f"cos_{stage}"):
            return None
        return getattr(self, f"cos_{stage}"), getattr(self, f"sin_{stage}")


class Decoder(Part):
    """`TinyDecoder.decode` for latents of one size: takes the denoiser's latents as they are."""

    file = "VAEDecoder.mlpackage"
    about = "SnapGen tiny decoder: the denoiser's latents to a picture"
    stages: Any

    def __init__(self, trained: Any, *, batch: int, height: int, width: int) -> None:
        super().__init__()
        config = trained.config
        self.scaling, self.shift = float(config.scaling_factor), float(config.shift_factor)
        self.conv_in = _conv(trained.conv_in)
        self.stages = nn.ModuleList(nn.ModuleList(map(_decoder_block, stage)) for stage in trained.stages)
        self.upsamplers = nn.ModuleList(map(_sepconv, trained.upsamplers))
        self.norm_out = _group_norm(trained.norm_out)
        self.conv_out = _conv(trained.conv_out)
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


class _Embedding(nn.Module):
    def __init__(self, inputs: int, width: int, outputs: int) -> None:
        super().__init__()
        self.linear_1 = m.Pointwise(inputs, width)
        self.linear_2 = m.Pointwise(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(m.silu(self.linear_1(x)))


class _Sampler(nn.Module):
    def __init__(self, trained: Any) -> None:
        super().__init__()
        self.conv = _sepconv(trained.conv)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class _Layer(nn.Module):
    def __init__(self, trained: Any, rope: bool) -> None:
        super().__init__()
        self.res = _res_block(trained.res)
        self.transformer = None if trained.transformer is None else _transformer(trained.transformer, rope)

    def forward(self, x: Tensor, temb: Tensor, *text: Any) -> Tensor:
        x = self.res(x, temb)
        return x if self.transformer is None else self.transformer(x, *text)


class _Mid(nn.Module):
    def __init__(self, trained: Any, rope: bool) -> None:
        super().__init__()
        self.res1 = _res_block(trained.res1)
        self.transformer = None if trained.transformer is None else _transformer(trained.transformer, rope)
        self.res2 = _res_block(trained.res2)

    def forward(self, x: Tensor, temb: Tensor, *text: Any) -> Tensor:
        x = self.res1(x, temb)
        if self.transformer is not None:
            x = self.transformer(x, *text)
        return self.res2(x, temb)


def _stage(trained: Any, rope: bool) -> unet.UNetStage:
    stages = nn.ModuleList(_Layer(layer, rope) for layer in trained.layers)
    return unet.UNetStage(stages, None if trained.sampler is None else _Sampler(trained.sampler))


def _conv(trained: Any) -> nn.Conv2d:
    sizes = trained.in_channels, trained.out_channels, trained.kernel_size
    return nn.Conv2d(*sizes, padding=trained.padding, bias=trained.bias is not None)


def _embedding(trained: Any) -> _Embedding:
    return _Embedding(trained.linear_1.in_features, trained.linear_1.out_features, trained.linear_2.out_features)


def _group_norm(trained: Any) -> m.GroupNorm:
    return m.GroupNorm(trained.num_groups, trained.num_channels, trained.eps)


def _sepconv(trained: Any) -> m.SepConv:
    if not isinstance(trained, SepConv2d):
        raise ExportError("denoiser: dense samplers are a step of the ablation ladder; exported are separable ones")
    return m.SepConv(
        trained.depthwise.in_channels,
        trained.pointwise.out_channels,
        stride=trained.stride,
        upsample=trained.upsample,
        dw_bias=trained.depthwise.bias is not None,
    )


def _res_block(trained: Any) -> m.ResBlock:
    if not isinstance(trained, SepResBlock):
        raise ExportError("denoiser: dense blocks are a step of the ablation ladder; exported are separable ones")
    return m.ResBlock(
        trained.norm1.num_channels,
        trained.conv2.pointwise.out_channels,
        trained.norm2.num_channels,
        trained.time_emb_proj.in_features,
        trained.norm1.num_groups,
        trained.norm1.eps,
    )


def _decoder_block(trained: Any) -> m.DecoderBlock:
    norm = trained.norm
    return m.DecoderBlock(trained.depthwise1.in_channels, norm.num_channels, norm.num_groups, norm.eps)


def _attention(trained: Any, rope: bool) -> m.Attention:
    if not isinstance(trained, MultiQueryAttention):
        raise ExportError("denoiser: kv_heads='all' is a step of the ablation ladder; exported is kv_heads='one'")
    return m.Attention(
        trained.to_q.in_features,
        trained.to_k.in_features,
        trained.num_heads,
        trained.head_dim,
        qk_norm=trained.norm_q is not None,
        rope=rope,
        eps=trained.eps,
    )


def _transformer(trained: Any, rope: bool) -> m.SpatialTransformer:
    blocks = []
    for block in trained.blocks:
        own = None if block.attn1 is None else _attention(block.attn1, rope)
        proj = block.ff.proj_in
        ff = m.GEGLU(proj.in_features, block.ff.proj_out.in_features, bias=proj.bias is not None)
        blocks.append(m.TransformerBlock(own, _attention(block.attn2, False), ff, proj.in_features, block.norm2.eps))
    return m.SpatialTransformer(trained.norm.num_channels, trained.norm.num_groups, trained.norm.eps, blocks)


def take_weights(part: Part, trained: nn.Module, sliced: dict[str, int] | None = None) -> None:
    """Copy the trained weights, in fp32 on the CPU; every one must be taken. `sliced` keeps the first rows of some."""
    weights = {name: tensor.detach().to("cpu", torch.float32) for name, tensor in trained.state_dict().items()}
    for name, rows in (sliced or {}).items():
        weights[name] = weights[name][:rows]
    part.load_state_dict(weights)
    part.requires_grad_(False).eval()
