"""scaled_dot_product_attention behind compiled norms and rotations, by whichever of its kernels is the fastest."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.models import ModelCase
from bench.providers.choice import fastest
from bench.providers.eager import drawn, leaves
from bench.timing import Prepared
from snapgen_kernels import _backend
from snapgen_kernels.testing import SPECS, Case, Inputs

Rotary = Callable[[Inputs], tuple[Tensor, Tensor]]
Gradients = Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]
WHAT = "scaled_dot_product_attention's kernels"

_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def _one_head(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """All heads' queries as rows of one head."""
    rows = q.reshape(q.shape[0], 1, -1, q.shape[-1])
    return F.scaled_dot_product_attention(rows, k[:, None], v[:, None], mask, scale=scale).reshape(q.shape)


def _expanded(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """Keys and values as views with a head for each of the queries'."""
    k, v = (t[:, None].expand(-1, q.shape[2], -1, -1) for t in (k, v))
    return F.scaled_dot_product_attention(q.transpose(1, 2), k, v, mask, scale=scale).transpose(1, 2)


def _grouped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """One head of keys and values, as PyTorch takes it since it knows groups."""
    o = F.scaled_dot_product_attention(q.transpose(1, 2), k[:, None], v[:, None], mask, scale=scale, enable_gqa=True)
    return o.transpose(1, 2)


_FORMS = {"one-head": _one_head, "expanded": _expanded, "grouped": _grouped}


def compiled_rotary() -> Rotary:
    """Norm and rotation of queries and keys under ``torch.compile``."""
    return torch.compile(SPECS["qk_norm_rope"].eager, fullgraph=True, dynamic=False)


def kernels(
    inputs: Inputs, asked: tuple[Tensor, ...], rotary: Rotary, gradients: Gradients = tuple
) -> dict[str, Prepared]:
    """Each of PyTorch's kernels in each of the forms, by name.

    Args:
        inputs: of the op ``attention``. asked: what gradients are asked of. gradients: see :class:`Prepared`.
        rotary: normalises and rotates queries and keys.
    """
    mask = None if inputs["key_mask"] is None else inputs["key_mask"][:, None, None, :]
    found: dict[str, Prepared] = {}
    for kernel, backend in _BACKENDS.items():
        for form, attend in _FORMS.items():

            def call(backend: SDPBackend = backend, attend: Callable[..., Tensor] = attend) -> Tensor:
                q, k = rotary(inputs)
                with sdpa_kernel(backend):
                    return attend(q, k, inputs["v"], mask, inputs["scale"])

            found[f"{kernel}-{form}"] = Prepared(call, asked, gradients=gradients)
    return found


class Sdpa:
    """The fastest of PyTorch's attention kernels behind norm and rotation under ``torch.compile``; the version names
    the kernel, and how it is given the one head of keys and values."""

    name = "sdpa"
    in_torch = True

    def __init__(self) -> None:
        self.version = str(torch.__version__)

    def absent(self, device: str) -> str | None:
        return _backend.triton_reason() if device == "cuda" else "the choice of attention kernels is timed on CUDA only"

    def unfit(self, case: Case | ModelCase, device: str, train: bool) -> str | None:
        return None if case.op == "attention" else "scaled_dot_product_attention is a peer of attention alone"

    def prepare(self, case: Case | ModelCase, device: str, train: bool) -> Prepared:
        assert isinstance(case, Case)
        inputs = drawn(case, device, train)
        candidates = kernels(inputs, leaves(case, inputs), compiled_rotary())
        found, prepared = fastest(candidates, case, device, train, WHAT)
        self.version = f"{torch.__version__} {found}"
        return prepared
