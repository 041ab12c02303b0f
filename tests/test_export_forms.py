"""Other forms of the exported denoiser: for one schedule, attending in chunks, in two packages, of a preset without
weights; and packages in the place of a pipeline's networks."""

import json
from io import StringIO

import pytest
import torch
from rich.console import Console

pytest.importorskip("coremltools", reason="the Core ML export is an optional part")

import snapgen_kernels
from snapgen import evaluate
from snapgen.export import command, coreml, parity
from snapgen.export.command import main_coreml
from snapgen.export.coreml import export_pipeline
from snapgen.export.denoiser import Denoiser, DenoiserChunk, schedule, time_embeddings
from snapgen.export.options import Options
from snapgen.export.runner import packaged_pipeline
from snapgen.export.tools import ExportError, PackageError
from snapgen.pipeline import SnapGenPipeline
from snapgen.sampler import make_scheduler
from tests.test_export import make_pipe

pytestmark = pytest.mark.export

STEPS = 3


@pytest.fixture(scope="module")
def pipe() -> SnapGenPipeline:
    return make_pipe()


@pytest.fixture(scope="module")
def exported(pipe, tmp_path_factory):
    """In two packages, for one schedule, 20 of 64 queries at a time."""
    out = tmp_path_factory.mktemp("forms")
    return out, export_pipeline(pipe, out, Options(chunks=True, steps=STEPS, query_chunk=20))


def inputs_of(batch: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "sample": torch.randn(batch, 4, 8, 8, generator=generator).half(),
        "encoder_hidden_states": torch.randn(batch, 32, 1, 9, generator=generator).half(),
        "encoder_attention_mask": (torch.arange(9) < 5 + torch.arange(batch)[:, None])[:, None, None].half(),
        "pooled_projections": torch.randn(batch, 32, generator=generator).half(),
    }


