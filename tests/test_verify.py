"""Golden calls travel with an export, and `snapgen export verify` fails where a file, a number or a process does.

No Mac is here: Core ML is stood in for by `fake_core_ml.py`, in processes of its own as the real one.
"""

import json
import os
import shutil
import sys
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

pytest.importorskip("coremltools", reason="the Core ML export is an optional part")

from snapgen import cli, io
from snapgen.export import device, golden, parity
from snapgen.export.coreml import build_parts, export_pipeline
from snapgen.export.interpreter import Program
from snapgen.export.options import PARTS, Options
from snapgen.export.tools import PackageError, ParityError
from snapgen.export.verify import INTERPRETER, PHONES, UNCHECKED, main_verify, report, verify
from snapgen.sampler import make_scheduler, set_steps
from tests.test_export import contents, make_pipe

pytestmark = pytest.mark.export

FAKE = Path(__file__).with_name("fake_core_ml.py")


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("export")
    export_pipeline(make_pipe(), out, Options(parts=("decoder", "text_encoder")))
    return out


@pytest.fixture
def folder(exported, tmp_path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "export"))


def on_a_mac(folder: Path, behaviours: str = "", **arguments: object) -> dict:
    return verify(folder, worker=(sys.executable, str(FAKE), behaviours), **arguments)


@pytest.fixture(scope="module", autouse=True)
def _worker_finds_snapgen() -> None:
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(FAKE.parents[1]), *filter(None, [before])])
    yield
    os.environ.pop("PYTHONPATH")
    if before is not None:
        os.environ["PYTHONPATH"] = before


# --- what travels with an export --------------------------------------------------------------------------------------


def test_golden_calls_are_those_of_the_model(exported):
    """Outputs are the model's in fp32, not the package's; inputs are in the dtypes that the package takes."""
    record, tensors = golden.read(exported), io.load_tensors(exported / golden.GOLDEN)
    pipe = make_pipe()
    calls = record["parts"]["decoder"]["functions"]["main"]["golden"]
    assert len(calls) == 2
    named = set()
    for call in calls:
        z, image = tensors[call["inputs"]["z"]], tensors[call["outputs"]["image"]]
        assert z.dtype == torch.float16 and image.dtype == torch.float32
        with torch.no_grad():
            torch.testing.assert_close(image, pipe.decoder.decode(z.float()), rtol=0, atol=4e-3)
        # The worst calls are the ones that are kept, and what is said of them is what they give.
        figures = record["parts"]["decoder"]["functions"]["main"]["figures"]
        got = Program(exported / "VAEDecoder.mlpackage")({"z": z})["image"]
        assert abs(parity.psnr(got, image) - figures[call["case"]]) < 0.01
        named.add(call["case"])
    assert named == set(sorted(figures, key=figures.get)[:2])
    assert record["parts"]["decoder"]["functions"]["main"]["psnr"] == min(figures.values())
    assert record["license"] == "Apache-2.0" and record["options"]["target"] == "iOS17"
    assert record["schedule"] == {"shift": 1.0, "timestep_scale": 1000.0}


