"""Scores against numbers worked out by hand, closed forms and scipy; and what they say of bad input."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from small_models import QUIET, denoiser_task

from snapgen import io
from snapgen.metrics import benchmarks, command
from snapgen.metrics.benchmarks import DrawConfig
from snapgen.metrics.features import ClipScore, FeatureNetwork
from snapgen.metrics.frechet import Statistics, fid, frechet_distance, statistics
from snapgen.metrics.inception import Inception
from snapgen.metrics.pictures import as_tensor, psnr, ssim

pytestmark = pytest.mark.method

# --- PSNR and SSIM ---


def test_psnr_by_hand() -> None:
    real = torch.zeros(3, 3, 4, 4)
    drawn = real.clone()
    drawn[0] += 0.2  # MSE 0.04: 10 log10(4 / 0.04) = 20
    drawn[1, 0, 0, 0] = 1.0  # MSE 1/48: 10 log10(192)
    found = psnr(drawn, real)
    assert found[0].item() == pytest.approx(20, abs=1e-5) and found[1].item() == pytest.approx(10 * math.log10(192))
    assert found[2].item() == math.inf and found.dtype == torch.float64


def test_ssim_by_hand() -> None:
    # Of constants a and b: (2ab + C1) / (a^2 + b^2 + C1), C1 = (0.01 x 2)^2; spreads are zero and cancel.
    a, b = torch.full((1, 3, 12, 12), 0.5), torch.full((1, 3, 12, 12), 0.25)
    assert ssim(a, b).item() == pytest.approx((2 * 0.125 + 4e-4) / (0.25 + 0.0625 + 4e-4), rel=1e-7)
    # Of a picture and its negative, of zero mean under the window: -1 but for the constants. By one window of 11x11.
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 1, 11, 11, generator=generator, dtype=torch.float64)
    line = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    window = np.outer(line, line) / np.outer(line, line).sum()
    x = x - (x[0, 0].numpy() * window).sum()
    spread = (x[0, 0].numpy() ** 2 * window).sum()
    assert ssim(x, -x).item() == pytest.approx((-2 * spread + 36e-4) / (2 * spread + 36e-4), rel=1e-9)
    assert ssim(x, x).item() == pytest.approx(1)


@given(seed=st.integers(0, 100), noise=st.floats(0.01, 1))
@settings(max_examples=25, deadline=None)
def test_ssim_is_symmetric_and_falls_with_noise(seed: int, noise: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(2, 3, 16, 14, generator=generator) * 2 - 1
    y = x + noise * torch.randn(x.shape, generator=generator)
    torch.testing.assert_close(ssim(x, y), ssim(y, x))
    assert (ssim(x, y) < 1).all() and (ssim(x, x + 2 * (y - x)) < ssim(x, y)).all()


def test_wrong_pictures() -> None:
    with pytest.raises(ValueError, match="got shapes"):
        psnr(torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 5))
    with pytest.raises(ValueError, match="must be at least 11x11"):
        ssim(torch.zeros(1, 3, 10, 12), torch.zeros(1, 3, 10, 12))
    assert as_tensor([Image.new("L", (2, 3), 255)]).shape == (1, 3, 3, 2)


# --- Fréchet distance ---


def of(count: int, mean: Any, covariance: Any) -> Statistics:
    found = Statistics(len(mean))
    found.count, found.mean = count, torch.as_tensor(mean, dtype=torch.float64)
    found._squares = torch.as_tensor(covariance, dtype=torch.float64) * (count - 1)
    return found


def test_frechet_distance_by_hand() -> None:
    # Diagonal: |m1 - m2|^2 + sum (s1 - s2)^2 = 9 + 16 + (1 - 2)^2 + (3 - 1)^2 = 30.
    one, two = of(10, [0, 0], [[1, 0], [0, 9]]), of(20, [3, 4], [[4, 0], [0, 1]])
    assert frechet_distance(one, two) == pytest.approx(30, rel=1e-12)
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-12)
    # Turned by 45 degrees against each other: tr (C1 C2)^1/2 of C1 = diag(4, 1), C2 = [[2.5, 1.5], [1.5, 2.5]] is
    # sqrt(tr(C1 C2) + 2 sqrt(det C1 det C2)) = sqrt(12.5 + 2 x 4); so 5 + 5 - 2 sqrt(20.5).
    turned = of(5, [0, 0], [[2.5, 1.5], [1.5, 2.5]])
    assert frechet_distance(of(5, [0, 0], [[4, 0], [0, 1]]), turned) == pytest.approx(
        10 - 2 * math.sqrt(20.5), rel=1e-12
    )


@given(width=st.integers(1, 12), count=st.integers(2, 40), seed=st.integers(0, 50))
@settings(max_examples=40, deadline=None)
def test_frechet_distance_against_scipy(width: int, count: int, seed: int) -> None:
    """Also where there are fewer pictures than features, so that covariances are singular."""
    generator = torch.Generator().manual_seed(seed)
    sets = [
        torch.randn(n, width, generator=generator, dtype=torch.float64) * (1 + k) for k, n in enumerate((count, 30))
    ]
    found = frechet_distance(statistics([sets[0]]), statistics([sets[1]]))
    m1, m2 = (x.mean(0).numpy() for x in sets)
    c1, c2 = (np.cov(x.numpy(), rowvar=False).reshape(width, width) for x in sets)
    # scipy's root of C1 C2 loses half the digits where that is singular; a root each of C1 and of the middle does not.
    root = scipy.linalg.sqrtm(c1 + 1e-13 * np.eye(width)).real
    middle = np.linalg.eigvalsh(root @ c2 @ root).clip(min=0)
    wanted = ((m1 - m2) ** 2).sum() + np.trace(c1) + np.trace(c2) - 2 * np.sqrt(middle).sum()
    assert found == pytest.approx(wanted, rel=1e-5, abs=1e-5)
    if count > 2 * width:
        mixed = np.trace(scipy.linalg.sqrtm(c1 @ c2)).real
        assert found == pytest.approx(((m1 - m2) ** 2).sum() + np.trace(c1) + np.trace(c2) - 2 * mixed, rel=1e-7)


@given(
    parts=st.lists(st.integers(0, 7), min_size=1, max_size=6).filter(lambda p: sum(p) > 1), offset=st.floats(-1e4, 1e4)
)
@settings(max_examples=60, deadline=None)
def test_statistics_in_parts_are_those_of_the_whole(parts: list[int], offset: float) -> None:
    generator = torch.Generator().manual_seed(sum(parts))
    x = torch.randn(sum(parts), 5, generator=generator, dtype=torch.float64) + offset
    found = statistics(x.split(parts))
    torch.testing.assert_close(found.mean, x.mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.covariance, torch.cov(x.T), rtol=1e-9, atol=1e-9)


def test_statistics_are_kept_and_checked(tmp_path: Path) -> None:
    found = statistics([torch.randn(9, 4)])
    found.save(tmp_path / "s.safetensors", "net")
    again = Statistics.load(tmp_path / "s.safetensors", "net")
    assert frechet_distance(found, again) == pytest.approx(0, abs=1e-12) and again.count == 9
    with pytest.raises(io.CheckpointError, match="statistics of features of net; must be of other"):
        Statistics.load(tmp_path / "s.safetensors", "other")
    save_file({"mean": torch.zeros(2)}, tmp_path / "t.safetensors")
    with pytest.raises(io.CheckpointError, match="holds no statistics"):
        Statistics.load(tmp_path / "t.safetensors", "net")
    with pytest.raises(ValueError, match=r"got shape \(2, 3\); must be \[B, 4\]"):
        found.add(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="not finite"):
        found.add(torch.full((1, 4), math.nan))
    with pytest.raises(ValueError, match="got no picture"):
        statistics([])
    with pytest.raises(ValueError, match="a covariance needs at least 2"):
        frechet_distance(statistics([torch.zeros(1, 4)]), found)
    with pytest.raises(ValueError, match="features of width 4 and 3"):
        frechet_distance(found, statistics([torch.zeros(2, 3)]))


def test_fid_of_networks_features() -> None:
    """Through a network that is known: the mean of each channel."""
    real = [torch.tensor([[1.0, 0, 0], [-1.0, 0, 0]]).view(2, 3, 1, 1)]
    drawn = [torch.tensor([[3.0, 0, 0], [-3.0, 0, 0]]).view(2, 3, 1, 1)]
    # Deviations sqrt(2) and 3 sqrt(2) in one channel: (3 sqrt(2) - sqrt(2))^2 = 8.
    assert fid(drawn, real, lambda x: x.mean((2, 3))) == pytest.approx(8)


# --- networks of files ---


@pytest.fixture(scope="module")
def inception(tmp_path_factory: pytest.TempPathFactory) -> tuple[Inception, Path]:
    torch.manual_seed(0)
    network = Inception().eval()
    for name, buffer in network.named_buffers():
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
    path = tmp_path_factory.mktemp("inception") / "inception.safetensors"
    fc = {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}
    tensors = {n: v for n, v in network.state_dict().items() if not n.endswith("num_batches_tracked")}
    save_file({**tensors, **fc}, path)
    return network, path


def test_inception_is_that_of_2015(inception: tuple[Inception, Path]) -> None:
    """Its weights: 23,834,568 of Inception-v3 with 1000 classes, less 2,049,000 of the classifier."""
    network, _ = inception
    assert sum(p.numel() for p in network.parameters()) == 23_834_568 - 2_049_000
    shapes = {name: tuple(p.shape) for name, p in network.named_parameters()}
    assert shapes["Conv2d_4a_3x3.conv.weight"] == (192, 80, 3, 3)
    assert shapes["Mixed_6c.branch7x7dbl_3.conv.weight"] == (160, 160, 1, 7)
    assert shapes["Mixed_7c.branch3x3dbl_3b.conv.weight"] == (384, 384, 3, 1)
    sizes: dict[str, tuple[int, ...]] = {}
    for name, part in network.named_children():
        part.register_forward_hook(lambda _, __, out, name=name: sizes.__setitem__(name, tuple(out.shape[1:])))
    features = network(torch.zeros(1, 3, 64, 64))
    assert features.shape == (1, 2048)
    assert sizes["Conv2d_2b_3x3"] == (64, 147, 147) and sizes["Mixed_5d"] == (288, 35, 35)
    assert sizes["Mixed_6e"] == (768, 17, 17) and sizes["Mixed_7c"] == (2048, 8, 8)
    # What tells the 2015 graph apart, on a picture of ones: means leave the padding out, the last pool is a maximum.
    ones = torch.ones(1, 1, 4, 4)
    from snapgen.metrics.inception import _average

    assert torch.equal(_average(ones), ones)
    assert [part.largest for part in (network.Mixed_7b, network.Mixed_7c)] == [False, True]


def test_inception_of_a_file(inception: tuple[Inception, Path], tmp_path: Path) -> None:
    network, path = inception
    pictures = torch.rand(2, 3, 40, 32) * 2 - 1
    loaded = FeatureNetwork(path)
    torch.testing.assert_close(loaded(pictures), network(pictures).detach())
    with pytest.raises(ValueError, match="does not exist; name a safetensors file of Inception-v3"):
        FeatureNetwork(tmp_path / "none")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(io.CheckpointError, match="does not fit Inception-v3"):
        FeatureNetwork(tmp_path / "other.safetensors")
    (tmp_path / "pickle.safetensors").write_bytes(b"\x80\x04")
    with pytest.raises(io.CheckpointError, match="pickle"):
        FeatureNetwork(tmp_path / "pickle.safetensors")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP of random weights, with tokenizer and preprocessing, as transformers saves it."""
    from transformers import CLIPConfig, CLIPModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    from snapgen.text import build_tiny_text

    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    tokenizer, _ = build_tiny_text(["a", "red", "circle"], hidden_size=16, layers=1, heads=2, max_tokens=12)
    part = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, projection_dim=8)
    text = dict(
        part, vocab_size=len(tokenizer), max_position_embeddings=12, eos_token_id=3, bos_token_id=2, pad_token_id=0
    )
    vision = dict(part, image_size=28, patch_size=14)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = dict(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    CLIPImageProcessorPil(**size).save_pretrained(folder)
    return folder


def test_clip_score_is_the_cosine_of_both_embeddings(clip: Path) -> None:
    from transformers import CLIPModel

    pictures = torch.rand(2, 3, 28, 28) * 2 - 1
    captions = ["a red circle", "red"]
    found = ClipScore(clip)(pictures, captions)
    # By hand: bytes, CLIP's mean and deviation, both towers, cosine.
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    deviation = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    pixels = (((pictures + 1) * 127.5).round() / 255 - mean) / deviation
    model = CLIPModel.from_pretrained(clip).eval()
    ids, mask = torch.tensor([[2, 4, 5, 6, 3], [2, 5, 3, 0, 0]]), torch.tensor([[1] * 5, [1, 1, 1, 0, 0]])
    with torch.no_grad():
        output = model(input_ids=ids, attention_mask=mask, pixel_values=pixels)
    image, text = output.image_embeds, output.text_embeds
    wanted = [(i @ t / i.norm() / t.norm()).item() for i, t in zip(image, text, strict=True)]
    assert found.tolist() == pytest.approx(wanted, abs=1e-5) and abs(wanted[0] - wanted[1]) > 1e-3
    with pytest.raises(ValueError, match="captions: got 1 for 2 pictures"):
        ClipScore(clip)(pictures, ["red"])


def test_a_vision_model_of_a_folder(clip: Path, tmp_path: Path) -> None:
    from transformers import CLIPModel

    network = FeatureNetwork(clip)
    features = network(torch.rand(3, 3, 40, 28) * 2 - 1)
    assert features.shape == (3, 16)
    model = CLIPModel.from_pretrained(clip).eval()
    seen = network._process(images=[Image.new("RGB", (28, 28), "red")], return_tensors="pt").pixel_values
    with torch.no_grad():
        wanted = model.vision_model(pixel_values=seen).pooler_output
    red = torch.tensor([1.0, -1, -1]).view(1, 3, 1, 1).expand(1, 3, 28, 28)
    torch.testing.assert_close(network(red), wanted)
    (tmp_path / "empty").mkdir()
    for kind in (FeatureNetwork, ClipScore):
        with pytest.raises(io.CheckpointError, match=r"holds no .* model \(config\.json\)"):
            kind(tmp_path / "empty")
    with pytest.raises(ValueError, match="is no folder; name one of a transformers CLIP model"):
        ClipScore(tmp_path / "none")
    (tmp_path / "vit").mkdir()
    (tmp_path / "vit" / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(io.CheckpointError, match="describes no CLIP model"):
        ClipScore(tmp_path / "vit")


# --- the commands ---


@pytest.fixture(scope="module")
def pipe() -> Any:
    task = denoiser_task()
    for module in task.modules.values():
        module.eval()
    return task.pipeline(task.modules)


def lines(path: Path, entries: Sequence[Any]) -> Path:
    path.write_text("\n".join(json.dumps(entry) for entry in entries) + "\n")
    return path


RED_BENCH = {"tag": "colors", "include": [{"class": "bench", "count": 1, "color": "red"}], "prompt": "a red circle"}


@pytest.fixture(scope="module")
def checkpoint(pipe: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "small"
    pipe.save_pretrained(folder)
    return folder


def test_clip_and_fid_of_a_checkpoint(
    checkpoint: Path, clip: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "captions.txt").write_text("a red circle\n\ntwo stars\n")
    out, config = tmp_path / "drawn", DrawConfig(steps=1, per_prompt=2)
    named = dict(captions=tmp_path / "captions.txt", config=config, console=QUIET)
    found = command.main_clip(str(checkpoint), clip=clip, pictures=out, out=tmp_path / "clip.json", **named)
    assert found["pictures"] == 4 and json.loads((tmp_path / "clip.json").read_text()) == found
    judge = ClipScore(clip)
    cosines = []
    for path in sorted(out.glob("*.png")):
        with Image.open(path) as picture:
            caption = "a red circle" if path.name.startswith("000000") else "two stars"
            cosines.append(judge(as_tensor([picture]), [caption]).item())
    assert found["clip_score"] == pytest.approx(np.mean(cosines), abs=1e-6)
    assert found["standard_error"] == pytest.approx(np.std(cosines, ddof=1) / 2, abs=1e-6)

    real = tmp_path / "real"
    real.mkdir()
    for n in range(5):
        Image.effect_noise((30 + n, 28), 50).convert("RGB").save(real / f"{n}.png")
    (real / "5.png").write_bytes(b"no picture")
    kept = tmp_path / "kept.safetensors"
    one = command.main_fid(out, reference=real, network=clip, checkpoint=str(checkpoint), keep=kept, **named)
    assert (one["pictures"], one["reference"], one["width"]) == (4, 5, 16)
    assert one["skipped"] == {"image is broken or not JPEG, PNG or WebP": 1} and "5.png" in caplog.text
    two = command.main_fid(out, reference=kept, network=clip, console=QUIET)
    assert two["fid"] == pytest.approx(one["fid"]) and one["fid"] > 0
    assert command.main_fid(real, reference=kept, network=clip, console=QUIET)["fid"] == pytest.approx(0, abs=1e-6)


def test_commands_name_what_is_missing(checkpoint: Path, clip: Path, tmp_path: Path) -> None:
    captions = tmp_path / "captions.txt"
    with pytest.raises(ValueError, match=r"captions: .* does not exist"):
        command.main_clip(str(checkpoint), clip=clip, captions=captions, pictures=tmp_path / "p", console=QUIET)
    captions.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="is no text"):
        command.read_captions(captions)
    captions.write_text("\n")
    with pytest.raises(ValueError, match="holds none"):
        command.read_captions(captions)
    with pytest.raises(ValueError, match=r"reference: .* does not exist"):
        command.main_fid(tmp_path, reference=tmp_path / "none", network=clip, console=QUIET)
    with pytest.raises(ValueError, match="needs both a checkpoint and captions"):
        command.main_fid(tmp_path, reference=tmp_path, network=clip, captions=captions, console=QUIET)
    with pytest.raises(ValueError, match=r"pictures: .* holds none"):
        command.main_fid(tmp_path, reference=tmp_path, network=clip, console=QUIET)
    with pytest.raises(ValueError, match="is no folder"):
        next(command.list_batches(tmp_path / "none", Counter()))
    with pytest.raises(ValueError, match="count: got 0"):
        command.main_decoder(str(checkpoint), data="shapes", count=0, console=QUIET)
    for name in ("steps", "per_prompt", "batch_size"):
        with pytest.raises(ValueError, match=f"{name}: got 0"):
            DrawConfig(**{name: 0})


def test_benchmarks_of_a_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    lines(tmp_path / "evaluation_metadata.jsonl", [RED_BENCH])
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "1.txt").write_text("a red circle")
    config = DrawConfig(steps=1, per_prompt=1)
    command.main_geneval(str(checkpoint), prompts=tmp_path, out=tmp_path / "g", config=config, console=QUIET)
    command.main_dpg(str(checkpoint), prompts=tmp_path / "prompts", out=tmp_path / "d", config=config, console=QUIET)
    assert (tmp_path / "g/00000/samples/00000.png").is_file() and (tmp_path / "d/sheets/1.png").is_file()


def test_the_shipped_decoder_keeps_most_of_a_picture(tmp_path: Path) -> None:
    """The tiny autoencoder, on scenes that training never showed: computed here again, by hand."""
    from snapgen.data.shapes import ShapesDataset
    from snapgen.pipeline import SnapGenPipeline

    found = command.main_decoder("tiny", data="shapes", count=20, out=tmp_path / "d.json", console=QUIET)
    pipe = SnapGenPipeline.from_pretrained("tiny")
    images, _ = ShapesDataset(64, split="test").batch(range(20))
    with torch.no_grad():
        drawn = pipe.decoder(pipe.encoder(images)).clamp(-1, 1)
    drawn = (((drawn + 1) * 127.5).round() / 127.5 - 1).double()
    errors = (drawn - images.double()).square().mean((1, 2, 3))
    assert found["psnr"] == pytest.approx((10 * torch.log10(4 / errors)).mean().item(), abs=0.02)
    assert found["psnr"] > 25 and 0.8 < found["ssim"] < 1 and found["pictures"] == 20


def test_a_decoder_of_diffusers(tmp_path: Path) -> None:
    from diffusers import AutoencoderKL

    from snapgen.data.shapes import ShapesDataset

    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, scaling_factor=0.5, shift_factor=0.1,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    ).eval()  # fmt: skip
    vae.save_pretrained(tmp_path)
    found = command.main_decoder(str(tmp_path), data="shapes", resolution=32, count=3, console=QUIET)
    images, _ = ShapesDataset(32, split="test").batch(range(3))
    with torch.no_grad():
        drawn = vae.decode(vae.encode(images).latent_dist.mode()).sample.clamp(-1, 1)
    assert found["psnr"] == pytest.approx(
        psnr(((drawn + 1) * 127.5).round() / 127.5 - 1, images).mean().item(), abs=1e-3
    )


