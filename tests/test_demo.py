"""The demo: its prompts are unseen, its figures are those of the functions that it calls, its files whole."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from bench.results import Row
from snapgen import evaluate, sections
from snapgen.data.shapes import MIXES, SKILLS, captions, parse
from snapgen.demo import run
from snapgen.evaluate import score_shapes
from snapgen.pipeline import SnapGenPipeline
from tests.small_models import QUIET, denoiser_task


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with fresh weights, saved as training saves one."""
    folder = tmp_path_factory.mktemp("demo") / "model"
    task = denoiser_task()
    for module in (*task.modules.values(), task.encoder, task.decoder):
        module.eval()
    task.pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def state(checkpoint: Path, tmp_path: Path) -> sections.Run:
    pipe = SnapGenPipeline.from_pretrained(checkpoint)
    return sections.Run(tmp_path, str(checkpoint), pipe, 1, pipe)


def test_training_showed_none_of_the_prompts() -> None:
    kinds = set()
    for prompt in (*sections.PROMPTS, sections.PATH_PROMPT):
        kind = parse(prompt).skill
        assert prompt in captions(kind, "test") and prompt not in captions(kind, "train")
        kinds.add(kind)
    assert kinds == {*SKILLS, *MIXES} - {"single_object"}  # whose six captions training has to show
    assert len(set(sections.PROMPTS)) == 16


@pytest.mark.slow
def test_pictures_scores_and_path(checkpoint: Path, tmp_path: Path) -> None:
    chosen = ("pictures", "scores", "path")
    report = run(tmp_path / "out", per_skill=1, console=QUIET, checkpoint=checkpoint, only=chosen)
    assert report == tmp_path / "out" / "report.html"
    names = ["grid-28.png", "grid-4.png", "report.html", "scores.json", "scores.png"]
    assert sorted(path.name for path in report.parent.iterdir()) == names
    for name in (name for name in names if name.endswith(".png")):
        with Image.open(report.parent / name) as picture:
            picture.load()

    found = json.loads((report.parent / "scores.json").read_text())
    pipe = SnapGenPipeline.from_pretrained(checkpoint)
    settings: dict[str, Any] = dict(
        steps=4, guidance=found["guidance"]["4 steps"], per_skill=found["per_skill"], seed=found["seed"]
    )
    assert found["scores"]["4 steps"] == score_shapes(pipe, **settings)
    assert found["scores"].keys() == {"28 steps", "4 steps", "untrained, 28 steps"}

    markup = report.read_text(encoding="utf-8")
    assert all(markup.count(f"<figcaption>{prompt}") == 2 for prompt in sections.PROMPTS)
    assert markup.count("<section ") == 3 and "0.66" in markup

    # Once more over the same folder: replaced, not added to; and a run is a function of its seed.
    kept = {name: (report.parent / name).read_bytes() for name in names if name.endswith((".json", "28.png", "4.png"))}
    report.write_text("an older report")
    run(tmp_path / "out", per_skill=1, console=QUIET, checkpoint=checkpoint, only=chosen)
    assert sorted(path.name for path in report.parent.iterdir()) == names
    assert {name: (report.parent / name).read_bytes() for name in kept} == kept
    assert report.read_text(encoding="utf-8").startswith("<!doctype html>")


def test_denoising_path_ends_where_sampling_does(state: sections.Run) -> None:
    times, seen, expected = sections.denoising_path(state.pipe, "a blue star", steps=7)
    drawn = state.pipe("a blue star", latents=seen[:1], num_inference_steps=7, output_type="latent").images
    # The last Euler step ends at t = 0, where latents and expectation are one.
    torch.testing.assert_close(expected[-1:], drawn, rtol=1e-4, atol=1e-4)
    assert times[0] == 1 and len(times) == len(seen) == len(expected) == 7
    assert all(before > after for before, after in zip(times, times[1:], strict=False))


def test_few_steps_are_the_distilled_models(state: sections.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    blank = [Image.new("RGB", (32, 32))] * len(sections.PROMPTS)
    monkeypatch.setattr(evaluate, "draw", lambda pipe, *_, **named: drawn.append((pipe, named)) or blank)
    own = sections.draw_pictures(state)
    assert "This model is not distilled" in str(own.body) and f"--checkpoint {state.checkpoint}" in own.command
    state.few = SnapGenPipeline.from_pretrained(sections.DISTILLED)
    section = sections.draw_pictures(state)
    assert [pipe for pipe, _ in drawn] == [state.pipe, state.pipe, state.pipe, state.few]
    assert (drawn[3][1]["steps"], drawn[3][1]["guidance"]) == (4, 1.0)
    assert "4 calls of the denoiser instead of 56" in str(section.body).replace("\n", " ")
    assert f"--checkpoint {sections.DISTILLED}" in section.command


def test_untrained_has_fresh_weights_and_leaves_the_rest_alone(state: sections.Run) -> None:
    before, random = {k: v.clone() for k, v in state.pipe.denoiser.state_dict().items()}, torch.get_rng_state()
    fresh, again = evaluate.untrained(state.pipe, 1), evaluate.untrained(state.pipe, 1)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(before[k], v) for k, v in state.pipe.denoiser.state_dict().items())
    assert fresh.decoder is state.pipe.decoder and fresh.denoiser is not state.pipe.denoiser
    for name in ("denoiser", "text_encoder"):
        weights, repeated = getattr(fresh, name).state_dict(), getattr(again, name).state_dict()
        assert all(torch.equal(weights[key], repeated[key]) for key in weights)
    assert not torch.equal(fresh.denoiser.conv_in.weight, state.pipe.denoiser.conv_in.weight)
    assert not fresh.denoiser.training and fresh.config.joint_text


