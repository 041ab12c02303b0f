"""Training of decoders: what they are compared by, crops, the discriminator, another decoder's pictures, pruning."""

import math

import pytest
import torch
from diffusers import AutoencoderKL
from hypothesis import given
from hypothesis import strategies as st
from small_models import QUIET, SMALL
from test_train import assert_same, config, data
from torch import nn
from weights import random_weights

from snapgen import io
from snapgen.data.loader import Batch, Share, batches
from snapgen.data.shapes import ShapesDataset
from snapgen.decoder import TinyDecoder
from snapgen.distill.decoder import DecoderConfig, DecoderDistillation, DecoderTask, Prompts, report
from snapgen.distill.perceptual import (
    PatchDiscriminator,
    VGG16Features,
    hinge_discriminator,
    hinge_generator,
    unit,
)
from snapgen.distill.prune import importance, kl_axes, most_important, prune_decoder, tiny_axes
from snapgen.kl_decoder import KLDecoder, KLEncoder
from snapgen.pipeline import load
from snapgen.seeds import Draws
from snapgen.tasks import build_autoencoder
from snapgen.train import train

pytestmark = pytest.mark.method


def task(**changes) -> DecoderTask:
    torch.manual_seed(0)
    encoder, decoder = build_autoencoder(SMALL)
    pictures, _ = ShapesDataset(32, split="test").batch(range(3))
    return DecoderTask(SMALL, encoder=encoder, decoder=decoder, pictures=pictures, config=DecoderConfig(**changes))


def batch(places=range(4)) -> Batch:
    images, captions = data().batch(places)
    return Batch(images=images, captions=captions)


class Given(nn.Module):
    """A decoder that draws what it is told."""

    upscale, config = 8, {}

    def __init__(self, drawn) -> None:
        super().__init__()
        self.drawn = nn.Parameter(drawn)

    def forward(self, latents):
        return self.drawn


# ---- losses ----------------------------------------------------------------------------------------------------------


def test_errors_by_hand():
    made = task(l1=3.0, l2=0.5)
    images = torch.zeros(2, 3, 32, 32)
    made.call["decoder"] = Given(torch.cat((torch.full((1, 3, 32, 32), 0.5), torch.full((1, 3, 32, 32), -0.2))))
    loss, figures = made.loss(Batch(images=images, captions=["", ""]), Draws(0, 0, range(2)))
    assert loss.item() == pytest.approx(3 * (0.5 + 0.2) / 2 + 0.5 * (0.25 + 0.04) / 2, rel=1e-5)
    # Pictures span 2: PSNR = 10 log10(4 / MSE). Flat ones differ in brightness alone:
    # SSIM = (2 x y + c1) / (x^2 + y^2 + c1) with c1 = (0.01 * 2)^2.
    assert figures["psnr"].item() == pytest.approx(5 * (math.log10(4 / 0.25) + math.log10(4 / 0.04)), rel=1e-5)
    assert figures["ssim"].item() == pytest.approx((4e-4 / (0.25 + 4e-4) + 4e-4 / (0.04 + 4e-4)) / 2, rel=1e-4)


def test_hinge_losses_by_hand():
    real, drawn = torch.tensor([[2.0, 0.5], [-1.0, 1.0]]), torch.tensor([[-2.0, 0.0], [0.5, -0.5]])
    # max(0, 1 - r): 0, .5 | 2, 0; max(0, 1 + d): 0, 1 | 1.5, .5
    assert hinge_discriminator(real, drawn).tolist() == [0.25 + 0.5, 1.0 + 1.0]
    assert hinge_generator(drawn).tolist() == [1.0, 0.0]


def test_a_patchs_score_depends_on_its_own_picture_alone():
    judge = random_weights(PatchDiscriminator(8))
    pictures = torch.randn(3, 3, 40, 32)
    scores = judge(pictures)
    assert scores.shape == (3, 1, 3, 2)
    assert torch.allclose(judge(pictures[1:2]), scores[1:2], atol=1e-5)
    with pytest.raises(ValueError, match="at least 24 pixels"):
        judge(torch.zeros(1, 3, 16, 32))


@pytest.fixture(scope="module")
def vgg_file(tmp_path_factory):
    """Weights of VGG16's shape under torchvision's names, random, and of half precision to be small."""
    widths = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
    places = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
    generator = torch.Generator().manual_seed(5)
    tensors, last = {}, 3
    for place, width in zip(places, widths, strict=True):
        weight = torch.randn(width, last, 3, 3, generator=generator) * (2 / (9 * last)) ** 0.5
        tensors |= {f"features.{place}.weight": weight.half(), f"features.{place}.bias": torch.zeros(width).half()}
        last = width
    tensors["classifier.0.bias"] = torch.zeros(4)
    path = tmp_path_factory.mktemp("vgg") / "vgg16.safetensors"
    io.save_tensors(path, tensors)
    return path


