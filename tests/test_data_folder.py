"""Folders and shards of real images: what is read, what is skipped and how that is told."""

from __future__ import annotations

import io
import json
import logging
import pickle
import random
import tarfile
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image

from snapgen.data.folder import BROKEN, ImageFolder, WebDatasetShards, load_image
from snapgen.data.loader import Share, batches

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def encoded(color: tuple[int, int, int] = RED, size: tuple[int, int] = (20, 16), form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, form)
    return buffer.getvalue()


def write(root: Path, files: dict[str, bytes | str]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return root


def write_tar(path: Path, files: list[tuple[str, bytes | str]], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, content in files:
            data = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def colour_of(image: torch.Tensor) -> tuple[int, ...]:
    return tuple(((image.mean((1, 2)) + 1) * 127.5).round().int().tolist())


# --- pictures ---


@given(width=st.integers(1, 90), height=st.integers(1, 90), resolution=st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_any_size_becomes_a_square(width: int, height: int, resolution: int) -> None:
    for form in ("PNG", "JPEG", "WEBP"):
        picture = load_image(encoded((200, 100, 50), (width, height), form), resolution)
        assert picture.size == (resolution, resolution) and picture.mode == "RGB"
        assert np.abs(np.asarray(picture, int) - (200, 100, 50)).max() <= 4  # lossy formats


def test_the_central_square_is_cut() -> None:
    pixels = np.full((10, 30, 3), 255, np.uint8)
    pixels[:, 10:20] = BLUE
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    assert (np.asarray(load_image(buffer.getvalue(), 10)) == BLUE).all()
    Image.fromarray(pixels.transpose(1, 0, 2)).save(buffer := io.BytesIO(), "PNG")
    assert (np.asarray(load_image(buffer.getvalue(), 10)) == BLUE).all()


def test_transparency_becomes_white_and_grey_becomes_rgb() -> None:
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(buffer := io.BytesIO(), "PNG")
    assert (np.asarray(load_image(buffer.getvalue(), 4)) == 255).all()
    Image.new("L", (8, 8), 77).save(buffer := io.BytesIO(), "PNG")
    assert (np.asarray(load_image(buffer.getvalue(), 4)) == 77).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_set_upright(orientation: int) -> None:
    """Against Pillow's own exif_transpose, on a picture with nothing odd in its EXIF."""
    from PIL import ImageOps

    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    pixels = np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer := io.BytesIO(), "PNG", exif=exif)
    upright = ImageOps.exif_transpose(Image.open(buffer))
    np.testing.assert_array_equal(np.asarray(load_image(buffer.getvalue(), 12)), np.asarray(upright))


@pytest.mark.filterwarnings("ignore")
def test_damaged_files_raise_only_what_is_caught() -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    exif[ExifTags.Base.Copyright] = "x" * 50
    pixels = np.random.default_rng(0).integers(0, 256, (20, 25, 3), dtype=np.uint8)
    originals = []
    for form in ("JPEG", "PNG", "WEBP"):
        Image.fromarray(pixels).save(buffer := io.BytesIO(), form, exif=exif)
        originals.append(buffer.getvalue())
    choose, broken = random.Random(0), 0
    for _ in range(3000):
        data = bytearray(choose.choice(originals))
        for _ in range(choose.choice((1, 2, 10))):
            data[choose.randrange(min(len(data), choose.choice((60, 300, 5000))))] = choose.randrange(256)
        try:
            load_image(bytes(data[: choose.choice((len(data), choose.randrange(len(data))))]), 8)
        except BROKEN:
            broken += 1
    assert broken > 500


# --- folders ---


def test_folder_with_text_files(tmp_path: Path) -> None:
    root = write(
        tmp_path / "data",
        {
            "b.PNG": encoded(GREEN),
            "b.txt": "  a green field \n",
            "sub/a.jpg": encoded(RED, form="JPEG"),
            "sub/a.txt": "\ufeffein roter Platz, größer",
            "c.webp": encoded(BLUE, form="WEBP"),
            "c.txt": "sky",
            ".hidden/x.png": encoded(),
            "notes.md": "not a caption",
        },
    )
    data = ImageFolder(root, 8)
    assert [data[i]["caption"] for i in range(len(data))] == ["a green field", "sky", "ein roter Platz, größer"]
    assert colour_of(data[0]["image"]) == GREEN
    images, captions = data.batch([1, 0])
    assert images.shape == (2, 3, 8, 8) and images.dtype == torch.float32 and images.is_contiguous()
    assert captions == ["sky", "a green field"]
    assert torch.equal(images[1], data[0]["image"]) and images[1].min() == -1 and images[1].max() == 1
    assert data.report() == f"{root}: 3 pairs in use, 0 skipped"
    for wrong in (-1, 3):
        with pytest.raises(IndexError, match=r"outside \[0, 3\)"):
            data[wrong]


@pytest.mark.parametrize("name", ["captions.jsonl", "metadata.jsonl"])
def test_folder_with_a_listing(tmp_path: Path, name: str) -> None:
    lines: list[object] = [
        {"file_name": "two.png", "text": "second"},
        {"file_name": "./sub/one.png", "caption": "first"},
        {"file_name": "two.png", "text": "second again"},
        {"file_name": "absent.png", "text": "x"},
        {"file_name": "../outside.png", "text": "x"},
        {"file_name": "two.png", "text": 7},
        {"file_name": "two.png", "text": "  "},
        {"file_name": "two.png", "text": "half a pair \ud800"},
        {"file_name": "two.png"},
        {"text": "no file"},
        ["a", "list"],
    ]
    listing = "\n".join(json.dumps(line) for line in lines) + "\n\n{broken\n" + "[" * 100_000
    write(tmp_path, {"outside.png": encoded()})
    files: dict[str, bytes | str] = {
        name: listing,
        "two.png": encoded(GREEN),
        "sub/one.png": encoded(BLUE),
        "unlisted.png": encoded(),
    }
    data = ImageFolder(write(tmp_path / "data", {**files, "unlisted.txt": "ignored: there is a listing"}), 8)
    assert [data[i]["caption"] for i in range(len(data))] == ["second", "first", "second again"]
    assert colour_of(data[1]["image"]) == BLUE
    assert dict(data.skipped) == {
        "file_name does not exist": 1,
        "file_name leads out of the folder": 1,
        "caption is not text": 2,
        "caption is empty": 1,
        'no "caption" or "text"': 1,
        'line has no "file_name"': 2,
        "line is not JSON": 2,
        f"not in {name}": 1,
    }
    assert f"{name}:4" in data.report() and "unlisted.png" in data.report()


def broken_folder(root: Path) -> Path:
    return write(
        root,
        {
            "a.png": encoded(RED),
            "a.txt": "fine",
            "b.png": encoded()[:40],
            "b.txt": "cut short",
            "c.jpg": b"no image at all",
            "c.txt": "text file",
            "d.png": encoded(),
            "d.txt": b"\xff\xfe\x00bad",
            "e.png": encoded(),
            "e.txt": "",
            "f.png": encoded(),
            "g.txt": "caption alone",
            "h.gif": b"GIF89a",
            "i.png": encoded(GREEN),
            "i.txt": "fine too",
        },
    )


EXPECTED = {
    "format is not JPEG, PNG or WebP": 1,
    "no caption file beside it": 1,
    "caption without an image": 1,
    "image is broken or not JPEG, PNG or WebP": 2,
    "caption is not UTF-8 text": 1,
    "caption is empty": 1,
}


def test_what_is_skipped_is_counted_logged_and_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    data = ImageFolder(broken_folder(tmp_path), 8, verify=True)
    assert dict(data.skipped) == EXPECTED
    report = data.report()
    assert report.splitlines()[0] == f"{tmp_path}: 2 pairs in use, 7 skipped"
    assert "       2  image is broken or not JPEG, PNG or WebP: b.png, c.jpg" in report.splitlines()
    assert report in caplog.text


def test_what_workers_skip_is_counted_here(tmp_path: Path) -> None:
    data = ImageFolder(broken_folder(tmp_path), 8)
    found = batches(data, Share(2, 2), start=0, seed=0, workers=2)
    passes = list(islice(found, 8))  # two epochs, each broken pair met by both workers
    found.close()
    assert sum(len(batch.news) for batch in passes) > len(data.skipped)
    assert dict(data.skipped) == EXPECTED


def test_a_broken_pair_has_one_stand_in_whatever_was_read_before(tmp_path: Path) -> None:
    broken_folder(tmp_path)
    forwards, backwards, verified = (ImageFolder(tmp_path, 8, verify=v) for v in (False, False, True))
    read = [forwards[i] for i in range(len(forwards))]
    again = [backwards[i] for i in reversed(range(len(backwards)))][::-1]
    checked = [verified[i] for i in range(len(verified))]
    for one, two, three in zip(read, again, checked, strict=True):
        assert one["caption"] == two["caption"] == three["caption"]
        assert one["index"] == two["index"] == three["index"]
        assert torch.equal(one["image"], two["image"]) and torch.equal(one["image"], three["image"])
    assert [sample["caption"] for sample in read] == ["fine"] + 5 * ["fine too"]
    assert forwards.skipped == backwards.skipped == verified.skipped  # each once, however often it is asked for
    assert dict(forwards.skipped) == EXPECTED


def test_a_file_that_vanishes_later_is_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, {"a.png": encoded(), "a.txt": "one", "b.png": encoded(), "b.txt": "two"})
    data = ImageFolder(tmp_path, 8)
    (tmp_path / "a.png").unlink()
    assert data[0]["caption"] == "two" and data[0]["index"] == 1
    assert dict(data.skipped) == {"file cannot be read (No such file or directory)": 1}
    assert caplog.text.count("skipped a.png") == 1
    (tmp_path / "b.png").unlink()
    with pytest.raises(ValueError, match="no usable pair"):
        data[1]


def test_folder_errors_name_the_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        ImageFolder(tmp_path / "nowhere", 8)
    with pytest.raises(ValueError, match="no usable pair of image and caption"):
        ImageFolder(tmp_path, 8)
    write(tmp_path, {"a.png": encoded(), "b.png": b"", "b.txt": "x"})
    with pytest.raises(NotADirectoryError, match=r"a\.png is a file"):
        ImageFolder(tmp_path / "a.png", 8)
    with pytest.raises(ValueError, match=r"no usable pair[\s\S]*no caption file beside it: a\.png"):
        ImageFolder(tmp_path, 8, verify=True)
    with pytest.raises(ValueError, match="resolution 0"):
        ImageFolder(tmp_path, 0)


@given(caption=st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1))
@settings(max_examples=40, deadline=None)
def test_captions_arrive_as_written(tmp_path_factory: pytest.TempPathFactory, caption: str) -> None:
    wanted = caption.lstrip("\ufeff").strip()
    if not wanted or caption.startswith("\ufeff"):
        return
    root = tmp_path_factory.mktemp("captions")
    members: list[tuple[str, bytes | str]] = [("k.png", encoded()), ("k.txt", caption)]
    assert ImageFolder(write(root / "folder", dict(members)), 4)[0]["caption"] == wanted
    assert WebDatasetShards(write_tar(root / "a.tar", members), 4)[0]["caption"] == wanted
    as_json: list[tuple[str, bytes | str]] = [("k.png", encoded()), ("k.json", json.dumps({"caption": caption}))]
    assert WebDatasetShards(write_tar(root / "b.tar", as_json), 4)[0]["caption"] == wanted


