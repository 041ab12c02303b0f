"""Core ML export: what is written, how near it is to the model, which of the converter's traps it keeps out of, and
that nothing else changes."""

import copy
import json
import logging
import os
import shutil
import subprocess
import sys
import warnings
from io import StringIO
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

pytest.importorskip("coremltools", reason="the Core ML export is an optional part")

import snapgen_kernels
from snapgen.data import shapes
from snapgen.decoder import TinyDecoder, TinyEncoder
from snapgen.export import coreml, modules, parity
from snapgen.export.command import main_coreml
from snapgen.export.convert import convert
from snapgen.export.coreml import export_pipeline
from snapgen.export.denoiser import Denoiser
from snapgen.export.inspect import describe, report
from snapgen.export.interpreter import Program
from snapgen.export.options import Options
from snapgen.export.parts import Decoder, Feature, Part
from snapgen.export.text import TextEncoder
from snapgen.export.tools import ExportError, PackageError, ParityError, coremltools
from snapgen.pipeline import SnapGenPipeline
from snapgen.sampler import make_scheduler
from snapgen.text import build_tiny_text
from snapgen.unet import SnapGenUNet
from tests.weights import random_weights

pytestmark = pytest.mark.export

FILES = {"denoiser": "Unet.mlpackage", "decoder": "VAEDecoder.mlpackage", "text_encoder": "TextEncoder.mlpackage"}
BESIDE = {"Golden.safetensors", "Export.json"}
UNET = dict(
    sample_size=8, in_channels=4, channels=(16, 32), num_heads=(1, 2), head_dim=16, layers_per_block=1,
    transformer_layers_down=(1, 0), transformer_layers_mid=1, transformer_layers_up=(0, 1),
    self_attention=(False, True), temb_dim=32, context_dim=32, pooled_dim=32, norm_groups=8,
)  # fmt: skip


def make_pipe(**changes: object) -> SnapGenPipeline:
    torch.manual_seed(0)
    words = sorted({word for skill in shapes.SKILLS for text in shapes.captions(skill) for word in text.split()})
    tokenizer, text_encoder = build_tiny_text(words, hidden_size=32, layers=1, heads=2, max_tokens=16)
    decoder = TinyDecoder(
        latent_channels=4, channels=(16, 16, 8, 8), blocks=(1, 1, 1, 1), norm_groups=8, scaling_factor=1.3,
        shift_factor=0.1,
    )  # fmt: skip
    return SnapGenPipeline(
        random_weights(SnapGenUNet(**{**UNET, **changes})),
        random_weights(decoder),
        make_scheduler(),
        random_weights(text_encoder),
        tokenizer,
        encoder=random_weights(TinyEncoder(latent_channels=4, channels=(16, 8), blocks=(1, 1), norm_groups=8)),
        joint_text=True,
    )


@pytest.fixture(scope="module")
def pipe() -> SnapGenPipeline:
    return make_pipe()


