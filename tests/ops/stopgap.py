"""Lists group_norm_silu's launches until its file does so itself."""

from types import ModuleType
from typing import Any


def add_builds(kernels: ModuleType) -> None:
    from snapgen_kernels._triton.common import Build

    def builds(dtype: Any, nvidia: bool) -> list[Build]:
        short = {"torch.bfloat16": "bf16", "torch.float16": "fp16", "torch.float32": "fp32"}[str(dtype)]
        found = []
        for name, pointers in kernels.COMPILE.items():
            kernel = getattr(kernels, name)
            for constants in kernels.compile_constants(name):
                constants = dict(constants)
                options = {"num_warps": constants.pop("num_warps")}
                sizes: tuple[str, ...] = ()
                if "s_c" in kernel.arg_names:
                    contiguous = constants["BLOCK_P"] == 512
                    constants["s_p" if contiguous else "s_c"] = 1
                    sizes = ("C", "P", "s_b", "s_c" if contiguous else "s_p")
                kinds = {p: short if kind == "x" else "fp32" for p, kind in pointers.items()}
                found.append(Build(kernel, constants, kinds, options, sizes))
        return found

    kernels.builds = builds
