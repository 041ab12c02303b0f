"""Published rules on what Apple's Neural Engine runs, each with its source, applied to the operations of a program.

Apple documents no list ("there is no static documentation", apple/coremltools issue 1780): what is here was published
by people who measured or who write models for the engine, mostly on other chips and systems than the reader's. So a
verdict rests on a rule, the rule on its source, and an operation that no source speaks of is "unknown". What Core ML
decides on a phone, Xcode's performance report or MLComputePlan says there; nothing read off a package elsewhere does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

from snapgen.export.graph import Graph, Operation, Value

ENGINE = "engine"
COST = "engine, at a cost"
FALLBACK = "falls back to CPU/GPU"
UNKNOWN = "unknown (no published rule)"
VERDICTS = (ENGINE, COST, UNKNOWN, FALLBACK)  # from good to bad: an operation's verdict is the worst of its findings

ON_CHIP = (
    2 << 20
)  # bytes that an operation's tensors may take without streaming from DRAM, on the M1 (guide, chapter 9)
BORDER_BYTES = 64  # the last axis at the borders is laid out in blocks of so many bytes (Apple's rules)

_GUIDE = "https://ane-guide.readthedocs.io/en/latest"
SOURCES = {
    "apple-rules": (
        "Apple, coreai-models: neural_engine_rules.md",
        "https://github.com/apple/coreai-models/blob/main/skills/skills/model-authoring/references/"
        "neural_engine_rules.md",
    ),
    "guide-operations": (
        "Apple Neural Engine (arXiv 2606.22283), appendix A: operations by device",
        f"{_GUIDE}/appendices/a-op-device-matrix.html",
    ),
    "guide-surface": (
        "Apple Neural Engine (arXiv 2606.22283), chapter 4: hard limits",
        f"{_GUIDE}/part-1-machine/04-capability-surface.html",
    ),
    "guide-roofline": (
        "Apple Neural Engine (arXiv 2606.22283), chapter 9: roofline",
        f"{_GUIDE}/part-3-performance/09-roofline.html",
    ),
    "guide-design": (
        "Apple Neural Engine (arXiv 2606.22283), chapter 17: model-design rules",
        f"{_GUIDE}/part-5-practice/17-model-design-rules.html",
    ),
    "guide-placement": (
        "Apple Neural Engine (arXiv 2606.22283), chapter 18: placement model",
        f"{_GUIDE}/part-5-practice/18-optimization-cost-model.html",
    ),
    "guide-pitfalls": (
        "Apple Neural Engine (arXiv 2606.22283), chapter 19: pitfalls",
        f"{_GUIDE}/part-5-practice/19-pitfalls-and-limits.html",
    ),
    "aneforge": ("ANEForge, operation catalogue", "https://aneforge.readthedocs.io/en/latest/op-catalog/"),
    "orion": ("Orion (arXiv 2603.06728)", "https://arxiv.org/abs/2603.06728"),
    "hollance": (
        "hollance/neural-engine, unsupported layers",
        "https://github.com/hollance/neural-engine/blob/master/docs/unsupported-layers.md",
    ),
    "coremltools-1780": ("apple/coremltools issue 1780", "https://github.com/apple/coremltools/issues/1780"),
    "coremltools-1909": ("apple/coremltools issue 1909", "https://github.com/apple/coremltools/issues/1909"),
    "coremltools-2367": ("apple/coremltools issue 2367", "https://github.com/apple/coremltools/issues/2367"),
    "coremltools-2821": ("apple/coremltools issue 2821", "https://github.com/apple/coremltools/issues/2821"),
    "rf-detr-1495": ("roboflow/rf-detr pull request 1495", "https://github.com/roboflow/rf-detr/pull/1495"),
    "ultralytics-24885": (
        "ultralytics pull request 24885",
        "https://github.com/ultralytics/ultralytics/pull/24885",
    ),
    "stable-diffusion": ("apple/ml-stable-diffusion, README", "https://github.com/apple/ml-stable-diffusion"),
}


@dataclass(frozen=True)
class Rule:
    """A published rule.

    Attributes:
        says: the rule in a sentence.
        verdict: what it says of an operation that it speaks against.
        about: what is at stake: "placement", "speed", "numbers" (other values than the program's), or "load" (the
            package may not load).
        sources: keys of `SOURCES`.
        check: of an operation, what speaks against it in a few words, or None.
    """

    name: str
    says: str
    verdict: str
    about: str
    sources: tuple[str, ...]
    check: Callable[[Operation, Graph], str | None]


@dataclass(frozen=True)
class Finding:
    """A rule that speaks against an operation, and the words of this case."""

    rule: Rule
    detail: str


def words(listed: str) -> frozenset[str]:
    """The words of a text."""
    return frozenset(listed.split())


# Operations that were compiled and run on an M1 and on later chips, by appendix A of the guide.
NATIVE = words(
    """
    conv conv_transpose linear matmul einsum avg_pool max_pool l2_pool scaled_dot_product_attention
    batch_norm layer_norm instance_norm l2_norm local_response_norm
    abs add sub mul real_div floor_div pow square sqrt rsqrt inverse maximum minimum cumsum
    equal not_equal greater greater_equal less less_equal logical_not select
    relu relu6 leaky_relu prelu clamped_relu thresholded_relu threshold clip elu sigmoid sigmoid_hard tanh scaled_tanh
    gelu silu softmax softplus softplus_parametric softsign erf exp exp2 log sign ceil floor round
    reduce_sum reduce_mean reduce_max reduce_min reduce_sum_square reduce_l1_norm reduce_l2_norm reduce_log_sum
    reduce_log_sum_exp
    reshape reshape_like expand_dims squeeze flatten2d transpose concat split stack pad slice_by_size slice_by_index
    slice_update reverse tile depth_to_space space_to_depth pixel_shuffle pixel_unshuffle space_to_batch batch_to_space
    identity fill fill_like crop cast quantize dequantize read_state write_state coreml_update_state
    resize resize_bilinear resize_nearest_neighbor upsample_bilinear upsample_nearest_neighbor
    crop_resize resample affine sin cos
    """
)
_NO_PATH = words(
    """
    reduce_prod scatter scatter_along_axis scatter_nd mod one_hot non_zero band_part reverse_sequence shape
    sliding_windows logical_and logical_or logical_xor asin acos atan sinh cosh tan asinh acosh atanh
    random_bernoulli random_categorical random_normal non_maximum_suppression range_1d
    """
)
_COMPARISONS = words("equal not_equal greater greater_equal less less_equal logical_not")
_TEXTURE = words(
    "resize resize_bilinear resize_nearest_neighbor upsample_bilinear upsample_nearest_neighbor crop_resize resample "
    "affine"
)
_VIEWS = ("reshape", "expand_dims", "squeeze", "identity", "transpose")
NEAREST = ("upsample_nearest_neighbor", "resize_nearest_neighbor")


def _type_in(types: Iterable[str], words: str) -> Callable[[Operation, Graph], str | None]:
    types = frozenset(types)
    return lambda op, graph: words.format(op.type) if op.type in types else None


def _tensors(op: Operation) -> tuple[Value, ...]:
    return (*op.read, *op.outputs)


def _rank_above_5(op: Operation, graph: Graph) -> str | None:
    worst = max((len(value.shape) for value in _tensors(op)), default=0)
    return f"rank {worst}" if worst > 5 else None


def _scalar(op: Operation, graph: Graph) -> str | None:
    scalars = [value.name for value in _tensors(op) if not value.shape and value.dtype not in ("list", "unknown")]
    return f"{scalars[0]} has rank 0" if scalars else None


def _fp32(op: Operation, graph: Graph) -> str | None:
    if op.type == "cast":
        return None
    wide = [value for value in _tensors(op) if value.dtype in ("float32", "float64", "bfloat16")]
    return f"{wide[0].name} is {wide[0].dtype}" if wide else None


def _integer(op: Operation, graph: Graph) -> str | None:
    kinds = ["int32", "int64", "uint32", "uint64", "string"]
    if op.type not in _COMPARISONS and op.type not in ("select", "cast"):
        kinds.append("bool")
    wrong = [value for value in _tensors(op) if value.dtype in kinds]
    return f"{wrong[0].name} is {wrong[0].dtype}" if wrong else None


def _wide_cast(op: Operation, graph: Graph) -> str | None:
    if op.type != "cast" or {value.dtype for value in _tensors(op)} != {"float16", "float32"}:
        return None
    return f"{op.read[0].dtype} to {op.outputs[0].dtype}"


def _open_shape(op: Operation, graph: Graph) -> str | None:
    return next((f"{value.name} has an extent that is open" for value in _tensors(op) if value.open), None)


def _extent(op: Operation, graph: Graph) -> str | None:
    for value in _tensors(op):
        width, height, channels = (*(extent or 0 for extent in reversed(value.shape[-3:])), 0, 0, 0)[:3]
        for name, extent, most in (("width", width, 16384), ("height", height, 16384), ("channels", channels, 65536)):
            if extent > most:
                return f"{name} {extent} of {value.name}; at most {most}"
    return None


def _kernel(op: Operation) -> tuple[int, ...]:
    weight = op.constants.get("weight")
    if op.type not in ("conv", "conv_transpose") or not weight:
        return ()
    return tuple(extent or 1 for extent in weight[0].value.shape[2:])


def _kernel_width(op: Operation, graph: Graph) -> str | None:
    kernel = _kernel(op)
    return f"kernel width {kernel[-1]}" if kernel and kernel[-1] > 13 else None


def _kernel_height(op: Operation, graph: Graph) -> str | None:
    kernel = _kernel(op)
    return f"kernel height {kernel[-2]}" if len(kernel) > 1 and kernel[-2] > 29 else None


def _conv_3d(op: Operation, graph: Graph) -> str | None:
    return f"{len(_kernel(op))}-D kernel" if len(_kernel(op)) > 2 else None


def _factors(op: Operation, graph: Graph) -> str | None:
    if op.type not in ("conv", "conv_transpose"):
        return None
    for name in ("strides", "dilations"):
        for number in op.settings(name):
            rest = number
            for prime in (2, 3):
                while rest and rest % prime == 0:
                    rest //= prime
            if rest != 1:
                return f"{name} {'x'.join(map(str, op.settings(name)))}"
    return None


def _palettised_stride(op: Operation, graph: Graph) -> str | None:
    weight = op.constants.get("weight")
    if op.type != "conv" or not weight or not weight[0].form.startswith("constexpr_lut"):
        return None
    strides = op.settings("strides")
    return f"stride {'x'.join(map(str, strides))}" if max(strides, default=1) > 2 else None


def _groups(op: Operation, graph: Graph) -> str | None:
    groups = op.setting("groups", 1)
    if op.type != "conv" or groups in (1, 2, 4) or not op.read or len(op.read[0].shape) < 2:
        return None
    depthwise = groups == op.read[0].shape[1]  # exempt: it has a path of its own
    return None if depthwise else f"{groups} groups"


def _moving_kernel(op: Operation, graph: Graph) -> str | None:
    if op.type != "conv" or "weight" not in op.inputs or not op.inputs["x"][0].shape:
        return None
    batch = op.inputs["x"][0].shape[0] or 0
    return f"the kernel is computed and the batch is {batch}" if batch > 1 else None


def _matmul_depth(op: Operation, graph: Graph) -> str | None:
    if op.type not in ("matmul", "linear"):
        return None
    deep = [value for value in _tensors(op) if len(value.shape) >= 5 and (op.type == "linear" or value.shape[-4] != 1)]
    return f"{deep[0].name} has rank {len(deep[0].shape)}" if deep else None


def _linear(op: Operation, graph: Graph) -> str | None:
    return "linear" if op.type == "linear" else None


def _padding(op: Operation, graph: Graph) -> str | None:
    pads = op.settings("pad")
    outer = pads[: max(0, len(pads) - 4)] if op.type == "pad" else ()
    return "pads an axis other than height and width" if any(outer) else None


def _padding_mode(op: Operation, graph: Graph) -> str | None:
    mode = op.setting("mode", "constant")
    return f"mode {mode}" if op.type == "pad" and mode in ("reflect", "symmetric") else None


def _softmax_axis(op: Operation, graph: Graph) -> str | None:
    if op.type != "softmax" or not op.read:
        return None
    x, axis = op.read[0], op.setting("axis", -1)
    rank = len(x.shape)
    if rank < 3 or axis % rank == rank - 3 or x.bytes + op.outputs[0].bytes <= ON_CHIP:
        return None
    return f"over axis {axis % rank} of {'x'.join(map(str, x.shape))}"


def _tile(op: Operation, graph: Graph) -> str | None:
    if op.type != "tile":
        return None
    copies = op.settings("reps")
    into = {reader.type for reader in graph.readers(op)} & {"matmul", "einsum", "scaled_dot_product_attention"}
    odd = [number for number in copies if number not in (1, 2, 3, 4, 8)]
    if into:
        return f"its copies go into {sorted(into)[0]}, which could broadcast"
    return f"{odd[0]} copies; native are 2, 3, 4 and 8" if odd else None


def _attention(op: Operation, graph: Graph) -> str | None:
    if op.type != "scaled_dot_product_attention":
        return None
    return "with a mask" if "attn_mask" in op.inputs or "attn_mask" in op.constants else "without a mask"


def _behind(value: Value, graph: Graph, through: tuple[str, ...]) -> Operation | None:
    """The operation that makes a tensor, seen through operations of the types `through`."""
    op = graph.made_by(value)
    while op is not None and op.type in through and op.read:
        op = graph.made_by(op.read[0])
    return op


def _depthwise_behind_upsampling(op: Operation, graph: Graph) -> str | None:
    if op.type != "conv" or not op.read or len(op.read[0].shape) < 2 or op.setting("groups", 1) == 1:
        return None
    before = _behind(op.read[0], graph, ("identity", "pad"))
    if op.setting("groups") != op.read[0].shape[1] or before is None or before.type not in NEAREST:
        return None
    return f"behind {before.name}"


def _transposed_scores(op: Operation, graph: Graph) -> str | None:
    if op.type != "matmul" or "y" not in op.inputs:
        return None
    y = graph.made_by(op.inputs["y"][0])
    turned = bool(op.setting("transpose_y", False))
    while y is not None and y.type in _VIEWS and y.read:
        turned = turned or y.type == "transpose"
        y = graph.made_by(y.read[0])
    return "the transposed scores are its second factor" if turned and y is not None and y.type == "softmax" else None


def _infinite(op: Operation, graph: Graph) -> str | None:
    found = [name for name, given in op.constants.items() if any(constant.infinite for constant in given)]
    return f"{found[0]} holds -inf or inf" if found else None


def _inflated_epsilon(op: Operation, graph: Graph) -> str | None:
    """eps added to the mean of squares of x / max|x|, where the norm's own eps would be divided by max|x|^2 too."""
    if op.type == "rsqrt" or op.type == "sqrt":
        mean = _behind(op.read[0], graph, ()) if op.read else None
        constant = bool(op.setting("epsilon", 0.0))
        if mean is not None and mean.type == "add":
            constant = "x" in mean.constants or "y" in mean.constants
            mean = graph.made_by(mean.read[0]) if mean.read else None
        if not constant or mean is None or mean.type not in ("reduce_mean", "reduce_sum_square", "reduce_sum"):
            return None
        squares = graph.made_by(mean.read[0]) if mean.read else None
        if squares is not None and squares.type in ("square", "mul", "pow"):
            squares = graph.made_by(squares.read[0])
        if squares is None or squares.type not in ("real_div", "mul") or len(squares.read) < 2:
            return None
        scale = graph.made_by(squares.read[-1])
        while scale is not None and scale.type in ("inverse", "maximum", "add", "clip") and scale.read:
            scale = graph.made_by(scale.read[0])
        if scale is not None and scale.type == "reduce_max":
            largest = graph.made_by(scale.read[0])
            if largest is not None and largest.type == "abs":
                return f"its epsilon is added after the division by {scale.name}"
    return None


