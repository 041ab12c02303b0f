"""Rectified flow and its sampler against hand-computed values."""

import math

import pytest
import torch

from snapgen import flow
from snapgen.sampler import concatenate, make_scheduler, sample, set_steps
from snapgen.text import TextEmbedding


def test_the_path_runs_from_data_to_noise_at_constant_velocity():
    x0, noise = torch.randn(3, 2, 4, 4, dtype=torch.float64), torch.randn(3, 2, 4, 4, dtype=torch.float64)
    assert torch.equal(flow.interpolate(x0, noise, torch.zeros(3)), x0)
    torch.testing.assert_close(flow.interpolate(x0, noise, torch.ones(3)), noise)
    t = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    step = (flow.interpolate(x0, noise, t + 0.05) - flow.interpolate(x0, noise, t)) / 0.05
    torch.testing.assert_close(step, flow.velocity(x0, noise))


def test_velocity_loss_by_hand():
    x0, noise = torch.zeros(2, 1, 1, 2), torch.tensor([[[[1.0, 2.0]]], [[[0.0, 0.0]]]])
    predicted = torch.tensor([[[[0.0, 4.0]]], [[[3.0, 1.0]]]])
    assert flow.velocity_loss(predicted, x0, noise).tolist() == [(1 + 4) / 2, (9 + 1) / 2]


def test_t_is_logit_normal():
    t = flow.times(torch.randn(200_000, generator=torch.Generator().manual_seed(0))).double()
    logits = torch.log(t / (1 - t))
    assert logits.mean().abs() < 0.01
    assert (logits.std() - 1).abs() < 0.01


def test_shift_by_hand():
    generator = torch.Generator().manual_seed(0)
    plain = flow.times(torch.randn(5, generator=generator))
    generator.manual_seed(0)
    shifted = flow.times(torch.randn(5, generator=generator), shift=3.0)
    torch.testing.assert_close(shifted, 3 * plain / (1 + 2 * plain))


@pytest.mark.parametrize("steps", [1, 2, 4, 28, 63])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_straight_flow_is_solved_exactly_in_any_number_of_steps(steps, shift):
    target, noise = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    seen = []

    def denoiser(x, timestep, context, mask, pooled, return_dict):
        seen.append(float(timestep))
        return (noise - target,)

    text = TextEmbedding(torch.zeros(2, 1, 1), torch.ones(2, 1, dtype=torch.bool), None)
    drawn = sample(denoiser, make_scheduler(shift), noise, text, steps=steps, guidance_scale=1.0, negative=None)
    torch.testing.assert_close(drawn, target, atol=1e-5, rtol=1e-5)
    assert len(seen) == steps and seen[0] == 1000.0
    assert seen == sorted(seen, reverse=True)


def test_last_step_starts_at_one_over_steps():
    assert set_steps(make_scheduler(), 4, "cpu").tolist() == pytest.approx([1000, 750, 500, 250])
    with pytest.raises(ValueError, match="num_inference_steps"):
        set_steps(make_scheduler(), 0, "cpu")


@pytest.mark.parametrize("scale", [0.0, 1.0, 4.0])
def test_guidance_by_hand(scale):
    positive, negative = 2.0, 0.5
    x = torch.zeros(1, 1, 1, 1)

    def denoiser(x, timestep, context, mask, pooled, return_dict):
        return (context[:, :1, :1].unsqueeze(1).expand_as(x),)

    def text(value):
        return TextEmbedding(torch.full((1, 1, 1), value), torch.ones(1, 1, dtype=torch.bool), None)

    drawn = sample(
        denoiser,
        make_scheduler(),
        x,
        text(positive),
        steps=3,
        guidance_scale=scale,
        negative=None if scale == 1.0 else text(negative),
    )
    assert drawn.item() == pytest.approx(-(negative + scale * (positive - negative)), rel=1e-5)


def test_contexts_of_different_length_are_padded_and_masked():
    short = TextEmbedding(torch.ones(1, 2, 3), torch.ones(1, 2, dtype=torch.bool), torch.zeros(1, 4))
    long = TextEmbedding(torch.ones(1, 5, 3), torch.ones(1, 5, dtype=torch.bool), torch.ones(1, 4))
    both = concatenate(short, long)
    assert both.context.shape == (2, 5, 3)
    assert both.mask.tolist() == [[True, True, False, False, False], [True] * 5]
    assert both.pooled is not None and both.pooled.tolist() == [[0.0] * 4, [1.0] * 4]
    assert math.isclose(both.context[0, 2:].abs().sum().item(), 0.0)
