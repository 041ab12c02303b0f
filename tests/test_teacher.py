"""Teachers: from folders of diffusers and of ours, with embedded captions, damaged; and the tiny one that we train."""

import shlex
import shutil
from pathlib import Path

import pytest
import torch
import tyro
from small_models import QUIET, denoiser_task
from small_teachers import SMALL_TEACHER, sd3_folder, small_teacher, spread_weights
from test_distill import LAST
from test_train import config, data
from torch import nn

from snapgen import io
from snapgen.config import PRESETS
from snapgen.data.shapes import VOCABULARY
from snapgen.distill.captions import CaptionStore, store_captions, stored_caption
from snapgen.distill.command import distill
from snapgen.distill.knowledge import KnowledgeDistillation
from snapgen.distill.teacher import load_teacher
from snapgen.mmdit import MMDiT
from snapgen.pipeline import SnapGenPipeline
from snapgen.tasks import DenoiserTask, build_denoiser
from snapgen.train import train

pytestmark = pytest.mark.method

# ---- teachers --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sd3(tmp_path_factory) -> Path:
    return sd3_folder(tmp_path_factory.mktemp("sd3") / "sd3")


def test_an_sd3_folder_is_a_teacher(sd3):
    from diffusers import SD3Transformer2DModel
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel, T5Tokenizer

    teacher = load_teacher(sd3, dtype=torch.float32)
    captions = ["a red circle", ""]
    text = teacher.read(captions)
    # CLIP-L and CLIP-G on channels, padded to T5's width, T5's tokens behind them (SD3, section 4).
    states, pooled = [], []
    for number in ("", "_2"):
        encoder = CLIPTextModelWithProjection.from_pretrained(sd3 / f"text_encoder{number}").eval()
        tokens = CLIPTokenizer.from_pretrained(sd3 / f"tokenizer{number}")(
            captions, padding="max_length", max_length=77, return_tensors="pt"
        )
        with torch.no_grad():
            output = encoder(tokens.input_ids, output_hidden_states=True)
        states.append(output.hidden_states[-2])
        pooled.append(output.text_embeds)
    tokens = T5Tokenizer.from_pretrained(sd3 / "tokenizer_3")(
        captions, padding="max_length", max_length=256, return_tensors="pt"
    )
    with torch.no_grad():
        last = T5EncoderModel.from_pretrained(sd3 / "text_encoder_3").eval()(tokens.input_ids)[0]
    clip = nn.functional.pad(torch.cat(states, -1), (0, 48 - 40))
    torch.testing.assert_close(text.context, torch.cat((clip, last), 1))
    torch.testing.assert_close(text.pooled, torch.cat(pooled, -1))

    x_t, t = torch.randn(2, 8, 8, 8), torch.tensor([0.3, 0.8])
    network = SD3Transformer2DModel.from_pretrained(sd3 / "transformer").eval()
    with torch.no_grad():
        expected = network(x_t, text.context, text.pooled, t * 1000).sample
    velocity, (tokens,) = teacher.velocity(x_t, t, text, ["transformer_blocks.2"])
    torch.testing.assert_close(velocity, expected)
    assert tokens.shape == (2, 32, 4, 4)  # patches of 2x2
    half = load_teacher(sd3)
    assert half.dtype == torch.bfloat16 and half.read([""]).context.dtype == torch.bfloat16
    assert half.velocity(x_t, t, half.read(captions))[0].dtype == torch.float32


def test_a_student_learns_from_an_sd3_folder(sd3, tmp_path):
    words = shlex.split(
        "--guidance 4 --layers last:last:conv transformer_blocks.0:mid --scaling constant --kd-weight 0.5 "
        "--steps 2 --batch-size 2 --warmup 1 --sample-every 100"
    )
    exported = tyro.cli(distill, args=["-o", str(tmp_path / "run"), "--teacher", str(sd3), *words])
    there = io.read_json(tmp_path / "run" / "config.json")
    last = ["transformer_blocks.2", "up.0.layers.1.transformer", "conv"]
    assert there["layers"] == [last, ["transformer_blocks.0", "mid", "linear"]]
    assert (there["scaling"], there["kd_weight"]) == ("constant", 0.5)
    assert there["guidance"] == 4.0 and (exported / "model_index.json").is_file()


def test_captions_embedded_beforehand_take_the_encoders_place(sd3, tmp_path):
    whole = load_teacher(sd3, dtype=torch.float32)
    added = store_captions(whole.reader, ["a red circle", "two stars"], tmp_path / "text", batch_size=2)
    assert added == 3  # the empty one too
    assert store_captions(whole.reader, ["two stars"], tmp_path / "text") == 0
    cached = load_teacher(sd3, dtype=torch.float32, captions=tmp_path / "text")
    assert isinstance(cached.reader, CaptionStore)
    for ours, theirs in zip(cached.read(["two stars", ""]), whole.read(["two stars", ""]), strict=True):
        torch.testing.assert_close(ours, theirs)
    with pytest.raises(ValueError, match=r"captions: .* has no embedding of 'three stars'"):
        cached.read(["three stars"])
    file = stored_caption(tmp_path / "text", "two stars")
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(io.CheckpointError, match="truncated"):
        cached.read(["two stars"])
    # A transformer alone can only be read to so.
    bare = load_teacher(sd3 / "transformer", captions=tmp_path / "text", dtype=torch.float32)
    x_t, t = torch.randn(1, 8, 8, 8), torch.tensor([0.3])
    text = whole.read(["a red circle"])
    torch.testing.assert_close(bare.velocity(x_t, t, text)[0], whole.velocity(x_t, t, text)[0])
    with pytest.raises(ValueError, match=r"captions: .* without text encoders"):
        load_teacher(sd3 / "transformer")


