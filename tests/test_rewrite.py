"""Forms of compressed weights in a package against coremltools' own, and which weights can take them."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("coremltools", reason="the Core ML export is an optional part")

from snapgen.export import inspect, rewrite
from snapgen.export.inspect import describe
from snapgen.export.interpreter import Program
from snapgen.export.palette import palettize, quantize
from snapgen.export.tools import coremltools, quiet
from tests.test_mil_interpreter import build
from tests.test_palette import normal

pytestmark = [pytest.mark.export, pytest.mark.complete]  # minutes, of conversions


def weight_file(package: Path) -> Path:
    return package / "Data" / "com.apple.CoreML" / "weights" / "weight.bin"


def one_convolution(path: Path, target: str, weight: np.ndarray, **arguments) -> Path:
    """A package of one fp16 convolution."""
    ct, mil = coremltools(), coremltools("converters.mil.mil")
    channels = weight.shape[1] * arguments.get("groups", 1)

    @mil.Builder.program(
        input_specs=[mil.Builder.TensorSpec((1, channels, 9, 9), dtype=mil.types.fp16)],
        opset_version=getattr(ct.target, target),
    )
    def program(x):
        return mil.Builder.conv(x=x, weight=weight, name="y", **arguments)

    with quiet():
        ct.convert(
            program,
            minimum_deployment_target=getattr(ct.target, target),
            pass_pipeline=ct.PassPipeline.EMPTY,
            skip_model_load=True,
            package_dir=str(path),
        )
    return path


def operations(package: Path) -> dict:
    """Constexpr operations of a package by the convolution's argument, their places in the weight file left out."""
    spec, _ = inspect.read_spec(package)
    found = {}
    for op in inspect._operations(spec):
        if op.type.startswith("constexpr_"):
            values = {name: value for name, value in inspect._named_values(op).items() if name != "name"}
            found[op.type] = {name: (value.type, value.WhichOneof("value")) for name, value in values.items()}
            found[op.type]["as inputs"] = sorted(op.inputs)
    return found


@pytest.mark.parametrize("target", ["iOS17", "iOS18"])
@pytest.mark.parametrize("form", ["palette-8", "palette-4", "palette-2", "int8"])
def test_forms_are_those_that_coremltools_writes(tmp_path, target, form):
    """The same operations, arguments, types and sizes, and decoded by coremltools to what was meant."""
    weight = normal(64, 40, 1, 1)
    plain = one_convolution(tmp_path / "plain.mlpackage", target, weight)
    mine = Path(shutil.copytree(plain, tmp_path / "mine.mlpackage"))
    (only,), _ = rewrite.weights(mine)
    bits = rewrite.bits_of(form)
    groups = rewrite.groups(weight.shape, bits, target)
    rewrite.rewrite(mine, {only: form}, target, {})

    ct = coremltools()
    tools = ct.optimize.coreml
    with quiet():
        model = ct.models.MLModel(str(plain), skip_model_load=True)
        if form == "int8":
            config = tools.OpLinearQuantizerConfig(mode="linear_symmetric", weight_threshold=0)
            theirs = tools.linear_quantize_weights(model, tools.OptimizationConfig(config))
        else:
            grouped = dict(granularity="per_grouped_channel", group_size=64 // groups) if groups > 1 else {}
            config = tools.OpPalettizerConfig(mode="uniform", nbits=bits, weight_threshold=0, **grouped)
            theirs = tools.palettize_weights(model, tools.OptimizationConfig(config))
        theirs.save(str(tmp_path / "theirs.mlpackage"))
    assert operations(mine) == operations(tmp_path / "theirs.mlpackage") != {}
    assert describe(mine)["weights"] == describe(tmp_path / "theirs.mlpackage")["weights"]

    program = Program(mine)
    if form == "int8":
        integers, scale = quantize(weight)
        meant = integers * scale.astype(np.float32)[:, None, None, None]
    else:
        palette = palettize(weight, bits, groups)
        indices = palette.indices.reshape(groups, -1).astype(np.int64)
        meant = np.take_along_axis(palette.lut, indices, 1).reshape(weight.shape)
    assert np.array_equal(program._constants[only.name].numpy(), meant.astype(np.float16))


@pytest.mark.parametrize(
    ("shape", "arguments", "compressed"),
    [
        ((64, 40, 1, 1), dict(), True),
        ((64, 40, 1, 1), dict(strides=[2, 2]), True),
        ((64, 40, 1, 1), dict(strides=[1, 3]), False),  # the engine takes palettes up to stride 2
        ((256, 1, 3, 3), dict(groups=256), False),  # depthwise
        ((64, 32, 3, 3), dict(groups=2), True),
        ((64, 31, 1, 1), dict(), False),  # below SMALLEST
    ],
)
def test_which_weights_can_be_compressed(tmp_path, shape, arguments, compressed):
    package = one_convolution(tmp_path / "p.mlpackage", "iOS17", normal(*shape), **arguments)
    found, size = rewrite.weights(package)
    assert [weight.shape for weight in found] == ([shape] if compressed else [])
    assert size == weight_file(package).stat().st_size


def test_constants_with_another_use_stay(tmp_path):
    weight = torch.from_numpy(normal(64, 64)).float()
    x = torch.randn(64, 64).half()

    def program(mb, x):
        table, other = weight.half().numpy(), (2 * weight).half().numpy()
        return mb.add(x=mb.linear(x=x, weight=other), y=table), mb.matmul(x=x, y=(3 * weight).half().numpy())

    package = build(program, tmp_path / "p.mlpackage", x=x)
    found, _ = rewrite.weights(package)
    assert [weight.key for weight in found] == [rewrite.weight_key((2 * weight).half().numpy())]
