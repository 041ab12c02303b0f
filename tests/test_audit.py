"""The Neural Engine auditor: hand-counted costs, runs on the engine, the JSON and the page, and the packages that we
export ourselves."""

import json
import re
import shutil
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

pytest.importorskip("coremltools", reason="the Core ML export is an optional part")

from test_export import UNET
from test_mil_interpreter import build
from test_report import Reader
from test_rules import half, weight

from snapgen import cli
from snapgen.decoder import TinyDecoder
from snapgen.export import audit_page, phones
from snapgen.export.audit import Report, as_json, audit, packages, summary
from snapgen.export.convert import convert
from snapgen.export.cost import flops
from snapgen.export.denoiser import Denoiser
from snapgen.export.graph import Constant, Operation, Value
from snapgen.export.inspect import describe
from snapgen.export.parts import Decoder
from snapgen.export.rule_checks import ON_CHIP
from snapgen.export.rules import (
    COST,
    ENGINE,
    FALLBACK,
    RULES,
    UNKNOWN,
    VERDICTS,
)
from snapgen.export.tools import PackageError, coremltools, quiet
from snapgen.unet import SnapGenUNet
from snapgen_kernels import use

pytestmark = pytest.mark.export


def test_flops_bytes_and_working_set_of_hand_counted_operations(tmp_path):
    def make(mb, x):
        a = mb.conv(x=x, weight=weight(6, 4, 3, 3), pad_type="same", name="a")
        b = mb.conv(x=a, weight=weight(6, 1, 3, 3), pad_type="same", groups=6, name="b")
        c = mb.reshape(x=b, shape=[1, 6, 1, 64], name="c")
        d = mb.matmul(x=c, y=c, transpose_x=True, name="d")
        e = mb.softmax(x=d, axis=-1, name="e")
        return mb.reduce_mean(x=e, axes=[1], keep_dims=True, name="f")

    path = build(make, tmp_path / "counted.mlpackage", x=half(1, 4, 8, 8))
    (report,) = audit(path)
    ops = {op.op.name: op for op in report.operations}
    assert {name: op.flops for name, op in ops.items()} == {
        "a": 2 * 6 * 64 * 4 * 9, "b": 2 * 6 * 64 * 9, "c": 0, "d": 2 * 6 * 64 * 64 * 1, "e": 4 * 6 * 64 * 64,
        "f": 6 * 64 * 64,
    }  # fmt: skip
    assert (ops["a"].bytes_in, ops["a"].bytes_out) == (2 * 4 * 64, 2 * 6 * 64)
    assert ops["a"].op.weights >= 2 * 6 * 4 * 9  # and its settings, a few bytes
    assert ops["a"].op.weights < 2 * 6 * 4 * 9 + 100
    assert ops["a"].working_set == ops["a"].bytes_in + ops["a"].bytes_out + ops["a"].op.weights
    assert ops["d"].bytes_in == 2 * 6 * 64  # the same tensor twice is read once
    products = sum(op.flops for op in report.operations if op.op.type in ("conv", "matmul"))
    assert products == describe(path)["flops"] == summary(report)["flops_of_products"]


@pytest.mark.parametrize(
    "kind, shapes, settings, wanted",
    [
        ("linear", {"x": (2, 3, 8)}, {"weight": (5, 8)}, 2 * 2 * 3 * 5 * 8),
        ("conv_transpose", {"x": (1, 4, 8, 8)}, {"weight": (4, 6, 2, 2)}, 2 * 4 * 64 * 6 * 4),
        ("scaled_dot_product_attention", {"query": (1, 2, 8, 16), "key": (1, 2, 9, 16), "value": (1, 2, 9, 4)}, {},
         2 * 2 * 8 * 9 * 20),
        ("layer_norm", {"x": (1, 2, 4, 16)}, {}, 5 * 1 * 2 * 4 * 16),
    ],
)  # fmt: skip
def test_flops_of_single_operations(kind, shapes, settings, wanted):
    outs = {
        "linear": (2, 3, 5), "conv_transpose": (1, 6, 16, 16), "scaled_dot_product_attention": (1, 2, 8, 4),
        "layer_norm": (1, 2, 4, 16),
    }  # fmt: skip
    inputs = {name: (Value(name, shape, "float16"),) for name, shape in shapes.items()}
    constants = {name: (Constant(Value(name, shape, "float16"), 0),) for name, shape in settings.items()}
    op = Operation(0, "y", kind, "main", inputs, (Value("y", outs[kind], "float16"),), constants)
    assert flops(op) == wanted


