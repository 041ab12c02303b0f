"""Liger's RMSNorm and rotation (optional: pip install liger-kernel), and PyTorch's attention behind them.

Liger rotates the first half of a head with its second half, we neighbours. With a head's even channels before its odd
ones both are the same, and so are the scores: that is how the inputs lie here, as a user would lay out the weights of
the projections once.

Read in liger-kernel 0.8.5: its rotation works in place, forward on what it is given (here the norm's output, which
nobody else reads), backward on the gradients from above; its RMSNorm writes its gradient over the one from above,
which is its default, unless told otherwise, which would cost it a fill with zeros. Behind attention these gradients are
attention's own and nobody misses them. Of ``qk_norm_rope`` they are the benchmark's, which puts them back before each
backward, outside of what is timed.
"""

from __future__ import annotations

from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from bench.models import ModelCase
from bench.providers.choice import fastest
from bench.providers.eager import drawn
from bench.providers.sdpa import WHAT, kernels
from bench.timing import Prepared
from snapgen_kernels import _backend
from snapgen_kernels.checks import leaves_of, outputs_of
from snapgen_kernels.testing import Case, Inputs

_TURNED = ("q", "k", "q_weight", "k_weight", "cos", "sin")


def _halves(x: Tensor) -> Tensor:
    """The even channels before the odd ones."""
    return torch.cat((x[..., ::2], x[..., 1::2]), -1)


def _neighbours(x: Tensor) -> Tensor:
    """The way back."""
    return torch.stack(x.chunk(2, -1), -1).flatten(-2)


def rotary(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Queries [B, N, H, D] and keys [B, M, D] of inputs that lie as Liger wants them."""
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    # What follows llama's: no offset, x rounded before its weight, the gradient written over what came from above.
    settings = (inputs["eps"], 0.0, "llama", True)
    q = LigerRMSNormFunction.apply(inputs["q"], inputs["q_weight"], *settings)
    k = LigerRMSNormFunction.apply(inputs["k"], inputs["k_weight"], *settings)
    return (q, k) if inputs["cos"] is None else _rotated(q, k, inputs["cos"], inputs["sin"])


def _rotated(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Liger takes [B, H, N, D] that lies as [B, N, H, D]."""
    from liger_kernel.ops.rope import LigerRopeFunction

    turned: Any = LigerRopeFunction.apply(q.transpose(1, 2), k[:, None], cos[None], sin[None])
    return turned[0].transpose(1, 2), turned[1].squeeze(1)


def _back(found: object) -> tuple[Tensor, ...]:
    return tuple(_neighbours(output) for output in outputs_of(found))


class Liger:
    """Liger's kernels for queries and keys; for attention, scaled_dot_product_attention's fastest kernel after them."""

    name = "liger"
    in_torch = True

    def __init__(self) -> None:
        try:
            self.own = metadata.version("liger-kernel")
        except metadata.PackageNotFoundError:
            self.own = ""
        self.version = self.own

    def absent(self, device: str) -> str | None:
        if device != "cuda":
            return "Liger is timed on CUDA only"
        if not self.own:
            return "liger_kernel is not installed (pip install liger-kernel)"
        return _backend.triton_reason()

    def unfit(self, case: Case | ModelCase, device: str, train: bool) -> str | None:
        if case.op not in ("attention", "qk_norm_rope"):
            return "Liger is a peer of what is done with queries and keys"
        return None if isinstance(case, Case) and case.dims.get("norm", 1) else "Liger is timed with the norms"

    def prepare(self, case: Case | ModelCase, device: str, train: bool) -> Prepared:
        assert isinstance(case, Case)
        inputs = drawn(case, device, train)
        for name in _TURNED:
            if inputs[name] is not None:
                asked = inputs[name].requires_grad
                inputs[name] = _halves(inputs[name].detach()).requires_grad_(asked)
        names = [name for name, value in leaves_of(case, inputs).items() if value.requires_grad]
        leaves = tuple(inputs[name] for name in names)

        def restored(gradients: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            found = zip(names, gradients, strict=True)
            return tuple(_neighbours(one) if name in _TURNED else one for name, one in found)

        if case.op == "qk_norm_rope":
            self.version = self.own
            return Prepared(lambda: rotary(inputs), leaves, outputs=_back, gradients=restored, overwrites=True)
        found, prepared = fastest(kernels(inputs, leaves, rotary, restored), case, device, train, WHAT)
        self.version = f"{self.own} {found}"
        return prepared
