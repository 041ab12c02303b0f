"""`snapgen train` by its words: presets of public latents, caches, resolutions, initial weights, the dry run."""

import json
from pathlib import Path

import pytest
import torch
from cache_run import text
from PIL import Image
from rich.console import Console
from small_models import QUIET, SMALL

import snapgen_kernels
from snapgen import io, plan, runs
from snapgen.conditioning import Layout
from snapgen.config import PRESETS, Preset
from snapgen.data.cache import CacheConfig, write_cache
from snapgen.data.embed import load_encoder
from snapgen.data.folder import ImageFolder
from snapgen.data.loader import Batch
from snapgen.data.shapes import ShapesDataset
from snapgen.decoder import TinyDecoder
from snapgen.pipeline import SnapGenPipeline
from snapgen.settings import Source, TrainConfig
from snapgen.train import train

pytestmark = pytest.mark.method

# Public latents: a diffusers autoencoder of 4 channels at an eighth, scaled; CLIP and Gemma side by side.
PUBLIC = Preset(
    name="public",
    about="for tests",
    resolution=64,
    denoiser=dict(SMALL.denoiser, sample_size=8, in_channels=4, context_dim=24, pooled_dim=16),
    decoder=dict(SMALL.decoder, latent_channels=4, scaling_factor=0.5, shift_factor=0.1),
    shift=3.0,
)


