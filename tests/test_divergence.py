"""The report of layers: it names the layer at which a package's numbers leave the model's, and covers all layers."""

import copy
import json
import shutil
from io import StringIO

import pytest
import torch
from rich.console import Console

pytest.importorskip("coremltools", reason="the Core ML export is an optional part")

import test_export_text as large
from test_export import make_pipe

from snapgen import cli
from snapgen.export import divergence, names
from snapgen.export.convert import convert
from snapgen.export.coreml import build_parts, text_tokens
from snapgen.export.gemma import gemma_chunks
from snapgen.export.inspect import read_spec
from snapgen.export.options import DEFAULTS, Options
from snapgen.export.tools import ExportError, coremltools, quiet
from snapgen.pipeline import SnapGenPipeline

pytestmark = pytest.mark.export


@pytest.fixture(scope="module")
def pipe():
    return make_pipe()


def save(pipe, name, folder, options=DEFAULTS):
    """The part's package, without the parity gate."""
    (part,) = build_parts(pipe, name, options, text_tokens(pipe))
    convert(part, folder / part.file, "iOS17")
    return folder / part.file


@pytest.fixture(scope="module")
def decoder(pipe, tmp_path_factory):
    return save(pipe, "decoder", tmp_path_factory.mktemp("decoder"))


@pytest.fixture(scope="module")
def planted(pipe, tmp_path_factory):
    """A denoiser's package, one of whose layers has a weight of another value."""
    other = copy.deepcopy(pipe.denoiser)
    with torch.no_grad():
        other.up[1].layers[0].res.conv1.pointwise.weight[3] += 1.0
    wrong = SnapGenPipeline(**dict(pipe.components, denoiser=other), joint_text=True)
    package = save(wrong, "denoiser", tmp_path_factory.mktemp("planted"))
    return package, divergence.compare(package, pipe, case=1)


def test_a_wrong_weight_is_found(planted):
    _, report = planted
    first, second, *_ = divergence.worst(report)
    assert first["name"] == "up.1.layers.0.res.conv1.pointwise"
    # Nothing else has an error of its own beyond fp16's, though all that follows is off.
    assert divergence.decibels(first["own"]) < 45 < divergence.decibels(second["own"]) - 5
    totals = {layer["name"]: divergence.decibels(layer["total"]) for layer in report["layers"]}
    assert totals["up.1.layers.0.res.conv1.depthwise"] > 55
    assert totals["up.1.layers.0.res.conv1.pointwise"] < 45 and totals["conv_out"] < 45
    assert report["outputs"]["velocity"]["psnr"] < 45


def test_every_layer_of_the_denoiser_is_compared(planted, pipe):
    package, report = planted
    assert report["form"] > 60 and report["part"] == "denoiser" and "t = 0.714" in report["case"]
    compared = [layer["name"] for layer in report["layers"]]
    # Every layer with weights of its own; the trained model calls them by the same names.
    holders = {name.rpartition(".")[0] for name in pipe.denoiser.state_dict()}
    assert holders <= set(compared)
    assert report["skipped"] == {}
    # In order of execution.
    order = ["conv_in", "down.0.layers.0.res.conv1.depthwise", "mid.res1.conv2", "up.1.layers.0.res.conv1", "conv_out"]
    assert sorted(order, key=compared.index) == order
    assert set(names.read(read_spec(package)[0])) == set(compared)


def test_the_decoder_names_the_layer_that_overflows(pipe, tmp_path):
    broken = copy.deepcopy(pipe.decoder)
    with torch.no_grad():
        broken.stages[1][0].pointwise1.weight.mul_(2e5)  # still within fp16; what it makes is not
    loud = SnapGenPipeline(**dict(pipe.components, decoder=broken), joint_text=True)
    report = divergence.compare(save(loud, "decoder", tmp_path), loud)
    first = divergence.worst(report)[0]
    assert first["name"] == "stages.1.0.pointwise1"
    assert first["own"] == {"psnr": None, "relative": None, "max": None, "finite": False}
    assert report["outputs"]["image"]["finite"] is False

    console = Console(file=StringIO(), width=100)
    divergence.show(report, console)
    text = console.file.getvalue()
    assert text.index("stages.1.0.pointwise1") < text.index("in order of execution")
    assert "overflow" in text and "#" * divergence.BAR in text


@pytest.mark.complete
def test_chunks_name_their_layers_as_the_denoiser_does(planted, pipe, tmp_path):
    """Both halves together compare what the whole package compares, and the planted weight is found in its half."""
    _, whole = planted
    options = Options(chunks=True)
    wrong = copy.deepcopy(pipe.denoiser)
    with torch.no_grad():
        wrong.up[1].layers[0].res.conv1.pointwise.weight[3] += 1.0
    other = SnapGenPipeline(**dict(pipe.components, denoiser=wrong), joint_text=True)
    halves = []
    for part in build_parts(other, "denoiser", options, text_tokens(other)):
        convert(part, tmp_path / part.file, "iOS17")
        halves.append(divergence.compare(tmp_path / part.file, pipe, options, case=1))
    named = [[layer["name"] for layer in half["layers"]] for half in halves]
    assert all(named) and not set(named[0]) & set(named[1])
    assert named[0] + named[1] == [layer["name"] for layer in whole["layers"]]
    assert "down.0.layers.0.res.conv1.pointwise" in named[0] and "up.1.layers.0.res.conv2" in named[1]
    assert divergence.worst(halves[1])[0]["name"] == "up.1.layers.0.res.conv1.pointwise"
    assert all(half["skipped"] == {} for half in halves)
    assert min(divergence.decibels(layer["own"]) for layer in halves[0]["layers"]) > 45


