"""The state of glibc's malloc, which decides what large CPU tensors cost.

By default glibc gives large blocks back to the kernel at once, so that every large tensor is faulted in page by page:
up to five times slower in plain PyTorch. ``tuned`` keeps the pages. The variables are read once, when a process starts.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Mapping, Sequence
from typing import Literal

Malloc = Literal["tuned", "stock"]

TUNED = {
    "MALLOC_MMAP_THRESHOLD_": str(4 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(8 << 30),
    "MALLOC_TOP_PAD_": str(256 << 20),
}


def state(environment: Mapping[str, str] = os.environ) -> str:
    """``tuned``, ``stock``, or ``other`` where some variable has a value of the user's own; ``none`` without glibc."""
    if platform.libc_ver()[0] != "glibc":
        return "none"
    given = {name: environment[name] for name in TUNED if name in environment}
    return "stock" if not given else "tuned" if given == TUNED else "other"


def command(wanted: Malloc, arguments: Sequence[str]) -> tuple[list[str], dict[str, str]] | None:
    """The command and environment to start ``python -m bench`` anew with; None where this process will do."""
    if state() in (wanted, "none"):
        return None
    environment = {name: value for name, value in os.environ.items() if name not in TUNED}
    if wanted == "tuned":
        environment |= TUNED
    return [sys.executable, "-m", "bench", *arguments], environment
