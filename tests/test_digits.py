"""Class prompts: the handwritten digits, folders of classes, and how samples of digits are judged."""

from __future__ import annotations

import io
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from small_models import QUIET

from snapgen.config import get_preset
from snapgen.data.buckets import Buckets
from snapgen.data.digits import (
    ClassFolders,
    DigitsDataset,
    class_names,
    digit_caption,
    enlarged,
    load_digits,
    reduced,
)
from snapgen.data.loader import Share, batches, open_dataset
from snapgen.metrics.command import main_digits
from snapgen.metrics.digits import judge, nearest, print_digits
from snapgen.runs import prompts, train_autoencoder, train_denoiser, vocabulary
from snapgen.settings import Source
from snapgen.tasks import build_autoencoder, build_denoiser
from snapgen.train import TrainConfig

pytestmark = pytest.mark.method

# --- the digits ---


def test_the_split_keeps_all_digits_apart_and_in_their_shares() -> None:
    (train, train_digits), (test, test_digits) = load_digits("train"), load_digits("test")
    assert len(train) + len(test) == 1797 and len(test) == 450
    assert train.shape[1:] == (8, 8) and train.dtype == np.uint8 and train.max() == 16
    for digit in range(10):
        share = (test_digits == digit).sum() / ((test_digits == digit).sum() + (train_digits == digit).sum())
        assert abs(share - 0.25) < 0.01
    # No picture of the one is in the other.
    seen = {picture.tobytes() for picture in train}
    assert len(seen) == len(train) and not any(picture.tobytes() in seen for picture in test)
    with pytest.raises(ValueError, match="split: got 'all'; must be one of train, test"):
        load_digits("all")


def test_enlarging_and_reducing_by_hand() -> None:
    one = np.zeros((1, 8, 8), np.uint8)
    one[0, 3, 4] = 16
    large = enlarged(one, 16)
    assert large.shape == (1, 3, 16, 16) and torch.equal(large[:, 0], large[:, 2])
    # Bilinear, twice as large: a pixel's centre lies a quarter from the nearest two, so weights are 3/4 and 1/4.
    patch = (large[0, 0] + 1) / 2
    weights = torch.tensor([0.25, 0.75, 0.75, 0.25])
    torch.testing.assert_close(patch[5:9, 7:11], torch.outer(weights, weights))
    assert patch.sum() == pytest.approx(4)
    back = reduced(large)[0]
    # A cell's mean of 3/4: of its neighbours' 1/8.
    row = torch.tensor([0.125, 0.75, 0.125]) * 4
    torch.testing.assert_close(back[2:5, 3:6], torch.outer(row, row))
    constant = torch.full((2, 3, 32, 32), 0.5)
    torch.testing.assert_close(reduced(constant), torch.full((2, 8, 8), 12.0))
    for wrong in (12, 4):
        with pytest.raises(ValueError, match=f"resolution: got {wrong}; must be a multiple of 8"):
            enlarged(one, wrong)
    with pytest.raises(ValueError, match="R a multiple of 8"):
        reduced(torch.zeros(1, 3, 12, 12))


def test_the_dataset() -> None:
    data = open_dataset("digits", 32)
    assert isinstance(data, DigitsDataset) and len(data) == 1347
    images, captions = data.batch([5, 0])
    assert images.shape == (2, 3, 32, 32) and images.min() >= -1 and images.max() <= 1
    assert captions == [digit_caption(data.digits[5]), digit_caption(data.digits[0])]
    assert torch.equal(data[5]["image"], images[0]) and data[5]["caption"] == captions[0]
    assert digit_caption(3) == "a photo of the digit three" and len(list(data.captions())) == 1347
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    assert vocabulary(data) == sorted(["a", "photo", "of", "the", "digit", *words])
    assert prompts(data) == [digit_caption(digit) for digit in range(10)]
    with pytest.raises(IndexError):
        data.batch([1347])
    first = next(batches(data, Share(8, 8), start=0, seed=0))
    assert first.images.shape == (8, 3, 32, 32)


