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

from snapgen.export import rule_checks as checks
from snapgen.export.graph import Graph, Operation

ENGINE = "engine"
COST = "engine, at a cost"
FALLBACK = "falls back to CPU/GPU"
UNKNOWN = "unknown (no published rule)"
VERDICTS = (ENGINE, COST, UNKNOWN, FALLBACK)  # from good to bad: an operation's verdict is the worst of its findings

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


RULES = (
    Rule(
        "rank-above-5", "Tensors have at most five axes.", FALLBACK, "placement", ("apple-rules", "guide-design"),
        checks.rank_above_5,
    ),
    Rule(
        "fp32", "The datapath is fp16: what is computed in fp32 falls back.", FALLBACK, "placement",
        ("apple-rules", "guide-surface"), checks.fp32,
    ),
    Rule(
        "wide-integers", "Integers of 32 bits, and truth values but from a comparison into `select`, have no path.",
        FALLBACK, "placement", ("guide-surface", "aneforge"), checks.integer,
    ),
    Rule(
        "open-shapes", "Shapes are static: open ones leave the engine, and LayerNorm did under enumerated shapes too.",
        FALLBACK, "placement", ("apple-rules", "coremltools-1909"), checks.open_shape,
    ),
    Rule(
        "extents", "Width and height reach 16384 (65536 from the A16), channels 65536.", FALLBACK, "placement",
        ("guide-design",), checks.extent,
    ),
    Rule(
        "kernel-width", "An fp16 convolution's kernel is at most 13 wide on the M1, 16 from the A14.", FALLBACK,
        "placement", ("guide-design", "guide-operations"), checks.kernel_width,
    ),
    Rule(
        "kernel-height", "A convolution's kernel is at most 29 high on the M1, 32 from the A14.", FALLBACK, "placement",
        ("guide-design", "guide-operations"), checks.kernel_height,
    ),
    Rule(
        "conv-3d", "Three-dimensional convolution fails to lower on every chip.", FALLBACK, "placement",
        ("guide-surface",), checks.conv_3d,
    ),
    Rule(
        "moving-kernel", "A convolution whose kernel is computed crashes the compiler above batch 1.", FALLBACK, "load",
        ("guide-pitfalls",), checks.moving_kernel,
    ),
    Rule(
        "palettised-stride", "Strides above 2 are hardly supported where a convolution's weights are palettised.", COST,
        "placement", ("apple-rules",), checks.palettised_stride,
    ),
    Rule(
        "matmul-depth", "Products take no depth axis: linear stops below rank 5, matmul at a depth of 1.", FALLBACK,
        "placement", ("guide-design",), checks.matmul_depth,
    ),
    Rule(
        "no-path", "The operation has no path on any chip from the M1 to the M5.", FALLBACK, "placement",
        ("guide-surface", "guide-operations"), checks.type_in(checks.NO_PATH, "{}"),
    ),
    Rule(
        "gather", "Gathers are never placed on the engine by Core ML's cost model; the M1 runs them in a narrow case.",
        FALLBACK, "placement", ("guide-placement", "hollance", "rf-detr-1495"),
        checks.type_in(("gather", "gather_along_axis", "gather_nd"), "{}"),
    ),
    Rule(
        "arg-reductions", "argmax and argmin are never placed on the engine by Core ML's cost model.", FALLBACK,
        "placement", ("guide-placement",), checks.type_in(("reduce_argmax", "reduce_argmin"), "{}"),
    ),
    Rule(
        "sorting", "Sorts and top-k leave the engine.", FALLBACK, "placement", ("rf-detr-1495", "guide-surface"),
        checks.type_in(("topk", "argsort", "sort"), "{}"),
    ),
    Rule(
        "recurrent", "Recurrent cells are not supported.", FALLBACK, "placement",
        ("coremltools-1780", "guide-operations", "hollance"), checks.type_in(("lstm", "gru", "rnn"), "{}"),
    ),
    Rule(
        "control-flow", "Loops and conditions have no code of their own on the engine.", FALLBACK, "placement",
        ("guide-operations",), checks.type_in(("cond", "while_loop"), "{}"),
    ),
    Rule(
        "custom", "Custom layers run on CPU and GPU only.", FALLBACK, "placement", ("hollance",),
        checks.type_in(("custom", "custom_layer"), "{}"),
    ),
    Rule(
        "sine", "Sine and cosine are native from the A15 or M3 on; the M1 and the A14 reject them.", FALLBACK,
        "placement", ("guide-surface",), checks.type_in(("sin", "cos"), "{}"),
    ),
    Rule(
        "padding", "Padding of the channel or the batch axis is rejected.", FALLBACK, "placement", ("guide-design",),
        checks.padding,
    ),
    Rule(
        "padding-mode", "Reflecting pads need the texture engine, which the M1 lacks.", COST, "placement",
        ("guide-operations",), checks.padding_mode,
    ),
    Rule(
        "texture", "Resizing is a texture operation: software on the M1, native from the A14 or M2 on.", COST, "speed",
        ("guide-operations",), checks.type_in(checks.TEXTURE, "{}"),
    ),
    Rule(
        "rank-0", "No source says where scalars are computed.", UNKNOWN, "placement", ("coremltools-1780",),
        checks.scalar,
    ),
    Rule(
        "cast", "Casts between fp16 and fp32 are copies.", COST, "speed", ("apple-rules", "guide-operations"),
        checks.wide_cast,
    ),
    Rule(
        "stride-factors", "Strides and dilations other than products of 2 and 3 are composed of several.", COST,
        "speed", ("apple-rules", "guide-design"), checks.factors,
    ),
    Rule(
        "groups", "Groups, unless depthwise, are fast where their number divides the cores: 1, 2 or 4.", COST, "speed",
        ("guide-design",), checks.groups,
    ),
    Rule(
        "linear", "A 1x1 convolution serves better than `linear`, which Apple sees decomposed.", COST, "speed",
        ("apple-rules",), checks.linear,
    ),
    Rule(
        "softmax-axis", "A softmax too large for the chip belongs on the channel axis.", COST, "speed",
        ("apple-rules",), checks.softmax_axis,
    ),
    Rule(
        "tile", "Keys and values are not tiled: products broadcast. Copies are native in twos, threes, fours, eights.",
        COST, "speed", ("apple-rules", "guide-operations"), checks.tile,
    ),
    Rule(
        "fused-attention", "Core ML's fused attention is decomposed on the engine; causal masks were seen ignored.",
        COST, "numbers", ("apple-rules", "orion"), checks.attention,
    ),
    Rule(
        "single-last-axis", "A last axis of 1 is padded to 64 bytes, 32 times the memory in fp16.", COST, "speed",
        ("apple-rules", "guide-design"), checks.single_last_axis,
    ),
    Rule(
        "affine-weights", "Affine-quantised weights unpack to fp16 on the M1 and A14: smaller files, the same traffic.",
        COST, "speed", ("guide-operations",), checks.affine_weights,
    ),
    Rule(
        "depthwise-behind-upsampling", "A depthwise convolution right behind a nearest upsampling hangs at load.", COST,
        "load", ("coremltools-2367",), checks.depthwise_behind_upsampling,
    ),
    Rule(
        "transposed-scores", "v @ scores.T made macOS abort while it compiled.", COST, "load", ("ultralytics-24885",),
        checks.transposed_scores,
    ),
    Rule(
        "infinite-mask", "Masks are -40000 or so: -inf makes NaN.", COST, "numbers", ("apple-rules",), checks.infinite
    ),
    Rule(
        "inflated-epsilon", "rms_norm's converter scales x but not epsilon, which grows by max|x|^2.", COST, "numbers",
        ("coremltools-2821",), checks.inflated_epsilon,
    ),
    Rule(
        "width-slice", "A slice that starts inside the last axis turns values above 4094 into inf on the M1 and A14.",
        COST, "numbers", ("guide-pitfalls",), checks.width_slice,
    ),
    Rule(
        "gelu", "gelu is a table: an error of 0.08 was measured on the M1, and a private compiler rejects it.", COST,
        "numbers", ("aneforge", "orion"), checks.type_in(("gelu",), "{}"),
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
    if op.type not in checks.NATIVE and not any(finding.rule.verdict == FALLBACK for finding in found):
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
            elif row % checks.BORDER_BYTES and value.elements > 1:
                padded = -row % checks.BORDER_BYTES
                found.append(say(f"a row of {row} bytes is padded by {padded} to a multiple of {checks.BORDER_BYTES}"))
    return found