def test_pictures_come_in_batches_of_one_size(tmp_path: Path) -> None:
    for number in range(40):
        Image.new("RGB", (8, 8 + (number >= 20)), (number, 0, 0)).save(tmp_path / f"{number:02}.png")
    found = list(command.list_batches(tmp_path, Counter()))
    assert [tuple(batch.shape) for batch in found] == [(n, 3, h, 8) for n, h in ((16, 8), (4, 8), (16, 9), (4, 9))]
    values = [((picture[0, 0, 0] + 1) * 127.5).round().item() for batch in found for picture in batch]
    assert values == list(range(40))


def test_pictures_appear_whole_or_not_at_all(tmp_path: Path) -> None:
    class Failing(Image.Image):
        def save(self, path: Any, *_: Any, **__: Any) -> None:
            Path(path).write_bytes(b"half")
            raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        benchmarks.save(Failing(), tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


def test_the_command_line(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As `snapgen eval ...` reads it."""
    import tyro

    def run(*words: Any) -> Any:
        return tyro.extras.subcommand_cli_from_dict(command.EVALS, args=list(map(str, words)))

    found = run("decoder", "tiny", "--data", "shapes", "--count", 2, "--out", tmp_path / "d.json")
    assert json.loads((tmp_path / "d.json").read_text()) == found and "PSNR" in capsys.readouterr().out
    lines(tmp_path / "m.jsonl", [RED_BENCH])
    run(
        "geneval",
        checkpoint,
        "--prompts",
        tmp_path / "m.jsonl",
        "--out",
        tmp_path / "g",
        "--steps",
        1,
        "--per-prompt",
        1,
    )
    assert (tmp_path / "g/00000/samples/00000.png").is_file()
    for name in command.EVALS:
        with pytest.raises(SystemExit):
            run(name, "--help")
        text = capsys.readouterr().out
        assert "--console" not in text and "usage" in text
