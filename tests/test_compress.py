"""Compressed packages: sizes, sensitivities against the truth, budgets, and the export of them."""

import itertools
import math
import re
import shutil
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn

pytest.importorskip("coremltools", reason="the Core ML export is an optional part")

from snapgen.export import inspect, parity, rewrite, sensitivity
from snapgen.export.command import main_coreml
from snapgen.export.compress import METADATA, allocate, compress
from snapgen.export.convert import convert
from snapgen.export.coreml import build_parts, export_pipeline
from snapgen.export.inspect import describe, report
from snapgen.export.interpreter import Program
from snapgen.export.options import Compression, Options
from snapgen.export.palette import Differences, palettize
from snapgen.export.tools import ExportError, ParityError
from snapgen.pipeline import SnapGenPipeline
from snapgen.unet import SnapGenUNet
from tests.test_export import UNET, contents, make_pipe, random_weights
from tests.test_rewrite import weight_file

pytestmark = [pytest.mark.export, pytest.mark.complete]  # minutes, of conversions

TOKENS = 16


def wide_pipe() -> SnapGenPipeline:
    """The export tests' pipeline with a denoiser wide enough that most of its weights can be compressed."""
    parts = dict(make_pipe().components)
    torch.manual_seed(1)
    unet = dict(UNET, channels=(32, 64), num_heads=(1, 2), head_dim=32, temb_dim=64)
    return SnapGenPipeline(**dict(parts, denoiser=random_weights(SnapGenUNet(**unet))), joint_text=True)


@pytest.fixture(scope="module")
def pipe() -> SnapGenPipeline:
    return wide_pipe()


@pytest.fixture(scope="module")
def fp16(pipe, tmp_path_factory) -> dict[str, Path]:
    """The denoiser in fp16 for each target."""
    out = tmp_path_factory.mktemp("fp16")
    (part,) = build_parts(pipe, "denoiser", Options(), TOKENS)
    found = {}
    for target in ("iOS17", "iOS18"):
        (out / target).mkdir()
        found[target] = out / target / part.file
        convert(part, found[target], target)
    return found


@pytest.fixture
def package(fp16, tmp_path):
    """A copy of the fp16 package of a target, to compress."""

    def of(target: str, name: str = "a") -> Path:
        return Path(shutil.copytree(fp16[target], tmp_path / name / target / fp16[target].name))

    return of


def mixed(package: Path, target: str, share: float) -> Compression:
    """A budget between the smallest size that is possible (0) and that of fp16 (1)."""
    found, full = rewrite.weights(package)
    smallest = {weight: rewrite.stored("palette-2", weight.shape, target) for weight in found}
    spared = sum(rewrite.stored("fp16", weight.shape, target) - size for weight, size in smallest.items())
    return Compression.parse(f"mixed:{(full - (1 - share) * spared) / 1000:.3f}KB")


# --- whole packages --------------------------------------------------------------------------------------------------


def test_norms_biases_and_depthwise_kernels_stay(pipe, fp16):
    found, _ = rewrite.weights(fp16["iOS17"])
    part = build_parts(pipe, "denoiser", Options(), TOKENS)[0]
    convolutions = [m for m in part.modules() if isinstance(m, nn.Conv2d) and m.groups == 1]
    large = [m.weight.detach() for m in convolutions if m.weight.numel() >= rewrite.SMALLEST]
    assert sorted(w.key for w in found) == sorted(rewrite.weight_key(w.numpy()) for w in large)
    assert len(found) > 20
    assert sum(w.elements for w in found) > 0.6 * sum(p.numel() for p in part.parameters())


