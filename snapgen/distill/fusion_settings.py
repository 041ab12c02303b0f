"""What the commands of SnapFusion and of decoders are told, as dataclasses: importing them loads no PyTorch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class EvolveConfig:
    """How to evolve."""

    latency: float
    """Milliseconds of one forward pass to come down to, by the latency table."""
    rounds: int = 8
    """Rounds of robust training and evolution."""
    group: int = 2
    """Blocks dropped or added in a round, at most."""

    def __post_init__(self) -> None:
        if not self.latency > 0:
            raise ValueError(f"latency: got {self.latency}; must be positive")
        for name in ("rounds", "group"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}; must be at least 1")


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """How a decoder is compared with pictures. The paper gives no weights; these are our choice."""

    l1: float = 1.0
    """Weight of the mean absolute error."""
    l2: float = 1.0
    """Weight of the mean squared error."""
    perceptual: float = 0.0
    """Weight of the distance of VGG16's features; needs `vgg`."""
    vgg: Path | None = None
    """Safetensors of torchvision's vgg16, for `perceptual`."""
    adversarial: float = 0.0
    """Weight of the patch discriminator's hinge loss."""
    adversarial_from: int = 0
    """Step from which the decoder sees the discriminator, which learns from the start."""
    discriminator_width: int = 64
    """Channels of the discriminator's first layer."""
    crops: tuple[tuple[int, int], ...] = ()
    """(First step, side in pixels) of square crops, in order; whole pictures before the first and with none."""

    def __post_init__(self) -> None:
        for name in ("l1", "l2", "perceptual", "adversarial"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: got {getattr(self, name)}; must not be negative")
        if self.l1 + self.l2 + self.perceptual == 0:
            raise ValueError("l1, l2, perceptual: all are 0; nothing would hold the pictures to the real ones")
        if self.perceptual and self.vgg is None:
            raise ValueError(
                "vgg: got none; perceptual needs a safetensors file with the weights of torchvision's vgg16 "
                "(in an environment with torchvision: safetensors.torch.save_file(torchvision.models.vgg16(weights="
                '"IMAGENET1K_V1").state_dict(), "vgg16.safetensors"))'
            )
        steps = [step for step, _ in self.crops]
        if steps != sorted(set(steps)) or any(step < 0 for step in steps):
            raise ValueError(f"crops: got {self.crops}; the first steps must rise from 0 or more")

    def crop(self, step: int) -> int | None:
        """The side of step `step`'s crops; None for whole pictures."""
        return next((side for first, side in reversed(self.crops) if step >= first), None)
