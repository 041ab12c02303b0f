"""coremltools, imported on first use and kept quiet, and the errors of this package."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import io
import logging
import warnings
from collections.abc import Iterator
from typing import Any


class ExportError(ValueError):
    """A model that cannot be exported; the message says what and why."""


class PackageError(ExportError):
    """A Core ML package that cannot be read: missing, truncated, foreign, or of a newer format."""


class ParityError(ExportError):
    """An exported part whose numbers are too far from the model's."""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep coremltools' warnings and progress bars off the terminal for a while; everything is put back afterwards.

    It warns at import of every library that is newer than those it was tested with, and draws a bar per compiler pass
    on standard error. Errors still come as exceptions.
    """
    logger = logging.getLogger("coremltools")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def coremltools(module: str | None = None) -> Any:
    """The package coremltools, or the module of that name inside it.

    Raises:
        ExportError: it is not installed.
    """
    try:
        with quiet():
            return importlib.import_module("coremltools" if module is None else f"coremltools.{module}")
    except ModuleNotFoundError as error:
        if error.name != "coremltools":
            raise
        raise ExportError(
            "Core ML export needs coremltools, which is not installed: pip install 'snapgen[export]'"
        ) from error


def snapgen_version() -> str:
    """The installed version of this package; "source" where it runs from a checkout that is not installed."""
    try:
        return importlib.metadata.version("snapgen")
    except importlib.metadata.PackageNotFoundError:
        return "source"
