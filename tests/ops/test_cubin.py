"""Every Triton kernel and every config that a launcher may choose compiles to machine code without a GPU, and the
machine code is what was meant: no spills, no atomics, tensor cores, 16-byte loads, shared memory that the target has.

A file lists its own launches in ``builds(dtype, nvidia)``. An ordinary run compiles the largest tile of each kernel for
every target and dtype, and the smallest for sm_90 in bf16, and looks at the disassembly. The rest carries the marker
``complete``, which pytest leaves out unless told otherwise (``-m complete``), and CI runs it; there PTX is looked at,
which has one instruction for each that is looked for, and costs no disassembler. Spills show in both by the stack.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import itertools
import math
import os
import pkgutil
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch

if TYPE_CHECKING:
    from snapgen_kernels._triton.common import Build

MISSING = importlib.util.find_spec("triton") is None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [
    pytest.mark.compile_cubin,
    pytest.mark.skipif(MISSING, reason="triton is not installed"),
    pytest.mark.skipif(INTERPRETED, reason="compiling needs TRITON_INTERPRET unset"),
]


class Target(NamedTuple):
    """What Triton compiles for, and the most shared memory that a block may have there."""

    backend: str
    arch: int | str
    warp: int
    shared: int
    tensor_core: str


# What to look for, in the machine code and in PTX. Hopper's and Blackwell's own products need tiles of 64 rows and 4
# warps; smaller ones take the older instruction.
SMALL_PRODUCT = r"\bHMMA\.|\bmma\.sync"
ATOMICS = r"\b(RED|REDG|ATOM|ATOMG|UTMAREDG)\b|\b(atom|red|multimem|cp\.reduce\.async)\."
_PTX = r"\bld\.global[\w:.]*\."
LOADS = {
    16: r"\b(LDG|LDGSTS)\.E\.(\w+\.)*128|\bUTMALDG\b|\bcp\.async\.(cg|bulk)|" + _PTX + r"(v[48]\.b32|v[24]\.b64)",
    8: r"\b(LDG|LDGSTS)\.E\.(\w+\.)*64|\bcp\.async\.ca|" + _PTX + r"(v2\.b32|b64)",
}
TARGETS = {
    "sm_80": Target("cuda", 80, 32, 163 * 1024, SMALL_PRODUCT),
    "sm_90": Target("cuda", 90, 32, 227 * 1024, r"\bHGMMA\.|\bwgmma\.mma_async"),
    "sm_100": Target("cuda", 100, 32, 227 * 1024, r"\bUTC\w*MMA\b|\btcgen05\.mma"),
    "gfx942": Target("hip", "gfx942", 64, 64 * 1024, r"\bv_mfma_"),
}
# GPUs with less shared memory (sm_86 and sm_89, sm_120).
SMALLER = {
    "sm_89": Target("cuda", 89, 32, 99 * 1024, SMALL_PRODUCT),
    "sm_120": Target("cuda", 120, 32, 99 * 1024, SMALL_PRODUCT),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
COMBINATIONS = [*((target, "bf16") for target in TARGETS), ("sm_90", "fp16"), ("sm_90", "fp32")]
FLOATS = ("eps", "scale")
# Pointers through which kernels read images and tokens; others are parameters, statistics, parts of sums, outputs.
IMAGES = {"p_x", "p_h", "p_d", "p_dy", "p_dh", "p_dd", "p_q", "p_k"}


def _files() -> list[ModuleType]:
    from snapgen_kernels import _triton

    names = sorted(module.name for module in pkgutil.iter_modules(_triton.__path__))
    return [importlib.import_module(f"snapgen_kernels._triton.{name}") for name in names]


@functools.cache
def _builds(file: ModuleType, dtype: str, nvidia: bool) -> list[Build]:
    return list(file.builds(DTYPES[dtype], nvidia)) if hasattr(file, "builds") else []


def _name(kernel: Any) -> str:
    return kernel.fn.__name__


def _tile(build: Build) -> int:
    """Elements in flight: what decides over registers and shared memory."""
    sizes = [value for name, value in build.constants.items() if name.startswith("BLOCK")]
    return math.prod(sizes) * build.options.get("num_stages", 1)


def _cases() -> Iterator[Any]:
    for file in _files():
        for target, dtype in COMBINATIONS:
            by_kernel: dict[str, list[Build]] = {}
            arch = TARGETS[target].arch
            for build in _builds(file, dtype, target != "gfx942"):
                if build.only not in (0, arch):
                    continue
                by_kernel.setdefault(_name(build.kernel), []).append(build)
            for kernel, builds in by_kernel.items():
                largest, smallest = max(builds, key=_tile), min(builds, key=_tile)
                for index, build in enumerate(builds):
                    main = (target, dtype) == ("sm_90", "bf16")
                    ordinary = build is largest or (main and build is smallest)
                    marks = () if ordinary else pytest.mark.complete
                    short = file.__name__.rpartition(".")[2]
                    name = f"{short}-{kernel}-{index}-{target}-{dtype}"
                    yield pytest.param(target, build, ordinary, id=name, marks=marks)


def _smaller_cases() -> Iterator[Any]:
    """Every kernel with products, which are what takes shared memory; the largest tiles alone in an ordinary run."""
    for file in _files():
        for target, dtype in itertools.product(SMALLER, ("bf16", "fp32")):
            listed = [build for build in _builds(file, dtype, True) if build.products and build.only == 0]
            builds = [build for build in listed if build.shared <= SMALLER[target].shared]
            largest = {_name(build.kernel): build for build in sorted(builds, key=_tile)}
            for index, build in enumerate(builds):
                ordinary = (target, dtype) == ("sm_89", "bf16") and build is largest[_name(build.kernel)]
                short = file.__name__.rpartition(".")[2]
                name = f"{short}-{_name(build.kernel)}-{index}-{target}-{dtype}"
                yield pytest.param(target, build, id=name, marks=() if ordinary else pytest.mark.complete)


CASES = [] if MISSING or INTERPRETED else list(_cases())
SMALLER_CASES = [] if MISSING or INTERPRETED else list(_smaller_cases())


def compiled(build: Build, target: Target) -> Any:
    """The build as its launcher would have it compiled: pointers and the named sizes divisible by 16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    parameters = build.kernel.params
    names = [parameter.name for parameter in parameters]
    for listed in (build.constants, build.divisible):
        assert set(listed) <= set(names), f"{set(listed) - set(names)}: no arguments of {_name(build.kernel)}"
    open_ends = {p.name for p in parameters if p.is_constexpr} - set(build.constants)
    assert not open_ends, f"{open_ends}: constants without a value"
    signature, attributes = {}, {}
    for index, name in enumerate(names):
        if name in build.constants:
            signature[name] = "constexpr"
            continue
        pointer = name.startswith("p_")
        signature[name] = f"*{build.pointers.get(name, 'fp32')}" if pointer else "fp32" if name in FLOATS else "i32"
        if pointer or name in build.divisible:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=build.kernel, signature=signature, constexprs=dict(build.constants), attrs=attributes)
    return triton.compile(source, target=GPUTarget(*target[:3]), options=dict(build.options))


