"""Which variable of a package's program holds the output of which layer of the model, kept in the package's metadata.

Core ML hands user-defined metadata on unread, and coremltools keeps it through compression, as it keeps variables'
names. `snapgen.export.divergence` reads it.
"""

from __future__ import annotations

import json
from typing import Any

import torch

KEY = "snapgen.layers"


def nodes(program: Any, outputs: tuple[str, ...]) -> dict[str, list[str]]:
    """The layers of a torch.export program, in order, and what the value that each returns (the last one inside it) may
    be called in the package, the likeliest first.

    A layer that is called more than once is left out. coremltools names variables after nodes, with a suffix where it
    made them fp16, and results after `outputs`.
    """
    last: dict[str, Any] = {}
    repeated = set()
    for node in program.graph.nodes:
        for key, (path, _) in (node.meta.get("nn_module_stack") or {}).items():
            if "@" in key:
                repeated.add(path)
            last.pop(path, None)  # so that layers come in the order in which they end
            last[path] = node
    results = dict(zip(program.graph.output_node().args[0], outputs, strict=True))
    found = {}
    for path, node in last.items():
        if path and path not in repeated:
            # A result is named as such, and so is what is cast to become one, also where layers go on with it.
            found[path] = [*_results(node, results), f"{node.name}_cast_fp16", node.name]
    return found


def _results(node: Any, results: dict[Any, str]) -> list[str]:
    """Names of the results that are the value of a node, cast or not."""
    own = [results[node]] if node in results else []
    casts = [user for user in node.users if user.target is torch.ops.aten._to_copy.default]
    return own + [name for cast in casts for name in _results(cast, results)]


def stamp(spec: Any, layers: dict[str, list[str]]) -> None:
    """Write into a model description where its layers' outputs are, but for those that the compiler merged away."""
    made = {
        output.name
        for function in spec.mlProgram.functions.values()
        for op in function.block_specializations[function.opset].operations
        for output in op.outputs
    }
    found = {}
    for path, candidates in layers.items():
        for name in candidates:
            if name in made:
                found[path] = name
                break
    spec.description.metadata.userDefined[KEY] = json.dumps(found, separators=(",", ":"))


def read(spec: Any) -> dict[str, str]:
    """Layers and variables as `stamp` wrote them; {} where it did not."""
    return dict(json.loads(spec.description.metadata.userDefined.get(KEY, "{}")))
