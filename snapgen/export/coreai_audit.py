"""What in a Core AI program the Neural Engine does not take, by the rules that Apple gives to authors of models.

The rules are those of apple/coreai-models (skills/model-authoring/references/neural_engine_rules.md) that can be read
off a program: tensors of rank 5 at most, fp16 throughout, no gather, no operation that goes through fp32 inside, and
for multi-query attention no copies of K and V. Whether a device then runs an operation on its engine is for the device
to say.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

RANK = 5
GATHERS = ("coreai.gather", "coreai.scatter")
COPIES = ("coreai.tile", "coreai.broadcast_to", "coreai.broadcast_in_dims")
# Lowered through fp32 (silu), or to be written with sigmoid (tanh).
NAMED = {"coreai.silu": "silu", "coreai.tanh": "tanh"}


@dataclass(frozen=True)
class Violation:
    """One thing that breaks a rule.

    Attributes:
        kind: "rank", "float32" (a value or an operation in fp32), "cast" (between fp16 and fp32), "silu", "tanh",
            "gather" or "tile".
        operation: its type, without the dialect.
        about: the types that it takes and makes.
    """

    kind: str
    operation: str
    about: str


def violations(program: Any) -> list[Violation]:
    """What breaks a rule in a `coreai.authoring.AIProgram`, in the order of the program.

    Operations on whole numbers (shapes and axes) do not count; nor does a copy of a constant, which is made before the
    program runs.
    """
    return list(_found(program))


def operations(program: Any) -> dict[str, int]:
    """How many operations of each type the program has, constants left out, most frequent first."""
    counts = Counter(_short(op) for op in walk(program))
    del counts["output"], counts["constant"]
    return dict(counts.most_common())


def walk(program: Any) -> Iterator[Any]:
    """The operations of the function "main" and of the graphs that it calls, each graph once."""
    waiting, seen = ["main"], {"main"}
    while waiting:
        for block in program.get_graph(waiting.pop()).bodyRegion.blocks:
            for op in _inside(block):
                if op.name == "coreai.invoke":
                    callee = str(op.attributes["callee"]).lstrip("@").strip('"')
                    if callee not in seen:
                        seen.add(callee)
                        waiting.append(callee)
                yield op


def _inside(block: Any) -> Iterator[Any]:
    for op in block.operations:
        yield op
        for region in op.operation.regions:
            for inner in region.blocks:
                yield from _inside(inner)


def _found(program: Any) -> Iterator[Violation]:
    for op in walk(program):
        takes = [_shape_and_kind(value.type) for value in op.operands]
        makes = [_shape_and_kind(value.type) for value in op.results]
        kinds = {kind for _, kind in takes + makes}
        about = f"{_types(takes)} -> {_types(makes)}"

        def broken(kind: str, op: Any = op, about: str = about) -> Violation:
            return Violation(kind, _short(op), about)

        if any(len(shape) > RANK for shape, _ in takes + makes):
            yield broken("rank")
        if op.name == "coreai.cast" and {"f16", "f32"} <= kinds:
            yield broken("cast")
        elif "f32" in kinds and op.name != "coreai.output":
            yield broken("float32")
        if op.name in NAMED:
            yield broken(NAMED[op.name])
        if op.name.startswith(GATHERS):
            yield broken("gather")
        if op.name in COPIES and takes[0][1].startswith("f") and not _is_constant(op.operands[0]):
            yield broken("tile")


def _is_constant(value: Any) -> bool:
    owner = value.owner
    return getattr(owner, "name", None) == "coreai.constant"


def _short(op: Any) -> str:
    return str(op.name).rsplit(".", 1)[-1]


def _shape_and_kind(kind: Any) -> tuple[tuple[int, ...], str]:
    """Shape and element type of a tensor type; () and the type's name for any other."""
    if not hasattr(kind, "element_type"):
        return (), str(kind)
    return tuple(kind.shape), str(kind.element_type)


def _types(found: list[tuple[tuple[int, ...], str]]) -> str:
    return ", ".join("x".join(map(str, (*shape, kind))) for shape, kind in found)