def _single_last_axis(op: Operation, graph: Graph) -> str | None:
    for value in op.outputs:
        if value.shape and value.shape[-1] == 1 and value.elements * BORDER_BYTES > ON_CHIP:
            return f"{value.name}: {'x'.join(map(str, value.shape))} takes {value.elements * BORDER_BYTES} bytes"
    return None


def _width_slice(op: Operation, graph: Graph) -> str | None:
    if op.type not in ("slice_by_index", "slice_by_size") or not op.read:
        return None
    begin = op.settings("begin")
    rank = len(op.read[0].shape)
    ignored = op.settings("begin_mask")
    if len(begin) != rank or not begin[-1] or (len(ignored) == rank and ignored[-1]):
        return None
    return f"starts at {begin[-1]} of the last axis"


def _affine_weights(op: Operation, graph: Graph) -> str | None:
    forms = {
        constant.form
        for given in op.constants.values()
        for constant in given
        if constant.form in ("constexpr_affine_dequantize", "constexpr_blockwise_shift_scale")
    }
    return f"weights come from {sorted(forms)[0]}" if forms else None


RULES = (
    Rule(
        "rank-above-5", "Tensors have at most five axes.", FALLBACK, "placement", ("apple-rules", "guide-design"),
        _rank_above_5,
    ),
    Rule(
        "fp32", "The datapath is fp16: what is computed in fp32 falls back.", FALLBACK, "placement",
        ("apple-rules", "guide-surface"), _fp32,
    ),
    Rule(
        "wide-integers", "Integers of 32 bits, and truth values but from a comparison into `select`, have no path.",
        FALLBACK, "placement", ("guide-surface", "aneforge"), _integer,
    ),
    Rule(
        "open-shapes", "Shapes are static: open ones leave the engine, and LayerNorm did under enumerated shapes too.",
        FALLBACK, "placement", ("apple-rules", "coremltools-1909"), _open_shape,
    ),
    Rule(
        "extents", "Width and height reach 16384 (65536 from the A16), channels 65536.", FALLBACK, "placement",
        ("guide-design",), _extent,
    ),
    Rule(
        "kernel-width", "An fp16 convolution's kernel is at most 13 wide on the M1, 16 from the A14.", FALLBACK,
        "placement", ("guide-design", "guide-operations"), _kernel_width,
    ),
    Rule(
        "kernel-height", "A convolution's kernel is at most 29 high on the M1, 32 from the A14.", FALLBACK, "placement",
        ("guide-design", "guide-operations"), _kernel_height,
    ),
    Rule(
        "conv-3d", "Three-dimensional convolution fails to lower on every chip.", FALLBACK, "placement",
        ("guide-surface",), _conv_3d,
    ),
    Rule(
        "moving-kernel", "A convolution whose kernel is computed crashes the compiler above batch 1.", FALLBACK, "load",
        ("guide-pitfalls",), _moving_kernel,
    ),
    Rule(
        "palettised-stride", "Strides above 2 are hardly supported where a convolution's weights are palettised.", COST,
        "placement", ("apple-rules",), _palettised_stride,
    ),
    Rule(
        "matmul-depth", "Products take no depth axis: linear stops below rank 5, matmul at a depth of 1.", FALLBACK,
        "placement", ("guide-design",), _matmul_depth,
    ),
    Rule(
        "no-path", "The operation has no path on any chip from the M1 to the M5.", FALLBACK, "placement",
        ("guide-surface", "guide-operations"), _type_in(_NO_PATH, "{}"),
    ),
    Rule(
        "gather", "Gathers are never placed on the engine by Core ML's cost model; the M1 runs them in a narrow case.",
        FALLBACK, "placement", ("guide-placement", "hollance", "rf-detr-1495"),
        _type_in(("gather", "gather_along_axis", "gather_nd"), "{}"),
    ),
    Rule(
        "arg-reductions", "argmax and argmin are never placed on the engine by Core ML's cost model.", FALLBACK,
        "placement", ("guide-placement",), _type_in(("reduce_argmax", "reduce_argmin"), "{}"),
    ),
    Rule(
        "sorting", "Sorts and top-k leave the engine.", FALLBACK, "placement", ("rf-detr-1495", "guide-surface"),
        _type_in(("topk", "argsort", "sort"), "{}"),
    ),
    Rule(
        "recurrent", "Recurrent cells are not supported.", FALLBACK, "placement",
        ("coremltools-1780", "guide-operations", "hollance"), _type_in(("lstm", "gru", "rnn"), "{}"),
    ),
    Rule(
        "control-flow", "Loops and conditions have no code of their own on the engine.", FALLBACK, "placement",
        ("guide-operations",), _type_in(("cond", "while_loop"), "{}"),
    ),
    Rule(
        "custom", "Custom layers run on CPU and GPU only.", FALLBACK, "placement", ("hollance",),
        _type_in(("custom", "custom_layer"), "{}"),
    ),
    Rule(
        "sine", "Sine and cosine are native from the A15 or M3 on; the M1 and the A14 reject them.", FALLBACK,
        "placement", ("guide-surface",), _type_in(("sin", "cos"), "{}"),
    ),
    Rule(
        "padding", "Padding of the channel or the batch axis is rejected.", FALLBACK, "placement", ("guide-design",),
        _padding,
    ),
    Rule(
        "padding-mode", "Reflecting pads need the texture engine, which the M1 lacks.", COST, "placement",
        ("guide-operations",), _padding_mode,
    ),
    Rule(
        "texture", "Resizing is a texture operation: software on the M1, native from the A14 or M2 on.", COST, "speed",
        ("guide-operations",), _type_in(_TEXTURE, "{}"),
    ),
    Rule(
        "rank-0", "No source says where scalars are computed.", UNKNOWN, "placement", ("coremltools-1780",), _scalar
    ),
    Rule(
        "cast", "Casts between fp16 and fp32 are copies.", COST, "speed", ("apple-rules", "guide-operations"),
        _wide_cast,
    ),
    Rule(
        "stride-factors", "Strides and dilations other than products of 2 and 3 are composed of several.", COST,
        "speed", ("apple-rules", "guide-design"), _factors,
    ),
    Rule(
        "groups", "Groups, unless depthwise, are fast where their number divides the cores: 1, 2 or 4.", COST, "speed",
        ("guide-design",), _groups,
    ),
    Rule(
        "linear", "A 1x1 convolution serves better than `linear`, which Apple sees decomposed.", COST, "speed",
        ("apple-rules",), _linear,
    ),
    Rule(
        "softmax-axis", "A softmax too large for the chip belongs on the channel axis.", COST, "speed",
        ("apple-rules",), _softmax_axis,
    ),
    Rule(
        "tile", "Keys and values are not tiled: products broadcast. Copies are native in twos, threes, fours, eights.",
        COST, "speed", ("apple-rules", "guide-operations"), _tile,
    ),
    Rule(
        "fused-attention", "Core ML's fused attention is decomposed on the engine; causal masks were seen ignored.",
        COST, "numbers", ("apple-rules", "orion"), _attention,
    ),
    Rule(
        "single-last-axis", "A last axis of 1 is padded to 64 bytes, 32 times the memory in fp16.", COST, "speed",
        ("apple-rules", "guide-design"), _single_last_axis,
    ),
    Rule(
        "affine-weights", "Affine-quantised weights unpack to fp16 on the M1 and A14: smaller files, the same traffic.",
        COST, "speed", ("guide-operations",), _affine_weights,
    ),
    Rule(
        "depthwise-behind-upsampling", "A depthwise convolution right behind a nearest upsampling hangs at load.", COST,
        "load", ("coremltools-2367",), _depthwise_behind_upsampling,
    ),
    Rule(
        "transposed-scores", "v @ scores.T made macOS abort while it compiled.", COST, "load", ("ultralytics-24885",),
        _transposed_scores,
    ),
    Rule(
        "infinite-mask", "Masks are -40000 or so: -inf makes NaN.", COST, "numbers", ("apple-rules",), _infinite
    ),
    Rule(
        "inflated-epsilon", "rms_norm's converter scales x but not epsilon, which grows by max|x|^2.", COST, "numbers",
        ("coremltools-2821",), _inflated_epsilon,
    ),
    Rule(
        "width-slice", "A slice that starts inside the last axis turns values above 4094 into inf on the M1 and A14.",
        COST, "numbers", ("guide-pitfalls",), _width_slice,
    ),
    Rule(
        "gelu", "gelu is a table: an error of 0.08 was measured on the M1, and a private compiler rejects it.", COST,
        "numbers", ("aneforge", "orion"), _type_in(("gelu",), "{}"),
    ),
)  # fmt: skip
UNLISTED = Rule(
    "unlisted", "No published source lists the operation.", UNKNOWN, "placement", ("guide-operations",),
    lambda op, graph: None,
)  # fmt: skip


