"""What travels with every export, so that it can be checked elsewhere: golden inputs and outputs, and what was made.

`Golden.safetensors` holds, for each part and function, the inputs of one or two calls in the dtypes that the package
takes, and the outputs of the model in fp32. Outputs of more than 2^20 numbers (pictures) are kept in fp16, whose
rounding is 66 dB or more below their peak. The calls are those in which the package was farthest from the model.

`Export.json` holds the options, the versions, each part's packages, floor and figures, which golden tensor is what, the
SHA-256 of every other file, and what an app needs to know of tokenizer and schedule. It has no date: a repeat gives the
same bytes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from snapgen import io
from snapgen.export.parity import Borders, Case
from snapgen.export.tools import PackageError

GOLDEN, RECORD = "Golden.safetensors", "Export.json"
FORMAT = 1  # of Export.json
LARGE = 1 << 20


@dataclass
class Golden:
    """The golden calls of an export while it is made.

    Attributes:
        tensors: of all calls, by name.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)

    def keep(
        self, part: str, function: str, borders: Borders, measured: Sequence[tuple[Case, float]], count: int
    ) -> list[dict[str, Any]]:
        """Keep the `count` calls with the lowest PSNR; returns what `Export.json` says of them."""
        order = sorted(range(len(measured)), key=lambda index: measured[index][1])
        kept = []
        for index in sorted(order[:count]):
            case = measured[index][0]
            stem = f"{part}.{function}.{index}"
            sides = {
                "inputs": {name: value.to(borders[name][1]) for name, value in case.inputs.items()},
                "outputs": {name: _compact(value) for name, value in case.outputs.items()},
                "counts": case.counts,
            }
            names = {side: {name: f"{stem}.{side}.{name}" for name in values} for side, values in sides.items()}
            for side, values in sides.items():
                self.tensors |= {names[side][name]: value.clone() for name, value in values.items()}
            kept.append({"case": case.name, **names})
        return kept


def write(folder: Path, golden: Golden, record: dict[str, Any]) -> None:
    """Write both files into a folder that already holds everything else."""
    io.save_tensors(folder / GOLDEN, golden.tensors)
    io.write_json(folder / RECORD, {"format": FORMAT, **record, "sha256": fingerprints(folder)})


def read(folder: Path) -> dict[str, Any]:
    """`Export.json` of a folder.

    Raises:
        PackageError: there is none, or it is of a newer format, or it is not what an export writes.
        io.CheckpointError: it is damaged.
    """
    if not folder.is_dir():
        raise PackageError(f"{folder}: no such folder")
    if not (folder / RECORD).is_file():
        raise PackageError(f"{folder}: holds no {RECORD}, which `snapgen export coreml` writes beside the packages")
    record = io.read_json(folder / RECORD)
    if record.get("format") != FORMAT:
        raise PackageError(f"{folder / RECORD}: its format is {record.get('format')!r}; known here is {FORMAT}")
    missing = {"parts", "sha256", "options", "versions"} - record.keys()
    if missing:
        raise PackageError(f"{folder / RECORD}: lacks {', '.join(sorted(missing))}")
    return record


def calls(entries: Sequence[Mapping[str, Any]], tensors: Mapping[str, Tensor]) -> list[Case]:
    """Golden calls from what `Export.json` says of a function and from the tensors of `Golden.safetensors`.

    Raises:
        PackageError: a tensor is missing.
    """

    def taken(names: Mapping[str, str]) -> dict[str, Tensor]:
        lacking = sorted(set(names.values()) - tensors.keys())
        if lacking:
            raise PackageError(f"{GOLDEN}: lacks {', '.join(lacking)}, which {RECORD} names")
        return {name: tensors[tensor] for name, tensor in names.items()}

    return [
        Case(entry["case"], taken(entry["inputs"]), taken(entry["outputs"]), taken(entry["counts"]))
        for entry in entries
    ]


def fingerprints(folder: Path) -> dict[str, str]:
    """SHA-256 of every file under a folder but `Export.json` and hidden ones, by path with slashes."""
    found = {}
    for file in sorted(folder.rglob("*")):
        place = file.relative_to(folder)
        hidden = any(step.startswith(".") for step in place.parts)
        if file.is_file() and not hidden and place.as_posix() != RECORD:
            digest = hashlib.sha256()
            with file.open("rb") as stream:
                while block := stream.read(1 << 20):
                    digest.update(block)
            found[place.as_posix()] = digest.hexdigest()
    return found


def decibels(figure: float) -> float | None:
    """A figure as it is written to JSON: hundredths of a dB; null where there is no difference at all, or no number."""
    return round(figure, 2) if math.isfinite(figure) else None


def _compact(value: Tensor) -> Tensor:
    value = value.float()
    if value.numel() > LARGE and value.abs().max() <= torch.finfo(torch.float16).max:
        return value.half()
    return value
