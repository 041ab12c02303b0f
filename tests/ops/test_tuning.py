"""The choice among a kernel's configs: order of the sources, files, and that nothing is timed unless asked for. No GPU:
its name and the timer are given."""

import importlib.util
import json
import logging
import multiprocessing
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch

import snapgen_kernels
from tests.ops.variants import built

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

GPU = "NVIDIA H100 80GB HBM3"
SLUG = "nvidia-h100-80gb-hbm3"
KEY = (1, 256, "bf16")


class Config(NamedTuple):
    block: int
    fast: bool = False
    name: str = "a"


CONFIGS = [Config(16), Config(32, True), Config(64, name="b")]
DEFAULT = CONFIGS[0]


@pytest.fixture
def tuning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    from snapgen_kernels._triton import tuning as module

    monkeypatch.setenv("SNAPGEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "TABLES", tmp_path / "tables")
    monkeypatch.setattr(module, "_device_name", lambda index: GPU)
    (tmp_path / "tables").mkdir()
    module.forget()
    yield module
    module.forget()


class Timer:
    """A timer that knows how long each config takes, and counts."""

    def __init__(self, times: dict[Config, float], failing: dict[Config, Exception] | None = None) -> None:
        self.times, self.failing, self.calls = times, failing or {}, 0
        self.running: Config | None = None

    def launch(self, config: Config) -> None:
        if config in self.failing:
            raise self.failing[config]
        self.running = config

    def __call__(self, function: Callable[[], object]) -> float:
        self.calls += 1
        function()
        assert self.running is not None
        return self.times[self.running]


def _never(config: Config) -> None:
    raise AssertionError("launched outside tuning")


def _choose(tuning: ModuleType, launch: Any = _never, kernel: str = "k", candidates: list[Config] = CONFIGS) -> Config:
    return tuning.choose(kernel, KEY, candidates, DEFAULT, launch)


def _tune(tuning: ModuleType, fastest: Config = CONFIGS[1], kernel: str = "k") -> Timer:
    timer = Timer({config: 1.0 if config == fastest else 2.0 for config in CONFIGS})
    with tuning.tuning(timer):
        assert _choose(tuning, timer.launch, kernel) == fastest
    return timer


def _write(path: Path, value: object) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))


def _stored(config: Config, kernel: str = "k") -> dict[str, Any]:
    return {kernel: {json.dumps(list(KEY)): config._asdict()}}


def test_an_ordinary_call_takes_the_default_and_writes_nothing(tuning: ModuleType, tmp_path: Path) -> None:
    assert _choose(tuning) == _choose(tuning) == DEFAULT
    assert not (tmp_path / "cache").exists()


def test_tuning_measures_every_candidate_once_and_keeps_the_fastest(tuning: ModuleType) -> None:
    timer = Timer({CONFIGS[0]: 3.0, CONFIGS[1]: 1.0, CONFIGS[2]: 2.0})
    with tuning.tuning(timer):
        assert _choose(tuning, timer.launch) == _choose(tuning, timer.launch) == CONFIGS[1]
    assert timer.calls == 3
    assert _choose(tuning) == CONFIGS[1]
    tuning.forget()
    assert _choose(tuning) == CONFIGS[1]
    path = tuning.cache_file(SLUG)
    assert json.loads(path.read_text()) == _stored(CONFIGS[1])
    assert path.stat().st_mode & 0o777 == 0o644
    _tune(tuning, CONFIGS[2])  # asked for again: measured again
    assert _choose(tuning) == CONFIGS[2]


def test_a_single_candidate_is_not_measured(tuning: ModuleType) -> None:
    with tuning.tuning(Timer({})):
        assert _choose(tuning, candidates=[CONFIGS[2]]) == CONFIGS[2]


def test_forced_comes_first_and_nests(tuning: ModuleType) -> None:
    other = Config(128)
    with tuning.tuning(Timer({})), tuning.forced("k", other):
        with tuning.forced("l", CONFIGS[2]):
            assert _choose(tuning) == other and _choose(tuning, kernel="l") == CONFIGS[2]
        assert _choose(tuning) == other
    assert _choose(tuning) == DEFAULT and _choose(tuning, kernel="l") == DEFAULT


def test_the_cache_comes_before_the_table(tuning: ModuleType) -> None:
    _write(tuning.TABLES / f"{SLUG}.json", {"source": {"measured": False}, "configs": _stored(CONFIGS[2])})
    assert _choose(tuning) == CONFIGS[2]
    _write(tuning.cache_file(SLUG), _stored(CONFIGS[1]))
    assert _choose(tuning) == CONFIGS[2], "files are read once"
    tuning.forget()
    assert _choose(tuning) == CONFIGS[1]


@pytest.mark.parametrize("stored", [{"block": 5, "fast": False, "name": "a"}, {"block": 16}, {}])
def test_what_is_no_candidate_any_more_is_ignored(tuning: ModuleType, stored: dict[str, Any]) -> None:
    _write(tuning.cache_file(SLUG), {"k": {json.dumps(list(KEY)): stored}})
    _write(tuning.TABLES / f"{SLUG}.json", {"source": {}, "configs": _stored(CONFIGS[2])})
    assert _choose(tuning) == CONFIGS[2]


