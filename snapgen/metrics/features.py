"""Networks that turn pictures into features, given by path: for FID and CLIP score. Nothing is downloaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from snapgen import io
from snapgen.metrics.inception import load_inception


class FeatureNetwork:
    """Pictures [B, 3, H, W] in [-1, 1] to features [B, width], fp32 on the CPU.

    Args:
        path: a safetensors file of Inception-v3 (`snapgen.metrics.inception`), or a folder of a transformers vision
            model with its preprocessor_config.json (its pooled output is taken, or the mean over its tokens).

    Raises:
        ValueError: `path` does not exist.
        io.CheckpointError: it holds something else.
    """

    def __init__(self, path: Path, device: torch.device | str = "cpu") -> None:
        if not path.exists():
            raise ValueError(
                f"network: {path} does not exist; name a safetensors file of Inception-v3's weights, or a folder of a "
                f"transformers vision model"
            )
        self.name = path.name
        self.device = device
        self._process: Any = None
        if path.is_file():
            self._network: Any = load_inception(path).to(device)
        else:
            from transformers import AutoModel

            _check(path, "a vision model")
            try:
                network = AutoModel.from_pretrained(path, local_files_only=True, use_safetensors=True)
            except (OSError, ValueError) as error:
                raise io.CheckpointError(f"{path}: cannot be loaded ({error})") from error
            network = getattr(network, "vision_model", network)
            self._network = network.to(device).eval().requires_grad_(False)
            self._process = image_processor(path)

    @torch.no_grad()
    def __call__(self, pictures: Tensor) -> Tensor:
        if self._process is None:
            return self._network(pictures.to(self.device).float()).float().cpu()
        output = self._network(pixel_values=pixels(self._process, pictures).to(self.device))
        pooled = getattr(output, "pooler_output", None)
        return (output.last_hidden_state.mean(1) if pooled is None else pooled.flatten(1)).float().cpu()


class ClipScore:
    """How near pictures are to their captions: the cosine of CLIP's two embeddings (Hessel et al. 2021, without the
    factor 2.5; as SnapGen's table has it, about 0.3).

    Args:
        path: a folder of transformers' CLIPModel with tokenizer and preprocessor_config.json.

    Raises:
        ValueError: `path` does not exist.
        io.CheckpointError: it holds something else.
    """

    def __init__(self, path: Path, device: torch.device | str = "cpu") -> None:
        from transformers import AutoTokenizer, CLIPModel

        if not path.is_dir():
            raise ValueError(f"clip: {path} is no folder; name one of a transformers CLIP model")
        _check(path, "a CLIP model")
        if io.read_json(path / "config.json").get("model_type") != "clip":
            raise io.CheckpointError(f"{path}: config.json describes no CLIP model")
        try:
            model = CLIPModel.from_pretrained(path, local_files_only=True, use_safetensors=True)
            self._tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        except (OSError, ValueError) as error:
            raise io.CheckpointError(f"{path}: cannot be loaded ({error})") from error
        self._model: Any = model.to(device).eval().requires_grad_(False)
        self._process, self.device = image_processor(path), device

    @torch.no_grad()
    def __call__(self, pictures: Tensor, captions: Sequence[str]) -> Tensor:
        """Pictures [B, 3, H, W] in [-1, 1] and as many captions, of which CLIP reads 77 tokens, to cosines [B], fp32.

        Raises:
            ValueError: there are not as many captions as pictures.
        """
        if len(pictures) != len(captions):
            raise ValueError(f"captions: got {len(captions)} for {len(pictures)} pictures")
        limit = self._model.config.text_config.max_position_embeddings
        tokens = self._tokenizer(list(captions), padding=True, truncation=True, max_length=limit, return_tensors="pt")
        output = self._model(
            input_ids=tokens.input_ids.to(self.device),
            attention_mask=tokens.attention_mask.to(self.device),
            pixel_values=pixels(self._process, pictures).to(self.device),
        )
        image = torch.nn.functional.normalize(output.image_embeds.float(), dim=-1)
        text = torch.nn.functional.normalize(output.text_embeds.float(), dim=-1)
        return (image * text).sum(-1).cpu()


def image_processor(path: Path) -> Any:
    """The preprocessing that a transformers model's folder describes.

    Raises:
        io.CheckpointError: it describes none.
    """
    from transformers import AutoImageProcessor

    if not (path / "preprocessor_config.json").is_file():
        raise io.CheckpointError(f"{path}: has no preprocessor_config.json")
    try:
        return AutoImageProcessor.from_pretrained(path, local_files_only=True, backend="pil")
    except (OSError, ValueError) as error:
        raise io.CheckpointError(f"{path}: its preprocessor_config.json cannot be used ({error})") from error


def pixels(process: Any, pictures: Tensor) -> Tensor:
    """Pictures [B, 3, H, W] in [-1, 1], rounded to bytes, as a model's preprocessing has them."""
    from snapgen.pictures import to_pictures

    return process(images=to_pictures(pictures.float().clamp(-1, 1).cpu()), return_tensors="pt").pixel_values


def _check(path: Path, what: str) -> None:
    if not (path / "config.json").is_file():
        raise io.CheckpointError(f"{path}: holds no {what.split(' ', 1)[1]} (config.json)")
    for file in path.glob("*.safetensors"):
        io.check_tensors(file)