def test_elementwise_operations_are_fused_with_what_makes_their_input(tmp_path):
    def make(mb, x):
        y = mb.conv(x=x, weight=weight(4, 4, 1, 1), name="y")
        z = mb.relu(x=mb.add(x=y, y=np.float16(1), name="a"), name="z")
        w = mb.tanh(x=z, name="w")  # z has two readers: not fused with it, but computed again for the sum
        return mb.reduce_sum(x=w, axes=[1], keep_dims=True, name="s"), mb.max_pool(
            x=z, kernel_sizes=[2, 2], pad_type="valid", name="p"
        )

    (report,) = audit(build(make, tmp_path / "fused.mlpackage", x=half(1, 4, 8, 8)))
    step = {op.op.name: op.step for op in report.operations}
    assert step["y"] == step["a"] == step["z"] != step["w"] != step["s"]
    steps = report.steps
    assert steps[step["y"]].written == {"z": 512}
    assert steps[step["w"]].read == steps[step["w"]].written == {}
    assert steps[step["s"]].read == {"z": 512}


@pytest.mark.parametrize("size, streams", [(1024, False), (1025, True)])
def test_tensors_above_two_megabytes_stream_through_memory(tmp_path, size, streams):
    def make(mb, x):
        y = mb.softmax(x=mb.reduce_max(x=x, axes=[1], keep_dims=True, name="y"), axis=-1, name="z")
        return mb.reduce_max(x=y, axes=[2, 3], keep_dims=True, name="s")

    (report,) = audit(build(make, tmp_path / "one.mlpackage", x=half(1, 2, 1024, size)))
    softmax = report.steps[report.operations[1].step]
    assert (2 * 1024 * size > ON_CHIP) == streams
    # y is written by a step that reads 4 MB, so it streams in any case; z stays where it fits.
    assert softmax.moved - softmax.weights == 2 * 1024 * size * (2 if streams else 1)


def test_runs_on_the_engine_are_the_fewest_that_the_program_allows(tmp_path):
    def make(mb, x, y):
        a = mb.relu(x=x, name="a")
        b = mb.sin(x=y, name="b")  # falls back, beside a
        c = mb.add(x=a, y=b, name="c")
        d = mb.cos(x=c, name="d")  # falls back, between c and e
        return mb.tanh(x=d, name="e")

    (report,) = audit(build(make, tmp_path / "runs.mlpackage", x=half(1, 4, 8, 8), y=half(1, 4, 8, 8)))
    assert [op.verdict == FALLBACK for op in report.operations] == [False, True, False, True, False]
    assert (report.segments, report.switches) == (2, 3)  # sin; relu and add; cos; tanh
    phone = phones.find("M1")
    assert report.seconds(phone) >= 2 * phones.DISPATCH


def test_estimates_grow_with_the_size_and_shrink_with_a_faster_device(tmp_path):
    reports = [
        audit(build(lambda mb, x: mb.conv(x=x, weight=weight(32, 32, 3, 3)), tmp_path / f"{size}.mlpackage",
                    x=half(1, 32, size, size)))[0]
        for size in (16, 128, 256)
    ]  # fmt: skip
    for phone in phones.PHONES:
        times = [report.seconds(phone) for report in reports]
        assert times == sorted(times) and times[0] < times[-1]
    slow, fast = phones.find("iPhone 12 Pro Max"), phones.find("M2")
    assert reports[-1].seconds(slow) > reports[-1].seconds(fast) > phones.DISPATCH


def test_fit_finds_the_shares_that_made_the_figures():
    wanted = phones.Shares(0.37, 0.81)
    work = {"dense": [(3, 4e9, 1e6)], "thin": [(5, 1e6, 3e7)], "both": [(1, 2e9, 2e7), (7, 3e8, 9e6)]}
    figures = [
        (steps, 1, phone, phones.seconds(steps, 1, phone, wanted))
        for steps in work.values()
        for phone in phones.PHONES[:3]
    ]
    assert phones.fit(figures) == wanted


