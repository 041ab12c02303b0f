"""The process that runs one Core AI asset for `snapgen.export.coreai_run`: numpy and Core AI alone, neither PyTorch nor
this package.

Arguments: the asset, and a folder. Writes one line of JSON with the inputs and outputs; then, for every line that it
reads, runs the function on the folder's inputs.safetensors, leaves outputs.safetensors, and writes the line back.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path

from coreai.authoring import AIModelAsset
from coreai.runtime import NDArray
from safetensors.numpy import load_file, save_file


async def run(asset: str, folder: Path) -> None:
    # The runtime may print; what is said to the parent goes past it.
    with os.fdopen(os.dup(1), "w", buffering=1) as replies:
        os.dup2(2, 1)
        async with AIModelAsset.load(asset).executable() as model:
            function = model.load_function("main")
            about = function.desc
            inputs = {name: about.input_descriptor(name) for name in about.input_names}
            borders = {name: [list(found.shape), found.dtype] for name, found in inputs.items()}
            print(json.dumps({"inputs": borders, "outputs": about.output_names}), file=replies)
            for line in sys.stdin:
                given = {name: NDArray(array) for name, array in load_file(folder / "inputs.safetensors").items()}
                outputs = await function(given)
                save_file({name: value.numpy() for name, value in outputs.items()}, folder / "outputs.safetensors")
                print(line, end="", file=replies)


if __name__ == "__main__":
    asyncio.run(run(sys.argv[1], Path(sys.argv[2])))
