"""FlexAttention under ``torch.compile``, norms and rotations in the same graph."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from bench.models import ModelCase
from bench.providers import Unusable
from bench.providers.eager import drawn, leaves
from bench.timing import Prepared, inference_step, training_step
from snapgen_kernels import _backend
from snapgen_kernels.testing import SPECS, Case, Inputs


def attend(inputs: Inputs) -> Tensor:
    """The op ``attention``, by FlexAttention: [B, N, H, D]."""
    q, k = SPECS["qk_norm_rope"].eager(inputs)
    o = flex_attention(q.transpose(1, 2), k[:, None], inputs["v"][:, None], scale=inputs["scale"], enable_gqa=True)
    assert isinstance(o, Tensor)
    return o.transpose(1, 2)


class Flex:
    """``flex_attention`` with one head of keys and values for all of the queries'."""

    name = "flex"
    in_torch = True

    def __init__(self) -> None:
        self.version = str(torch.__version__)

    def absent(self, device: str) -> str | None:
        return _backend.triton_reason() if device == "cuda" else "FlexAttention is timed on CUDA only"

    def unfit(self, case: Case | ModelCase, device: str, train: bool) -> str | None:
        if case.op != "attention":
            return "FlexAttention is a peer of attention alone"
        return "FlexAttention is timed without masks" if isinstance(case, Case) and case.dims.get("mask") else None

    def prepare(self, case: Case | ModelCase, device: str, train: bool) -> Prepared:
        assert isinstance(case, Case)
        inputs = drawn(case, device, train)
        function = torch.compile(attend, fullgraph=True, dynamic=False)
        prepared = Prepared(lambda: function(inputs), leaves(case, inputs))
        try:
            for part in training_step(prepared) if train else inference_step(prepared):
                part()  # a backward is compiled when it first runs
        except torch._dynamo.exc.TorchDynamoException as error:
            raise Unusable(f"torch.compile failed: {str(error).strip().splitlines()[0]}") from error
        return prepared
