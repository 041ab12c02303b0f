"""The Neural Engine's published rules: each on a program that breaks it and on one that does not."""

import math
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("coremltools", reason="the Core ML export is an optional part")

from test_mil_interpreter import build

from snapgen.export.audit import audit
from snapgen.export.graph import Graph, Operation, Value, read_graphs
from snapgen.export.rules import (
    COST,
    ENGINE,
    FALLBACK,
    RULES,
    SOURCES,
    UNKNOWN,
    UNLISTED,
    VERDICTS,
    findings,
    verdict,
)
from snapgen.export.tools import coremltools, quiet

pytestmark = pytest.mark.export


def half(*shape: int) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.float16)


INPUTS = {
    "x": half(1, 4, 8, 8), "batch": half(2, 4, 8, 8), "tall": half(1, 4, 32, 32), "wide": half(1, 1, 1, 16385),
    "widest": half(1, 1, 1, 16384), "many": half(1, 65537, 1, 2), "cube": half(1, 1, 4, 4, 4),
    "channels": half(1, 16, 8, 8), "scores": half(1, 2, 1024, 640), "column": half(1, 200, 200, 1),
    "deep": half(1, 2, 1, 4, 4), "shallow": half(2, 1, 1, 4, 4), "q": half(1, 2, 8, 16), "kernel": half(4, 4, 3, 3),
    "series": half(5, 1, 4), "memory": half(1, 3),
}  # fmt: skip
Make = Callable[[object, SimpleNamespace, str], object]


def weight(*shape: int) -> np.ndarray:
    return np.cos(np.arange(math.prod(shape))).reshape(shape).astype(np.float16)


def conv(x: str, *shape: int, **given: object) -> Make:
    return lambda mb, t, name: mb.conv(x=getattr(t, x), weight=weight(*shape), name=name, **given)


def simple(kind: str, x: str = "x", **given: object) -> Make:
    return lambda mb, t, name: getattr(mb, kind)(x=getattr(t, x), name=name, **given)


def palettised(mb, t, name, stride=3):
    lut = np.linspace(-1, 1, 256).astype(np.float16).reshape(1, 1, 1, 1, 256, 1)
    dense = mb.constexpr_lut_to_dense(indices=np.zeros((4, 4, 3, 3), np.uint8), lut=lut)
    return mb.conv(x=t.x, weight=dense, strides=[stride, stride], name=name)


def scaled(mb, t, name):
    dense = mb.constexpr_blockwise_shift_scale(
        data=np.ones((4, 4, 1, 1), np.int8), scale=np.ones((4, 1, 1, 1), np.float16)
    )
    return mb.conv(x=t.x, weight=dense, name=name)


def norm(mb, t, name, *, inflated):
    """RMSNorm over the channels as coremltools' converter writes it, and with an epsilon that is scaled along."""
    largest = mb.reduce_max(x=mb.abs(x=t.x), axes=[1], keep_dims=True)
    y = mb.real_div(x=t.x, y=largest)
    mean = mb.reduce_mean(x=mb.square(x=y), axes=[1], keep_dims=True)
    small = np.float16(1e-3)
    if not inflated:
        small = mb.real_div(x=small, y=mb.square(x=largest))
    return mb.rsqrt(x=mb.add(x=mean, y=small), epsilon=0.0, name=name)


def attention(mb, t, name):
    return mb.scaled_dot_product_attention(query=t.q, key=t.q, value=t.q, name=name)


def scores_of(mb, t):
    return mb.softmax(x=mb.matmul(x=t.q, y=t.q, transpose_y=True), axis=-1)


def condition(mb, t, name):
    some = mb.reduce_max(x=t.x, axes=[0, 1, 2, 3], keep_dims=False)
    return mb.cond(
        pred=mb.greater(x=some, y=np.float16(0)), _true_fn=lambda: mb.relu(x=t.x), _false_fn=lambda: mb.tanh(x=t.x),
        name=name,
    )  # fmt: skip


def lstm(mb, t, name):
    return mb.lstm(
        x=t.series, initial_h=t.memory, initial_c=t.memory, weight_ih=weight(12, 4), weight_hh=weight(12, 3), name=name
    )[0]


def upsampled(mb, t):
    return mb.upsample_nearest_neighbor(x=t.x, scale_factor_height=2, scale_factor_width=2)


