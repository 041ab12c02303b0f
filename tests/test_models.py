"""The models: published sizes, the ladder, saving and loading, and what their inputs may be."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import snapgen_kernels
from bench.timing import peak_bytes
from snapgen import info
from snapgen.config import LADDER, PRESETS, get_preset
from snapgen.decoder import TinyDecoder, TinyEncoder
from snapgen.unet import SnapGenUNet
from snapgen_kernels import DecoderBlock, checks
from snapgen_kernels._backend import missing_kernel

SMALL = dict(PRESETS["tiny"].denoiser, channels=(32, 64), num_heads=(1, 2), context_dim=24, pooled_dim=20, temb_dim=32)


def small_unet(**flags) -> SnapGenUNet:
    torch.manual_seed(0)
    return SnapGenUNet(**{**SMALL, **flags}).eval()


def inputs(batch: int = 2, size: int = 8, tokens: int = 5, dtype: torch.dtype = torch.float32) -> dict:
    generator = torch.Generator().manual_seed(1)
    return dict(
        sample=torch.randn(batch, 8, size, size, generator=generator).to(dtype),
        timestep=torch.full((batch,), 300.0),
        encoder_hidden_states=torch.randn(batch, tokens, 24, generator=generator).to(dtype),
        pooled_projections=torch.randn(batch, 20, generator=generator).to(dtype),
    )


@pytest.mark.parametrize(
    ("preset", "params", "within", "macs", "macs_within"),
    [("imagenet-256", 372e6, 0.005, 38e9, 0.03), ("t2i-1024", 379e6, 0.005, None, None)],
)
def test_denoiser_has_the_published_size(preset, params, within, macs, macs_within):
    whole = info.denoiser_counts(PRESETS[preset].denoiser)[""]
    assert abs(whole.params / params - 1) <= within
    if macs:
        assert abs(whole.macs / macs - 1) <= macs_within


def test_decoder_has_the_published_size():
    whole = info.decoder_counts(PRESETS["t2i-1024"])[""]
    assert abs(whole.params / 1.38e6 - 1) <= 0.01
    assert abs(whole.macs / 224e9 - 1) <= 0.01


def small_decoder(**changes) -> TinyDecoder:
    torch.manual_seed(0)
    return TinyDecoder(**{**dict(latent_channels=4, channels=(32, 24, 16), blocks=(2, 1, 1)), **changes}).eval()


@pytest.mark.parametrize("shape", [(1, 4, 3, 5), (2, 4, 6, 4), (0, 4, 3, 3), (1, 4, 1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("blocks", [(2, 1, 1), (1, 1, 0)])
def test_decode_is_forward(shape, dtype, blocks):
    """In place, in low memory and with a fused last layer, the decoder errs no more than twice what `forward` does in
    plain PyTorch."""
    decoder = small_decoder(blocks=blocks, scaling_factor=1.5, shift_factor=0.1).to(dtype)
    latents = torch.randn(shape).to(dtype)
    exact = small_decoder(blocks=blocks)
    exact.load_state_dict(decoder.state_dict())
    unscaled = latents.double() / 1.5 + 0.1
    with torch.no_grad(), snapgen_kernels.use("reference"):
        plain, right = decoder(unscaled.to(dtype)), exact.double()(unscaled)
    for low_memory in (False, True):
        calls: list[tuple[int, int]] = []
        drawn = decoder.decode(latents, low_memory=low_memory, progress=lambda *call: calls.append(call))  # noqa: B023
        assert drawn.shape == (shape[0], 3, shape[2] * 4, shape[3] * 4) and drawn.dtype == dtype
        checks.assert_close("decode", drawn, plain, right)
        assert torch.equal(drawn, decoder.decode(latents, low_memory=low_memory))
        if latents.numel():
            assert len(calls) > sum(blocks) and calls[-1][0] == calls[-1][1] and calls == sorted(calls)
            assert len({total for _, total in calls}) == 1


def test_decode_does_not_depend_on_the_layout_or_the_threads():
    decoder, latents = small_decoder(), torch.randn(2, 4, 5, 7)
    drawn = decoder.decode(latents)
    assert torch.equal(drawn, decoder.decode(latents.contiguous(memory_format=torch.channels_last)))
    if missing_kernel("decoder_block", "cpu") is None:
        for count in (2, 5):
            with checks.threads(count):
                again = decoder.decode(latents)
            torch.testing.assert_close(again, drawn, atol=1e-5, rtol=1e-5)  # the first layer is PyTorch's


MISSING = missing_kernel("decoder_block", "cpu") or missing_kernel("sepconv", "cpu")


@pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decode_keeps_to_its_memory(dtype):
    """Low memory: 1.3 images of the last width; otherwise a third of what PyTorch takes."""
    decoder = small_decoder(channels=(32, 32, 32), blocks=(2, 1, 1)).to(dtype)
    latents = torch.randn(1, 4, 256, 12).to(dtype)
    image = 32 * 16 * 256 * 12 * latents.element_size()
    low = peak_bytes([lambda: decoder.decode(latents, low_memory=True)], "cpu")
    normal = peak_bytes([lambda: decoder.decode(latents, low_memory=False)], "cpu")
    with snapgen_kernels.use("reference"):
        plain = peak_bytes([lambda: decoder.decode(latents)], "cpu")
    assert low <= 1.3 * image
    assert normal <= plain / 3


@pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
@pytest.mark.parametrize("tuned", [False, True])
def test_decode_holds_little_where_malloc_gives_pages_back(tuned, monkeypatch):
    for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"):
        monkeypatch.setenv(name, "1") if tuned else monkeypatch.delenv(name, raising=False)
    decoder = small_decoder(channels=(32, 32, 32), blocks=(2, 1, 1))
    latents = torch.randn(1, 4, 256, 12)
    decoder.decode(latents)  # packs the weights
    peaks = {low: peak_bytes([lambda: decoder.decode(latents, low_memory=low)], "cpu") for low in (None, True, False)}  # noqa: B023
    assert peaks[True] < peaks[False]
    assert peaks[None] == peaks[not tuned]


@pytest.mark.parametrize("low_memory", [None, False, True])
def test_decode_elsewhere_than_on_a_cpu_is_the_ops(low_memory, monkeypatch):
    """Where nothing is computed: neither the CPU's kernels nor its malloc has a say."""
    calls: list[bool] = []

    def forward(block: DecoderBlock, x: torch.Tensor, *, low_memory: bool = False) -> torch.Tensor:
        calls.append(low_memory)
        return plain(block, x, low_memory=low_memory)

    plain = DecoderBlock.forward
    monkeypatch.setattr(DecoderBlock, "forward", forward)
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1")
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_", raising=False)  # malloc gives pages back at once
    decoder = small_decoder().to("meta")
    drawn = decoder.decode(torch.empty(2, 4, 3, 5, device="meta"), low_memory=low_memory)
    assert drawn.shape == (2, 3, 12, 20) and calls == [bool(low_memory)] * 4
    with torch.no_grad():
        assert decoder(torch.empty(2, 4, 3, 5, device="meta")).shape == drawn.shape
    assert calls == [bool(low_memory)] * 4 + [False] * 4


