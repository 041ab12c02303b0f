"""Which implementation runs: the mode, what is usable on this machine, and why something is not.

Environment variables, both read here and nowhere else:

===================  ==============================  ================================================================
name                 values                          meaning
===================  ==============================  ================================================================
``SNAPGEN_KERNELS``  ``auto``, ``fused``,            the mode where no :func:`use` is in force (default ``auto``)
                     ``reference``
``SNAPGEN_CACHE``    a folder                        where autotuning results are kept (default ``~/.cache/snapgen``)
``MALLOC_...``       glibc's own                     whether malloc keeps the pages of large tensors
===================  ==============================  ================================================================
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

import torch

log = logging.getLogger("snapgen_kernels")

MODES = ("auto", "fused", "reference")
_mode: ContextVar[str | None] = ContextVar("snapgen_kernels_mode", default=None)

# op -> device types for which a fused kernel exists; filled by the contract files.
KERNELS: dict[str, tuple[str, ...]] = {}


class FusedUnavailable(RuntimeError):
    """Raised under ``use("fused")`` where a call has no fused kernel; the message says why."""


def _checked_mode(mode: str, source: str) -> str:
    if mode not in MODES:
        raise ValueError(f"{source} is {mode!r}; allowed: {', '.join(MODES)}")
    return mode


def mode() -> str:
    """The mode in force in this thread or task: ``auto``, ``fused`` or ``reference``."""
    chosen = _mode.get()
    if chosen is None:
        return _checked_mode(os.environ.get("SNAPGEN_KERNELS", "auto"), "environment variable SNAPGEN_KERNELS")
    return chosen


class use:  # a verb, read as a function: use("fused")
    """Choose how ops are run, from here on or for a ``with`` block, in this thread or task alone.

    - ``auto``: fused kernels where they are eligible; otherwise PyTorch, with the reason logged once.
    - ``fused``: as ``auto``, but a call without a fused kernel raises :class:`FusedUnavailable`.
    - ``reference``: the Python references are called directly, so that ``torch.export`` sees plain aten ops.

    ``torch.compile`` keeps the mode that was in force when it traced.
    """

    def __init__(self, mode: str) -> None:
        _checked_mode(mode, "mode")
        self._previous = _mode.get()
        _mode.set(mode)

    def __enter__(self) -> use:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _mode.set(self._previous)


class _Extension:
    """The outcome of loading ``snapgen_kernels._C``: the module, or the reason why there is none."""

    def __init__(self, module: ModuleType | None, reason: str | None, broken: bool = False) -> None:
        self.module, self.reason, self.broken = module, reason, broken


@cache
def extension() -> _Extension:
    if importlib.util.find_spec("snapgen_kernels._C") is None:
        return _Extension(None, "the C++ extension is not built (build it: pip install . with SNAPGEN_BUILD_CPP unset)")
    try:
        return _Extension(importlib.import_module("snapgen_kernels._C"), None)
    except (ImportError, OSError) as error:
        cure = (
            f"the C++ extension is there but does not load with torch {torch.__version__}: {error}. "
            "Rebuild it (pip install --force-reinstall --no-deps .) or run without it (SNAPGEN_KERNELS=reference)"
        )
        return _Extension(None, cure, broken=True)


@cache
def triton_reason() -> str | None:
    """None if Triton can be imported, else why not."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install 'snapgen[gpu]')"
    return None


def missing_kernel(op: str, device_type: str) -> str | None:
    """None if ``op`` has a usable fused kernel on ``device_type``, else the reason."""
    if device_type not in KERNELS[op]:
        return f"no fused kernel is written for device type {device_type!r} yet"
    if device_type == "cpu":
        loaded = extension()
        if loaded.broken:
            raise ImportError(f"snapgen_kernels: {loaded.reason}")
        return loaded.reason
    return triton_reason()


@cache
def _log_once(op: str, reason: str) -> None:
    log.info("%s runs in PyTorch: %s", op, reason)


