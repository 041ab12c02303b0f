"""Where a row comes from: device, versions, commit, date."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import torch

from bench import malloc

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"

# What decides a measurement; results and pictures do not make a checkout dirty.
_MEASURED = ("snapgen_kernels", "csrc", "setup.py", "bench", ":!bench/results")


@dataclass(frozen=True)
class Provenance:
    """What every row of a run shares; the names are the columns of the CSV file."""

    date: str
    commit: str
    device: str
    variant: str
    threads: int
    malloc: str
    load: float
    python: str
    torch: str
    triton: str
    snapgen: str


def provenance(device: str, commit: str = "") -> Provenance:
    """The state of this machine and checkout now. ``date`` also identifies the run.

    ``variant`` is the instruction set that the C++ kernels use, or the GPU's compute capability; ``load`` the processes
    that wanted to run in the last minute, where the system tells.
    """
    return Provenance(
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        commit=_git_commit() or commit or "unknown",
        device=device_name(device),
        variant=_variant(device),
        threads=torch.get_num_threads(),
        malloc=malloc.state(),
        load=round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else -1.0,
        python=platform.python_version(),
        torch=str(torch.__version__),
        triton=_version("triton"),
        snapgen=_version("snapgen"),
    )


def device_name(device: str) -> str:
    """The GPU's name; or the processor's with its cores and vector instructions, since clouds hide the model."""
    if device == "cuda":
        return torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
    return f"{_processor()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"


def results_file(device: str) -> Path:
    """``bench/results/<machine>.csv``."""
    slug = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    return RESULTS / f"{slug}.csv"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _variant(device: str) -> str:
    if device == "cuda":
        return "sm_{}{}".format(*torch.cuda.get_device_capability()) if torch.cuda.is_available() else ""
    import snapgen_kernels

    return str(snapgen_kernels.backends()["cpp"].get("variant", "no extension"))


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "source" if package == "snapgen" else "none"


def _git_commit() -> str:
    """The commit, with ``+dirty`` where files that matter differ from it; empty without git or outside a checkout."""
    if not (ROOT / ".git").exists():
        return ""
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        changed = _git("status", "--porcelain", "--", *_MEASURED)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return f"{head}+dirty" if changed else head


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()
