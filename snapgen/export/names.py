"""Which variable of a package's program holds the output of which layer of the model, kept in the package's metadata.

Core ML hands user-defined metadata on unread, and coremltools keeps it through compression, as it keeps variables'
names. `snapgen.export.divergence` reads it.
"""

from __future__ import annotations

import json
from typing import Any

import torch

KEY = "snapgen.layers"


def nodes(program: Any, outputs: tuple[str, ...]) -> dict[str, str]:
    """The layers of a torch.export program, in order, and the node that each returns: the last one inside it.

    A layer that is called more than once is left out. coremltools names variables after nodes, and results after
    `outputs`.
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
            returned = node
            # A result is named as such, and so is what is only cast to become one. Assertions use nothing further.
            while returned not in results:
                users = [user for user in returned.users if user.users]
                if len(users) != 1 or users[0].target is not torch.ops.aten._to_copy.default:
                    break
                returned = users[0]
            found[path] = results.get(returned, node.name)
    return found


def stamp(spec: Any, layers: dict[str, str]) -> None:
    """Write into a model description where its layers' outputs are, but for those that the compiler merged away."""
    made = {
        output.name
        for function in spec.mlProgram.functions.values()
        for op in function.block_specializations[function.opset].operations
        for output in op.outputs
    }
    found = {}
    for path, node in layers.items():
        for name in (f"{node}_cast_fp16", node):
            if name in made:
                found[path] = name
                break
    spec.description.metadata.userDefined[KEY] = json.dumps(found, separators=(",", ":"))


def read(spec: Any) -> dict[str, str]:
    """Layers and variables as `stamp` wrote them; {} where it did not."""
    return dict(json.loads(spec.description.metadata.userDefined.get(KEY, "{}")))
