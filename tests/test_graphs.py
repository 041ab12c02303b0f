"""A compiled pipeline: what is recorded, and that replays see everything that changes.

A stand-in for CUDA's graphs runs the function again on the buffers it was recorded with, into the output it gave then.
"""

import pytest
import torch
from torch import nn

from snapgen import graphs
from snapgen.graphs import Graphed
from snapgen.pipeline import SnapGenPipeline


class Recorder:
    """Counts captures; a replay sees the recorded buffers alone, as a graph does."""

    def __init__(self):
        self.captured = self.replayed = 0

    def __call__(self, function):
        self.captured += 1
        output = function().clone()

        def replay():
            self.replayed += 1
            with torch.no_grad():
                output.copy_(function())

        return output, replay


@pytest.fixture
def pipe() -> SnapGenPipeline:
    pipe = SnapGenPipeline.from_pretrained("tiny")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, prompt, seed=0, **settings):
    generator = torch.Generator().manual_seed(seed)
    settings = {"num_inference_steps": 2, **settings}
    return pipe(prompt, generator=generator, output_type="pt", **settings).images


def test_replays_draw_what_the_pipeline_draws(pipe):
    calls = [
        dict(prompt="a red circle"),
        dict(prompt="a blue star left of a pink ring", seed=3),  # a longer caption
        dict(prompt="a red circle", num_inference_steps=3, guidance_scale=2.0),
        dict(prompt="a red circle", negative_prompt="two stars"),
    ]
    plain = [draw(pipe, **call) for call in calls]
    recorder = Recorder()
    assert pipe.compile(capture=recorder) is pipe
    assert recorder.captured == 2  # denoiser and decoder
    for call, expected in zip(calls, plain, strict=True):
        torch.testing.assert_close(draw(pipe, **call), expected, atol=1e-4, rtol=1e-4)
    assert recorder.captured == 2
    assert recorder.replayed == 2 + sum(call.get("num_inference_steps", 2) + 1 for call in calls)


@pytest.mark.complete
def test_torch_compile_draws_the_same(pipe):
    plain = draw(pipe, "a red circle")
    recorder = Recorder()
    torch._dynamo.reset()
    pipe.compile(capture=recorder, inductor=True)
    with torch._dynamo.config.patch(error_on_recompile=True):  # another time or prompt compiles nothing
        torch.testing.assert_close(draw(pipe, "a red circle"), plain, atol=1e-4, rtol=1e-4)
        draw(pipe, "two stars", seed=1, num_inference_steps=3)
    assert recorder.captured == 2
    assert torch._dynamo.utils.counters["graph_break"] == {}


def test_other_shapes_are_recorded_when_they_come(pipe):
    plain = draw(pipe, ["a red circle", "two stars"], guidance_scale=1.0, height=32)
    recorder = Recorder()
    pipe.compile(capture=recorder)
    for _ in range(2):
        torch.testing.assert_close(
            draw(pipe, ["a red circle", "two stars"], guidance_scale=1.0, height=32), plain, atol=1e-4, rtol=1e-4
        )
        assert recorder.captured == 4


def test_a_distilled_model_is_recorded_as_it_draws():
    pipe = SnapGenPipeline.from_pretrained("tiny-4")
    pipe.set_progress_bar_config(disable=True)
    recorder = Recorder()
    pipe.compile(capture=recorder)
    draw(pipe, "a red circle", num_inference_steps=None)
    assert recorder.captured == 2 and recorder.replayed == 2 + 4 + 1  # without guidance, in four steps, and decoded


def test_weights_changed_in_place_are_seen_and_moved_ones_recorded_anew(pipe):
    recorder = Recorder()
    pipe.compile(capture=recorder)
    before = draw(pipe, "a red circle")
    with torch.no_grad():
        pipe.decoder.conv_out.weight.mul_(0.5)
    assert not torch.equal(draw(pipe, "a red circle"), before) and recorder.captured == 2
    pipe.decoder.conv_out.weight = nn.Parameter(2 * pipe.decoder.conv_out.weight.detach())
    assert torch.equal(draw(pipe, "a red circle"), before) and recorder.captured == 3


def test_inputs_are_held_and_none_stays_none():
    recorder, seen = Recorder(), []

    def function(x, y):
        seen.append((x.data_ptr(), y))
        return x + 1

    graphed = Graphed(function, nn.Identity(), recorder)
    given = torch.zeros(2)
    assert graphed(given, None).tolist() == [1, 1] and graphed(given + 1, None).tolist() == [2, 2]
    assert len({pointer for pointer, _ in seen}) == 1 and given.data_ptr() not in {pointer for pointer, _ in seen}
    assert graphed(torch.zeros(2, dtype=torch.float64), None).dtype == torch.float64 and recorder.captured == 2


def test_few_shapes_are_kept(monkeypatch):
    monkeypatch.setattr(graphs, "KEPT", 2)
    recorder = Recorder()
    graphed = Graphed(lambda x: x + 1, nn.Identity(), recorder)
    sizes = [1, 2, 1, 3, 1, 2]  # the third size takes the place of the second, which had not been called for longest
    for size in sizes:
        assert graphed(torch.ones(size)).tolist() == [2.0] * size
    assert recorder.captured == 4 and len(graphed.recorded) == 2


def test_what_was_recorded_in_inference_mode_is_written_outside_of_it():
    graphed = Graphed(lambda x: x + 1, nn.Identity(), Recorder())
    with torch.inference_mode():
        assert graphed(torch.ones(2)).tolist() == [2.0, 2.0]
    assert graphed(torch.zeros(2)).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("wrong", [dict(), dict(batch_size=0), dict(height=30)])
def test_what_cannot_be_recorded_is_refused(pipe, wrong):
    name = next(iter(wrong), "compile")
    with pytest.raises(ValueError, match=f"^{name}: "):
        pipe.compile(**wrong, **({"capture": Recorder()} if wrong else {}))
    assert pipe._graphs is None