def test_the_preset_draws_what_it_is_for() -> None:
    preset = get_preset("digits")
    encoder, decoder = build_autoencoder(preset)
    denoiser, _, tokenizer = build_denoiser(preset, vocabulary(DigitsDataset(32)))
    latents = encoder(torch.zeros(1, 3, 32, 32))
    size = preset.denoiser["sample_size"]
    assert latents.shape == (1, preset.denoiser["in_channels"], size, size)
    assert decoder(latents).shape == (1, 3, 32, 32)
    assert len(tokenizer(digit_caption(7)).input_ids) == 8 <= preset.text["max_tokens"]
    assert sum(parameter.numel() for parameter in denoiser.parameters()) < 2e6


# --- how they are judged ---


def test_nearest_by_hand() -> None:
    others = torch.tensor([[0.0, 0.0], [10.0, 0.0]])
    assert nearest(torch.tensor([[3.0, 4.0], [10.0, 1.0]]), others).tolist() == [5.0, 1.0]
    far = torch.full((1, 64), 1e4)
    assert nearest(far + 1e-2, far).item() == pytest.approx(0.08, rel=0.05)  # sqrt(64) x 0.01; products would lose it


@pytest.fixture(scope="module")
def originals() -> dict[str, tuple[torch.Tensor, list[int]]]:
    return {split: (enlarged(load_digits(split)[0], 32), load_digits(split)[1].tolist()) for split in ("train", "test")}


def test_real_digits_are_recognised_and_new(originals: dict) -> None:
    pictures, asked = originals["test"]
    scores = judge(pictures, asked)
    assert scores["recognised"] == scores["classifier_accuracy"] > 0.97 and scores["classifier_tests"] == 450
    assert scores["distance"]["samples"] == scores["distance"]["test"] and scores["near"] <= 0.012
    # Asked for another digit, the same pictures are wrong.
    assert judge(pictures, [(digit + 1) % 10 for digit in asked])["recognised"] < 0.03


def test_copies_are_found(originals: dict) -> None:
    pictures, asked = originals["train"]
    generator = torch.Generator().manual_seed(0)
    copied = (pictures + 0.02 * torch.randn(pictures.shape, generator=generator)).clamp(-1, 1)
    scores = judge(copied, asked)
    assert scores["near"] > 0.99 and max(scores["distance"]["samples"]) < 2 < scores["distance"]["test"][1]
    assert 0.62 < scores["nearer_to_training"] < 0.72  # 2/3


