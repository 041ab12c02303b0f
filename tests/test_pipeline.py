"""Prompts in, pictures out: saving, loading, every text encoder droppable, and what a prompt may not be."""

import shutil
import warnings

import pytest
import torch
from small_models import SMALL, denoiser_task
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, Gemma2Config, Gemma2Model

from snapgen import io
from snapgen.data.shapes import VOCABULARY
from snapgen.decoder import TinyDecoder
from snapgen.pipeline import SnapGenPipeline
from snapgen.sampler import make_scheduler
from snapgen.text import build_tiny_text
from snapgen.unet import SnapGenUNet


@pytest.fixture(scope="module")
def tiny() -> SnapGenPipeline:
    task = denoiser_task()
    for module in task.modules.values():
        module.eval()
    pipe = task.pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, prompt="a red circle", **options):
    options = {"num_inference_steps": 2, "output_type": "pt", **options}
    return pipe(prompt, generator=torch.Generator().manual_seed(0), **options).images


def assert_loaded(pipe, again) -> None:
    """Bitwise the same weights; the picture within rounding, since another alignment sums in another order."""
    for name, part in pipe.components.items():
        if isinstance(part, torch.nn.Module):
            own, other = part.state_dict(), getattr(again, name).state_dict()
            assert own.keys() == other.keys() and all(torch.equal(own[key], other[key]) for key in own), name
    torch.testing.assert_close(draw(pipe), draw(again), atol=1e-4, rtol=1e-4)


def test_low_memory_draws_the_same_picture(tiny):
    torch.testing.assert_close(draw(tiny, low_memory=True), draw(tiny), atol=1e-5, rtol=1e-5)


def test_decoding_shows_its_progress(tiny, capsys):
    tiny.set_progress_bar_config(disable=False)
    try:
        draw(tiny)
    finally:
        tiny.set_progress_bar_config(disable=True)
    assert capsys.readouterr().err.count("100%") == 2  # steps, decoding


def large_pipe(**dropped) -> SnapGenPipeline:
    """Two CLIPs and a Gemma of the real kinds, small; context 40 wide, pooled 12 + 20."""
    torch.manual_seed(0)
    tokenizer, _ = build_tiny_text(VOCABULARY, hidden_size=32, layers=1, heads=1, max_tokens=512)
    words = len(tokenizer.get_vocab())

    def clip(width: int) -> CLIPTextModelWithProjection:
        ids = dict(bos_token_id=2, eos_token_id=3, pad_token_id=0)
        return CLIPTextModelWithProjection(
            CLIPTextConfig(
                vocab_size=words,
                hidden_size=width,
                intermediate_size=32,
                projection_dim=width,
                num_hidden_layers=2,
                num_attention_heads=2,
                **ids,
            )
        ).eval()

    gemma = Gemma2Model(
        Gemma2Config(
            vocab_size=words,
            hidden_size=40,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            pad_token_id=0,
            bos_token_id=2,
            eos_token_id=3,
        )
    ).eval()
    parts = dict(
        denoiser=SnapGenUNet(**dict(SMALL.denoiser, context_dim=40, pooled_dim=32)).eval(),
        decoder=TinyDecoder(**SMALL.decoder).eval(),
        scheduler=make_scheduler(3.0),
        text_encoder=clip(12),
        tokenizer=tokenizer,
        text_encoder_2=clip(20),
        tokenizer_2=tokenizer,
        text_encoder_3=gemma,
        tokenizer_3=tokenizer,
        max_tokens=100,
    )
    pipe = SnapGenPipeline(**{**parts, **dropped})
    pipe.set_progress_bar_config(disable=True)
    return pipe


CLIP_L = dict(text_encoder=None, tokenizer=None)
CLIP_G = dict(text_encoder_2=None, tokenizer_2=None)
GEMMA = dict(text_encoder_3=None, tokenizer_3=None)


def test_saved_and_loaded_draws_the_same(tiny, tmp_path):
    tiny.save_pretrained(tmp_path)
    assert not list(tmp_path.rglob("*.bin")) and list(tmp_path.rglob("*.safetensors"))
    again = SnapGenPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert_loaded(tiny, again)
    assert again.config.joint_text is True


def test_a_checkpoint_says_how_it_draws(tmp_path):
    task = denoiser_task()
    task.steps, task.guidance = 2, 1.0
    task.export(tmp_path, task.modules)
    pipe = SnapGenPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    calls = []
    pipe.denoiser.register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))
    noise = torch.randn(1, 8, 4, 4)
    drawn = pipe("a red circle", latents=noise, output_type="latent").images
    assert calls == [1, 1]
    told = pipe("a red circle", latents=noise, num_inference_steps=3, guidance_scale=2.0, output_type="latent").images
    assert calls == [1, 1, 2, 2, 2] and not torch.equal(drawn, told)
    other = pipe.having(scheduler=pipe.scheduler)
    assert (other.config.steps, other.config.guidance) == (2, 1.0)


