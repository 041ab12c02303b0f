"""The denoiser in the form that is exported, whole or cut in two; see `snapgen.export.parts`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from snapgen import unet
from snapgen.export import modules as m
from snapgen.export.parts import Feature, Part, conv, group_norm, sepconv, take_weights
from snapgen.export.tools import ExportError
from snapgen.sampler import set_steps
from snapgen_kernels import MultiQueryAttention, SepResBlock, rope_2d


class State(NamedTuple):
    """What goes from one unit of the denoiser to the next."""

    x: Tensor  # [B, C, H, W]
    temb: Tensor  # SiLU of the time embedding, [B, T, 1, 1]
    skips: tuple[Tensor, ...]  # that the upper half still has to take, last one first


@dataclass(frozen=True)
class Unit:
    """A layer or sampler. `side`: "down" keeps its output for the upper half, "up" takes one of those."""

    side: str
    path: str  # of the module, in the trained denoiser as in the exported one
    module: nn.Module
    rope: tuple[Tensor, Tensor] | None

    def __call__(self, state: State, text: tuple[Tensor, Tensor]) -> State:
        x, temb, skips = state
        if self.side == "up":
            x, skips = torch.cat((x, skips[-1]), dim=1), skips[:-1]
        x = self.module(x) if isinstance(self.module, _Sampler) else self.module(x, temb, *text, self.rope)
        return State(x, temb, (*skips, x) if self.side == "down" else skips)


class _Ends(Part):
    """What stands before the denoiser's first unit and after its last one."""

    conv_in: nn.Conv2d
    time_embedding: _Embedding | None
    pooled_embedding: _Embedding | None
    frequencies: Tensor
    cos_first: bool
    norm_out: m.GroupNorm
    conv_out: nn.Conv2d

    def begin(self, inputs: Mapping[str, Tensor]) -> State:
        """What the first unit takes, of the part's inputs."""
        if self.time_embedding is None:
            temb = inputs["time_embedding"].float().permute(0, 3, 1, 2)
        else:
            angles = inputs["timestep"].reshape(-1, 1, 1, 1) * self.frequencies
            waves = (torch.cos(angles), torch.sin(angles))
            temb = self.time_embedding(torch.cat(waves if self.cos_first else waves[::-1], dim=1))
        if self.pooled_embedding is not None:
            pooled = inputs["pooled_projections"]
            temb = temb + self.pooled_embedding(pooled.float().reshape(*pooled.shape, 1, 1))
        x = self.conv_in(inputs["sample"].float())
        return State(x, m.silu(temb), (x,))

    def end(self, state: State) -> Tensor:
        """The velocity, of what the last unit left."""
        return self.conv_out(m.silu(self.norm_out(state.x))).half()


