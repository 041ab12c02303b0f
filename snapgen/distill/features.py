"""Features of layers inside a network: read by hooks, brought to a common grid, compared through projectors.

L_featkd = || f_teacher - psi(f_student) ||^2, psi a trained projector (SnapGen, section 3.3). The paper takes the last
transformer layer of both; any list of layers can be given here. Where the grids differ, both features are averaged over
the cells of the coarser one (our choice: nobody is asked for detail that he does not have).
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

Kind = Literal["linear", "conv", "mlp"]
TRANSFORMERS = ("TransformerBlock", "SpatialTransformer")  # how the classes of such layers end, ours and diffusers'


@dataclass(frozen=True)
class LayerPair:
    """A layer of the teacher, the student's layer that is to give the same, and the projector between them.

    Args:
        teacher, student: names of modules ("transformer_blocks.37", "up.1.layers.2.transformer").
        projector: "linear" (1x1), "conv" (3x3) or "mlp" (1x1, SiLU, 1x1).
    """

    teacher: str
    student: str
    projector: Kind = "linear"

    def __post_init__(self) -> None:
        if self.projector not in get_args(Kind):
            raise ValueError(f"projector: got {self.projector!r}; allowed are {', '.join(get_args(Kind))}")

    @staticmethod
    def parse(text: str, teacher: nn.Module, student: nn.Module) -> LayerPair:
        """A pair from "TEACHER:STUDENT" or "TEACHER:STUDENT:PROJECTOR"; a layer "last" is the last transformer's.

        Raises:
            ValueError: it has another form, or a layer does not exist.
        """
        parts = text.split(":")
        if len(parts) not in (2, 3):
            raise ValueError(f"layers: got {text!r}; must be TEACHER:STUDENT or TEACHER:STUDENT:PROJECTOR")
        names = [
            transformers(module)[-1] if name == "last" else name
            for name, module in zip(parts, (teacher, student), strict=False)
        ]
        for name, module in zip(names, (teacher, student), strict=True):
            layer(module, name)
        return LayerPair(*names, *parts[2:])  # type: ignore[arg-type]


def layer(module: nn.Module, name: str) -> nn.Module:
    """The part of `module` called `name`.

    Raises:
        ValueError: there is none; lists names that are near.
    """
    known = dict(module.named_modules())
    if not name or name not in known:
        near = difflib.get_close_matches(name, known, n=5, cutoff=0.3) or list(dict(module.named_children()))
        raise ValueError(f"layer: {type(module).__name__} has none called {name!r}; near are {', '.join(near)}")
    return known[name]


def transformers(module: nn.Module) -> list[str]:
    """The names of the transformer layers in `module`, outermost alone, in the order in which it holds them.

    Raises:
        ValueError: it has none.
    """
    found: list[str] = []
    for name, part in module.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if name and not inside and type(part).__name__.endswith(TRANSFORMERS):
            found.append(name)
    if not found:
        raise ValueError(f"layer: {type(module).__name__} has no transformer layers that could be chosen; name some")
    return found


class Taps:
    """While open, keeps what the named layers of `module` give; closed, it has left nothing behind in `module`.

    With DDP or FSDP: `module` is what they wrap, not the wrapper.

    Raises:
        ValueError: a layer does not exist.
    """

    def __init__(self, module: nn.Module, names: Sequence[str]) -> None:
        self.layers = {name: layer(module, name) for name in names}
        self._outputs: dict[str, Any] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> Taps:
        for name, part in self.layers.items():

            def keep(part: nn.Module, _: Any, output: Any, name: str = name) -> None:
                # diffusers' joint attention gives (image, text), its blocks (text, image).
                joint = getattr(part, "add_k_proj", None) is not None and isinstance(output, tuple)
                self._outputs[name] = output[0] if joint else output

            self._handles.append(part.register_forward_hook(keep))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def grids(self, names: Sequence[str], size: Sequence[int]) -> list[Tensor]:
        """What the layers gave for latents of `size` (H, W), as grids [B, C, h, w]; the taps let go of it.

        Raises:
            RuntimeError: a layer was not run.
            ValueError: what it gave is no grid over the latents.
        """
        outputs, self._outputs = self._outputs, {}
        missing = [name for name in names if name not in outputs]
        if missing:
            raise RuntimeError(f"layer: {missing[0]} was not called in the forward pass, so it gives no features")
        return [as_grid(outputs[name], size, name) for name in names]


def as_grid(output: Any, size: Sequence[int], name: str = "layer") -> Tensor:
    """A layer's output as a grid [B, C, h, w] over latents of `size` (H, W).

    Grids [B, C, h, w] stay; tokens [B, N, C] are those of an h x w grid with h / w = H / W, row by row. Of several
    tensors it is the last one: SD3's joint blocks give (text, image).

    Raises:
        ValueError: it is neither, or N is no grid of the latents' aspect.
    """
    if isinstance(output, (tuple, list)):
        tensors = [part for part in output if isinstance(part, Tensor)]
        output = tensors[-1] if tensors else output
    if not isinstance(output, Tensor) or output.ndim not in (3, 4):
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(f"{name}: gives {shape}; features are tokens [B, N, C] or grids [B, C, h, w]")
    height, width = size
    if output.ndim == 4:
        if output.shape[2] * width != output.shape[3] * height:
            raise ValueError(
                f"{name}: gives a grid of {output.shape[2]}x{output.shape[3]}; the latents' {height}x{width} have "
                f"another aspect"
            )
        return output
    tokens = output.shape[1]
    rows = math.isqrt(tokens * height // width)
    columns = tokens // rows if rows else 0
    if rows * columns != tokens or rows * width != columns * height:
        raise ValueError(f"{name}: gives {tokens} tokens, which are no grid of the aspect of {height}x{width} latents")
    return output.unflatten(1, (rows, columns)).permute(0, 3, 1, 2)


def averaged(grid: Tensor, size: Sequence[int]) -> Tensor:
    """A grid [B, C, H, W] averaged over the cells of a coarser one, `size` (h, w): [B, C, h, w], fp32.

    A cell that lies in two of the coarser ones counts in each by its area there, so that the mean stays the same.
    """
    if tuple(grid.shape[2:]) == tuple(size):
        return grid.float()
    rows = _overlaps(grid.shape[2], size[0], grid.device)
    columns = _overlaps(grid.shape[3], size[1], grid.device)
    with torch.autocast(grid.device.type, enabled=False):
        return torch.einsum("ih,bchw,jw->bcij", rows, grid.float(), columns)


def _overlaps(fine: int, coarse: int, device: torch.device) -> Tensor:
    """[coarse, fine]: the share of each coarse cell that a fine one covers."""
    edges = torch.arange(fine + 1, device=device, dtype=torch.float64) * (coarse / fine)
    cells = torch.arange(coarse, device=device, dtype=torch.float64).unsqueeze(1)
    return (torch.minimum(edges[1:], cells + 1) - torch.maximum(edges[:-1], cells)).clamp_min(0).float()


def feature_loss(teacher: Tensor, student: Tensor) -> Tensor:
    """Mean squared difference of two grids [B, C, h, w] of equal C, on the coarser grid, per sample: [B], fp32.

    Raises:
        ValueError: channels or aspects differ.
    """
    (_, wide, rows, columns), (_, own, height, width) = teacher.shape, student.shape
    if wide != own or rows * width != columns * height:
        raise ValueError(
            f"features: the teacher's are {wide} channels of {rows}x{columns}, the student's {own} of "
            f"{height}x{width}; both must have as many channels, and grids of one aspect"
        )
    size = (min(rows, height), min(columns, width))
    difference = averaged(teacher, size) - averaged(student, size)
    return difference.square().flatten(1).mean(1)


class Projectors(nn.Module):
    """psi of every pair: from the student's channels to the teacher's.

    Args:
        pairs: as given to the objective.
        student, teacher: channels of each pair's features.
    """

    def __init__(self, pairs: Sequence[LayerPair], student: Sequence[int], teacher: Sequence[int]) -> None:
        super().__init__()
        self.pairs = nn.ModuleList(
            _projector(pair.projector, own, wide) for pair, own, wide in zip(pairs, student, teacher, strict=True)
        )

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Each pair's features [B, C, h, w] of the student in the teacher's channels."""
        return [projector(feature) for projector, feature in zip(self.pairs, features, strict=True)]


def _projector(kind: Kind, student: int, teacher: int) -> nn.Module:
    if kind == "linear":
        return nn.Conv2d(student, teacher, 1)
    if kind == "conv":
        return nn.Conv2d(student, teacher, 3, padding=1)
    return nn.Sequential(nn.Conv2d(student, teacher, 1), nn.SiLU(), nn.Conv2d(teacher, teacher, 1))