def test_ladder_follows_the_published_changes():
    rows = info.ladder()
    assert len(rows) == len(LADDER)
    compared = 0
    for row in rows:
        for key, published in row.get("published", {}).items():
            assert abs(row["ours"][key] - published) <= 0.02, (row["step"], key)
            compared += 1
    assert compared == 8


def test_macs_are_those_of_a_convolution_counted_by_hand():
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, groups=8, padding=1))
        counts = info.count(model, torch.empty(1, 3, 10, 10))
    assert counts["0"] == info.Count(3 * 8 * 9 + 8, 3 * 8 * 9 * 100)
    assert counts["1"] == info.Count(8 * 9 + 8, 8 * 9 * 100)
    assert counts[""].macs == counts["0"].macs + counts["1"].macs


def test_stage_counts_add_up_to_the_whole():
    counts = info.denoiser_counts(SMALL)
    top = {name: part for name, part in counts.items() if name and "." not in name}
    assert sum(part.params for part in top.values()) == counts[""].params
    assert sum(part.macs for part in top.values()) == counts[""].macs


@pytest.mark.parametrize("rung", range(len(LADDER)))
def test_every_rung_runs_and_trains(rung):
    flags: dict = {}
    for step in LADDER[: rung + 1]:
        flags.update(step["flags"])
    two = {k: v[:2] if isinstance(v, tuple) else v for k, v in flags.items()}
    two["self_attention"] = (False, True)
    model = small_unet(**two).train()
    model(**inputs()).sample.square().mean().backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not missing


def test_text_and_time_and_pooled_all_matter():
    model, given = small_unet(), inputs()
    base = model(**given).sample
    for name in ("timestep", "encoder_hidden_states", "pooled_projections", "sample"):
        assert not torch.allclose(model(**{**given, name: given[name] + 1}).sample, base, atol=1e-4), name


