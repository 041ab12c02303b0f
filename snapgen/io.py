"""Files that appear whole or not at all, and checkpoints that are read without unpickling anything."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: truncated, of another preset, or not safetensors."""


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to; it becomes `path` if the block ends well, and vanishes otherwise."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        _sync(temporary)
        # mkstemp makes files for the owner alone; a result is for whoever the user's umask allows.
        temporary.chmod(0o666 & ~_umask())
        os.replace(temporary, path)
    except OSError as error:
        raise _explained(error, path) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def whole_directory(path: str | Path) -> Iterator[Path]:
    """A temporary directory that becomes `path` (replacing one that is there) when the block ends well."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}-"))
    try:
        with explained(path):
            yield temporary
            publish(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def publish(temporary: Path, path: Path) -> None:
    """Make a finished directory `path`, on the same file system, replacing one that is there."""
    for file in temporary.rglob("*"):
        if file.is_file():
            _sync(file)
            # safetensors makes files for the owner alone.
            file.chmod(0o666 & ~_umask())
    temporary.chmod(0o777 & ~_umask())
    if path.exists():
        # Two renames: a kill between them leaves the old one under its hidden name, and both whole.
        old = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}-old-"))
        os.replace(path, old / path.name)
        os.replace(temporary, path)
        shutil.rmtree(old)
    else:
        os.replace(temporary, path)


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Errors of the disk met inside name `path`, and say that nothing was written there."""
    try:
        yield
    except OSError as error:
        raise _explained(error, path) from error


def move_into(source: str | Path, target: str | Path) -> None:
    """Move every entry of `source` into `target`, on the same file system, replacing those of its name: all, or none.

    A kill in between leaves the replaced ones whole, in a hidden folder of `target`.
    """
    source, target = Path(source), Path(target)
    for path in source.rglob("*"):
        if path.is_file():
            _sync(path)
        path.chmod((0o777 if path.is_dir() else 0o666) & ~_umask())
    entries = [entry.name for entry in sorted(source.iterdir())]
    old = Path(tempfile.mkdtemp(dir=target, prefix=".replaced-"))
    try:
        for name in entries:
            if (target / name).exists():
                os.replace(target / name, old / name)
            os.replace(source / name, target / name)
    except BaseException:
        for name in entries:
            if not (source / name).exists():
                os.replace(target / name, source / name)
            if (old / name).exists():
                os.replace(old / name, target / name)
        old.rmdir()
        raise
    shutil.rmtree(old)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write a JSON file whole or not at all."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a JSON object, as :func:`write_json` wrote it.

    Raises:
        CheckpointError: the file is damaged; names it.
    """
    if not Path(path).is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:  # not JSON, or not even text
        raise CheckpointError(f"{path}: damaged, not JSON ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: damaged, holds no JSON object")
    return value


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write tensors as safetensors, whole or not at all."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with whole_file(path) as temporary:
        _on_disk(lambda: save_file(plain, temporary, metadata))


def load_tensors(path: str | Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        CheckpointError: the file is missing, truncated, a pickle, or something else.
    """
    check_tensors(path)
    return load_file(path)


def check_tensors(path: str | Path) -> None:
    """Check that a file is whole safetensors, by its header and length, without reading the weights.

    Raises:
        CheckpointError: the file is missing, truncated, a pickle, or something else.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    with path.open("rb") as file:
        head = file.read(9)
    # safetensors begin with 8 bytes of length, whose first may look like a pickle's, and then a brace.
    if head[8:] != b"{" and (head[:1] == b"\x80" or head[:2] == b"PK"):
        raise CheckpointError(f"{path}: this is a pickle (a .pt or .bin file); only safetensors are read")
    try:
        with safe_open(path, framework="pt"):
            pass
    except SafetensorError as error:
        raise CheckpointError(f"{path}: truncated or not a safetensors file ({error})") from error


def tensor_names(path: str | Path) -> list[str]:
    """The names of the tensors in a safetensors file, without reading the weights."""
    with safe_open(path, framework="pt") as file:
        return list(file.keys())


def halve(folder: str | Path) -> None:
    """Store the fp32 weights of every safetensors file under `folder` in fp16, at half the size.

    Raises:
        ValueError: a weight is too large for fp16.
    """
    for path in sorted(Path(folder).rglob("*.safetensors")):
        tensors = load_tensors(path)
        for name, tensor in tensors.items():
            if tensor.dtype == torch.float32:
                tensors[name] = tensor.half()
                if not torch.equal(tensors[name].isfinite(), tensor.isfinite()):
                    raise ValueError(f"{path}: {name} reaches {tensor.abs().max():.3g}, too large for fp16")
        # transformers asks for the key, which save_pretrained writes too.
        save_tensors(path, tensors, {"format": "pt"})


def load_strictly(module: Any, tensors: Mapping[str, Tensor], source: str | Path, what: str) -> None:
    """Load `tensors` into `module` if names and shapes all fit.

    Raises:
        CheckpointError: they belong to another preset or another model; names the first differences.
    """
    own = module.state_dict()
    differences = [
        f"{name} is {tuple(tensors[name].shape)} there and {tuple(own[name].shape)} here"
        for name in own.keys() & tensors.keys()
        if own[name].shape != tensors[name].shape
    ]
    differences += [f"{name} is missing" for name in own.keys() - tensors.keys()]
    differences += [f"{name} is not part of it" for name in tensors.keys() - own.keys()]
    if differences:
        listed = "; ".join(sorted(differences)[:3])
        raise CheckpointError(f"{source}: does not fit {what}: {listed} ({len(differences)} differences in all)")
    module.load_state_dict(dict(tensors))


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _on_disk(write: Callable[[], None]) -> None:
    # safetensors reports a full disk as its own error; callers are promised OSError.
    try:
        write()
    except SafetensorError as error:
        if "os error 28" in str(error) or "No space left" in str(error):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
        raise


def _explained(error: OSError, path: Path) -> OSError:
    if error.errno == errno.ENOSPC:
        return OSError(errno.ENOSPC, f"no space left on the disk while writing {path}; nothing was written there")
    return error