@pytest.fixture(scope="module")
def public(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of frozen models and pictures, as a user would have them."""
    from diffusers import AutoencoderKL

    root = tmp_path_factory.mktemp("public")
    torch.manual_seed(0)
    blocks = 4
    AutoencoderKL(
        block_out_channels=(8,) * blocks, norm_num_groups=4, latent_channels=4, scaling_factor=0.5, shift_factor=0.1,
        down_block_types=("DownEncoderBlock2D",) * blocks, up_block_types=("UpDecoderBlock2D",) * blocks,
    ).save_pretrained(root / "vae")  # fmt: skip
    built = text()
    (tokenizer, clip), (_, gemma) = built.clips[0], built.tokens
    for name, model in (("clip", clip), ("gemma", gemma)):
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    torch.manual_seed(1)
    TinyDecoder(**PUBLIC.decoder).save_pretrained(root / "decoder")
    (root / "pictures").mkdir()
    for number in range(12):
        Image.effect_noise((80, 60), 60 + number).convert("RGB").save(root / "pictures" / f"{number:02}.png")
        (root / "pictures" / f"{number:02}.txt").write_text(f"picture {number}")
    return root


@pytest.fixture(autouse=True)
def _presets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "public", PUBLIC)
    monkeypatch.setitem(PRESETS, "small", SMALL)


def config(**changes) -> TrainConfig:
    base = dict(steps=2, batch_size=4, warmup=1, sample_every=2, log_every=1)
    return TrainConfig(**{**base, **changes})


def frozen(public: Path, **changes) -> Source:
    base = dict(
        preset="public",
        data=str(public / "pictures"),
        autoencoder=str(public / "vae"),
        clip_l=public / "clip",
        gemma=public / "gemma",
    )
    return Source(**{**base, **changes})


def test_a_preset_of_public_latents_trains_on_frozen_encoders(public: Path, tmp_path: Path) -> None:
    source = frozen(public, decoder=public / "decoder", encoder_dropout=0.3)
    exported = runs.train_denoiser(source, config(), tmp_path, QUIET)
    record = json.loads((tmp_path / "config.json").read_text())
    assert record["encoder_dropout"] == 0.3 and record["shift"] == 3.0
    assert record["encoders"]["kinds"] == ["CLIPTextModelWithProjection", "Gemma2Model"]
    pipe = SnapGenPipeline.from_pretrained(exported)
    assert pipe("picture 3", num_inference_steps=1, output_type="pt").images.shape == (1, 3, 64, 64)
    assert len(list((tmp_path / "samples").glob("*.png"))) == 1


def test_without_a_decoder_the_denoiser_alone_is_exported(public: Path, tmp_path: Path) -> None:
    exported = runs.train_denoiser(frozen(public), config(), tmp_path, QUIET)
    assert {path.name for path in exported.iterdir()} == {"denoiser"}


def test_a_preset_of_public_latents_trains_on_a_cache(public: Path, tmp_path: Path) -> None:
    data = ImageFolder(public / "pictures", 64)
    encoders = runs.denoiser_task(frozen(public), 0)[0].text.encoders
    settings = CacheConfig(shard_size=5, dtype="fp32")
    write_cache(data, tmp_path / "cache", encoder=load_encoder(public / "vae"), text=encoders, config=settings)
    source = Source(preset="public", data=str(tmp_path / "cache"), encoder_dropout=0.3)
    task, cached = runs.denoiser_task(source, 0)
    live, _ = runs.denoiser_task(frozen(public), 0)
    assert task.text.layout == live.text.layout == Layout(((16, 16),), gemma=True)
    batch = cached.batch(range(5))
    images = data.batch([int(caption.split()[1]) for caption in batch.captions])[0]
    torch.testing.assert_close(task.latents(batch), live.latents(Batch(captions=batch.captions, images=images)))
    exported = runs.train_denoiser(source, config(), tmp_path / "run", QUIET)
    assert {path.name for path in exported.iterdir()} == {"denoiser"}


def test_buckets_and_resolution(public: Path) -> None:
    task, data = runs.denoiser_task(frozen(public, resolution=64, buckets=True), 0)
    assert task.shift == 3.0
    images, _ = data.batch([0, 1])
    assert images.shape == (2, 3, 48, 80)
    assert runs.denoiser_task(frozen(public, resolution=32), 0)[0].shift == pytest.approx(1.5)


def test_initial_weights(tmp_path: Path) -> None:
    first = runs.train_denoiser(
        Source(preset="small", autoencoder=str(_autoencoder(tmp_path))), config(), tmp_path / "first", QUIET
    )
    source = Source(preset="small", autoencoder=str(tmp_path / "autoencoder"), init=str(first))
    task, _ = runs.denoiser_task(source, 5)
    pipe = SnapGenPipeline.from_pretrained(first)
    for part in ("denoiser", "text_encoder"):
        for name, value in getattr(pipe, part).state_dict().items():
            assert torch.equal(value, task.modules[part].state_dict()[name])


def _autoencoder(root: Path) -> Path:
    for name, module in zip(("encoder", "decoder"), runs.build_autoencoder(SMALL), strict=True):
        module.save_pretrained(root / "autoencoder" / name)
    return root / "autoencoder"


@pytest.mark.parametrize(
    "changes, complaint",
    [
        (dict(autoencoder=None), "autoencoder"),
        (dict(clip_l=None, gemma=None), "--clip-l, --clip-g and --gemma"),
        (dict(resolution=60), "resolution: got 60; must be a multiple of 16"),
        (dict(preset="none"), "preset"),
        (dict(init="nowhere"), "holds no safetensors"),
        (dict(data="nowhere"), "data: got 'nowhere'"),
        (dict(caption_dropout=2.0), "caption_dropout"),
    ],
)
def test_what_does_not_fit_is_named_before_anything_is_written(public, tmp_path, changes, complaint) -> None:
    with pytest.raises(ValueError, match=complaint):
        runs.train_denoiser(frozen(public, **changes), config(), tmp_path / "run", QUIET)
    assert not (tmp_path / "run").exists()


def test_a_scale_of_another_preset_is_named(public: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PUBLIC.decoder, "scaling_factor", 0.7)
    with pytest.raises(ValueError, match=r"scale and shift are 0.5, 0.1; preset public has 0.7, 0.1"):
        runs.denoiser_task(frozen(public), 0)


# ---- memory ----------------------------------------------------------------------------------------------------------


def test_operators_that_are_kept_are_not_computed_again(tmp_path: Path) -> None:
    """`recompute` runs every block's forward twice, but for the operators that are to be kept."""
    task, _ = runs.denoiser_task(Source(preset="small", autoencoder=str(_autoencoder(tmp_path))), 0)
    counts, losses = {}, {}
    for name, settings in (
        ("plain", {}),
        ("again", dict(recompute=True)),
        ("kept", dict(recompute=True, recompute_keeps=("aten::addmm", "aten::mm"))),
    ):
        calls = 0

        class Counting(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
                nonlocal calls
                calls += operator in (torch.ops.aten.addmm.default, torch.ops.aten.mm.default)
                return operator(*args, **(kwargs or {}))

        out = tmp_path / name
        with snapgen_kernels.use("reference"), Counting():
            train(task_like(task), ShapesDataset(32, length=100), config(steps=1, **settings), out, console=QUIET)
        counts[name] = calls
        losses[name] = io.load_tensors(next((out / "checkpoints").glob("*/*.safetensors")))[
            "model/denoiser.conv_in.weight"
        ]
    assert counts["plain"] < counts["again"]
    assert counts["kept"] < counts["again"]
    assert torch.equal(losses["plain"], losses["again"]) and torch.equal(losses["plain"], losses["kept"])


def task_like(task):
    """A fresh task with the weights that `task` began with."""
    torch.manual_seed(0)
    fresh, text_encoder, tokenizer = runs.build_denoiser(SMALL, runs.VOCABULARY)
    return type(task)(
        SMALL,
        denoiser=fresh,
        text=runs.JointText(tokenizer, text_encoder),
        encoder=task.encoder,
        decoder=task.decoder,
        prompts=(),
    )


def test_an_operator_that_does_not_exist_is_named(tmp_path: Path) -> None:
    source = Source(preset="small", autoencoder=str(_autoencoder(tmp_path)))
    settings = config(recompute=True, recompute_keeps=("snapgen::nothing",))
    with pytest.raises(ValueError, match="recompute_keeps: got 'snapgen::nothing'"):
        runs.train_denoiser(source, settings, tmp_path / "run", QUIET)


def test_the_plan_counts_what_a_step_keeps(tmp_path: Path) -> None:
    source = Source(preset="small")
    whole = plan.make_plan(source, config(batch_size=8), 1)
    half = plan.make_plan(source, config(batch_size=8, micro_batch=4), 1)
    assert half.activations * 2 == whole.activations and half.passes == 2
    assert whole.state == 20 * whole.parameters
    dealt = plan.make_plan(source, config(batch_size=8, parallel="fsdp"), 2)
    assert dealt.state == 20 * (whole.parameters // 2)
    assert plan.make_plan(source, config(batch_size=8, recompute=True), 1).activations < whole.activations / 2
    # What the plan says is what a real forward pass keeps.
    task, _ = runs.denoiser_task(Source(preset="small", autoencoder=str(_autoencoder(tmp_path))), 0)
    assert plan.kept_bytes(task.modules["denoiser"], SMALL, 32, config()) * 8 == whole.activations


def test_the_dry_run_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    plan.print_plan(Source(preset="t2i-1024"), config(batch_size=8, dtype="bf16"), Console(width=100))
    said = capsys.readouterr().out
    assert "378.64M parameters" in said and "GiB" in said and "t2i-1024" in said
    assert not list(tmp_path.iterdir())