def test_halved_weights_load_as_fp32_and_draw_about_the_same(tiny, tmp_path):
    tiny.save_pretrained(tmp_path)
    before = sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors"))
    io.halve(tmp_path)
    assert sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors")) < 0.55 * before
    again = SnapGenPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    for name, part in tiny.components.items():
        if isinstance(part, torch.nn.Module):
            for key, tensor in getattr(again, name).state_dict().items():
                own = part.state_dict()[key]
                assert tensor.dtype == own.dtype
                assert torch.equal(tensor, own.half().to(own.dtype) if own.is_floating_point() else own), (name, key)
    torch.testing.assert_close(draw(again), draw(tiny), atol=0.03, rtol=0)


def test_batch_prompt_and_seed_decide_the_picture(tiny):
    noise = torch.randn(2, 8, 4, 4)
    both = draw(tiny, ["a red circle", "a blue star above a ring"], latents=noise)
    for index, prompt in enumerate(("a red circle", "a blue star above a ring")):
        alone = draw(tiny, prompt, latents=noise[index : index + 1])
        torch.testing.assert_close(both[index : index + 1], alone, atol=2e-4, rtol=1e-3)
    assert not torch.allclose(both[0], draw(tiny, "two stars", latents=noise[:1])[0], atol=1e-4)


def test_output_types_and_sizes(tiny):
    picture = draw(tiny, output_type="pil", height=48, width=64)[0]
    assert picture.size == (64, 48)
    assert draw(tiny, output_type="latent").shape == (1, 8, 4, 4)
    assert len(draw(tiny, ["a circle", "a star"], num_images_per_prompt=3)) == 6
    pictures, *_ = tiny("a circle", num_inference_steps=1, output_type="pt", return_dict=False)
    assert pictures.abs().max() <= 1


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("", {}, "prompt: it is empty"),
        ("  \n", {}, "prompt: it is empty"),
        ([], {}, "prompt: the list is empty"),
        ([3], {}, "prompt: got a int"),
        ("circle " * 40, {}, "prompt: 40 words are too many, at most 14"),
        ("a circle", dict(height=50), "height: got 50"),
        ("a circle", dict(width=0), "width: got 0"),
        ("a circle", dict(num_inference_steps=0), "num_inference_steps"),
        ("a circle", dict(output_type="numpy"), "output_type"),
        ("a circle", dict(num_images_per_prompt=0), "num_images_per_prompt"),
        ("a circle", dict(latents=torch.zeros(1, 8, 5, 4)), r"latents: got shape \(1, 8, 5, 4\)"),
    ],
)
def test_wrong_calls_are_named(tiny, prompt, options, message):
    with pytest.raises(ValueError, match=message):
        draw(tiny, prompt, **options)


def test_unknown_words_are_said(tiny):
    assert tiny.unknown_words("A purple dinosaur above a Circle, sir") == ["dinosaur", ",", "sir"]
    with pytest.warns(UserWarning, match="never saw 'dinosaur'"):
        draw(tiny, "a red dinosaur")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        draw(tiny, "A RED circle")
    assert "circle" in tiny.vocabulary and "<unk>" not in tiny.vocabulary


@pytest.mark.parametrize(
    "dropped",
    [{}, CLIP_L, CLIP_G, GEMMA, {**CLIP_L, **CLIP_G}, {**CLIP_L, **GEMMA}, {**CLIP_G, **GEMMA}],
    ids=["all", "no-l", "no-g", "no-gemma", "gemma-only", "g-only", "l-only"],
)
def test_every_text_encoder_is_droppable(dropped, tmp_path):
    pipe = large_pipe(**dropped)
    picture = draw(pipe)
    assert picture.isfinite().all()
    text = pipe.encode_prompt(["a red circle"])
    has_clip = pipe.text_encoder is not None or pipe.text_encoder_2 is not None
    has_gemma = pipe.text_encoder_3 is not None
    assert text.context.shape == (1, 77 * has_clip + 100 * has_gemma, 40)
    pipe.save_pretrained(tmp_path)
    assert_loaded(pipe, SnapGenPipeline.from_pretrained(tmp_path))