# --- shards ---


def test_shards_written_by_webdataset_itself(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    colours = [RED, GREEN, BLUE, (9, 99, 199), (250, 250, 0)]
    with webdataset.ShardWriter(str(tmp_path / "part-%04d.tar"), maxcount=2, verbose=0) as sink:
        for i, colour in enumerate(colours):
            text = {"txt": f"picture {i}"} if i % 2 else {"json": {"text": f"picture {i}", "width": 20}}
            sink.write({"__key__": f"set/{i:03d}", "png": Image.new("RGB", (20, 16), colour), **text})
    for source in (tmp_path, str(tmp_path / "part-{0000..0002}.tar"), sorted(tmp_path.glob("*.tar"))):
        data = WebDatasetShards(source, 8)
        assert len(data) == 5 and not data.skipped
        assert [data[i]["caption"] for i in range(5)] == [f"picture {i}" for i in range(5)]
        assert [colour_of(data[i]["image"]) for i in range(5)] == colours
    images, captions = data.batch([4, 0])
    assert images.shape == (2, 3, 8, 8) and captions == ["picture 4", "picture 0"]


class _Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return _explode, ("unpickled",)


exploded: list[str] = []


def _explode(text: str) -> None:
    exploded.append(text)


def test_pickles_in_shards_are_never_opened(tmp_path: Path) -> None:
    bomb = pickle.dumps(_Bomb())
    pickle.loads(bomb)
    assert exploded.pop() == "unpickled"  # it would go off
    members: list[tuple[str, bytes | str]] = [("a.png", encoded()), ("a.txt", "fine")]
    members += [(f"a.{suffix}", bomb) for suffix in ("pyd", "pickle", "pkl", "pth", "pt", "npy")]
    members += [("b.png", bomb), ("b.txt", "an image that is a pickle"), ("c.png", encoded()), ("c.json", bomb)]
    data = WebDatasetShards(write_tar(tmp_path / "a.tar", members), 8, verify=True)
    assert [data[i]["caption"] for i in range(len(data))] == ["fine"] * 3
    assert dict(data.skipped) == {"image is broken or not JPEG, PNG or WebP": 1, "caption is not JSON": 1}
    assert not exploded


def test_incomplete_samples_in_shards_are_counted(tmp_path: Path) -> None:
    files: list[tuple[str, bytes | str]] = [
        ("__index__.txt", "notes"),
        ("x/a.jpg", encoded(RED, form="JPEG")),
        ("x/a.seg.png", encoded(BLUE)),  # "seg.png" is a kind of its own
        ("x/a.txt", "fine"),
        ("x/b.png", encoded()),
        ("x/c.txt", "no image"),
        ("x/d.png", encoded()),
        ("x/d.png", encoded()),
        ("x/d.txt", "double"),
        ("y/a.png", encoded()),
        ("y/a.json", '{"title": "no caption"}'),
        ("y/b.png", encoded()),
        ("y/b.json", '["a list"]'),
        ("y/c.png", encoded()),
        ("y/c.json", '{"caption": null}'),
    ]
    data = WebDatasetShards(write_tar(tmp_path / "s.tar", files), 8, verify=True)
    assert [data[i]["caption"] for i in (0, 1)] == ["fine", "double"]
    assert dict(data.skipped) == {
        "no caption (.txt, .json)": 1,
        "no image (.jpg, .png, .webp)": 1,
        "two members of one name": 1,
        'no "caption" or "text"': 2,
        "caption is not text": 1,
    }
    assert "s.tar/x/b" in data.report() and "s.tar/x/d.png" in data.report()


def test_damaged_shards_give_what_they_can(tmp_path: Path) -> None:
    files: list[tuple[str, bytes | str]] = []
    for i in range(4):
        files += [(f"{i}.png", encoded(size=(300, 200))), (f"{i}.txt", f"picture {i}")]
    whole = write_tar(tmp_path / "a-whole.tar", files)
    blocks = whole.read_bytes()
    reasons = set()
    for cut in range(512, len(blocks) - 512, 512):
        short = tmp_path / "b-short.tar"
        short.write_bytes(blocks[: min(cut + 200, len(blocks))])
        data = WebDatasetShards([whole, short], 8, verify=True)
        captions = [data[i]["caption"] for i in range(len(data) - len(data._unusable))]
        assert captions[:4] == [f"picture {i}" for i in range(4)]
        if cut + 200 < len(blocks) - 10240:
            assert data.skipped.total() >= 1
        reasons |= set(data.skipped)
    assert any("cut short" in reason or "damaged" in reason for reason in reasons)
    for name, mode in (("c.tar", "w:gz"), ("d.tar", "w:xz")):
        write_tar(tmp_path / name, files, mode)
        data = WebDatasetShards([whole, tmp_path / name], 8)
        assert len(data) == 4
        assert next(iter(data.skipped)).startswith("shard is not an uncompressed tar, or is damaged")


def test_shard_errors_name_the_shard(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"missing\.tar does not exist"):
        WebDatasetShards(tmp_path / "missing.tar", 8)
    with pytest.raises(FileNotFoundError, match=r"part-0001\.tar does not exist"):
        write_tar(tmp_path / "part-0000.tar", [("a.png", encoded()), ("a.txt", "x")])
        WebDatasetShards(str(tmp_path / "part-{0000..0001}.tar"), 8)
    (tmp_path / "none").mkdir()
    with pytest.raises(FileNotFoundError, match=r"none holds no \.tar file"):
        WebDatasetShards(tmp_path / "none", 8)
    with pytest.raises(ValueError, match=r"no usable pair[\s\S]*not an uncompressed tar"):
        WebDatasetShards(write(tmp_path, {"text.tar": "not a tar" * 1000}) / "text.tar", 8)
    with pytest.raises(FileNotFoundError, match="pipe:"):
        WebDatasetShards("pipe:cat part-0000.tar", 8)  # WebDataset would run this as a command