@pytest.mark.slow
def test_packages_are_exported_and_described(state: sections.Run) -> None:
    pytest.importorskip("coremltools")
    made = sections.export_packages(state)
    for name in ("Unet", "VAEDecoder", "TextEncoder"):
        assert (state.out / "coreml" / f"{name}.mlpackage" / "Manifest.json").is_file()
        assert f"Operations of {name}.mlpackage" in made.body
    assert "encoder_hidden_states" in made.body and " dB" in made.body and "<code>conv</code>" in made.body


def test_without_coremltools_the_section_says_how_to_get_it(
    state: sections.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "coremltools", None)
    made = sections.export_packages(state)
    assert "pip install &#x27;snapgen[export]&#x27;" in made.body and not (state.out / "coreml").exists()


def row(provider: str, mode: str, p50: float) -> dict[str, object]:
    measured: dict[str, Any] = dict(
        p20_ms=p50, p50_ms=p50, p80_ms=p50, repeats=5, flops=1, bytes=1, floor_ms=0.5, gemm_gflops=1.0
    )
    words = (
        "provider_version",
        "date",
        "commit",
        "device",
        "variant",
        "malloc",
        "python",
        "torch",
        "triton",
        "snapgen",
    )
    machine: dict[str, Any] = dict.fromkeys(words, "") | dict(threads=2, load=9.0)
    rest: dict[str, Any] = dict(copy_gbs=1.0, peak_bytes=1, checked="")
    return asdict(
        Row(op="geglu", case="a case", dtype="fp32", mode=mode, provider=provider, **measured, **rest, **machine)
    )


def checkout(folder: Path, body: str) -> Path:
    """A checkout whose benchmark is `body`."""
    (folder / "bench").mkdir(parents=True)
    (folder / "bench" / "__init__.py").touch()
    (folder / "bench" / "__main__.py").write_text(body)
    return folder


@pytest.fixture
def kernels() -> None:
    import snapgen_kernels

    if not snapgen_kernels.backends()["cpp"]["available"]:
        pytest.skip("built without the C++ extension: there is nothing to time")


@pytest.mark.usefixtures("kernels")
def test_timing_shows_what_the_benchmark_measured(
    state: sections.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [row("fused", "fwd", 1.0), row("eager", "fwd", 3.0), row("compile", "fwd", 2.0), row("eager", "bwd", 12.5)]
    measured = {"machine": {"device": "a <machine>", "threads": 2, "load": 9.0}, "rows": rows}
    program = f"import sys; open(sys.argv[sys.argv.index('--json') + 1], 'w').write({json.dumps(measured)!r})"
    monkeypatch.setattr(sections, "_CHECKOUT", checkout(tmp_path / "checkout", program))
    made = sections.time_ops(state)
    for said in ("a &lt;machine&gt;", "2.00×", "50%", "12.5", "faster than the best peer in 1 of 1 rows", "load 9.0"):
        assert said in made.body, said
    assert "3.00" not in made.body  # only the best peer


@pytest.mark.usefixtures("kernels")
def test_a_failing_benchmark_stops_the_demo(
    state: sections.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sections, "_CHECKOUT", checkout(tmp_path / "checkout", "raise SystemExit('geglu is wrong')"))
    with pytest.raises(RuntimeError, match=r"failed with exit code 1:\ngeglu is wrong"):
        sections.time_ops(state)


def test_timing_without_a_checkout_says_so(
    state: sections.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sections, "_CHECKOUT", tmp_path)
    assert "needs the checkout" in sections.time_ops(state).body


@pytest.mark.slow
def test_counts_stand_beside_the_published_ones(state: sections.Run) -> None:
    made = sections.count(state)
    for said in ("tiny", "imagenet-256", "t2i-1024", "372M / 38G", "multi-query attention", "−16%"):
        assert said in made.body, said


def test_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="per_skill: got 0; must be at least 1"):
        run(tmp_path, per_skill=0)
    with pytest.raises(ValueError, match=r"only: got 'picture'; allowed are pictures, scores, path, timing"):
        run(tmp_path, only=["picture"])