def test_calibration_is_what_the_models_work_and_the_figures_give():
    from bench import neural_engine

    stored = phones.calibration()
    assert stored["models"].keys() == neural_engine.MODELS.keys() | {"sd-unet"}  # which is counted, not converted
    again = neural_engine.fitted(stored["models"])
    assert again == {key: stored[key] for key in ("shares", "figures")}
    held = [it for it in stored["figures"] if not it["fitted"]]
    assert len(held) >= len(stored["figures"]) / 2
    page = neural_engine.PAGE.read_text(encoding="utf-8")
    assert f"{neural_engine.BEGIN}\n{neural_engine.table(stored)}\n{neural_engine.END}" in page
    assert audit_page.trust_line().count("%") == 2


def test_unknown_phone_is_refused():
    with pytest.raises(ValueError, match=r"phone: got 'Nokia'; allowed are iPhone 12 Pro Max, .*M2"):
        phones.find("Nokia")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A small denoiser and decoder of ours, with random weights."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    latent = dict(latent_channels=4, channels=(16, 16, 8, 8), blocks=(1, 1, 1, 1), norm_groups=8)
    with use("reference"):
        denoiser = Denoiser(SnapGenUNet(**UNET).eval(), batch=1, height=8, width=8, tokens=16)
        decoder = Decoder(TinyDecoder(**latent).eval(), batch=1, height=8, width=8)
    convert(denoiser, folder / "Unet.mlpackage", "iOS17")
    convert(decoder, folder / "VAEDecoder.mlpackage", "iOS17")
    return folder


@pytest.fixture(scope="module")
def reports(tiny) -> list[Report]:
    return [report for path in packages([tiny]) for report in audit(path)]


def test_of_our_own_export_only_the_time_embedding_falls_back(reports):
    denoiser, decoder = reports
    fallen = [op for op in denoiser.operations if op.verdict == FALLBACK]
    assert sorted(op.op.type for op in fallen) == ["cos", "mul", "reshape", "sin"]  # the angles, in fp32
    assert not [op for op in decoder.operations if op.verdict == FALLBACK]
    assert {op.verdict for report in reports for op in report.operations} <= {ENGINE, COST, FALLBACK}
    # The traps that the export is written to keep out of.
    hazards = {"depthwise-behind-upsampling", "inflated-epsilon", "infinite-mask", "transposed-scores", "tile",
               "fused-attention", "rank-0", "gather", "width-slice"}  # fmt: skip
    assert not hazards & {it.rule.name for report in reports for op in report.operations for it in op.findings}
    assert (denoiser.segments, decoder.segments) == (1, 1)


def test_products_are_counted_as_inspect_counts_them(reports):
    for report in reports:
        assert summary(report)["flops_of_products"] == describe(report.path)["flops"]


def test_work_adds_up_to_the_steps(reports):
    for report in reports:
        on_engine = [step for step in report.steps if step.on_engine]
        assert sum(count for count, _, _ in report.work()) == len(on_engine)
        assert sum(count * moved for count, _, moved in report.work()) == sum(step.moved for step in on_engine)
        placed = {op.step for op in report.operations} - {None}
        assert placed == set(range(len(report.steps)))


def test_json_keeps_its_keys_and_is_the_same_twice(reports, tiny):
    found = as_json(reports)
    assert json.loads(json.dumps(found)) == found
    assert found["schema"] == 1
    assert found.keys() == {"schema", "rules", "sources", "devices", "trust", "packages"}
    package = found["packages"][0]
    assert package.keys() == {
        "path", "function", "system", "operations", "verdicts", "flops", "flops_of_products", "share_on_engine",
        "weight_bytes", "moved_bytes", "intensity", "steps", "spilling_steps", "spilling_operations", "segments",
        "switches", "largest_fallback", "estimates", "borders", "notes", "list",
    }  # fmt: skip
    assert package["list"][0].keys() == {
        "name", "type", "inside", "verdict", "findings", "inputs", "outputs", "flops", "bytes_in", "bytes_out",
        "weight_bytes", "working_set", "step",
    }  # fmt: skip
    assert package["verdicts"].keys() == set(VERDICTS)
    assert package["estimates"].keys() == {phone.name for phone in phones.PHONES}
    assert sum(entry["operations"] for entry in package["verdicts"].values()) == len(package["list"])
    assert {it["rule"] for op in package["list"] for it in op["findings"]} <= found["rules"].keys()
    again = [report for path in packages([tiny]) for report in audit(path)]
    assert as_json(again) == found


