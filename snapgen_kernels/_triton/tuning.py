"""Which of a kernel's configs is launched: a rule, unless one was measured when the caller asked for it.

No ordinary call is timed. :func:`choose` takes the first of

1. the config of a :class:`forced` block (tests, benchmarks);
2. inside :class:`tuning`, which ``warmup(tune=True)`` enters: the fastest candidate, measured once per block and kept
   in memory and on disk;
3. the disk cache, ``<cache_dir()>/triton-<GPU>-<Triton's version>-<hash of the kernels' sources>.json``, so that
   neither another Triton nor an edited kernel meets a choice that was not measured with it;
4. a table shipped with the package, ``tables/<GPU>.json`` (:func:`export` writes one);
5. the default, which a rule made from the shape.

A GPU is named by its slug: ``NVIDIA H200`` is ``nvidia-h200``. A table also serves the longer names of its family:
``NVIDIA H100 80GB HBM3`` looks for ``nvidia-h100-80gb-hbm3``, then ``nvidia-h100-80gb``, then ``nvidia-h100``. The disk
cache never does.

Both files are JSON. A choice is stored under its kernel and its key as ``{field: value}`` and counts only while it is
one of the candidates. Another config may add in another order, so that results of a tuned and an untuned process may
differ in the last bits; within one process a shape keeps its config unless it is tuned.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import re
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar, Token
from functools import cache, partial
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
import triton
from triton.runtime.errors import OutOfResources, PTXASError

from snapgen_kernels import _backend
from snapgen_kernels.device_time import DeviceTimer

log = logging.getLogger("snapgen_kernels")

C = TypeVar("C", bound=tuple[Any, ...])  # a NamedTuple of ints, strs and bools
Key = tuple[int | str, ...]
Timer = Callable[[Callable[[], object]], float]
Entries = dict[str, dict[str, dict[str, Any]]]  # kernel -> key as JSON -> config by field

TABLES = Path(__file__).parent / "tables"


class _Session:
    """One :class:`tuning` block: how it measures, and what it has measured."""

    def __init__(self, timer: Timer) -> None:
        self.timer = timer
        self.measured: set[tuple[str, Key]] = set()


_session: ContextVar[_Session | None] = ContextVar("snapgen_kernels_tuning", default=None)
_forced: ContextVar[Mapping[str, Any] | None] = ContextVar("snapgen_kernels_forced", default=None)


def choose(kernel: str, key: Key, candidates: Sequence[C], default: C, launch: Callable[[C], object]) -> C:
    """The config to launch ``kernel`` with; a dict lookup in an ordinary call after the first.

    Args:
        kernel: its name in the files; unique in the package.
        key: what the choice depends on (sizes, dtype); ``candidates`` and ``default`` must be functions of it.
        candidates: configs that are right for this call. One candidate is returned unmeasured.
        default: the rule's choice.
        launch: runs the call with one config. While tuning it is called many times over, so it must leave the same
            result each time.

    Raises:
        RuntimeError: while tuning: a CUDA graph is being captured, or no candidate fits the GPU.
    """
    overrides = _forced.get()
    if overrides is not None and kernel in overrides:
        return overrides[kernel]
    if len(candidates) == 1:
        return candidates[0]
    gpu, session = _gpu(), _session.get()
    if session is not None and (kernel, key) not in session.measured:
        return _tune(gpu, session, kernel, key, candidates, launch)
    found = gpu.chosen.get((kernel, key))
    return gpu.resolve(kernel, key, candidates, default) if found is None else found


class _InThisThread:
    """A context variable set for a block. Backward passes inside it run in this thread, where the variable is seen;
    autograd's own threads would not see it."""

    def __init__(self, variable: ContextVar[Any], value: Any) -> None:
        self._variable, self._value = variable, value
        self._token: Token[Any] | None = None
        self._autograd = contextlib.ExitStack()

    def __enter__(self) -> None:
        self._autograd.enter_context(torch.autograd.set_multithreading_enabled(False))
        self._token = self._variable.set(self._value)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._token is not None
        self._variable.reset(self._token)
        self._autograd.close()


