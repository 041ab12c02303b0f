"""Uniform channel pruning of a decoder (SnapFusion, section 3.2: half of all channels).

Channels that are added to each other, or that a depthwise convolution or a norm takes one by one, are the same channels
in every layer that touches them: a *space*. Every space keeps its most important channels. Where a GroupNorm reads a
space, the same number is kept in each of the groups that the pruned norm will have, so that a group's channels stay
together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from snapgen.decoder import TinyDecoder
from snapgen.kl_decoder import KLDecoder

Axes = dict[str, tuple[str | None, ...]]
"""For each parameter, the space of each of its leading axes; None where nothing is pruned."""


@torch.no_grad()
def prune_decoder(decoder: TinyDecoder | KLDecoder, *, share: float = 0.5) -> TinyDecoder | KLDecoder:
    """A decoder with `share` of the channels of every stage, and the weights of those that matter most.

    Raises:
        ValueError: it is a decoder of another kind, or its widths cannot be divided so.
    """
    if not 0 < share < 1:
        raise ValueError(f"share: got {share}; must lie in (0, 1)")
    if not isinstance(decoder, TinyDecoder | KLDecoder):
        raise ValueError(f"decoder: got a {type(decoder).__name__}; must be a TinyDecoder or a KLDecoder")
    config = {name: value for name, value in decoder.config.items() if not name.startswith("_")}
    widths = []
    for width in config["channels"]:
        if not (width * share).is_integer() or width * share < 1:
            raise ValueError(f"share: got {share}, which leaves {width * share:g} of a stage's {width} channels")
        widths.append(int(width * share))
    config["channels"] = tuple(widths)
    if isinstance(decoder, KLDecoder):  # one number of groups for all its norms
        config["norm_groups"] = math.gcd(config["norm_groups"], *widths)
    pruned = type(decoder)(**config)
    axes = tiny_axes(decoder) if isinstance(decoder, TinyDecoder) else kl_axes(decoder)
    groups = {
        space: module.num_groups
        for name, module in pruned.named_modules()
        if isinstance(module, torch.nn.GroupNorm) and (space := axes[f"{name}.weight"][0]) is not None
    }
    _fill(pruned.state_dict(), decoder.state_dict(), axes, groups)
    parameter = next(decoder.parameters())
    # diffusers warns of a dtype that is asked for, also where it is the one that is there.
    pruned = pruned.to(parameter.device if parameter.dtype == torch.float32 else parameter)
    return pruned.train(decoder.training)


def _fill(new: Mapping[str, Tensor], old: Mapping[str, Tensor], axes: Axes, groups: Mapping[str, int]) -> None:
    sizes = {
        space: (old[name].shape[axis], new[name].shape[axis])
        for name, spaces in axes.items()
        for axis, space in enumerate(spaces)
        if space is not None
    }
    weights = importance(old, axes)
    kept = {space: most_important(weights[space], count, groups.get(space, 1)) for space, (_, count) in sizes.items()}
    for name, value in new.items():
        chosen = old[name]
        for axis, space in enumerate(axes[name]):
            if space is not None:
                chosen = chosen.index_select(axis, kept[space])
        value.copy_(chosen)


def importance(state: Mapping[str, Tensor], axes: Axes) -> dict[str, Tensor]:
    """Of every space, what each channel weighs: over all weights that write, read or scale it, the mean magnitude there
    against that of the whole weight, summed. The paper does not say how channels are chosen."""
    found: dict[str, Tensor] = {}
    for name, spaces in axes.items():
        if name.endswith(".bias"):
            continue
        for axis, space in enumerate(spaces):
            if space is not None:
                size = state[name].float().abs()
                own = size.transpose(0, axis).flatten(1).mean(1) if size.ndim > 1 else size
                own = own / size.mean().clamp(min=torch.finfo(torch.float32).tiny)
                found[space] = found.get(space, torch.zeros_like(own)) + own
    return found


def most_important(weights: Tensor, count: int, groups: int) -> Tensor:
    """The indices of the `count` largest of `weights` [N], rising; the same number of each of `groups` equal parts.

    Raises:
        ValueError: either number is no multiple of `groups`.
    """
    if len(weights) % groups or count % groups:
        raise ValueError(f"groups: got {groups}; must divide {len(weights)} channels and the {count} that are kept")
    parts = weights.view(groups, -1)
    best = parts.topk(count // groups, dim=1).indices.sort(dim=1).values
    return (best + torch.arange(groups, device=best.device).unsqueeze(1) * parts.shape[1]).flatten()


def tiny_axes(decoder: TinyDecoder) -> Axes:
    """The spaces of a TinyDecoder: one for each stage, one for each block's middle."""
    axes: Axes = {"conv_in.weight": ("stage 0", None), "conv_in.bias": ("stage 0",)}
    for index, blocks in enumerate(decoder.stages):
        stage = f"stage {index}"
        for number in range(len(blocks)):
            path, middle = f"stages.{index}.{number}", f"middle {index}.{number}"
            axes |= {
                f"{path}.depthwise1.weight": (stage, None),
                f"{path}.depthwise1.bias": (stage,),
                f"{path}.pointwise1.weight": (middle, stage),
                f"{path}.depthwise2.weight": (middle, None),
                f"{path}.depthwise2.bias": (middle,),
                f"{path}.norm.weight": (middle,),
                f"{path}.norm.bias": (middle,),
                f"{path}.pointwise2.weight": (stage, middle),
            }
    for index in range(len(decoder.upsamplers)):
        axes |= {
            f"upsamplers.{index}.depthwise.weight": (f"stage {index}", None),
            f"upsamplers.{index}.depthwise.bias": (f"stage {index}",),
            f"upsamplers.{index}.pointwise.weight": (f"stage {index + 1}", f"stage {index}"),
        }
    last = f"stage {len(decoder.stages) - 1}"
    axes |= {"norm_out.weight": (last,), "norm_out.bias": (last,)}
    return axes | {"conv_out.weight": (None, last), "conv_out.bias": (None,)}


