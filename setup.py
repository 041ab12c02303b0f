"""Builds the optional C++ extension ``snapgen_kernels._C``.

``SNAPGEN_BUILD_CPP=0`` leaves it out: the package then runs on the PyTorch references.

The extension uses only PyTorch's stable ABI and Python's limited API, so that one build serves every PyTorch from 2.11
on and every Python from 3.10 on. Nothing here looks at the machine: the instruction set is chosen when the extension
loads.
"""

import os
from glob import glob

from setuptools import setup

SOURCES = [
    "csrc/module.cpp",
    "csrc/isa_portable.cpp",
    "csrc/isa_avx2.cpp",
    "csrc/isa_avx512.cpp",
    "csrc/isa_avx512bf16.cpp",
    "csrc/isa_amx.cpp",
    "csrc/pack.cpp",
    "csrc/group_norm_silu.cpp",
    "csrc/qk_norm_rope.cpp",
]
HEADERS = sorted(glob("csrc/*.h"))
# PyTorch 2.11, the oldest release that the package supports.
TORCH_TARGET_VERSION = "0x020b000000000000"


def cpp_extension() -> dict:
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    # The kernels are written in the vector extension of GCC and Clang. Vectors never cross a call, so -Wpsabi has no
    # say.
    flags = ["-O3", "-std=c++17", "-fvisibility=hidden", "-ffp-contract=fast", "-Wno-psabi"]
    extension = CppExtension(
        "snapgen_kernels._C",
        SOURCES,
        depends=HEADERS,
        define_macros=[("Py_LIMITED_API", "0x030A0000"), ("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION)],
        extra_compile_args=flags,
        py_limited_api=True,
    )
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": BuildExtension.with_options(use_ninja=False)},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


switch = os.environ.get("SNAPGEN_BUILD_CPP", "1")
if switch not in ("0", "1"):
    raise SystemExit(
        f"SNAPGEN_BUILD_CPP is {switch!r}; allowed: 1 (build the C++ extension, the default) or 0 (leave it out)"
    )
setup(**(cpp_extension() if switch == "1" else {}))
