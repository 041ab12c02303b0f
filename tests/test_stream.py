"""Shards read from front to back: the order, resuming, processes and workers, and what is broken."""

from __future__ import annotations

import gzip
import io
import pickle
import sys
import types
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_data_folder import _Bomb, encoded, exploded, write_tar

from snapgen.data import stream as module
from snapgen.data.loader import Batch, Share, batches, open_dataset
from snapgen.data.stream import WebDatasetStream, count_samples

pytestmark = pytest.mark.method

SIZES = (5, 3, 7, 4, 6, 2)  # samples of each shard


def members(first: int, count: int) -> list[tuple[str, bytes | str]]:
    """Pictures whose colour is their number, as is their caption."""
    found: list[tuple[str, bytes | str]] = []
    for number in range(first, first + count):
        found += [(f"a/{number:03}.png", encoded((number, 0, 0), (8, 8)))]
        found += (
            [(f"a/{number:03}.txt", f"{number}")]
            if number % 2
            else [(f"a/{number:03}.json", f'{{"text": "{number}"}}')]
        )
    return found


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("shards")
    for n, size in enumerate(SIZES):
        write_tar(root / f"s-{n:02}.tar", members(sum(SIZES[:n]), size))
    return root


def read(
    source: WebDatasetStream, share: Share, start: int, passes: int, *, seed: int = 0, workers: int = 0
) -> list[Batch]:
    return list(islice(batches(source, share, start=start, seed=seed, workers=workers), passes))


def numbers(found: Sequence[Batch]) -> list[int]:
    for batch in found:
        assert batch.images is not None and len(batch.positions) == len(batch.captions) == len(batch.images)
        for image, caption in zip(batch.images, batch.captions, strict=True):
            assert ((image[0] + 1) * 127.5).round().unique().tolist() == [int(caption)]
    return [int(caption) for batch in found for caption in batch.captions]


# --- the order ---


def test_every_sample_comes_once_an_epoch(shards: Path) -> None:
    """One lane: epochs follow each other, each with an order of its own."""
    drawn = numbers(read(WebDatasetStream(shards, 8, lanes=1, block=4), Share(3, 3), 0, 27))
    first, second, third = drawn[:27], drawn[27:54], drawn[54:]
    # Blocks reach over the ends of epochs, so a few samples trade places there.
    counts = Counter(drawn)
    assert set(counts) == set(range(27)) and all(2 <= n <= 4 for n in counts.values()) and len(drawn) == 81
    assert first != second != third
    ordered = numbers(read(WebDatasetStream(shards, 8, lanes=1, block=1), Share(3, 3), 0, 9))
    assert sorted(ordered) == list(range(27)) and ordered != sorted(ordered)


def test_each_step_takes_as_much_from_every_lane(shards: Path) -> None:
    """By hand: three lanes of two shards each, two samples of each a step, without shuffling in blocks."""
    from snapgen import seeds

    source = WebDatasetStream(shards, 8, lanes=3, block=1)
    order = torch.randperm(6, generator=seeds.generator(7, 0)).tolist()
    lanes = [[n for s in order[lane::3] for n in range(sum(SIZES[:s]), sum(SIZES[: s + 1]))] for lane in range(3)]
    steps = read(source, Share(6, 6), 0, 2, seed=7)
    for step, batch in enumerate(steps):
        assert numbers([batch]) == [n for lane in lanes for n in lane[2 * step : 2 * step + 2]]