@torch.no_grad()
def test_every_form_is_the_denoiser(pipe):
    unet, inputs, time = pipe.denoiser, inputs_of(2), torch.tensor([714.3])
    context, mask = inputs["encoder_hidden_states"][:, :, 0].mT.float(), inputs["encoder_attention_mask"][:, 0, 0] > 0
    with snapgen_kernels.use("reference"):
        wanted = unet(inputs["sample"].float(), time, context, mask, inputs["pooled_projections"].float()).sample
    shape = dict(batch=2, height=8, width=8, tokens=9)
    timed = inputs | {"timestep": time.expand(2)}
    scheduled = inputs | {"time_embedding": time_embeddings(unet, time)[None, None]}
    whole = Denoiser(unet, **shape, query_chunk=7)
    torch.testing.assert_close(whole(**timed).float(), wanted, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(
        Denoiser(unet, **shape, scheduled=True)(**scheduled).float(), wanted, rtol=2e-3, atol=2e-3
    )

    first, second = DenoiserChunk(whole, False), DenoiserChunk(whole, True)
    between = dict(zip((name for name, _ in first.outputs), first(**timed), strict=True))
    assert all(value.dtype == torch.float16 for value in between.values())
    text = {name: value for name, value in inputs.items() if name.startswith("encoder_")}
    velocity = second(**between, **text).float()
    assert parity.psnr(velocity, wanted) > 60  # what is handed on is rounded to fp16


def test_both_halves_hold_all_weights_and_about_as_many(pipe):
    whole = Denoiser(pipe.denoiser, batch=1, height=8, width=8, tokens=9)
    halves = [DenoiserChunk(whole, second) for second in (False, True)]
    counts = [sum(p.numel() for p in half.parameters()) for half in halves]
    assert sum(counts) == sum(p.numel() for p in whole.parameters())
    largest = max(sum(p.numel() for p in unit.module.parameters()) for unit in whole.units())
    assert abs(counts[0] - counts[1]) <= 2 * largest
    assert [half.file for half in halves] == ["UnetChunk1.mlpackage", "UnetChunk2.mlpackage"]


def test_queries_go_in_chunks(exported):
    """Scores of no more than 20 queries at once; of the 64 and 16 that the model has, in 4 and in 1 part a head."""
    _, found = exported
    counts = [package["operations"] for package in found["parts"]["denoiser"]["packages"]]
    # One head at 64 tokens in the first stage's cross-attention; elsewhere two heads at 16 tokens.
    whole = sum(count["softmax"] for count in counts)
    plain = Denoiser(make_pipe().denoiser, batch=2, height=8, width=8, tokens=16)
    attentions = [m for m in plain.modules() if type(m).__name__ == "Attention"]
    wide = [m for m in attentions if m.num_heads == 1]
    assert whole == sum(m.num_heads for m in attentions) + 3 * len(wide)


def test_a_schedule_is_the_pipeline_s(exported, pipe):
    out, found = exported
    written = json.loads((out / coreml.SCHEDULE).read_text())
    assert written == schedule(pipe, STEPS)
    scheduler = make_scheduler(pipe.scheduler.config.shift)
    scheduler.set_timesteps(sigmas=[1.0, 2 / 3, 1 / 3])
    assert written["timesteps"] == pytest.approx(scheduler.timesteps.tolist())
    assert written["sigmas"] == pytest.approx(scheduler.sigmas.tolist()) and written["sigmas"][-1] == 0
    with torch.no_grad():
        wanted = pipe.denoiser.time_embedding(pipe.denoiser.time_proj(torch.tensor(written["timesteps"])))
    torch.testing.assert_close(torch.tensor(written["time_embedding"]), wanted)
    kinds = set().union(*(package["operations"] for package in found["parts"]["denoiser"]["packages"]))
    assert not kinds & {"sin", "cos", "cast"}  # nothing is left in fp32
    assert all("float32" not in package["weights"] for package in found["parts"]["denoiser"]["packages"])


def test_packages_draw_in_the_networks_place(exported, pipe):
    """Three guided steps and the decoder, three prompts through packages that take two, against the pipeline."""
    out, _ = exported
    drawn = packaged_pipeline(pipe, out)
    prompts = ["a red circle", "three blue stars", "a green square"]
    settings = dict(num_inference_steps=STEPS, guidance_scale=4.0, output_type="pt")
    latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    wanted = pipe(prompts, latents=latents, **settings).images
    assert parity.psnr(drawn(prompts, latents=latents, **settings).images, wanted) > 45
    with pytest.raises(ValueError, match="inputs: sample has shape"):
        drawn(prompts, height=128, **settings)
    heard = []
    drawn.decoder.decode(latents[:1], progress=lambda done, total: heard.append(done / total))
    assert heard[-1] == 1.0  # or a bar would stay at its beginning


def test_a_folder_without_packages_is_refused(pipe, tmp_path):
    with pytest.raises(PackageError, match="holds none of the packages"):
        packaged_pipeline(pipe, tmp_path)


@pytest.mark.complete
def test_shipped_model_s_packages_score_as_it_does(tmp_path):
    """Four steps of the shipped model by its packages alone: the checker sees what it sees in PyTorch's pictures."""
    pipe = SnapGenPipeline.from_pretrained("tiny-4")
    export_pipeline(pipe, tmp_path, Options(steps=4, batch=1))
    console = Console(file=StringIO())
    scores = [
        evaluate.score_shapes(who, steps=4, guidance=1.0, per_skill=2, seed=0, console=console)
        for who in (pipe, packaged_pipeline(pipe, tmp_path))
    ]
    assert scores[0] == scores[1]
    assert scores[0]["overall"] > 0.7


# --- a preset without weights ---------------------------------------------------------------------------------------


def test_a_preset_is_exported_without_a_checkpoint(tmp_path):
    console = Console(file=StringIO(), width=120)
    found = main_coreml(None, tmp_path, Options(parts=("decoder",)), "tiny", console)
    assert "random weights" in console.file.getvalue()
    assert found["parts"]["decoder"]["psnr"] > parity.FLOORS["decoder"]
    first = {file.name: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    state = torch.get_rng_state()
    main_coreml(None, tmp_path, Options(parts=("decoder",)), "tiny", console)
    assert torch.equal(torch.get_rng_state(), state)
    assert {file.name: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == first


@pytest.mark.parametrize(("name", "tokens"), [("t2i-1024", 333), ("imagenet-256", 77), ("tiny", 16)])
def test_the_context_of_a_preset_is_as_long_as_its_encoders_make_it(name, tokens, monkeypatch):
    class Small:
        """In the models' place, whose hundreds of millions of weights are not needed."""

        def __init__(self, **config):
            self.config = config

        def eval(self):
            return self

    monkeypatch.setattr(command, "SnapGenUNet", Small)
    monkeypatch.setattr(command, "TinyDecoder", Small)
    monkeypatch.setattr(command, "SnapGenPipeline", lambda *parts: parts)
    assert command.seeded_pipeline(name)[1] == tokens


@pytest.mark.parametrize(
    ("checkpoint", "preset", "error", "message"),
    [
        (None, None, ValueError, "checkpoint: none given; name one, or a preset"),
        (None, "huge", ValueError, "preset: unknown name 'huge'"),
        ("tiny", "t2i-1024", ValueError, "preset: the checkpoint is not t2i-1024: its denoiser has channels"),
    ],
)
def test_what_to_export_must_be_clear(tmp_path, checkpoint, preset, error, message):
    with pytest.raises(error, match=message):
        main_coreml(checkpoint, tmp_path / "out", preset=preset, console=Console(file=StringIO()))
    assert not (tmp_path / "out").exists()


def test_a_pipeline_without_text_needs_the_context_s_length(pipe, tmp_path):
    silent = SnapGenPipeline(pipe.denoiser, pipe.decoder, make_scheduler())
    with pytest.raises(ExportError, match="tokens: the pipeline has no text encoder"):
        export_pipeline(silent, tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert export_pipeline(silent, tmp_path, Options(parts=("denoiser",), tokens=5))["parts"]["denoiser"]["psnr"] > 45
