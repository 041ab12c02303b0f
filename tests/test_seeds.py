"""Random numbers belong to samples: the same in every batch, others for every seed, sample and phase."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from snapgen.seeds import Draws


@given(st.integers(0, 2**40), st.integers(0, 2**20), st.integers(0, 2**40), st.integers(2, 6), st.data())
def test_numbers_do_not_depend_on_the_batch(seed, step, first, count, data):
    cut = data.draw(st.integers(1, count - 1))
    places = range(first, first + count)
    whole, left, right = (Draws(seed, step, part) for part in (places, places[:cut], places[cut:]))
    for ask in (lambda d: d.normal(3), lambda d: d.uniform(2, 2), lambda d: torch.tensor(d.chosen(0.5))):
        assert torch.equal(ask(whole), torch.cat((ask(left), ask(right))))
    # What is common to a step is the same for all of it.
    assert torch.equal(whole.common(4), left.common(4)) and torch.equal(left.common(4), whole.common(4))


def test_no_two_places_share_numbers():
    drawn = [
        tuple(row)
        for seed in (0, 1, 2)
        for phase in (0, 1)
        for step in (0, 1)
        for row in (
            *(Draws(seed, step, range(4 * step, 4 * step + 4), phase=phase).uniform(2).tolist()),
            Draws(seed, step, range(1), phase=phase).common(2).tolist(),
        )
    ]
    assert len(set(drawn)) == len(drawn) == 60


def test_distributions():
    draws = Draws(0, 0, range(4000))
    normal, uniform = draws.normal(4), draws.uniform(4)
    # Six standard errors of 16,000 numbers.
    assert abs(float(normal.mean())) < 0.048 and abs(float(normal.var()) - 1) < 0.07
    assert abs(float(uniform.mean()) - 0.5) < 0.014 and 0 <= float(uniform.min()) <= float(uniform.max()) < 1
    neighbours = torch.corrcoef(torch.stack((normal[:-1, 0], normal[1:, 0])))[0, 1]
    assert abs(float(neighbours)) < 0.1
    assert abs(sum(draws.chosen(0.3)) / 4000 - 0.3) < 0.044