@pytest.fixture(scope="module")
def large_pipe():
    return large.pipe._get_wrapped_function()()


def test_text_encoders_are_covered(pipe, large_pipe, tmp_path):
    for source, name, holders in (
        (pipe, "text_encoder", pipe.text_encoder),
        (large_pipe, "text_encoder_2", large_pipe.text_encoder_2),
    ):
        report = divergence.compare(save(source, name, tmp_path), source, case=2)
        assert report["part"] == name and min(f["psnr"] for f in report["outputs"].values()) > 45
        compared = {layer["name"] for layer in report["layers"]}
        wanted = {key.rpartition(".")[0] for key in holders.state_dict()}
        # The table of positions is added as it is; no layer is called.
        assert wanted - compared == {"text_model.embeddings.position_embedding"}
        assert min(divergence.decibels(layer["own"]) for layer in report["layers"]) > 45


def test_a_chunk_of_gemma_alone(large_pipe, tmp_path, monkeypatch):
    """The second of two packages, with a wrong weight; its inputs come from the first one's form."""
    model = large_pipe.text_encoder_3
    budget = 2 * sum(parameter.numel() for parameter in model.layers[0].parameters()) + 40
    monkeypatch.setattr("snapgen.export.coreml.gemma_chunks", lambda *a, **k: gemma_chunks(*a, **k, budget=budget))
    wrong = copy.deepcopy(model)
    with torch.no_grad():
        wrong.layers[2].mlp.up_proj.weight[0] += 1.0
    chunk = gemma_chunks(wrong, batch=1, tokens=large.GEMMA_TOKENS, budget=budget)[1]
    convert(chunk, tmp_path / chunk.file, "iOS17")
    report = divergence.compare(tmp_path / chunk.file, large_pipe)
    assert divergence.worst(report)[0]["name"] == "layers.2.mlp.up_proj"
    assert {"layers.1", "layers.2.self_attn.q_proj", "norm"} <= {layer["name"] for layer in report["layers"]}


def test_a_compressed_package_shows_its_coarsest_layers(pipe, decoder, tmp_path):
    plain = divergence.compare(decoder, pipe)
    ct = coremltools()
    with quiet():
        model = ct.models.MLModel(str(decoder), skip_model_load=True)
        small = ct.optimize.coreml
        config = small.OptimizationConfig(small.OpLinearQuantizerConfig(mode="linear_symmetric", weight_threshold=64))
        package = tmp_path / decoder.name
        small.linear_quantize_weights(model, config).save(str(package))
    report = divergence.compare(package, pipe)
    assert [layer["name"] for layer in report["layers"]] == [layer["name"] for layer in plain["layers"]]
    before = {layer["name"]: divergence.decibels(layer["own"]) for layer in plain["layers"]}
    worst = divergence.worst(report)[0]
    assert "pointwise" in worst["name"] or "conv" in worst["name"] or "depthwise" in worst["name"]
    assert divergence.decibels(worst["own"]) < before[worst["name"]] - 10
    # A norm is not compressed: its own error stays fp16's.
    norms = [layer for layer in report["layers"] if layer["kind"] == "GroupNorm"]
    assert norms and all(divergence.decibels(layer["own"]) > 55 for layer in norms)


def test_the_command_writes_what_it_prints(pipe, decoder, tmp_path, capsys, monkeypatch):
    pipe.save_pretrained(tmp_path / "checkpoint")
    monkeypatch.setattr(cli, "console", Console(width=100))
    out = tmp_path / "report.json"
    cli.main(["export", "compare", str(decoder), str(tmp_path / "checkpoint"), "--case", "1", "--out", str(out)])
    text = capsys.readouterr().out
    report = json.loads(out.read_text())
    assert "worst layers by their own error" in text and divergence.worst(report)[0]["name"] in text
    assert report["part"] == "decoder" and report["form"] > 60


def test_packages_that_do_not_fit_are_refused(pipe, large_pipe, decoder, tmp_path):
    with pytest.raises(ValueError, match="case: got 4; there are 4, from 0"):
        divergence.compare(decoder, pipe, case=4)
    with pytest.raises(ExportError, match="no part of the checkpoint does with these options"):
        divergence.compare(decoder, large_pipe)
    old = shutil.copytree(decoder, tmp_path / decoder.name)
    spec, _ = read_spec(old)
    del spec.description.metadata.userDefined[names.KEY]
    (old / "Data" / "com.apple.CoreML" / "model.mlmodel").write_bytes(spec.SerializeToString())
    with pytest.raises(ExportError, match="does not say which of its values belong to which layer; export it again"):
        divergence.compare(old, pipe)
