"""A frozen teacher: the velocity that it predicts, and what its layers hold on the way.

Any diffusers transformer that takes latents [B, C, H, W] and predicts the rectified flow's velocity for them (SD3,
equation 14) can be one, and so can a model of ours. It reads the captions with its own text encoders.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from snapgen import flow, io, parallel
from snapgen.distill.captions import CaptionStore, Reader
from snapgen.distill.features import Taps
from snapgen.text import TextEmbedding

Quantization = Literal["bitsandbytes", "torchao"]


class Teacher:
    """A frozen network with what it reads captions with. Nothing of it is ever trained or saved.

    Args:
        network: called by keyword: latents (`sample` or `hidden_states`), `timestep` (1000 t),
            `encoder_hidden_states`, and where it takes them `encoder_attention_mask` and `pooled_projections`.
        reader: embeds captions.
        guidance: w of classifier-free guidance folded into the velocity, v_uncond + w (v - v_uncond); 1 for none.
        sharded: deal the weights out over the processes (FSDP2), where there are several, at the first use.
        record: what it is, for JSON; a run is not resumed with another.

    Raises:
        ValueError: the network's forward takes other arguments.
    """

    def __init__(
        self,
        network: nn.Module,
        reader: Reader,
        *,
        guidance: float = 1.0,
        sharded: bool = False,
        record: Mapping[str, Any] | None = None,
    ) -> None:
        self.network = network.requires_grad_(False).eval()
        self.reader, self.guidance = reader, guidance
        self.accepts = inspect.signature(network.forward).parameters
        found = [name for name in ("sample", "hidden_states") if name in self.accepts]
        if not found or not {"timestep", "encoder_hidden_states"} <= self.accepts.keys():
            raise ValueError(
                f"teacher: {type(network).__name__}'s forward takes {', '.join(self.accepts)}; it must take sample or "
                f"hidden_states, timestep, and encoder_hidden_states"
            )
        self.latents = found[0]
        self.record = {**(record or {}), "guidance": guidance}
        self._sharding = sharded
        self._empty: TextEmbedding | None = None

    @property
    def channels(self) -> int:
        """Latent channels."""
        return self.network.config.in_channels  # type: ignore[union-attr, return-value]

    @property
    def place(self) -> torch.device:
        """Where its weights stand."""
        return next(self.network.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of its arithmetic; quantized weights have another."""
        return next(p.dtype for p in self.network.parameters() if p.is_floating_point())

    @torch.no_grad()
    def read(self, captions: Sequence[str]) -> TextEmbedding:
        """Captions as the network takes them."""
        return self.reader(captions)

    @torch.no_grad()
    def velocity(
        self, x_t: Tensor, t: Tensor, text: TextEmbedding, layers: Sequence[str] = ()
    ) -> tuple[Tensor, list[Tensor]]:
        """The velocity [B, C, H, W], fp32, with guidance folded in, and the features of `layers`, without it.

        Args:
            x_t: noisy latents [B, C, H, W]. t: times [B] in [0, 1].
            text: of :meth:`read`.
            layers: names of modules of the network.

        Raises:
            ValueError: the network gives something else than a velocity of the latents' shape, or a layer gives no
                features.
        """
        conditional, features = self._run(x_t, t, text, layers)
        if self.guidance == 1.0:
            return conditional, features
        if self._empty is None:
            self._empty = self.reader([""])
        batch = len(x_t)
        context, mask, pooled = self._empty
        empty = TextEmbedding(
            context.expand(batch, -1, -1), mask.expand(batch, -1), None if pooled is None else pooled.expand(batch, -1)
        )
        unconditional, _ = self._run(x_t, t, empty)
        return torch.lerp(unconditional, conditional, self.guidance), features

    def features(self, x_t: Tensor, t: Tensor, text: TextEmbedding, layers: Sequence[str]) -> list[Tensor]:
        """The features of `layers` at x_t as grids [B, C, h, w]; gradients reach x_t and nothing of the teacher."""
        return self._run(x_t, t, text, layers)[1]

    def _run(
        self, x_t: Tensor, t: Tensor, text: TextEmbedding, layers: Sequence[str] = ()
    ) -> tuple[Tensor, list[Tensor]]:
        self._shard()
        place, dtype = self.place, self.dtype
        named: dict[str, Any] = {
            self.latents: x_t.to(place, dtype),
            "timestep": t.to(place) * flow.TIMESTEP_SCALE,
            "encoder_hidden_states": text.context.to(place, dtype),
        }
        if "encoder_attention_mask" in self.accepts:
            named["encoder_attention_mask"] = text.mask.to(place)
        if "pooled_projections" in self.accepts:
            named["pooled_projections"] = None if text.pooled is None else text.pooled.to(place, dtype)
        with Taps(self.network, layers) as taps:
            velocity = self.network(**named, return_dict=False)[0]
        if velocity.shape != x_t.shape:
            raise ValueError(
                f"teacher: {type(self.network).__name__} gives {tuple(velocity.shape)} for latents "
                f"{tuple(x_t.shape)}; a velocity has their shape"
            )
        return velocity.to(x_t.device).float(), taps.grids(layers, x_t.shape[-2:])

    def _shard(self) -> None:
        # Not before: the processes know of each other only once the training loop runs.
        if self._sharding and torch.distributed.is_initialized():
            self._sharding = False
            kind = "cuda" if torch.cuda.is_available() else "cpu"
            rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
            parallel.shard({"teacher": self.network}, parallel.Processes("fsdp", rank, world, torch.device(kind)))


