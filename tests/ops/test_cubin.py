"""Every Triton kernel and every config compiles to machine code for NVIDIA sm_80, sm_90, sm_100 and AMD gfx942, without
a GPU, and no NVIDIA build spills registers. Runs in a process without TRITON_INTERPRET, which this one must not have
set."""

import importlib.util
import inspect
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

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
KERNELS = (
    "moments_kernel",
    "apply_kernel",
    "sums_kernel",
    "gradient_kernel",
    "merge_moments_kernel",
    "merge_sums_kernel",
    "parameters_kernel",
)
# Activations, parameters.
BUILDS = [(target, ("bf16", "fp32")) for target in TARGETS] + [("sm_90", ("fp32", "fp32"))]


def _compile(name: str, target: str, constants: dict[str, int], dtypes: tuple[str, str]) -> Any:
    """One kernel as the launcher would have it compiled: pointers aligned to 16 bytes, the unit stride known."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from snapgen_kernels._triton import group_norm_silu as kernels

    function = getattr(kernels, name)
    pointers = kernels.COMPILE[name]
    constants = dict(constants)
    options = {"num_warps": constants.pop("num_warps")}
    parameters = list(inspect.signature(function.fn).parameters)
    if "s_c" in parameters:
        contiguous = constants["BLOCK_P"] == 512
        constants["s_p" if contiguous else "s_c"] = 1
    signature, aligned = {}, {}
    for index, parameter in enumerate(parameters):
        if parameter in constants:
            signature[parameter] = "constexpr"
        elif parameter.startswith("p_"):
            kind = {"x": dtypes[0], "w": dtypes[1], None: "fp32"}[pointers.get(parameter)]
            signature[parameter] = f"*{kind}"
            aligned[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter] = "fp32" if parameter == "eps" else "i32"
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)


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


@pytest.mark.parametrize(("target", "dtypes"), BUILDS, ids=lambda value: value if isinstance(value, str) else value[0])
@pytest.mark.parametrize("name", KERNELS)
def test_compiles_without_spills(name: str, target: str, dtypes: tuple[str, str], tmp_path: Path) -> None:
    from snapgen_kernels._triton import group_norm_silu as kernels

    for constants in kernels.compile_constants(name):
        compiled = _compile(name, target, constants, dtypes)
        if target == "gfx942":
            assert compiled.asm["hsaco"], constants
            continue
        registers, stack, sass = _resources(compiled.asm["cubin"], tmp_path, target == "sm_90")
        assert registers <= 255 and stack == 0, f"{name} {constants}: {registers} registers, {stack} bytes of stack"
        assert not re.search(r"\b(LDL|STL)\b", sass), f"{name} {constants}: spills"
        assert not re.search(r"\b(RED|ATOM|ATOMG)\b", sass), f"{name} {constants}: atomics"


def test_every_kernel_is_listed() -> None:
    import triton

    from snapgen_kernels._triton import group_norm_silu as kernels

    found = {name for name, value in vars(kernels).items() if isinstance(value, triton.runtime.JITFunction)}
    assert found == set(KERNELS) == set(kernels.COMPILE)
