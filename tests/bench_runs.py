"""What the benchmark's tests share: a run in this process, a row, and the smallest case."""

from io import StringIO

from rich.console import Console

import bench.__main__ as command
from bench.results import Row
from snapgen_kernels import _backend

TINY = ("--small", "--suite", "group_norm_silu", "--case", "one-pixel", "--seconds", "0.02")
KERNEL = _backend.missing_kernel("group_norm_silu", "cpu") is None


def run(*arguments: str) -> tuple[int, str]:
    """Exit code and printed text of the benchmark, in this process."""
    text = StringIO()
    code = command.main(arguments, Console(file=text, width=160, highlight=False))
    return code, text.getvalue()


def row(**changes: object) -> Row:
    measured = dict(p20_ms=1.0, p50_ms=2.0, p80_ms=3.0, repeats=5, flops=10**8, bytes=10**6, floor_ms=1.0)
    rates = dict(gemm_gflops=190.0, copy_gbs=40.0, peak_bytes=100, checked="same shape", provider_version="1")
    where = dict(
        date="2026-01-01T00:00:00+00:00", commit="abc", device="a processor, 2 cores", variant="avx2", threads=2,
        malloc="tuned", load=0.1, python="3.11", torch="2.13.0", triton="none", snapgen="0.1",
    )  # fmt: skip
    case = dict(op="resblock", case="256ch-128", dtype="fp32", mode="fwd", provider="fused")
    values: dict[str, object] = {**case, **measured, **rates, **where, **changes}
    return Row(**values)  # type: ignore[arg-type]
