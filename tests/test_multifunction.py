"""Several shapes in one package: each function is right, weights stand once, and one shape stays what it was."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("coremltools", reason="the Core ML export is an optional part")

from snapgen.decoder import TinyDecoder
from snapgen.export import parity
from snapgen.export.compress import compress
from snapgen.export.convert import convert
from snapgen.export.coreml import build_parts, export_pipeline
from snapgen.export.inspect import describe, read_spec
from snapgen.export.interpreter import Program
from snapgen.export.multifunction import functions, join, latent_size
from snapgen.export.options import Compression, Options
from snapgen.export.tools import PackageError
from snapgen.export.verify import verify
from snapgen.pipeline import SnapGenPipeline
from tests.test_compress import wide_pipe
from tests.test_export import contents, make_pipe
from tests.test_verify import FAKE, _worker_finds_snapgen  # noqa: F401 - a fixture of its own module
from tests.weights import random_weights

pytestmark = [pytest.mark.export, pytest.mark.complete]  # minutes, of conversions

UNET, DECODER = "Unet.mlpackage", "VAEDecoder.mlpackage"


@pytest.fixture(scope="module")
def pipe() -> SnapGenPipeline:
    """A picture of 64x64 pixels; sizes are multiples of 16."""
    return make_pipe(channels=(16, 16), num_heads=(1, 1), transformer_layers_down=(0, 0), transformer_layers_up=(0, 0))


@pytest.fixture(scope="module")
def batches(pipe, tmp_path_factory) -> tuple[Path, dict]:
    """A denoiser with guidance in one call and without."""
    out = tmp_path_factory.mktemp("batches")
    return out, export_pipeline(pipe, out, Options(parts=("denoiser",), target="iOS18", batches=(2, 1)))


@pytest.fixture(scope="module")
def sizes(pipe, tmp_path_factory) -> tuple[Path, dict[str, Path]]:
    """Decoders of one size each, wide enough to be compressed, and what they are joined to."""
    out = tmp_path_factory.mktemp("sizes")
    decoder = TinyDecoder(latent_channels=4, channels=(64, 64, 48, 48), blocks=(1, 1, 1, 1), norm_groups=8)
    pipe = SnapGenPipeline(**dict(pipe.components, decoder=random_weights(decoder)), joint_text=True)
    options = Options(parts=("decoder",), target="iOS18", sizes=("64x64", "48x96"))
    singles = {}
    for name, choice in functions(pipe, "decoder", options).items():
        (part,) = build_parts(pipe, "decoder", choice, 16)
        singles[name] = out / f"{name}.mlpackage"
        convert(part, singles[name], "iOS18")
    join(singles, part, out / DECODER)
    return out, singles


def test_functions_are_named_by_what_differs(pipe):
    def names(part: str, **changes: object) -> list[str]:
        return list(functions(pipe, part, Options(target="iOS18", **changes)))

    assert names("denoiser") == names("decoder") == names("text_encoder") == ["main"]
    assert names("denoiser", batches=(1,)) == names("denoiser", sizes=("64x64",)) == ["main"]
    assert names("denoiser", batches=(2, 1)) == ["batch_2", "batch_1"]
    assert names("decoder", sizes=("64x64", "48x96")) == ["size_64x64", "size_48x96"]
    both = dict(sizes=("64x64", "48x96"), batches=(1, 2))
    assert names("denoiser", **both) == [f"batch_{b}_size_{s}" for b in (1, 2) for s in ("64x64", "48x96")]
    assert names("decoder", **both) == ["size_64x64", "size_48x96"] and names("text_encoder", **both) == ["main"]
    chosen = functions(pipe, "denoiser", Options(target="iOS18", **both))["batch_2_size_48x96"]
    assert chosen.batch == 2 and latent_size(pipe, chosen) == (6, 12)
    (part,) = build_parts(pipe, "denoiser", chosen, 16)
    assert part.inputs[0].example.shape == (2, 4, 6, 12)


def test_every_batch_holds_and_says_so(batches):
    out, found = batches
    checked = found["parts"]["denoiser"]["functions"]
    assert list(checked) == ["batch_2", "batch_1"]
    for function in checked.values():
        assert len(function["figures"]) == len(parity.TIMES) and len(function["golden"]) == 1
        assert min(function["figures"].values()) == function["psnr"] >= parity.FLOORS["denoiser"]
    assert found["parts"]["denoiser"]["psnr"] == min(it["psnr"] for it in checked.values())
    record = json.loads((out / "Export.json").read_text())
    assert record["options"]["batches"] == [2, 1] and set(record["parts"]["denoiser"]["functions"]) == set(checked)


def test_weights_stand_once(batches, pipe):
    """Two functions, one set of weights; only small constants of shapes may differ."""
    out, _ = batches
    found = describe(out / UNET)
    parameters = sum(p.numel() for p in pipe.denoiser.parameters())
    # The upsampling's kernels have four phases, and tables of the rotation come on top.
    assert 0.95 * parameters < found["weights"]["float16"]["elements"] < 1.1 * parameters
    stored = (out / UNET / "Data" / "com.apple.CoreML" / "weights" / "weight.bin").stat().st_size
    assert stored < 1.3 * 2 * parameters  # each tensor has a head and is aligned to 64 bytes


def test_a_package_of_functions_is_described_by_function(batches):
    out, _ = batches
    found = describe(out / UNET)
    assert found["system"] == "iOS18" and found["function"] == "batch_2"
    assert list(found["functions"]) == ["batch_2", "batch_1"]
    two, one = found["functions"]["batch_2"], found["functions"]["batch_1"]
    assert two["flops"] == 2 * one["flops"] > 0 and two["operations"] == one["operations"]
    assert [feature["shape"] for feature in one["inputs"]] == [[1, *feature["shape"][1:]] for feature in two["inputs"]]
    assert all(feature["about"] for feature in (*one["inputs"], *one["outputs"]))
    assert {key: found[key] for key in two} == two
    assert found["metadata"]["description"].startswith("SnapGen") and found["metadata"]["license"] == "Apache-2.0"


def test_two_calls_of_one_are_one_call_of_two(batches):
    out, _ = batches
    two, one = Program(out / UNET), Program(out / UNET, "batch_1")
    generator = torch.Generator().manual_seed(6)
    inputs = {name: torch.rand(shape, generator=generator) for name, (shape, _) in two.inputs.items()}
    together = two(inputs)["velocity"]
    apart = [one({name: value[row : row + 1] for name, value in inputs.items()})["velocity"] for row in (0, 1)]
    torch.testing.assert_close(torch.cat(apart).float(), together.float(), rtol=2.0**-9, atol=2.0**-9)
    with pytest.raises(PackageError, match=r"has no function 'main'; there are \['batch_1', 'batch_2'\]"):
        Program(out / UNET, "main")


def test_joined_functions_are_the_packages_they_came_from(sizes):
    """To the bit; and joining them again gives the same bytes."""
    out, singles = sizes
    found = describe(out / DECODER)
    assert list(found["functions"]) == list(singles) and found["function"] == "size_64x64"
    for name, single in singles.items():
        program, alone = Program(out / DECODER, name), Program(single)
        assert program.inputs == alone.inputs
        z = torch.randn(program.inputs["z"][0], generator=torch.Generator().manual_seed(1))
        assert torch.equal(program({"z": z})["image"], alone({"z": z})["image"])
        described = describe(single)
        assert found["functions"][name] == described["functions"]["main"]
        assert found["weights"]["float16"]["elements"] <= described["weights"]["float16"]["elements"]
    # 64x64 and 48x96 pixels: 9/8 of the convolutions.
    flops = [found["functions"][name]["flops"] for name in singles]
    assert flops[1] * 8 == flops[0] * 9
    again = out / "again" / DECODER
    (part,) = build_parts(make_pipe(), "decoder", Options(), 16)
    join(singles, part, again)
    assert contents(again) == contents(out / DECODER)
    assert read_spec(again)[0].description.defaultFunctionName == "size_64x64"


@pytest.mark.parametrize("form", ["palette-6", "int8"])
def test_compressed_functions_are_the_compressed_packages_they_came_from(sizes, pipe, tmp_path, form):
    """To the bit, and the compressed weights stand once."""
    out, singles = sizes
    how, joined = Compression.parse(form), Path(shutil.copytree(out / DECODER, tmp_path / DECODER))
    compressed = compress("decoder", [joined], how, "iOS18", pipe, 16)
    assert compressed["weight_bytes"] < 0.8 * compressed["fp16_bytes"]
    assert list(describe(joined)["functions"]) == list(singles)
    for name, single in singles.items():
        alone = Path(shutil.copytree(single, tmp_path / single.name))
        apart = compress("decoder", [alone], how, "iOS18", pipe, 16)
        forms = [{layer["name"]: layer["form"] for layer in found["layers"]} for found in (compressed, apart)]
        assert forms[0] == forms[1] and set(forms[0].values()) == {form}
        weights = describe(joined)["functions"][name]["operations"]
        assert weights == describe(alone)["functions"]["main"]["operations"]
        program, reference = Program(joined, name), Program(alone)
        z = torch.randn(program.inputs["z"][0], generator=torch.Generator().manual_seed(1))
        assert torch.equal(program({"z": z})["image"], reference({"z": z})["image"])
        assert not torch.equal(program({"z": z})["image"], Program(single)({"z": z})["image"])
    # One function's weights, and the other's constants of its shape.
    assert compressed["weight_bytes"] < 1.05 * apart["weight_bytes"]


def test_functions_of_chunks_share_a_budget(tmp_path):
    """A budget for both batches and both halves; each function holds its floor and is verified."""
    options = Options(parts=("denoiser",), target="iOS18", batches=(2, 1), chunks=True, steps=4, compress="mixed:600KB")
    entry = export_pipeline(wide_pipe(), tmp_path, options)["parts"]["denoiser"]
    files = sorted(tmp_path.rglob("weight.bin"))
    assert len(files) == 2
    assert sum(file.stat().st_size for file in files) == entry["compression"]["weight_bytes"] <= 600_000
    assert entry["compression"]["weight_bytes"] > 0.97 * 600_000
    assert {layer["package"] for layer in entry["compression"]["layers"]} == {
        "UnetChunk1.mlpackage",
        "UnetChunk2.mlpackage",
    }
    assert list(entry["functions"]) == ["batch_2", "batch_1"]
    figures = [function["psnr"] for function in entry["functions"].values()]
    assert min(figures) == entry["psnr"] >= entry["floor"] == parity.COMPRESSED_FLOORS["mixed"]["denoiser"]
    # The weights are the same: what differs between the functions is whose caption is in the call.
    assert abs(figures[0] - figures[1]) < 3
    assert abs(entry["psnr"] - entry["compression"]["expected_psnr"]) < 6
    found = verify(tmp_path)
    assert found["holds"] and [it["function"] for it in found["results"]] == ["batch_1", "batch_2"]


def test_every_function_is_verified(batches):
    out, _ = batches
    found = verify(out)
    assert found["holds"] and [it["function"] for it in found["results"]] == ["batch_1", "batch_2"]
    assert all(it["psnr"] >= it["floor"] for it in found["results"])
    # And on a Mac, where a function is loaded by its name.
    found = verify(out, worker=(sys.executable, str(FAKE), ""), units=("CPU_AND_NE",), repeats=1)
    assert found["holds"] and [it["function"] for it in found["results"]] == ["batch_1", "batch_2"]
    assert all(it["packages"][0]["residency"]["operations"] == 4 for it in found["results"])


def test_one_size_that_is_not_the_trained_one(pipe, tmp_path):
    found = export_pipeline(pipe, tmp_path, Options(parts=("decoder",), height=32, width=80))
    (package,) = found["parts"]["decoder"]["packages"]
    assert package["system"] == "iOS17" and list(package["functions"]) == ["main"]
    assert package["inputs"][0]["shape"] == [1, 4, 4, 10] and package["outputs"][0]["shape"] == [1, 3, 32, 80]
    assert found["parts"]["decoder"]["psnr"] >= parity.FLOORS["decoder"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(sizes=("64x64", "48x96")), "sizes: several functions in one package need target iOS18; got iOS17"),
        (dict(batches=(1, 2)), "batches: several functions in one package need target iOS18; got iOS17"),
        (dict(batches=(1, 3), target="iOS18"), "batches: got 3; allowed are 1 and 2"),
        (dict(batches=(1, 1), target="iOS18"), "batches: 1, 1 names one twice"),
        (dict(sizes=("64",)), "sizes: got '64'; a size is HEIGHTxWIDTH in pixels, such as 1024x768"),
        (dict(sizes=("0x64",)), "sizes: got '0x64'"),
        (dict(sizes=("64x64",), height=64), "sizes: leave out height and width"),
        (dict(sizes=("64x72",)), "sizes: got 64x72; both must be multiples of 16 pixels"),
        (dict(height=40), "height: got 40 pixels; must be a multiple of 16"),
        (dict(width=0), "width: got 0; must be at least 1"),
    ],
)
def test_bad_shapes_are_named(pipe, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        export_pipeline(pipe, tmp_path / "out", Options(**arguments))
    assert not (tmp_path / "out").exists()