@pytest.fixture(scope="module")
def exported(pipe, tmp_path_factory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("export")
    return out, export_pipeline(pipe, out)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


# --- what is written ------------------------------------------------------------------------------------------------


def test_packages_hold_the_model(exported):
    out, found = exported
    assert {path.name for path in out.iterdir()} == {*FILES.values(), *BESIDE, "vocab.json"}
    assert found["target"] == "iOS17" and found["batch"] == 2
    for name, file in FILES.items():
        part = found["parts"][name]
        assert part["psnr"] >= parity.FLOORS[name] == part["floor"]
        (entry,) = part["packages"]
        assert entry == describe(out / file)
        assert entry["system"] == "iOS17" and entry["kind"] == "mlProgram"
        metadata = entry["metadata"]
        assert metadata["description"].startswith("SnapGen") and metadata["license"] == "Apache-2.0"
        assert metadata["author"] and metadata["version"]
        assert all(feature["about"] for feature in entry["inputs"] + entry["outputs"])


def test_borders_are_those_of_the_pipeline(exported):
    _, found = exported

    def borders(name: str, side: str) -> dict:
        return {f["name"]: (f["shape"], f["dtype"]) for f in found["parts"][name]["packages"][0][side]}

    assert borders("denoiser", "inputs") == {
        "sample": ([2, 4, 8, 8], "float16"),
        "timestep": ([2], "float32"),
        "encoder_hidden_states": ([2, 32, 1, 16], "float16"),
        "encoder_attention_mask": ([2, 1, 1, 16], "float16"),
        "pooled_projections": ([2, 32], "float16"),
    }
    assert borders("denoiser", "outputs") == {"velocity": ([2, 4, 8, 8], "float16")}
    assert borders("decoder", "inputs") == {"z": ([1, 4, 8, 8], "float16")}
    assert borders("decoder", "outputs") == {"image": ([1, 3, 64, 64], "float16")}
    assert borders("text_encoder", "inputs") == {"input_ids": ([1, 16], "int32")}
    assert borders("text_encoder", "outputs") == {
        "last_hidden_state": ([1, 16, 32], "float16"),
        "pooled_outputs": ([1, 32], "float16"),
    }


def test_weights_are_fp16_and_complete(exported, pipe):
    _, found = exported
    parts = {"denoiser": pipe.denoiser, "decoder": pipe.decoder, "text_encoder": pipe.text_encoder}
    for name, module in parts.items():
        weights = found["parts"][name]["packages"][0]["weights"]
        # All but a few biases of fewer than ten numbers, which Core ML keeps in the program itself.
        assert weights["float16"]["elements"] > 0.97 * sum(p.numel() for p in module.parameters())
        assert weights["float16"]["bytes"] == 2 * weights["float16"]["elements"]
        # The frequencies of the time embedding alone.
        assert weights.get("float32", {"elements": 0})["elements"] == (128 if name == "denoiser" else 0)


def test_the_packages_draw_the_pipeline_s_picture(exported, pipe):
    """Four guided steps and the decoder, by the packages alone, against the pipeline in fp32."""
    out, _ = exported
    text, unet, decoder = (Program(out / FILES[name]) for name in ("text_encoder", "denoiser", "decoder"))
    prompt, steps, guidance = "a red circle", 4, 4.0
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    wanted = pipe(prompt, num_inference_steps=steps, guidance_scale=guidance, latents=latents, output_type="pt").images

    states, masks, pooled = [], [], []
    for words in ("", prompt):
        tokens = pipe.tokenizer(words, padding="max_length", max_length=16, return_tensors="pt")
        outputs = text({"input_ids": tokens.input_ids})
        states.append(outputs["last_hidden_state"].permute(0, 2, 1)[:, :, None])
        masks.append(tokens.attention_mask[:, None, None])
        pooled.append(outputs["pooled_outputs"])
    for step in range(steps):
        t = 1 - step / steps
        velocity = unet(
            {
                "sample": latents.expand(2, -1, -1, -1),
                "timestep": torch.full((2,), 1000 * t),
                "encoder_hidden_states": torch.cat(states),
                "encoder_attention_mask": torch.cat(masks),
                "pooled_projections": torch.cat(pooled),
            }
        )["velocity"].float()
        latents = latents - torch.lerp(velocity[:1], velocity[1:], guidance) / steps
    picture = decoder({"z": latents})["image"].float().clamp(-1, 1)
    assert parity.psnr(picture, wanted) > 45


# --- the converter's traps ------------------------------------------------------------------------------------------


def test_no_trap_is_in_the_packages(exported):
    out, found = exported
    operations = set().union(*(entry["packages"][0]["operations"] for entry in found["parts"].values()))
    # Copied KV heads; 1 / (x + 1e-4) for a division; an upsampling before a depthwise convolution; norms as Core ML's
    # own operations, whose fp16 squares overflow.
    assert not operations & {"tile", "inverse", "upsample_nearest_neighbor", "layer_norm", "instance_norm", "l2_norm"}
    assert not operations & {"gather_nd", "scatter", "pow", "square"}
    # Two scores per query head and block: 1 head in stage 0; 2 heads, self- and cross-attention, mid and up stage 1.
    heads = 1 + 2 * 2 + 2 * (2 * 2)
    assert found["parts"]["denoiser"]["packages"][0]["operations"]["softmax"] == heads
    assert found["parts"]["denoiser"]["packages"][0]["operations"]["einsum"] == 2 * heads

    wide, ranks = [], set()

    def watch(operation: str, name: str, value: Tensor) -> None:
        ranks.add(value.ndim)
        if value.dtype == torch.float32:
            wide.append(operation)

    program = Program(out / FILES["denoiser"])
    program({name: torch.ones(shape) for name, (shape, _) in program.inputs.items()}, watch=watch)
    # Only the angles of the time embedding are wider than fp16: their product, sine and cosine.
    assert sorted(set(wide) - {"reshape"}) == ["cos", "mul", "sin"] and wide.count("mul") == 1
    assert max(ranks) <= 4


class Norms(Part):
    """Every norm of the export, alone: RMSNorm over the width, LayerNorm and GroupNorm over channels."""

    file, about = "Norms.mlpackage", "norms"

    def __init__(self) -> None:
        super().__init__()
        self.rms = modules.RMSNorm(16, 1e-6, dim=2)
        self.layer = modules.LayerNorm(16)
        self.group = modules.GroupNorm(4, 16, 1e-5)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.fill_(1.0)
            for bias in (self.layer.bias, self.group.bias):
                bias.zero_()
        x = torch.zeros(1, 16, 16, 8, dtype=torch.float16)
        self.inputs = (Feature("x", "x", x),)
        self.outputs = (("rms_out", "y"), ("layer_out", "y"), ("group_out", "y"))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = x.float()
        return self.rms(x).half(), self.layer(x).half(), self.group(x).half()


@pytest.fixture(scope="module")
def norms(tmp_path_factory) -> Program:
    package = tmp_path_factory.mktemp("norms") / "Norms.mlpackage"
    convert(Norms(), package, "iOS17")
    return Program(package)


@pytest.mark.parametrize("magnitude", [0.0, 1e-3, 3e-3, 0.03, 1.0, 300.0, 2e4])
def test_norms_hold_in_fp16_at_every_magnitude(norms, magnitude):
    """eps means eps where it decides (1e-3 is its root), squares above 255^2 do not overflow, zeros stay zeros."""
    x = (torch.randn(1, 16, 16, 8, generator=torch.Generator().manual_seed(2)).clamp(-1.5, 1.5) * magnitude).half()
    seen = []
    got = norms({"x": x}, watch=lambda operation, name, value: seen.append(value.isfinite().all()))
    assert all(seen)
    wide = x.double()
    rms = wide / (wide.square().mean(2, keepdim=True) + 1e-6).sqrt()
    layer = F.layer_norm(wide.movedim(1, -1), (16,), eps=1e-5).movedim(-1, 1)
    group = F.group_norm(wide, 4, eps=1e-5)
    # Six roundings of fp16 (2^-11 each) lie between input and output, and near zero x itself is coarse: 2^-25.
    coarse = 2.0**-25 / max(magnitude, 1e-3) + 1e-5
    for name, exact in (("rms_out", rms), ("layer_out", layer), ("group_out", group)):
        torch.testing.assert_close(got[name].double(), exact, rtol=6 * 2.0**-11, atol=4 * coarse + 2.0**-10)


def test_time_is_not_rounded_to_fp16(exported, pipe):
    """964.2857 and 964.5 are one number in fp16, and a fifth of a radian apart in the fastest sinusoid."""
    out, _ = exported
    program = Program(out / FILES["denoiser"])
    generator = torch.Generator().manual_seed(4)
    inputs = {name: torch.randn(shape, generator=generator) for name, (shape, _) in program.inputs.items()}
    inputs["encoder_attention_mask"] = torch.ones(2, 1, 1, 16)
    velocities = {}
    for time in (964.2857, 964.5):
        inputs["timestep"] = torch.full((2,), time)
        velocities[time] = program(inputs)["velocity"].float()
    context = inputs["encoder_hidden_states"][:, :, 0].mT
    with torch.no_grad(), snapgen_kernels.use("reference"):
        exact = {
            time: pipe.denoiser(inputs["sample"], time, context, None, inputs["pooled_projections"]).sample
            for time in velocities
        }
    assert parity.psnr(velocities[964.2857], exact[964.2857]) > parity.psnr(velocities[964.2857], exact[964.5]) + 10


# --- the modules that are converted ---------------------------------------------------------------------------------


def test_phases_are_upsampling_and_convolution():
    weight, x = torch.randn(5, 1, 3, 3).double(), torch.randn(2, 5, 4, 7).double()
    wanted = F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), weight, padding=1, groups=5)
    got = F.pixel_shuffle(F.conv2d(x, modules.phases(weight), padding=1, groups=5), 2)
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize(
    "changes", [{}, {"qk_norm": False}, {"rope": False, "pooled_dim": None}, {"conv": "separable"}]
)
def test_denoiser_in_exported_form_is_the_denoiser(changes):
    torch.manual_seed(0)
    unet = random_weights(SnapGenUNet(**{**UNET, **changes}))
    part = Denoiser(unet, batch=2, height=8, width=12, tokens=9)
    x, context = torch.randn(2, 4, 8, 12).half(), torch.randn(2, 9, 32).half()
    mask = torch.arange(9) < torch.tensor([[4], [9]])
    pooled = None if unet.config.pooled_dim is None else torch.randn(2, 32).half()
    timestep = torch.tensor([999.7, 31.2])
    with torch.no_grad(), snapgen_kernels.use("reference"):
        wanted = unet(x.float(), timestep, context.float(), mask, None if pooled is None else pooled.float()).sample
        inputs = {
            "sample": x,
            "timestep": timestep,
            "encoder_hidden_states": context.mT[:, :, None],
            "encoder_attention_mask": mask[:, None, None].half(),
        }
        got = part(**inputs, **({} if pooled is None else {"pooled_projections": pooled}))
    # The output alone is rounded to fp16.
    torch.testing.assert_close(got.float(), wanted, rtol=2.0**-11, atol=2e-5)


