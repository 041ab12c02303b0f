"""A perceptual distance by VGG16's features, and a patch discriminator: what sharpens a decoder's pictures."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor, nn

from snapgen import io

# Convolutions' widths and poolings of VGG16 (Simonyan and Zisserman, 2015, configuration D).
_VGG16 = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512)
_TAPS = (3, 8, 15, 22, 29)  # after the ReLU of conv1_2, 2_2, 3_3, 4_3, 5_3
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, of pictures in [0, 1]
_SMALLEST = 16  # pixels: four poolings


class VGG16Features(nn.Module):
    """The convolutions of VGG16, under torchvision's names ("features.0.weight", ...), frozen.

    Args:
        path: safetensors of torchvision's `vgg16` state dict; its classifier may be there and is left out. Its weights
            ship with no package that we depend on.

    Raises:
        io.CheckpointError: the file is missing, no safetensors, or of another net.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = 3
        for entry in _VGG16:
            if isinstance(entry, int):
                layers += [nn.Conv2d(width, entry, 3, padding=1), nn.ReLU()]
                width = entry
            else:
                layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.mean: Tensor
        self.std: Tensor
        tensors = {name: t.float() for name, t in io.load_tensors(path).items() if not name.startswith("classifier.")}
        io.load_strictly(self, tensors, path, "the convolutions of torchvision's vgg16")
        self.register_buffer("mean", torch.tensor(_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(_STD).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    def forward(self, pictures: Tensor) -> list[Tensor]:
        """The features of pictures [B, 3, H, W] in [-1, 1] at five depths, each of unit length at every place.

        Raises:
            ValueError: a side is less than 16 pixels.
        """
        if min(pictures.shape[-2:]) < _SMALLEST:
            raise ValueError(f"pictures: got {tuple(pictures.shape[-2:])}; a side must be at least {_SMALLEST} pixels")
        x = ((pictures + 1) / 2 - self.mean) / self.std
        found = []
        for index, layer in enumerate(self.features):
            x = layer(x)
            if index in _TAPS:
                found.append(unit(x))
        return found

    def distance(self, drawn: Tensor, real: Tensor) -> Tensor:
        """The squared distance of both pictures' features, summed over channels, averaged over places and summed over
        depths: [B]. LPIPS (Zhang et al., 2018) with all of its learned weights at 1, which is our choice."""
        with torch.no_grad():
            wanted = self(real)
        pairs = zip(self(drawn), wanted, strict=True)
        return torch.stack([(own - other).square().sum(1).mean((1, 2)) for own, other in pairs]).sum(0)


def unit(x: Tensor) -> Tensor:
    """Feature vectors [B, C, H, W] of unit length over C; a vector of zeros stays so."""
    return x / x.square().sum(1, keepdim=True).add(1e-10).sqrt()


class PatchDiscriminator(nn.Module):
    """PatchGAN (Isola et al., 2017): pictures [B, 3, H, W] to a score for every patch, [B, 1, H / 8 - 2, W / 8 - 2].

    GroupNorm stands where the paper has BatchNorm, so that a picture's scores do not depend on the batch that it is in.

    Args:
        width: of the first convolution; doubled three times.
    """

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for factor, stride in ((2, 2), (4, 2), (8, 1)):
            out = width * factor
            layers += [
                nn.Conv2d(out // 2, out, 4, stride=stride, padding=1, bias=False),
                nn.GroupNorm(math.gcd(32, out), out),
                nn.LeakyReLU(0.2),
            ]
        self.layers = nn.Sequential(*layers, nn.Conv2d(8 * width, 1, 4, padding=1))

    def forward(self, pictures: Tensor) -> Tensor:
        """Scores; real is high.

        Raises:
            ValueError: a side is less than 24 pixels, which leaves no patch.
        """
        if min(pictures.shape[-2:]) < 24:
            raise ValueError(f"pictures: got {tuple(pictures.shape[-2:])}; a side must be at least 24 pixels")
        return self.layers(pictures)


def hinge_discriminator(real: Tensor, drawn: Tensor) -> Tensor:
    """Mean of max(0, 1 - D(real)) + max(0, 1 + D(drawn)), of scores [B, ...]: [B]."""
    losses = (nn.functional.relu(1 - real).flatten(1).mean(1), nn.functional.relu(1 + drawn).flatten(1).mean(1))
    return losses[0] + losses[1]


def hinge_generator(drawn: Tensor) -> Tensor:
    """Mean of -D(drawn), of scores [B, ...]: [B]."""
    return -drawn.flatten(1).mean(1)
