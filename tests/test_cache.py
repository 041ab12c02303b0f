"""Caches of latents and embedded captions: their contents, resuming, and what happens when something breaks."""

from __future__ import annotations

import dataclasses
import errno
import os
import random
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import pytest
import torch
from cache_run import CONFIG, dataset, encoder, text
from PIL import Image
from safetensors.torch import load_file

from snapgen import io
from snapgen.data.cache import CacheConfig, checksum, write_cache
from snapgen.data.cached import CachedDataset
from snapgen.data.embed import FrozenText, LatentEncoder, fingerprint, load_encoder, load_text
from snapgen.data.folder import ImageFolder
from snapgen.data.loader import Share, batches, open_dataset
from snapgen.text import TextEmbedding

pytestmark = pytest.mark.method

BROKEN = "image is broken or not JPEG, PNG or WebP"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eleven square pictures, four wide ones, one broken, one whose caption is not text."""
    root = tmp_path_factory.mktemp("pictures")
    for number in range(15):
        size = (40, 40) if number < 11 else (60, 36)
        Image.effect_noise(size, 60 + number).convert("RGB").save(root / f"{number:02}.png")
        (root / f"{number:02}.txt").write_text(f"picture {number}")
    whole = (root / "03.png").read_bytes()
    (root / "03a.png").write_bytes(whole[: len(whole) // 2])
    (root / "03a.txt").write_text("picture 30")
    (root / "05a.png").write_bytes(whole)
    (root / "05a.txt").write_bytes(b"\xff\xfe\x00")
    return root


@pytest.fixture(scope="module")
def cache(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cache") / "whole"
    assert write_cache(dataset(pictures), out, encoder=encoder(), text=text(), config=CONFIG)
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def copied(folder: Path, out: Path) -> Path:
    out.mkdir()
    for name, data in contents(folder).items():
        (out / name).write_bytes(data)
    return out


# --- contents ---


def test_what_is_read_is_what_the_encoders_say(pictures: Path, cache: Path) -> None:
    data = CachedDataset(cache, verify=True)
    assert len(data) == 15 and data.buckets.tolist() == [1] * 11 + [2] * 4
    assert dict(data.skipped) == {BROKEN: 1, "caption is not UTF-8 text": 1}
    source, module, words = dataset(pictures), encoder().module, text()
    for indices in ([0, 7], [12]):
        batch = data.batch(indices)
        captions = [f"picture {index}" for index in indices]
        assert batch.captions == captions
        here = [next(n for n in range(len(source)) if source._name(n) == f"{index:02}.png") for index in indices]
        images, _ = source.batch(here)
        with torch.no_grad():
            # By hand: (z - 0.25) x 1.5, stored in bf16, of whose value 2^-9 is lost at most.
            latents = (module(images) - 0.25) * 1.5
        assert batch.latents is not None and batch.latents.dtype == torch.float32
        torch.testing.assert_close(batch.latents, latents, rtol=2**-8, atol=1e-6)
        embedded = words(captions)
        assert batch.text is not None and embedded.pooled is not None and batch.text.pooled is not None
        assert embedded.context.shape == (len(indices), 77 + 6, 24)
        torch.testing.assert_close(batch.text.context, embedded.context, rtol=2**-8, atol=1e-6)
        torch.testing.assert_close(batch.text.pooled, embedded.pooled, rtol=2**-8, atol=1e-6)
        assert torch.equal(batch.text.mask, embedded.mask)
        # "picture 7" is four tokens of six with its begin and end; CLIP's all count.
        assert batch.text.mask.sum(1).tolist() == [77 + 4] * len(indices)
    assert list(data.captions()) == [f"picture {number}" for number in range(15)]
    assert data.empty is not None
    torch.testing.assert_close(data.empty.context, words([""]).context, rtol=2**-8, atol=1e-6)


def test_fp32_is_stored_to_the_bit(pictures: Path, tmp_path: Path) -> None:
    config = CacheConfig(shard_size=100, batch_size=100, dtype="fp32")
    write_cache(dataset(pictures), tmp_path / "c", encoder=encoder(), text=None, config=config)
    data = CachedDataset(tmp_path / "c")
    images, _ = dataset(pictures).usable([n for n, b in enumerate(dataset(pictures).buckets) if b == 2])
    batch = data.batch(range(11, 15))
    assert torch.equal(batch.latents, encoder()(images)) and batch.text is None and data.empty is None


def test_batches_of_a_cache(cache: Path) -> None:
    """Through the loader: of one shape each, the same with workers that read it."""
    data = CachedDataset(cache)
    plain = list(islice(batches(data, Share(4, 4), start=2, seed=0), 5))
    workers = list(islice(batches(data, Share(4, 4), start=2, seed=0, workers=1), 5))
    for one, two in zip(plain, workers, strict=True):
        assert one.captions == two.captions and torch.equal(one.latents, two.latents)
        assert list(one.positions) == list(two.positions)
        assert one.latents.shape[2:] in ((4, 4), (3, 5))
    with pytest.raises(ValueError, match="must be of one"):
        data.batch([0, 14])


def test_a_diffusers_autoencoder_and_the_mean_of_its_distribution(tmp_path: Path) -> None:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, scaling_factor=0.5, shift_factor=0.1,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    ).eval()  # fmt: skip
    vae.save_pretrained(tmp_path / "pipe" / "vae")
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        mean = vae.encoder(images)
        mean = vae.quant_conv(mean).chunk(2, 1)[0]
    for place in (tmp_path / "pipe", tmp_path / "pipe" / "vae"):
        torch.testing.assert_close(load_encoder(place)(images), (mean - 0.1) * 0.5)
    with pytest.raises(io.CheckpointError, match="holds no encoder"):
        load_encoder(tmp_path)
    (tmp_path / "pipe" / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"\x80\x04 pickle?")
    with pytest.raises(io.CheckpointError, match="pickle"):
        load_encoder(tmp_path / "pipe")


def test_our_own_encoder_of_a_checkpoint() -> None:
    loaded = load_encoder("tiny")
    assert (loaded.scale, loaded.shift) == (1.0, 0.0)
    assert loaded(torch.zeros(1, 3, 64, 64)).shape == (1, 8, 8, 8)
    assert loaded.record()["kind"] == "TinyEncoder"


def test_text_encoders_of_folders(tmp_path: Path) -> None:
    from transformers import T5Config, T5EncoderModel

    built = text(width=40)
    (tokenizer, clip), (_, gemma) = built.clips[0], built.tokens
    for name in ("text_encoder", "text_encoder_2"):
        clip.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name.replace("text_encoder", "tokenizer"))
    gemma.save_pretrained(tmp_path / "gemma")
    tokenizer.save_pretrained(tmp_path / "gemma")
    both = dict(clip_l=tmp_path / "text_encoder", clip_g=tmp_path / "text_encoder_2")
    loaded = load_text(**both, gemma=tmp_path / "gemma", max_tokens=6)
    found, single = loaded(["picture 3"]), built(["picture 3"])
    assert found.context.shape == (1, 83, 40) and found.pooled.shape == (1, 32)
    torch.testing.assert_close(found.context[:, :77, :16], single.context[:, :77, :16])
    torch.testing.assert_close(found.context[:, :77, 16:32], single.context[:, :77, :16])
    assert not found.context[:, :77, 32:].any() and loaded.parts() == {"clip": [0, 77], "tokens": [77, 83]}

    torch.manual_seed(0)
    t5 = T5EncoderModel(T5Config(vocab_size=60, d_model=40, d_kv=8, d_ff=16, num_layers=1, num_heads=2))
    t5.save_pretrained(tmp_path / "text_encoder_3")
    tokenizer.save_pretrained(tmp_path / "tokenizer_3")
    teacher = load_text(**both, t5=tmp_path / "text_encoder_3", max_tokens=5)(["picture 3", ""])
    assert teacher.context.shape == (2, 82, 40) and teacher.mask.all()  # SD3 attends to its padding
    with pytest.raises(ValueError, match="got both gemma and t5"):
        load_text(gemma=tmp_path / "gemma", t5=tmp_path / "text_encoder_3")
    with pytest.raises(io.CheckpointError, match="holds no text encoder"):
        load_text(clip_l=tmp_path / "nowhere")


def test_fingerprints_tell_weights_apart() -> None:
    module = torch.nn.Linear(100, 100)
    before = fingerprint([module])
    assert fingerprint([module]) == before
    with torch.no_grad():
        module.weight.add_(1e-6)
    assert fingerprint([module]) != before


# --- resuming ---


@pytest.mark.complete
@pytest.mark.slow
def test_killed_at_any_time_and_run_again_it_gives_the_same_bytes(pictures: Path, cache: Path, tmp_path: Path) -> None:
    choose = random.Random(0)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    out = tmp_path / "killed"
    command = [sys.executable, str(Path(__file__).parent / "cache_run.py"), str(pictures), str(out)]
    for shards in (0, 2, 4):
        process = subprocess.Popen(command, env=environment)
        while len(list(out.glob("shard-*.json"))) < shards or not (out / "empty.safetensors").exists():
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.005)
        time.sleep(choose.uniform(0, 0.15))
        process.kill()
        assert process.wait() == -signal.SIGKILL and not (out / "index.json").exists()
    assert write_cache(dataset(pictures), out, encoder=encoder(), text=text(), config=CONFIG)
    assert contents(out) == contents(cache)


@pytest.mark.parametrize("shards", range(6))
def test_killed_between_a_shard_and_its_note(pictures: Path, cache: Path, tmp_path: Path, shards: int) -> None:
    """Every state that a kill can leave: some shards with notes, one without, one half written."""
    out = copied(cache, tmp_path / "c")
    (out / "index.json").unlink()
    for number in range(shards, 6):
        (out / f"shard-{number:05d}.json").unlink()
        if number > shards:
            (out / f"shard-{number:05d}.safetensors").unlink()
    (out / f".shard-{shards:05d}-abc.safetensors").write_bytes(b"half")
    (out / ".index-abc.json").write_bytes(b"{")
    with pytest.raises(io.CheckpointError, match="is not complete; run the same"):
        CachedDataset(out)
    assert write_cache(dataset(pictures), out, encoder=encoder(), text=text(), config=CONFIG)
    assert contents(out) == contents(cache)


def test_two_processes_give_the_same_bytes_as_one(pictures: Path, cache: Path, tmp_path: Path) -> None:
    for rank, complete in ((1, False), (0, True)):
        encoders = dict(encoder=encoder(), text=text())
        done = write_cache(dataset(pictures), tmp_path / "c", **encoders, config=CONFIG, rank=rank, world=2)
        assert done == complete
    assert contents(tmp_path / "c") == contents(cache)


def test_workers_give_the_same_bytes(pictures: Path, cache: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, workers=1)
    assert write_cache(dataset(pictures), tmp_path / "c", encoder=encoder(), text=text(), config=config)
    assert contents(tmp_path / "c") == contents(cache)


def test_a_finished_shard_that_was_damaged_is_made_again(pictures: Path, cache: Path, tmp_path: Path) -> None:
    out = copied(cache, tmp_path / "c")
    harm(out / "shard-00002.safetensors")
    assert write_cache(dataset(pictures), out, encoder=encoder(), text=text(), config=CONFIG)
    assert contents(out) == contents(cache)


def test_another_cache_is_not_gone_on_with(pictures: Path, cache: Path, tmp_path: Path) -> None:
    out = copied(cache, tmp_path / "c")
    other = encoder()
    with torch.no_grad():
        next(other.module.parameters()).add_(1)
    with pytest.raises(ValueError, match=r"holds another cache \(encoder was"):
        write_cache(dataset(pictures), out, encoder=other, text=text(), config=CONFIG)
    with pytest.raises(ValueError, match="dtype was 'bf16', now 'fp32'"):
        changed = CacheConfig(shard_size=3, batch_size=2, dtype="fp32")
        write_cache(dataset(pictures), out, encoder=encoder(), text=text(), config=changed)
    with pytest.raises(ValueError, match="sizes was"):
        write_cache(ImageFolder(pictures, 32), out, encoder=encoder(), text=text(), config=CONFIG)
    assert contents(out) == contents(cache)


# --- what breaks ---


def harm(path: Path) -> None:
    """One bit, somewhere in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(bytes(data))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