@pytest.mark.parametrize("target", ["iOS17", "iOS18"])
@pytest.mark.parametrize("form", ["palette-8", "palette-6", "palette-4", "int8"])
def test_sizes_are_those_promised_and_told(package, pipe, form, target):
    path = package(target)
    before = describe(path)
    found = compress("denoiser", [path], Compression.parse(form), target, pipe, TOKENS)
    after = describe(path)
    bits = rewrite.bits_of(form)
    counted = after["weights"][form]
    layers = found["layers"]
    assert counted["count"] == len(layers) == len(rewrite.weights(package(target, "b"))[0])
    assert counted["elements"] == sum(math.prod(layer["shape"]) for layer in layers)
    assert sum(e["elements"] for e in after["weights"].values()) == sum(
        e["elements"] for e in before["weights"].values()
    )
    # Indices or integers to the byte; beside them a table of 2^bits per tensor, or per group and then a sixteenth at
    # most, or a scale (and for iOS17 an offset) per output channel.
    indices = sum(-(-math.prod(layer["shape"]) * bits // 8) for layer in layers)
    extra = counted["bytes"] - indices
    if form == "int8":
        assert extra == (3 if target == "iOS17" else 2) * sum(layer["shape"][0] for layer in layers)
    else:
        single = len(layers) * (2 << bits)
        assert extra == single if target == "iOS17" else single <= extra <= single + indices / 16
    # The file is what `stored` says to the last tensor's padding, and the rest of it stays as it was.
    file = weight_file(path).stat().st_size
    fixed = found["fp16_bytes"] - sum(rewrite.stored("fp16", layer["shape"], target) for layer in layers)
    assert found["weight_bytes"] == file
    assert abs(file - fixed - sum(layer["bytes"] for layer in layers)) < rewrite.HEAD
    kind = {"palette": "lut_to_dense", "int8": "affine_dequantize" if target == "iOS17" else "blockwise_shift_scale"}
    assert after["operations"][f"constexpr_{kind[form.split('-')[0]]}"] == len(layers)
    for key in ("inputs", "outputs", "flops", "format"):
        assert after[key] == before[key]
    assert after["metadata"]["user"][METADATA] == f"{form} ({len(layers)} {form})"
    assert {**after["metadata"], "user": None} == {**before["metadata"], "user": None}


def test_no_palette_meets_a_scale(package, pipe):
    """On top of a palette it makes MPSGraph abort at load (coremltools pull request 2688)."""
    path = package("iOS18")
    compress("denoiser", [path], Compression.parse("palette-4"), "iOS18", pipe, TOKENS)
    found = describe(path)["operations"]
    assert found["constexpr_lut_to_dense"] > 20
    assert [name for name in found if name.startswith("constexpr_")] == ["constexpr_lut_to_dense"]
    grouped = [op for op in inspect._operations(inspect.read_spec(path)[0]) if op.type == "constexpr_lut_to_dense"]
    tables = [inspect._shape(op.inputs["lut"].arguments[0].value.type)[0] for op in grouped]
    assert max(tables) > 1


def test_a_repeat_gives_the_same_bytes(package, pipe):
    for share, target in ((None, "iOS18"), (0.4, "iOS17")):
        made = []
        for name in ("a", "b"):
            path = package(target, name)
            how = Compression.parse("palette-6") if share is None else mixed(path, target, share)
            found = compress("denoiser", [path], how, target, pipe, TOKENS)
            made.append((contents(path), found))
        assert made[0] == made[1]


def test_compressed_weights_draw_nearly_the_same(package, fp16, pipe):
    """Each form is as far from fp16 as its bits say: 6 dB per bit, and grouped tables are no worse than single ones."""
    program = Program(fp16["iOS17"])
    generator = torch.Generator().manual_seed(4)
    inputs = {name: torch.randn(shape, generator=generator) for name, (shape, _) in program.inputs.items()}
    inputs["encoder_attention_mask"] = torch.ones(2, 1, 1, TOKENS)
    exact = program(inputs)["velocity"]
    figures = {}
    for target in ("iOS17", "iOS18"):
        for form in ("palette-8", "palette-6", "palette-4", "int8"):
            path = package(target, f"{form}-{target}")
            compress("denoiser", [path], Compression.parse(form), target, pipe, TOKENS)
            figures[form, target] = parity.psnr(Program(path)(inputs)["velocity"], exact)
    for target in ("iOS17", "iOS18"):
        four, six, eight = (figures[f"palette-{bits}", target] for bits in (4, 6, 8))
        assert 8 < six - four < 16 and 5 < eight - six < 16
        assert six < figures["int8", target] < eight + 3
    assert figures["palette-4", "iOS18"] > figures["palette-4", "iOS17"] - 1


# --- sensitivities ---------------------------------------------------------------------------------------------------


def test_sensitivities_are_the_true_errors(pipe, monkeypatch):
    """Of each layer alone, by running the denoiser with it compressed: order and size, a factor of 2 at most."""
    part, cases = sensitivity.part_and_cases("denoiser", pipe, TOKENS)
    weights = {
        rewrite.weight_key(p.detach().numpy()): p for p in part.parameters() if p.ndim == 4 and p.numel() >= 2048
    }
    differences = {key: Differences(p.detach().half().numpy(), {6: 1, 4: 1}) for key, p in weights.items()}
    found = sensitivity.squared_errors(part, cases, differences, probes=16)
    assert all(not p.requires_grad and p.grad is None for p in part.parameters())
    # Rounded to fp16, outputs hide the smallest errors.
    monkeypatch.setattr(torch.Tensor, "half", lambda tensor: tensor)
    with torch.no_grad():
        exact = [part(**case.inputs).double() for case in cases]
        estimated, true = [], []
        for key, parameter in list(weights.items())[::5]:
            before = parameter.clone()
            rounded = before.to(torch.float16)
            for choice, bits in enumerate((6, 4)):
                palette = palettize(rounded.numpy(), bits)
                change = torch.from_numpy(palette.lut[0].astype(np.float32)[palette.indices]) - rounded.float()
                parameter.copy_(before + change)
                moved = [part(**case.inputs).double() for case in cases]
                true.append(
                    np.mean(
                        [float((a - b).square().mean() / b.abs().max() ** 2) for a, b in zip(moved, exact, strict=True)]
                    )
                )
                estimated.append(found[key][choice])
                parameter.copy_(before)
    estimated, true = np.log(estimated), np.log(true)
    ranks = [np.argsort(np.argsort(values)) for values in (estimated, true)]
    assert np.corrcoef(*ranks)[0, 1] > 0.95
    # 128 samples tell an error to an eighth; what is beyond the first order comes on top.
    assert np.abs(estimated - true).max() < math.log(2)
    assert abs(np.mean(estimated - true)) < math.log(1.15)


@pytest.mark.parametrize("name", ["decoder", "text_encoder"])
def test_every_part_can_be_judged(pipe, name):
    part, cases = sensitivity.part_and_cases(name, pipe, TOKENS)
    key, parameter = max(
        ((rewrite.weight_key(p.detach().numpy()), p) for p in part.parameters() if p.ndim > 1),
        key=lambda it: it[1].numel(),
    )
    weights = parameter.detach().half().numpy()
    found = sensitivity.squared_errors(part, cases, {key: Differences(weights, {6: 1, 4: 1, 2: 1})}, probes=2)
    assert 0 < found[key][0] < found[key][1] < found[key][2] < 1


# --- budgets ---------------------------------------------------------------------------------------------------------


def test_the_allocation_is_the_best_one():
    """Against all 4^6 of them, for budgets from the smallest to the largest."""
    generator = np.random.default_rng(0)
    elements = np.array([9, 40, 3, 17, 25, 6])
    sizes = elements[:, None] * np.array([16, 8, 6, 4])
    errors = generator.random(6)[:, None] * 10 * np.array([0, 1, 16, 256.0]) * generator.uniform(0.5, 2, (6, 4))
    every = list(itertools.product(range(4), repeat=6))
    rows = np.arange(6)
    totals = [(sizes[rows, choice].sum(), errors[rows, choice].sum()) for choice in every]
    same = 0
    budgets = range(sizes[:, 3].sum(), sizes[:, 0].sum() + 1, 7)
    for budget in budgets:
        chosen = allocate(sizes, errors, budget)
        assert sizes[rows, chosen].sum() <= budget
        best = min(error for size, error in totals if size <= budget)
        found = errors[rows, chosen].sum()
        assert found <= 1.3 * best + 1e-12
        same += found <= best * (1 + 1e-9) + 1e-12
    assert same > 0.85 * len(budgets)
    assert allocate(sizes, errors, sizes[:, 0].sum()) == [0] * 6
    with pytest.raises(ValueError, match=rf"budget: got 399; the smallest choices take {sizes[:, 3].sum()} bytes"):
        allocate(sizes, errors, sizes[:, 3].sum() - 1)


@pytest.mark.parametrize("target", ["iOS17", "iOS18"])
def test_a_budget_is_kept_and_used(package, pipe, target):
    figures = []
    for share in (0.3, 0.6):
        path = package(target, str(share))
        budget = mixed(path, target, share)
        found = compress("denoiser", [path], budget, target, pipe, TOKENS)
        file = weight_file(path).stat().st_size
        assert file == found["weight_bytes"] <= budget.budget
        assert file > 0.98 * budget.budget
        forms = {layer["form"] for layer in found["layers"]}
        assert len(forms) > 2 and forms <= {"fp16", *(f"palette-{bits}" for bits in rewrite.PALETTES[target])}
        counted = describe(path)["weights"]
        for form in forms - {"fp16"}:
            assert counted[form]["count"] == sum(layer["form"] == form for layer in found["layers"])
        errors = sum(layer["error"] for layer in found["layers"])
        assert found["expected_psnr"] == pytest.approx(-10 * math.log10(errors))
        assert all((layer["error"] == 0) == (layer["form"] == "fp16") for layer in found["layers"])
        program = Program(path)
        cases = parity.make_cases(pipe, TOKENS, 8, 8)
        figures.append([figure for _, figure in parity.measure("denoiser", program, pipe, cases)])
        # The peaks of 4 cases differ, and the worst of them counts for the gate.
        assert abs(np.mean(figures[-1]) - found["expected_psnr"]) < 3
    assert min(figures[1]) > min(figures[0]) + 3


def test_a_budget_is_better_spent_than_on_all_alike(package, pipe):
    """In no more bytes than palette-4 takes, mixed bits come nearer."""
    cases = parity.make_cases(pipe, TOKENS, 8, 8)
    uniform, chosen = package("iOS17", "uniform"), package("iOS17", "chosen")
    size = compress("denoiser", [uniform], Compression.parse("palette-4"), "iOS17", pipe, TOKENS)["weight_bytes"]
    budget = Compression(f"mixed:{size}B", None, size)
    assert compress("denoiser", [chosen], budget, "iOS17", pipe, TOKENS)["weight_bytes"] <= size
    worst = [
        min(figure for _, figure in parity.measure("denoiser", Program(path), pipe, cases))
        for path in (uniform, chosen)
    ]
    assert worst[1] > worst[0] + 1


def test_a_budget_that_cannot_be_met_names_one_that_can(package, pipe):
    path = package("iOS17")
    before = contents(path)
    with pytest.raises(ExportError, match=r"compress: mixed:20KB is too small for the denoiser: .* takes \d") as told:
        compress("denoiser", [path], Compression.parse("mixed:20KB"), "iOS17", pipe, TOKENS)
    assert contents(path) == before
    size = re.search(r"it takes (\d+\.\d+) MB", str(told.value))[1]
    found = compress("denoiser", [path], Compression.parse(f"mixed:{size}MB"), "iOS17", pipe, TOKENS)
    assert found["weight_bytes"] <= float(size) * 1e6


def test_a_budget_above_fp16_compresses_nothing_and_says_so(package, pipe):
    path = package("iOS17")
    before = contents(path)
    found = compress("denoiser", [path], Compression.parse("mixed:1GB"), "iOS17", pipe, TOKENS)
    assert contents(path) == before and found["weight_bytes"] == found["fp16_bytes"]
    assert "nothing is compressed" in found["note"] and {layer["form"] for layer in found["layers"]} == {"fp16"}


# --- the export ------------------------------------------------------------------------------------------------------


def test_an_export_is_compressed_checked_and_told(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "checkpoint")
    console = Console(file=StringIO(), width=80)
    options = Options(parts=("denoiser", "decoder"), compress="palette-8")
    found = main_coreml(str(tmp_path / "checkpoint"), tmp_path / "out", options, console=console)["parts"]
    assert found["denoiser"]["psnr"] >= found["denoiser"]["floor"] == parity.COMPRESSED_FLOORS["palette-8"]["denoiser"]
    assert "compression" not in found["decoder"] and found["decoder"]["floor"] == parity.FLOORS["decoder"]
    assert set(found["decoder"]["packages"][0]["weights"]) == {"float16"}
    layers = found["denoiser"]["compression"]["layers"]
    assert {layer["package"] for layer in layers} == {"Unet.mlpackage"}
    text = console.file.getvalue()
    for expected in ("How their weights are stored", "palette-8", "compressed: denoiser, palette-8:", "bits"):
        assert expected in text
    assert "…" not in text


def test_a_compressed_part_below_its_floor_leaves_nothing(pipe, tmp_path, monkeypatch):
    monkeypatch.setitem(parity.COMPRESSED_FLOORS["palette-4"], "text_encoder", 90.0)
    message = r"text_encoder: the exported program is \d+\.\d dB .* floor is 90 dB\. palette-4 is too coarse"
    with pytest.raises(ParityError, match=message):
        export_pipeline(pipe, tmp_path, Options(parts=("decoder", "text_encoder"), compress="palette-4"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "form", "budget"),
    [
        ("palette-6", "palette-6", None),
        ("int8", "int8", None),
        ("mixed:150MB", None, 150_000_000),
        ("mixed:1.5GiB", None, 3 << 29),
        ("mixed:200kb", None, 200_000),
    ],
)
def test_texts_are_read(text, form, budget):
    assert Compression.parse(text) == Compression(text, form, budget)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            dict(compress="palette-5"),
            "compress: got 'palette-5'; allowed are palette-8, palette-6, palette-4, int8, and",
        ),
        (dict(compress="mixed"), "compress: got 'mixed'"),
        (dict(compress="mixed:150"), "compress: got 'mixed:150'; .* such as 150MB"),
        (dict(compress="mixed:-3MB"), "compress: got 'mixed:-3MB'"),
        (dict(compress="mixed:0MB"), "compress: got 'mixed:0MB'"),
        (dict(compress="int8", compress_parts=("unet",)), "compress_parts: unknown part 'unet'; choose from"),
        (dict(compress="int8", compress_parts=("decoder",) * 2), "compress_parts: decoder, decoder names one twice"),
        (dict(compress_parts=("decoder",)), "compress_parts: got decoder, but no compress to say how"),
        (dict(compress="int8", parts=("decoder",)), "compress: int8 leaves decoder in fp16 by default; name it in"),
        (
            dict(compress="int8", parts=("denoiser",), compress_parts=("decoder",)),
            "compress_parts: got decoder; of them only denoiser can be exported",
        ),
    ],
)
def test_bad_options_are_named(pipe, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        export_pipeline(pipe, tmp_path / "out", Options(**arguments))
    assert not (tmp_path / "out").exists()


def test_a_description_of_compressed_packages_fits_80_columns(package, pipe):
    path = package("iOS17")
    compress("denoiser", [path], mixed(path, "iOS17", 0.3), "iOS17", pipe, TOKENS)
    console = Console(file=StringIO(), width=80)
    found = describe(path)
    report([found], console)
    text = console.file.getvalue()
    count = sum(entry["elements"] for entry in found["weights"].values())
    most = max(found["weights"], key=lambda kind: found["weights"][kind]["elements"]).replace("palette-", "") + "-bit"
    assert f"{count / 1e6:.2f}M {most}" in text and "palette-4" in text and "…" not in text
