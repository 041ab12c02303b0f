"""Aspect-ratio buckets: their sizes, what goes where, and the order of batches."""

from __future__ import annotations

import io
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image

from snapgen.data.buckets import NONE, BucketOrder, Buckets, Size, covering, fitted
from snapgen.data.folder import ImageFolder, image_size
from snapgen.data.loader import Share, batches, open_dataset

pytestmark = pytest.mark.method

RED = (255, 0, 0)


# --- sizes ---


def test_sizes_by_hand() -> None:
    # Square of 4 units, 16 in area: 3 units high are 16/3 = 5.33 -> 5 wide; 2 high are 8 wide, more than twice as wide.
    assert Buckets(resolution=64, unit=16, ratio=2).sizes == ((80, 48), (64, 64), (48, 80))
    assert Buckets(resolution=64, unit=16, ratio=4).sizes == ((128, 32), (80, 48), (64, 64), (48, 80), (32, 128))
    assert Buckets(resolution=64, unit=16, ratio=1).sizes == ((64, 64),)


@given(unit=st.sampled_from((8, 16, 32, 64)), cells=st.integers(1, 40), ratio=st.floats(1, 8))
@settings(max_examples=100, deadline=None)
def test_sizes_keep_to_unit_area_and_ratio(unit: int, cells: int, ratio: float) -> None:
    buckets = Buckets(resolution=unit * cells, unit=unit, ratio=ratio)
    assert Size(unit * cells, unit * cells) in buckets.sizes
    assert len(set(buckets.sizes)) == len(buckets.sizes)
    for height, width in buckets.sizes:
        assert height % unit == width % unit == 0
        assert max(height, width) <= ratio * min(height, width)
        assert Size(width, height) in buckets.sizes
        # The longer side is the nearest multiple to the budget over the shorter.
        assert abs(height * width - (unit * cells) ** 2) <= min(height, width) * unit / 2
    ratios = [width / height for height, width in buckets.sizes]
    assert ratios == sorted(ratios)


def test_a_picture_goes_to_the_nearest_ratio() -> None:
    buckets = Buckets(resolution=64, unit=16)  # ratios 0.6, 1, 1.667; their geometric middles: 0.775 and 1.291
    assert [buckets.nearest(100, width) for width in (10, 77, 78, 100, 129, 130, 900)] == [0, 0, 1, 1, 1, 2, 2]


@given(height=st.integers(1, 5000), width=st.integers(1, 5000))
@settings(max_examples=100, deadline=None)
def test_turning_a_picture_turns_its_bucket(height: int, width: int) -> None:
    buckets = Buckets(resolution=256, unit=32)
    ratio = buckets.sizes[buckets.nearest(height, width)].width / buckets.sizes[buckets.nearest(height, width)].height
    turned = buckets.sizes[buckets.nearest(width, height)]
    assert turned.height / turned.width == ratio or height / width in (1.0,)


