"""What the commands of training are told, as dataclasses: importing them loads no PyTorch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Kind = Literal["ddp", "fsdp"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train. What decides the weights is saved with the run and may not differ when it is resumed."""

    steps: int = 10_000
    """Optimizer steps in all."""
    batch_size: int = 64
    """Samples of an optimizer step, over all processes and passes."""
    micro_batch: int | None = None
    """Samples of one forward pass of one process; by default its whole share of the batch."""
    lr: float = 1e-3
    """Peak learning rate."""
    warmup: int = 200
    """Steps of linear warm-up."""
    cooldown: float = 0.25
    """Share of all steps, at the end, over which the learning rate falls linearly to zero."""
    weight_decay: float = 0.01
    """AdamW's decoupled weight decay."""
    betas: tuple[float, float] = (0.9, 0.99)
    """AdamW's moments."""
    grad_clip: float = 1.0
    """Largest norm of the gradient."""
    spike: float = 10.0
    """Skip a step whose gradient's norm exceeds this many times its running average, or is not finite; 0: the latter
    alone."""
    patience: int = 20
    """Skipped steps in a row after which the run stops."""
    ema: float = 0.999
    """Decay of the averaged weights, which are what is exported."""
    dtype: str = "fp32"
    """Arithmetic: fp32, or bf16 (autocast; weights and optimizer stay fp32)."""
    seed: int = 0
    """Decides data order, noise and initial weights."""
    save_every: int = 500
    """Steps between checkpoints."""
    sample_every: int = 1000
    """Steps between sample grids."""
    log_every: int = 20
    """Steps between figures in the progress line, TensorBoard and Weights & Biases."""
    keep: int = 2
    """Checkpoints to keep."""
    workers: int = 0
    """Processes that read data; 0 reads in this one."""
    compile: bool = False
    """torch.compile the trained modules."""
    recompute: bool = False
    """Keep little for the backward pass and compute it again: less memory, about a third more time."""
    recompute_keeps: tuple[str, ...] = ()
    """With recompute: operators whose results are kept nevertheless ("snapgen::attention", "aten::mm", ...)."""
    parallel: Kind = "ddp"
    """Under torchrun: whole weights on every process (ddp), or dealt out (fsdp)."""
    wandb: str | None = None
    """Also report to this Weights & Biases project."""
    export_dtype: str = "fp32"
    """What the exported weights are stored in: fp32, or fp16 at half the size. They load as fp32 either way."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "save_every", "sample_every", "log_every", "keep", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}; must be at least 1")
        if self.micro_batch is not None and self.micro_batch < 1:
            raise ValueError(f"micro_batch: got {self.micro_batch}; must be at least 1")
        if self.dtype not in ("fp32", "bf16"):
            raise ValueError(f"dtype: got {self.dtype!r}; allowed are fp32 and bf16")
        if self.export_dtype not in ("fp32", "fp16"):
            raise ValueError(f"export_dtype: got {self.export_dtype!r}; allowed are fp32 and fp16")
        if not 0 <= self.cooldown <= 1:
            raise ValueError(f"cooldown: got {self.cooldown}; must lie in [0, 1]")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema: got {self.ema}; must lie in [0, 1)")
        if self.spike < 0 or 0 < self.spike <= 1:
            raise ValueError(f"spike: got {self.spike}; must be 0 or more than 1")
        for name in ("lr", "grad_clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: got {getattr(self, name)}; must be positive")
        if self.compile and self.recompute_keeps:
            raise ValueError("recompute_keeps: cannot be had together with compile, which chooses what is kept itself")
        if self.recompute_keeps and not self.recompute:
            raise ValueError("recompute_keeps: has no effect without recompute")


@dataclass(frozen=True, kw_only=True)
class Source:
    """What to train and on what."""

    preset: str = "tiny"
    """Which model (`snapgen info` lists them)."""
    data: str = "shapes"
    """"shapes", "digits", imagenet:FOLDER (of class folders), a folder of pictures and captions, WebDataset shards
    (.tar; stream:..., pipe:... or a URL to read them in order), or the folder of a cache (`snapgen cache`)."""
    autoencoder: str | None = None
    """Whose latents: a shipped checkpoint's name, the export/ folder of `snapgen train-autoencoder`, or for presets
    with public latents a folder of a diffusers AutoencoderKL. By default a shipped one with the preset's latents."""
    decoder: Path | None = None
    """Trained decoder (of `snapgen decoder train`) of a preset with public latents, to draw sample grids and to export
    a whole pipeline."""
    clip_l: Path | None = None
    """Frozen CLIP-L, a folder of transformers; or text_encoder/ of a diffusers pipeline."""
    clip_g: Path | None = None
    """Frozen CLIP-G."""
    gemma: Path | None = None
    """Frozen Gemma-2-2b."""
    init: str | None = None
    """Begin with the weights of this export/ folder or shipped checkpoint, of a lower resolution for example."""
    resolution: int | None = None
    """Pixels on a side (with buckets: of the square of the same area); the preset's by default. The flow's shift
    follows it."""
    buckets: bool = False
    """Keep aspect ratios: every step's pictures come from one bucket of sizes."""
    caption_dropout: float = 0.1
    """Share of captions replaced by the empty one, for guidance."""
    encoder_dropout: float = 0.0
    """Share of samples that do not see a frozen text encoder, for each encoder."""
