"""Inception-v3 as FID uses it (Szegedy et al. 2016; the graph of 2015-12-05 that Heusel et al. 2017 took).

Names of layers are those that PyTorch's ports of that graph agree on (Conv2d_1a_3x3.conv.weight, ...,
Mixed_7c.branch_pool.bn.bias), so that their weights load once they are stored as safetensors. Two things differ from
the Inception-v3 that is trained today: average pools leave the padding out of their means, and the last block's pool is
a maximum. The classifier, fc.*, is not used.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from snapgen import io

SIDE = 299  # pixels on a side of what it reads
WIDTH = 2048  # of the features


class _Conv(nn.Module):
    """Convolution without bias, batch norm, ReLU."""

    def __init__(self, width: int, out: int, kernel: Any, stride: int = 1, padding: Any = 0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(self.conv(x)))


def _average(x: Tensor) -> Tensor:
    return nn.functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


class _A(nn.Module):
    """35x35: 1x1, 5x5, two 3x3, pool."""

    def __init__(self, width: int, pool: int) -> None:
        super().__init__()
        self.branch1x1 = _Conv(width, 64, 1)
        self.branch5x5_1 = _Conv(width, 48, 1)
        self.branch5x5_2 = _Conv(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = _Conv(width, 64, 1)
        self.branch3x3dbl_2 = _Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = _Conv(96, 96, 3, padding=1)
        self.branch_pool = _Conv(width, pool, 1)

    def forward(self, x: Tensor) -> Tensor:
        five = self.branch5x5_2(self.branch5x5_1(x))
        three = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat((self.branch1x1(x), five, three, self.branch_pool(_average(x))), 1)


class _B(nn.Module):
    """35x35 to 17x17."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch3x3 = _Conv(width, 384, 3, stride=2)
        self.branch3x3dbl_1 = _Conv(width, 64, 1)
        self.branch3x3dbl_2 = _Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = _Conv(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat((self.branch3x3(x), three, nn.functional.max_pool2d(x, 3, 2)), 1)


class _C(nn.Module):
    """17x17: 7x7 as 1x7 and 7x1."""

    def __init__(self, width: int, middle: int) -> None:
        super().__init__()
        row: Any = dict(kernel=(1, 7), padding=(0, 3))
        column: Any = dict(kernel=(7, 1), padding=(3, 0))
        self.branch1x1 = _Conv(width, 192, 1)
        self.branch7x7_1 = _Conv(width, middle, 1)
        self.branch7x7_2 = _Conv(middle, middle, **row)
        self.branch7x7_3 = _Conv(middle, 192, **column)
        self.branch7x7dbl_1 = _Conv(width, middle, 1)
        self.branch7x7dbl_2 = _Conv(middle, middle, **column)
        self.branch7x7dbl_3 = _Conv(middle, middle, **row)
        self.branch7x7dbl_4 = _Conv(middle, middle, **column)
        self.branch7x7dbl_5 = _Conv(middle, 192, **row)
        self.branch_pool = _Conv(width, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat((self.branch1x1(x), seven, double, self.branch_pool(_average(x))), 1)


class _D(nn.Module):
    """17x17 to 8x8."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch3x3_1 = _Conv(width, 192, 1)
        self.branch3x3_2 = _Conv(192, 320, 3, stride=2)
        self.branch7x7x3_1 = _Conv(width, 192, 1)
        self.branch7x7x3_2 = _Conv(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3 = _Conv(192, 192, (7, 1), padding=(3, 0))
        self.branch7x7x3_4 = _Conv(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3_2(self.branch3x3_1(x))
        seven = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat((three, seven, nn.functional.max_pool2d(x, 3, 2)), 1)


class _E(nn.Module):
    """8x8, with branches that end in a 1x3 and a 3x1 side by side."""

    def __init__(self, width: int, *, largest: bool) -> None:
        super().__init__()
        self.largest = largest
        row: Any = dict(kernel=(1, 3), padding=(0, 1))
        column: Any = dict(kernel=(3, 1), padding=(1, 0))
        self.branch1x1 = _Conv(width, 320, 1)
        self.branch3x3_1 = _Conv(width, 384, 1)
        self.branch3x3_2a = _Conv(384, 384, **row)
        self.branch3x3_2b = _Conv(384, 384, **column)
        self.branch3x3dbl_1 = _Conv(width, 448, 1)
        self.branch3x3dbl_2 = _Conv(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = _Conv(384, 384, **row)
        self.branch3x3dbl_3b = _Conv(384, 384, **column)
        self.branch_pool = _Conv(width, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        three, double = self.branch3x3_1(x), self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = nn.functional.max_pool2d(x, 3, 1, 1) if self.largest else _average(x)
        parts = (
            self.branch1x1(x),
            self.branch3x3_2a(three),
            self.branch3x3_2b(three),
            self.branch3x3dbl_3a(double),
            self.branch3x3dbl_3b(double),
            self.branch_pool(pooled),
        )
        return torch.cat(parts, 1)


class Inception(nn.Module):
    """Pictures [B, 3, H, W] in [-1, 1] to features [B, 2048]."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = _Conv(32, 32, 3)
        self.Conv2d_2b_3x3 = _Conv(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = _Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = _Conv(80, 192, 3)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = _A(192, 32), _A(256, 64), _A(288, 64)
        self.Mixed_6a = _B(288)
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = (
            _C(768, 128),
            _C(768, 160),
            _C(768, 160),
            _C(768, 192),
        )
        self.Mixed_7a = _D(768)
        self.Mixed_7b, self.Mixed_7c = _E(1280, largest=False), _E(2048, largest=True)

    def forward(self, pictures: Tensor) -> Tensor:
        # Without antialiasing, as FID is usually computed.
        x = nn.functional.interpolate(pictures, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = nn.functional.max_pool2d(x, 3, 2)
        x = nn.functional.max_pool2d(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)), 3, 2)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        return x.mean((2, 3))


def load_inception(path: Path) -> Inception:
    """The network with weights of a safetensors file.

    Raises:
        io.CheckpointError: it is damaged, or holds other layers.
    """
    network = Inception()
    own = network.state_dict()
    tensors = {name: value for name, value in io.load_tensors(path).items() if not name.startswith("fc.")}
    # Some ports leave out this counter, which has no effect.
    tensors |= {name: own[name] for name in own if name.endswith("num_batches_tracked") and name not in tensors}
    io.load_strictly(network, tensors, path, "Inception-v3")
    return network.eval().requires_grad_(False)