def text_of(inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The context [B, D, 1, L], and what is added to scores, [B, L, 1, 1]."""
    bias = ((1.0 - inputs["encoder_attention_mask"].float()) * m.MASKED).permute(0, 3, 1, 2)
    return inputs["encoder_hidden_states"].float(), bias


class Denoiser(_Ends):
    """`SnapGenUNet` for latents of one size.

    Args:
        trained: the denoiser.
        batch: samples per call; 2 for classifier-free guidance in one call, 1 for two calls.
        height, width: of the latents.
        tokens: length of the text context.
        scheduled: take the embedding of a time (`time_embedding`), known beforehand for every step of a schedule,
            instead of the time itself, whose sines and cosines the Neural Engine does not compute in fp32.
        query_chunk: attend with at most this many queries at a time; None takes all.

    Raises:
        ExportError: it has layers of the ablation ladder (dense convolutions, one KV head per query head).
    """

    file = "Unet.mlpackage"
    about = "SnapGen denoiser: velocity of the rectified flow (noise minus data) for latents, time and text"
    frequencies: Tensor
    down: Any  # stages of layers; ModuleLists, which hide what is in them from the type checker
    up: Any

    def __init__(
        self,
        trained: Any,
        *,
        batch: int,
        height: int,
        width: int,
        tokens: int,
        scheduled: bool = False,
        query_chunk: int | None = None,
    ) -> None:
        super().__init__()
        config = trained.config
        multiple = 1 << (len(config.channels) - 1)
        if height % multiple or width % multiple:
            raise ExportError(f"latents of {height}x{width}: height and width must be multiples of {multiple}")
        self.conv_in = conv(trained.conv_in)
        self.time_embedding = None if scheduled else _embedding(trained.time_embedding)
        self.pooled_embedding = None if trained.pooled_embedding is None else _embedding(trained.pooled_embedding)
        rope = bool(config.rope)
        self.down = nn.ModuleList(_stage(stage, rope, query_chunk) for stage in trained.down)
        self.mid = _Mid(trained.mid, rope, query_chunk)
        self.up = nn.ModuleList(_stage(stage, rope, query_chunk) for stage in trained.up)
        self.norm_out = group_norm(trained.norm_out)
        self.conv_out = conv(trained.conv_out)

        self.register_buffer("frequencies", frequencies(trained.time_proj).reshape(1, -1, 1, 1), persistent=False)
        self.cos_first = trained.time_proj.flip_sin_to_cos
        for stage, attends in enumerate(config.self_attention):
            if rope and attends:
                tables = m.rope_tables(*rope_2d(height >> stage, width >> stage, config.head_dim))
                for name, table in zip(("cos", "sin"), tables, strict=True):
                    self.register_buffer(f"{name}_{stage}", table, persistent=False)
        take_weights(self, trained, left_out="time_embedding." if scheduled else None)

        half_precision = torch.float16
        # fp16 holds times near 1000 to half a unit only, and the fastest sinusoid turns by a radian per unit.
        time = Feature("timestep", "1000 * t of each sample [B], t from 1 (noise) to 0", torch.zeros(batch))
        if scheduled:
            embedding = torch.zeros(1, 1, 1, trained.time_embedding.linear_2.out_features, dtype=half_precision)
            time = Feature(
                "time_embedding", "The step's row of `time_embedding` in Schedule.json [1, 1, 1, T]", embedding
            )
        self.inputs = (
            Feature(
                "sample",
                "Noisy latents [B, C, H, W]; with guidance the unconditional half first",
                torch.zeros(batch, config.in_channels, height, width, dtype=half_precision),
            ),
            time,
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

    def forward(self, **inputs: Tensor) -> Tensor:
        state, text = self.begin(inputs), text_of(inputs)
        for unit in self.units():
            state = unit(state, text)
        return self.end(state)

    def units(self) -> list[Unit]:
        """Layers and samplers in the order in which they run."""
        found = []
        last = len(self.down) - 1
        for index, down in enumerate(self.down):
            path, rope = f"down.{index}", self._rope(index)
            found += [Unit("down", f"{path}.layers.{place}", layer, rope) for place, layer in enumerate(down.layers)]
            if down.sampler is not None:
                found.append(Unit("down", f"{path}.sampler", down.sampler, None))
        found.append(Unit("mid", "mid", self.mid, self._rope(last)))
        for index, up in enumerate(self.up):
            path, rope = f"up.{index}", self._rope(last - index)
            found += [Unit("up", f"{path}.layers.{place}", layer, rope) for place, layer in enumerate(up.layers)]
            if up.sampler is not None:
                found.append(Unit("mid", f"{path}.sampler", up.sampler, None))
        return found

    def _rope(self, stage: int) -> tuple[Tensor, Tensor] | None:
        if not hasattr(self, f"cos_{stage}"):
            return None
        return getattr(self, f"cos_{stage}"), getattr(self, f"sin_{stage}")


def frequencies(time_proj: Any) -> Tensor:
    """Of the sinusoids of diffusers' `Timesteps`: [half], radians per unit of time."""
    half = time_proj.num_channels // 2
    exponents = torch.arange(half, dtype=torch.float32) / (half - time_proj.downscale_freq_shift)
    return torch.exp(-math.log(10000.0) * exponents) * time_proj.scale


@torch.no_grad()
def time_embeddings(trained: Any, timesteps: Tensor) -> Tensor:
    """The denoiser's embeddings [N, T] of times [N] from 0 to 1000, in fp32: what a scheduled denoiser takes."""
    angles = timesteps.float().cpu()[:, None] * frequencies(trained.time_proj)
    halves = (torch.cos(angles), torch.sin(angles))
    waves = torch.cat(halves if trained.time_proj.flip_sin_to_cos else halves[::-1], dim=1)
    first, second = trained.time_embedding.linear_1, trained.time_embedding.linear_2
    hidden = m.silu(nn.functional.linear(waves, first.weight.float().cpu(), first.bias.float().cpu()))
    return nn.functional.linear(hidden, second.weight.float().cpu(), second.bias.float().cpu())


def schedule(pipe: Any, steps: int) -> dict[str, Any]:
    """What an app needs to take `steps` Euler steps with a scheduled denoiser; plain values.

    Keys: `timesteps` [N], `sigmas` [N + 1], the last 0: step i moves the latents by (sigmas[i + 1] - sigmas[i]) times
    the velocity; `time_embedding` [N][T], a row a step.
    """
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)  # the pipeline's own keeps its steps
    timesteps = set_steps(scheduler, steps, "cpu")
    return {
        "timesteps": timesteps.tolist(),
        "sigmas": scheduler.sigmas.tolist(),
        "time_embedding": time_embeddings(pipe.denoiser, timesteps).tolist(),
    }