def test_decoder_and_text_in_exported_form_are_the_originals(pipe):
    z = torch.randn(2, 4, 5, 3).half()
    texts = ["two blue stars", "a red circle left of a green square"]
    tokens = pipe.tokenizer(texts, padding="max_length", max_length=12, return_tensors="pt")
    with torch.no_grad(), snapgen_kernels.use("reference"):
        got = Decoder(pipe.decoder, batch=2, height=5, width=3)(z)
        # In fp64: PyTorch's own GroupNorm is 1e-4 off in fp32 here, thirty times as far as the exported form.
        wanted = copy.deepcopy(pipe.decoder).double().decode(z.double())
        torch.testing.assert_close(got.double(), wanted, rtol=2.0**-11, atol=2e-5)

        text = pipe.text_encoder(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
        states, pooled = TextEncoder(pipe.text_encoder, batch=2, tokens=12)(tokens.input_ids.int())
    real = tokens.attention_mask.bool()
    torch.testing.assert_close(states.float()[real], text.last_hidden_state[real], rtol=2.0**-11, atol=2e-5)
    torch.testing.assert_close(pooled.float(), text.text_embeds, rtol=2.0**-11, atol=2e-5)


def test_the_first_of_several_end_tokens_counts(pipe):
    """CLIP-L pads with its end token."""
    ids = torch.tensor([[2, 5, 6, 3, 3, 3], [2, 3, 3, 3, 3, 3]], dtype=torch.int32)
    with torch.no_grad():
        _, pooled = TextEncoder(pipe.text_encoder, batch=2, tokens=6)(ids)
        wanted = pipe.text_encoder(input_ids=ids.long()).text_embeds
    torch.testing.assert_close(pooled.float(), wanted, rtol=2.0**-11, atol=2e-5)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (dict(conv="dense", rope=False), "dense"),
        (dict(kv_heads="all", rope=False), "kv_heads='all'"),
    ],
)
def test_steps_of_the_ablation_ladder_are_refused(flags, message):
    with pytest.raises(ExportError, match=message):
        Denoiser(SnapGenUNet(**{**UNET, **flags}), batch=2, height=8, width=8, tokens=16)


