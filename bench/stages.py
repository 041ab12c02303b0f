"""Where a model's time goes: ``python -m bench.stages --help``.

Every part of a network that does work of its own (an op of ours, a convolution, a norm, a linear layer) is timed inside
the running network, by events on a GPU, and stands beside its floor: the time that its FLOPs, or the bytes of its
weights, inputs and outputs, take at this machine's own rates. The part furthest above its floor is the next to look at.
What no part is (additions, concatenations, the host) is the network's time without its parts.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
import tyro
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import snapgen_kernels
from bench import limits, models
from bench.cases import DTYPES, Cost
from bench.models import ModelCase
from bench.options import UsageError

_OURS = (
    snapgen_kernels.SepResBlock,
    snapgen_kernels.SepConv2d,
    snapgen_kernels.DecoderBlock,
    snapgen_kernels.MultiQueryAttention,
    snapgen_kernels.CrossAttention,
    snapgen_kernels.GEGLUFeedForward,
)
REST = "the rest"
# Of a GPU's clock in a second, at most; and how long it is held up, at most.
_CYCLES, _LONGEST_HOLD = 2e9, 0.5


@dataclass(frozen=True)
class Stages:
    """Where a model's time goes, part by part, beside each part's floor."""

    model: Literal["denoiser", "decoder", "picture", "train"] = "denoiser"
    """Which network, with random weights (of the decoder, the parts that training runs); or a picture, from its prompt
    on, in four steps; or a training step."""
    preset: str = "t2i-1024"
    """Of which preset."""
    side: int = 128
    """Side of the square latents; a preset that trains its own text encoder is trained at its own."""
    batch: int = 1
    """Samples."""
    dtype: Literal["fp32", "bf16"] = "bf16"
    """Of weights and activations."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to run."""
    by: Literal["stage", "op", "part"] = "stage"
    """Rows: the network's stages, kinds of operation, or every part; those of pictures and training are fixed."""
    rounds: int = 10
    """Forward passes, pictures or training steps; medians count."""
    plain: bool = False
    """Time plain PyTorch in place of the fused operations."""
    nvtx: bool = False
    """Annotate every part for a profiler (needs the package nvtx)."""


@dataclass
class Part:
    """One part of a network: where it stands, what it is, its cost, and its times in ms."""

    name: str
    kind: str
    cost: Cost
    times: list[float]

    @property
    def ms(self) -> float:
        return statistics.median(self.times)