FULL = np.array([0, 0, 0, 0], np.int32)
# Rule -> a program whose operation of the rule's name breaks it, and one whose operation of that name does not.
CASES: dict[str, tuple[Make, Make]] = {
    "fp32": (
        lambda mb, t, name: mb.relu(x=mb.cast(x=t.x, dtype="fp32"), name=name),
        simple("relu"),
    ),
    "wide-integers": (
        lambda mb, t, name: mb.add(x=mb.cast(x=t.x, dtype="int32"), y=np.int32(1), name=name),
        lambda mb, t, name: mb.select(cond=mb.greater(x=t.x, y=np.float16(0)), a=t.x, b=t.x, name=name),
    ),
    "extents": (simple("relu", "wide"), simple("relu", "widest")),
    "kernel-width": (conv("tall", 4, 4, 1, 14), conv("tall", 4, 4, 14, 13)),
    "kernel-height": (conv("tall", 4, 4, 30, 1), conv("tall", 4, 4, 29, 1)),
    "conv-3d": (conv("cube", 1, 1, 2, 2, 2), conv("x", 4, 4, 2, 2)),
    "moving-kernel": (
        lambda mb, t, name: mb.conv(x=t.batch, weight=t.kernel, name=name),
        lambda mb, t, name: mb.conv(x=t.x, weight=t.kernel, name=name),
    ),
    "palettised-stride": (palettised, lambda mb, t, name: palettised(mb, t, name, stride=2)),
    "matmul-depth": (
        lambda mb, t, name: mb.matmul(x=t.deep, y=t.deep, name=name),
        lambda mb, t, name: mb.matmul(x=t.shallow, y=t.shallow, name=name),
    ),
    "no-path": (simple("reduce_prod", axes=[1]), simple("reduce_sum", axes=[1])),
    "gather": (
        simple("gather", indices=np.array([0, 2], np.int32), axis=1, validate_indices=False),
        simple("slice_by_index", begin=FULL, end=np.array([1, 2, 8, 8], np.int32)),
    ),
    "arg-reductions": (simple("reduce_argmax", axis=1), simple("reduce_max", axes=[1])),
    "sorting": (lambda mb, t, name: mb.topk(x=t.x, k=2, axis=1, name=name)[0], simple("reduce_max", axes=[1])),
    "recurrent": (lstm, simple("tanh")),
    "control-flow": (condition, simple("relu")),
    "sine": (simple("sin"), simple("tanh")),
    "padding": (simple("pad", pad=[1, 1, 0, 0, 0, 0], constant_val=np.float16(0)),
                simple("pad", pad=[0, 0, 0, 0, 1, 1], constant_val=np.float16(0))),
    "padding-mode": (simple("pad", pad=[1, 1], mode="reflect", constant_val=np.float16(0)),
                     simple("pad", pad=[1, 1], constant_val=np.float16(0))),
    "texture": (simple("upsample_nearest_neighbor", scale_factor_height=2, scale_factor_width=2),
                simple("pixel_shuffle", upscale_factor=2)),
    "rank-0": (simple("reduce_max", axes=[0, 1, 2, 3], keep_dims=False),
               simple("reduce_max", axes=[0, 1, 2, 3], keep_dims=True)),
    "cast": (simple("cast", dtype="fp32"), simple("relu")),
    "stride-factors": (conv("tall", 4, 4, 3, 3, strides=[5, 5]), conv("tall", 4, 4, 3, 3, strides=[6, 4])),
    "groups": (conv("channels", 16, 2, 1, 1, groups=8), conv("channels", 16, 1, 3, 3, groups=16)),
    "linear": (simple("linear", weight=weight(5, 8)), conv("x", 5, 4, 1, 1)),
    "softmax-axis": (simple("softmax", "scores", axis=-1), simple("softmax", "scores", axis=1)),
    "tile": (
        lambda mb, t, name: mb.matmul(x=t.q, y=mb.tile(x=t.q, reps=[1, 1, 2, 1], name=name), transpose_y=True),
        simple("tile", reps=[1, 1, 2, 1]),
    ),
    "fused-attention": (attention, lambda mb, t, name: mb.matmul(x=scores_of(mb, t), y=t.q, name=name)),
    "single-last-axis": (simple("relu", "column"), simple("reduce_max", axes=[3], keep_dims=True)),
    "affine-weights": (scaled, conv("x", 4, 4, 1, 1)),
    "depthwise-behind-upsampling": (
        lambda mb, t, name: mb.conv(x=upsampled(mb, t), weight=weight(4, 1, 3, 3), groups=4, name=name),
        lambda mb, t, name: mb.conv(x=upsampled(mb, t), weight=weight(4, 4, 3, 3), name=name),
    ),
    "transposed-scores": (
        lambda mb, t, name: mb.matmul(
            x=mb.transpose(x=t.q, perm=[0, 1, 3, 2]), y=scores_of(mb, t), transpose_y=True, name=name
        ),
        lambda mb, t, name: mb.matmul(x=scores_of(mb, t), y=t.q, name=name),
    ),
    "infinite-mask": (simple("add", y=np.full((1, 1, 8, 8), -np.inf, np.float16)),
                      simple("add", y=np.full((1, 1, 8, 8), -40000, np.float16))),
    "inflated-epsilon": (
        lambda mb, t, name: norm(mb, t, name, inflated=True),
        lambda mb, t, name: norm(mb, t, name, inflated=False),
    ),
    "width-slice": (
        simple("slice_by_index", begin=np.array([0, 0, 0, 2], np.int32), end=np.array([1, 4, 8, 8], np.int32)),
        simple("slice_by_index", begin=np.array([0, 0, 2, 0], np.int32), end=np.array([1, 4, 8, 8], np.int32)),
    ),
    "gelu": (simple("gelu", mode="EXACT"), simple("silu")),
    "unlisted": (
        lambda mb, t, name: mb.random_uniform(
            shape=[1, 4], low=np.float16(0), high=np.float16(1), seed=1, name=name
        ),
        simple("relu"),
    ),
}  # fmt: skip
WITHOUT_BUILDER = {"open-shapes", "custom", "rank-above-5"}  # the last: coremltools writes no such package