def test_latents_that_do_not_halve_are_refused(pipe):
    with pytest.raises(ExportError, match="latents of 8x9: height and width must be multiples of 2"):
        Denoiser(pipe.denoiser, batch=2, height=8, width=9, tokens=16)


# --- nothing half-done, nothing changed -----------------------------------------------------------------------------


def test_a_part_below_its_floor_leaves_nothing(pipe, tmp_path, monkeypatch):
    monkeypatch.setitem(parity.FLOORS, "decoder", 200.0)
    with pytest.raises(ParityError, match=r"decoder: the exported program is \d+\.\d dB .* the floor is 200 dB"):
        export_pipeline(pipe, tmp_path, Options(parts=("text_encoder", "decoder")))
    assert list(tmp_path.iterdir()) == []


def test_numbers_that_leave_fp16_fail_the_gate(pipe, tmp_path):
    """A weight beyond 65504 is inf in fp16."""
    broken = copy.deepcopy(pipe.decoder)
    with torch.no_grad():
        broken.conv_out.weight.mul_(1e7)
    parts = dict(pipe.components, decoder=broken)
    with pytest.raises(ParityError, match="decoder: the exported program is -inf dB"):
        export_pipeline(SnapGenPipeline(**parts, joint_text=True), tmp_path, Options(parts=("decoder",)))
    assert list(tmp_path.iterdir()) == []