class forced(_InThisThread):  # read as a verb: with forced("apply", config)
    """A block in which ``kernel`` is launched with ``config``, whether or not that is a candidate. Blocks nest."""

    def __init__(self, kernel: str, config: tuple[Any, ...]) -> None:
        super().__init__(_forced, {**(_forced.get() or {}), kernel: config})


class tuning(_InThisThread):  # read as a verb: with tuning()
    """A block in which every choice is measured once, in this thread alone.

    Args:
        timer: milliseconds that a function takes; None: the GPU's own time, the processor's left out, with cold caches
            (:class:`snapgen_kernels.device_time.DeviceTimer`), as where a CUDA graph launches.

    Raises:
        RuntimeError: there is no GPU, and no ``timer``.
    """

    def __init__(self, timer: Timer | None = None) -> None:
        if timer is None and not torch.cuda.is_available():
            raise RuntimeError("tuning measures on a GPU, and torch sees none")
        super().__init__(_session, _Session(timer or DeviceTimer().median))


def _tune(
    gpu: _Gpu, session: _Session, kernel: str, key: Key, candidates: Sequence[C], launch: Callable[[C], object]
) -> C:
    """Measure every candidate and keep the fastest, the first of equals."""
    if _capturing():
        raise RuntimeError(f"{kernel} cannot be tuned while a CUDA graph is captured: call warmup(tune=True) before")
    with _measuring:  # two threads at a time would measure each other; launch may choose in turn
        times: dict[C, float] = {}
        last: Exception | None = None
        for config in candidates:
            try:
                times[config] = session.timer(partial(launch, config))
            except (OutOfResources, PTXASError, torch.OutOfMemoryError) as error:
                log.info("%s %s: %s does not fit this GPU: %s", kernel, key, config, error)
                last = error
        if not times:
            raise RuntimeError(f"{kernel} {key}: none of its {len(candidates)} configs fits this GPU: {last}") from last
        fastest = min(times, key=lambda config: times[config])
        log.info("%s %s: %s, %.4g ms; slowest %.4g ms", kernel, key, fastest, times[fastest], max(times.values()))
        session.measured.add((kernel, key))
        gpu.keep(kernel, key, fastest)
    return fastest


# ---- what is known of a GPU ------------------------------------------------------------------------------------------

_measuring = threading.RLock()
_lock = threading.RLock()  # guards the two dicts below, and every _Gpu's
_gpus: dict[int, _Gpu] = {}  # by device index; those of one model share an entry
_models: dict[str | None, _Gpu] = {}


class _Gpu:
    """The choices for one model of GPU; ``name`` is None where there is none (under the interpreter)."""

    def __init__(self, name: str | None) -> None:
        self.slug = None if name is None else slug(name)
        self.chosen: dict[tuple[str, Key], Any] = {}
        self.cached: Entries = {} if self.slug is None else _read(cache_file(self.slug))
        self.table: Entries = {} if self.slug is None else _shipped(self.slug)

    def resolve(self, kernel: str, key: Key, candidates: Sequence[C], default: C) -> C:
        """The stored choice if it is still a candidate, else the default; remembered."""
        name = _key(key)
        with _lock:
            stored = [entries.get(kernel, {}).get(name) for entries in (self.cached, self.table)]
            known = [config for fields in stored for config in candidates if fields == _fields(config)]
            return self.chosen.setdefault((kernel, key), known[0] if known else default)

    def keep(self, kernel: str, key: Key, config: tuple[Any, ...]) -> None:
        """Remember a measured choice, and add it to what the file holds by now."""
        with _lock:
            self.chosen[kernel, key] = config
            self.cached.setdefault(kernel, {})[_key(key)] = _fields(config)
        if self.slug is None:
            return
        path = cache_file(self.slug)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(path):
                entries = _read(path)
                entries.setdefault(kernel, {})[_key(key)] = _fields(config)
                _write(path, entries)
        except OSError as error:
            log.warning("the choice for %s %s lasts for this process alone: %s: %s", kernel, key, path, error)


