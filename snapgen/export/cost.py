"""What the operations of a program cost on the Neural Engine: FLOPs, fused steps, memory traffic, switches of unit.

The model, in full:
- FLOPs: two per multiply-add of convolutions and products; four per element of a softmax, five of a norm, one per
  element read by a reduction, one per element made by another elementwise operation; none for moving data.
- An elementwise operation is fused with what makes its input, where nothing else reads that and it has as many
  elements. Such a run is one step: tensors inside it are never written. Where only reductions and elementwise
  operations read what an elementwise step makes, they compute it again instead. Reshapes, slices, splits are views.
- A tensor stays on the chip where every step that touches it has none above 2 MB; it crosses the memory bus at every
  step that touches it otherwise. Inputs, outputs and weights (as stored) always cross.
- What falls back is not timed: nobody publishes the rates. Each run of operations on the engine is one dispatch.

That compilers fuse so is an assumption. Three others were tried against published latencies (no recomputing; all
tensors of a step together within 2 MB; both), and did worse: docs/auditor.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from snapgen.export.graph import Graph, Operation, Value
from snapgen.export.rule_checks import ON_CHIP, words
from snapgen.export.rules import FALLBACK

PRODUCTS = ("conv", "conv_transpose", "linear", "matmul", "einsum", "scaled_dot_product_attention")
_VIEWS = words(
    "reshape reshape_like expand_dims squeeze flatten2d identity split slice_by_index slice_by_size read_state"
)
_MOVES = words(
    "transpose concat stack pad tile reverse pixel_shuffle pixel_unshuffle depth_to_space space_to_depth "
    "space_to_batch batch_to_space gather gather_along_axis gather_nd scatter scatter_along_axis scatter_nd crop "
    "slice_update upsample_nearest_neighbor resize_nearest_neighbor fill fill_like coreml_update_state write_state"
)
_NORMS = words("batch_norm layer_norm instance_norm l2_norm local_response_norm")
_POINTWISE = words(
    "abs add sub mul real_div floor_div pow square sqrt rsqrt inverse maximum minimum equal not_equal greater "
    "greater_equal less less_equal logical_not select relu relu6 leaky_relu prelu clamped_relu thresholded_relu "
    "threshold clip elu sigmoid sigmoid_hard tanh scaled_tanh gelu silu softplus softplus_parametric softsign erf exp "
    "exp2 log sign ceil floor round cast batch_norm"
)


@dataclass
class Step:
    """Operations that are fused: one pass over their data.

    Attributes:
        read, written: tensor -> bytes of activations. weights: bytes as stored. moved: bytes that cross the memory bus.
        on_engine: False where it falls back.
    """

    operations: list[Operation] = field(default_factory=list)
    flops: int = 0
    read: dict[str, int] = field(default_factory=dict)
    written: dict[str, int] = field(default_factory=dict)
    weights: int = 0
    moved: int = 0
    on_engine: bool = True

    @property
    def largest(self) -> int:
        """Bytes of the largest tensor that it reads or writes."""
        return max((*self.read.values(), *self.written.values()), default=0)


def flops(op: Operation) -> int:
    """FLOPs of an operation, as the head of this file counts them; open extents count as 1."""
    made = sum(value.elements for value in op.outputs)
    read = op.read[0].elements if op.read else 0
    kind = op.type
    if kind in PRODUCTS:
        return 2 * _multiply_adds(op)
    if kind in _VIEWS or kind in _MOVES or kind == "cast" or op.inside:
        return 0
    if kind == "softmax":
        return 4 * made
    if kind in _NORMS:
        return (2 if kind == "batch_norm" else 5) * made
    if kind.startswith("reduce_"):
        return read
    if kind.endswith("_pool"):
        return made * math.prod(op.settings("kernel_sizes"))
    return made


def _multiply_adds(op: Operation) -> int:
    made = sum(value.elements for value in op.outputs)
    if op.type in ("conv", "linear"):
        return made * math.prod(_sizes(op, "weight")[1:])
    if op.type == "conv_transpose":
        return op.read[0].elements * math.prod(_sizes(op, "weight")[1:]) if op.read else 0
    if op.type == "matmul":
        x = _sizes(op, "x")
        return made * (x[-2 if op.setting("transpose_x", False) and len(x) > 1 else -1] if x else 0)
    if op.type == "einsum":
        equation = str(op.setting("equation", "")).replace(" ", "")
        given = [_extents(it.shape) for it in op.inputs.get("values", ())]
        given += [_extents(it.value.shape) for it in op.constants.get("values", ())]
        operands, _, result = equation.partition("->")
        letters = operands.replace(",", "")
        extents = [extent for shape in given for extent in shape]
        if len(letters) != len(extents):
            return 0
        summed = {letter: extent for letter, extent in zip(letters, extents, strict=True) if letter not in result}
        return made * math.prod(summed.values())
    q, k, v = (_sizes(op, name) for name in ("query", "key", "value"))
    return math.prod(q[:-1]) * k[-2] * (q[-1] + v[-1]) if q and len(k) > 1 and v else 0


def _sizes(op: Operation, name: str) -> tuple[int, ...]:
    if name in op.inputs:
        return _extents(op.inputs[name][0].shape)
    return _extents(op.constants[name][0].value.shape) if name in op.constants else ()


def _extents(shape: Sequence[int | None]) -> tuple[int, ...]:
    return tuple(1 if extent is None else extent for extent in shape)


def steps_of(graph: Graph, verdicts: Mapping[int, str]) -> tuple[list[Step], dict[int, int]]:
    """The steps in order, and of every operation that is no view the number of its step."""
    root: dict[str, str] = {}  # view -> the tensor that it shows

    def shown(value: Value) -> str:
        return root.get(value.name, value.name)

    for op in graph.operations:
        if op.type in _VIEWS and op.read:
            root.update({output.name: shown(op.read[0]) for output in op.outputs})
    readers: dict[str, set[int]] = {}
    for op in graph.operations:
        if op.type not in _VIEWS:
            for value in op.read:
                readers.setdefault(shown(value), set()).add(op.index)
    kept = {shown(value) for value in graph.outputs}
    elements = {value.name: value.elements for op in graph.operations for value in op.outputs}
    steps: list[Step] = []
    step_of: dict[int, int] = {}
    made_in: dict[str, int] = {}  # tensor -> number of its step
    for op in graph.operations:
        if op.type in _VIEWS and op.read:
            continue
        on_engine = verdicts[op.index] != FALLBACK
        number = len(steps)
        for value in op.read if op.type in _POINTWISE else ():
            source = shown(value)
            if (
                source in made_in
                and source not in kept
                and readers[source] == {op.index}
                and elements[source] == value.elements == op.outputs[0].elements
                and steps[made_in[source]].on_engine == on_engine
            ):
                number = made_in[source]
                break
        if number == len(steps):
            steps.append(Step(on_engine=on_engine))
        step = steps[number]
        step.operations.append(op)
        step.flops += flops(op)
        step_of[op.index] = number
        made_in.update({output.name: number for output in op.outputs})
    _traffic(graph, steps, step_of, shown, readers, kept)
    return steps, step_of


def _recompute(steps: list[Step], step_of: Mapping[int, int], readers: Mapping[str, set[int]], kept: set[str]) -> None:
    """Let reductions and elementwise steps read the sources of elementwise steps, which are then never written."""
    made_in = {name: number for number, step in enumerate(steps) for name in step.written}
    types = [{op.type for op in step.operations} for step in steps]
    cheap = [kinds <= _POINTWISE - {"cast"} for kinds in types]
    takes = [kinds <= _POINTWISE or any(kind.startswith("reduce_") for kind in kinds) for kinds in types]
    free = [
        cheap[number]
        and step.on_engine
        and not kept & step.written.keys()
        and all(
            takes[step_of[reader]] and steps[step_of[reader]].on_engine
            for name in step.written
            for reader in readers.get(name, ())
        )
        for number, step in enumerate(steps)
    ]
    for number, step in enumerate(steps):
        for name in list(step.read):
            maker = made_in.get(name)
            if maker is not None and free[maker] and maker < number:
                del step.read[name]
                step.read.update(steps[maker].read)
    for number, step in enumerate(steps):
        if free[number]:
            step.written = {}
            step.read = {}


def _traffic(
    graph: Graph,
    steps: list[Step],
    step_of: Mapping[int, int],
    shown: Callable[[Value], str],
    readers: Mapping[str, set[int]],
    kept: set[str],
) -> None:
    """Fill in what each step reads, writes and moves."""
    touched: dict[str, set[int]] = {}
    for number, step in enumerate(steps):
        pieces: dict[str, dict[str, int]] = {}
        weights: dict[str, int] = {}
        inner = {output.name for op in step.operations for output in op.outputs}
        for op in step.operations:
            for value in op.read:
                if shown(value) not in inner:
                    pieces.setdefault(shown(value), {})[value.name] = value.bytes
            for given in op.constants.values():
                for place, constant in enumerate(given):
                    weights[constant.value.name or f"{op.index} {place}"] = constant.stored
            for output in op.outputs:
                outside = {step_of[reader] for reader in readers.get(output.name, ())} - {number}
                if outside or output.name in kept:
                    step.written[output.name] = output.bytes
        step.read = {source: sum(parts.values()) for source, parts in pieces.items()}
        step.weights = sum(weights.values())
    _recompute(steps, step_of, readers, kept)
    for number, step in enumerate(steps):
        for name in (*step.read, *step.written):
            touched.setdefault(name, set()).add(number)
    borders = {value.name for value in graph.inputs} | kept
    fits = [step.largest <= ON_CHIP for step in steps]
    for step in steps:
        step.moved = step.weights + sum(
            size
            for side in (step.read, step.written)
            for name, size in side.items()
            if name in borders
            or not all(fits[number] and steps[number].on_engine == step.on_engine for number in touched[name])
        )


def segments_of(graph: Graph, verdicts: Mapping[int, str]) -> tuple[int, int]:
    """The fewest runs of operations on the engine, and of switches of compute unit, that the program allows.

    Operations are put in an order in which the unit changes only where nothing more is ready on it, which is as Core ML
    would like it, not as the file has it. Both units are tried for the beginning.
    """
    waits = {
        op.index: {maker.index for value in op.read if (maker := graph.made_by(value)) is not None}
        for op in graph.operations
    }
    after: dict[int, list[int]] = {}
    for index, earlier in waits.items():
        for before in earlier:
            after.setdefault(before, []).append(index)
    best: list[bool] | None = None
    for begin in (True, False):
        left = {index: len(earlier) for index, earlier in waits.items()}
        ready: dict[bool, list[int]] = {True: [], False: []}
        for index, count in left.items():
            if not count:
                ready[verdicts[index] != FALLBACK].append(index)
        runs: list[bool] = []
        unit = begin
        while ready[True] or ready[False]:
            if not ready[unit]:
                unit = not unit
            runs.append(unit)
            while ready[unit]:
                for later in after.get(ready[unit].pop(), ()):
                    left[later] -= 1
                    if not left[later]:
                        ready[verdicts[later] != FALLBACK].append(later)
        if best is None or len(runs) < len(best):
            best = runs
    runs = best or []
    return sum(runs), max(0, len(runs) - 1)