def test_masked_text_tokens_change_nothing():
    model, given = small_unet(), inputs()
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[:, 3:] = False
    base = model(**given, encoder_attention_mask=mask).sample
    given["encoder_hidden_states"] = given["encoder_hidden_states"].clone()
    given["encoder_hidden_states"][:, 3:] = 1e3
    torch.testing.assert_close(model(**given, encoder_attention_mask=mask).sample, base)


def test_batch_items_do_not_meet():
    model, given = small_unet(), inputs(batch=3)
    alone = model(**{name: value[1:2] for name, value in given.items()}).sample
    torch.testing.assert_close(model(**given).sample[1:2], alone, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("size", [(2, 2), (6, 10), (16, 16)])
def test_other_latent_sizes(size):
    model, given = small_unet(), inputs()
    given["sample"] = torch.randn(2, 8, *size)
    predicted = model(**given).sample
    assert predicted.shape == (2, 8, *size)
    exact = {name: value.double() for name, value in given.items()}
    torch.testing.assert_close(predicted.double(), model.double()(**exact).sample, atol=1e-4, rtol=1e-4)


def test_gradient_checkpointing_changes_no_gradient():
    given = inputs()
    grads = []
    for on in (False, True):
        model = small_unet().train()
        if on:
            model.enable_gradient_checkpointing()
        model(**given).sample.square().mean().backward()
        grads.append([p.grad for p in model.parameters()])
    for plain, again in zip(*grads, strict=True):
        torch.testing.assert_close(plain, again, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (dict(sample=torch.zeros(2, 4, 8, 8)), "sample"),
        (dict(sample=torch.zeros(2, 8, 7, 8)), "multiples of 2"),
        (dict(encoder_hidden_states=torch.zeros(2, 5, 23)), "encoder_hidden_states"),
        (dict(encoder_hidden_states=torch.zeros(1, 5, 24)), "encoder_hidden_states"),
        (dict(pooled_projections=None), "pooled_projections"),
    ],
)
def test_wrong_inputs_are_named(change, word):
    with pytest.raises(ValueError, match=word):
        small_unet()(**{**inputs(), **change})


def test_wrong_configurations_are_named():
    with pytest.raises(ValueError, match="num_heads"):
        small_unet(num_heads=(1,))
    with pytest.raises(ValueError, match="kv_heads"):
        small_unet(kv_heads="some", rope=False)
    with pytest.raises(ValueError, match="rope"):
        small_unet(kv_heads="all")
    with pytest.raises(ValueError, match="conv"):
        small_unet(conv="winograd")
    with pytest.raises(ValueError, match="preset"):
        get_preset("huge")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_load(tmp_path, dtype):
    model = small_unet().to(dtype)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "diffusion_pytorch_model.safetensors").exists()
    again = SnapGenUNet.from_pretrained(tmp_path, torch_dtype=dtype)
    for (name, own), (_, other) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(own, other), name
    assert json.loads((tmp_path / "config.json").read_text())["channels"] == [32, 64]


def test_decoder_and_encoder_are_inverse_in_shape():
    preset = PRESETS["tiny"]
    encoder, decoder = TinyEncoder(**preset.encoder).eval(), TinyDecoder(**preset.decoder).eval()
    pictures = torch.rand(2, 3, 64, 48) * 2 - 1
    latents = encoder(pictures)
    assert latents.shape == (2, 8, 8, 6)
    assert decoder(latents).shape == pictures.shape
    with pytest.raises(ValueError, match="multiples of 8"):
        encoder(torch.zeros(1, 3, 60, 64))
    with pytest.raises(ValueError, match="latents"):
        decoder(torch.zeros(1, 16, 8, 8))


def test_decode_undoes_the_scaling():
    decoder = TinyDecoder(**dict(PRESETS["tiny"].decoder, scaling_factor=1.5, shift_factor=0.25)).eval()
    latents = torch.randn(1, 8, 4, 4)
    scaled = (latents - 0.25) * 1.5
    torch.testing.assert_close(decoder.decode(scaled), decoder(latents))


def test_weights_of_another_preset_are_refused(tmp_path):
    from snapgen import io

    model = small_unet()
    path = tmp_path / "w.safetensors"
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights["conv_in.weight"] = torch.zeros(1)
    save_file(weights, path)
    with pytest.raises(io.CheckpointError, match=r"conv_in.weight is \(1,\) there"):
        io.load_strictly(model, load_file(path), path, "the small model")
