"""PSNR and SSIM of pictures against others: how well a decoder draws what went in."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

RANGE = 2.0  # pictures span [-1, 1]


def as_tensor(pictures: Sequence[Image.Image]) -> Tensor:
    """Pictures of one size as fp32 [B, 3, H, W] in [-1, 1]."""
    pixels = np.stack([np.asarray(picture.convert("RGB")) for picture in pictures])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous()


def psnr(drawn: Tensor, real: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each picture [B, C, H, W] in [-1, 1], in dB: [B], fp64.

    10 log10(peak^2 / MSE), the peak being the range, 2; infinite where there is no difference.

    Raises:
        ValueError: the shapes differ.
    """
    _same(drawn, real)
    error = (drawn.double() - real.double()).square().flatten(1).mean(1)
    return 10 * torch.log10(RANGE**2 / error)


def ssim(drawn: Tensor, real: Tensor) -> Tensor:
    """Structural similarity of each picture [B, C, H, W] in [-1, 1]: [B], fp64 (Wang et al. 2004, equation 13).

    With the paper's Gaussian window of 11x11 (standard deviation 1.5), K1 = 0.01 and K2 = 0.03; means are over channels
    and over the places where the window lies inside.

    Raises:
        ValueError: the shapes differ, or a side is less than 11.
    """
    _same(drawn, real)
    if min(drawn.shape[-2:]) < 11:
        raise ValueError(f"pictures: got {drawn.shape[-2]}x{drawn.shape[-1]} pixels; must be at least 11x11")
    x, y = drawn.double(), real.double()
    mean_x, mean_y = _blurred(x), _blurred(y)
    # Around the means, not E[x^2] - E[x]^2, would need a window for each pixel; fp64 leaves room for the difference.
    var_x = _blurred(x * x) - mean_x * mean_x
    var_y = _blurred(y * y) - mean_y * mean_y
    both = _blurred(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * RANGE) ** 2, (0.03 * RANGE) ** 2
    similar = ((2 * mean_x * mean_y + c1) * (2 * both + c2)) / (
        (mean_x * mean_x + mean_y * mean_y + c1) * (var_x + var_y + c2)
    )
    return similar.flatten(1).mean(1)


def _blurred(x: Tensor) -> Tensor:
    """Means under the window, [B, C, H - 10, W - 10]."""
    weights = torch.exp(-(torch.arange(-5, 6, dtype=x.dtype, device=x.device) ** 2) / (2 * 1.5**2))
    weights = weights / weights.sum()
    channels = x.shape[1]
    for shape in ((11, 1), (1, 11)):
        x = torch.nn.functional.conv2d(x, weights.view(1, 1, *shape).expand(channels, 1, *shape), groups=channels)
    return x


def _same(drawn: Tensor, real: Tensor) -> None:
    if drawn.shape != real.shape or drawn.ndim != 4:
        raise ValueError(
            f"pictures: got shapes {tuple(drawn.shape)} and {tuple(real.shape)}; must be one, [B, C, H, W]"
        )