def test_tables_serve_their_family_and_caches_do_not(tuning: ModuleType) -> None:
    _write(tuning.TABLES / "nvidia.json", {"source": {}, "configs": _stored(CONFIGS[1])})
    _write(tuning.cache_file("nvidia-h100"), _stored(CONFIGS[1]))
    assert _choose(tuning) == DEFAULT
    _write(tuning.TABLES / "nvidia-h100.json", {"source": {}, "configs": _stored(CONFIGS[2])})
    tuning.forget()
    assert _choose(tuning) == CONFIGS[2]


@pytest.mark.parametrize("name", ["NVIDIA H200", "NVIDIA H100 PCIe", "AMD Instinct MI300X", " A--b "])
def test_slugs(tuning: ModuleType, name: str) -> None:
    expected = {"NVIDIA H200": "nvidia-h200", "NVIDIA H100 PCIe": "nvidia-h100-pcie"}
    expected |= {"AMD Instinct MI300X": "amd-instinct-mi300x", " A--b ": "a-b"}
    assert tuning.slug(name) == expected[name]


def test_a_choice_belongs_to_the_sources_and_to_triton(tuning: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    _tune(tuning)
    for attribute, value in (("sources", lambda: "another"), ("triton", _Other(tuning.triton))):
        with monkeypatch.context() as patch:
            patch.setattr(tuning, attribute, value)
            tuning.forget()
            assert _choose(tuning) == DEFAULT
    tuning.forget()
    assert _choose(tuning) == CONFIGS[1]


class _Other:
    __version__ = "0.0.1"

    def __init__(self, module: ModuleType) -> None:
        self.testing, self.runtime = module.testing, module.runtime


@pytest.mark.parametrize("damage", ["", "{", "[]", "3", '{"k": 1}', '{"k": {"[]": [1]}}', "\udcff"])
def test_a_damaged_cache_is_named_and_replaced(
    tuning: ModuleType, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    path = tuning.cache_file(SLUG)
    path.parent.mkdir()
    path.write_bytes(damage.encode("utf-8", "surrogateescape"))
    with caplog.at_level(logging.WARNING, logger="snapgen_kernels"):
        assert _choose(tuning) == DEFAULT
    assert str(path) in caplog.text and "ignored" in caplog.text
    _tune(tuning)
    assert json.loads(path.read_text()) == _stored(CONFIGS[1])


def test_a_damaged_table_is_named(tuning: ModuleType, caplog: pytest.LogCaptureFixture) -> None:
    _write(tuning.TABLES / "nvidia-h100.json", _stored(CONFIGS[1]))  # no "configs"
    assert _choose(tuning) == DEFAULT
    assert "nvidia-h100.json" in caplog.text


def test_what_another_process_wrote_meanwhile_is_kept(tuning: ModuleType) -> None:
    assert _choose(tuning) == DEFAULT  # the file, which is not there, has been read
    _write(tuning.cache_file(SLUG), _stored(CONFIGS[2], "other"))
    _tune(tuning)
    assert json.loads(tuning.cache_file(SLUG).read_text()) == {**_stored(CONFIGS[1]), **_stored(CONFIGS[2], "other")}


def _keep_many(module: ModuleType, prefix: str) -> None:
    for index in range(20):
        module._gpu().keep(f"{prefix}{index}", KEY, CONFIGS[1])


def test_processes_that_write_at_a_time_lose_nothing(tuning: ModuleType) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_keep_many, args=(tuning, prefix)) for prefix in "abc"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert len(json.loads(tuning.cache_file(SLUG).read_text())) == 60
    assert not list(tuning.cache_file(SLUG).parent.glob(".*")), "temporary files are left"


def test_a_folder_that_cannot_be_written_is_named(
    tuning: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SNAPGEN_CACHE", str(tmp_path / "file"))
    _tune(tuning)
    assert _choose(tuning) == CONFIGS[1], "the choice holds in this process"
    assert str(tmp_path / "file") in caplog.text and "this process alone" in caplog.text


def _out_of_resources() -> Exception:
    from triton.runtime.errors import OutOfResources

    return OutOfResources(300000, 232448, "shared memory")


def test_a_config_that_does_not_fit_is_skipped(tuning: ModuleType, caplog: pytest.LogCaptureFixture) -> None:
    timer = Timer({CONFIGS[0]: 2.0, CONFIGS[2]: 3.0}, {CONFIGS[1]: _out_of_resources()})
    with caplog.at_level(logging.INFO, logger="snapgen_kernels"), tuning.tuning(timer):
        assert _choose(tuning, timer.launch) == CONFIGS[0]
    assert "Config(block=32" in caplog.text and "shared memory" in caplog.text


def test_no_config_fits(tuning: ModuleType) -> None:
    timer = Timer({}, {config: _out_of_resources() for config in CONFIGS})
    with tuning.tuning(timer), pytest.raises(RuntimeError, match=r"k .*none of its 3 configs.*shared memory"):
        _choose(tuning, timer.launch)


def test_other_errors_are_not_swallowed(tuning: ModuleType) -> None:
    timer = Timer({}, {CONFIGS[0]: KeyError("a bug")})
    with tuning.tuning(timer), pytest.raises(KeyError, match="a bug"):
        _choose(tuning, timer.launch)
    assert _choose(tuning) == DEFAULT, "the block is left, and nothing was kept"


def test_tuning_in_a_captured_graph_is_refused(tuning: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_capturing", lambda: True)
    with tuning.tuning(Timer({})), pytest.raises(RuntimeError, match=r"k cannot be tuned.*captured"):
        _choose(tuning)
    assert _choose(tuning) == DEFAULT, "an ordinary call may be captured"


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_tuning_without_a_gpu_is_refused(tuning: ModuleType) -> None:
    with pytest.raises(RuntimeError, match="torch sees none"):
        tuning.tuning()


def test_other_threads_are_not_tuned(tuning: ModuleType) -> None:
    seen: list[Config] = []
    with tuning.tuning(Timer({})), tuning.forced("l", CONFIGS[2]):
        thread = threading.Thread(target=lambda: seen.extend([_choose(tuning), _choose(tuning, kernel="l")]))
        thread.start()
        thread.join()
    assert seen == [DEFAULT, DEFAULT]


def test_a_backward_pass_is_in_the_block(tuning: ModuleType) -> None:
    """Its kernels run in this thread, also for CUDA tensors, while the block lasts."""
    before = torch._C._is_multithreading_enabled()
    with tuning.tuning(Timer({})):
        assert not torch._C._is_multithreading_enabled()
        with tuning.forced("k", DEFAULT):
            assert not torch._C._is_multithreading_enabled()
        assert not torch._C._is_multithreading_enabled()
    assert torch._C._is_multithreading_enabled() == before


def test_threads_agree(tuning: ModuleType) -> None:
    """Many threads at their first choice: one answer, whoever comes first."""
    candidates = [Config(n) for n in range(64)]
    _write(tuning.cache_file(SLUG), {f"k{n}": {json.dumps([n]): Config(n)._asdict()} for n in range(64)})
    start, wrong = threading.Barrier(8), []

    def work() -> None:
        start.wait()
        wrong.extend(n for n in range(64) if tuning.choose(f"k{n}", (n,), candidates, DEFAULT, _never) != Config(n))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_export_writes_a_table_that_is_read(tuning: ModuleType) -> None:
    with pytest.raises(RuntimeError, match="nothing was measured"):
        tuning.export(tuning.TABLES)
    _tune(tuning)
    path = tuning.export(tuning.TABLES)
    assert path == tuning.TABLES / f"{SLUG}.json"
    written = json.loads(path.read_text())
    assert written["source"]["measured"] is True and written["source"]["gpu"] == SLUG
    tuning.cache_file(SLUG).unlink()
    tuning.forget()
    assert _choose(tuning) == CONFIGS[1]


def test_export_without_a_gpu(tuning: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_device_name", lambda index: None)
    _tune(tuning)
    assert _choose(tuning) == CONFIGS[1] and not (tmp_path / "cache").exists()
    with pytest.raises(RuntimeError, match="sees none"):
        tuning.export(tmp_path)


@built
def test_warmup_tunes_every_case(
    tuning: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On this machine's device, with an op that asks for a choice in place of the Triton kernels."""
    from snapgen_kernels import _backend, checks

    timer = Timer({CONFIGS[0]: 3.0, CONFIGS[1]: 2.0, CONFIGS[2]: 1.0})
    chosen: list[Config] = []
    monkeypatch.setattr(importlib.import_module("snapgen_kernels.warmup"), "_untunable", lambda device: None)
    monkeypatch.setattr(_backend, "missing_kernel", lambda op, device: None if op == "geglu" else "none")
    monkeypatch.setattr(tuning, "tuning", partial(tuning.tuning, timer))
    monkeypatch.setattr(checks, "run", lambda *rest: chosen.append(_choose(tuning, timer.launch)))
    shapes = {"geglu": [{"B": 1, "N": 2, "C": 4, "F": 3}]}
    assert snapgen_kernels.warmup(shapes, tune=True) == 2
    assert chosen == [CONFIGS[2]] * 2 and timer.calls == 3
    assert "tuning 2/2 geglu bfloat16 B=1 N=2 C=4 F=3" in capsys.readouterr().err
    assert snapgen_kernels.warmup(shapes, progress=False) == 2
    assert timer.calls == 3, "a plain warmup measures nothing"
    assert snapgen_kernels.warmup(tune=True, progress=False) == len(snapgen_kernels.testing.bench_cases("geglu"))


def test_shipped_tables_are_whole_and_say_where_they_come_from() -> None:
    folder = Path(snapgen_kernels.__file__).parent / "_triton" / "tables"
    for path in folder.glob("*.json"):
        table = json.loads(path.read_text())
        assert isinstance(table["source"]["measured"], bool), path
        assert table["configs"], path
        for configs in table["configs"].values():
            for key, config in configs.items():
                assert isinstance(json.loads(key), list) and isinstance(config, dict), (path, key)
