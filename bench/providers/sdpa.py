"""scaled_dot_product_attention behind compiled norms and rotations, by whichever of its kernels is the fastest."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.models import ModelCase
from bench.providers import Unusable
from bench.providers.eager import drawn, leaves
from bench.timing import Clock, Prepared, inference_step, training_step
from snapgen_kernels import _backend
from snapgen_kernels.testing import SPECS, Case, Inputs

Rotary = Callable[[Inputs], tuple[Tensor, Tensor]]

_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
_ROUNDS = 5  # of each candidate


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


def fastest(
    inputs: Inputs, asked: tuple[Tensor, ...], device: str, train: bool, rotary: Rotary
) -> tuple[str, Prepared]:
    """The fastest of PyTorch's kernels in the fastest of the forms, and its name.

    Args:
        inputs: of the op ``attention``. asked: what gradients are asked of.
        rotary: normalises and rotates queries and keys.

    Raises:
        Unusable: none of them takes the case.
    """
    clock, times, reasons = Clock(device), {}, []
    candidates = dict(_candidates(inputs, asked, rotary))
    for name, prepared in candidates.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # PyTorch says at length why a kernel does not take a call
                step = training_step(prepared) if train else inference_step(prepared)
                clock(step)
                times[name] = statistics.median(sum(clock(step)) for _ in range(_ROUNDS))
        except RuntimeError as error:  # no such kernel for these inputs, or not enough memory for it
            reasons.append(f"{name}: {str(error).strip().splitlines()[0]}")
    if not times:
        raise Unusable(f"none of scaled_dot_product_attention's kernels takes it: {reasons[0]}")
    best = min(times, key=lambda name: times[name])
    return best, candidates[best]


def _candidates(inputs: Inputs, asked: tuple[Tensor, ...], rotary: Rotary) -> Iterator[tuple[str, Prepared]]:
    mask = None if inputs["key_mask"] is None else inputs["key_mask"][:, None, None, :]
    for kernel, backend in _BACKENDS.items():
        for form, attend in _FORMS.items():

            def call(backend: SDPBackend = backend, attend: Callable[..., Tensor] = attend) -> Tensor:
                q, k = rotary(inputs)
                with sdpa_kernel(backend):
                    return attend(q, k, inputs["v"], mask, inputs["scale"])

            yield f"{kernel}-{form}", Prepared(call, asked)


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
        found, prepared = fastest(inputs, leaves(case, inputs), device, train, compiled_rotary())
        self.version = f"{torch.__version__} {found}"
        return prepared