@pytest.mark.parametrize(
    ("named", "message"),
    [
        (dict(resolution=100, unit=32), "resolution: got 100; must be a multiple of unit, 32"),
        (dict(resolution=64, unit=0), "unit: got 0"),
        (dict(resolution=64, ratio=0.5), r"ratio: got 0\.5"),
        (dict(resolution=64, ratio=float("inf")), "ratio: got inf"),
    ],
)
def test_wrong_buckets_are_refused(named: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Buckets(**named)
    with pytest.raises(ValueError, match="got 0x5 pixels"):
        Buckets(resolution=64).nearest(0, 5)


# --- cutting ---


def test_the_cut_by_hand() -> None:
    # 100 high, 300 wide, to 2:3: as high as the picture, 150 wide, in the middle.
    assert covering(100, 300, Size(200, 300)) == (75.0, 0.0, 225.0, 100.0)
    # 300 high, 100 wide, to 2:3: as wide as the picture, 66.67 high.
    left, top, right, bottom = covering(300, 100, Size(200, 300))
    assert (
        (left, right) == (0.0, 100.0) and bottom - top == pytest.approx(200 / 3) and top + bottom == pytest.approx(300)
    )


@given(
    height=st.integers(1, 3000),
    width=st.integers(1, 3000),
    size=st.builds(Size, st.integers(1, 99), st.integers(1, 99)),
)
@settings(max_examples=200, deadline=None)
def test_the_cut_lies_inside_and_has_the_ratio(height: int, width: int, size: Size) -> None:
    left, top, right, bottom = covering(height, width, size)
    assert 0 <= left < right <= width and 0 <= top < bottom <= height
    assert (right - left) / (bottom - top) == pytest.approx(size.width / size.height, rel=1e-6)
    assert right - left == pytest.approx(width) or bottom - top == pytest.approx(height)


def test_the_middle_is_kept() -> None:
    pixels = np.full((20, 60, 3), 255, np.uint8)
    pixels[:, 15:45] = RED
    cut = np.asarray(fitted(Image.fromarray(pixels), Size(16, 24)))
    # Lanczos reaches 3 x 20 / 16 = 3.75 pixels past the edge of the cut.
    assert cut.shape == (16, 24, 3) and (cut[:, 4:-4] == RED).all()


# --- the order ---


def flat(order: BucketOrder, steps: range) -> list[tuple[int, tuple[int, ...]]]:
    return [(bucket, tuple(chosen)) for bucket, chosen in map(order, steps)]


@given(
    sizes=st.lists(st.integers(0, 30), min_size=1, max_size=5).filter(any),
    batch=st.integers(1, 9),
    seed=st.integers(0, 3),
    none=st.integers(0, 4),
)
@settings(max_examples=60, deadline=None)
def test_order_of_batches(sizes: list[int], batch: int, seed: int, none: int) -> None:
    buckets = [bucket for bucket, size in enumerate(sizes) for _ in range(size)] + [NONE] * none
    order = BucketOrder(buckets, batch, seed)
    epochs = batch  # after so many, every bucket has come round whole
    steps = order.steps(epochs)
    assert steps == sum(sizes)  # batch x sum(sizes) samples in batches of `batch`
    drawn = flat(order, range(steps))
    for bucket, chosen in drawn:
        assert len(chosen) == batch and {buckets[index] for index in chosen} == {bucket}
    # Nothing is left out, nothing comes more often than anything else, and what has no bucket never comes.
    counts = Counter(index for _, chosen in drawn for index in chosen)
    assert counts == {index: epochs for index, bucket in enumerate(buckets) if bucket != NONE}
    # From any step, in any order of asking.
    fresh = BucketOrder(buckets, batch, seed)
    assert [flat(fresh, range(n, n + 1))[0] for n in reversed(range(steps))] == drawn[::-1]


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    buckets = [0] * 40 + [1] * 24
    order = BucketOrder(buckets, 8, 0)
    assert order.steps(1) == 8
    first, second = flat(order, range(8)), flat(order, range(8, 16))
    assert sorted(bucket for bucket, _ in first) == [0] * 5 + [1] * 3 == sorted(bucket for bucket, _ in second)
    assert first != second and flat(BucketOrder(buckets, 8, 1), range(8)) != first
    assert [bucket for bucket, _ in first] != sorted(bucket for bucket, _ in first)  # buckets are mixed
    for epoch in (first, second):
        assert sorted(index for _, chosen in epoch for index in chosen) == list(range(64))


def test_nothing_to_draw_is_refused() -> None:
    with pytest.raises(ValueError, match="dataset is empty"):
        BucketOrder([NONE, NONE], 4, 0)


# --- through a dataset and the loader ---


def folder(root: Path) -> Path:
    """Five wide pictures, seven tall ones, a square one, and three that cannot be used."""
    sizes = [(60, 100)] * 5 + [(100, 60)] * 7 + [(50, 50)]
    for number, (height, width) in enumerate(sizes):
        Image.new("RGB", (width, height), (10 * number, 0, 0)).save(root / f"{number:02}.png")
        (root / f"{number:02}.txt").write_text(f"picture {number}")
    (root / "20.png").write_bytes(b"no picture")
    (root / "20.txt").write_text("broken at once")
    Image.effect_noise((100, 60), 50).save(whole := io.BytesIO(), "PNG")
    (root / "21.png").write_bytes(whole.getvalue()[:900])
    (root / "21.txt").write_text("broken inside")
    Image.new("RGB", (50, 50)).save(root / "22.png")
    (root / "22.txt").write_bytes(b"\xff\xfe no text")
    return root


def test_batches_of_a_folder_keep_their_shape(tmp_path: Path) -> None:
    data = ImageFolder(folder(tmp_path), 64, bucketing=Buckets(resolution=64, unit=16))
    assert data.buckets == [2] * 5 + [0] * 7 + [1, NONE, 2, NONE]
    stream = batches(data, Share(3, 3), start=0, seed=0)
    seen: Counter[str] = Counter()
    for batch in islice(stream, 14):
        assert batch.images is not None
        numbers = [int(caption.split()[1]) for caption in batch.captions]
        assert {data.sizes[data.buckets[n]] for n in numbers} == {tuple(batch.images.shape[2:])}
        for image, number in zip(batch.images, numbers, strict=True):
            assert ((image[0] + 1) * 127.5).round().unique().tolist() == [10 * number]
        seen.update(batch.captions)
    # Three epochs of 14 pictures: each came three times, and the next wide one a second time for the broken one.
    assert seen == {f"picture {n}": 3 + 3 * (n == 0) for n in range(13)}
    assert dict(data.skipped) == {"image is broken or not JPEG, PNG or WebP": 2, "caption is not UTF-8 text": 1}


def test_processes_share_a_batch_of_one_shape(tmp_path: Path) -> None:
    data = ImageFolder(folder(tmp_path), 64, bucketing=Buckets(resolution=64, unit=16))
    alone = list(islice(batches(data, Share(4, 4), start=3, seed=5), 6))
    parts = [list(islice(batches(data, Share(4, 1, rank, 2), start=3, seed=5), 12)) for rank in range(2)]
    for step, whole in enumerate(alone):
        assert whole.images is not None
        pieces = sorted(
            ((b.positions[0], b) for rank in parts for b in rank[2 * step : 2 * step + 2]), key=lambda at: at[0]
        )
        assert [at for at, _ in pieces] == list(whole.positions)
        assert torch.equal(torch.cat([b.images for _, b in pieces]), whole.images)


def test_a_bucket_of_which_nothing_is_left_is_stood_in_for(tmp_path: Path) -> None:
    folder(tmp_path)
    data = ImageFolder(tmp_path, 64, bucketing=Buckets(resolution=64, unit=16))
    (tmp_path / "12.png").write_bytes(b"gone since")  # the only square one
    images, captions = data.batch([12, 12])
    assert images.shape[2:] == (48, 80) and captions == ["picture 0", "picture 0"]  # the next bucket's
    with pytest.raises(ValueError, match="got pairs of 2 buckets; must be of one"):
        data.batch([0, 5])


def test_sizes_are_read_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (30, 10)).save(buffer := io.BytesIO(), "JPEG", exif=exif)
    assert image_size(buffer.getvalue()) == (30, 10)
    Image.new("RGB", (30, 10)).save(buffer := io.BytesIO(), "PNG")
    assert image_size(buffer.getvalue()) == (10, 30)


def test_a_long_header_is_read_whole(tmp_path: Path) -> None:
    """JPEG's comments may push the size out of what is looked at first."""
    Image.new("RGB", (100, 60)).save(buffer := io.BytesIO(), "JPEG")
    comment = b"\xff\xfe" + (50_000).to_bytes(2, "big") + bytes(49_998)
    data = buffer.getvalue()[:2] + 3 * comment + buffer.getvalue()[2:]
    (tmp_path / "a.jpg").write_bytes(data)
    (tmp_path / "a.txt").write_text("long")
    assert ImageFolder(tmp_path, 64, bucketing=Buckets(resolution=64, unit=16)).buckets == [2]


def test_square_data_and_other_resolutions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="are all square"):
        open_dataset("digits", 32, bucketing=Buckets(resolution=32))
    with pytest.raises(ValueError, match="its resolution is 64, the dataset's 32"):
        ImageFolder(folder(tmp_path), 32, bucketing=Buckets(resolution=64))
    assert open_dataset(str(tmp_path), 64, bucketing=Buckets(resolution=64)).buckets