@pytest.mark.parametrize("damage", [harm, cut, Path.unlink])
def test_a_corrupted_shard_is_stood_in_for(
    cache: Path, tmp_path: Path, damage: object, caplog: pytest.LogCaptureFixture
) -> None:
    out = copied(cache, tmp_path / "c")
    damage(out / "shard-00001.safetensors")  # samples 3 and 4
    forwards, backwards, checked = CachedDataset(out), CachedDataset(out), CachedDataset(out, verify=True)
    read = [forwards.batch([index]).captions[0] for index in range(15)]
    assert read == [f"picture {n}" for n in (0, 1, 2, 5, 6, *range(5, 15))]
    assert [backwards.batch([index]).captions[0] for index in reversed(range(15))] == read[::-1]
    assert [checked.batch([index]).captions[0] for index in range(15)] == read
    assert list(forwards.broken) == [1] and "13 samples in use, 2 skipped" in forwards.report()
    assert "2  shard-00001.safetensors: " in forwards.report()
    assert "shard-00001.safetensors" in caplog.text and "stand in for its 2 samples" in caplog.text


def test_a_bucket_without_a_whole_shard_is_stood_in_for(cache: Path, tmp_path: Path) -> None:
    out = copied(cache, tmp_path / "c")
    harm(out / "shard-00004.safetensors")  # both shards of the wide pictures
    harm(out / "shard-00005.safetensors")
    batch = CachedDataset(out).batch([11, 14])
    assert batch.latents.shape[2:] == (4, 4) and batch.captions == ["picture 0", "picture 0"]
    for path in out.glob("shard-*.safetensors"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="no shard can be read"):
        CachedDataset(out).batch([0])
    with pytest.raises(ValueError, match="no shard can be read"):
        CachedDataset(out, verify=True)