def test_perceptual_distance(vgg_file, tmp_path):
    net = VGG16Features(vgg_file)
    x, y = torch.rand(2, 3, 32, 32) * 2 - 1, torch.rand(2, 3, 32, 32) * 2 - 1
    y[0] = x[0]
    x.requires_grad_(True)
    distance = net.distance(x, y)
    assert distance[0].item() == 0 and distance[1].item() > 0.01
    distance.sum().backward()
    assert x.grad[1].norm() > 0 and all(p.grad is None for p in net.parameters())
    features = net(x)
    assert [tuple(f.shape[1:]) for f in features] == [
        (64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4), (512, 2, 2)
    ]  # fmt: skip
    # The first depth, computed from the file: ReLU and convolution twice, of ImageNet's normalised pictures.
    stored = io.load_tensors(vgg_file)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    h = ((x + 1) / 2 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    for place in (0, 2):
        h = torch.relu(nn.functional.conv2d(h, stored[f"features.{place}.weight"].float(), padding=1))
    assert torch.allclose(features[0], h / h.norm(dim=1, keepdim=True), atol=1e-5)
    io.save_tensors(tmp_path / "other.safetensors", {"features.0.weight": torch.zeros(64, 3, 3, 3)})
    with pytest.raises(io.CheckpointError, match="does not fit the convolutions of torchvision's vgg16"):
        VGG16Features(tmp_path / "other.safetensors")


def test_unit_vectors_by_hand():
    x = torch.tensor([[3.0, 0.0], [4.0, 0.0]]).view(1, 2, 1, 2)
    assert unit(x)[0, :, 0, 0].tolist() == pytest.approx([0.6, 0.8]) and unit(x)[0, :, 0, 1].tolist() == [0, 0]


def test_without_features_the_message_says_what_to_give():
    with pytest.raises(ValueError, match=r"vgg: got none; perceptual needs a safetensors file .* torchvision's vgg16"):
        DecoderConfig(perceptual=0.5)
    with pytest.raises(io.CheckpointError, match="no such file"):
        VGG16Features("nowhere.safetensors")


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(l1=-1.0), "l1: got -1"),
        (dict(l1=0.0, l2=0.0), "all are 0"),
        (dict(crops=((10, 16), (0, 32))), "crops: got"),
    ],
)
def test_wrong_settings_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        DecoderConfig(**change)


@pytest.mark.parametrize("side", [8, 20, 40])
def test_crops_lie_on_the_latents_grid(side):
    with pytest.raises(ValueError, match=f"crops: got a side of {side} pixels; must be a multiple of 8 from 11 to 32"):
        task(crops=((0, side),))


def test_crops_grow_with_the_steps():
    plan = DecoderConfig(crops=((2, 16), (5, 24)))
    assert [plan.crop(step) for step in range(7)] == [None, None, 16, 16, 16, 24, 24]
    made = task(crops=((0, 16), (5, 24)))
    images = torch.arange(32.0).view(1, 1, 1, 32).expand(40, 3, 32, 32)  # each pixel says its column
    for step, side in ((0, 16), (7, 24)):
        found = made.cropped(Batch(images=images, captions=[""] * 40), Draws(0, step, range(40)))
        assert found.shape == (40, 3, side, side)
        lefts = found[:, 0, 0, 0].int()
        assert set(lefts.tolist()) == set(range(0, 32 - side + 1, 8))  # all places, on the latents' grid
        assert torch.equal(found[:, 0, 0], lefts.unsqueeze(1) + torch.arange(side))


def test_gradients_reach_what_is_meant(vgg_file):
    made = task(perceptual=0.1, vgg=vgg_file, adversarial=0.5, adversarial_from=3, discriminator_width=8)
    drawing, judging = made.phases()
    assert drawing.modules == ("decoder",) and judging.modules == ("discriminator",)
    _, figures = drawing.loss(batch(), Draws(0, 2, range(4)))
    assert "adversarial" not in figures and "perceptual" in figures
    loss, figures = drawing.loss(batch(), Draws(0, 3, range(4)))
    assert "adversarial" in figures
    loss.backward()
    assert all(p.grad is not None for p in made.modules["decoder"].parameters())
    frozen = (*made.encoder.parameters(), *made.vgg.parameters())
    assert all(p.grad is None for p in frozen)
    for module in made.modules.values():
        module.zero_grad()
    judging.loss(batch(), Draws(0, 3, range(4), phase=1))[0].backward()
    assert all(p.grad is not None for p in made.modules["discriminator"].parameters())
    assert all(p.grad is None for p in made.modules["decoder"].parameters())