def _constant_in_traces(function: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.compiler.assume_constant_result``, without the import of all of dynamo that it costs (2 s)."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@_constant_in_traces
def select(op: str, device_type: str, unsupported: str | None) -> bool:
    """True: call the registered op. False: call PyTorch. Raises under ``use("fused")`` where there is no kernel."""
    chosen = mode()
    if chosen == "reference":
        return False
    reason = unsupported or missing_kernel(op, device_type)
    if reason is None and torch._C._are_functorch_transforms_active():
        reason = "called inside a torch.func transform, which PyTorch does not carry through registered ops"
    if reason is None:
        return True
    if chosen == "fused":
        raise FusedUnavailable(f"{op}: {reason}")
    _log_once(op, reason)
    return False


@_constant_in_traces
def is_reference() -> bool:
    """True under ``use("reference")``."""
    return mode() == "reference"


def backends() -> dict[str, Any]:
    """What is usable here, and why the rest is not.

    Returns a dict: ``mode``; ``cpp`` (``available``, ``reason``, ``variants`` that were built, ``variant`` in use);
    ``triton`` (``available``, ``reason``, ``version``); ``cuda`` (``available``, ``reason``, ``device``); ``ops``,
    which maps each op to ``{device type: "fused" or the reason}``. A broken extension is reported here, not raised.
    """
    loaded = extension()
    cpp: dict[str, Any] = {"available": loaded.module is not None, "reason": loaded.reason}
    if loaded.module is not None:
        cpp["variants"] = list(loaded.module.variants())
        cpp["variant"] = loaded.module.variant()
    reason = triton_reason()
    triton: dict[str, Any] = {"available": reason is None, "reason": reason}
    if reason is None:
        triton["version"] = importlib.import_module("importlib.metadata").version("triton")
    has_cuda = torch.cuda.is_available()
    cuda: dict[str, Any] = {"available": has_cuda, "reason": None if has_cuda else "torch sees no CUDA or ROCm device"}
    if has_cuda:
        cuda["device"] = torch.cuda.get_device_name()
    ops: dict[str, dict[str, str]] = {}
    for op, devices in KERNELS.items():
        ops[op] = {}
        for device in ("cpu", "cuda"):
            if device not in devices:
                why: str | None = f"PyTorch: no fused kernel is written for device type {device!r} yet"
            else:
                absent = loaded.reason if device == "cpu" else (reason or cuda["reason"])
                why = f"PyTorch: {absent}" if absent else "fused"
            ops[op][device] = str(why)
    return {"mode": mode(), "cpp": cpp, "triton": triton, "cuda": cuda, "ops": ops}


def malloc_keeps_pages() -> bool:
    """Whether glibc's malloc was told to keep the pages of large tensors rather than fault them in for each one anew.
    Other allocators are not looked at."""
    return "MALLOC_TRIM_THRESHOLD_" in os.environ and "MALLOC_MMAP_THRESHOLD_" in os.environ


def cache_dir() -> Path:
    """The folder for autotuning results (made on first write, not here)."""
    return Path(os.environ.get("SNAPGEN_CACHE") or Path.home() / ".cache" / "snapgen")


Ranges = Callable[[str], AbstractContextManager[Any]]
_ranges: ContextVar[Ranges | None] = ContextVar("snapgen_kernels_ranges", default=None)


def profile_ranges(enabled: bool | Ranges) -> None:
    """Turn the ranges around fused ops, and around the parts of `snapgen`'s pictures and training steps, on or off in
    this thread or task (off by default).

    Args:
        enabled: True for NVTX ranges; or what makes a context manager of a range's name, for another profiler.

    Raises:
        ImportError: ``enabled`` is True and the package nvtx is not installed.
    """
    if enabled is True:
        if importlib.util.find_spec("nvtx") is None:
            raise ImportError("NVTX ranges need the package nvtx: pip install 'snapgen[profile]'")
        enabled = functools.partial(importlib.import_module("nvtx").annotate, domain="snapgen")
    _ranges.set(enabled or None)


def profile_range(name: str) -> AbstractContextManager[Any]:
    """A range called ``name`` where :func:`profile_ranges` is on; nothing otherwise."""
    ranges = _ranges.get()
    return contextlib.nullcontext() if ranges is None else ranges(name)
