"""Every Triton kernel and every config compiles to machine code for NVIDIA sm_80, sm_90, sm_100 and AMD gfx942, without
a GPU, and no NVIDIA build spills registers. Runs in a process without TRITON_INTERPRET, which this one must not have
set."""

import importlib.util
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

MISSING = importlib.util.find_spec("triton") is None
pytestmark = [
    pytest.mark.compile_cubin,
    pytest.mark.skipif(MISSING, reason="triton is not installed"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="compiling needs TRITON_INTERPRET unset"),
]

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
DTYPES = [(target, "bfloat16") for target in TARGETS] + [("sm_90", "float32")]


def _builds(target: str, dtype: str) -> list[Any]:
    from snapgen_kernels._triton import group_norm_silu as kernels

    return kernels.builds(getattr(torch, dtype), target != "gfx942")


def _compile(build: Any, target: str) -> Any:
    """One kernel as the launcher would have it compiled: pointers aligned to 16 bytes, the unit stride known."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, aligned = {}, {}
    for index, parameter in enumerate(build.kernel.arg_names):
        if parameter in build.constants:
            signature[parameter] = "constexpr"
            continue
        pointer = parameter.startswith("p_")
        kind = f"*{build.pointers.get(parameter, 'fp32')}" if pointer else "i32"
        signature[parameter] = "fp32" if parameter == "eps" else kind
        if pointer or parameter in build.divisible:
            aligned[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=build.kernel, signature=signature, constexprs=dict(build.constants), attrs=aligned)
    return triton.compile(source, target=GPUTarget(*TARGETS[target]), options=dict(build.options))


def _resources(cubin: bytes, folder: Path, disassemble: bool) -> tuple[int, int, str]:
    """Registers and stack bytes of a cubin (a spill needs stack), and its disassembly if asked for."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)

    def show(flag: str) -> str:
        return subprocess.run([tool, flag, path], check=True, capture_output=True, text=True).stdout

    usage, sass = show("--dump-resource-usage"), show("-sass") if disassemble else ""
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    return int(found[1]), int(found[2]), sass


@pytest.mark.parametrize(("target", "dtype"), DTYPES)
def test_compiles_without_spills(target: str, dtype: str, tmp_path: Path) -> None:
    for build in _builds(target, dtype):
        compiled = _compile(build, target)
        if target == "gfx942":
            assert compiled.asm["hsaco"], build
            continue
        registers, stack, sass = _resources(compiled.asm["cubin"], tmp_path, target == "sm_90")
        assert registers <= 255 and stack == 0, f"{build}: {registers} registers, {stack} bytes of stack"
        assert not re.search(r"\b(LDL|STL)\b", sass), f"{build}: spills"
        assert not re.search(r"\b(RED|ATOM|ATOMG)\b", sass), f"{build}: atomics"
        if target == "sm_90" and build.divisible:
            assert re.search(r"\bLDG\.E\.(EF\.)?128\b", sass), f"{build}: no 16-byte loads"
            taught = "tanh.approx" in compiled.asm["ptx"]
            assert taught == bool(build.constants.get("FAST")) == ("MUFU.TANH" in sass), build


def test_every_kernel_is_listed() -> None:
    import triton

    from snapgen_kernels._triton import group_norm_silu as kernels

    found = {name for name, value in vars(kernels).items() if isinstance(value, triton.runtime.JITFunction)}
    listed = {build.kernel.fn.__name__ for build in _builds("sm_90", "bfloat16")}
    assert {name for name in found if name.endswith("_kernel")} == listed