def test_a_loss_is_the_mean_over_its_samples(vgg_file):
    made = task(perceptual=0.1, vgg=vgg_file, adversarial=0.5, discriminator_width=8, crops=((0, 24),))
    for phase in made.phases():
        whole = phase.loss(batch(), Draws(0, 0, range(4)))[0].item()
        parts = [phase.loss(batch(part), Draws(0, 0, part))[0].item() for part in (range(2), range(2, 4))]
        assert whole == pytest.approx(sum(parts) / 2, rel=1e-4)


def test_a_resumed_run_is_bitwise_that_of_one_left_alone(tmp_path):
    settings = dict(adversarial=0.1, adversarial_from=1, discriminator_width=8, crops=((0, 24), (3, 32)))
    plan = dict(save_every=2, cooldown=0.0)
    train(task(**settings), data(), config(steps=4, **plan), tmp_path / "alone", console=QUIET)
    train(task(**settings), data(), config(steps=2, **plan), tmp_path / "cut", console=QUIET)
    exported = train(task(**settings), data(), config(steps=4, **plan), tmp_path / "cut", console=QUIET)
    assert_same(tmp_path / "alone", tmp_path / "cut")
    decoder = TinyDecoder.from_pretrained(exported / "decoder")
    made = task()
    with torch.no_grad():
        drawn = decoder(made.encoder(made.pictures))
    found = io.read_json(exported / "report.json")["held out"]
    assert found == pytest.approx(report(drawn, made.pictures), rel=1e-4)
    mse = (drawn.clamp(-1, 1) - made.pictures).square().flatten(1).mean(1)
    assert found["psnr"] == pytest.approx((10 * torch.log10(4 / mse)).mean().item(), rel=1e-4)


def test_training_lowers_the_error(tmp_path):
    made = task()
    before = made.loss(batch(), Draws(0, 0, range(4)))[1]["psnr"].item()
    train(made, data(), config(steps=30, lr=3e-3), tmp_path, console=QUIET)
    after = made.loss(batch(), Draws(0, 0, range(4)))[1]["psnr"].item()
    assert after > before + 3


# ---- another decoder's pictures --------------------------------------------------------------------------------------


def distillation(**changes) -> DecoderDistillation:
    teacher = load("tiny")
    torch.manual_seed(0)
    arguments = dict(teacher.decoder.config, channels=(32, 32, 16, 16), blocks=(1, 0, 0, 0))
    decoder = TinyDecoder(**{name: value for name, value in arguments.items() if not name.startswith("_")})
    options = dict(prompts=("a red circle", "two stars"), steps=2, guidance=2.0)
    return DecoderDistillation(SMALL, teacher=teacher, decoder=decoder, **{**options, **changes})


def test_a_decoder_learns_anothers_pictures_from_prompts_alone(tmp_path):
    made = distillation()
    prompts = Prompts.of("shapes")
    stream = batches(prompts, Share(4, 2), start=0, seed=0)
    first = next(stream)
    assert first.images is None and len(first.captions) == 2 and len(prompts) > 500
    draws = Draws(0, 0, first.positions)
    loss, _ = made.loss(first, draws)
    # By hand: the latents that the pipeline draws from this noise, through both decoders.
    noise = Draws(0, 0, first.positions).normal(8, 8, 8)
    made.teacher.set_progress_bar_config(disable=True)
    latents = made.teacher(
        first.captions, num_inference_steps=2, guidance_scale=2.0, latents=noise, output_type="latent"
    ).images
    with torch.no_grad():
        by_hand = (made.modules["decoder"](latents) - made.teacher.decoder(latents)).square().mean()
    assert loss.item() == pytest.approx(by_hand.item(), rel=1e-4)
    loss.backward()
    assert all(p.grad is not None for p in made.modules["decoder"].parameters())
    parts = [part for part in made.teacher.components.values() if isinstance(part, nn.Module)]
    assert all(p.grad is None and not p.requires_grad for part in parts for p in part.parameters())


