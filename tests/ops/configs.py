"""Every config that the Triton launchers choose from in a call, so that a test can force each of them."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from snapgen_kernels import checks
from snapgen_kernels.testing import Case

Choice = tuple[str, Any]  # kernel, config


@contextlib.contextmanager
def forced(choices: Sequence[Choice]) -> Iterator[None]:
    """All of these choices are made inside."""
    tuning = importlib.import_module("snapgen_kernels._triton.tuning")
    with contextlib.ExitStack() as stack:
        for kernel, config in choices:
            stack.enter_context(tuning.forced(kernel, config))
        yield


@contextlib.contextmanager
def _recorded() -> Iterator[dict[str, Sequence[Any]]]:
    """Kernel -> its candidates, of the calls inside."""
    tuning = importlib.import_module("snapgen_kernels._triton.tuning")
    plain: Callable[..., Any] = tuning.choose
    found: dict[str, Sequence[Any]] = {}

    def choose(kernel: str, key: Any, candidates: Sequence[Any], *rest: Any) -> Any:
        found[kernel] = candidates
        return plain(kernel, key, candidates, *rest)

    modules = [m for name, m in sys.modules.items() if name.startswith("snapgen_kernels._triton")]
    users = [module for module in modules if vars(module).get("choose") is plain]
    for module in users:
        module.choose = choose  # type: ignore[attr-defined]
    try:
        yield found
    finally:
        for module in users:
            module.choose = plain  # type: ignore[attr-defined]


def choices_of(case: Case, device: str) -> list[list[Choice]]:
    """Each config of each kernel that the case can launch, after the choices that lead to that kernel."""
    inputs = case.inputs(device, requires_grad=True)
    checks.run(case, case.spec.registered, inputs)  # imports the launchers
    known: set[str] = set()
    found: list[list[Choice]] = []

    def explore(path: list[Choice]) -> None:
        with forced(path), _recorded() as seen:
            checks.run(case, case.spec.registered, inputs)
        new = {kernel: candidates for kernel, candidates in seen.items() if kernel not in known}
        known.update(new)
        for kernel, candidates in new.items():
            for config in candidates:
                found.append([*path, (kernel, config)])
                explore(found[-1])

    explore([])
    return found
