"""Pipelines of SnapFusion's kind from folders: of ours, and of diffusers' Stable Diffusion 1; and single parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from snapgen import io, vp
from snapgen.decoder import TinyDecoder, TinyEncoder
from snapgen.fusion_presets import build_fusion, get_fusion_preset
from snapgen.fusion_unet import FusionUNet
from snapgen.fusion_weights import from_stable_diffusion, inherit
from snapgen.kl_decoder import KLDecoder, KLEncoder
from snapgen.pipeline import SnapGenPipeline

_PARTS: dict[str, Any] = {kind.__name__: kind for kind in (FusionUNet, TinyDecoder, TinyEncoder, KLDecoder, KLEncoder)}


def import_stable_diffusion(folder: str | Path, preset: str | None = None) -> tuple[SnapGenPipeline, list[str]]:
    """Stable Diffusion 1, saved by diffusers (unet/, vae/, text_encoder/, tokenizer/), as a pipeline of ours.

    Its UNet predicts noise; the pipeline draws by velocities: train it (`train_fusion`) before it draws.

    Args:
        preset: a denoiser of this arrangement (`snapfusion`) with the weights of the blocks that both have; the UNet
            as it is where None.

    Returns:
        The pipeline, and the paths of the blocks that got no weights (`snapgen.fusion_weights.inherit`).

    Raises:
        io.CheckpointError: files are missing or damaged.
        ValueError: it is a model of another kind, or the preset's denoiser differs in more than its blocks.
    """
    from transformers import AutoTokenizer, CLIPTextModel

    folder = Path(folder)
    for name in ("unet", "vae", "text_encoder", "tokenizer"):
        if not (folder / name).is_dir():
            raise io.CheckpointError(f"{folder}: has no folder {name}; it must be a Stable Diffusion 1 of diffusers")
    net, left = from_stable_diffusion(folder / "unet"), []
    if preset is not None:
        wanted = build_fusion(get_fusion_preset(preset))
        left = inherit(wanted, net)
        net = wanted
    vae = _vae(folder / "vae")
    pipe = SnapGenPipeline(
        denoiser=net,
        decoder=KLDecoder.from_vae(vae),
        encoder=KLEncoder.from_vae(vae),
        scheduler=vp.make_scheduler(),
        text_encoder=CLIPTextModel.from_pretrained(folder / "text_encoder", use_safetensors=True),
        tokenizer=AutoTokenizer.from_pretrained(folder / "tokenizer"),
    )
    return pipe, left


def load_part(folder: str | Path) -> Any:
    """A denoiser, encoder or decoder of ours from the folder that `save_pretrained` wrote; its config.json says which.

    Raises:
        io.CheckpointError: the folder holds none, or its files are damaged.
    """
    folder = Path(folder)
    config = io.read_json(folder / "config.json")
    kind = config.get("_class_name")
    if kind not in _PARTS:
        raise io.CheckpointError(f"{folder}: holds a {kind}; must be one of {', '.join(sorted(_PARTS))}")
    arguments = {name: value for name, value in config.items() if not name.startswith("_")}
    part: nn.Module = _PARTS[kind](**arguments)
    file = folder / "diffusion_pytorch_model.safetensors"
    tensors = {name: tensor.float() for name, tensor in io.load_tensors(file).items()}
    io.load_strictly(part, tensors, file, f"the {kind} that its config.json describes")
    return part


def load_decoder(folder: str | Path) -> Any:
    """A decoder from its own folder, from decoder/ of a pipeline or an export, or out of a diffusers AutoencoderKL: its
    folder, or vae/ of a diffusers pipeline.

    Raises:
        io.CheckpointError: the folder holds none.
    """
    folder = _inside(Path(folder), "decoder")
    if io.read_json(folder / "config.json").get("_class_name") == "AutoencoderKL":
        return KLDecoder.from_vae(_vae(folder))
    found = load_part(folder)
    if not isinstance(found, TinyDecoder | KLDecoder):
        raise io.CheckpointError(f"{folder}: holds a {type(found).__name__}, which is no decoder")
    return found


def load_encoder(folder: str | Path) -> Any:
    """An encoder from its own folder, from encoder/ of a pipeline or an export, or out of a diffusers AutoencoderKL:
    its folder, or vae/ of a diffusers pipeline.

    Raises:
        io.CheckpointError: the folder holds none.
    """
    folder = _inside(Path(folder), "encoder")
    if io.read_json(folder / "config.json").get("_class_name") == "AutoencoderKL":
        return KLEncoder.from_vae(_vae(folder))
    found = load_part(folder)
    if not isinstance(found, TinyEncoder | KLEncoder):
        raise io.CheckpointError(f"{folder}: holds a {type(found).__name__}, which is no encoder")
    return found


def _inside(folder: Path, name: str) -> Path:
    return next((folder / part for part in (name, "vae") if (folder / part).is_dir()), folder)


def _vae(folder: Path) -> Any:
    from diffusers import AutoencoderKL

    for file in folder.glob("*.safetensors"):
        io.check_tensors(file)
    return AutoencoderKL.from_pretrained(folder, use_safetensors=True)
