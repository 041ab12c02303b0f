"""Modes, reasons, environment, loading: nothing is silent and importing is free."""

import importlib.util
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import snapgen_kernels
from snapgen_kernels import _backend, decoding
from snapgen_kernels.testing import SPECS
from tests.ops.variants import built

ROOT = Path(__file__).parents[2]


def _python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, cwd=ROOT
    )


def test_importing_loads_and_sets_nothing() -> None:
    code = """
import sys, torch
before = (torch.get_num_threads(), torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled())
import snapgen_kernels
loaded = [m for m in ("triton", "snapgen_kernels._C", "nvtx", "diffusers", "torch._inductor") if m in sys.modules]
assert not loaded, loaded
assert before == (torch.get_num_threads(), torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled())
"""
    done = _python(code)
    assert done.returncode == 0, done.stderr


def test_use_is_a_function_and_a_context_manager() -> None:
    before = _backend.mode()
    with snapgen_kernels.use("reference"):
        assert _backend.mode() == "reference"
        with snapgen_kernels.use("fused"):
            assert _backend.mode() == "fused"
        assert _backend.mode() == "reference"
        snapgen_kernels.use("auto")
        assert _backend.mode() == "auto"
    assert _backend.mode() == before


def test_use_is_local_to_the_thread() -> None:
    seen = []
    with snapgen_kernels.use("reference"):
        thread = threading.Thread(target=lambda: seen.append(_backend.mode()))
        thread.start()
        thread.join()
    assert seen == ["auto"]


def test_use_is_undone_by_an_error() -> None:
    with pytest.raises(KeyError), snapgen_kernels.use("reference"):
        raise KeyError
    assert _backend.mode() == "auto"


def test_unknown_mode_is_named() -> None:
    with pytest.raises(ValueError, match=r"fast.*auto, fused, reference"):
        snapgen_kernels.use("fast")
    done = _python("import snapgen_kernels as s; s.backends()", SNAPGEN_KERNELS="fast")
    assert "SNAPGEN_KERNELS is 'fast'; allowed: auto, fused, reference" in done.stderr


def test_environment_sets_the_mode() -> None:
    done = _python("import snapgen_kernels as s; print(s.backends()['mode'])", SNAPGEN_KERNELS="reference")
    assert done.stdout.strip() == "reference", done.stderr


