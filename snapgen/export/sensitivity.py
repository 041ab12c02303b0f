"""How far each layer's compression would move a part's output, without running the part once per layer.

Let f(x; W) be a part's output and D_l what compression adds to the weights of layer l. To first order the output moves
by J_l D_l with J_l = df/dW_l. For random signs u of f's shape and L = u . f,

    <dL/dW_l, D_l> = u . (J_l D_l),      E_u [ (u . (J_l D_l))^2 ] = |J_l D_l|^2,

since E[u_i u_j] is 1 for i = j and else 0. So one backward pass gives one sample of the squared error of every layer at
every width, and the mean over samples (cases times probes) is unbiased to first order. A sample's standard deviation
is about 1.4 times its mean (exactly so if u . (J_l D_l) were normal), so that 32 samples tell a layer's error to a
quarter. Errors of different layers are taken as uncorrelated: those of the whole are their sum.

Outputs are measured as the gate does (`parity.psnr`): squared error per element over the squared peak of the output,
averaged over outputs. -10 log10 of the sum is the PSNR to expect of the compression alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from snapgen import flow
from snapgen.export import parity
from snapgen.export.denoiser import Denoiser
from snapgen.export.palette import Differences
from snapgen.export.parts import Decoder, Part
from snapgen.export.rewrite import weight_key
from snapgen.export.text import TextEncoder
from snapgen.export.tools import ExportError
from snapgen_kernels import use

PROBES = 4  # per case
# Latents of the cases. Convolutions have the same weights at every size, and 32 x 32 needs a sixteenth of the memory
# and time of the 128 x 128 that t2i-1024 exports.
SIZE = 32


@dataclass(frozen=True)
class Case:
    """Arguments of a part's forward, and for each output which elements count (None: all)."""

    inputs: dict[str, Tensor]
    masks: tuple[Tensor | None, ...]


def part_and_cases(name: str, pipe: Any, tokens: int) -> tuple[Part, list[Case]]:
    """A part of a pipeline for small latents, and what it meets: the gate's cases (`parity.make_cases`).

    The denoiser sees each noisy latent with its caption and with the empty prompt, as under guidance.

    Raises:
        ExportError: it is another part than denoiser, decoder and text_encoder.
    """
    size = min(int(pipe.denoiser.config.sample_size), SIZE)
    given = parity.make_cases(pipe, tokens, size, size)
    rows = range(len(given.times))
    cases = []
    with use("reference"), torch.random.fork_rng(devices=[]):  # layers draw weights when they are made
        part: Part
        if name == "denoiser":
            part = Denoiser(pipe.denoiser, batch=1, height=size, width=size, tokens=tokens)
            for index, time in enumerate(given.times):
                sample, timestep = given.noisy[index : index + 1], torch.tensor([time * flow.TIMESTEP_SCALE])
                for text in (parity._row(given.text, index), given.empty):
                    inputs = {
                        "sample": sample,
                        "timestep": timestep,
                        "encoder_hidden_states": text.context.transpose(1, 2)[:, :, None],
                        "encoder_attention_mask": text.mask[:, None, None].float(),
                    }
                    if text.pooled is not None and "pooled_projections" in part.arguments():
                        inputs["pooled_projections"] = text.pooled
                    cases.append(Case(inputs, (None,)))
        elif name == "decoder":
            part = Decoder(pipe.decoder, batch=1, height=size, width=size)
            cases = [Case({"z": given.clean[index : index + 1]}, (None,)) for index in rows]
        elif name == "text_encoder":
            part = TextEncoder(pipe.text_encoder, batch=1, tokens=tokens)
            for index, caption in enumerate(given.captions):
                ids = pipe.tokenizer(caption, padding="max_length", max_length=tokens, return_tensors="pt").input_ids
                cases.append(Case({"input_ids": ids.int()}, (given.text.mask[index : index + 1, :, None], None)))
        else:
            raise ExportError(f"{name}: its sensitivities cannot be measured; give it one form for all weights")
    return part, cases


def squared_errors(
    part: Part,
    cases: Sequence[Case],
    differences: Mapping[str, Differences],
    *,
    probes: int = PROBES,
    progress: Callable[[float], None] | None = None,
) -> dict[str, np.ndarray[Any, np.dtype[np.float64]]]:
    """Expected squared error of a part's output, in squares of its peak, for each layer compressed alone.

    Args:
        part: in fp32 on the CPU. Its weights' gradients are used and dropped; nothing of it stays changed.
        differences: for each weight (by `rewrite.weight_key`), what the widths to choose from would change.
        probes: random sign vectors per case.
        progress: called with the share that is done.

    Returns:
        The keys of `differences`: errors, one for each of its choices.
    """
    by_key: dict[str, list[torch.nn.Parameter]] = {}
    for parameter in part.parameters():
        by_key.setdefault(weight_key(parameter.detach().half().numpy()), []).append(parameter)
    generator = torch.Generator().manual_seed(0)
    sums: dict[str, Any] = {}
    projections: dict[str, Any] = {}
    hooks = []

    def watch(key: str, watched: Tensor) -> None:
        weights = differences[key]

        def project(parameter: Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None
            assert gradient is not None
            values = parameter.detach().half().contiguous().numpy()
            found = weights.project(values, gradient.contiguous().numpy())
            projections[key] = projections.get(key, 0.0) + found

        watched.requires_grad_(True)
        hooks.append(watched.register_post_accumulate_grad_hook(project))

    samples = len(cases) * probes
    try:
        for key in differences:
            for parameter in by_key.get(key, ()):
                watch(key, parameter)
        done = 0
        with torch.enable_grad(), use("reference"):
            for case in cases:
                outputs = part(**case.inputs)
                outputs = outputs if isinstance(outputs, tuple) else (outputs,)
                scales = [
                    _scale(output.detach().float(), mask) for output, mask in zip(outputs, case.masks, strict=True)
                ]
                # The outputs are fp16 and so are their gradients: the largest is 1.
                largest = max(scales)
                for probe in range(probes):
                    loss = torch.zeros(())
                    for output, mask, scale in zip(outputs, case.masks, scales, strict=True):
                        signs = torch.randint(0, 2, output.shape, generator=generator) * 2.0 - 1
                        counted = signs if mask is None else signs * mask
                        loss = loss + (output.float() * counted).sum() * (scale / largest)
                    projections.clear()
                    loss.backward(retain_graph=probe + 1 < probes)
                    for key, found in projections.items():
                        sums[key] = sums.get(key, 0.0) + np.square(found * largest) / len(outputs)
                    done += 1
                    if progress is not None:
                        progress(done / samples)
    finally:
        for hook in hooks:
            hook.remove()
        part.requires_grad_(False)
    return {key: value / samples for key, value in sums.items()}


def _scale(output: Tensor, mask: Tensor | None) -> float:
    """1 / (peak * root of the number of elements), of those that count."""
    counted = output if mask is None else output[mask.expand(output.shape)]
    return float(1 / (counted.abs().max().clamp_min(1e-12) * counted.numel() ** 0.5))