def test_joined_text_has_each_encoder_in_its_place():
    pipe = large_pipe()
    text = pipe.encode_prompt(["a red circle"])
    tokens = pipe.tokenizer(["a red circle"], padding="max_length", max_length=77, return_tensors="pt")
    for encoder, start, width in ((pipe.text_encoder, 0, 12), (pipe.text_encoder_2, 12, 20)):
        output = encoder(input_ids=tokens.input_ids, output_hidden_states=True)
        torch.testing.assert_close(text.context[0, :77, start : start + width], output.hidden_states[-2][0])
        torch.testing.assert_close(text.pooled[0, start : start + width], output.text_embeds[0])
    assert text.context[0, :77, 32:].abs().max() == 0
    # <bos> a red circle <eos> of Gemma's 100 tokens, after CLIP's 77.
    assert text.mask[0].tolist() == [True] * 77 + [True] * 5 + [False] * 95


def test_without_any_encoder_the_call_says_so():
    with pytest.raises(ValueError, match="all are dropped"):
        draw(large_pipe(**CLIP_L, **CLIP_G, **GEMMA))


def test_long_prompts_are_cut_with_a_note_or_refused():
    pipe = large_pipe()
    with pytest.warns(UserWarning, match="CLIP reads only the first 77"):
        draw(pipe, "circle " * 90)
    with pytest.raises(ValueError, match="202 tokens are too many, at most 100"):
        draw(pipe, "circle " * 200)
    with pytest.raises(ValueError, match="92 tokens are too many, at most 77"):
        draw(large_pipe(**GEMMA), "circle " * 90)


def test_weights_that_are_not_finite_draw_nothing():
    pipe = large_pipe()
    with torch.no_grad():
        pipe.denoiser.conv_out.bias[0] = float("nan")
    with pytest.raises(FloatingPointError, match="not finite"):
        draw(pipe)


def test_parts_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="decoder: takes 16 latent channels"):
        large_pipe(decoder=TinyDecoder(**dict(SMALL.decoder, latent_channels=16)))


def test_damaged_folders_are_named(tiny, tmp_path):
    whole = tmp_path / "whole"
    tiny.save_pretrained(whole)

    cut = shutil.copytree(whole, tmp_path / "cut")
    weights = cut / "denoiser" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(io.CheckpointError, match=r"denoiser.*truncated"):
        SnapGenPipeline.from_pretrained(cut)

    pickled = shutil.copytree(whole, tmp_path / "pickled")
    torch.save({}, pickled / "denoiser" / "diffusion_pytorch_model.bin")
    with pytest.raises(io.CheckpointError, match="pickle"):
        SnapGenPipeline.from_pretrained(pickled)

    for number, (file, text, message) in enumerate(
        (
            ("tokenizer/tokenizer.json", "garbage", r"tokenizer\.json: damaged, not JSON"),
            ("tokenizer/tokenizer.json", "{}", r"tokenizer\.json: damaged, describes no tokenizer"),
            ("tokenizer/tokenizer.json", None, r"tokenizer\.json: no such file"),
            ("model_index.json", "[]", r"model_index\.json: damaged, holds no JSON object"),
            ("model_index.json", "{}", "holds a None, not a SnapGenPipeline"),
            (
                "denoiser/config.json",
                '{"_class_name": "TinyDecoder"}',
                "describes a TinyDecoder; denoiser is a",
            ),
        )
    ):
        damaged = shutil.copytree(whole, tmp_path / f"damaged-{number}")
        (damaged / file).unlink()
        if text is not None:
            (damaged / file).write_text(text)
        with pytest.raises(io.CheckpointError, match=message):
            SnapGenPipeline.from_pretrained(damaged)
    partial = shutil.copytree(whole, tmp_path / "partial")
    shutil.rmtree(partial / "decoder")
    with pytest.raises(io.CheckpointError, match="has no folder decoder"):
        SnapGenPipeline.from_pretrained(partial)

    with pytest.raises(io.CheckpointError, match="no such checkpoint folder"):
        SnapGenPipeline.from_pretrained(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(io.CheckpointError, match=r"no model_index\.json"):
        SnapGenPipeline.from_pretrained(tmp_path / "empty")


def test_weights_of_another_model_are_not_filled_in_at_random(tiny, tmp_path):
    tiny.save_pretrained(tmp_path)
    shutil.copy(
        tmp_path / "decoder" / "diffusion_pytorch_model.safetensors", tmp_path / "text_encoder" / "model.safetensors"
    )
    with pytest.raises(io.CheckpointError, match="text_encoder: its weights are those of another model"):
        SnapGenPipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize("guidance", [float("nan"), float("inf")])
def test_guidance_must_be_finite(tiny, guidance):
    with pytest.raises(ValueError, match="guidance_scale: got"):
        draw(tiny, guidance_scale=guidance)
