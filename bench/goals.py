"""What the kernels are meant to reach, on CPUs and on GPUs, beside what the latest rows say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench.results import OURS, Comparison, Row, compare

# A full-resolution tensor of the decoder's last width at 1024x1024, in elements.
_FULL_SIZE = 1024 * 1024 * 128
_BYTES = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True)
class Goal:
    """One figure of one case. ``kind`` is a key of ``_KINDS``; ``value`` is to be reached, or not to be passed
    where the kind is one of ``_AT_MOST``."""

    path: str
    op: str
    case: str
    dtype: str
    mode: str
    kind: str
    value: float


def _over(provider: str) -> Callable[[Comparison], float | None]:
    def ratio(group: Comparison) -> float | None:
        ours, peer = group.fused, group.of(provider)
        return None if ours is None or peer is None else peer.p50_ms / ours.p50_ms

    return ratio


def _floor(group: Comparison) -> float | None:
    return None if group.fused is None else group.fused.floor_ms / group.fused.p50_ms


def _copy(group: Comparison) -> float | None:
    return None if group.fused is None else group.fused.bytes / group.fused.p50_ms / 1e6 / group.fused.copy_gbs


def _share(group: Comparison) -> float | None:
    return None if group.fused is None else group.fused.share


def _memory(group: Comparison) -> float | None:
    ours, eager = group.fused, group.of("eager")
    if ours is None or eager is None or min(ours.peak_bytes, eager.peak_bytes) <= 0:
        return None
    return ours.peak_bytes / eager.peak_bytes


def _low_memory(group: Comparison) -> float | None:
    low = group.of("fused-low")
    return None if low is None else low.peak_bytes / (_FULL_SIZE * _BYTES[low.dtype])


def _time(group: Comparison) -> float | None:
    return None if group.fused is None else group.fused.p50_ms


def _low_memory_time(group: Comparison) -> float | None:
    ours, low = group.fused, group.of("fused-low")
    return None if ours is None or low is None else low.p50_ms / ours.p50_ms


# kind -> what it says of a value, how it is found, and which malloc a CPU's rows have to be of (a GPU's: any)
_KINDS: dict[str, tuple[str, Callable[[Comparison], float | None], str]] = {
    "share": ("{:.0%} of the matrix product's rate", _share, "tuned"),
    "peer": ("{:.2f}x the best peer", lambda group: group.speedup, "tuned"),
    "eager": ("{:.2f}x eager", _over("eager"), "tuned"),
    "compile": ("{:.2f}x torch.compile", _over("compile"), "tuned"),
    "stock": ("{:.2f}x eager, malloc as it comes", _over("eager"), "stock"),
    "compile-max": ("{:.2f}x torch.compile max-autotune", _over("compile-max"), "tuned"),
    "copy": ("{:.0%} of the copy bandwidth", _copy, "tuned"),
    "floor": ("{:.0%} of what copies and products allow", _floor, "tuned"),
    "saved": ("{:.2f}x eager's memory between forward and backward", _memory, "tuned"),
    "memory": ("{:.2f}x eager's peak memory", _memory, "tuned"),
    "low": ("low memory: {:.2f} full-size images", _low_memory, "tuned"),
    "low-time": ("low memory: {:.2f}x the time", _low_memory_time, "tuned"),
    "time": ("{:.2f} ms", _time, "tuned"),
}
_AT_MOST = ("saved", "memory", "low", "low-time", "time")


def _some(path: str, op: str, case: str, mode: str, dtypes: str, **kinds: float) -> list[Goal]:
    """A goal for each dtype and kind."""
    named = [(kind.replace("_", "-"), value) for kind, value in kinds.items()]
    return [Goal(path, op, case, dtype, mode, kind, value) for dtype in dtypes.split(",") for kind, value in named]


def _on_cpus() -> list[Goal]:
    found: list[Goal] = []
    block = "residual block, {} channels"
    found += _some(block.format(256), "resblock", "256ch-128", "fwd", "fp32", share=0.85)
    found += _some(block.format(256), "resblock", "256ch-128", "fwd", "bf16", share=0.78, peer=1.25)
    for channels, case in ((512, "512ch-64"), (896, "896ch-32")):
        found += _some(block.format(channels), "resblock", case, "fwd", "fp32", peer=1.0)
        found += _some(block.format(channels), "resblock", case, "fwd", "bf16", peer=1.1)
    found += _some(
        "attention, 14 heads, 1024 tokens", "attention", "self-14x64-1024", "fwd", "bf16", share=0.7, peer=2.0
    )
    for dtype, share in (("fp32", 0.75), ("bf16", 0.65)):
        decoder: dict[str, float] = dict(peer=1.4, stock=5.0, memory=1 / 3, low=1.3, low_time=1.35)
        found += _some("decoder, 1024x1024", "decoder", "1024px", "fwd", dtype, share=share, **decoder)
    found += _some("denoiser, one step", "denoiser", "t2i-128x128", "fwd", "fp32,bf16", share=0.8, peer=1.25)
    found += _some("training step, `tiny`", "train", "tiny-b64", "step", "fp32,bf16", eager=2.0, compile=1.4)
    found += _some(
        "training step, quarter width", "train", "t2i-quarter-b8", "step", "fp32,bf16", eager=2.0, compile=1.4
    )
    return found


def _on_gpus() -> list[Goal]:
    """Medians in bf16, channels_last, with cold caches."""
    found: list[Goal] = []
    for batch, case in ((1, "256ch-128"), (16, "256ch-128-b16")):
        path = f"GroupNorm + SiLU, 256 channels, batch {batch}, "
        found += _some(path + "forward", "group_norm_silu", case, "fwd", "bf16", compile_max=1.3, eager=4.0, copy=0.85)
        found += _some(path + "forward and backward", "group_norm_silu", case, "fwd+bwd", "bf16", peer=1.3)
    for channels, side, forward, both in ((256, 128, 1.7, 1.6), (512, 64, 1.3, 1.3), (896, 32, 1.15, 1.15)):
        case, path = f"{channels}ch-{side}-b8", f"residual block, {channels} channels, batch 8, "
        floor = {"floor": 0.7} if channels == 256 else {}
        found += _some(path + "forward", "resblock", case, "fwd", "bf16", peer=forward, **floor)
        found += _some(path + "forward and backward", "resblock", case, "fwd+bwd", "bf16", peer=both)
        found += _some(path + "training", "resblock", case, "bwd", "bf16", saved=0.5)
    return [*found, *_of_transformers(), *_of_models()]


def _of_transformers() -> list[Goal]:
    """The ops of the transformer blocks."""
    op, case, path = "qk_norm_rope", "self-14x64-1024-b16", "norm and rotation, 14 + 1 heads, 1024 tokens, batch 16, "
    found = _some(path + "forward", op, case, "fwd", "bf16", compile=1.3, copy=0.85)
    found += _some(path + "forward and backward", op, case, "fwd+bwd", "bf16", peer=1.3)
    for op, case, path, ratio in (
        ("attention", "self-14x64-1024-b16", "self-attention, 14 heads, 1024 tokens, batch 16, ", 1.25),
        ("attention", "cross-8x64-4096-333-b4", "cross-attention, 8 heads, 4096 tokens to 333, batch 4, ", 1.3),
        ("attention", "cross-4x64-16384-333-b4", "cross-attention, 4 heads, 16384 tokens to 333, batch 4, ", 1.3),
        ("geglu", "896-2688-1024-b16", "GEGLU, 896 to 2 x 2688 channels, 1024 tokens, batch 16, ", 1.1),
    ):
        found += _some(path + "forward", op, case, "fwd", "bf16", peer=ratio)
        found += _some(path + "forward and backward", op, case, "fwd+bwd", "bf16", peer=ratio)
    op, case, path = "transformer_block", "896ch-1024-b16", "transformer block, 896 channels, 1024 tokens, batch 16, "
    found += _some(path + "forward", op, case, "fwd", "bf16", peer=1.3)
    found += _some(path + "forward and backward", op, case, "fwd+bwd", "bf16", peer=1.25)
    return found


def _of_models() -> list[Goal]:
    """What a user waits for."""
    decoder: dict[str, float] = dict(compile_max=2.5, eager=5.0, time=3.0, memory=1 / 3)
    found = _some("decoder, 1024x1024", "decoder", "1024px", "fwd", "bf16", **decoder)
    found += _some("denoiser, one step with guidance", "denoiser", "t2i-128x128-b2", "fwd", "bf16", peer=1.5)
    found += _some("picture, 1024x1024 in 4 steps", "picture", "1024px-4", "fwd", "bf16", time=40.0)
    path = "training step, 128x128 latents, batch 8"
    found += _some(path, "train", "t2i-128x128-b8", "step", "bf16", compile=1.5, eager=2.0, memory=0.65)
    path = "training step, ImageNet at 256x256, batch 256"
    found += _some(path, "train", "imagenet-256-b256", "step", "bf16", compile=1.35)
    return found


CPU_GOALS, GPU_GOALS = _on_cpus(), _on_gpus()
_HEADER = ["| path | dtype | goal | measured | |", "|---|---|---|---|---|"]


def table(rows: Sequence[Row]) -> str:
    """Markdown: for every machine that has rows of these cases, each goal and the figure measured there."""
    return _tables(rows) or "No rows of these cases are recorded yet."


def gpu_table(rows: Sequence[Row]) -> str:
    """Markdown: :func:`table` of the GPUs; the goals alone where none has rows."""
    measured = _tables([row for row in rows if row.on_gpu])
    return measured or "\n".join([*_HEADER, *(_line(goal, None) for goal in GPU_GOALS)])


def _tables(rows: Sequence[Row]) -> str:
    return "\n\n".join(
        "\n".join([f"**{device}**", "", *_HEADER, *(_line(goal, _group(goal, groups)) for goal in _goals(groups))])
        for device, groups in _by_device(rows).items()
        if any(_value(goal, groups) is not None for goal in _goals(groups))
    )


def _by_device(rows: Sequence[Row]) -> dict[str, list[Comparison]]:
    found: dict[str, list[Comparison]] = {}
    for group in compare(rows):
        found.setdefault(group.first.device, []).append(group)
    return found


def _goals(groups: Sequence[Comparison]) -> list[Goal]:
    return GPU_GOALS if groups[0].first.on_gpu else CPU_GOALS


def _group(goal: Goal, groups: Sequence[Comparison]) -> Comparison | None:
    """The latest group that the goal is about."""
    malloc = _KINDS[goal.kind][2]
    wanted = (goal.op, goal.case, goal.dtype, goal.mode)
    fitting = [
        group
        for group in groups
        if (group.first.op, group.first.case, group.first.dtype, group.first.mode) == wanted
        and (group.first.on_gpu or group.first.malloc == malloc)
        and any(row.provider in OURS for row in group.rows)
    ]
    return max(fitting, key=lambda group: group.first.date, default=None)


def _value(goal: Goal, groups: Sequence[Comparison]) -> float | None:
    group = _group(goal, groups)
    return None if group is None else _KINDS[goal.kind][1](group)


def _line(goal: Goal, group: Comparison | None) -> str:
    text, find, _ = _KINDS[goal.kind]
    value = None if group is None else find(group)
    at_most = goal.kind in _AT_MOST
    measured, verdict = "", "not measured"
    if value is not None and group is not None:
        measured = text.format(value).removeprefix("low memory: ")
        if goal.kind == "peer":  # a best of few says less
            peers = (row.provider for row in group.rows if row.provider not in OURS)
            measured = measured.replace("the best peer", f"the best of {', '.join(peers)}")
        if group.fused is not None and group.fused.provider == "fused-compile" and not goal.kind.startswith("low"):
            measured += " (ours inside torch.compile)"
        reached = value <= goal.value if at_most else value >= goal.value
        measured, verdict = (f"**{measured}**", "reached") if reached else (measured, "missed")
    sign = "at most " if at_most else ""
    return f"| {goal.path} | {goal.dtype} | {sign}{text.format(goal.value)} | {measured} | {verdict} |"
