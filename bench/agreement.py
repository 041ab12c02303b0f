"""Whether a peer computes what eager PyTorch does: one that computes something else is no yardstick."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from bench import models
from bench.models import ModelCase
from bench.providers import Unusable
from bench.providers.eager import drawn, leaves
from bench.timing import Prepared
from snapgen_kernels import checks
from snapgen_kernels.testing import Case


class Yardstick:
    """Eager's outputs of a case, and with ``train`` its gradients, computed once for all peers.

    Half the digits of the dtype have to be right, two bits fewer after a whole model (OpenVINO, all in bf16, is 0.16
    off on the smallest denoiser; PyTorch 0.016). A gradient that cancels to nothing has no digits: one far below all
    gradients together is measured against these.
    """

    def __init__(self, case: Case | ModelCase, device: str, train: bool) -> None:
        self.case, self.device, self.train = case, device, train
        self.allowed = torch.finfo(case.dtype).eps ** 0.5 * (4 if isinstance(case, ModelCase) else 1)

    def check(self, prepared: Prepared) -> None:
        """Call ``prepared``, which compiles what is compiled, and compare.

        Raises:
            Unusable: it computes something else.
        """
        found = prepared.outputs(prepared.call())
        if prepared.whole and self.train:  # a step of a whole trainer gives a loss, which other tests compare
            return
        right = self._outputs
        self._compare("outputs", found, right, [_norm(one) for one in right])
        if self.train:
            upstream, expected = self._gradients
            gradients = torch.autograd.grad(found, prepared.leaves, [grad.clone() for grad in upstream])
            norms = [_norm(one) for one in expected]
            together = sum(norm**2 for norm in norms) ** 0.5
            scales = [max(norm, self.allowed * together) for norm in norms]
            self._compare("gradients", prepared.gradients(gradients), expected, scales)

    def _compare(self, what: str, found: Sequence[Tensor], right: Sequence[Tensor], scales: Sequence[float]) -> None:
        for mine, theirs, scale in zip(found, right, scales, strict=True):
            error = _norm(mine.detach().to(self.device).double() - theirs.double()) / max(scale, 1e-30)
            if not error <= self.allowed:
                raise Unusable(f"its {what} are not eager's: relative error {error:.2g}")

    @cached_property
    def _outputs(self) -> tuple[Tensor, ...]:
        if isinstance(self.case, ModelCase):
            return (models.yardstick(self.case),)
        with torch.no_grad():
            return checks.outputs_of(self.case.spec.eager(drawn(self.case, self.device, False)))

    @cached_property
    def _gradients(self) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        """What is sent back, and what comes of it."""
        assert isinstance(self.case, Case)
        inputs = drawn(self.case, self.device, True)
        outputs = checks.outputs_of(self.case.spec.eager(inputs))
        upstream = checks.upstream_of(outputs)
        return upstream, torch.autograd.grad(outputs, leaves(self.case, inputs), upstream)


def _norm(x: Tensor) -> float:
    return x.double().norm().item()
