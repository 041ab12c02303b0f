"""What the CPU kernels are meant to reach, beside what the latest rows say."""

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


def _share(group: Comparison) -> float | None:
    return None if group.fused is None else group.fused.share


def _memory(group: Comparison) -> float | None:
    ours, eager = group.fused, group.of("eager")
    return None if ours is None or eager is None else ours.peak_bytes / eager.peak_bytes


def _low_memory(group: Comparison) -> float | None:
    low = group.of("fused-low")
    return None if low is None else low.peak_bytes / (_FULL_SIZE * _BYTES[low.dtype])


def _low_memory_time(group: Comparison) -> float | None:
    ours, low = group.fused, group.of("fused-low")
    return None if ours is None or low is None else low.p50_ms / ours.p50_ms


# kind -> what it says of a value, how it is found, whether in the rows taken with a stock malloc
_KINDS: dict[str, tuple[str, Callable[[Comparison], float | None], str]] = {
    "share": ("{:.0%} of the matrix product's rate", _share, "tuned"),
    "peer": ("{:.2f}x the best peer", lambda group: group.speedup, "tuned"),
    "eager": ("{:.2f}x eager", _over("eager"), "tuned"),
    "compile": ("{:.2f}x torch.compile", _over("compile"), "tuned"),
    "stock": ("{:.2f}x eager, malloc as it comes", _over("eager"), "stock"),
    "memory": ("{:.2f}x eager's peak memory", _memory, "tuned"),
    "low": ("low memory: {:.2f} full-size images", _low_memory, "tuned"),
    "low-time": ("low memory: {:.2f}x the time", _low_memory_time, "tuned"),
}
_AT_MOST = ("memory", "low", "low-time")


def _goals() -> list[Goal]:
    found: list[Goal] = []

    def add(path: str, op: str, case: str, mode: str, dtypes: str, **kinds: float) -> None:
        for dtype in dtypes.split(","):
            found.extend(Goal(path, op, case, dtype, mode, kind.replace("_", "-"), v) for kind, v in kinds.items())

    block = "residual block, {} channels"
    add(block.format(256), "resblock", "256ch-128", "fwd", "fp32", share=0.85)
    add(block.format(256), "resblock", "256ch-128", "fwd", "bf16", share=0.78, peer=1.25)
    for channels, case in ((512, "512ch-64"), (896, "896ch-32")):
        add(block.format(channels), "resblock", case, "fwd", "fp32", peer=1.0)
        add(block.format(channels), "resblock", case, "fwd", "bf16", peer=1.1)
    add("attention, 14 heads, 1024 tokens", "attention", "self-14x64-1024", "fwd", "bf16", share=0.7, peer=2.0)
    for dtype, share in (("fp32", 0.75), ("bf16", 0.65)):
        add("decoder, 1024x1024", "decoder", "1024px", "fwd", dtype, share=share, peer=1.4, stock=5.0, memory=1 / 3,
            low=1.3, low_time=1.35)  # fmt: skip
    add("denoiser, one step", "denoiser", "t2i-128x128", "fwd", "fp32,bf16", share=0.8, peer=1.25)
    add("training step, `tiny`", "train", "tiny-b64", "step", "fp32,bf16", eager=2.0, compile=1.4)
    add("training step, quarter width", "train", "t2i-quarter-b8", "step", "fp32,bf16", eager=2.0, compile=1.4)
    return found


GOALS: tuple[Goal, ...] = tuple(_goals())


def table(rows: Sequence[Row]) -> str:
    """Markdown: for every machine that has rows of these cases, each goal and the figure measured there."""
    groups = compare(rows)
    parts: list[str] = []
    for device in dict.fromkeys(group.first.device for group in groups):
        mine = {
            (g.first.op, g.first.case, g.first.dtype, g.first.mode, g.first.malloc): g
            for g in groups
            if g.first.device == device and any(row.provider in OURS for row in g.rows)
        }
        lines, some = [], False
        for goal in GOALS:
            text, find, malloc = _KINDS[goal.kind]
            group = mine.get((goal.op, goal.case, goal.dtype, goal.mode, malloc))
            value = None if group is None else find(group)
            sign = "at most " if goal.kind in _AT_MOST else ""
            measured, verdict = "", "not measured"
            if value is not None:
                reached = value <= goal.value if goal.kind in _AT_MOST else value >= goal.value
                some = True
                text_of_value = text.format(value).removeprefix("low memory: ")
                if goal.kind == "peer" and group is not None:  # a best of few says less
                    peers = (row.provider for row in group.rows if row.provider not in OURS)
                    text_of_value = text_of_value.replace("the best peer", f"the best of {', '.join(peers)}")
                measured, verdict = (f"**{text_of_value}**", "reached") if reached else (text_of_value, "missed")
            lines.append(f"| {goal.path} | {goal.dtype} | {sign}{text.format(goal.value)} | {measured} | {verdict} |")
        if some:
            header = ["| path | dtype | goal | measured | |", "|---|---|---|---|---|"]
            parts.append("\n".join([f"**{device}**", "", *header, *lines]))
    return "\n\n".join(parts) or "No rows of these cases are recorded yet."