class DenoiserChunk(_Ends):
    """The first or the second of two packages that make the denoiser, for phones that cannot load it whole.

    The cut lies between units, where both have about as many weights. The first hands on the hidden state, the time
    embedding and what the upper half still takes of the lower; names of what is handed on are the same on both sides.

    Args:
        whole: the denoiser; the chunk shares its layers.
        second: which of the two.
    """

    def __init__(self, whole: Denoiser, second: bool) -> None:
        super().__init__()
        self.file = f"UnetChunk{2 if second else 1}.mlpackage"
        self.about = f"{whole.about}; {'second' if second else 'first'} half"
        self.second = second
        units = whole.units()
        cut = _middle([sum(p.numel() for p in unit.module.parameters()) for unit in units])
        self.own = units[cut:] if second else units[:cut]
        for unit in self.own:
            _place(self, unit.path, unit.module)
        for index, unit in enumerate(self.own):  # tables that are not registered would not be found in the program
            for name, table in zip(("cos", "sin"), unit.rope or (), strict=False):
                self.register_buffer(f"{name}_{index}", table, persistent=False)

        with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):  # shapes alone
            examples = whole.arguments()
            state, text = whole.begin(examples), text_of(examples)
            for unit in units[:cut]:
                state = unit(state, text)
            shapes = [tuple(value.shape) for value in (state.x, state.temb, *state.skips)]
        names = ("hidden", "temb", *(f"skip_{index}" for index in range(len(state.skips))))
        abouts = ("Hidden state", "SiLU of the time embedding", *("Kept for the upper half",) * len(state.skips))
        between = tuple(
            Feature(name, f"{about}, from the first half to the second", torch.zeros(shape, dtype=torch.float16))
            for name, about, shape in zip(names, abouts, shapes, strict=True)
        )
        if second:
            self.norm_out, self.conv_out = whole.norm_out, whole.conv_out
            self.inputs = (*between, *(f for f in whole.inputs if f.name.startswith("encoder_")))
            self.outputs = whole.outputs
        else:
            self.conv_in, self.cos_first = whole.conv_in, whole.cos_first
            self.time_embedding, self.pooled_embedding = whole.time_embedding, whole.pooled_embedding
            self.register_buffer("frequencies", whole.frequencies, persistent=False)
            self.inputs, self.outputs = whole.inputs, tuple((f.name, f.about) for f in between)

    def forward(self, **inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        text = text_of(inputs)
        if self.second:
            skips = tuple(value.float() for name, value in inputs.items() if name.startswith("skip_"))
            state = State(inputs["hidden"].float(), inputs["temb"].float(), skips)
        else:
            state = self.begin(inputs)
        for index, unit in enumerate(self.own):
            rope = None if unit.rope is None else (getattr(self, f"cos_{index}"), getattr(self, f"sin_{index}"))
            state = replace(unit, rope=rope)(state, text)
        if self.second:
            return self.end(state)
        return tuple(value.half() for value in (state.x, state.temb, *state.skips))


def _place(root: nn.Module, path: str, module: nn.Module) -> None:
    """Make `module` the submodule of `root` at `path`, so that its layers have the whole denoiser's names."""
    *parents, name = path.split(".")
    for parent in parents:
        if parent not in dict(root.named_children()):
            root.add_module(parent, nn.Module())
        root = root.get_submodule(parent)
    root.add_module(name, module)


def _middle(sizes: Sequence[int]) -> int:
    """Where to cut a list so that the larger of both sums is smallest."""
    return min(range(1, len(sizes)), key=lambda cut: max(sum(sizes[:cut]), sum(sizes[cut:])))


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
        self.conv = sepconv(trained.conv)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class _Layer(nn.Module):
    def __init__(self, trained: Any, rope: bool, query_chunk: int | None) -> None:
        super().__init__()
        self.res = _res_block(trained.res)
        self.transformer = _transformer(trained.transformer, rope, query_chunk)

    def forward(self, x: Tensor, temb: Tensor, *text: Any) -> Tensor:
        x = self.res(x, temb)
        return x if self.transformer is None else self.transformer(x, *text)


class _Mid(nn.Module):
    def __init__(self, trained: Any, rope: bool, query_chunk: int | None) -> None:
        super().__init__()
        self.res1 = _res_block(trained.res1)
        self.transformer = _transformer(trained.transformer, rope, query_chunk)
        self.res2 = _res_block(trained.res2)

    def forward(self, x: Tensor, temb: Tensor, *text: Any) -> Tensor:
        x = self.res1(x, temb)
        if self.transformer is not None:
            x = self.transformer(x, *text)
        return self.res2(x, temb)


def _stage(trained: Any, rope: bool, query_chunk: int | None) -> unet.UNetStage:
    stages = nn.ModuleList(_Layer(layer, rope, query_chunk) for layer in trained.layers)
    return unet.UNetStage(stages, None if trained.sampler is None else _Sampler(trained.sampler))


def _embedding(trained: Any) -> _Embedding:
    return _Embedding(trained.linear_1.in_features, trained.linear_1.out_features, trained.linear_2.out_features)


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


def _attention(trained: Any, rope: bool, query_chunk: int | None) -> m.Attention:
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
        query_chunk=query_chunk,
    )


def _transformer(trained: Any, rope: bool, query_chunk: int | None) -> m.SpatialTransformer | None:
    if trained is None:
        return None
    blocks = []
    for block in trained.blocks:
        own = None if block.attn1 is None else _attention(block.attn1, rope, query_chunk)
        cross = _attention(block.attn2, False, query_chunk)
        proj = block.ff.proj_in
        ff = m.GEGLU(proj.in_features, block.ff.proj_out.in_features, bias=proj.bias is not None)
        blocks.append(m.TransformerBlock(own, cross, ff, proj.in_features, block.norm2.eps))
    return m.SpatialTransformer(trained.norm.num_channels, trained.norm.num_groups, trained.norm.eps, blocks)
