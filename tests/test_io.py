"""Files appear whole or not at all; checkpoints are refused with one clear message."""

import os
import pickle

import pytest
import torch

from snapgen import io


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    io.write_text(path, "old")
    with pytest.raises(RuntimeError), io.whole_file(path) as temporary:
        temporary.write_text("half of the ne")
        raise RuntimeError
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_failed_directory_leaves_the_old_one(tmp_path):
    path = tmp_path / "d"
    with io.whole_directory(path) as folder:
        (folder / "x").write_text("old")
    with pytest.raises(RuntimeError), io.whole_directory(path) as folder:
        (folder / "x").write_text("new")
        raise RuntimeError
    assert (path / "x").read_text() == "old"
    with io.whole_directory(path) as folder:
        (folder / "y").write_text("new")
    assert os.listdir(path) == ["y"]
    assert os.listdir(tmp_path) == ["d"]


def test_written_files_follow_the_umask(tmp_path):
    old = os.umask(0o022)
    try:
        io.write_text(tmp_path / "a", "x")
        with io.whole_directory(tmp_path / "d"):
            pass
    finally:
        os.umask(old)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o644
    assert (tmp_path / "d").stat().st_mode & 0o777 == 0o755


@pytest.fixture
def full_disk():
    """A path on a file system with no room, which every Linux has: writes to /dev/full fail with ENOSPC."""
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    return "/dev/full"


def test_a_full_disk_is_one_clear_message_and_loses_nothing(tmp_path, full_disk):
    path = tmp_path / "w.safetensors"
    io.save_tensors(path, {"a": torch.ones(3)})
    expected = pytest.raises(OSError, match=r"no space left on the disk while writing .*w.safetensors")
    with expected, io.whole_file(path), open(full_disk, "w") as full:
        full.write("x" * 100_000)
        full.flush()
    assert torch.equal(io.load_tensors(path)["a"], torch.ones(3))
    assert os.listdir(tmp_path) == ["w.safetensors"]


def test_a_header_length_that_looks_like_a_pickle_is_read(tmp_path):
    seen = set()
    for length in range(1, 40):
        path = tmp_path / "w.safetensors"
        io.save_tensors(path, {"a" * length: torch.ones(1)}, {"note": "x" * 30})
        seen.add(path.read_bytes()[0])
        io.load_tensors(path)
    assert 0x80 in seen


def test_truncated_pickled_and_missing_files_are_named(tmp_path):
    good = tmp_path / "good.safetensors"
    io.save_tensors(good, {"a": torch.arange(1000.0)})
    assert torch.equal(io.load_tensors(good)["a"], torch.arange(1000.0))

    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(good.read_bytes()[:-100])
    with pytest.raises(io.CheckpointError, match="truncated"):
        io.load_tensors(cut)
    empty = tmp_path / "empty.safetensors"
    empty.write_bytes(b"")
    with pytest.raises(io.CheckpointError, match="truncated"):
        io.load_tensors(empty)

    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "executed"),))

    pickled = tmp_path / "pickled.safetensors"
    pickled.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(io.CheckpointError, match="pickle"):
        io.load_tensors(pickled)
    torch.save({"a": torch.ones(1)}, tmp_path / "saved.pt")
    with pytest.raises(io.CheckpointError, match="pickle"):
        io.load_tensors(tmp_path / "saved.pt")
    assert not (tmp_path / "executed").exists()
    with pytest.raises(io.CheckpointError, match="no such file"):
        io.load_tensors(tmp_path / "absent")


def test_every_file_of_a_directory_has_the_permissions_of_the_umask(tmp_path):
    before = os.umask(0o022)
    try:
        with io.whole_directory(tmp_path / "d") as folder:
            (folder / "x").touch(0o600)  # as safetensors does
    finally:
        os.umask(before)
    assert (tmp_path / "d" / "x").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("damaged", [b"{", b"", b"[1]", b"\xff\xfe{"])
def test_a_damaged_json_file_is_named(tmp_path, damaged):
    path = tmp_path / "config.json"
    path.write_bytes(damaged)
    with pytest.raises(io.CheckpointError, match=r"config\.json: damaged"):
        io.read_json(path)
