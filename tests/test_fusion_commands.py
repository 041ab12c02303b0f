"""SnapFusion and decoder training end to end on the shapes world, each a few steps, by the commands' own words."""

import shutil

import pytest
import torch
import tyro
from diffusers import AutoencoderKL
from small_fusion import tiny_sd
from small_models import QUIET
from transformers import CLIPTextConfig, CLIPTextModel

from snapgen import io
from snapgen.config import SHIPPED
from snapgen.decoder import TinyDecoder
from snapgen.distill import fusion_command, fusion_runs
from snapgen.distill.fusion_command import (
    distill_decoder,
    distill_fusion,
    evolve,
    import_sd,
    prune_decoder,
    train_decoder,
    train_fusion,
)
from snapgen.fusion_load import load_decoder, load_encoder, load_part
from snapgen.kl_decoder import KLDecoder, KLEncoder
from snapgen.pipeline import SnapGenPipeline
from snapgen.text import build_tiny_text

pytestmark = pytest.mark.method

QUICK = ["--steps", "2", "--batch-size", "2", "--warmup", "1", "--save-every", "1", "--sample-every", "99"]


@pytest.fixture(autouse=True, scope="module")
def quiet():
    """No output, and grids of one picture."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fusion_command, "console", QUIET)
        patch.setattr(fusion_runs, "_prompts", lambda: ["a red circle"])
        yield


def run(command, *words):
    tyro.cli(command, args=[str(word) for word in words])


@pytest.fixture(scope="module")
def trained(tmp_path_factory, quiet):
    """A denoiser of `tiny-fusion`, trained for two steps."""
    out = tmp_path_factory.mktemp("fusion") / "run"
    run(train_fusion, "-o", out, "--keep-blocks", "0.8", *QUICK)
    return out / "export"


def test_train_and_distil_and_resume(trained, tmp_path):
    assert (trained.parent / "samples" / "step-0000002.png").is_file()
    words = ["-o", tmp_path / "steps", "--teacher", trained, "--student-steps", "2", "--cfg-probability", "0.5"]
    run(distill_fusion, *words, *QUICK)
    student, teacher = (SnapGenPipeline.from_pretrained(p) for p in (tmp_path / "steps" / "export", trained))
    own, other = student.denoiser.state_dict(), teacher.denoiser.state_dict()
    assert any(not torch.equal(own[name], other[name]) for name in own)
    own, other = student.text_encoder.state_dict(), teacher.text_encoder.state_dict()
    assert all(torch.equal(own[name], other[name]) for name in own)
    run(distill_fusion, *words, *QUICK)  # finished: nothing is trained further
    with pytest.raises(ValueError, match=r"gamma was 0\.2, now 0\.5"):
        run(distill_fusion, *words, "--gamma", "0.5", *QUICK)
    with pytest.raises(ValueError, match="teacher: tiny has a SnapGenUNet"):
        run(distill_fusion, "-o", tmp_path / "other", "--teacher", "tiny", *QUICK)


def test_go_on_from_a_pipeline(trained, tmp_path):
    run(train_fusion, "-o", tmp_path / "more", "--init", trained, *QUICK)
    assert (tmp_path / "more" / "export" / "model_index.json").is_file()
    with pytest.raises(ValueError, match=r"init: .* reads captions by another text encoder"):
        run(
            distill_fusion, "-o", tmp_path / "bad", "--teacher", trained, "--init", tmp_path / "more" / "export", *QUICK
        )
    with pytest.raises(ValueError, match="preset: snapfusion is trained on Stable Diffusion's latents"):
        run(train_fusion, "-o", tmp_path / "none", "--preset", "snapfusion", *QUICK)


@pytest.mark.complete
def test_evolve(trained, tmp_path):
    net = SnapGenPipeline.from_pretrained(trained).denoiser
    from snapgen.distill.latency import measure

    table = measure(net, repeats=1)
    table.save(tmp_path / "table.json")
    words = ["-o", tmp_path / "evolved", "--latency", table.total(net) * 0.99, "--rounds", "1", "--group", "1"]
    words += ["--table", tmp_path / "table.json", "--draw-steps", "1", "--per-skill", "1", *QUICK]
    run(evolve, trained, *words)
    report = io.read_json(tmp_path / "evolved" / "report.json")
    (only,) = report["rounds"]
    assert only["action"] == "drop" and len(only["blocks"]) == 1
    assert report["final"]["latency"] == pytest.approx(
        table.total(net) - only["values"][only["blocks"][0]]["milliseconds"]
    )
    evolved = SnapGenPipeline.from_pretrained(tmp_path / "evolved" / "export").denoiser
    assert len(evolved.places) == len(net.places) - 1
    run(evolve, trained, *words)  # finished: only the result is written again
    assert io.read_json(tmp_path / "evolved" / "report.json") == report


def test_train_prune_and_distil_a_decoder(trained, tmp_path):
    run(train_decoder, "-o", tmp_path / "decoder", "--crops", "0", "32", "--pictures", "2", "--adversarial", "0.1",
        "--discriminator-width", "8", *QUICK)  # fmt: skip
    found = io.read_json(tmp_path / "decoder" / "export" / "report.json")["held out"]
    assert found["pictures"] == 2 and found["psnr"] > 0
    run(prune_decoder, tmp_path / "decoder" / "export", "-o", tmp_path / "half")
    half = load_decoder(tmp_path / "half")
    assert isinstance(half, TinyDecoder) and tuple(half.config["channels"]) == (48, 32, 24, 16)
    run(distill_decoder, "-o", tmp_path / "distilled", "--teacher", trained, "--decoder", tmp_path / "half",
        "--draw-steps", "1", *QUICK)  # fmt: skip
    report = io.read_json(tmp_path / "distilled" / "export" / "report.json")["against the teacher"]
    assert report["pictures"] == 48
    run(train_decoder, "-o", tmp_path / "again", "--decoder", tmp_path / "half", "--pictures", "2", *QUICK)
    with pytest.raises(ValueError, match="held_out: got none"):
        run(distill_decoder, "-o", tmp_path / "x", "--teacher", trained, "--decoder", tmp_path / "half", "--prompts",
            tmp_path / "p.txt", *QUICK)  # fmt: skip


def test_what_runs_in_one_way_only_says_so(trained, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="parallel: got fsdp"):
        run(train_decoder, "-o", tmp_path / "x", "--parallel", "fsdp", *QUICK)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="evolve: runs in one process"):
        run(evolve, trained, "-o", tmp_path / "x", "--latency", "1", *QUICK)


def test_prune_a_shipped_decoder(tmp_path):
    run(prune_decoder, "tiny", "-o", tmp_path / "half")
    assert load_part(tmp_path / "half").config["latent_channels"] == 8


@pytest.fixture
def stable_diffusion(tmp_path):
    """A folder as diffusers saves Stable Diffusion 1, tiny, with random weights."""
    folder = tmp_path / "sd"
    tiny_sd(sample_size=8).save_pretrained(folder / "unet")
    vae = AutoencoderKL(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=8,
    )
    vae.save_pretrained(folder / "vae")
    tokenizer, _ = build_tiny_text(["a", "red", "circle"], hidden_size=24, layers=1, heads=2, max_tokens=77)
    tokenizer.save_pretrained(folder / "tokenizer")
    config = CLIPTextConfig(vocab_size=16, hidden_size=24, intermediate_size=32, num_hidden_layers=1,
                            num_attention_heads=2, eos_token_id=3, bos_token_id=2, pad_token_id=0)  # fmt: skip
    CLIPTextModel(config).save_pretrained(folder / "text_encoder")
    return folder


def test_stable_diffusion_is_imported_trained_and_its_decoder_pruned(stable_diffusion, tmp_path):
    run(import_sd, stable_diffusion, "-o", tmp_path / "ours")
    pipe = SnapGenPipeline.from_pretrained(tmp_path / "ours")
    assert isinstance(pipe.decoder, KLDecoder) and isinstance(pipe.encoder, KLEncoder)
    # Text is what Stable Diffusion 1 reads: the last states of 77 tokens.
    text = pipe.encode_prompt(["a red circle"])
    tokens = pipe.tokenizer("a red circle", padding="max_length", max_length=77, return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(text.context, pipe.text_encoder(input_ids=tokens.input_ids).last_hidden_state)
    data = tmp_path / "pictures"
    data.mkdir()
    for index, picture in enumerate(pipe(["a red circle"] * 4, num_inference_steps=1, guidance_scale=1.0).images):
        picture.save(data / f"{index}.png")
        (data / f"{index}.txt").write_text("a red circle")
    run(train_fusion, "-o", tmp_path / "v", "--init", tmp_path / "ours", "--data", data, *QUICK)
    run(distill_fusion, "-o", tmp_path / "s", "--teacher", tmp_path / "v" / "export", "--student-steps", "2",
        "--cfg-probability", "1", "--data", data, *QUICK)  # fmt: skip
    run(prune_decoder, stable_diffusion / "vae", "-o", tmp_path / "half")
    assert tuple(load_decoder(tmp_path / "half").config["channels"]) == (8, 16)
    assert isinstance(load_encoder(stable_diffusion), KLEncoder)
    assert isinstance(load_decoder(stable_diffusion), KLDecoder)
    with pytest.raises(io.CheckpointError, match="holds a TinyDecoder, which is no encoder"):
        load_encoder(SHIPPED / "tiny" / "decoder")
    shutil.rmtree(stable_diffusion / "vae")
    with pytest.raises(io.CheckpointError, match="has no folder vae"):
        run(import_sd, stable_diffusion, "-o", tmp_path / "again")