def test_pictures_made_of_a_split_are_nearer_to_it(originals: dict) -> None:
    """Pictures half way between two of a digit, of the one split or of the other."""
    shares = {}
    for split, (pictures, asked) in originals.items():
        order = np.argsort(np.asarray(asked), kind="stable")[: 2 * (len(asked) // 2)]
        between = (pictures[order[::2]] + pictures[order[1::2]]) / 2
        shares[split] = judge(between, [asked[n] for n in order[::2]])["nearer_to_training"]
    assert shares["test"] < 0.5 < shares["train"]


def test_wrong_arguments_and_tables(originals: dict) -> None:
    scores = judge(originals["test"][0][:50], originals["test"][1][:50])
    console = Console(record=True, width=160, file=io.StringIO())
    print_digits({"28 steps": scores}, console)
    text = console.export_text()
    assert f"{scores['recognised']:.1%}" in text and "of 450 held-out digits right" in text
    from snapgen.metrics.digits import score_digits

    with pytest.raises(ValueError, match="per_digit: got 0"):
        score_digits(None, steps=1, guidance=1, per_digit=0)


@pytest.mark.slow
def test_the_whole_way_from_digits_to_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Autoencoder, denoiser, samples, scores: a few steps of each, so that all of it is run."""
    config = TrainConfig(steps=6, batch_size=16, warmup=1, save_every=100, sample_every=100, ema=0.9)
    encoder = train_autoencoder("digits", "digits", config, tmp_path / "autoencoder", QUIET)
    source = Source(preset="digits", data="digits", autoencoder=str(encoder))
    folder = train_denoiser(source, config, tmp_path / "run", QUIET)
    found = main_digits(str(folder), steps=(2,), per_digit=2, untrained=True, out=tmp_path / "s.json", console=QUIET)
    assert set(found) == {"2 steps", "untrained, 2 steps"} and (tmp_path / "s.json").is_file()
    assert found["2 steps"]["samples"] == 20 and 0 <= found["2 steps"]["recognised"] <= 1
    again = main_digits(str(folder), steps=(2,), per_digit=2, console=QUIET)
    assert again["2 steps"] == found["2 steps"]


# --- folders of classes ---


def classes(root: Path, names: str, file: str = "LOC_synset_mapping.txt") -> Path:
    for folder, colours in {"n01": [10, 20], "n02": [30], "n99": [40]}.items():
        (root / folder / "more").mkdir(parents=True)
        for colour in colours:
            Image.new("RGB", (60, 36), (colour, 0, 0)).save(root / folder / "more" / f"{colour}.JPEG", quality=95)
    (root / "n02" / "broken.png").write_bytes(b"no picture")
    (root / "n02" / "moving.gif").write_bytes(b"GIF89a")
    (root / file).write_text(names)
    return root


NAMES = "n01 tench, Tinca tinca\nn02 great white shark, white shark\n\n"


def test_folders_of_classes(tmp_path: Path) -> None:
    data = open_dataset(f"imagenet:{classes(tmp_path, NAMES)}", 16)
    assert isinstance(data, ClassFolders)
    read = [data[index]["caption"] for index in range(len(data))]
    # The broken one is the third, and the fourth stands in.
    assert read == ["a photo of a tench"] * 2 + ["a photo of a great white shark"] * 2
    assert dict(data.skipped) == {
        "folder is no class in the file of names": 1,
        "format is not JPEG, PNG or WebP": 1,
        "image is broken or not JPEG, PNG or WebP": 1,
    }
    assert data.prompts == ("a photo of a tench", "a photo of a great white shark")
    assert prompts(data) == list(data.prompts) and data[0]["image"].shape == (3, 16, 16)
    bucketed = ClassFolders(tmp_path, 64, bucketing=Buckets(resolution=64, unit=16))
    assert next(islice(batches(bucketed, Share(2, 2), start=0, seed=0), 1)).images.shape == (2, 3, 48, 80)


def test_names_of_classes(tmp_path: Path) -> None:
    file = tmp_path / "classes.txt"
    file.write_text("a\ttwo words  \nb one,two\n")
    assert class_names(file) == {"a": "two words", "b": "one"}
    listing = tmp_path / "imagenet_class_index.json"
    listing.write_text('{"0": ["n01", "tench"], "1": ["n02", "great_white_shark"]}')
    assert class_names(listing) == {"n01": "tench", "n02": "great white shark"}
    for name, text in (("x.json", '{"0": "tench"}'), ("y.json", "["), ("z.txt", "n01\n"), ("e.txt", "\n")):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=name.replace(".", r"\.")):
            class_names(tmp_path / name)
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00\xd8")
    with pytest.raises(ValueError, match=r"bytes\.txt: damaged"):
        class_names(tmp_path / "bytes.txt")


def test_the_names_may_stand_above_a_split(tmp_path: Path) -> None:
    classes(tmp_path / "data" / "train", NAMES)
    (tmp_path / "data" / "train" / "LOC_synset_mapping.txt").rename(tmp_path / "LOC_synset_mapping.txt")
    assert len(ClassFolders(tmp_path / "data" / "train", 16)) == 4
    with pytest.raises(FileNotFoundError, match="no file of class names"):
        (tmp_path / "LOC_synset_mapping.txt").unlink()
        ClassFolders(tmp_path / "data" / "train", 16)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        ClassFolders(tmp_path / "nowhere", 16)