def parts_of(network: nn.Module) -> dict[str, nn.Module]:
    """What does work of its own, by name, in the network's order: our ops, and modules with weights but no children."""

    def walk(prefix: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        whole = isinstance(module, _OURS) or (not any(module.children()) and any(True for _ in module.parameters()))
        if whole:
            yield prefix, module
            return
        for name, child in module.named_children():
            yield from walk(f"{prefix}.{name}" if prefix else name, child)

    return dict(walk("", network))


def measure(case: ModelCase, rounds: int, *, plain: bool = False, nvtx: bool = False) -> tuple[list[Part], float]:
    """The parts of the case's network with the times of `rounds` forward passes, and the median of the whole in ms."""
    if case.op in ("train", "picture"):
        return _measure_ranges(case, rounds, plain=plain, nvtx=nvtx)
    network, inputs = models.network_and_feeds(case)
    parts = [Part(name, type(module).__name__, Cost(0, 0), []) for name, module in parts_of(network).items()]
    whole: list[float] = []
    network.requires_grad_(False)
    # Where gradients are off, a decoder's blocks run without being called, and its last norm and convolution as one.
    with torch.inference_mode(False), torch.set_grad_enabled(case.op == "decoder"):
        _count(network, inputs, parts)
        with _ranges(nvtx), _mode(plain):
            ahead = _queueing(lambda: models.run(network, inputs), case.device)
            for _ in range(rounds):
                ahead()
                whole.append(_pass(network, inputs, parts, case.device, nvtx))
    return [part for part in parts if part.times], statistics.median(whole)


def _measure_ranges(case: ModelCase, rounds: int, *, plain: bool, nvtx: bool) -> tuple[list[Part], float]:
    """The same of what names its parts itself by ranges: a training step, or a picture."""
    whole: list[float] = []
    with _mode(plain):
        once, costs = _step(case) if case.op == "train" else _picture(case)
        parts = {name: Part(name, name, cost, []) for name, cost in costs.items()}
        ahead = _queueing(once, case.device if case.op == "train" else "cpu")  # a picture waits for its own steps
        for _ in range(rounds):
            ahead()
            marks: list[tuple[str, Any, Any]] = []
            with _ranges(_recorder(marks, partial(_mark, case.device), parts)):
                begin = _mark(case.device)
                once()
                end = _mark(case.device)
            if case.device == "cuda":
                torch.cuda.synchronize()
            whole.append(_between(begin, end))
            for name, *both in marks:
                parts[name].times.append(_between(*both))
        if nvtx:
            with _ranges(True):
                once()
    return list(parts.values()), statistics.median(whole)


def _step(case: ModelCase) -> tuple[Callable[[], Any], dict[str, Cost]]:
    return models.training(case), {name: Cost(*cost) for name, cost in models.step_costs(case).items()}


def _picture(case: ModelCase) -> tuple[Callable[[], Any], dict[str, Cost]]:
    """Costs are FLOPs of products, and every network's weights as often as it is called."""
    from torch.utils.flop_counter import FlopCounterMode

    from bench import picture

    pipe = picture.make_pipeline(case)
    counted: list[tuple[str, int, int]] = []
    counter = FlopCounterMode(display=False)
    recorder = _recorder(counted, counter.get_total_flops, ("text", "denoise", "decode"))
    with sdpa_kernel(SDPBackend.MATH), counter, snapgen_kernels.use("reference"), _ranges(recorder):
        picture.draw(pipe, case)
    encoders = [part for name, part in pipe.components.items() if name.startswith("text_encoder") and part is not None]
    networks = {"text": encoders, "denoise": picture.STEPS * [pipe.denoiser], "decode": [pipe.decoder]}
    costs = {}
    for name, begin, end in counted:
        weights = [p for network in networks[name] for p in _read(network)]
        costs[name] = Cost(end - begin, sum(p.numel() * p.element_size() for p in weights))
    if case.device == "cuda":
        pixels = case.side * pipe.decoder.upscale
        pipe.compile(batch_size=case.batch, guidance=False, height=pixels, width=pixels)
    return lambda: picture.draw(pipe, case), costs


def _read(network: nn.Module) -> Iterator[Tensor]:
    """The weights that a call reads: of tables of embeddings next to nothing."""
    for module in network.modules():
        if not isinstance(module, nn.Embedding):
            yield from module.parameters(recurse=False)


def _recorder(
    marks: list[tuple[str, Any, Any]], mark: Callable[[], Any], names: Collection[str]
) -> Callable[[str], AbstractContextManager[None]]:
    """Ranges that note their name, if it is one of `names`, and `mark()` at both ends."""

    @contextmanager
    def record(name: str) -> Iterator[None]:
        begin = mark()
        yield
        marks.append((name, begin, mark()))

    return lambda name: record(name) if name in names else nullcontext()


def _count(network: nn.Module, inputs: Sequence[Tensor], parts: Sequence[Part]) -> None:
    """FLOPs of every part's products, and bytes of its weights, inputs and outputs, in one pass of the references."""
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    started: dict[str, int] = {}

    def before(part: Part) -> Callable[..., None]:
        return lambda module, args, named: started.__setitem__(part.name, counter.get_total_flops())

    def after(part: Part) -> Callable[..., None]:
        def note(module: nn.Module, args: Any, named: Any, output: Any) -> None:
            tensors = [*module.parameters(), *_tensors((args, named, output))]
            moved = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            flops = counter.get_total_flops() - started[part.name]
            part.cost = Cost(part.cost.flops + flops, part.cost.bytes + moved)

        return note

    with _hooked(network, parts, before, after), snapgen_kernels.use("reference"), counter:
        models.run(network, inputs)


def _pass(network: nn.Module, inputs: Sequence[Tensor], parts: Sequence[Part], device: str, nvtx: bool) -> float:
    """One forward pass; every part's time is added to it, and the whole's is returned, in ms."""
    marks: list[tuple[Part, Any, Any]] = []
    open_: dict[str, tuple[Any, ExitStack]] = {}

    def before(part: Part) -> Callable[..., None]:
        def start(*_: Any) -> None:
            stack = ExitStack()
            if nvtx:
                stack.enter_context(snapgen_kernels.profile_range(part.name))
            open_[part.name] = (_mark(device), stack)

        return start

    def after(part: Part) -> Callable[..., None]:
        def stop(*_: Any) -> None:
            begin, stack = open_.pop(part.name)
            marks.append((part, begin, _mark(device)))
            stack.close()

        return stop

    with _hooked(network, parts, before, after):
        begin = _mark(device)
        models.run(network, inputs)
        end = _mark(device)
    if device == "cuda":
        torch.cuda.synchronize()
    spent: dict[str, float] = {}
    for part, start, stop in marks:  # a part may be called several times
        spent[part.name] = spent.get(part.name, 0.0) + _between(start, stop)
    for part in parts:
        if part.name in spent:
            part.times.append(spent[part.name])
    return _between(begin, end)


@contextmanager
def _hooked(
    network: nn.Module,
    parts: Sequence[Part],
    before: Callable[[Part], Callable[..., None]],
    after: Callable[[Part], Callable[..., None]],
) -> Iterator[None]:
    with ExitStack() as stack:
        for part in parts:
            module = network.get_submodule(part.name)
            stack.callback(module.register_forward_pre_hook(before(part), with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(after(part), with_kwargs=True).remove)
        yield


@contextmanager
def _ranges(ranges: bool | Callable[[str], AbstractContextManager[None]]) -> Iterator[None]:
    snapgen_kernels.profile_ranges(ranges)
    try:
        yield
    finally:
        snapgen_kernels.profile_ranges(False)


@contextmanager
def _mode(plain: bool) -> Iterator[None]:
    from bench.plain import plain as plainly

    with plainly() if plain else snapgen_kernels.use("auto"):
        yield


def _queueing(function: Callable[[], Any], device: str) -> Callable[[], None]:
    """Run ``function`` twice, for caches, workspaces and configs; returns what holds a GPU up until the processor has
    queued a call of it. Else a part's span would hold the time that its kernels take to be launched, which graphs
    spare."""
    for _ in range(2):
        function()
    if device != "cuda":
        return lambda: None
    torch.cuda.synchronize()
    begin = time.perf_counter()
    function()
    seconds = min(_LONGEST_HOLD, 1.5 * (time.perf_counter() - begin))
    torch.cuda.synchronize()
    return lambda: torch.cuda._sleep(int(seconds * _CYCLES))


def _mark(device: str) -> Any:
    if device != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(start: Any, stop: Any) -> float:
    return 1e3 * (stop - start) if isinstance(start, float) else start.elapsed_time(stop)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)


# ---- the table -------------------------------------------------------------------------------------------------------


def stage_of(name: str) -> str:
    """The stage of a part: ``down.0``, ``mid``, ``stages.3``, ``conv_in``."""
    first, *rest = name.split(".")
    return f"{first}.{rest[0]}" if rest and rest[0].isdigit() else first


def table(parts: Sequence[Part], whole: float, rates: limits.Limits, dtype: torch.dtype, by: str) -> tuple[Table, str]:
    """Rows by stage, op or part, the slowest above its floor first; and which that is."""
    rows: dict[str, tuple[float, float, int]] = {}
    for part in parts:
        key = {"stage": stage_of(part.name), "op": part.kind, "part": part.name}[by]
        spent, floor, calls = rows.get(key, (0.0, 0.0, 0))
        rows[key] = (spent + part.ms, floor + rates.floor_ms(part.cost, dtype), calls + 1)
    rows[REST] = (max(0.0, whole - sum(spent for spent, _, _ in rows.values())), 0.0, 0)
    kinds = {part.kind for part in parts}
    what = "training step" if "backward" in kinds else "call of the pipeline" if "decode" in kinds else "forward pass"
    title = f"{whole:.3f} ms a {what}"
    found = Table(box=box.SIMPLE_HEAD, padding=0, title=title, title_justify="left")
    for heading in (by, "parts", "ms", "share", "floor ms", "of its floor", "above it ms"):
        found.add_column(heading, justify="left" if heading == by else "right", no_wrap=True)
    ordered = sorted(rows.items(), key=lambda row: row[1][0] - row[1][1], reverse=True)
    for key, (spent, floor, calls) in ordered:
        ratio = f"{spent / floor:.2f}x" if floor else ""
        found.add_row(key, str(calls or ""), f"{spent:.3f}", f"{spent / whole:.1%}", f"{floor:.3f}", ratio,
                      f"{spent - floor:.3f}")  # fmt: skip
    (gap, (spent, floor, _)), *_ = ordered
    return found, f"next: {gap}, {spent - floor:.3f} ms above its floor ({(spent - floor) / whole:.0%} of the whole)"


def main(options: Stages, console: Console | None = None) -> int:
    """Measure and print. Exit codes: 0 done, 2 bad options."""
    console = console or Console(highlight=False)
    try:
        case = _case(options)
    except UsageError as error:
        console.print(f"[red]error:[/] {error}", soft_wrap=True)
        return 2
    rates = limits.measure(options.device, (options.dtype,))
    parts, whole = measure(case, options.rounds, plain=options.plain, nvtx=options.nvtx)
    found, gap = table(parts, whole, rates, case.dtype, options.by)
    console.print(found)
    console.print(gap, soft_wrap=True)
    if options.model == "picture":
        console.print(f"{1000 * options.batch / whole:.3g} pictures a second")
    models.release()
    return 0


def _case(options: Stages) -> ModelCase:
    from snapgen.config import PRESETS

    if options.preset not in PRESETS or "patch_size" in PRESETS[options.preset].denoiser:
        known = ", ".join(name for name, preset in PRESETS.items() if "patch_size" not in preset.denoiser)
        raise UsageError(f"--preset is {options.preset!r}; allowed: {known}")
    for name in ("side", "batch", "rounds"):
        if getattr(options, name) < 1:
            raise UsageError(f"--{name} is {getattr(options, name)}; it must be at least 1")
    unit = 1 << (len(PRESETS[options.preset].denoiser["channels"]) - 1)
    if options.side % unit and options.model != "decoder":
        raise UsageError(f"--side is {options.side}; the denoiser takes multiples of {unit}")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: PyTorch sees no CUDA or ROCm device")
    if options.nvtx:
        try:
            snapgen_kernels.profile_ranges(True)
        except ImportError as error:
            raise UsageError(f"--nvtx: {error}") from error
        snapgen_kernels.profile_ranges(False)
    tokens = models.TEXT_TOKENS if options.preset == "t2i-1024" else 77
    base = ModelCase(options.model, "stages", options.preset, options.side, batch=options.batch, tokens=tokens)
    return replace(base, dtype=DTYPES[options.dtype], device=options.device)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Stages, prog="python -m bench.stages")))