def test_an_older_package_stays_until_a_later_export_holds(exported, pipe, tmp_path, monkeypatch):
    shutil.copytree(exported[0] / FILES["decoder"], tmp_path / FILES["decoder"])
    before = contents(tmp_path)
    real = coreml.convert

    def full_disk(part: Part, package: Path, target: str) -> None:
        if isinstance(part, TextEncoder):
            raise OSError(28, "No space left on device")
        real(part, package, target)

    monkeypatch.setattr(coreml, "convert", full_disk)
    with pytest.raises(OSError, match="No space left"):
        export_pipeline(pipe, tmp_path, Options(parts=("decoder", "text_encoder"), target="iOS18"))
    assert contents(tmp_path) == before
    monkeypatch.undo()

    found = export_pipeline(pipe, tmp_path, Options(parts=("decoder",), target="iOS18", batch=1))
    assert (
        found["parts"]["decoder"]["packages"][0]["system"] == describe(tmp_path / FILES["decoder"])["system"] == "iOS18"
    )
    assert {path.name for path in tmp_path.iterdir()} == {FILES["decoder"], *BESIDE}
    assert coreml.build_parts(pipe, "denoiser", Options(batch=1), 16)[0].inputs[0].example.shape == (1, 4, 8, 8)


def global_state() -> dict:
    return {
        "grad": torch.is_grad_enabled(),
        "dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "rng": torch.get_rng_state().tolist(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "mode": snapgen_kernels.backends()["mode"],
        "warnings": list(warnings.filters),
        "logging": {name: logging.getLogger(name).level for name in ("", "coremltools", "torch", "snapgen")},
        "streams": (sys.stdout, sys.stderr),
        "recursion": sys.getrecursionlimit(),
        "environment": dict(os.environ),
    }


def test_an_export_changes_nothing_and_says_nothing(pipe, tmp_path, capfd):
    pipe = copy.deepcopy(pipe)
    pipe.decoder.train().requires_grad_(True)
    pipe.decoder.conv_in.weight.grad = torch.ones_like(pipe.decoder.conv_in.weight)
    coremltools("converters.mil.frontend.milproto.load")  # what importing alone does is coremltools' own
    modules_before = {
        name: ({k: v.clone() for k, v in module.state_dict().items()}, [m.training for m in module.modules()])
        for name, module in pipe.components.items()
        if isinstance(module, nn.Module)
    }
    before = global_state()
    export_pipeline(pipe, tmp_path, Options(parts=("decoder", "text_encoder")))
    assert global_state() == before
    for name, (weights, training) in modules_before.items():
        module = pipe.components[name]
        assert [m.training for m in module.modules()] == training
        assert all(torch.equal(v, weights[k]) for k, v in module.state_dict().items())
        assert all(p.requires_grad for p in module.parameters())
    assert torch.equal(pipe.decoder.conv_in.weight.grad, torch.ones_like(pipe.decoder.conv_in.weight))
    assert all(p.grad is None for p in pipe.text_encoder.parameters())
    assert capfd.readouterr() == ("", "")


