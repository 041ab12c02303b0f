"""FlexAttention under ``torch.compile``, norms and rotations in the same graph, in the fastest of its forms."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from bench.models import ModelCase
from bench.providers.choice import fastest
from bench.providers.eager import drawn, leaves
from bench.timing import Prepared
from snapgen_kernels import _backend
from snapgen_kernels.testing import SPECS, Case, Inputs


def grouped(inputs: Inputs, mask: BlockMask | None) -> Tensor:
    """The op ``attention`` [B, N, H, D] with one head of keys and values for all of the queries'."""
    q, k = SPECS["qk_norm_rope"].eager(inputs)
    o = flex_attention(
        q.transpose(1, 2), k[:, None], inputs["v"][:, None], block_mask=mask, scale=inputs["scale"], enable_gqa=True
    )
    assert isinstance(o, Tensor)
    return o.transpose(1, 2)


def folded(inputs: Inputs, mask: BlockMask | None) -> Tensor:
    """The op ``attention`` with all heads' queries as rows of one head: [B, 1, N H, D]."""
    q, k = SPECS["qk_norm_rope"].eager(inputs)
    rows = q.flatten(1, 2)[:, None]
    o = flex_attention(rows, k[:, None], inputs["v"][:, None], block_mask=mask, scale=inputs["scale"])
    assert isinstance(o, Tensor)
    return o.reshape(q.shape)


# What attends, and its rows of queries [N, H] a head of keys.
_FORMS: dict[str, tuple[Callable[[Inputs, BlockMask | None], Tensor], Callable[[int, int], int]]] = {
    "grouped": (grouped, lambda tokens, heads: tokens),
    "folded": (folded, lambda tokens, heads: tokens * heads),
}
# CUDA graphs would copy the inputs, see bench/providers/compiled.py.
_MODES = {"default": "default", "max-autotune": "max-autotune-no-cudagraphs"}


def block_mask(key_mask: Tensor | None, rows: int) -> BlockMask | None:
    """The keys that may be attended, [B, M], as FlexAttention takes them: made once for a prompt, so never timed."""
    if key_mask is None:
        return None

    def attended(sample: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        return key_mask[sample, key]

    batch, keys = key_mask.shape
    with torch.inference_mode(False), torch.no_grad():
        return create_block_mask(attended, batch, None, rows, keys, device=key_mask.device)


class Flex:
    """``flex_attention`` with one head of keys and values: the fastest of its forms and modes, which the version
    names."""

    name = "flex"
    in_torch = True

    def __init__(self) -> None:
        self.version = str(torch.__version__)

    def absent(self, device: str) -> str | None:
        return _backend.triton_reason() if device == "cuda" else "FlexAttention is timed on CUDA only"

    def unfit(self, case: Case | ModelCase, device: str, train: bool) -> str | None:
        return None if case.op == "attention" else "FlexAttention is a peer of attention alone"

    def prepare(self, case: Case | ModelCase, device: str, train: bool) -> Prepared:
        assert isinstance(case, Case)
        inputs = drawn(case, device, train)
        candidates: dict[str, Prepared] = {}
        for form, (attend, rows) in _FORMS.items():
            mask = block_mask(inputs["key_mask"], rows(*inputs["q"].shape[1:3]))
            for name, mode in _MODES.items():
                function = torch.compile(attend, mode=mode, fullgraph=True, dynamic=False)
                candidates[f"{form}-{name}"] = Prepared(
                    lambda function=function, mask=mask: function(inputs, mask),  # type: ignore[misc]
                    leaves(case, inputs),
                )
        found, prepared = fastest(candidates, case, device, train, "FlexAttention's forms")
        self.version = f"{torch.__version__} {found}"
        return prepared