def test_a_fallback_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    _backend._log_once.cache_clear()
    case = next(c for c in snapgen_kernels.testing.small_cases("group_norm_silu"))
    inputs = case.inputs()
    inputs = {k: v.half() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    with caplog.at_level(logging.INFO, logger="snapgen_kernels"):
        case.spec.public(inputs)
        case.spec.public(inputs)
    assert [r.getMessage() for r in caplog.records].count(caplog.records[0].getMessage()) == 1
    assert "group_norm_silu" in caplog.text and "float16" in caplog.text


def test_fused_mode_gives_the_reason() -> None:
    x = torch.randn(1, 4, 2, 2, dtype=torch.float16)
    with (
        snapgen_kernels.use("fused"),
        pytest.raises(snapgen_kernels.FusedUnavailable, match=r"group_norm_silu.*float16"),
    ):
        snapgen_kernels.group_norm_silu(x, 2, torch.ones(4), torch.zeros(4))


def test_meta_tensors_run_and_count_operations() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        block = snapgen_kernels.SepResBlock(32, 64, temb_channels=16, num_groups=8)
        x, temb = torch.randn(1, 32, 8, 8), torch.randn(1, 16)
    with FlopCounterMode(display=False) as counter:
        assert block(x, temb).shape == (1, 64, 8, 8)
    assert counter.get_total_flops() > 2 * 64 * (32 * 128 + 128 * 64)


def test_backends_names_every_op_and_a_reason() -> None:
    found = snapgen_kernels.backends()
    assert set(found["ops"]) == {*SPECS, "norm_silu_conv"}  # which has no backward and no contract of an op
    assert found["cpp"]["available"] == (importlib.util.find_spec("snapgen_kernels._C") is not None)
    for part in ("cpp", "triton", "cuda"):
        assert found[part]["available"] == (found[part]["reason"] is None)
    for devices in found["ops"].values():
        for state in devices.values():
            assert state == "fused" or state.startswith("PyTorch: ")


def test_a_broken_extension_is_an_error_that_names_the_cure(tmp_path: Path) -> None:
    """A package copy whose _C is garbage: backends() reports it, a call raises, use("reference") still works."""
    package = tmp_path / "snapgen_kernels"
    package.mkdir()
    for path in (ROOT / "snapgen_kernels").rglob("*.py"):
        target = package / path.relative_to(ROOT / "snapgen_kernels")
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(path.read_bytes())
    (package / "_C.abi3.so").write_bytes(b"not a library")
    code = f"""
import sys; sys.path.insert(0, {str(tmp_path)!r})
import torch, snapgen_kernels as s
assert s.__file__.startswith({str(tmp_path)!r})
x = torch.randn(1, 4, 2, 2)
arguments = (x, 2, torch.ones(4), torch.zeros(4))
assert "Rebuild it" in s.backends()["cpp"]["reason"]
with s.use("reference"):
    s.group_norm_silu(*arguments)
try:
    s.group_norm_silu(*arguments)
except ImportError as error:
    assert "Rebuild it" in str(error)
else:
    raise SystemExit("no error")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_warmup() -> None:
    expected = "cpu" in SPECS["group_norm_silu"].kernels()
    sizes = {"group_norm_silu": [{"B": 1, "C": 8, "H": 3, "W": 3, "G": 2}]}
    assert snapgen_kernels.warmup(sizes, progress=False) == (2 if expected else 0)
    with pytest.raises(ValueError, match="conv9"):
        snapgen_kernels.warmup({"conv9": []})


@built
def test_warmup_of_a_decoders_end(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """What no registered op calls: a block that tells the next norm its statistics, and the last layer, given these."""
    told: list[bool] = []

    def noted(x: torch.Tensor, *rest: object, statistics: object) -> None:
        told.append(statistics is not None and x.shape == (2, 8, 5, 7))

    monkeypatch.setattr(decoding, "norm_silu_conv", noted)
    sizes = {"B": 2, "C": 8, "M": 16, "H": 5, "W": 7, "G": 4, "O": 3}
    assert snapgen_kernels.warmup({"norm_silu_conv": [sizes]}) == 2 and told == [True, True]
    assert "warming up 2/2 norm_silu_conv bfloat16 B=2 C=8 M=16" in capsys.readouterr().err
    monkeypatch.undo()
    before = torch.get_rng_state()
    assert snapgen_kernels.warmup({"norm_silu_conv": [sizes]}, progress=False) == 2
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(ValueError, match="norm_silu_conv: no size O; needs B, C"):
        snapgen_kernels.warmup({"norm_silu_conv": [{k: v for k, v in sizes.items() if k != "O"}]})
    with pytest.raises(ValueError, match="M is 20; it must be a multiple of C, 8"):
        snapgen_kernels.warmup({"norm_silu_conv": [{**sizes, "M": 20}]})


@built
def test_warmup_names_the_call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(_backend, "missing_kernel", lambda op, device: None)
    count = snapgen_kernels.warmup({"geglu": [{"B": 1, "N": 2, "C": 4, "F": 3}]}, dtypes=[torch.float32])
    assert count == 1
    assert "warming up 1/1 geglu float32 B=1 N=2 C=4 F=3" in capsys.readouterr().err


def test_warmup_without_kernels_makes_no_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_backend, "missing_kernel", lambda op, device: "none")
    assert snapgen_kernels.warmup() == snapgen_kernels.warmup(device="cuda") == 0


@pytest.mark.parametrize("device", ["cpu", "meta", "cuda"])
def test_tuning_where_no_triton_kernel_runs_says_why(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(_backend, "triton_reason", lambda: None)
    reason = "torch sees no CUDA" if device == "cuda" else "they run on 'cuda'"
    with pytest.raises(ValueError, match=f"'{device}'.*{reason}"):
        snapgen_kernels.warmup(device=device, tune=True)
    monkeypatch.setattr(_backend, "triton_reason", lambda: "no triton here")
    with pytest.raises(ValueError, match="no triton here"):
        snapgen_kernels.warmup(device="cuda", tune=True)


def test_model_shapes_fit_warmup() -> None:
    shapes = snapgen_kernels.testing.model_shapes(batch=3)
    assert set(shapes) == set(SPECS)
    for op, sizes in shapes.items():
        assert sizes and all(dims["B"] == 3 for dims in sizes), op
        assert [dict(sorted(d.items())) for d in sizes] == [
            dict(sorted({**case.dims, "B": 3}.items()))
            for case in snapgen_kernels.testing.bench_cases(op)
            if case.dtype == torch.float32
        ]


def test_profile_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    class Recorder:
        def annotate(self, name: str, domain: str) -> object:
            import contextlib

            seen.append(f"{domain}:{name}")
            return contextlib.nullcontext()

    monkeypatch.setitem(sys.modules, "nvtx", Recorder())  # type: ignore[arg-type]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with snapgen_kernels.profile_range("off"):
        pass
    snapgen_kernels.profile_ranges(True)
    try:
        with snapgen_kernels.profile_range("on"):
            pass
    finally:
        snapgen_kernels.profile_ranges(False)
    assert seen == ["snapgen:on"]