@pytest.mark.complete
@pytest.mark.slow
def test_a_repeat_in_another_process_gives_the_same_bytes(exported, tmp_path):
    """Other hash seeds, other memory addresses. And importing the export alone imports no coremltools."""
    out, _ = exported
    script = (
        "import sys, torch; torch.set_num_threads(1)\n"
        "from snapgen.export.coreml import export_pipeline\n"
        "from snapgen.export.options import Options\n"
        "assert 'coremltools' not in sys.modules\n"
        "from tests.test_export import make_pipe\n"
        "export_pipeline(make_pipe(), sys.argv[1], Options(parts=('denoiser',)))\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "PYTHONHASHSEED": "12345", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    repeated = contents(tmp_path / FILES["denoiser"])
    assert repeated == contents(out / FILES["denoiser"])
    assert len(repeated) == 3  # manifest, model, weights


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            dict(parts=("unet",)),
            "parts: unknown part 'unet'; choose from denoiser, decoder, text_encoder, text_encoder_2, ",
        ),
        (dict(parts=("decoder", "decoder")), "names one twice"),
        (dict(target="iOS15"), "target: got 'iOS15'; allowed are iOS17, iOS18"),
        (dict(batch=3), "batch: got 3; allowed are 1 and 2"),
        (dict(steps=0), "steps: got 0; must be at least 1"),
        (dict(query_chunk=-1), "query_chunk: got -1; must be at least 1"),
    ],
)
def test_bad_arguments_are_named(pipe, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        export_pipeline(pipe, tmp_path / "out", Options(**arguments))
    assert not (tmp_path / "out").exists()


def test_without_coremltools_it_says_how_to_get_it(pipe, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "coremltools", None)
    with pytest.raises(ExportError, match=r"coremltools, which is not installed: pip install 'snapgen\[export\]'"):
        export_pipeline(pipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def package(exported, tmp_path) -> Path:
    return Path(shutil.copytree(exported[0] / FILES["decoder"], tmp_path / "P.mlpackage"))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def inner(package: Path, name: str) -> Path:
    return package / "Data" / "com.apple.CoreML" / name


def newer_format(package: Path) -> None:
    file = inner(package, "model.mlmodel")
    spec = coremltools("proto.Model_pb2").Model()
    spec.ParseFromString(file.read_bytes())
    spec.specificationVersion = 99
    file.write_bytes(spec.SerializeToString())


def foreign_manifest(package: Path) -> None:
    (package / "Manifest.json").write_text(json.dumps({"name": "something else"}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "no such package"),
        (lambda p: (p / "Manifest.json").unlink(), r"not a Core ML package \(it holds no Manifest.json\)"),
        (lambda p: cut(p / "Manifest.json"), "its Manifest.json is truncated or not of a Core ML package"),
        (foreign_manifest, "its Manifest.json is truncated or not of a Core ML package"),
        (lambda p: inner(p, "model.mlmodel").unlink(), "its model file .*model.mlmodel is missing"),
        (lambda p: cut(inner(p, "model.mlmodel")), "model.mlmodel is truncated or no Core ML model"),
        (lambda p: inner(p, "model.mlmodel").write_bytes(b""), "model.mlmodel holds no model; it is truncated"),
        (lambda p: cut(inner(p, "weights/weight.bin")), "its weight file weight.bin is truncated or damaged"),
        (lambda p: shutil.rmtree(inner(p, "weights")), "its weight file weight.bin is missing"),
        (newer_format, r"its format is number 99, the newest known here is 10 \(iOS26\)"),
    ],
)
def test_a_damaged_or_foreign_package_is_refused(package, damage, message):
    damage(package)
    for reader in (describe, Program):
        with pytest.raises(PackageError, match=message):
            reader(package)


def test_a_file_is_no_package(tmp_path):
    file = tmp_path / "model.mlmodel"
    file.write_bytes(b"anything")
    with pytest.raises(PackageError, match=r"not a Core ML package"):
        describe(file)


# --- the command ----------------------------------------------------------------------------------------------------


def test_the_command_shows_progress_and_contents(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "checkpoint")
    console = Console(file=StringIO(), width=100, force_terminal=True)
    found = main_coreml(str(tmp_path / "checkpoint"), tmp_path / "out", Options(parts=("decoder",)), console=console)
    text = console.file.getvalue()
    for expected in ("checking the decoder", "VAEDecoder.mlpackage", "1x4x8x8", "pixel_shuffle", "(floor 55)"):
        assert expected in text
    assert f"{found['parts']['decoder']['psnr']:.1f} dB" in text
    assert f"wrote {tmp_path / 'out'}" in text


def test_an_out_that_cannot_be_written_to_is_named(pipe, tmp_path):
    (tmp_path / "file").write_text("here already")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ExportError, match=rf"out: got {out}; must be a folder that can be written to \(.+\)"):
            export_pipeline(pipe, out, Options(parts=("decoder",)))
    assert (tmp_path / "file").read_text() == "here already"


def test_a_description_fits_80_columns(exported):
    out, _ = exported
    console = Console(file=StringIO(), width=80)
    report([describe(out / file) for file in FILES.values()], console)
    text = console.file.getvalue()
    assert "encoder_attention_mask" in text and "TextEncoder.mlpackage" in text and "…" not in text
