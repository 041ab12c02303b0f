"""Launchers of the C++ kernels: layout, allocation, choice of path. The loops are in csrc/.

Importing this package loads the extension.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
from torch import Tensor

from snapgen_kernels import _backend

_extension = _backend.extension()
if _extension.module is None:
    raise ImportError(f"snapgen_kernels: {_extension.reason}")
_C = _extension.module


@dataclass
class _Packed:
    """A weight's pack, and what tells that it is still that weight's."""

    weight: weakref.ref[Tensor]
    version: int
    fingerprint: int
    tensor: Tensor


_packs: dict[tuple[int, str, str], _Packed] = {}


def packed(weight: Tensor, form: str) -> Tensor:
    """``weight`` [O, C] or [O, C, 1, 1] in the format of the products of the instruction set in use.

    ``form`` is ``"b"`` for B = weight^T (products C -> O), ``"bt"`` for B = weight (products O -> C), or ``"pairs"``:
    B = weight^T, the column blocks of the first half of its rows and of the second in turns (GEGLU). Packs are kept
    until their weight dies or changes. A change is noticed by PyTorch's version counter or, where that one is passed by
    (``weight.data``), by 64 values spread over the weight.
    """
    matrix = weight.detach().flatten(1)
    if weight.is_inference() or not matrix.is_contiguous():  # no version counter; no dense memory to look at
        return _pack(matrix, form)
    key = (id(weight), form, _C.variant())
    version, fingerprint = weight._version, torch.ops.snapgen_cpu.fingerprint(matrix)
    found = _packs.get(key)
    if found is not None and found.weight() is weight and (found.version, found.fingerprint) == (version, fingerprint):
        return found.tensor
    reference = weakref.ref(weight, lambda _: _packs.pop(key, None))
    _packs[key] = _Packed(reference, version, fingerprint, _pack(matrix, form))
    return _packs[key].tensor


def _pack(matrix: Tensor, form: str) -> Tensor:
    if form == "pairs":
        return torch.ops.snapgen_cpu.pack_pairs(matrix)
    return torch.ops.snapgen_cpu.pack(matrix.t() if form == "b" else matrix)