def test_page_holds_every_table_and_escapes_names(reports, tmp_path, tiny):
    hostile = tmp_path / "<b>&.mlpackage"
    shutil.copytree(tiny / "VAEDecoder.mlpackage", hostile)
    page = audit_page.page([*reports, *audit(hostile)], phones.find("iPhone 14 Pro"))
    read = Reader(page)
    assert "<b>&.mlpackage" in read.said and "<b>&" not in page
    assert not [value for tag, name, value in read.attributes if name == "src" and not value.startswith("data:")]
    assert "script" not in read.tags
    for report in reports:
        assert Path(report.path).name in read.said
    for heading in ("Verdicts", "Rules that speak against operations", "Inputs and outputs", "What falls back",
                    "Estimated time", "Slowest steps on iPhone 14 Pro", "Largest working sets",
                    "Where the steps lie under the roof", "How far to trust this", "Devices", "The rules"):  # fmt: skip
        assert heading in read.said, heading
    for rule in RULES:
        assert rule.name in read.said and rule.says in read.said
    for phone in phones.PHONES:
        assert phone.name in read.said and phone.bandwidth_source in read.said
    for figure in phones.calibration()["figures"]:
        assert f"{figure['error']:+.0%}" in read.said
    assert audit_page.trust_line() in read.said
    assert "fp32: view is float32" in read.said  # why the first operation of the time embedding falls back
    assert page == audit_page.page([*reports, *audit(hostile)], phones.find("iPhone 14 Pro"))


def test_command_prints_and_writes_and_tells_by_its_exit_code(tiny, tmp_path, monkeypatch):
    out = StringIO()
    monkeypatch.setattr(cli, "console", Console(file=out, width=200))
    page, table = tmp_path / "a" / "report.html", tmp_path / "report.json"
    cli.main(["export", "audit", str(tiny), "-o", str(page), "--json", str(table), "--phone", "iphone 14 pro"])
    said = out.getvalue()
    for word in (
        "Unet",
        "VAEDecoder",
        "fall back",
        "sine",
        "working sets",
        "iPhone 14 Pro",
        "median error",
    ):
        assert word in said, word
    assert "M2" not in said  # only the device that was asked for
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert len(json.loads(table.read_text(encoding="utf-8"))["packages"]) == 2
    cli.main(["export", "audit", str(tiny / "VAEDecoder.mlpackage"), "--strict"])
    with pytest.raises(SystemExit) as stopped:
        cli.main(["export", "audit", str(tiny / "Unet.mlpackage"), "--strict"])
    assert stopped.value.code == 2
    assert "falls back" in out.getvalue()


def test_tables_fit_a_terminal_of_80_columns(tiny, tmp_path):
    """Every package is named in every table, and no heading or figure is cut."""
    console = Console(file=StringIO(), width=80)
    assert audit_page.main_audit([tiny], console=console) == 0
    said = console.file.getvalue()
    assert "…" not in said
    for heading in ("operations", "what they compute and move", "estimated time"):
        table = said[said.index(heading) :].split("└")[0]
        assert "Unet" in table and "VAEDecoder" in table, heading
    for phone in phones.PHONES:
        assert phone.name in said


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda path: (path / "Manifest.json").write_text("{"), "Manifest.json is truncated"),
        (lambda path: shutil.rmtree(path / "Data"), "model file .* is missing"),
        (lambda path: (path / "Manifest.json").unlink(), "holds no Manifest.json"),
        (shutil.rmtree, "no such package"),
    ],
)
def test_damaged_packages_are_refused(tiny, tmp_path, spoil, message, monkeypatch):
    copy = tmp_path / "copy.mlpackage"
    shutil.copytree(tiny / "VAEDecoder.mlpackage", copy)
    spoil(copy)
    with pytest.raises(PackageError, match=message):
        audit(copy)
    out = StringIO()
    monkeypatch.setattr(cli, "console", Console(file=out, width=200))
    with pytest.raises(SystemExit) as stopped:
        cli.main(["export", "audit", str(copy)])
    assert stopped.value.code == 2 and re.search(message, out.getvalue())


