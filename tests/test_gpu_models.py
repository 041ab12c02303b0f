"""Whole models on a GPU: pictures with and without graphs, numbers against fp64, training against a processor's. Needs
diffusers and transformers besides what tests/ops/test_gpu.py needs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from small_models import QUIET, autoencoder_task, denoiser_task
from test_convergence import GOLDEN, losses

import snapgen_kernels
from bench import models
from snapgen import io
from snapgen.data.shapes import ShapesDataset
from snapgen.pipeline import SnapGenPipeline
from snapgen.train import TrainConfig, train

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
CASES = [
    replace(case, device=DEVICE, dtype=torch.bfloat16) for case in models.CASES if case.gpu or case.op == "decoder"
]


@pytest.fixture(autouse=True)
def _in_full_precision() -> Any:
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before
    torch.cuda.empty_cache()


def _pipe(name: str = "tiny") -> SnapGenPipeline:
    pipe = SnapGenPipeline.from_pretrained(name)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _draw(pipe: SnapGenPipeline, prompt: str | list[str], seed: int = 0, **settings: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    settings = {"num_inference_steps": 3, **settings}
    return torch.as_tensor(pipe(prompt, generator=generator, output_type="pt", **settings).images).float().cpu()


@pytest.mark.parametrize("inductor", [False, True])
def test_graphs_draw_what_the_processor_draws(inductor: bool) -> None:
    calls: list[dict[str, Any]] = [
        dict(prompt="a red circle"),
        dict(prompt="a blue star left of a pink ring", seed=3),
        dict(prompt="a red circle", num_inference_steps=4, guidance_scale=2.0),
        dict(prompt=["a red circle", "two stars"], guidance_scale=1.0, height=32),
    ]
    right = [_draw(_pipe(), **call) for call in calls]
    pipe = _pipe().to(DEVICE)
    without = [_draw(pipe, **call) for call in calls]
    pipe.compile(inductor=inductor)
    for _ in range(2):
        for call, expected, plain in zip(calls, right, without, strict=True):
            drawn = _draw(pipe, **call)
            torch.testing.assert_close(plain, expected, atol=2e-3, rtol=0)
            torch.testing.assert_close(drawn, plain, atol=2e-3 if inductor else 1e-4, rtol=0)


def test_graphs_see_weights_that_change() -> None:
    pipe = _pipe("tiny-4").to(DEVICE).compile()
    before = _draw(pipe, "a red circle", num_inference_steps=None)
    with torch.no_grad():
        pipe.decoder.conv_out.weight.mul_(0.5)
    changed = _draw(pipe, "a red circle", num_inference_steps=None)
    pipe.decoder.conv_out.weight = torch.nn.Parameter(2 * pipe.decoder.conv_out.weight.detach())
    assert not torch.equal(changed, before)
    assert torch.equal(_draw(pipe, "a red circle", num_inference_steps=None), before)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_models_against_fp64(case: models.ModelCase) -> None:
    """At 16x16 latents; of training cases the gradients too."""
    try:
        models.check(case)
    finally:
        models.release()


@pytest.mark.parametrize("low_memory", [False, True])
def test_a_large_picture_is_decoded(low_memory: bool) -> None:
    """2048x2048 pixels, where a middle image is 3 GB: as plain PyTorch does, and with less memory."""
    case = replace(next(c for c in CASES if c.name == "1024px"), side=256)
    network, (latents,) = models.network_and_feeds(case)
    with torch.no_grad():
        with snapgen_kernels.use("reference"):
            expected = network(latents)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        drawn = network.decode(latents, low_memory=low_memory)
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
    image = 2048 * 2048 * 128 * 2
    assert peak < (2.6 if low_memory else 7.6) * image
    assert (drawn.float() - expected.float()).norm() / expected.float().norm() < 0.02
    models.release()


@pytest.mark.parametrize("mode", ["reference", "auto"])
def test_first_losses_are_those_of_a_processor(mode: str) -> None:
    """Noise is drawn by the processor for all devices; fp32 differs by the order of its sums."""
    assert losses(mode, len(GOLDEN)) == pytest.approx(GOLDEN, rel=1e-3)


def test_losses_in_bf16_stay_near() -> None:
    assert losses("auto", len(GOLDEN), dtype="bf16") == pytest.approx(GOLDEN, rel=0.05)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("make", [denoiser_task, autoencoder_task])
def test_a_run_trains_saves_goes_on_and_exports(make: Any, compiled: bool, tmp_path: Path) -> None:
    def run(steps: int) -> Path:
        config = TrainConfig(steps=steps, batch_size=8, warmup=2, cooldown=0.0, save_every=2, sample_every=3,
                             log_every=1, dtype="bf16", compile=compiled)  # fmt: skip
        task = make()
        for name in ("encoder", "decoder", "pictures"):
            if getattr(task, name, None) is not None:
                setattr(task, name, getattr(task, name).to(DEVICE))
        for module in task.modules.values():
            module.to(DEVICE)
        return train(task, ShapesDataset(32, length=1000), config, tmp_path / "run", console=QUIET)

    run(3)
    exported = run(5)
    assert list((tmp_path / "run" / "samples").glob("*.png"))
    weights = [io.load_tensors(file) for file in exported.rglob("*.safetensors")]
    assert weights and all(value.isfinite().all() for held in weights for value in held.values())
