"""Weights between denoisers of `snapgen.fusion_unet`: from Stable Diffusion's UNet, and from one arrangement to
another."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from snapgen import io
from snapgen.fusion_unet import FusionUNet

# What diffusers calls a part, and what it is here.
_NAMES = (
    (r"down_blocks\.(\d+)\.resnets\.(\d+)\.", r"down_stages.\1.layers.\2.blocks.0."),
    (r"down_blocks\.(\d+)\.attentions\.(\d+)\.", r"down_stages.\1.layers.\2.blocks.1."),
    (r"down_blocks\.(\d+)\.downsamplers\.0\.", r"down_stages.\1.sampler."),
    (r"up_blocks\.(\d+)\.resnets\.(\d+)\.", r"up_stages.\1.layers.\2.blocks.0."),
    (r"up_blocks\.(\d+)\.attentions\.(\d+)\.", r"up_stages.\1.layers.\2.blocks.1."),
    (r"up_blocks\.(\d+)\.upsamplers\.0\.", r"up_stages.\1.sampler."),
    (r"mid_block\.resnets\.0\.", "middle.blocks.0."),
    (r"mid_block\.attentions\.0\.", "middle.blocks.1."),
    (r"mid_block\.resnets\.1\.", "middle.blocks.2."),
    (r"conv_norm_out\.", "norm_out."),
)
# The settings of Stable Diffusion 1 that FusionUNet is built with; another value means another net.
_FIXED: dict[str, Any] = dict(
    act_fn="silu",
    center_input_sample=False,
    downsample_padding=1,
    flip_sin_to_cos=True,
    freq_shift=0,
    norm_eps=1e-5,
    only_cross_attention=False,
    use_linear_projection=False,
    dual_cross_attention=False,
    class_embed_type=None,
    addition_embed_type=None,
    encoder_hid_dim=None,
    resnet_time_scale_shift="default",
    time_embedding_type="positional",
    time_embedding_dim=None,
    time_cond_proj_dim=None,
    mid_block_type="UNetMidBlock2DCrossAttn",
    mid_block_scale_factor=1,
    transformer_layers_per_block=1,
    conv_in_kernel=3,
    conv_out_kernel=3,
    num_attention_heads=None,
    num_class_embeds=None,
)


def stable_diffusion_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """FusionUNet's arguments for the net that a UNet2DConditionModel's configuration describes.

    Raises:
        ValueError: it describes a net of another kind than Stable Diffusion 1's; names what differs.
    """
    for name, value in _FIXED.items():
        if config.get(name, value) != value:
            raise ValueError(f"{name}: got {config[name]!r}; a UNet of Stable Diffusion 1 has {value!r}")
    for name, plain in (("down_block_types", "DownBlock2D"), ("up_block_types", "UpBlock2D")):
        unknown = set(config[name]) - {plain, f"CrossAttn{plain}"}
        if unknown:
            raise ValueError(f"{name}: got {', '.join(sorted(unknown))}; must be {plain} or CrossAttn{plain}")
    for name in ("attention_head_dim", "layers_per_block", "cross_attention_dim"):
        if not isinstance(config[name], int):
            raise ValueError(f"{name}: got {config[name]!r}; must be one number, as in Stable Diffusion 1")
    if config["in_channels"] != config["out_channels"]:
        raise ValueError(f"out_channels: got {config['out_channels']}; must be in_channels, {config['in_channels']}")
    depth = config["layers_per_block"]

    def layers(kinds: Sequence[str], count: int) -> tuple[tuple[str, ...], ...]:
        return tuple(("RA" if kind.startswith("CrossAttn") else "R",) * count for kind in kinds)

    return dict(
        sample_size=config["sample_size"],
        in_channels=config["in_channels"],
        channels=tuple(config["block_out_channels"]),
        down=layers(config["down_block_types"], depth),
        mid="RAR",
        up=layers(config["up_block_types"], depth + 1),
        context_dim=config["cross_attention_dim"],
        num_heads=config["attention_head_dim"],  # in this model the field holds the number of heads
        norm_groups=config["norm_num_groups"],
    )


def from_stable_diffusion(folder: str | Path) -> FusionUNet:
    """The UNet in a folder saved by diffusers (Stable Diffusion's `unet/`), with its weights.

    It predicts what it was trained for, which is the noise in SD 1.5's case: train it to v-prediction first
    (`snapgen.distill.snapfusion.VPrediction`).

    Raises:
        io.CheckpointError: files are missing or damaged, or names or shapes do not all fit.
        ValueError: it is a UNet of another kind.
    """
    folder = Path(folder)
    net = FusionUNet(**stable_diffusion_arguments(_defaults() | io.read_json(folder / "config.json")))
    tensors: dict[str, Tensor] = {}
    files = sorted(folder.glob("diffusion_pytorch_model*.safetensors"))
    # Beside the whole weights, SD's folders hold copies in half precision (.fp16) and without averaging (.non_ema).
    files = [file for file in files if not re.search(r"\.(fp16|non_ema)", file.name)]
    if not files:
        raise io.CheckpointError(f"{folder}: holds no diffusion_pytorch_model.safetensors")
    for file in files:
        tensors |= io.load_tensors(file)
    named = {renamed(name): tensor.float() for name, tensor in tensors.items()}
    io.load_strictly(net, named, folder, "a UNet of Stable Diffusion 1")
    return net


def renamed(name: str) -> str:
    """What a weight of diffusers' UNet2DConditionModel is called in FusionUNet."""
    for pattern, ours in _NAMES:
        found, count = re.subn(f"^{pattern}", ours, name)
        if count:
            return found
    return name


def _defaults() -> dict[str, Any]:
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return dict(UNet2DConditionModel().config)


@torch.no_grad()
def inherit(net: FusionUNet, parent: FusionUNet) -> list[str]:
    """Give `net` the weights of every part that it shares with `parent`; returns the paths of the blocks left over.

    In each stage its n-th cross-attention block gets those of the parent's n-th, and a residual block those of the
    first in the parent that has its shapes and was not taken yet. Blocks left over begin as the identity, their last
    layer being set to zero, unless they change the width.

    Raises:
        ValueError: the two differ in more than their blocks.
    """
    own, theirs = net.state_dict(), parent.state_dict()
    outside = [name for name in own if ".blocks." not in name]
    wrong = [name for name in outside if name not in theirs or theirs[name].shape != own[name].shape]
    if wrong:
        raise ValueError(f"parent: differs from the net in more than its blocks ({', '.join(wrong[:3])})")
    for name in outside:
        own[name].copy_(theirs[name])
    taken: set[str] = set()
    left = []
    for path, place in net.places.items():
        for candidate, other in parent.places.items():
            if candidate not in taken and _stage(candidate) == _stage(path) and other == place:
                taken.add(candidate)
                net.get_submodule(path).load_state_dict(parent.get_submodule(candidate).state_dict())
                break
        else:
            left.append(path)
            if place.skippable and not place.width_skip:
                last = net.get_submodule(f"{path}.{'conv2' if place.kind == 'R' else 'proj_out'}")
                for parameter in last.parameters():
                    nn.init.zeros_(parameter)
    return left


def _stage(path: str) -> str:
    return path.split(".layers.")[0]


def edited(net: FusionUNet, *, drop: Iterable[str] = (), copy: Iterable[str] = ()) -> FusionUNet:
    """The net without the blocks `drop`, and with a copy (weights too) right behind each of the blocks `copy`.

    Without its blocks it computes exactly what :meth:`FusionUNet.without` them computes.

    Raises:
        ValueError: one of them is no block of the net, or cannot be left out or repeated.
    """
    dropped, copied = set(drop), set(copy)
    for argument, names, allowed in (("drop", dropped, "skippable"), ("copy", copied, "repeatable")):
        for name in sorted(names):
            if name not in net.places:
                raise ValueError(f"{argument}: got {name!r}; must be one of {', '.join(net.places)}")
            if not getattr(net.places[name], allowed):
                raise ValueError(f"{argument}: got {name!r}, which changes the width or reads a skip")
    if dropped & copied:
        raise ValueError(f"copy: got {', '.join(sorted(dropped & copied))}, which is to be dropped")
    sources: dict[str, str] = {}

    def layer(path: str, blocks: str) -> str:
        kept = ""
        for index, kind in enumerate(blocks):
            source = f"{path}.blocks.{index}"
            for _ in range(0 if source in dropped else 2 if source in copied else 1):
                sources[f"{path}.blocks.{len(kept)}"] = source
                kept += kind
        return kept

    def stages(path: str, all_layers: Sequence[Sequence[str]]) -> tuple[tuple[str, ...], ...]:
        return tuple(
            tuple(layer(f"{path}.{stage}.layers.{index}", blocks) for index, blocks in enumerate(layers))
            for stage, layers in enumerate(all_layers)
        )

    config = {name: value for name, value in net.config.items() if not name.startswith("_")}
    config["down"] = stages("down_stages", config["down"])
    config["mid"] = layer("middle", config["mid"])
    config["up"] = stages("up_stages", config["up"])
    new = FusionUNet(**config)
    own = net.state_dict()
    weights = {}
    for name in new.state_dict():
        path, found, rest = name.partition(".blocks.")
        if found:
            index, _, key = rest.partition(".")
            name_there = f"{sources[f'{path}.blocks.{index}']}.{key}"
        else:
            name_there = name
        weights[name] = own[name_there]
    new.load_state_dict(weights)
    first = next(net.parameters())
    # diffusers warns of a dtype that is asked for, also where it is the one that is there.
    new = new.to(first.device if first.dtype == torch.float32 else first)
    return new.train(net.training)
