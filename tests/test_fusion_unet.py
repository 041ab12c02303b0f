"""SnapFusion's UNet: its blocks and parameters, SD's weights in it, and nets without some of their blocks."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from small_fusion import SMALL_FUSION, fusion_task, small_fusion, tiny_sd
from weights import random_weights

from snapgen import io
from snapgen.fusion_presets import FUSION_PRESETS, build_fusion, fusion_counts, get_fusion_preset
from snapgen.fusion_weights import edited, from_stable_diffusion, inherit, renamed, stable_diffusion_arguments

pytestmark = pytest.mark.method


def meta(name):
    with torch.device("meta"):
        return build_fusion(get_fusion_preset(name))


def parameters(name):
    return sum(p.numel() for p in meta(name).parameters())


def test_parameters_are_those_published():
    assert parameters("sd15") == 859_520_964  # diffusers' count of Stable Diffusion 1.5
    assert parameters("snapfusion") == pytest.approx(848e6, rel=0.01)
    assert parameters("tiny-fusion") == pytest.approx(6.03e6, rel=0.01)
    with pytest.raises(ValueError, match="unknown name 'sd21'"):
        get_fusion_preset("sd21")


def counted(name):
    """Blocks by SnapFusion's table 3: stages at 1/8, 1/16, 1/32 down, 1/64, and up again."""
    rows = {}
    for path, place in meta(name).places.items():
        way = path.split(".")[0].removesuffix("_stages")
        row = "mid" if way == "middle" or place.stage == 3 else f"{way} {place.stage}"
        rows.setdefault(row, {"A": 0, "R": 0})[place.kind] += 1
    return {row: (found["A"], found["R"]) for row, found in rows.items()}


def test_blocks_are_those_of_the_papers_table():
    original = {"down 0": (2, 2), "down 1": (2, 2), "down 2": (2, 2), "mid": (1, 7)}
    original |= {"up 2": (3, 3), "up 1": (3, 3), "up 0": (3, 3)}
    assert counted("sd15") == original
    efficient = {"down 0": (0, 2), "down 1": (2, 2), "down 2": (2, 1), "mid": (1, 4)}
    efficient |= {"up 2": (6, 2), "up 1": (3, 3), "up 0": (0, 3)}
    assert counted("snapfusion-table") == efficient
    assert counted("snapfusion") == efficient | {"up 2": (8, 2)}


def test_no_choice_among_sds_blocks_has_the_table_and_the_published_parameters():
    """From SD's 859.5M: five A at 320, three R at 1/64, one R each way at 1/32 go, three A at 1280 come."""
    net, sizes = meta("sd15"), {}
    for path, place in net.places.items():
        size = sum(p.numel() for p in net.get_submodule(path).parameters())
        way = "" if place.stage == 3 else path.split(".")[0]
        sizes.setdefault((place.kind, place.stage, way), []).append(size)
    narrowing = sizes["R", 2, "down_stages"][1:]  # the first, from 640 to 1280, cannot go
    gone = 5 * sizes["A", 0, "up_stages"][0] + 3 * min(sizes["R", 3, ""]) + min(narrowing)
    gone += min(sizes["R", 2, "up_stages"])
    assert 859_520_964 - gone + 3 * sizes["A", 2, "up_stages"][0] < 786e6
    assert parameters("snapfusion-table") == 777_353_604


def called(net, batch=2, size=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    width = net.config.context_dim
    pooled = None if net.config.pooled_dim is None else torch.randn(batch, net.config.pooled_dim, generator=generator)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])[:batch]
    with torch.no_grad():
        return net(
            torch.randn(batch, net.config.in_channels, size, size, generator=generator),
            torch.tensor([3, 870])[:batch],
            torch.randn(batch, 5, width, generator=generator),
            mask,
            pooled,
        ).sample