def load_teacher(
    path: str | Path,
    *,
    guidance: float = 1.0,
    dtype: torch.dtype | None = None,
    quantization: Quantization | None = None,
    sharded: bool = False,
    captions: Path | None = None,
    device: torch.device | str = "cpu",
) -> Teacher:
    """The teacher in a folder.

    Args:
        path: of a `SnapGenPipeline` (a model of ours, the tiny MMDiT; or a shipped one's name), of a diffusers Stable
            Diffusion 3 or 3.5 pipeline, or of a bare diffusers transformer with its config.json.
        guidance: folded into its velocity.
        dtype: of its weights; bf16 for Stable Diffusion 3 and bare transformers, fp32 for ours, unless given.
        quantization: 8-bit weights of the transformer by this library, which must be installed.
        sharded: deal its weights out over the processes.
        captions: a folder of embeddings (`store_captions`); its text encoders are then not loaded.

    Raises:
        io.CheckpointError: the folder holds none of these, its weights are no safetensors, or some are missing.
        ValueError: an argument does not fit the kind of teacher.
        ImportError: the library for `quantization` is not installed.
    """
    from snapgen.config import SHIPPED

    folder = SHIPPED / path if isinstance(path, str) and (SHIPPED / path).is_dir() else Path(path)
    stored = None if captions is None else CaptionStore(captions, device)
    record = {"teacher": fingerprint(folder), "teacher_dtype": str(dtype), "quantization": quantization}
    if quantization is not None and sharded:
        raise ValueError("quantization: 8-bit weights cannot be dealt out over the processes; choose one of the two")
    # Weights that are dealt out go to the GPUs then; bitsandbytes has put its own there by itself.
    target = "cpu" if sharded else device
    if not (folder / "model_index.json").is_file():
        if not (folder / "config.json").is_file():
            raise io.CheckpointError(f"teacher: {folder} holds neither a model_index.json nor a config.json")
        if stored is None:
            raise ValueError(f"captions: {folder} is a transformer without text encoders; give embedded captions")
        name = io.read_json(folder / "config.json").get("_class_name", "")
        network = _transformer(folder, name, dtype or torch.bfloat16, quantization)
        network = network if quantization == "bitsandbytes" else network.to(target)
        return Teacher(network, stored, guidance=guidance, sharded=sharded, record=record)
    kind = io.read_json(folder / "model_index.json").get("_class_name")
    if kind == "SnapGenPipeline":
        if quantization is not None:
            raise ValueError("quantization: is for diffusers' transformers; a model of ours is small enough without")
        from snapgen.pipeline import load

        pipe = load(folder).to(device)
        if dtype is not None:
            pipe.denoiser.to(dtype=dtype)
        return Teacher(pipe.denoiser, stored or pipe.encode_prompt, guidance=guidance, sharded=sharded, record=record)
    if kind == "StableDiffusion3Pipeline":
        half = dtype or torch.bfloat16
        network = _transformer(folder / "transformer", "SD3Transformer2DModel", half, quantization)
        network = network if quantization == "bitsandbytes" else network.to(target)
        reader = stored or _sd3_reader(folder, network, half, device)
        return Teacher(network, reader, guidance=guidance, sharded=sharded, record=record)
    raise io.CheckpointError(f"teacher: {folder} holds a {kind}; must be SnapGenPipeline or StableDiffusion3Pipeline")