@given(
    start=st.integers(0, 25),
    block=st.integers(1, 9),
    lanes=st.sampled_from((1, 2, 4)),
    counted=st.booleans(),
    micro=st.sampled_from((1, 2, 4)),
    seed=st.integers(0, 2),
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_processes_and_any_start_give_the_same_run(
    shards: Path, start: int, block: int, lanes: int, counted: bool, micro: int, seed: int
) -> None:
    def opened() -> WebDatasetStream:
        counts = count_samples(shards) if counted else None
        return WebDatasetStream(shards, 8, lanes=lanes, block=block, counts=counts)

    whole = numbers(read(opened(), Share(4, 4), 0, start + 3, seed=seed))[4 * start :]
    passes: list[tuple[int, int]] = []
    world = 4 // micro
    for rank in range(world):
        for batch in read(opened(), Share(4, micro, rank, world), start, 3, seed=seed):
            passes += zip(batch.positions, numbers([batch]), strict=True)
    assert [place for place, _ in sorted(passes)] == list(range(4 * start, 4 * start + 12))
    assert [number for _, number in sorted(passes)] == whole


def test_counts_spare_reading(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies before the start is not opened, where it is known how much that is."""
    opened: list[str] = []
    real = module._opened
    monkeypatch.setattr(module, "_opened", lambda shard: opened.append(shard) or real(shard))
    counts = count_samples(shards)
    assert list(counts.values()) == list(SIZES) and len(opened) == 6
    opened.clear()
    read(WebDatasetStream(shards, 8, lanes=1, block=1, counts=counts), Share(1, 1), 27 * 100, 1)
    assert len(opened) == 1
    opened.clear()
    read(WebDatasetStream(shards, 8, lanes=1, block=1), Share(1, 1), 27 * 3, 1)
    assert len(opened) == 3 * 6 + 1


def test_processes_read_their_own_lanes_alone(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    real = module._opened
    monkeypatch.setattr(module, "_opened", lambda shard: opened.append(shard) or real(shard))
    for rank in range(2):
        read(WebDatasetStream(shards, 8, lanes=2, block=1), Share(4, 2, rank, 2), 0, 1)
    assert len(opened) == len(set(opened)) == 2  # each the first of its lane


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_workers_give_the_same_batches(shards: Path, workers: int) -> None:
    source = WebDatasetStream(shards, 8, lanes=4, block=3)
    plain = read(source, Share(4, 2, 1, 2), 5, 6)
    for one, two in zip(plain, read(source, Share(4, 2, 1, 2), 5, 6, workers=workers), strict=True):
        assert one.captions == two.captions and list(one.positions) == list(two.positions)
        assert torch.equal(one.images, two.images)


def test_lanes(shards: Path) -> None:
    source = WebDatasetStream(shards, 8)
    assert [source._lanes(size) for size in (1, 4, 6, 7, 12, 64)] == [1, 4, 6, 1, 6, 4]
    for lanes, size in ((4, 6), (8, 8)):
        with pytest.raises(ValueError, match=f"lanes: got {lanes}; must divide the batch size, {size}"):
            read(WebDatasetStream(shards, 8, lanes=lanes), Share(size, size), 0, 1)


# --- what is broken ---


def broken_members() -> list[tuple[str, bytes | str]]:
    return [
        ("a.png", encoded((1, 0, 0), (8, 8))), ("a.txt", "1"),
        ("b.png", encoded()[:40]), ("b.txt", "cut short"),
        ("c.png", encoded()), ("c.txt", b"\xff\xfe\x00"),
        ("d.png", encoded()),
        ("e.txt", "alone"),
        ("f.png", encoded()), ("f.json", '["no object"]'),
        ("g.png", encoded()), ("g.json", '{"caption": 7}'),
        ("h.png", encoded((2, 0, 0), (8, 8))), ("h.txt", "2"), ("h.pyd", pickle.dumps(_Bomb())),
        ("__notes__.txt", "WebDataset's own"),
    ]  # fmt: skip


def test_what_cannot_be_used_is_stood_in_for_and_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_tar(tmp_path / "s.tar", broken_members())
    for workers in (0, 2):
        caplog.clear()
        source = WebDatasetStream(tmp_path, 8, block=6)
        assert count_samples(tmp_path) == {str(tmp_path / "s.tar"): 6}
        drawn = numbers(read(source, Share(6, 6), 0, 3, workers=workers))
        assert set(drawn) == {1, 2} and len(drawn) == 18
        assert dict(source.skipped) == {
            "image is broken or not JPEG, PNG or WebP": 1,
            "caption is not UTF-8 text": 1,
            "no caption (.txt, .json)": 1,
            "no image (.jpg, .png, .webp)": 1,
            'no "caption" or "text"': 1,
            "caption is not text": 1,
        }
        assert "s.tar/b" in source.report() and "6 skipped so far" in source.report()
        assert caplog.text.count("skipped s.tar/b (image is broken") == 1
    assert not exploded  # nothing was unpickled
    # From any place the same stand-in.
    whole = numbers(read(WebDatasetStream(tmp_path, 8, block=6), Share(1, 1), 0, 30))
    for start in (1, 7, 15, 22):
        assert numbers(read(WebDatasetStream(tmp_path, 8, block=6), Share(1, 1), start, 30 - start)) == whole[start:]


@pytest.mark.parametrize("cut", [512, 700, 1024 + 512, 3000])
def test_a_shard_that_is_cut_short_gives_what_it_has(
    shards: Path, tmp_path: Path, cut: int, caplog: pytest.LogCaptureFixture
) -> None:
    for path in shards.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    hurt = tmp_path / "s-00.tar"
    hurt.write_bytes(hurt.read_bytes()[:cut])
    source = WebDatasetStream(tmp_path, 8, lanes=1, block=1)
    drawn = numbers(read(source, Share(1, 1), 0, 25))
    assert set(range(5, 27)) <= set(drawn)  # the other shards' are all there
    assert source.skipped["shard cannot be read to its end"] == 1 and "s-00.tar (" in caplog.text
    with pytest.raises(ValueError, match=r"s-00\.tar: cannot be read to its end"):
        count_samples(tmp_path)


def test_no_usable_sample_is_an_error(tmp_path: Path) -> None:
    write_tar(tmp_path / "s.tar", [("a.png", encoded()), ("b.txt", "alone")])
    with pytest.raises(ValueError, match="no sample of picture and caption"):
        read(WebDatasetStream(tmp_path, 8), Share(1, 1), 0, 1)
    write_tar(tmp_path / "s.tar", [("a.png", b"broken"), ("a.txt", "x")])
    with pytest.raises(ValueError, match="4 samples in a row cannot be used"):
        read(WebDatasetStream(tmp_path, 8, block=4), Share(1, 1), 0, 1)


def test_wrong_arguments(shards: Path, tmp_path: Path) -> None:
    for named in (dict(lanes=0), dict(block=0), dict(retries=-1)):
        with pytest.raises(ValueError, match=next(iter(named))):
            WebDatasetStream(shards, 8, **named)
    with pytest.raises(ValueError, match="resolution: got 0"):
        WebDatasetStream(shards, 0)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        WebDatasetStream(tmp_path / "none.tar", 8)
    (tmp_path / "counts.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        WebDatasetStream(shards, 8, counts=tmp_path / "counts.json")
    with pytest.raises(ValueError, match="must hold a number of samples"):
        WebDatasetStream(shards, 8, counts={"a.tar": -1})
    with pytest.raises(ValueError, match="streamed shards have no buckets"):
        from snapgen.data.buckets import Buckets

        open_dataset(f"stream:{shards}", 32, bucketing=Buckets(resolution=32))


# --- where shards come from ---


def test_commands_urls_and_compressed_tars(shards: Path, tmp_path: Path) -> None:
    pytest.importorskip("webdataset")
    expected = numbers(read(WebDatasetStream(shards / "s-{00..02}.tar", 8, lanes=1), Share(5, 5), 0, 3))
    piped = WebDatasetStream(f"pipe:cat {shards}/s-{{00..02}}.tar", 8, lanes=1)
    assert numbers(read(piped, Share(5, 5), 0, 3)) == expected and not piped.skipped
    assert (
        numbers(read(WebDatasetStream(f"file://{shards}/s-{{00..02}}.tar", 8, lanes=1), Share(5, 5), 0, 3)) == expected
    )
    for n in range(3):
        (tmp_path / f"s-{n:02}.tar").write_bytes(gzip.compress((shards / f"s-{n:02}.tar").read_bytes()))
    packed = WebDatasetStream(tmp_path, 8, lanes=1)
    assert numbers(read(packed, Share(5, 5), 0, 3)) == expected and not packed.skipped
    assert isinstance(open_dataset(f"pipe:cat {shards}/s-00.tar", 8), WebDatasetStream)
    assert sorted(open_dataset(f"stream:{shards}", 8).captions()) == sorted(map(str, range(27)))


def test_a_command_that_fails_is_tried_again_and_goes_on_where_it_was(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("webdataset")
    monkeypatch.setattr(module, "PAUSE", 0.01)
    script = tmp_path / "flaky.sh"
    # The first time it breaks off half way and fails, then it works.
    script.write_text(
        f"if [ -e {tmp_path}/tried ]; then cat {shards}/s-02.tar; "
        f"else touch {tmp_path}/tried; head -c 8000 {shards}/s-02.tar; exit 3; fi"
    )
    source = WebDatasetStream(f"pipe:sh {script}", 8, block=1)
    assert numbers(read(source, Share(7, 7), 0, 1)) == list(range(8, 15)) and not source.skipped
    always = f"pipe:head -c 8000 {shards}/s-02.tar; exit 3"
    broken = WebDatasetStream([always, str(shards / "s-00.tar")], 8, lanes=1, block=1)
    drawn = numbers(read(broken, Share(1, 1), 0, 12))
    assert set(range(5)) <= set(drawn) and broken.skipped["shard cannot be read to its end"] == 1


def test_without_webdataset_files_still_work(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "webdataset", None)
    assert len(read(WebDatasetStream(shards, 8), Share(6, 6), 0, 2)) == 2
    with pytest.raises(ValueError, match="need the package webdataset, which is not installed"):
        WebDatasetStream("https://example.org/{00..09}.tar", 8)


def test_object_storage_through_webdatasets_openers(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for webdataset, whose `gopen(url, "rb")` gives a stream: what we ask of it, and no more."""
    asked: list[str] = []

    def gopen(url: str, mode: str) -> io.BytesIO:
        assert mode == "rb"
        asked.append(url)
        return io.BytesIO((shards / url.rsplit("/", 1)[1]).read_bytes())

    fake = types.ModuleType("webdataset")
    fake.gopen = gopen  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "webdataset", fake)
    source = open_dataset("gs://bucket/s-{00..01}.tar", 8)
    assert sorted(numbers(read(source, Share(8, 8), 0, 1))) == list(range(8)) or source._lanes(8) == 2
    assert set(asked) == {"gs://bucket/s-00.tar", "gs://bucket/s-01.tar"}


def test_a_run_trains_on_a_stream_and_is_resumed(shards: Path, tmp_path: Path) -> None:
    """Through the training loop: stopped and gone on with, to the same weights."""
    from small_models import QUIET, autoencoder_task

    from snapgen.train import TrainConfig, train

    def run(steps: int, out: str) -> Path:
        config = TrainConfig(steps=steps, batch_size=4, warmup=1, save_every=2, sample_every=99, cooldown=0)
        return train(autoencoder_task(), WebDatasetStream(shards, 32, block=4), config, tmp_path / out, console=QUIET)

    whole = run(4, "whole")
    run(2, "parts")
    parts = run(4, "parts")
    for path in sorted(whole.rglob("*.safetensors")):
        assert (parts / path.relative_to(whole)).read_bytes() == path.read_bytes()
