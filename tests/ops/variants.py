"""Runs a test once for every instruction set that was built."""

from collections.abc import Callable

import pytest

from snapgen_kernels._backend import extension


def on_each_variant(test: Callable[[], None]) -> Callable[[str], None]:
    """``test`` with each instruction set forced; skipped where the processor lacks it or there is no extension."""
    module = extension().module
    names = ["none"] if module is None else list(module.variants())

    @pytest.mark.parametrize("variant", names)
    def forced(variant: str) -> None:
        if module is None:
            pytest.skip("the C++ extension is not built")
        if not module.variants()[variant]:
            pytest.skip(f"this processor lacks {variant}")
        module.force_variant(variant)
        try:
            test()
        finally:
            module.force_variant(None)

    forced.__name__, forced.__doc__ = test.__name__, test.__doc__
    return forced