def _quantization(library: Quantization) -> Any:
    """diffusers' configuration of 8-bit weights by `library`."""
    import importlib.util

    if library not in ("bitsandbytes", "torchao"):
        raise ValueError(f"quantization: got {library!r}; allowed are bitsandbytes and torchao")
    if importlib.util.find_spec(library) is None:
        raise ImportError(f"quantization: {library} is not installed (pip install {library})")
    import diffusers

    if library == "bitsandbytes":
        return diffusers.BitsAndBytesConfig(load_in_8bit=True)
    from torchao.quantization import Int8WeightOnlyConfig

    return diffusers.TorchAoConfig(Int8WeightOnlyConfig())


def _sd3_reader(folder: Path, network: nn.Module, dtype: torch.dtype, device: torch.device | str) -> Reader:
    """CLIP-L, CLIP-G and, where the folder has it, T5, joined as diffusers' Stable Diffusion 3 pipeline joins them."""
    import transformers
    from diffusers import StableDiffusion3Pipeline

    parts: dict[str, Any] = {}
    for number in ("", "_2", "_3"):
        encoder, tokenizer = folder / f"text_encoder{number}", folder / f"tokenizer{number}"
        parts[encoder.name] = parts[tokenizer.name] = None
        if encoder.is_dir():
            kind = transformers.T5EncoderModel if number == "_3" else transformers.CLIPTextModelWithProjection
            model = _whole(kind, encoder, dtype=dtype)
            parts[encoder.name] = model.requires_grad_(False).eval().to(device)
            parts[tokenizer.name] = transformers.AutoTokenizer.from_pretrained(tokenizer, local_files_only=True)
        elif number != "_3":
            raise io.CheckpointError(f"{folder}: has no {encoder.name}")
    pipe = StableDiffusion3Pipeline(transformer=network, scheduler=None, vae=None, **parts)

    def read(captions: Sequence[str]) -> TextEmbedding:
        context, _, pooled, _ = pipe.encode_prompt(
            list(captions), None, None, device=torch.device(device), do_classifier_free_guidance=False
        )
        mask = torch.ones(context.shape[:2], dtype=torch.bool, device=context.device)  # SD3 attends to its padding
        return TextEmbedding(context, mask, pooled)

    return read


def _whole(kind: Any, folder: Path, **settings: Any) -> Any:
    """A model of diffusers or transformers from a local folder; they fill in missing weights at random, we refuse."""
    for file in folder.glob("*.safetensors"):
        io.check_tensors(file)
    try:
        model, info = kind.from_pretrained(
            folder, use_safetensors=True, local_files_only=True, output_loading_info=True, **settings
        )
    except OSError as error:
        raise io.CheckpointError(f"{folder}: holds no {kind.__name__} in safetensors ({error})") from error
    missing = sorted(info["missing_keys"]) + [str(row[0]) for row in info["mismatched_keys"]]
    if missing:
        raise io.CheckpointError(
            f"{folder}: its weights are those of another model: {', '.join(missing[:3])} "
            f"{'is' if len(missing) == 1 else 'are'} missing or of another shape ({len(missing)} in all)"
        )
    return model


def _transformer(folder: Path, name: str, dtype: torch.dtype, quantization: Quantization | None) -> nn.Module:
    """The diffusers model of this class, on the CPU, or, with 8-bit weights, where the library has put it."""
    import diffusers

    kind = getattr(diffusers, name, None)
    if not (inspect.isclass(kind) and issubclass(kind, diffusers.ModelMixin)):
        raise io.CheckpointError(f"{folder}: is a {name or 'model without a name'}, which diffusers does not have")
    settings = {} if quantization is None else {"quantization_config": _quantization(quantization)}
    return _whole(kind, folder, torch_dtype=dtype, **settings)


def fingerprint(folder: str | Path) -> str:
    """A digest of the weights in a folder: of each file its name, length, and both ends; the folder may move.

    Raises:
        io.CheckpointError: it holds no safetensors.
    """
    folder, ends = Path(folder), 1 << 20
    files = sorted(folder.rglob("*.safetensors"))
    if not files:
        raise io.CheckpointError(f"{folder}: holds no safetensors")
    digest = hashlib.sha256()
    for file in files:
        length = file.stat().st_size
        digest.update(f"{file.relative_to(folder)} {length}\n".encode())
        with file.open("rb") as opened:
            digest.update(opened.read(ends))
            opened.seek(max(0, length - ends))
            digest.update(opened.read(ends))
    return digest.hexdigest()[:16]
