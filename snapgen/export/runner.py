"""A pipeline whose networks are exported packages, run by the interpreter: what a phone would draw, without a phone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from snapgen.export.denoiser import time_embeddings
from snapgen.export.interpreter import Chain, Program
from snapgen.export.tools import PackageError
from snapgen.pipeline import SnapGenPipeline

DENOISERS = (("Unet.mlpackage",), ("UnetChunk1.mlpackage", "UnetChunk2.mlpackage"))


def packaged_pipeline(pipe: SnapGenPipeline, folder: str | Path) -> SnapGenPipeline:
    """`pipe` with denoiser, decoder and jointly trained text encoder replaced by the packages in `folder`.

    It draws, and can be scored, as any other; at the packages' own size only, and slowly. Tokenizers, scheduler and
    large text encoders are the pipeline's. A part without a package there stays PyTorch's.

    Raises:
        PackageError: there is no package in `folder`, or one cannot be read.
        ValueError: on a call with latents or prompts of another size than the packages take.
    """
    folder = Path(folder)
    found: dict[str, Any] = {}
    for files in DENOISERS:
        if all((folder / file).exists() for file in files):
            found["denoiser"] = PackagedDenoiser(_chain(folder, *files), pipe.denoiser)
    if (folder / "VAEDecoder.mlpackage").exists():
        found["decoder"] = PackagedDecoder(_chain(folder, "VAEDecoder.mlpackage"), pipe.decoder)
    if pipe.config.joint_text and (folder / "TextEncoder.mlpackage").exists():
        pad = pipe.tokenizer.pad_token_id
        found["text_encoder"] = PackagedTextEncoder(_chain(folder, "TextEncoder.mlpackage"), pipe.text_encoder, pad)
    if not found:
        raise PackageError(f"{folder}: holds none of the packages that `snapgen export coreml` writes")
    return pipe.having(**found)


class _Packaged(nn.Module):
    """What a pipeline asks of a network besides its outputs."""

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, program: Chain, trained: Any) -> None:
        super().__init__()
        self.program, self.config = program, trained.config
        self._trained = (trained,)  # in a tuple, so that its weights are not this module's

    def _run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The outputs, in fp32, of any number of samples, taken as many at a time as the package takes.

        An input with one row where the others have one a sample is for all of them.
        """
        sizes = {name: shape[0] for name, (shape, _) in self.program.inputs.items()}
        batch = max(sizes.values())
        count = max(value.shape[0] for value in inputs.values())
        parts: list[dict[str, Tensor]] = []
        for first in range(0, count, batch):
            rows = torch.arange(first, first + batch).clamp(max=count - 1)  # the last group repeats its last sample
            shared = {name for name, value in inputs.items() if sizes[name] < batch or value.shape[0] == 1 < count}
            parts.append(self.program({n: v if n in shared else v[rows] for n, v in inputs.items()}))
        return {name: torch.cat([part[name].float() for part in parts])[:count] for name in parts[0]}


class PackagedDenoiser(_Packaged):
    """Called as `SnapGenUNet` is."""

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor | None = None,
        pooled_projections: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        batch, length, _ = encoder_hidden_states.shape
        tokens = self.program.inputs["encoder_hidden_states"][0][3]
        if length > tokens:
            raise ValueError(f"encoder_hidden_states: got {length} tokens; the package takes {tokens}")
        mask = encoder_attention_mask
        if mask is None:
            mask = torch.ones(batch, length, dtype=torch.bool)
        inputs = {
            "sample": sample,
            "encoder_hidden_states": nn.functional.pad(encoder_hidden_states.mT, (0, tokens - length))[:, :, None],
            "encoder_attention_mask": nn.functional.pad(mask, (0, tokens - length))[:, None, None],
        }
        if pooled_projections is not None:
            inputs["pooled_projections"] = pooled_projections
        time = torch.as_tensor(timestep, dtype=torch.float32).reshape(-1)
        if "time_embedding" in self.program.inputs:
            if len(time.unique()) > 1:
                raise ValueError(f"timestep: got {time.tolist()}; a denoiser of one schedule takes one time a call")
            inputs["time_embedding"] = time_embeddings(self._trained[0], time[:1])[None, None]
        else:
            inputs["timestep"] = time.expand(batch)
        velocity = self._run(inputs)["velocity"]
        return SimpleNamespace(sample=velocity) if return_dict else (velocity,)


class PackagedDecoder(_Packaged):
    """Called as `TinyDecoder.decode` is."""

    @property
    def upscale(self) -> int:
        """Pixels per latent cell."""
        return int(self._trained[0].upscale)

    def decode(self, latents: Tensor, *, low_memory: bool | None = None, progress: Any = None) -> Tensor:
        """Pictures [B, 3, upscale * H, upscale * W] of latents [B, C, H, W]; `progress` hears of the end alone."""
        image = self._run({"z": latents})["image"]
        if progress is not None:
            progress(1, 1)
        return image


class PackagedTextEncoder(_Packaged):
    """Called as transformers' `CLIPTextModelWithProjection` is."""

    def __init__(self, program: Chain, trained: Any, padding: int) -> None:
        super().__init__(program, trained)
        self.padding = padding

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        length, tokens = input_ids.shape[1], self.program.inputs["input_ids"][0][1]
        if length > tokens:
            raise ValueError(f"input_ids: got {length} tokens; the package takes {tokens}")
        outputs = self._run({"input_ids": nn.functional.pad(input_ids, (0, tokens - length), value=self.padding)})
        states = outputs["last_hidden_state"][:, :length]
        return SimpleNamespace(last_hidden_state=states, text_embeds=outputs["pooled_outputs"])


def _chain(folder: Path, *files: str) -> Chain:
    return Chain([Program(folder / file) for file in files])