def test_stable_diffusions_weights_draw_the_same(tmp_path):
    theirs = tiny_sd()
    theirs.save_pretrained(tmp_path)
    ours = from_stable_diffusion(tmp_path).eval()
    x, t, context = torch.randn(2, 4, 8, 8), torch.tensor([10, 900]), torch.randn(2, 7, 24)
    mask = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])
    with torch.no_grad():
        wanted = theirs(x, t, context, encoder_attention_mask=mask).sample
        assert torch.allclose(ours(x, t, context, mask).sample, wanted, rtol=1e-4, atol=1e-5)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    # sd15's arguments are what Stable Diffusion's own configuration gives.
    with torch.device("meta"):
        full = UNet2DConditionModel(cross_attention_dim=768, sample_size=64)
    names = set(meta("sd15").state_dict())
    assert {renamed(name) for name in full.state_dict()} == names
    own = {key: value for key, value in meta("sd15").config.items() if not key.startswith("_") and key != "pooled_dim"}
    assert stable_diffusion_arguments(full.config) == own


def test_a_unet_of_another_kind_is_refused(tmp_path):
    tiny_sd(use_linear_projection=True).save_pretrained(tmp_path / "linear")
    with pytest.raises(ValueError, match="use_linear_projection: got True"):
        from_stable_diffusion(tmp_path / "linear")
    tiny_sd().save_pretrained(tmp_path / "damaged")
    file = tmp_path / "damaged" / "diffusion_pytorch_model.safetensors"
    tensors = io.load_tensors(file)
    del tensors["conv_in.weight"]
    io.save_tensors(file, tensors)
    with pytest.raises(io.CheckpointError, match=r"conv_in\.weight is missing"):
        from_stable_diffusion(tmp_path / "damaged")
    with pytest.raises(io.CheckpointError, match="no such file"):
        from_stable_diffusion(tmp_path)


def test_the_efficient_net_inherits_what_both_have():
    parent = random_weights(small_fusion(down=(("RA", "RA"), ("RA", "R")), up=(("R", "RA", "R"), ("RA", "RA", "R"))))
    net = small_fusion(down=(("R", "R"), ("RA", "")), mid="RA", up=(("RAA", "R", ""), ("RA", "R", "R")))
    left = inherit(net, parent)
    assert left == ["up_stages.0.layers.0.blocks.2"]  # the second A, of which the parent has one
    assert not net.get_parameter("up_stages.0.layers.0.blocks.2.proj_out.weight").any()
    pairs = {
        "down_stages.0.layers.1.blocks.0": "down_stages.0.layers.1.blocks.0",
        "up_stages.0.layers.0.blocks.1": "up_stages.0.layers.1.blocks.1",
        "middle.blocks.1": "middle.blocks.1",
    }
    for own, theirs in pairs.items():
        for name, weight in net.get_submodule(own).state_dict().items():
            assert torch.equal(weight, parent.get_submodule(theirs).state_dict()[name])
    # What was left over begins as the identity.
    with net.without(left):
        without = called(net)
    assert torch.equal(called(net), without)
    with pytest.raises(ValueError, match="parent: differs"):
        inherit(net, small_fusion(channels=(32, 32)))
    # The large one has all of SD 1.5's weights but for what the first up stage has more of: 8 A, not 3.
    left = inherit(meta("snapfusion"), meta("sd15"))
    assert len(left) == 5 and all(path.startswith("up_stages.1.layers.") for path in left)


# ---- leaving blocks out ----------------------------------------------------------------------------------------------


def test_dropping_blocks_is_leaving_them_out_for_good():
    net = random_weights(small_fusion(down=(("RA", "RAA"), ("RR",)), up=(("R", "RA"), ("RA", "R", "R"))))
    skippable = [name for name, place in net.places.items() if place.skippable]
    assert len(skippable) > 8
    plain = called(net)
    for name in skippable:
        with net.without([name]):
            skipped = called(net)
        assert not torch.allclose(skipped, plain)
        smaller = edited(net, drop=[name])
        assert len(smaller.places) == len(net.places) - 1
        assert torch.equal(called(smaller), skipped)
    both = [skippable[0], skippable[-1]]
    with net.without(both):
        assert torch.equal(called(edited(net, drop=both)), called(net))
    assert torch.equal(called(net), plain)


