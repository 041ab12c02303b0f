"""Runs a Core AI asset with Core AI's own runtime, in a process of its own that can be stopped.

On Linux that is its interpreter: it has the program's meaning and rounds to fp16 where the program does, but says
nothing of where a phone would run an operation, how its engine adds up, or how fast.
"""

from __future__ import annotations

import json
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from snapgen.export.tools import ExportError

WORKER = Path(__file__).with_name("coreai_worker.py")


class Asset:
    """The function of an .aimodel, called as `snapgen.export.interpreter.Program` is. A context: it ends the process.

    Args:
        path: of the asset.
        seconds: for loading and all calls together.

    Attributes:
        inputs: name -> (shape, dtype).
        outputs: names.

    Raises:
        ExportError: there is no asset; or the runtime failed, or took longer than it may, here and in every call.
    """

    def __init__(self, path: str | Path, seconds: float) -> None:
        self.path, self.seconds = Path(path), seconds
        if not (self.path / "main.mlirb").is_file():  # Core AI crashes on it
            raise ExportError(f"{self.path}: not a Core AI asset (it holds no main.mlirb)")
        self._deadline = time.monotonic() + seconds
        self._folder = tempfile.TemporaryDirectory(prefix="snapgen-coreai-")
        self._errors = open(Path(self._folder.name) / "errors", "w+", errors="replace")  # noqa: SIM115 - see close
        # -P keeps the worker's folder off its path: our modules there have names of others.
        command = [sys.executable, "-P", str(WORKER), str(self.path.resolve()), self._folder.name]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=self._errors, text=True)
        self.inputs: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        try:
            borders = json.loads(self._reply())
        except BaseException:
            self.close()
            raise
        for name, (shape, dtype) in borders["inputs"].items():
            self.inputs[name] = (tuple(shape), getattr(torch, dtype))
        self.outputs: list[str] = borders["outputs"]

    def __enter__(self) -> Asset:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run the function on a tensor for every input; converted to the declared dtypes.

        Raises:
            ValueError: an input is missing, unknown, or of another shape.
        """
        if inputs.keys() != self.inputs.keys():
            raise ValueError(f"inputs: got {sorted(inputs)}; the program takes {sorted(self.inputs)}")
        values = {}
        for name, (shape, dtype) in self.inputs.items():
            if tuple(inputs[name].shape) != shape:
                raise ValueError(f"inputs: {name} is {tuple(inputs[name].shape)}; the program takes {shape}")
            values[name] = inputs[name].to(dtype).contiguous().clone()
        folder = Path(self._folder.name)
        save_file(values, folder / "inputs.safetensors")
        assert self._process.stdin is not None
        try:
            self._process.stdin.write("run\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._failure() from None
        self._reply()
        # Copies: the file is overwritten by the next call.
        return {name: value.clone() for name, value in load_file(folder / "outputs.safetensors").items()}

    def close(self) -> None:
        """End the process and remove its files."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            if stream is not None:
                stream.close()
        self._folder.cleanup()

    def _reply(self) -> str:
        stream = self._process.stdout
        assert stream is not None
        ready, _, _ = select.select([stream], [], [], max(0.0, self._deadline - time.monotonic()))
        if not ready:
            raise ExportError(
                f"{self.path.name}: Core AI's interpreter did not finish in {self.seconds:g} s. Give it more with "
                "--check-seconds (fp16 takes far longer than fp32), or 0 to keep the asset unchecked"
            )
        line = stream.readline()
        if not line:
            raise self._failure()
        return line

    def _failure(self) -> ExportError:
        status = self._process.wait()
        self._errors.seek(0)
        said = [line.strip() for line in self._errors.read().splitlines() if line.strip()]
        return ExportError(f"{self.path.name}: Core AI's runtime ended with status {status}: {' | '.join(said[-3:])}")
