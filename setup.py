"""Builds the optional C++ extension ``snapgen_kernels._C``.

``SNAPGEN_BUILD_CPP=0`` leaves it out: the package then runs on the PyTorch references. ``SNAPGEN_SANITIZE=1`` builds it
with AddressSanitizer and UndefinedBehaviorSanitizer (`make sanitize` does, and runs the tests of the ops).

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
    "csrc/geglu.cpp",
    "csrc/pack.cpp",
    "csrc/sepconv.cpp",
    "csrc/sepconv_backward.cpp",
    "csrc/group_norm_silu.cpp",
    "csrc/qk_norm_rope.cpp",
    "csrc/attention.cpp",
    "csrc/decoder_block.cpp",
]
HEADERS = sorted(glob("csrc/*.h"))
# PyTorch 2.11, the oldest release that the package supports.
TORCH_TARGET_VERSION = "0x020b000000000000"


def switch(name: str, default: str) -> bool:
    value = os.environ.get(name, default)
    if value not in ("0", "1"):
        raise SystemExit(f"{name} is {value!r}; allowed: 1 (on) or 0 (off); default: {default}")
    return value == "1"


def cpp_extension() -> dict:
    from torch.utils.cpp_extension import BuildExtension, CppExtension, is_ninja_available

    # The kernels are written in the vector extension of GCC and Clang. Vectors never cross a call, so -Wpsabi has no
    # say.
    flags = ["-O3", "-std=c++17", "-fvisibility=hidden", "-ffp-contract=fast", "-Wno-psabi"]
    links = []
    if switch("SNAPGEN_SANITIZE", "0"):
        # Loads and stores of vectors are unaligned by design, and go through memcpy.
        links = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
        flags += [*links, "-O1", "-g", "-fno-omit-frame-pointer", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]
    extension = CppExtension(
        "snapgen_kernels._C",
        SOURCES,
        depends=HEADERS,
        define_macros=[("Py_LIMITED_API", "0x030A0000"), ("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION)],
        extra_compile_args=flags,
        extra_link_args=links,
        py_limited_api=True,
    )
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": BuildExtension.with_options(use_ninja=is_ninja_available())},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(**(cpp_extension() if switch("SNAPGEN_BUILD_CPP", "1") else {}))