def test_every_file_has_its_sum_and_nothing_its_date(exported, tmp_path):
    import hashlib

    record = golden.read(exported)
    files = contents(exported)
    del files["Export.json"]
    assert record["sha256"] == {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    export_pipeline(make_pipe(), tmp_path, Options(parts=("decoder", "text_encoder")))
    assert contents(tmp_path) == contents(exported)


def test_the_vocabulary_is_the_tokenizer(exported):
    """An app has no transformers: the words, the marks, and how long a sequence is."""
    told, tokenizer = golden.read(exported)["tokenizer"], make_pipe().tokenizer
    words = json.loads((exported / "vocab.json").read_text())
    assert words == tokenizer.get_vocab() and not (exported / "merges.txt").exists()
    text = "a red circle and a doodah"
    tokens = [told["bos"], *text.split(), told["eos"]]
    tokens += [told["pad"]] * (told["length"] - len(tokens))
    ids = [words.get(token, words[told["unk"]]) for token in tokens]
    assert told["kind"] == "WordLevel" and told["lowercase"] is True
    assert ids == tokenizer(text.upper(), padding="max_length", max_length=told["length"]).input_ids


def test_a_byte_pair_vocabulary_has_its_merges(tmp_path):
    """As Apple's BPETokenizer reads them: a pair a line, ranked by line, the last line ended."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from snapgen.export.vocabulary import write_vocabulary

    vocabulary = {"<|endoftext|>": 0, "a": 1, "b": 2, "c</w>": 3, "ab": 4, "abc</w>": 5}
    model = models.BPE(vocabulary, [("a", "b"), ("ab", "c</w>")], unk_token="<|endoftext|>", end_of_word_suffix="</w>")
    backend = Tokenizer(model)
    backend.normalizer, backend.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    mark = "<|endoftext|>"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=mark, pad_token=mark, unk_token=mark, model_max_length=77
    )
    told = write_vocabulary(tokenizer, tmp_path)
    assert json.loads((tmp_path / "vocab.json").read_text()) == vocabulary
    assert (tmp_path / "merges.txt").read_text() == "#version: 0.2\na b\nab c</w>\n"
    assert told["kind"] == "BPE" and told["length"] == 77 and told["pad"] == mark


def test_large_pictures_are_kept_in_half(exported):
    case = parity.Case("big", {"z": torch.zeros(1)}, {"small": torch.rand(1 << 20), "image": torch.rand((1 << 20) + 1)})
    kept = golden.Golden()
    (told,) = kept.keep("decoder", "main", {"z": ((1,), torch.float16)}, [(case, 60.0)], 2)
    small, image = (kept.tensors[told["outputs"][name]] for name in ("small", "image"))
    assert torch.equal(small, case.outputs["small"]) and image.dtype == torch.float16
    assert parity.psnr(image, case.outputs["image"]) > 66
    beyond = parity.Case("huge", {}, {"image": torch.full(((1 << 20) + 1,), 1e5)})
    (told,) = kept.keep("decoder", "main", {}, [(beyond, 60.0)], 2)
    assert kept.tensors[told["outputs"]["image"]].dtype == torch.float32


def test_a_move_that_fails_is_undone(tmp_path):
    """A new file stands in the way of nothing; a folder that cannot be replaced undoes all."""
    new, target = tmp_path / "new", tmp_path / "target"
    for folder, text in ((new, "new"), (target, "old")):
        folder.mkdir()
        for name in ("a", "b", "c"):
            (folder / name).write_text(text)
    (new / "d").write_text("new")
    (target / "kept").write_text("old")
    before = contents(target)
    real = os.replace

    def failing(source, destination):
        if Path(source) == new / "c":
            raise OSError(5, "Input/output error")
        real(source, destination)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(io.os, "replace", failing)
        with pytest.raises(OSError, match="Input/output error"):
            io.move_into(new, target)
    assert contents(target) == before and set(contents(new)) == {"a", "b", "c", "d"}
    assert not list(target.glob(".*"))
    io.move_into(new, target)
    assert contents(target) == {"a": b"new", "b": b"new", "c": b"new", "d": b"new", "kept": b"old"}
    assert not list(new.iterdir()) and not list(target.glob(".*"))


# --- without a Mac ----------------------------------------------------------------------------------------------------


def test_an_export_holds_and_what_is_not_checked_is_said(exported, capsys):
    found = verify(exported)
    assert found["holds"] and found["problems"] == [] and found["files"] == len(golden.read(exported)["sha256"])
    assert [(it["part"], it["unit"]) for it in found["results"]] == [
        ("decoder", INTERPRETER),
        ("text_encoder", INTERPRETER),
    ]
    for result in found["results"]:
        recorded = golden.read(exported)["parts"][result["part"]]["functions"]["main"]
        assert abs(result["psnr"] - recorded["psnr"]) < 0.01 and result["psnr"] >= result["floor"]
    assert found["unchecked"] == [UNCHECKED]
    console = Console(file=StringIO(), width=80)
    report(found, console)
    text = console.file.getvalue()
    assert "macOS only" in text and "text_encoder" in text and "holds" in text and "…" not in text


def test_the_command_takes_its_arguments(exported, tmp_path, capsys):
    out = tmp_path / "Verify.json"
    cli.main(["export", "verify", str(exported), "--units", "CPU_AND_NE", "--repeats", "3", "-o", str(out)])
    assert json.loads(out.read_text())["holds"] is True and "holds" in capsys.readouterr().out


def damage(folder: Path, name: str, change: bytes) -> Path:
    file = folder / name
    data = bytearray(file.read_bytes())
    data[-200:-100] = change * 100
    file.write_bytes(bytes(data))
    return file


def test_changed_weights_fail_by_sum_and_by_number(folder):
    damage(folder, "VAEDecoder.mlpackage/Data/com.apple.CoreML/weights/weight.bin", b"\x44")
    found = verify(folder)
    assert not found["holds"]
    assert found["problems"] == [
        "VAEDecoder.mlpackage/Data/com.apple.CoreML/weights/weight.bin: changed since it was written"
    ]
    decoder, text_encoder = found["results"]
    assert decoder["psnr"] < decoder["floor"] and text_encoder["psnr"] >= text_encoder["floor"]


def test_missing_new_and_foreign_files_are_named(folder):
    shutil.rmtree(folder / "TextEncoder.mlpackage" / "Data")
    (folder / "VAEDecoder.mlpackage" / "extra.txt").write_text("?")
    (folder / "vocab.json").unlink()
    shutil.copytree(folder / "VAEDecoder.mlpackage", folder / "Older.mlpackage")
    found = verify(folder)
    named = {line.split(": ")[0] for line in found["problems"]}
    assert {"vocab.json", "VAEDecoder.mlpackage/extra.txt", str(folder / "TextEncoder.mlpackage")} <= named
    assert "Older.mlpackage: not of this export" in found["unchecked"]
    # What cannot be read is not run, and is no success.
    assert [it["part"] for it in found["results"]] == ["decoder"] and not found["holds"]


def test_a_floor_that_is_missed_ends_the_command_with_2(folder, capsys):
    record = json.loads((folder / "Export.json").read_text())
    record["parts"]["decoder"]["floor"] = 200.0
    (folder / "Export.json").write_text(json.dumps(record))
    out = folder / "found" / "Verify.json"
    with pytest.raises(SystemExit) as stop:
        cli.main(["export", "verify", str(folder), "-o", str(out)])
    assert stop.value.code == 2
    assert "does not hold: decoder main on interpreter" in " ".join(capsys.readouterr().out.split())
    written = json.loads(out.read_text())
    assert written["holds"] is False and written["results"][0]["floor"] == 200.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: shutil.rmtree(folder), "no such folder"),
        (
            lambda folder: (folder / "Export.json").unlink(),
            "holds no Export.json, which `snapgen export coreml` writes",
        ),
        (lambda folder: (folder / "Export.json").write_text('{"format": 7}'), "its format is 7; known here is 1"),
        (lambda folder: (folder / "Export.json").write_text('{"format": 1, "parts": {}}'), "lacks options, sha256"),
        (lambda folder: (folder / "Export.json").write_text('{"format"'), "damaged, not JSON"),
        (lambda folder: (folder / "Golden.safetensors").write_bytes(b"12"), "truncated or not a safetensors file"),
        (lambda folder: io.save_tensors(folder / "Golden.safetensors", {"a": torch.ones(1)}), "lacks decoder.main"),
    ],
)
def test_a_folder_that_is_no_export_is_refused(folder, change, message):
    change(folder)
    with pytest.raises((PackageError, io.CheckpointError), match=message):
        verify(folder)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(units=("NPU",)), "units: got 'NPU'; allowed are CPU_ONLY, CPU_AND_GPU, CPU_AND_NE, ALL"),
        (dict(units=()), "units: none is named"),
        (dict(repeats=0), "repeats: got 0; must be at least 1"),
        (dict(timeout=0.0), r"timeout: got 0.0 seconds; must be more than 0"),
    ],
)
def test_bad_arguments_are_named(exported, arguments, message):
    with pytest.raises(ValueError, match=message):
        verify(exported, **arguments)


# --- on a Mac ---------------------------------------------------------------------------------------------------------


def test_every_unit_is_run_timed_and_its_plan_read(exported):
    found = on_a_mac(exported, units=("CPU_AND_NE", "CPU_ONLY"), repeats=5)
    assert found["holds"] and found["unchecked"] == [PHONES]
    ran = [(it["part"], it["unit"]) for it in found["results"]]
    assert ran == [(part, unit) for part in ("decoder", "text_encoder") for unit in ("CPU_AND_NE", "CPU_ONLY")]
    for result in found["results"]:
        assert result["psnr"] is None and set(result["figures"].values()) == {None}  # the very same numbers
        (package,) = result["packages"]
        # Two golden calls, three to warm up; the next five took 6 to 10 ms.
        assert package["predict_ms"] == {"median": 8.0, "least": 6.0, "most": 10.0}
        assert package["load_seconds"] == 1e-6 < package["ready_seconds"]
        plan = package["residency"]
        assert plan["operations"] == 4 and plan["undetermined"] == 0
        assert plan["neural_engine"] == 0.75 and plan["neural_engine_cost"] == pytest.approx(0.9)
        assert plan["elsewhere"] == [{"operation": "ios17.sin", "device": "CPU", "operations": 1, "cost": 0.1}]
    console = Console(file=StringIO(), width=100)
    report(found, console)
    text = console.file.getvalue()
    for expected in ("75.0%", "90.0%", "8.00", "not on the Neural Engine: 1 ios17.sin (CPU)", "same"):
        assert expected in text


def test_a_unit_that_crashes_or_errs_does_not_take_the_rest_with_it(exported):
    found = on_a_mac(exported, "CPU_AND_GPU=noise,ALL=abort", units=("ALL", "CPU_AND_GPU", "CPU_AND_NE"), repeats=1)
    results = {it["unit"]: it for it in found["results"] if it["part"] == "decoder"}
    assert not found["holds"] and set(results) == {"ALL", "CPU_AND_GPU", "CPU_AND_NE"}
    assert results["ALL"]["failure"] == "the process was ended by SIGABRT: error: MLIR pass manager failed"
    assert results["ALL"]["figures"] == {} and results["ALL"]["packages"] == []
    assert results["CPU_AND_GPU"]["psnr"] == pytest.approx(40.0, abs=0.1) and results["CPU_AND_GPU"]["failure"] is None
    assert results["CPU_AND_NE"]["failure"] is None and results["CPU_AND_NE"]["packages"][0]["residency"]
    console = Console(file=StringIO(), width=100)
    report(found, console)
    assert "SIGABRT" in console.file.getvalue() and console.file.getvalue().count("fails") == 4


def test_a_unit_that_hangs_is_given_up(exported):
    found = on_a_mac(exported, "CPU_ONLY=hang", units=("CPU_ONLY",), repeats=1, timeout=1.0)
    decoder = found["results"][0]
    assert decoder["part"] == "decoder" and decoder["failure"] == "did not end within 1 s"
    assert decoder["figures"] == {} and not found["holds"]


def test_what_came_before_a_crash_is_kept(exported):
    found = on_a_mac(
        exported, "ALL=abort_later,CPU_ONLY=nan,CPU_AND_NE=refuse,CPU_AND_GPU=shape", repeats=1, timeout=60.0
    )
    results = {it["unit"]: it for it in found["results"] if it["part"] == "decoder"}
    later = results["ALL"]
    assert later["failure"] == "the process was ended by SIGABRT" and set(later["figures"].values()) == {None}
    assert later["packages"][0]["predict_ms"]["median"] > 0 and "residency" not in later["packages"][0]
    assert results["CPU_ONLY"]["failure"].startswith("gave numbers that are not finite at 'a ")
    assert "the process ended with 1: RuntimeWarning: You will not be able" in results["CPU_AND_NE"]["failure"]
    assert results["CPU_AND_GPU"]["failure"].startswith("gave outputs {'image': (1, 1, 64, 64)}; the export's are")
    json.dumps(found, allow_nan=False)
    report(found, Console(file=StringIO(), width=100))


def test_without_compute_plans_the_rest_holds(exported):
    found = on_a_mac(exported, "CPU_AND_NE=no_plan", units=("CPU_AND_NE",), repeats=1)
    assert found["holds"]
    (package,) = found["results"][0]["packages"]
    assert package["residency"] == {"problem": "MLComputePlan is only available on macOS >= 14.4"}
    assert package["predict_ms"]["median"] == 6.0 and package["load_seconds"] is None
    report(found, Console(file=StringIO(), width=100))


def test_chunks_hand_on_what_they_make():
    first = SimpleNamespace(predict=lambda data: {"hidden": data["sample"] + 1, "skip": data["sample"]})
    second = SimpleNamespace(predict=lambda data: {"velocity": data["hidden"] * data["skip"] + data["mask"]})
    names = (["sample"], ["hidden", "skip", "mask"])
    assert device.predict([first, second], names, {"sample": 3, "mask": 100}) == {"velocity": 112}


def test_costs_that_core_ml_does_not_know_are_not_invented():
    operation = SimpleNamespace(operator_name="conv", blocks=[])
    inside = SimpleNamespace(operator_name="cond", blocks=[SimpleNamespace(operations=[operation, operation])])
    block = SimpleNamespace(operations=[inside, operation])
    chosen = type("MLGPUComputeDevice", (), {})()
    plan = SimpleNamespace(
        model_structure=SimpleNamespace(program=SimpleNamespace(functions={"main": SimpleNamespace(block=block)})),
        get_compute_device_usage_for_mlprogram_operation=lambda it: (
            None if it is inside else SimpleNamespace(preferred_compute_device=chosen)
        ),
        get_estimated_cost_for_mlprogram_operation=lambda it: None,
    )
    found = device.residency(plan, "main")
    assert found["operations"] == 3 and found["undetermined"] == 1
    assert found["neural_engine"] == 0.0 and found["neural_engine_cost"] is None
    assert found["elsewhere"] == [{"operation": "conv", "device": "GPU", "operations": 3, "cost": 0.0}]


def test_the_runtime_calls_coremltools_as_it_is(monkeypatch):
    """Names and arguments of coremltools 9, whose calls bind here without a Mac."""
    import inspect as signatures

    import coremltools as ct
    from coremltools.models.compute_plan import MLComputePlan

    calls = []
    monkeypatch.setattr(ct.models, "MLModel", lambda *given, **named: calls.append(("load", given, named)) or "model")
    monkeypatch.setattr(
        MLComputePlan, "load_from_path", lambda *given, **named: calls.append(("plan", given, named)) or "plan"
    )
    runtime = device.CoreML()
    assert runtime.load("P.mlpackage", "CPU_AND_NE", "batch_1") == "model"
    assert runtime.plan(SimpleNamespace(get_compiled_model_path=lambda: "P.mlmodelc"), "ALL") == "plan"
    monkeypatch.undo()
    load, plan = calls
    signatures.signature(ct.models.MLModel).bind(*load[1], **load[2])
    signatures.signature(MLComputePlan.load_from_path).bind(*plan[1], **plan[2])
    assert load[2]["compute_units"] is ct.ComputeUnit.CPU_AND_NE and load[2]["function_name"] == "batch_1"
    assert plan[1] == ("P.mlmodelc",) and plan[2]["compute_units"] is ct.ComputeUnit.ALL
    for name in ("load_duration_in_nano_seconds", "last_predict_duration_in_nano_seconds", "get_compiled_model_path"):
        assert hasattr(ct.models.MLModel, name)
    assert {unit.name for unit in ct.ComputeUnit} == set(device.UNITS)


def test_the_command_prints_before_it_fails(folder):
    (folder / "vocab.json").write_text("{}")
    console = Console(file=StringIO(), width=100)
    with pytest.raises(ParityError, match=r"does not hold: vocab.json: changed since it was written$"):
        main_verify(folder, console=console)
    text = console.file.getvalue()
    assert "vocab.json: changed" in text and "decoder" in text


# --- the document -----------------------------------------------------------------------------------------------------


def test_the_document_names_what_is_exported():
    text = (FAKE.parents[1] / "docs" / "coreml.md").read_text()
    pipe = make_pipe()
    wanted = [(name, Options()) for name in PARTS if getattr(pipe, name) is not None] + [
        ("denoiser", Options(steps=4, chunks=True))
    ]
    parts = [part for name, options in wanted for part in build_parts(pipe, name, options, 16)]
    files = {part.file for part in parts} | {golden.GOLDEN, golden.RECORD, "vocab.json", "merges.txt", "Schedule.json"}
    assert len(files) == 10
    files |= {"TextEncoder2.mlpackage", "TextEncoder3.mlpackage", "TextEncoder3Chunk1.mlpackage"}
    assert all(f"`{file}`" in text for file in files)
    borders = {f.name for part in parts for f in part.inputs} | {name for part in parts for name, _ in part.outputs}
    between = {name for name in borders if name in ("hidden", "temb") or name.startswith("skip_")}
    assert between and all(f"`{name}`" in text for name in borders - between)


@pytest.mark.parametrize(("shift", "steps"), [(1.0, 28), (3.0, 28), (3.0, 4)])
def test_the_document_s_schedule_is_the_sampler_s(shift, steps):
    scheduler = make_scheduler(shift)
    timesteps = set_steps(scheduler, steps, "cpu")
    u = 1 - torch.arange(steps + 1, dtype=torch.float64) / steps
    sigmas = shift * u / (1 + (shift - 1) * u)
    torch.testing.assert_close(scheduler.sigmas.double(), sigmas, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(timesteps.double(), 1000 * sigmas[:-1], rtol=1e-6, atol=1e-4)
    assert sigmas[0] == 1 and sigmas[-1] == 0