def test_captions_of_several_lengths_are_padded_alike(tmp_path):
    teacher = small_teacher()
    captions = ["a star", "a red circle left of a blue square"]
    store_captions(teacher.reader, captions, tmp_path / "text")
    found, direct = CaptionStore(tmp_path / "text")(captions), teacher.read(captions)
    assert torch.equal(found.mask, direct.mask)
    torch.testing.assert_close(found.context[found.mask], direct.context[direct.mask])


def test_damaged_teachers_are_named(sd3, tmp_path, monkeypatch):
    with pytest.raises(io.CheckpointError, match="holds no safetensors"):
        load_teacher(tmp_path)
    with pytest.raises(ImportError, match="quantization: torchao is not installed"):
        load_teacher(sd3, quantization="torchao")
    with pytest.raises(ValueError, match="quantization: got 'four'"):
        load_teacher(sd3, quantization="four")
    with pytest.raises(ValueError, match="cannot be dealt out"):
        load_teacher(sd3, quantization="torchao", sharded=True)
    folder = tmp_path / "damaged"
    shutil.copytree(sd3, folder)
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = io.load_tensors(file)
    io.save_tensors(file, {name: t for name, t in tensors.items() if name != "proj_out.bias"}, {"format": "pt"})
    with pytest.raises(io.CheckpointError, match=r"transformer: its weights .*: proj_out\.bias is missing"):
        load_teacher(folder)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(io.CheckpointError, match="truncated"):
        load_teacher(folder)
    file.rename(file.with_suffix(".bin"))
    with pytest.raises(io.CheckpointError, match="no SD3Transformer2DModel in safetensors"):
        load_teacher(folder)
    (folder / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(io.CheckpointError, match="holds a FluxPipeline; must be SnapGenPipeline or"):
        load_teacher(folder)


# ---- the tiny teacher ------------------------------------------------------------------------------------------------


def teacher_task() -> DenoiserTask:
    plain = denoiser_task()
    torch.manual_seed(0)
    network, encoder, tokenizer = build_denoiser(SMALL_TEACHER, VOCABULARY)
    return DenoiserTask(
        SMALL_TEACHER,
        denoiser=network,
        text=type(plain.text)(tokenizer, encoder),
        encoder=plain.encoder,
        decoder=plain.decoder,
        prompts=("a red circle",),
    )


def test_a_teacher_of_our_own_trains_draws_and_teaches(tmp_path):
    exported = train(teacher_task(), data(), config(steps=3, recompute=True), tmp_path / "teacher", console=QUIET)
    pipe = SnapGenPipeline.from_pretrained(exported)
    assert isinstance(pipe.denoiser, MMDiT)
    pipe.set_progress_bar_config(disable=True)
    picture = pipe("a red circle", num_inference_steps=2, output_type="pt", generator=torch.manual_seed(0)).images
    assert picture.shape == (1, 3, 32, 32) and picture.std() > 0
    teacher = load_teacher(exported)
    x_t, t, text = torch.randn(1, 8, 4, 4), torch.tensor([0.4]), pipe.encode_prompt(["two stars"])
    with torch.no_grad():
        expected = pipe.denoiser(x_t, 400.0, text.context, text.mask, text.pooled).sample
    torch.testing.assert_close(teacher.velocity(x_t, t, teacher.read(["two stars"]))[0], expected)
    student = denoiser_task().modules["denoiser"]
    assert KnowledgeDistillation(teacher, student, pairs=[LAST]).record()["teacher"] == teacher.record["teacher"]


def test_the_tiny_teacher_recomputes_to_the_same_gradients():
    network = spread_weights(MMDiT(**SMALL_TEACHER.denoiser))
    arguments = (torch.randn(2, 8, 4, 4), 300.0, torch.randn(2, 5, 32), None, torch.randn(2, 32))
    gradients = []
    for recompute in (False, True):
        if recompute:
            network.enable_gradient_checkpointing()
        network.zero_grad()
        network(*arguments).sample.square().sum().backward()
        gradients.append([p.grad.clone() for p in network.parameters()])
    assert all(torch.equal(*both) for both in zip(*gradients, strict=True))


def test_what_the_tiny_teacher_does_not_take_is_named():
    network = MMDiT(**SMALL_TEACHER.denoiser)
    text, pooled = torch.zeros(1, 3, 32), torch.zeros(1, 32)
    with pytest.raises(ValueError, match=r"sample: got shape \(1, 4, 4, 4\); expected \[B, 8"):
        network(torch.zeros(1, 4, 4, 4), 0, text, None, pooled)
    with pytest.raises(ValueError, match="pooled_projections: is needed"):
        network(torch.zeros(1, 8, 4, 4), 0, text)
    with pytest.raises(ValueError, match=r"encoder_hidden_states: got shape \(1, 17, 32\)"):
        network(torch.zeros(1, 8, 4, 4), 0, torch.zeros(1, 17, 32), None, pooled)
    with pytest.raises(ValueError, match="multiples of 2"):
        MMDiT(**{**SMALL_TEACHER.denoiser, "patch_size": 2})(torch.zeros(1, 8, 5, 4), 0, text, None, pooled)


def test_the_preset_of_the_tiny_teacher():
    preset = PRESETS["tiny-teacher"]
    network, _, _ = build_denoiser(preset, VOCABULARY)
    assert isinstance(network, MMDiT) and network.config.sample_size == preset.resolution // 8
    assert (preset.decoder, preset.encoder) == (PRESETS["tiny"].decoder, PRESETS["tiny"].encoder)
