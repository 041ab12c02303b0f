"""Smaller packages: weights of a converted part in fewer bits, the same for all or chosen layer by layer for a budget.

`palette-8`, `palette-6`, `palette-4` and `int8` store every weight that can be compressed in that form
(`snapgen.export.rewrite` says which can, and how they are stored). `mixed:SIZE` chooses for each weight among fp16 and
palettes of 8, 6, 4, 3 (iOS18 alone) and 2 bits so that the part's weight files fit into SIZE, with the least squared
error of the output that `snapgen.export.sensitivity` expects.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from snapgen.export.options import Compression
from snapgen.export.palette import Differences
from snapgen.export.rewrite import FILE, FP16, HEAD, PALETTES, Weight, groups, rewrite, stored, weight_key, weights
from snapgen.export.sensitivity import part_and_cases, squared_errors
from snapgen.export.tools import ExportError

METADATA = "snapgen.compression"
_EXCHANGES = 200  # of two weights' forms, each of which lowers the error, after the greedy choice


def compress(
    name: str, packages: Sequence[Path], compression: Compression, target: str, pipe: Any, tokens: int
) -> dict[str, Any]:
    """Compress the packages of a part in place.

    Args:
        name: of the part.
        packages: as `convert` leaves them; a budget is for all of them together.
        target: of the packages.
        pipe: the pipeline that they were made of, for the choice under a budget.
        tokens: length of the text context.

    Returns:
        `method` (the compression's text), `weight_bytes` and `fp16_bytes` (of the weight files, after and before),
        `layers` (for each weight `package`, `name`, `shape`, `form`, `bytes`, and under a budget `error`: the expected
        squared error of the output for this weight alone, in squares of its peak), `expected_psnr` (dB, under a budget,
        of the compression alone; None where nothing is compressed), and `note`, what there is to say about it.

    Raises:
        ExportError: the budget is below what the smallest forms take, or a weight is not finite.
    """
    found = {package: weights(package) for package in packages}
    layers = [(package, weight) for package, (listed, _) in found.items() for weight in listed]
    before = sum(size for _, size in found.values())
    errors: list[float] | None = None
    note = ""
    if compression.budget is None:
        assert compression.form is not None
        forms = [compression.form] * len(layers)
    elif compression.budget >= before:
        forms = [FP16] * len(layers)
        note = f"{name}: nothing is compressed: its weights take {_mb(before)} in fp16, {compression.text} allows more"
    else:
        listed = [weight for _, weight in layers]
        forms, errors = _under_budget(name, listed, len(packages), before, compression, target, pipe, tokens)
    counts = ", ".join(f"{count} {form}" for form, count in sorted(Counter(forms).items()))
    for package in packages:
        here = {weight: form for (place, weight), form in zip(layers, forms, strict=True) if place == package}
        if any(form != FP16 for form in forms):
            rewrite(package, here, target, {METADATA: f"{compression.text} ({counts})"})
    after = sum((package / "Data" / "com.apple.CoreML" / "weights" / FILE).stat().st_size for package in packages)
    entries = [
        {
            "package": package.name,
            "name": weight.name,
            "shape": list(weight.shape),
            "form": form,
            "bytes": stored(form, weight.shape, target),
        }
        for (package, weight), form in zip(layers, forms, strict=True)
    ]
    total = None
    if errors is not None:
        for entry, error in zip(entries, errors, strict=True):
            entry["error"] = error
        total = float(-10 * np.log10(sum(errors))) if sum(errors) else None
    return {
        "method": compression.text,
        "weight_bytes": after,
        "fp16_bytes": before,
        "layers": entries,
        "expected_psnr": total,
        "note": note,
    }


def _under_budget(
    name: str,
    layers: Sequence[Weight],
    files: int,
    before: int,
    compression: Compression,
    target: str,
    pipe: Any,
    tokens: int,
) -> tuple[list[str], list[float]]:
    """Form and expected error of each weight."""
    assert compression.budget is not None
    forms = [FP16, *(f"palette-{bits}" for bits in PALETTES[target])]
    sizes = np.array([[stored(form, weight.shape, target) for form in forms] for weight in layers], dtype=np.int64)
    sizes = sizes.reshape(-1, len(forms))
    # A file's last tensor is not padded, so that this is up to 127 bytes more per file than there will be.
    others = before + files * HEAD - int(sizes[:, 0].sum())
    least = others + int(sizes.min(axis=1).sum())
    if least > compression.budget:
        raise ExportError(
            f"compress: {compression.text} is too small for the {name}: with every weight that can be compressed at 2 "
            f"bits it takes {_mb(least, up=True)} (in fp16 {_mb(before)})"
        )
    part, cases = part_and_cases(name, pipe, tokens)
    halves = [parameter.detach().half().numpy() for parameter in part.parameters() if parameter.ndim > 1]
    values = {weight_key(half): half for half in halves}
    differences = {}
    for weight in layers:
        if weight.key not in values:
            raise ExportError(f"compress: {weight.name} of the {name} is no weight of the model; it cannot be judged")
        choices = {bits: groups(weight.shape, bits, target) for bits in PALETTES[target]}
        differences[weight.key] = Differences(values[weight.key], choices)
    errors = squared_errors(part, cases, differences)
    table = np.array([[0.0, *errors[weight.key]] for weight in layers])
    chosen = allocate(sizes, table, compression.budget - others)
    return [forms[choice] for choice in chosen], [float(row[choice]) for row, choice in zip(table, chosen, strict=True)]


def allocate(sizes: Any, errors: Any, budget: int) -> list[int]:
    """For each layer one of its choices, so that the sizes fit into the budget and the sum of errors is small.

    Going down each layer's lower convex hull of errors over sizes, the step that adds the least error per byte is taken
    until the budget is met: optimal for every budget that it meets exactly, and else off by less than its last step.
    Then single choices and pairs are exchanged while that lowers the error within the budget.

    Args:
        sizes, errors: [layers, choices], bytes and expected squared errors.
        budget: bytes, at least the sum of the smallest sizes.

    Raises:
        ValueError: the budget is smaller.
    """
    sizes, errors = np.asarray(sizes, dtype=np.int64), np.asarray(errors, dtype=np.float64)
    if budget < sizes.min(axis=1).sum():
        raise ValueError(f"budget: got {budget}; the smallest choices take {sizes.min(axis=1).sum()} bytes")
    chosen = np.empty(len(sizes), dtype=np.int64)
    steps = []
    for layer, (size, error) in enumerate(zip(sizes, errors, strict=True)):
        hull = _hull(size, error)
        chosen[layer] = hull[0]
        for place, (old, new) in enumerate(zip(hull[:-1], hull[1:], strict=True)):
            steps.append(((error[new] - error[old]) / (size[old] - size[new]), layer, place, new))
    rows = np.arange(len(sizes))
    for _, layer, _, new in sorted(steps):
        if sizes[rows, chosen].sum() <= budget:
            break
        chosen[layer] = new
    for _ in range(_EXCHANGES):
        if not _exchange(sizes, errors, chosen, budget):
            break
    return [int(choice) for choice in chosen]


def _hull(size: Any, error: Any) -> list[int]:
    """Choices on the lower convex hull, from the one of least error to the smallest."""
    order = sorted(range(len(size)), key=lambda choice: (error[choice], size[choice]))
    hull = [order[0]]
    while True:
        last = hull[-1]
        smaller = [choice for choice in order if size[choice] < size[last]]
        if not smaller:
            return hull
        slope = {choice: (error[choice] - error[last]) / (size[last] - size[choice]) for choice in smaller}
        hull.append(min(smaller, key=lambda choice: (slope[choice], size[choice])))


def _exchange(sizes: Any, errors: Any, chosen: Any, budget: int) -> bool:
    """Make the best change of one or two layers' choices that fits; False if none lowers the error."""
    rows = np.arange(len(sizes))
    growth = (sizes - sizes[rows, chosen][:, None]).reshape(-1)
    change = (errors - errors[rows, chosen][:, None]).reshape(-1)
    layer, choice = np.divmod(np.arange(sizes.size), sizes.shape[1])
    slack = budget - int(sizes[rows, chosen].sum())
    up, down = np.flatnonzero(change < 0), np.flatnonzero(growth < 0)
    if not len(up):
        return False
    alone = np.where(growth[up] <= slack, change[up], np.inf)
    moves, best = [up[alone.argmin()]], float(alone.min())
    if len(down):
        both = change[down][:, None] + change[up][None]
        both[(growth[down][:, None] + growth[up][None] > slack) | (layer[down][:, None] == layer[up][None])] = np.inf
        if both.min() < best:
            best, pair = float(both.min()), np.unravel_index(both.argmin(), both.shape)
            moves = [down[pair[0]], up[pair[1]]]
    if not best < -1e-9 * errors[rows, chosen].sum():
        return False
    for move in moves:
        chosen[layer[move]] = choice[move]
    return True


def _mb(size: int, up: bool = False) -> str:
    """In MB, to two places: rounded up where a budget of that size must do."""
    hundredths = -(-size // 10_000) if up else round(size / 10_000)
    return f"{hundredths / 100:.2f} MB"


def summary(name: str, found: Mapping[str, Any]) -> str:
    """One line on what `compress` did to a part."""
    if found["note"]:
        return str(found["note"])
    expected = "" if found["expected_psnr"] is None else f", expected {found['expected_psnr']:.1f} dB"
    return f"{name}, {found['method']}: {_mb(found['weight_bytes'])} of {_mb(found['fp16_bytes'])}{expected}"