def name_of(rule: str) -> str:
    return f"of_{rule.replace('-', '_')}"  # some rules' own names are words that coremltools keeps to itself


def program_of(which: int, path: Path) -> Graph:
    def make(mb, *given):
        t = SimpleNamespace(**dict(zip(INPUTS, given, strict=True)))
        return tuple(cases[which](mb, t, name_of(rule)) for rule, cases in CASES.items())

    (graph,) = read_graphs(build(make, path, **INPUTS))
    return graph


@pytest.fixture(scope="module")
def guilty(tmp_path_factory) -> Graph:
    return program_of(0, tmp_path_factory.mktemp("rules") / "guilty.mlpackage")


@pytest.fixture(scope="module")
def innocent(tmp_path_factory) -> Graph:
    return program_of(1, tmp_path_factory.mktemp("rules") / "innocent.mlpackage")


def named(graph: Graph, rule: str) -> Operation:
    # An operation is called after its first output, which is numbered where there are several.
    (op,) = [op for op in graph.operations if op.name in (name_of(rule), f"{name_of(rule)}_0")]
    return op


def broken(op: Operation, graph: Graph) -> set[str]:
    return {finding.rule.name for finding in findings(op, graph)}


def test_every_rule_has_a_case():
    assert CASES.keys() | WITHOUT_BUILDER == {rule.name for rule in (*RULES, UNLISTED)}


@pytest.mark.parametrize("rule", CASES)
def test_rule_speaks_against_what_breaks_it_and_not_against_what_does_not(rule, guilty, innocent):
    assert rule in broken(named(guilty, rule), guilty)
    assert rule not in broken(named(innocent, rule), innocent)


def test_open_extents_six_axes_and_custom_layers_fall_back(tmp_path):
    ct = coremltools()
    milpython = coremltools("converters.mil.mil")
    mb, types = milpython.Builder, milpython.types
    length = coremltools("converters.mil.mil").get_new_symbol()

    @mb.program(input_specs=[mb.TensorSpec((1, 4, 1, length), dtype=types.fp16)], opset_version=ct.target.iOS18)
    def program(x):
        return mb.relu(x=x, name="open")

    with quiet():
        ct.convert(
            program,
            inputs=[ct.TensorType("x", shape=(1, 4, 1, ct.RangeDim(1, 64)), dtype=np.float16)],
            minimum_deployment_target=ct.target.iOS18,
            compute_precision=ct.precision.FLOAT32,
            pass_pipeline=ct.PassPipeline.EMPTY,
            skip_model_load=True,
            package_dir=str(tmp_path / "open.mlpackage"),
        )
    (report,) = audit(tmp_path / "open.mlpackage")
    assert report.operations[0].op.outputs[0].shape[-1] is None
    assert report.operations[0].verdict == FALLBACK
    assert "open-shapes" in broken(report.operations[0].op, report.graph)

    for rank, speaks in ((5, False), (6, True)):
        op = Operation(0, "y", "reshape", "main", {}, (Value("y", (1,) * rank, "float16"),))
        assert ("rank-above-5" in broken(op, Graph("main", (), (), (op,), {"y": op}, {}))) == speaks

    op = Operation(0, "mine", "custom_layer", "main", {}, (Value("mine", (1, 4), "float16"),))
    graph = Graph("main", (), (), (op,), {"mine": op}, {})
    assert broken(op, graph) == {"custom"}
    assert verdict(findings(op, graph)) == FALLBACK


def test_rules_are_complete_and_sourced():
    for rule in (*RULES, UNLISTED):
        assert re.fullmatch(r"[a-z0-9-]+", rule.name)
        assert rule.says.endswith(".") and rule.verdict in VERDICTS and rule.verdict != ENGINE
        assert rule.about in ("placement", "speed", "numbers", "load")
        assert rule.sources and set(rule.sources) <= SOURCES.keys()
    assert len({rule.name for rule in RULES}) == len(RULES)
    assert all(address.startswith("https://") for _, address in SOURCES.values())


def test_verdict_is_the_worst_of_the_findings(guilty):
    sine = named(guilty, "sine")
    assert verdict(findings(sine, guilty)) == FALLBACK
    assert verdict(findings(named(guilty, "gelu"), guilty)) == COST
    assert verdict(findings(named(guilty, "unlisted"), guilty)) == UNKNOWN
    assert verdict([]) == ENGINE
