"""Triton's interpreter must be chosen before triton is imported: what is tested under it runs in processes of its own,
each of them the same test file once more."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

INSIDE = os.environ.get("TRITON_INTERPRET") == "1"
MISSING = importlib.util.find_spec("triton") is None

marks = [pytest.mark.interpreter, pytest.mark.skipif(MISSING, reason="triton is not installed")]
inside = pytest.mark.skipif(not INSIDE, reason="runs in the process that test_under_the_interpreter starts")
outside = pytest.mark.skipif(INSIDE, reason="is the parent process")


def assert_passes(file: str, select: str | None = None) -> None:
    """The tests of a file, or those that pytest's ``-k`` selects, pass under the interpreter."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file]
    command += [] if select is None else ["-k", select]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout, done.stdout