def _dump(cubin: Path, flag: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, flag, cubin], check=True, capture_output=True, text=True).stdout


def _nvidia(asm: dict[str, Any], folder: Path, disassemble: bool) -> str:
    """The disassembly, or PTX, once registers are known to suffice."""
    path = folder / "kernel.cubin"
    path.write_bytes(asm["cubin"])
    usage = _dump(path, "--dump-resource-usage")
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    assert int(found[1]) <= 255 and int(found[2]) == 0, f"{found[1]} registers, {found[2]} bytes of stack"
    code = _dump(path, "-sass") if disassemble else asm["ptx"]
    assert not re.search(r"\b(LDL|STL)\b", code), "spills"
    atomics = re.search(ATOMICS, code)
    assert atomics is None, f"atomics: {atomics[0]}"
    return code


def _amd(code: str) -> str:
    spilled = re.findall(r"\.[sv]gpr_spill_count: +(\d+)", code)
    assert spilled and not any(map(int, spilled)), f"spills: {spilled}"
    assert not re.search(r"\b(global|buffer|flat)_atomic", code), "atomics on global memory"
    return code


@pytest.mark.parametrize(("target", "build", "disassemble"), CASES)
def test_machine_code(target: str, build: Build, disassemble: bool, tmp_path: Path) -> None:
    goal = TARGETS[target]
    found = compiled(build, goal)
    assert found.metadata.shared <= goal.shared, f"{found.metadata.shared} bytes of shared memory"
    nvidia = goal.backend == "cuda"
    code = _nvidia(found.asm, tmp_path, disassemble) if nvidia else _amd(found.asm["amdgcn"])
    if build.products:
        assert re.search(_tensor_core(build, goal), code), "products do not run on tensor cores"
    if nvidia and build.vector > 4 and build.divisible and IMAGES & set(build.kernel.arg_names) - set(build.constants):
        assert re.search(LOADS[build.vector], code), f"no {build.vector}-byte loads"


@pytest.mark.parametrize(("target", "build"), SMALLER_CASES)
def test_shared_memory_of_smaller_gpus(target: str, build: Build) -> None:
    """Of what they launch; a few registers that spill there would cost time alone."""
    goal = SMALLER[target]
    found = compiled(build, goal)
    assert found.metadata.shared <= goal.shared, f"{found.metadata.shared} bytes of shared memory"


def _tensor_core(build: Build, goal: Target) -> str:
    rows = next((build.constants[name] for name in ("BLOCK_M", "BLOCK_O") if name in build.constants), 64)
    small = rows < 64 or build.options.get("num_warps", 4) < 4
    # Which of a tile's sides are rows of the product differs between kernels: a small side may be the columns.
    return f"{SMALL_PRODUCT}|{goal.tensor_core}" if small and goal.backend == "cuda" else goal.tensor_core


@pytest.mark.skipif(INTERPRETED, reason="jit functions are of another class")
def test_every_kernel_is_listed() -> None:
    """A jit function is a kernel if its name says so; the others are device functions."""
    import triton

    for file in _files():
        own = {
            name
            for name, value in vars(file).items()
            if isinstance(value, triton.runtime.JITFunction) and value.fn.__module__ == file.__name__
        }
        for nvidia in (True, False):
            for dtype in DTYPES:
                listed = {_name(build.kernel) for build in _builds(file, dtype, nvidia)}
                assert listed == {name for name in own if name.endswith("_kernel")}, f"{file.__name__}, {dtype}"