def test_a_copied_block_stands_behind_its_original_with_its_weights():
    net = random_weights(small_fusion())
    name = "middle.blocks.1"
    larger = edited(net, copy=[name], drop=["middle.blocks.0"])
    assert larger.config["mid"] == "AA"
    for key, weight in net.get_submodule(name).state_dict().items():
        assert torch.equal(larger.get_submodule("middle.blocks.0").state_dict()[key], weight)
        assert torch.equal(larger.get_submodule("middle.blocks.1").state_dict()[key], weight)
    with larger.without(["middle.blocks.1"]), net.without(["middle.blocks.0"]):
        assert torch.equal(called(larger), called(net))


def test_blocks_that_change_the_width_stay():
    net = small_fusion()
    wide = "down_stages.1.layers.0.blocks.0"
    with pytest.raises(ValueError, match="changes the width"), net.without([wide]):
        pass
    with pytest.raises(ValueError, match=r"drop: got 'down_stages\.1"):
        edited(net, drop=[wide])
    with pytest.raises(ValueError, match=r"copy: got 'up_stages\.0\.layers\.0"):
        edited(net, copy=["up_stages.0.layers.0.blocks.0"])  # reads a skip
    with pytest.raises(ValueError, match="names: got 'nothing'"), net.without(["nothing"]):
        pass


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(down=(("RA",),)), "down: got 1 stages"),
        (dict(down=(("RX",), ("R",))), "down: got the layer 'RX'"),
        (dict(up=(("RR", "R"), ("R", "R"))), "up: got the layer 'RR'"),
        (dict(up=(("R",), ("R", "R"))), "up: got 1 layers in the stage of 64 channels; must be 2"),
        (dict(down=(("R",), ("A",))), "must begin with R"),
        (dict(down=(("R",), ("",))), "must begin with R"),
        (dict(mid="M"), "mid: got 'M'"),
    ],
)
def test_wrong_layers_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        small_fusion(**change)


def test_recomputing_gives_the_same_gradients():
    found = []
    for recompute in (False, True):
        net = small_fusion()
        if recompute:
            net.enable_gradient_checkpointing()
        net.train()
        generator = torch.Generator().manual_seed(0)
        inputs = (torch.randn(1, 8, 4, 4, generator=generator), 5, torch.randn(1, 5, 32, generator=generator))
        with net.without(["middle.blocks.1"]):
            loss = net(*inputs, None, torch.ones(1, 32)).sample.square().sum()
        loss.backward()  # blocks left out in the forward pass are left out here too
        found.append({name: p.grad for name, p in net.named_parameters() if p.grad is not None})
    plain, recomputed = found
    assert plain.keys() == recomputed.keys() and not any(name.startswith("middle.blocks.1") for name in plain)
    assert all(torch.allclose(plain[name], recomputed[name], atol=1e-6) for name in plain)


def test_a_step_costs_three_forward_passes():
    task = fusion_task()
    net = task.modules["denoiser"]
    counts = fusion_counts(net.config)
    assert counts[""].params == sum(p.numel() for p in net.parameters())
    assert task.flops == 6 * counts[""].macs
    # By hand: the last convolution, 9 weights for each of 32 x 8 channels at 4x4.
    assert counts["conv_out"].macs == 9 * 32 * 8 * 16


def test_presets_fit_their_parts():
    for preset in FUSION_PRESETS.values():
        assert preset.denoiser["in_channels"] == preset.decoder["latent_channels"]
        assert preset.resolution == 8 * preset.denoiser["sample_size"]
    assert SMALL_FUSION.name not in FUSION_PRESETS