def rewritten(package: Path, copy: Path, change: Callable[[object], None]) -> Path:
    shutil.copytree(package, copy)
    root = next(copy.rglob("*.mlmodel"))
    spec = coremltools("proto.Model_pb2").Model()
    spec.ParseFromString(root.read_bytes())
    change(spec)
    root.write_bytes(spec.SerializeToString())
    return copy


def test_newer_formats_and_neural_networks_are_refused_with_what_cannot_be_told(tiny, tmp_path):
    def newer(spec):
        spec.specificationVersion = 99

    with pytest.raises(PackageError, match="format is number 99"):
        audit(rewritten(tiny / "VAEDecoder.mlpackage", tmp_path / "newer.mlpackage", newer))

    def network(spec):
        spec.neuralNetwork.layers.add().name = "first"

    with pytest.raises(PackageError, match=r"neuralNetwork, not an ML program: it lists no operations whose shapes"):
        audit(rewritten(tiny / "VAEDecoder.mlpackage", tmp_path / "network.mlpackage", network))
    (tmp_path / "folder").mkdir()
    with pytest.raises(PackageError, match=r"holds no \.mlpackage"):
        packages([tmp_path / "folder"])


def test_unknown_operations_are_listed_as_unknown(tiny, tmp_path):
    def invent(spec):
        function = spec.mlProgram.functions["main"]
        block = function.block_specializations[function.opset]
        next(op for op in block.operations if op.type == "silu").type = "of_iOS99"

    (report,) = audit(rewritten(tiny / "VAEDecoder.mlpackage", tmp_path / "odd.mlpackage", invent))
    (op,) = [op for op in report.operations if op.op.type == "of_iOS99"]
    assert op.verdict == UNKNOWN
    assert summary(report)["verdicts"][UNKNOWN]["operations"] == 1
    assert "of_iOS99" in audit_page.page([report], phones.find("M1"))


def test_borders_are_judged_by_their_rows(tmp_path):
    def make(mb, x, y, z):
        return mb.relu(x=x, name="a"), mb.relu(x=y, name="b"), mb.relu(x=z, name="c")

    (report,) = audit(
        build(make, tmp_path / "borders.mlpackage", x=half(1, 4, 1, 32), y=half(1, 4, 1, 33), z=half(1, 4, 8, 1))
    )
    said = {it.name: it.detail for it in report.borders if it.side == "in"}
    assert said.keys() == {"y", "z"}
    assert "66 bytes is padded by 62" in said["y"] and "32 times" in said["z"]


def test_packages_of_a_folder_are_found_once(tiny):
    found = packages([tiny, tiny / "Unet.mlpackage"])
    assert [path.name for path in found] == ["Unet.mlpackage", "VAEDecoder.mlpackage"]


def test_several_functions_are_audited_each(tmp_path):
    ct = coremltools()
    one = build(lambda mb, x: mb.relu(x=x), tmp_path / "one.mlpackage", x=half(1, 4, 8, 8))
    two = build(lambda mb, x: mb.sin(x=x), tmp_path / "two.mlpackage", x=half(1, 4, 8, 8))
    with quiet():
        plan = ct.utils.MultiFunctionDescriptor()
        plan.add_function(str(one), "main", "first")
        plan.add_function(str(two), "main", "second")
        plan.default_function_name = "first"
        ct.utils.save_multifunction(plan, str(tmp_path / "both.mlpackage"))
    first, second = audit(tmp_path / "both.mlpackage")
    assert (first.function, second.function) == ("first", "second")
    assert [op.verdict for op in first.operations] == [ENGINE]
    assert [op.verdict for op in second.operations] == [FALLBACK]