def _gpu() -> _Gpu:
    index = torch.cuda.current_device() if torch.cuda.is_initialized() else -1
    found = _gpus.get(index)
    if found is None:
        with _lock:
            name = _device_name(index)
            if name not in _models:
                _models[name] = _Gpu(name)
            found = _gpus[index] = _models[name]
    return found


def _capturing() -> bool:
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def _device_name(index: int) -> str | None:
    return None if index < 0 else torch.cuda.get_device_name(index)


def forget() -> None:
    """Drop what is in memory, so that the files are read again at the next choice."""
    with _lock:
        _gpus.clear()
        _models.clear()


def slug(name: str) -> str:
    """A GPU's name as part of a file's: lower case, with ``-`` for everything but letters and digits."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


# ---- files -----------------------------------------------------------------------------------------------------------


def _key(key: Key) -> str:
    return json.dumps(list(key))


def _fields(config: Any) -> dict[str, Any]:
    return config._asdict()


@cache
def sources() -> str:
    """A hash of the Python files beside this one: the kernels and what chooses among their configs."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def cache_file(gpu: str) -> Path:
    """Where choices measured on the GPU with this slug are kept."""
    return _backend.cache_dir() / f"triton-{gpu}-{slug(triton.__version__)}-{sources()}.json"


def _shipped(gpu: str) -> Entries:
    """The table for this slug, or for the nearest shorter one of at least two words; empty if there is none."""
    words = gpu.split("-")
    for length in range(len(words), 1, -1):
        path = TABLES / f"{'-'.join(words[:length])}.json"
        if path.is_file():
            return _read(path, "configs")
    return {}


def _read(path: Path, member: str | None = None) -> Entries:
    """The choices in a JSON file (in its ``member``); none, with a warning that names the file, if it is damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        entries = value if member is None else value[member]
        for configs in entries.values():
            for config in configs.values():
                config.keys()
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("%s cannot be used and is ignored; the next tuning replaces it: %r", path, error)
        return {}
    return entries


def _write(path: Path, value: object) -> None:
    """Write JSON whole or not at all."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=".json")
    temporary = Path(name)
    try:
        with open(handle, "w", encoding="utf-8") as file:
            json.dump(value, file, indent=1, sort_keys=True)
            file.write("\n")
        temporary.chmod(0o644)  # mkstemp makes files for the owner alone
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds a lock file beside ``path``, so that no other process changes it between a read and a replace."""
    with open(path.with_suffix(".lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def export(path: str | Path) -> Path:
    """Write what was measured on the current GPU as a table to ship (``tables/<slug>.json``).

    Args:
        path: the file, or a folder in which it is called ``<slug>.json``.

    Returns:
        The file. It holds ``configs``, kernel -> key -> config, and ``source``: where they come from.

    Raises:
        RuntimeError: there is no GPU, or nothing was measured on it.
    """
    gpu = _gpu()
    if gpu.slug is None:
        raise RuntimeError("a table is exported from the GPU that it was measured on, and torch sees none")
    with _lock:
        entries: Entries = {kernel: dict(configs) for kernel, configs in gpu.cached.items()}
    if not entries:
        raise RuntimeError(f"nothing was measured on {gpu.slug}: call warmup(tune=True) before")
    path = Path(path)
    path = path / f"{gpu.slug}.json" if path.is_dir() else path
    source = {"measured": True, "gpu": gpu.slug, "triton": triton.__version__, "torch": torch.__version__}
    _write(path, {"source": {**source, "sources": sources()}, "configs": entries})
    return path
