"""One thread per test process, so that parallel runs do not fight for cores; fixed seeds; a quick Hypothesis
profile."""

from collections.abc import Iterator

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("default", deadline=None, max_examples=20, derandomize=True)
hypothesis.settings.load_profile("default")


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def quick_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring what the machine can do takes the benchmark seconds; one test does it."""
    from bench import limits

    monkeypatch.setattr(limits, "measure", lambda device, dtypes, seconds=0.5: limits.assumed(device))