def test_a_damaged_empty_caption_is_an_error(cache: Path, tmp_path: Path) -> None:
    out = copied(cache, tmp_path / "c")
    harm(out / "empty.safetensors")
    with pytest.raises(io.CheckpointError, match=r"empty\.safetensors: damaged"):
        CachedDataset(out)


def test_a_full_disk_leaves_what_was_finished(
    pictures: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, replace, room = tmp_path / "c", os.replace, [9]

    def filling(source: str, target: Path) -> None:
        room[0] -= 1
        if room[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    monkeypatch.setattr(os, "replace", filling)
    with pytest.raises(OSError, match=r"no space left on the disk while writing .*shard-00003\.json"):
        write_cache(dataset(pictures), out, encoder=encoder(), text=text(), config=CONFIG)
    left = contents(out)
    assert "index.json" not in left and not any(name.startswith(".") for name in left)
    assert {name: left[name] for name in left} == {name: contents(cache)[name] for name in left} and len(left) == 9
    monkeypatch.setattr(os, "replace", replace)
    assert write_cache(dataset(pictures), out, encoder=encoder(), text=text(), config=CONFIG)
    assert contents(out) == contents(cache)


def test_values_that_are_not_finite_are_not_stored(pictures: Path, tmp_path: Path) -> None:
    module = encoder().module
    with torch.no_grad():
        module.conv_out.bias.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="latents of 'picture 0' or the next are not finite"):
        broken = LatentEncoder(module=module, scale=1.0, shift=0.0)
        write_cache(dataset(pictures), tmp_path / "c", encoder=broken, text=None, config=CONFIG)
    assert not list((tmp_path / "c").glob("shard-*"))


def test_wrong_arguments(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="neither an encoder"):
        write_cache(dataset(pictures), tmp_path, encoder=None, text=None)
    with pytest.raises(ValueError, match="rank: got 2 of 2"):
        write_cache(dataset(pictures), tmp_path, encoder=encoder(), text=None, rank=2, world=2)
    with pytest.raises(ValueError, match="dtype: got 'fp16'; allowed are fp32, bf16"):
        CacheConfig(dtype="fp16")
    with pytest.raises(ValueError, match="shard_size: got 0"):
        CacheConfig(shard_size=0)
    with pytest.raises(ValueError, match="at least one is needed"):
        FrozenText()
    with pytest.raises(io.CheckpointError, match="holds no cache"):
        CachedDataset(tmp_path)


def test_checksums_by_hand(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")  # FIPS 180-2, appendix B.1
    assert checksum(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_a_denoiser_trains_on_a_cache(cache: Path) -> None:
    """A cache's batch through a task: caption dropout takes the empty caption's embedding."""
    from small_models import SMALL

    from snapgen.conditioning import CachedText
    from snapgen.seeds import Draws
    from snapgen.tasks import DenoiserTask, build_autoencoder
    from snapgen.unet import SnapGenUNet

    data = CachedDataset(cache)
    assert isinstance(data.empty, TextEmbedding)
    torch.manual_seed(0)
    denoiser = SnapGenUNet(**{**SMALL.denoiser, "context_dim": 24, "pooled_dim": 16})
    cached = CachedText(data.empty, caption_dropout=0.5)
    task = DenoiserTask(SMALL, denoiser=denoiser, text=cached, encoder=None, decoder=build_autoencoder(SMALL)[1])
    batch = next(batches(data, Share(8, 8), start=0, seed=0))
    noised = task.noised(batch, Draws(0, 0, batch.positions))
    assert torch.equal(noised.x0, batch.latents)
    dropped = [n for n, caption in enumerate(noised.captions) if not caption]
    assert 0 < len(dropped) < 8
    for n in range(8):
        assert torch.equal(noised.text.context[n], (data.empty.context[0] if n in dropped else batch.text.context[n]))
    loss, _ = task.phases()[0].loss(batch, Draws(0, 0, batch.positions))
    loss.backward()
    assert loss.isfinite() and denoiser.conv_in.weight.grad.abs().sum() > 0


def test_shards_hold_what_their_documentation_says(cache: Path) -> None:
    shard = load_file(cache / "shard-00000.safetensors")
    assert {name: (tuple(value.shape), value.dtype) for name, value in shard.items() if name != "captions"} == {
        "latents": ((3, 8, 4, 4), torch.bfloat16),
        "context": ((3, 83, 24), torch.bfloat16),
        "mask": ((3, 83), torch.bool),
        "pooled": ((3, 16), torch.bfloat16),
    }
    note = io.read_json(cache / "shard-00000.json")
    assert note == {"bucket": 1, "samples": 3, "sha256": checksum(cache / "shard-00000.safetensors"), "skipped": {}}
    assert io.read_json(cache / "shard-00001.json")["skipped"] == {BROKEN: 1}
    assert [entry["samples"] for entry in io.read_json(cache / "index.json")["shards"]] == [3, 2, 3, 3, 3, 1]


def test_the_command(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As `snapgen cache ...` reads it; and a cache is a dataset of `--data`."""
    import tyro

    from snapgen.data.buckets import Buckets
    from snapgen.data.command import main_cache

    words = [pictures, "-o", tmp_path / "c", "--resolution", 64, "--buckets", "--unit", 16, "--autoencoder", "tiny"]
    assert tyro.cli(main_cache, args=[str(word) for word in (*words, "--shard-size", 4, "--dtype", "fp32")])
    assert "15 samples in use, 2 skipped when it was made" in " ".join(capsys.readouterr().out.split())
    data = open_dataset(str(tmp_path / "c"), 64)
    assert isinstance(data, CachedDataset) and data.batch([0]).latents.shape == (1, 8, 8, 8)
    assert data.batch([14]).latents.shape == (1, 8, 6, 10)
    with pytest.raises(ValueError, match="was made at 64, not 32"):
        open_dataset(str(tmp_path / "c"), 32)
    with pytest.raises(ValueError, match="has buckets of its own"):
        open_dataset(str(tmp_path / "c"), 64, bucketing=Buckets(resolution=64, unit=8))
    with pytest.raises(ValueError, match="which is endless"):
        main_cache("shapes", out=tmp_path / "s")