def kl_axes(decoder: KLDecoder) -> Axes:
    """The spaces of a KLDecoder: a residual stream as long as no convolution replaces it, the middle of each block, and
    the attention's queries with keys, and values."""
    axes: Axes = {}
    stream = "stream 0"

    def both(path: str, *spaces: str | None) -> None:
        axes[f"{path}.weight"] = spaces
        axes[f"{path}.bias"] = spaces[:1]

    def block(path: str, module: Any) -> None:
        nonlocal stream
        middle, out = f"middle of {path}", stream
        if module.conv_shortcut is not None:
            out = f"stream from {path}"
            both(f"{path}.conv_shortcut", out, stream)
        both(f"{path}.norm1", stream)
        both(f"{path}.conv1", middle, stream)
        both(f"{path}.norm2", middle)
        both(f"{path}.conv2", out, middle)
        stream = out

    net = decoder.decoder
    both("decoder.conv_in", stream, None)
    for index, module in enumerate(net.mid_block.resnets):
        block(f"decoder.mid_block.resnets.{index}", module)
    for index, module in enumerate(net.mid_block.attentions):
        if module is None:
            continue
        path = f"decoder.mid_block.attentions.{index}"
        both(f"{path}.group_norm", stream)
        both(f"{path}.to_q", "queries", stream)
        both(f"{path}.to_k", "queries", stream)
        both(f"{path}.to_v", "values", stream)
        both(f"{path}.to_out.0", stream, "values")
    for number, up in enumerate(net.up_blocks):
        for index, module in enumerate(up.resnets):
            block(f"decoder.up_blocks.{number}.resnets.{index}", module)
        for index in range(len(up.upsamplers or ())):
            out = f"stream from upsampler {number}"
            both(f"decoder.up_blocks.{number}.upsamplers.{index}.conv", out, stream)
            stream = out
    both("decoder.conv_norm_out", stream)
    both("decoder.conv_out", None, stream)
    if decoder.quantized is not None:
        both("quantized", None, None)
    return axes
