"""Core AI export: the form that is converted, what its programs keep out of, how near they are to the model; and what
is said where Core AI is not installed."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import snapgen_kernels
from snapgen import cli
from snapgen.data import shapes
from snapgen.decoder import TinyDecoder, TinyEncoder
from snapgen.export import coreai, parity
from snapgen.export.coreai_audit import violations
from snapgen.export.coreai_run import Asset
from snapgen.export.options import CoreAIOptions
from snapgen.export.parts import Feature, Part
from snapgen.export.tools import ExportError, ParityError
from snapgen.pipeline import SnapGenPipeline
from snapgen.sampler import make_scheduler
from snapgen.text import build_tiny_text
from snapgen.unet import SnapGenUNet
from tests.weights import random_weights

needs_coreai = pytest.mark.skipif(
    importlib.util.find_spec("coreai_torch") is None or importlib.util.find_spec("coreai") is None,
    reason="coreai-torch and coreai-core are not installed",
)
FILES = {"denoiser": "Unet.aimodel", "decoder": "VAEDecoder.aimodel", "text_encoder": "TextEncoder.aimodel"}
# 4x4 tokens in the lower stage and 16 of text: the sizes at which Core AI's compiler drops reshapes.
UNET = dict(
    sample_size=8, in_channels=4, channels=(16, 32), num_heads=(1, 2), head_dim=16, layers_per_block=1,
    transformer_layers_down=(0, 0), transformer_layers_mid=1, transformer_layers_up=(0, 0),
    self_attention=(False, True), temb_dim=32, context_dim=32, pooled_dim=32, norm_groups=8,
)  # fmt: skip


def make_pipe() -> SnapGenPipeline:
    torch.manual_seed(0)
    words = sorted({word for skill in shapes.SKILLS for text in shapes.captions(skill) for word in text.split()})
    tokenizer, text_encoder = build_tiny_text(words, hidden_size=32, layers=1, heads=2, max_tokens=16)
    decoder = TinyDecoder(
        latent_channels=4, channels=(8, 8, 8), blocks=(1, 0, 0), norm_groups=8, scaling_factor=1.3, shift_factor=0.1
    )
    return SnapGenPipeline(
        random_weights(SnapGenUNet(**UNET)),
        random_weights(decoder),
        make_scheduler(),
        random_weights(text_encoder),
        tokenizer,
        encoder=random_weights(TinyEncoder(latent_channels=4, channels=(8,), blocks=(1,), norm_groups=8)),
        joint_text=True,
    )


@pytest.fixture(scope="module")
def pipe() -> SnapGenPipeline:
    return make_pipe()


@pytest.fixture(scope="module", params=["float16", "float32"])
def exported(request, pipe, tmp_path_factory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp(request.param)
    return out, coreai.export_pipeline(pipe, out, CoreAIOptions(dtype=request.param))


class Module(Part):
    """A part of one function, for what the converter makes of it."""

    file, about = "Module.mlpackage", "one function"

    def __init__(self, function, *examples: Tensor) -> None:
        super().__init__()
        self.function = function
        self.inputs = tuple(Feature(f"x{i}", "x", example) for i, example in enumerate(examples))
        self.outputs = (("y", "y"),)

    def forward(self, x0: Tensor, x1: Tensor | None = None) -> Tensor:
        return self.function(x0) if x1 is None else self.function(x0, x1)


# --- the form that is converted: PyTorch alone ------------------------------------------------------------------------


def test_pixel_shuffle_keeps_to_rank_5_and_has_no_short_last_axis():
    x, met = torch.randn(2, 3 * 4, 8, 12), []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            met.append(tuple(result.shape))
            return result

    with Watch():
        got = coreai.pixel_shuffle(x, 2)
    assert torch.equal(got, F.pixel_shuffle(x, 2))
    assert met and max(map(len, met)) == 5 and min(shape[-1] for shape in met) == 8


@pytest.fixture(scope="module", params=list(FILES))
def halved(request, pipe) -> tuple[str, Part, torch.export.ExportedProgram]:
    (part,) = coreai.build_parts(pipe, request.param, CoreAIOptions().of_parts(), 16)
    before = {name: value.clone() for name, value in part.state_dict().items()}
    with torch.no_grad(), snapgen_kernels.use("reference"):
        program = coreai.in_dtype(part, torch.float16)
    after = part.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    return request.param, part, program


def test_a_part_in_fp16_is_the_part(halved):
    name, part, program = halved
    generator = torch.Generator().manual_seed(1)
    inputs = {
        feature.name: torch.randn(feature.example.shape, generator=generator).to(feature.example.dtype)
        for feature in part.inputs
    }
    if name == "denoiser":
        inputs["timestep"] = torch.tensor([964.2857, 31.25])
        inputs["encoder_attention_mask"] = (torch.arange(16) < torch.tensor([[5], [16]])).half()[:, None, None]
    if name == "text_encoder":
        inputs = {"input_ids": torch.randint(3, 30, (1, 16), generator=generator).int()}
        inputs["input_ids"][:, 9:] = part.end
    with torch.no_grad(), snapgen_kernels.use("reference"):
        wanted, got = part(**inputs), program.module()(**inputs)
    for one, other in zip(*(x if isinstance(x, tuple) else (x,) for x in (got, wanted)), strict=True):
        assert one.dtype == torch.float16 and parity.psnr(one, other) > parity.FLOORS[name]


def test_only_the_time_up_to_its_waves_is_wider_than_fp16(halved):
    name, _, program = halved
    held = [*program.state_dict.values(), *program.constants.values()]
    wide = [tuple(tensor.shape) for tensor in held if tensor.is_floating_point() and tensor.dtype != torch.float16]
    values = [(node, node.meta.get("val")) for node in program.graph.nodes]
    made = [
        (node.op, str(node.target).split(".")[-2:][0])
        for node, value in values
        if isinstance(value, Tensor) and value.dtype == torch.float32
    ]
    operations = [target for op, target in made if op == "call_function"]
    borders = [target for op, target in made if op == "placeholder"]
    if name == "denoiser":
        assert wide == [(1, 128, 1, 1)]  # the frequencies
        assert operations == ["reshape", "mul", "cos", "sin"] and borders == ["b_frequencies", "timestep"]
    else:
        assert not wide and not operations and not borders


def test_a_weight_too_large_for_fp16_is_named():
    conv = nn.Conv2d(1, 1, 1)
    with torch.no_grad():
        conv.weight.fill_(7e4)
    part = Module(conv, torch.zeros(1, 1, 2, 2))
    with pytest.raises(ExportError, match=r"weight reaches 7e\+04, too large for float16"):
        coreai.in_dtype(part, torch.float16)
    coreai.in_dtype(part, torch.float32)


def masked(scores: Tensor, mask: Tensor) -> Tensor:
    return scores + ((1.0 - mask) * -4.0).permute(0, 3, 1, 2)


@pytest.mark.parametrize(("queries", "guarded"), [(16, True), (9, False)])
def test_a_reshape_that_the_compiler_would_drop_is_guarded(queries, guarded):
    scores, mask = torch.randn(2, 16, 1, queries), torch.rand(2, 1, 1, 16)
    program = coreai.in_dtype(Module(masked, scores, mask), torch.float32)
    assert any("cat" in str(node.target) for node in program.graph.nodes) == guarded
    torch.testing.assert_close(program.module()(x0=scores, x1=mask), masked(scores, mask), rtol=0, atol=0)


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"parts": ("vae",)}, "parts: unknown part 'vae'"),
        ({"batch": 3}, "batch: got 3; allowed are 1 and 2"),
        ({"dtype": "bfloat16"}, "dtype: got 'bfloat16'; allowed are float16, float32"),
        ({"check_seconds": -1.0}, "check_seconds: got -1.0; must be finite and not negative"),
        ({"check_seconds": float("inf")}, "check_seconds: got inf"),
    ],
)
def test_options_are_checked(wrong, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        CoreAIOptions(**wrong)


@pytest.mark.parametrize(("module", "package"), [("coreai", "coreai-core"), ("coreai_torch", "coreai-torch")])
def test_where_core_ai_is_missing_the_command_to_install_it_is_named(module, package, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "coreai", sys)  # something that imports
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SystemExit) as stop:
        cli.main(["export", "coreai", "-o", str(tmp_path / "out")])
    text = capsys.readouterr().out
    assert stop.value.code == 2
    assert f"needs {package}" in text and "pip install 'snapgen[coreai]'" in text and "glibc 2.34" in text
    assert not (tmp_path / "out").exists()


def test_a_broken_core_ai_is_not_taken_for_a_missing_one(monkeypatch, tmp_path):
    (tmp_path / "coreai_torch.py").write_text("import no_such_module_at_all\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "coreai", sys)
    monkeypatch.delitem(sys.modules, "coreai_torch", raising=False)
    with pytest.raises(ModuleNotFoundError, match="no_such_module_at_all"):
        coreai.coreai_torch()


def test_a_process_that_fails_is_an_error(tmp_path):
    """Core AI dies of a damaged asset; where it is not installed, the process cannot import it."""
    with pytest.raises(ExportError, match=r"none.aimodel: not a Core AI asset \(it holds no main.mlirb\)"):
        Asset(tmp_path / "none.aimodel", 100)
    (tmp_path / "main.mlirb").write_bytes(b"not a program")
    with pytest.raises(ExportError, match=r"Core AI's runtime ended with status -?\d+"):
        Asset(tmp_path, 100)


def test_a_process_that_takes_too_long_is_ended(tmp_path):
    (tmp_path / "main.mlirb").write_bytes(b"")
    with pytest.raises(ExportError, match=r"did not finish in 0.001 s. .*--check-seconds"):
        Asset(tmp_path, 0.001)


# --- Core AI ----------------------------------------------------------------------------------------------------------


@needs_coreai
def test_assets_hold_the_model(exported, pipe):
    out, found = exported
    assert {path.name for path in out.iterdir()} == set(FILES.values())
    for name, file in FILES.items():
        part = found["parts"][name]
        floor = 70.0 if found["dtype"] == "float32" else parity.FLOORS[name]
        assert part["psnr"] >= floor == part["floor"]
        (asset,) = part["assets"]
        assert asset["path"] == str(out / file) and asset["operations"]["conv2d"] > 0
        metadata = json.loads((out / file / "metadata.json").read_text())
        assert metadata["license"] == "Apache-2.0" and metadata["description"].startswith("SnapGen")
        assert set(metadata["creatorDefinedMetadata"]) == {"inputs", "outputs", "version"}
        assert "creationDate" not in metadata
    weights = sum(p.numel() for p in pipe.denoiser.parameters()) * (4 if found["dtype"] == "float32" else 2)
    size = found["parts"]["denoiser"]["assets"][0]["file_bytes"]
    assert weights < size < 2.5 * weights


@needs_coreai
def test_borders_are_those_of_the_core_ml_packages(exported):
    out, found = exported
    dtype = getattr(torch, found["dtype"])
    with Asset(out / FILES["denoiser"], 100) as asset:
        assert asset.inputs == {
            "sample": ((2, 4, 8, 8), dtype),
            "timestep": ((2,), torch.float32),
            "encoder_hidden_states": ((2, 32, 1, 16), dtype),
            "encoder_attention_mask": ((2, 1, 1, 16), dtype),
            "pooled_projections": ((2, 32), dtype),
        }
        assert asset.outputs == ["velocity"]
        inputs = {name: torch.ones(shape) for name, (shape, _) in asset.inputs.items()}
        assert asset(inputs)["velocity"].dtype == dtype
        with pytest.raises(ValueError, match=r"sample is \(2, 4, 8, 4\); the program takes \(2, 4, 8, 8\)"):
            asset(inputs | {"sample": torch.ones(2, 4, 8, 4)})
        with pytest.raises(ValueError, match="inputs: got"):
            asset({"sample": inputs["sample"]})


@needs_coreai
def test_programs_keep_the_engine_s_rules(exported):
    _, found = exported
    kept = {name: part["assets"][0]["violations"] for name, part in found["parts"].items()}
    rules = {name: {(one.kind, one.operation) for one in broken} for name, broken in kept.items()}
    if found["dtype"] == "float32":
        assert all({kind for kind, _ in broken} <= {"float32", "gather"} for broken in rules.values())
        return
    # Only the angles of the time and their waves, a few numbers at the start; and the look-up of the tokens.
    wide = {"constant", "reshape", "broadcasting_mul", "cos", "sin"}
    assert rules["denoiser"] == {("float32", operation) for operation in wide} | {("cast", "cast")}
    assert len(kept["denoiser"]) == 7
    assert rules["decoder"] == set()
    assert [(one.kind, one.operation) for one in kept["text_encoder"]] == [("gather", "gather_nd")]


@needs_coreai
@pytest.mark.parametrize(
    ("function", "examples", "kinds"),
    [
        (F.silu, (torch.zeros(1, 4, 1, 8),), {"silu"}),
        (torch.tanh, (torch.zeros(1, 4, 1, 8),), {"tanh"}),
        (lambda x: x.float().exp().half(), (torch.zeros(1, 4, 1, 8),), set()),
        (lambda x: torch.cos(x.float()), (torch.zeros(1, 4, 1, 8),), {"float32", "cast"}),
        (lambda x: x.reshape(1, 2, 2, 2, 2, 2).permute(5, 4, 3, 2, 1, 0) * 2, (torch.zeros(1, 4, 1, 8),), {"rank"}),
        (lambda x, y: F.embedding(y, x), (torch.zeros(9, 8), torch.zeros(1, 3, dtype=torch.int32)), {"gather"}),
        (lambda x: x.repeat(1, 3, 1, 1), (torch.zeros(1, 1, 4, 8),), {"tile"}),
        (lambda x: x.expand(1, 3, 4, 8).reshape(1, 12, 1, 8), (torch.zeros(1, 1, 4, 8),), {"tile"}),
        (lambda x: x * torch.sigmoid(x) + 1.0, (torch.zeros(1, 4, 1, 8),), set()),
        (lambda x: F.pixel_shuffle(x, 2), (torch.zeros(1, 4, 2, 8),), set()),
    ],
)
def test_each_broken_rule_is_found(function, examples, kinds, tmp_path):
    halves = [example.half() if example.is_floating_point() else example for example in examples]
    program = coreai.convert(Module(function, *halves), tmp_path / "Module.aimodel", torch.float16)
    assert {one.kind for one in violations(program)} == kinds


@needs_coreai
def test_a_mask_is_added_along_the_keys_where_there_are_as_many_queries(tmp_path):
    """Without the guard, coreai-core 1.0.0b2 adds it along the queries."""
    scores, mask = torch.randn(2, 16, 1, 16), torch.rand(2, 1, 1, 16)
    part = Module(masked, scores, mask)
    coreai.convert(part, tmp_path / "Module.aimodel", torch.float32)
    with Asset(tmp_path / "Module.aimodel", 100) as asset:
        torch.testing.assert_close(asset({"x0": scores, "x1": mask})["y"], masked(scores, mask))


@needs_coreai
def test_the_same_program_twice(pipe, tmp_path):
    (part,) = coreai.build_parts(pipe, "decoder", CoreAIOptions().of_parts(), 16)
    texts = []
    for name in ("a", "b"):
        program = coreai.convert(part, tmp_path / f"{name}.aimodel", torch.float16)
        texts.append(re.sub(r"resource_\d+", "resource", str(program)))
    assert sorted(texts[0].splitlines()) == sorted(texts[1].splitlines())
    first, second = ((tmp_path / f"{name}.aimodel" / "metadata.json").read_bytes() for name in ("a", "b"))
    assert first == second


@needs_coreai
def test_below_the_floor_nothing_is_written(pipe, tmp_path, monkeypatch):
    (tmp_path / FILES["decoder"]).mkdir()
    (tmp_path / FILES["decoder"] / "old").write_text("kept")
    monkeypatch.setattr(coreai, "FLOOR_FP32", 500.0)
    with pytest.raises(ParityError, match=r"decoder: .* the floor in float32 is 500 dB. Nothing was written"):
        coreai.export_pipeline(pipe, tmp_path, CoreAIOptions(parts=("decoder",), dtype="float32"))
    assert [str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*")] == [
        FILES["decoder"],
        f"{FILES['decoder']}/old",
    ]


@needs_coreai
def test_unchecked_assets_say_so(pipe, tmp_path):
    found = coreai.export_pipeline(pipe, tmp_path, CoreAIOptions(parts=("decoder",), check_seconds=0))
    assert found["parts"]["decoder"]["psnr"] is None
    assert [path.name for path in tmp_path.iterdir()] == [FILES["decoder"]]
