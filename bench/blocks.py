"""A whole transformer block as a case: what surrounds the fused ops in the model is PyTorch's for all providers.

    x = x + out1(attention(q1(norm1(x)), k1(norm1(x)), v1(norm1(x)), rotated))
    x = x + out2(attention(q2(norm2(x)), k2(context), v2(context)))
    y = x + out3(geglu(in(norm3(x))))

Attention has one head of keys and values, and RMSNorms on queries and keys, as ``snapgen.layers.TransformerBlock`` with
self-attention. The inputs are a dict by name, so that a block is checked and timed as an op is.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cached_property
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from snapgen_kernels._library import CostCase, Op
from snapgen_kernels.qk_norm_rope import rope_2d
from snapgen_kernels.testing import SPECS, Case, Inputs, OpSpec

NAME = "transformer_block"
_EPS = 1e-6
Draw = Callable[..., Tensor]


def _inputs(case: Case, draw: Draw) -> Inputs:
    d = case.dims  # B, N, C, H, D, M, T (channels of the context), F; N is a square

    def linear(outputs: int, inputs: int) -> Tensor:
        return draw(outputs, inputs) / inputs**0.5

    side = round(d["N"] ** 0.5)
    cos, sin = rope_2d(side, side, d["D"])
    found: Inputs = {"x": draw(d["B"], d["N"], d["C"]), "context": draw(d["B"], d["M"], d["T"]), "cos": cos, "sin": sin}
    for name, source in (("1", d["C"]), ("2", d["T"])):
        found |= {
            f"q{name}": linear(d["H"] * d["D"], d["C"]),
            f"k{name}": linear(d["D"], source),
            f"v{name}": linear(d["D"], source),
            f"q{name}_norm": 1 + 0.2 * draw(d["D"]),
            f"k{name}_norm": 1 + 0.2 * draw(d["D"]),
            f"out{name}_weight": linear(d["C"], d["H"] * d["D"]),
        }
    found |= {
        "in_weight": linear(2 * d["F"], d["C"]),
        "in_bias": draw(2 * d["F"]),
        "out3_weight": linear(d["C"], d["F"]),
    }
    for name in "123":
        found |= {f"norm{name}_weight": 1 + 0.2 * draw(d["C"]), f"norm{name}_bias": 0.2 * draw(d["C"])}
        found[f"out{name}_bias"] = draw(d["C"])
    return found


def _block(i: Inputs, attention: Callable[[Inputs], Tensor], geglu: Callable[[Inputs], Tensor]) -> Tensor:
    def normed(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], i[f"norm{name}_weight"], i[f"norm{name}_bias"])

    def attended(x: Tensor, source: Tensor, name: str, cos: Tensor | None, sin: Tensor | None) -> Tensor:
        q = F.linear(x, i[f"q{name}"]).unflatten(-1, (-1, i[f"k{name}"].shape[0]))
        k, v = F.linear(source, i[f"k{name}"]), F.linear(source, i[f"v{name}"])
        weights = {"q_weight": i[f"q{name}_norm"], "k_weight": i[f"k{name}_norm"]}
        more = {"key_mask": None, "cos": cos, "sin": sin, "scale": None, "eps": _EPS}
        o = attention({"q": q, "k": k, "v": v, **weights, **more})
        return F.linear(o.flatten(-2), i[f"out{name}_weight"], i[f"out{name}_bias"])

    x = i["x"]
    tokens = normed(x, "1")
    x = x + attended(tokens, tokens, "1", i["cos"], i["sin"])
    x = x + attended(normed(x, "2"), i["context"], "2", None, None)
    hidden = geglu({"x": normed(x, "3"), "weight": i["in_weight"], "bias": i["in_bias"], "keep": False})
    return x + F.linear(hidden, i["out3_weight"], i["out3_bias"])


def _public(inputs: Inputs) -> Tensor:
    return _block(inputs, SPECS["attention"].public, SPECS["geglu"].public)


def _eager(inputs: Inputs) -> Tensor:
    return _block(inputs, SPECS["attention"].eager, SPECS["geglu"].eager)


def _reference(inputs: Inputs) -> Tensor:
    return _block(inputs, SPECS["attention"].reference, SPECS["geglu"].reference)


_WEIGHTS = tuple(
    [f"{part}{name}" for name in "12" for part in ("q", "k", "v")]
    + [f"{part}{name}_norm" for name in "12" for part in ("q", "k")]
    + [f"{part}{name}_{kind}" for name in "123" for part in ("norm", "out") for kind in ("weight", "bias")]
    + ["in_weight", "in_bias"]
)
OP = Op(NAME, ("x", "context", "cos", "sin", *_WEIGHTS), ("x", *_WEIGHTS), 1, 0, _reference, False)


def cost(case: CostCase) -> tuple[int, int]:
    """(FLOPs, fewest bytes) of the forward: x, the context and the weights read once, y written once."""
    d = case.dims
    rows, wide = d["B"] * d["N"], d["H"] * d["D"]
    weights = 4 * d["C"] * wide + 2 * d["C"] * d["D"] + 3 * d["C"] * d["F"]
    of_context = 2 * d["T"] * d["D"]
    flops = 2 * rows * weights + 2 * d["B"] * d["M"] * of_context + 4 * rows * wide * (d["N"] + d["M"])
    return flops, (2 * rows * d["C"] + d["B"] * d["M"] * d["T"] + weights + of_context) * case.dtype.itemsize


class _Spec(OpSpec):
    """A block in each of its forms."""

    @cached_property
    def contract(self) -> ModuleType:
        return sys.modules[__name__]

    def reference(self, inputs: Inputs) -> Any:
        return _reference(inputs)


SPEC = _Spec(NAME, _inputs, _public, _eager)


class BlockCase(Case):
    """One call of a whole block; ``ops`` are those of which it has fused kernels."""

    ops = ("attention", "geglu")

    @cached_property
    def spec(self) -> OpSpec:
        return SPEC

    def parts(self) -> list[tuple[str, dict[str, int]]]:
        """The sizes of the ops inside."""
        d = self.dims
        heads = {name: d[name] for name in ("B", "N", "H", "D")}
        return [
            ("attention", {**heads, "M": d["N"], "rope": 1}),
            ("attention", {**heads, "M": d["M"]}),
            ("geglu", {name: d[name] for name in ("B", "N", "C", "F")}),
        ]


# The lowest stage at 1024 px, and its like for tests.
CASES = [
    BlockCase(
        NAME, "896ch-1024", dict(B=1, N=1024, C=896, H=14, D=64, M=333, T=2304, F=2688), torch.float32, bench=True
    ),
    BlockCase(NAME, "small", dict(B=2, N=9, C=24, H=3, D=8, M=5, T=20, F=17), torch.float32),
]