def test_decoder_distillation_resumes_bitwise_and_reports(tmp_path):
    plan = dict(save_every=2, cooldown=0.0)
    prompts = Prompts.of("shapes")
    train(distillation(), prompts, config(steps=3, **plan), tmp_path / "alone", console=QUIET)
    train(distillation(), prompts, config(steps=2, **plan), tmp_path / "cut", console=QUIET)
    exported = train(distillation(), prompts, config(steps=3, **plan), tmp_path / "cut", console=QUIET)
    assert_same_small(tmp_path / "alone", tmp_path / "cut")
    found = io.read_json(exported / "report.json")["against the teacher"]
    assert found["pictures"] == 2 and 0 < found["psnr"] < 60 and found["ssim"] <= 1
    made = distillation()
    latents = made._held_out(0)
    decoder = TinyDecoder.from_pretrained(exported / "decoder")
    with torch.no_grad():
        assert found == pytest.approx(report(decoder(latents), made.teacher.decoder(latents)), rel=1e-4)


def assert_same_small(one, other):
    def weights(out):
        newest = max((out / "checkpoints").glob("step-*"))
        return {name: t for file in newest.glob("*.safetensors") for name, t in io.load_tensors(file).items()}

    a, b = weights(one), weights(other)
    assert a.keys() == b.keys() and a and all(torch.equal(a[name], b[name]) for name in a)


def test_latents_that_are_there_are_taken():
    made = distillation()
    latents = torch.randn(2, 8, 8, 8)
    loss, _ = made.loss(Batch(captions=["", ""], latents=latents), Draws(0, 0, range(2)))
    with torch.no_grad():
        by_hand = (made.modules["decoder"](latents) - made.teacher.decoder(latents)).square().mean()
    assert loss.item() == pytest.approx(by_hand.item(), rel=1e-5)


def test_a_decoder_of_other_latents_is_refused():
    teacher = load("tiny")
    decoder = TinyDecoder(latent_channels=4, channels=(32, 16), blocks=(0, 0))
    with pytest.raises(ValueError, match="decoder: takes 4 latent channels at 1/2; must be the teacher's 8 at 1/8"):
        DecoderDistillation(SMALL, teacher=teacher, decoder=decoder, prompts=("a",))


def test_prompts_from_a_file(tmp_path):
    (tmp_path / "prompts.txt").write_text("a red circle\n\n two stars\n")
    prompts = Prompts.of(str(tmp_path / "prompts.txt"))
    assert len(prompts) == 2 and prompts.batch([1]).captions == [" two stars"]
    with pytest.raises(ValueError, match="prompts: got 'nowhere'"):
        Prompts.of("nowhere")
    with pytest.raises(ValueError, match="there are none"):
        Prompts([" "])


# ---- pruning ---------------------------------------------------------------------------------------------------------


def tiny_decoder(**changes) -> TinyDecoder:
    arguments = dict(latent_channels=8, channels=(32, 16, 16), blocks=(2, 1, 1), expansion=2, norm_groups=8)
    return random_weights(TinyDecoder(**{**arguments, **changes}))


def vae(**changes) -> AutoencoderKL:
    torch.manual_seed(4)
    return random_weights(
        AutoencoderKL(
            **changes,
            block_out_channels=(16, 32, 32),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            layers_per_block=1,
            norm_num_groups=8,
        )
    )


def kl_decoder() -> KLDecoder:
    return KLDecoder.from_vae(vae()).eval()


def doubled(small, large, axes):
    """`large` with the weights of `small`: every channel twice, the second of a pair read by nobody."""
    weights = {}
    for name, value in small.state_dict().items():
        for axis, space in enumerate(axes[name]):
            if space is None:
                continue
            twice = value.repeat_interleave(2, axis)
            reads = axis == 1
            if reads:
                index = torch.arange(twice.shape[axis]) % 2 == 1
                twice = twice.index_fill(axis, index.nonzero().flatten(), 0.0)
            if space == "queries" and axis == 0:  # nobody but each other reads queries and keys
                twice = twice.index_fill(0, (torch.arange(len(twice)) % 2 == 1).nonzero().flatten(), 0.0)
            value = twice
        weights[name] = value
    large.load_state_dict(weights)
    return large


@pytest.mark.parametrize("kind", ["tiny", "kl"])
def test_pruning_finds_the_channels_that_nobody_reads(kind):
    """Every channel twice, in one group with its copy, and one of them unread: pruning gives the small decoder."""
    small = tiny_decoder() if kind == "tiny" else kl_decoder()
    axes = (tiny_axes if kind == "tiny" else kl_axes)(small)
    config = {name: value for name, value in small.config.items() if not name.startswith("_")}
    large = type(small)(**{**config, "channels": tuple(2 * width for width in config["channels"])})
    doubled(small, large, axes)
    latents = torch.randn(2, config["latent_channels"], 4, 4)
    pruned = prune_decoder(large)
    with torch.no_grad():
        if kind == "tiny":  # the attention's scale depends on its width, so a wide KLDecoder is another function
            assert torch.allclose(large(latents), small(latents), atol=1e-4)
        assert {name: value for name, value in pruned.config.items() if not name.startswith("_")} == config
        assert all(torch.equal(w, small.state_dict()[name]) for name, w in pruned.state_dict().items())
        assert torch.allclose(pruned(latents), small(latents), atol=1e-5)


