"""Prompts to pictures, as a diffusers pipeline: `SnapGenPipeline.from_pretrained(path)("a red circle")`."""

from __future__ import annotations

import importlib
import math
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from snapgen import io
from snapgen.config import SHIPPED
from snapgen.graphs import Capture, Graphs, cuda_capture
from snapgen.pictures import to_pictures
from snapgen.sampler import sample
from snapgen.text import TextEmbedding, encode_clip, encode_gemma, encode_tiny, join
from snapgen_kernels import profile_range


class PromptWarning(UserWarning):
    """A part of a prompt that the model does not read."""


class SnapGenPipeline(DiffusionPipeline):
    """Text to pictures.

    Components may be left out (None) where they are optional: any text encoder as long as one stays, and `encoder`,
    which only models with latents of their own have, for training.

    Args:
        denoiser: `SnapGenUNet`, or `FusionUNet`.
        decoder: `TinyDecoder`, or `KLDecoder`.
        scheduler: diffusers' flow-match Euler; for `FusionUNet`, its DDIM (`snapgen.vp.make_scheduler`).
        text_encoder, tokenizer: CLIP-L, or with `joint_text` the tiny CLIP that was trained with the denoiser.
        text_encoder_2, tokenizer_2: CLIP-G.
        text_encoder_3, tokenizer_3: Gemma-2-2b.
        max_tokens: tokens of Gemma's part of the context.
        steps, guidance: how it draws unless a call says otherwise: 28 steps are the paper's; a step-distilled model has
            its own few, and guidance 1.
    """

    _optional_components: ClassVar = [
        "encoder",
        "text_encoder",
        "tokenizer",
        "text_encoder_2",
        "tokenizer_2",
        "text_encoder_3",
        "tokenizer_3",
    ]
    model_cpu_offload_seq = "text_encoder->text_encoder_2->text_encoder_3->denoiser->decoder"

    def __init__(
        self,
        denoiser: Any,
        decoder: Any,
        scheduler: Any,
        text_encoder: Any = None,
        tokenizer: Any = None,
        text_encoder_2: Any = None,
        tokenizer_2: Any = None,
        text_encoder_3: Any = None,
        tokenizer_3: Any = None,
        encoder: Any = None,
        joint_text: bool = False,
        max_tokens: int = 256,
        steps: int = 28,
        guidance: float = 4.0,
    ) -> None:
        super().__init__()
        if denoiser.config.in_channels != decoder.config.latent_channels:
            raise ValueError(
                f"decoder: takes {decoder.config.latent_channels} latent channels, "
                f"the denoiser makes {denoiser.config.in_channels}"
            )
        self.register_modules(
            denoiser=denoiser,
            decoder=decoder,
            scheduler=scheduler,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2,
            text_encoder_3=text_encoder_3,
            tokenizer_3=tokenizer_3,
            encoder=encoder,
        )
        self.register_to_config(joint_text=joint_text, max_tokens=max_tokens, steps=steps, guidance=guidance)
        self._graphs: Graphs | None = None

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike, **options: Any) -> SnapGenPipeline:
        """Load from a folder, from a name of the hub cache, or a shipped checkpoint by its name ("tiny", "tiny-4").

        Raises:
            io.CheckpointError: a weight file is truncated, a pickle or of another model, or the folder holds no
                pipeline.
        """
        folder = SHIPPED / path if isinstance(path, str) and (SHIPPED / path).is_dir() else Path(path)
        if folder.is_dir():
            _check_folder(folder)
        elif isinstance(path, os.PathLike) or str(path).startswith((".", "/")) or "/" not in path:
            shipped = ", ".join(sorted(found.name for found in SHIPPED.iterdir()))
            raise io.CheckpointError(f"{path}: no such checkpoint folder, nor a shipped one ({shipped})")
        options.setdefault("use_safetensors", True)
        # transformers would otherwise load in the dtype of the file, diffusers in fp32.
        if "torch_dtype" not in options:
            options.setdefault("dtype", torch.float32)
        # diffusers builds our components by module name, but only from modules that are imported already.
        for module in _own_modules(folder):
            importlib.import_module(module)
        pipe = super().from_pretrained(str(folder) if folder.is_dir() else path, **options)
        if folder.is_dir():
            own = ("denoiser", "decoder", "encoder", *(("text_encoder",) if pipe.config.joint_text else ()))
            for name in own:
                if name not in options and getattr(pipe, name) is not None:
                    _check_complete(getattr(pipe, name), folder / name)
        return pipe

    def having(self, **parts: Any) -> SnapGenPipeline:
        """A pipeline like this one with other parts in place of some of its own; the rest is shared."""
        settings = {name: self.config[name] for name in ("joint_text", "max_tokens", "steps", "guidance")}
        return SnapGenPipeline(**{**self.components, **parts}, **settings)

    def unknown_words(self, prompt: str) -> list[str]:
        """The words of `prompt` that a jointly trained text encoder never saw, in order; [] for the large ones."""
        if not self.config.joint_text:
            return []
        words = [word for word, _ in self.tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(prompt.lower())]
        return [word for word in dict.fromkeys(words) if word not in self.tokenizer.get_vocab()]

    def encode_prompt(self, prompts: Sequence[str]) -> TextEmbedding:
        """Embed prompts with whatever text encoders are there.

        Raises:
            ValueError: a prompt is too long for every encoder, or there is no encoder.
        """
        if not self.config.joint_text:
            self._check_lengths(prompts)
        return self.embed(prompts)

    def embed(self, prompts: Sequence[str]) -> TextEmbedding:
        """Embed prompts; what of them is too long for the large text encoders is left out."""
        device = self._execution_device
        if self.config.joint_text:
            return encode_tiny(self.tokenizer, self.text_encoder, prompts, device)
        clips = [
            (tokenizer, encoder)
            for tokenizer, encoder in (
                (self.tokenizer, self.text_encoder),
                (self.tokenizer_2, self.text_encoder_2),
            )
            if encoder is not None
        ]
        clip = encode_clip(clips, prompts, device) if clips else None
        gemma = None
        if self.text_encoder_3 is not None:
            gemma = encode_gemma(self.tokenizer_3, self.text_encoder_3, prompts, self.config.max_tokens, device)
        config = self.denoiser.config
        return join(
            clip,
            gemma,
            context_dim=config.context_dim,
            pooled_dim=config.pooled_dim,
            batch=len(prompts),
            device=device,
            dtype=self.denoiser.dtype,
        )

    @torch.no_grad()
    def compile(
        self,
        *,
        batch_size: int = 1,
        height: int | None = None,
        width: int | None = None,
        guidance: bool | None = None,
        inductor: bool = False,
        capture: Capture = cuda_capture,
    ) -> SnapGenPipeline:
        """Record denoiser and decoder as CUDA graphs, which every later call replays; returns the pipeline itself.

        Prompts, noise, the number of steps and the guidance scale may change from call to call. Another size or number
        of pictures, or guidance where there was none, is recorded when it first comes; so is everything after the
        weights were moved. `low_memory` has no effect from then on. Give it its GPU first: `pipe.to("cuda").compile()`.

        Args:
            batch_size, height, width: of the pictures that are recorded now; by default one of the size that the model
                was trained at.
            guidance: whether there will be classifier-free guidance, which doubles the batch; by default whether the
                pipeline guides by itself.
            inductor: let torch.compile join what stands between the denoiser's fused operations first. It takes minutes
                for each size and number of pictures, and allows eight of them.
            capture: how to record.

        Raises:
            ValueError: the pipeline does not stand on a CUDA device, or a size is not allowed.
        """
        device = self._execution_device
        if device.type != "cuda" and capture is cuda_capture:
            raise ValueError(f"compile: the pipeline stands on {device}; CUDA graphs need a CUDA device")
        if batch_size < 1:
            raise ValueError(f"batch_size: got {batch_size}; must be at least 1")
        rows, columns = (self._cells(n, px, self.decoder.upscale) for n, px in (("height", height), ("width", width)))
        if guidance is None:
            guidance = self.config.guidance != 1
        tokens = self.tokenizer.model_max_length if self.config.joint_text else 0  # the large ones pad by themselves
        self._graphs = Graphs(self.denoiser, self.decoder, tokens, capture, inductor=inductor)
        text = self.embed([""] * batch_size * (1 + guidance))
        latents = torch.zeros(batch_size, self.denoiser.config.in_channels, rows, columns, device=device)
        doubled = torch.cat((latents, latents)) if guidance else latents
        self._graphs.denoiser(doubled.to(text.context.dtype), torch.zeros((), device=device), *text)
        self._graphs.decode(latents.to(self.decoder.dtype))
        return self

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str = "",
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        low_memory: bool | None = None,
    ) -> Any:
        """Draw pictures: an ImagePipelineOutput, whose `images` they are, or without `return_dict` a tuple of them.

        Args:
            prompt: one or several.
            height, width: pixels, multiples of `unit`; by default what the model was trained at.
            num_inference_steps: Euler steps, any number; by default the model's own (`config.steps`).
            guidance_scale: classifier-free guidance; 1 turns it off and halves the work; by default `config.guidance`.
            latents: starting noise [B, C, H, W], instead of noise from `generator`.
            output_type: "pil", "pt" (tensor [B, 3, H, W] in [-1, 1]) or "latent".
            low_memory: decode in less memory (see `TinyDecoder.decode`).

        Raises:
            ValueError: an argument does not fit; names it, what was given and what is allowed.
            FloatingPointError: the denoiser gave NaN or infinity.
        """
        prompts = self._check_prompts(prompt)
        if output_type not in ("pil", "pt", "latent"):
            raise ValueError(f"output_type: got {output_type!r}; allowed are 'pil', 'pt' and 'latent'")
        if num_images_per_prompt < 1:
            raise ValueError(f"num_images_per_prompt: got {num_images_per_prompt}; must be at least 1")
        num_inference_steps = self.config.steps if num_inference_steps is None else num_inference_steps
        guidance_scale = self.config.guidance if guidance_scale is None else guidance_scale
        if not math.isfinite(guidance_scale):
            raise ValueError(f"guidance_scale: got {guidance_scale}; must be finite")
        prompts = [text for text in prompts for _ in range(num_images_per_prompt)]
        config = self.denoiser.config
        upscale = self.decoder.upscale
        shape = (
            len(prompts),
            config.in_channels,
            self._cells("height", height, upscale),
            self._cells("width", width, upscale),
        )
        device = self._execution_device
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        elif tuple(latents.shape) != shape:
            raise ValueError(f"latents: got shape {tuple(latents.shape)}; expected {shape}")

        with profile_range("text"):
            text = self.encode_prompt(prompts)
            negative = self.encode_prompt([negative_prompt] * len(prompts)) if guidance_scale != 1.0 else None
        if self._graphs is not None:
            self._graphs.check()
        with profile_range("denoise"), self.progress_bar(total=num_inference_steps) as bar:
            latents = sample(
                self.denoiser if self._graphs is None else self._graphs.denoiser,
                self.scheduler,
                latents.to(device, torch.float32),
                text,
                steps=num_inference_steps,
                guidance_scale=guidance_scale,
                negative=negative,
                on_step=lambda *_: bar.update(),
            )
        if not latents.isfinite().all():
            raise FloatingPointError("the denoiser gave values that are not finite; its weights may be damaged")
        pictures: Any = latents
        if output_type != "latent":
            with profile_range("decode"):
                pictures = self._decode(latents.to(self.decoder.dtype), low_memory).float().clamp(-1, 1)
        if output_type == "pil":
            pictures = to_pictures(pictures)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=pictures) if return_dict else (pictures,)

    def _decode(self, latents: Tensor, low_memory: bool | None) -> Tensor:
        if self._graphs is not None:
            return self._graphs.decode(latents)
        with self.progress_bar(total=100) as bar:
            return self.decoder.decode(
                latents, low_memory=low_memory, progress=lambda done, total: bar.update(100 * done // total - bar.n)
            )

    @property
    def unit(self) -> int:
        """Height and width of a picture are multiples of this many pixels."""
        config = self.denoiser.config
        return self.decoder.upscale * (config.get("patch_size") or 1 << (len(config.channels) - 1))

    def _cells(self, name: str, pixels: int | None, upscale: int) -> int:
        if pixels is None:
            return self.denoiser.config.sample_size
        if pixels < self.unit or pixels % self.unit:
            raise ValueError(f"{name}: got {pixels} pixels; must be a positive multiple of {self.unit}")
        return pixels // upscale

    def _check_prompts(self, prompt: str | Sequence[str]) -> list[str]:
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts:
            raise ValueError("prompt: the list is empty")
        for text in prompts:
            if not isinstance(text, str):
                raise ValueError(f"prompt: got a {type(text).__name__}; must be a str or a list of them")
            if not text.strip():
                raise ValueError("prompt: it is empty; say what to draw")
        unknown = list(dict.fromkeys(word for text in prompts for word in self.unknown_words(text)))
        if unknown:
            warnings.warn(
                f"prompt: the model never saw {', '.join(map(repr, unknown))} and ignores it; it knows only "
                f"{', '.join(self.vocabulary[:40])}",
                PromptWarning,
                stacklevel=4,
            )
        return prompts

    @property
    def vocabulary(self) -> list[str]:
        """The words that a jointly trained text encoder knows; [] for the large ones."""
        if not self.config.joint_text:
            return []
        return sorted(word for word in self.tokenizer.get_vocab() if not word.startswith("<"))

    def _check_lengths(self, prompts: Sequence[str]) -> None:
        limits = [
            (tokenizer, limit)
            for tokenizer, limit in (
                (self.tokenizer, 77),
                (self.tokenizer_2, 77),
                (self.tokenizer_3, self.config.max_tokens),
            )
            if tokenizer is not None
        ]
        for text in prompts:
            counts = [(len(tokenizer(text).input_ids), limit) for tokenizer, limit in limits]
            if counts and all(count > limit for count, limit in counts):
                count, limit = counts[-1]
                raise ValueError(f"prompt: {count} tokens are too many, at most {limit} are read ({text[:60]!r}...)")
            if any(count > limit for count, limit in counts):
                warnings.warn(
                    f"prompt: CLIP reads only the first 77 tokens of {text[:60]!r}...", PromptWarning, stacklevel=5
                )


def load(checkpoint: str | os.PathLike) -> SnapGenPipeline:
    """For commands: the pipeline of a checkpoint, without the progress bars of the libraries that read it."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
    return SnapGenPipeline.from_pretrained(checkpoint)


def _own_modules(folder: Path) -> set[str]:
    """Which of our modules a saved pipeline takes components from; all where there is no folder to look into."""
    ours = {"snapgen.unet", "snapgen.mmdit", "snapgen.fusion_unet", "snapgen.decoder", "snapgen.kl_decoder"}
    if not folder.is_dir():
        return ours
    index = io.read_json(folder / "model_index.json")
    return ours & {entry[0] for entry in index.values() if isinstance(entry, list)}


def _check_complete(module: torch.nn.Module, folder: Path) -> None:
    """Refuse weights that leave some of the module's out: the libraries fill those in at random."""
    found = {name for file in folder.glob("*.safetensors") for name in io.tensor_names(file)}
    missing = sorted(module.state_dict().keys() - found)
    if missing:
        raise io.CheckpointError(
            f"{folder}: its weights are those of another model: {', '.join(missing[:3])} "
            f"{'is' if len(missing) == 1 else 'are'} missing ({len(missing)} in all)"
        )


def _check_folder(folder: Path) -> None:
    """Refuse a folder that holds no pipeline, or damaged files or pickles, before anything is built."""
    if not (folder / "model_index.json").is_file():
        raise io.CheckpointError(f"{folder}: holds no model_index.json, so it is not a saved pipeline")
    index = io.read_json(folder / "model_index.json")
    if index.get("_class_name") != SnapGenPipeline.__name__:
        raise io.CheckpointError(f"{folder}: holds a {index.get('_class_name')}, not a {SnapGenPipeline.__name__}")
    for name, entry in index.items():
        if not (isinstance(entry, list) and len(entry) == 2 and entry[1] is not None):
            continue
        if not (folder / name).is_dir():
            raise io.CheckpointError(f"{folder}: has no folder {name}, which its model_index.json names")
        config = folder / name / "config.json"
        kind = io.read_json(config).get("_class_name", entry[1]) if config.is_file() else entry[1]
        if kind != entry[1]:
            raise io.CheckpointError(f"{config}: describes a {kind}; {name} is a {entry[1]}")
    if index.get("joint_text") and "model" not in io.read_json(folder / "tokenizer" / "tokenizer.json"):
        raise io.CheckpointError(f"{folder / 'tokenizer' / 'tokenizer.json'}: damaged, describes no tokenizer")
    for file in sorted(folder.rglob("*")):
        if file.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl"):
            raise io.CheckpointError(f"{file}: this may be a pickle; only safetensors are read")
        if file.suffix == ".safetensors":
            io.check_tensors(file)
        if file.suffix == ".json":
            io.read_json(file)
