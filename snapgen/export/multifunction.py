"""Several shapes of one part in one package: a function for each, which share the weights (iOS18)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from snapgen.export.convert import stamp
from snapgen.export.options import Options
from snapgen.export.parts import Part
from snapgen.export.tools import coremltools, quiet


def functions(pipe: Any, name: str, options: Options) -> dict[str, Options]:
    """The functions of the package of part `name`, and for each the options of an export of that function alone.

    One shape is the function "main"; several are "batch_1", "size_1024x768" or "batch_1_size_1024x768", by what
    differs. The first is the default. The denoiser has one for each batch and size, the decoder one for each size.

    Raises:
        ValueError: a height, width or size is no multiple of `pipe.unit` pixels.
    """
    if name == "text_encoder":
        return {"main": options}
    default = pipe.denoiser.config.sample_size * pipe.decoder.upscale
    sizes = []
    for size in options.sizes:
        height, width = map(int, size.split("x"))
        if height % pipe.unit or width % pipe.unit:
            raise ValueError(f"sizes: got {size}; both must be multiples of {pipe.unit} pixels")
        sizes.append((height, width))
    for side in ("height", "width"):
        value = getattr(options, side)
        if value is not None and value % pipe.unit:
            raise ValueError(f"{side}: got {value} pixels; must be a multiple of {pipe.unit}")
    sizes = sizes or [(options.height or default, options.width or default)]
    batches = (options.batches or (options.batch,)) if name == "denoiser" else (options.batch,)
    found = {}
    for batch in batches:
        for height, width in sizes:
            differs = [f"batch_{batch}"] * (len(batches) > 1) + [f"size_{height}x{width}"] * (len(sizes) > 1)
            found["_".join(differs) or "main"] = replace(
                options, batch=batch, height=height, width=width, sizes=(), batches=()
            )
    return found


def latent_size(pipe: Any, options: Options) -> tuple[int, int]:
    """Height and width of the latents, of options of one function."""
    default, upscale = pipe.denoiser.config.sample_size, pipe.decoder.upscale
    return (
        default if options.height is None else options.height // upscale,
        default if options.width is None else options.width // upscale,
    )


def join(packages: Mapping[str, Path], part: Part, package: Path) -> None:
    """Write packages of one function each as the functions of one package, in which equal weights stand once.

    Args:
        packages: function name -> its package, whose function is "main"; the first is the default.
        part: any of the parts that they were converted from; they have the same names of inputs and outputs.
        package: must not exist; its name must end in .mlpackage.
    """
    tools = coremltools("models.utils")
    descriptor = tools.MultiFunctionDescriptor()
    for name, source in packages.items():
        descriptor.add_function(str(source), "main", name)
    descriptor.default_function_name = next(iter(packages))
    with quiet():
        tools.save_multifunction(descriptor, str(package))
    stamp(part, package)