@pytest.mark.parametrize("make", [tiny_decoder, kl_decoder])
def test_every_parameter_has_its_spaces_and_the_right_size(make):
    decoder = make()
    before = {name: weight.clone() for name, weight in decoder.state_dict().items()}
    axes = (tiny_axes if isinstance(decoder, TinyDecoder) else kl_axes)(decoder)
    assert axes.keys() == decoder.state_dict().keys()
    pruned = prune_decoder(decoder)
    assert tuple(pruned.config["channels"]) == tuple(width // 2 for width in decoder.config["channels"])
    pictures = pruned(torch.randn(1, decoder.config.latent_channels, 4, 4))
    assert pictures.shape == (1, 3, 16, 16) and pictures.isfinite().all()
    assert all(torch.equal(weight, before[name]) for name, weight in decoder.state_dict().items())


def test_half_of_the_channels_is_a_quarter_of_the_parameters():
    """SnapFusion says 50M to 13M, 3.8 times fewer; with every width halved it is 12.4M."""
    with torch.device("meta"):
        whole, half = KLDecoder(), prune_shapes(KLDecoder())
    count = [sum(p.numel() for p in decoder.parameters()) for decoder in (whole, half)]
    assert count == [49_490_199, 12_387_479]  # the first is diffusers' count of SD's decoder with post_quant_conv


def prune_shapes(decoder):
    return KLDecoder(channels=tuple(width // 2 for width in decoder.config.channels))


def test_importance_by_hand():
    state = {"a.weight": torch.tensor([[1.0, 3.0], [0.0, 0.0]]), "a.bias": torch.tensor([9.0, 0.0])}
    found = importance(state, {"a.weight": ("out", "in"), "a.bias": ("out",)})
    # The whole weight's mean is 1; rows have 2 and 0, columns 0.5 and 1.5; biases do not count.
    assert found["out"].tolist() == [2.0, 0.0] and found["in"].tolist() == [0.5, 1.5]


@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 4), st.integers(0, 100))
def test_the_most_important_of_each_group_stay(groups, kept, dropped, seed):
    weights = torch.randn(groups * (kept + dropped), generator=torch.Generator().manual_seed(seed))
    chosen = most_important(weights, groups * kept, groups)
    assert chosen.tolist() == sorted(set(chosen.tolist())) and len(chosen) == groups * kept
    for part in range(groups):
        first = part * (kept + dropped)
        own = set(range(first, first + kept + dropped))
        inside = own & set(chosen.tolist())
        assert len(inside) == kept
        assert all(weights[i] >= weights[j] for i in inside for j in own - inside)


def test_wrong_pruning_is_named():
    with pytest.raises(ValueError, match="share: got 1"):
        prune_decoder(tiny_decoder(), share=1)
    with pytest.raises(ValueError, match=r"share: got 0\.3, which leaves"):
        prune_decoder(tiny_decoder(), share=0.3)
    with pytest.raises(ValueError, match="decoder: got a Linear"):
        prune_decoder(nn.Linear(1, 1))
    with pytest.raises(ValueError, match="groups: got 3; must divide 8"):
        most_important(torch.zeros(8), 6, 3)


@pytest.mark.parametrize(
    "changes",
    [{}, dict(latent_channels=16, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06)],
    ids=["SD 1", "SD 3"],
)
def test_the_halves_of_an_autoencoder_compute_the_same(tmp_path, changes):
    whole = vae(**changes)
    decoder = KLDecoder.from_vae(whole).eval()
    latents, pictures = torch.randn(1, whole.config.latent_channels, 4, 4), torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(decoder(latents), whole.decode(latents).sample)
        shift = changes.get("shift_factor", 0.0)
        assert torch.equal(decoder.decode(latents), decoder(latents / 0.18215 + shift))
        encoder = KLEncoder.from_vae(whole).eval()
        assert torch.equal(encoder(pictures), whole.encode(pictures).latent_dist.mode())
    decoder.save_pretrained(tmp_path)
    again = KLDecoder.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(latents), decoder(latents))
    assert decoder.upscale == 4
    with pytest.raises(ValueError, match="latents: got shape"):
        decoder(pictures)
