"""Which of the shared cases are timed, and what each costs in every mode."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bench import blocks, models
from bench.models import MODELS, ModelCase
from snapgen_kernels.testing import CASES, SPECS, Case

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MODES = ("fwd", "train")
OPS = tuple(SPECS)
BLOCKS = (blocks.NAME,)
SUITES = ("all", "ops", "models", "readme")

# --suite readme: what the README's tables show, every op at the model's own shapes and every whole model.
_README = {
    "group_norm_silu": ("256ch-128",),
    "sepconv": ("256ch-128",),
    "resblock": ("256ch-128", "512ch-64", "896ch-32"),
    "qk_norm_rope": ("self-14x64-1024",),
    "attention": ("self-14x64-1024", "cross-14x64-1024-333"),
    "geglu": ("896-2688-1024",),
    "decoder_block": ("160ch-128", "128ch-512"),
    "decoder": ("512px", "1024px"),
    "denoiser": ("t2i-128x128",),
    "train": ("tiny-b64", "t2i-quarter-b8"),
}

# --suite resblock on a GPU: the block, its norm and its convolutions, at the sizes of the goals. Names without a batch
# stand for all of theirs.
_GPU_RESBLOCK = {
    "group_norm_silu": ("256ch-128",),
    "resblock": ("256ch-128", "512ch-64", "896ch-32"),
    "sepconv": ("256ch-128-b8", "512ch-64-b8", "896ch-32-b8", "down-256-b8", "up-512-b8"),
}

# --suite attention on a GPU: the ops of the transformer blocks, at the sizes of the goals.
_GPU_ATTENTION = {
    "qk_norm_rope": ("self-14x64-1024-b16",),
    "attention": ("self-14x64-1024-b16", "cross-8x64-4096-333-b4", "cross-4x64-16384-333-b4"),
    "geglu": ("896-2688-1024-b16",),
    "transformer_block": ("896ch-1024-b16",),
}

# --suite model on a GPU: what a user waits for, at the sizes of the goals.
_GPU_MODEL = {
    "decoder": ("1024px",),
    "denoiser": ("t2i-128x128-b2",),
    "picture": ("1024px-4",),
    "train": ("t2i-128x128-b8", "imagenet-256-b256"),
}

# --suite decoder_block on a GPU: the decoder's block and the upsampler into its last stage.
_GPU_DECODER = {"decoder_block": ("128ch-1024", "128ch-512", "160ch-128"), "sepconv": ("up-128-512",)}

_GPU_SUITES = {
    "resblock": _GPU_RESBLOCK,
    "attention": _GPU_ATTENTION,
    "decoder_block": _GPU_DECODER,
    "model": _GPU_MODEL,
}

# --quick: the stages of the model where one op alone is quick, and one shape of the rest.
_QUICK = {
    "group_norm_silu": ("256ch-128", "512ch-64", "896ch-32", "tiny-train"),
    "sepconv": ("256ch-128",),
    "resblock": ("256ch-128",),
    "qk_norm_rope": ("self-14x64-1024",),
    "attention": ("self-14x64-1024",),
    "geglu": ("896-2688-1024",),
    "decoder_block": ("160ch-128",),
}

# A GPU trains with batches; batch 1 is what it samples with.
_GPU_BATCHES = {"group_norm_silu": (16,), "decoder_block": ()}
_GPU_BATCH = (8,)
_BATCH = re.compile(r"-b(\d+)$")  # at the end of a name

# An attention backward has five products for the forward's two (the scores are computed again); a convolution or a
# linear layer has two for one.
_BACKWARD_FLOPS = {"attention": 2.5}


Subset = Mapping[str, tuple[str, ...]]


def named(suite: tuple[str, ...], device: str) -> tuple[tuple[str, ...], Subset | None]:
    """The ops and models that the entries of ``--suite`` stand for, and which of their cases (None: all)."""
    if suite == ("readme",):
        return tuple(_README), _README
    if device == "cuda" and len(suite) == 1 and suite[0] in _GPU_SUITES:
        subset = _GPU_SUITES[suite[0]]
        return tuple(subset), subset
    sets = {"all": (*OPS, *MODELS), "ops": OPS, "models": MODELS, "readme": tuple(_README)}
    return tuple(dict.fromkeys(name for entry in suite for name in sets.get(entry, (entry,)))), None


def select_models(
    device: str, names: tuple[str, ...], dtypes: tuple[str, ...], *, quick: bool, small: bool, subset: Subset | None
) -> list[ModelCase]:
    """The model cases to run. Quick runs have none: one forward alone takes seconds."""
    if quick:
        return []
    chosen = [case for case in models.CASES if case.op in names and case.bench != small]
    chosen = [replace(case, device=device) for case in chosen if device == "cuda" or not case.gpu]
    if subset is not None and not small:
        chosen = [case for case in chosen if case.name in subset[case.op]]
    return [replace(case, dtype=DTYPES[dtype]) for case in chosen for dtype in dtypes if dtype != "fp16"]


def select(
    device: str,
    ops: tuple[str, ...],
    dtypes: tuple[str, ...],
    *,
    quick: bool,
    small: bool,
    subset: Subset | None = None,
) -> list[Case]:
    """The op cases to run, in the order of the ops."""
    chosen: list[Case] = []
    for op in ops:
        every = blocks.CASES if op in BLOCKS else CASES[op]
        cases = [c for c in every if c.bench != small and c.dtype == torch.float32 and c.layout == "channels_last"]
        if quick and not small:
            cases = [case for case in cases if case.name in _QUICK.get(op, ())]
        elif device == "cuda" and not small:
            single = [case for case in cases if case.dims["B"] == 1]
            for batch in _batches(op, subset):
                cases += [replace(c, name=f"{c.name}-b{batch}", dims={**c.dims, "B": batch}) for c in single]
        if subset is not None and not small:
            cases = [case for case in cases if {case.name, _BATCH.sub("", case.name)} & {*subset[op]}]
        chosen += [replace(case, dtype=DTYPES[dtype]) for case in cases for dtype in dtypes]
    if quick:  # one case of each op before the second of any: a slow machine may not get to all of them
        turn = {id(case): [c.op for c in chosen[:index]].count(case.op) for index, case in enumerate(chosen)}
        chosen.sort(key=lambda case: turn[id(case)] // len(dtypes))
    return chosen


def _batches(op: str, subset: Subset | None) -> tuple[int, ...]:
    """The batches in which a GPU runs the cases of one sample: the usual ones, and those that the subset names."""
    found = [] if subset is None else [_BATCH.search(name) for name in subset[op]]
    return tuple(dict.fromkeys((*_GPU_BATCHES.get(op, _GPU_BATCH), *(int(match[1]) for match in found if match))))


@dataclass(frozen=True)
class Cost:
    """What a mode needs at least: floating-point operations, and bytes to and from memory."""

    flops: int
    bytes: int


def costs(case: Case | ModelCase) -> dict[str, Cost]:
    """Costs of ``fwd``, ``bwd`` and ``fwd+bwd``; of a model, of its one mode (see :func:`bench.models.costs`).

    The forward's come from the op's contract. The backward reads the inputs and the gradients of the outputs and writes
    the gradients of the inputs, once each; its FLOPs are twice the forward's (attention: 2.5 times).
    """
    if isinstance(case, ModelCase):
        return {case.row_mode: Cost(*models.costs(case))}
    flops, moved = case.cost()
    written = sum(value.numel() * value.element_size() for value in _leaves(case))
    backward = Cost(int(flops * _BACKWARD_FLOPS.get(case.op, 2)), moved + written)
    return {
        "fwd": Cost(flops, moved),
        "bwd": backward,
        "fwd+bwd": Cost(flops + backward.flops, moved + backward.bytes),
    }


def _leaves(case: Case) -> list[Tensor]:
    """The differentiable inputs, without their memory."""
    values = case.spec.make(case, lambda *shape: torch.empty(shape, device="meta"))
    tensors = [values.get(name) for name in case.spec.op.differentiable]
    return [value.to(case.dtype) for value in tensors if isinstance(value, Tensor)]


def to_check(case: Case, elements: int) -> Case:
    """``case``, its pictures halved until no tensor has more than ``elements`` elements: fp64 copies have to fit."""
    dims = dict(case.dims)
    if "W" not in dims:  # tokens
        return case
    widest = max(dims.get(name, 0) for name in ("C", "M", "O"))
    while dims["B"] * dims["H"] * dims["W"] * widest > elements and min(dims["H"], dims["W"]) > 1:
        dims["H"], dims["W"] = dims["H"] // 2, dims["W"] // 2
    while dims["B"] * dims["H"] * dims["W"] * widest > elements and dims["B"] > 1:
        dims["B"] //= 2
    return case if dims == dict(case.dims) else replace(case, dims=dims)
