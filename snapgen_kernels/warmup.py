"""Everything that happens on first use, at a time of the caller's choosing."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

import torch

from snapgen_kernels import _backend


def warmup(
    shapes: Mapping[str, Sequence[Mapping[str, int]]] | None = None,
    *,
    device: torch.device | str = "cpu",
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16),
    backward: bool = True,
    progress: bool = True,
) -> int:
    """Load and compile the fused kernels, so that the first real call does not wait.

    Args:
        shapes: op name -> sizes of each call, by the names that ``snapgen_kernels.testing`` uses (for group_norm_silu:
        B, C,
            H, W, G). None: the small test shapes of every op, which loads everything and compiles every kind of kernel
            once.
        device: where the kernels will run.
        dtypes: dtypes to compile for.
        backward: also the backward kernels.
        progress: a line on stderr that counts up.

    Returns:
        How many calls were made; 0 where no op has a usable fused kernel on the device.

    Raises:
        ValueError: an op is unknown.
    """
    from snapgen_kernels import checks
    from snapgen_kernels.testing import SPECS, Case, small_cases

    for op in shapes or {}:
        if op not in SPECS:
            raise ValueError(f"warmup: unknown op {op!r}; allowed: {', '.join(SPECS)}")
    device = torch.device(device)
    cases: list[Case] = []
    for op in SPECS:
        if _backend.missing_kernel(op, device.type) is not None:
            continue
        sizes = [case.dims for case in small_cases(op)] if shapes is None else shapes.get(op, [])
        unique = {tuple(sorted(dims.items())): dims for dims in sizes}
        cases += [Case(op, "warmup", dims, dtype) for dims in unique.values() for dtype in dtypes]
    for index, case in enumerate(cases):
        if progress:
            print(f"\rsnapgen_kernels: warming up {index + 1}/{len(cases)}", end="", file=sys.stderr, flush=True)
        inputs = case.inputs(device, requires_grad=backward)
        if backward:
            checks.run(case, case.spec.registered, inputs)
        else:
            case.spec.registered(inputs)
    if progress and cases:
        print(file=sys.stderr)
    return len(cases)