def findings(op: Operation, graph: Graph) -> list[Finding]:
    """The rules that speak against an operation, in the order of `RULES`."""
    found = []
    for rule in RULES:
        detail = rule.check(op, graph)
        if detail is not None:
            found.append(Finding(rule, detail))
    if op.type not in NATIVE and not any(finding.rule.verdict == FALLBACK for finding in found):
        found.append(Finding(UNLISTED, op.type))
    return found


def verdict(found: Iterable[Finding]) -> str:
    """The worst of what rules say; "engine" where none speaks, which rests on appendix A of the guide."""
    return max((finding.rule.verdict for finding in found), key=VERDICTS.index, default=ENGINE)


@dataclass(frozen=True)
class BorderFinding:
    """What is wrong with an input or output of the package."""

    name: str
    side: str
    shape: tuple[int | None, ...]
    dtype: str
    detail: str
    source: str = "apple-rules"


def border_findings(graph: Graph) -> list[BorderFinding]:
    """Inputs and outputs whose last axis is not laid out in whole blocks of 64 bytes, or that are not fp16."""
    found = []
    for side, values in (("in", graph.inputs), ("out", graph.outputs)):
        for value in values:
            say = partial(BorderFinding, value.name, side, value.shape, value.dtype)
            if value.dtype in ("float32", "int32"):
                found.append(say(f"{value.dtype}: cast on CPU or GPU on its way to the engine"))
            if not value.shape or value.open:
                continue
            width = value.shape[-1] or 1
            row = width * (4 if value.dtype in ("float32", "int32") else 2)
            if width == 1 and value.elements > 1:
                found.append(say("a last axis of 1 is padded to 64 bytes: 32 times the memory in fp16"))
            elif row % BORDER_BYTES and value.elements > 1:
                padded = -row % BORDER_BYTES
                found.append(say(f"a row of {row} bytes is padded by {padded} to a multiple of {BORDER_BYTES}"))
    return found
