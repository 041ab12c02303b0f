"""Running a test on every instruction set that was built."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from snapgen_kernels._backend import extension

MODULE = extension().module
VARIANTS = ["none"] if MODULE is None else list(MODULE.variants())
built = pytest.mark.skipif(MODULE is None, reason="the C++ extension is not built")


@contextmanager
def forced(variant: str) -> Iterator[None]:
    """This instruction set inside; the test is skipped where the processor lacks it or there is no extension."""
    if MODULE is None:
        pytest.skip("the C++ extension is not built")
    if not MODULE.variants()[variant]:
        pytest.skip(f"this processor lacks {variant}")
    MODULE.force_variant(variant)
    try:
        assert MODULE.variant() == variant
        yield
    finally:
        MODULE.force_variant(None)


def on_each_variant(test: Callable[[], None]) -> Callable[[str], None]:
    """``test``, which takes no arguments, with each instruction set forced."""

    @pytest.mark.parametrize("variant", VARIANTS)
    def repeated(variant: str) -> None:
        with forced(variant):
            test()

    repeated.__name__, repeated.__doc__ = test.__name__, test.__doc__
    return repeated
