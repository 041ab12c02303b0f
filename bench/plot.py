"""Pictures of measured rows: ``python -m bench.plot`` draws each file of bench/results as SVG and PNG.

Two pictures per machine: how many times as fast as the best peer each fused op is, and where it stands under the
machine's roofline.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from tyro.conf import Positional

from bench.machine import RESULTS
from bench.results import OURS, Comparison, Row, compare, read
from snapgen.io import whole_file

# Blue and orange stay apart for all kinds of colour vision; the dtypes keep theirs in every picture.
_COLOURS = {"fp32": "#3056c8", "bf16": "#e07b39", "fp16": "#3f9b6c"}
_MODES = ("fwd", "bwd", "fwd+bwd", "step")
# What is filled is ours.
_PROVIDERS = {
    "fused": "o",
    "fused-compile": "p",
    "fused-low": "d",
    "eager": "s",
    "eager-nchw": "D",
    "compile": "^",
    "compile-max": "v",
    "openvino": "P",
    "onnxruntime": "X",
}
_GREY = "#8a8d93"
_STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _GREY,
    "xtick.color": "#44474d",
    "ytick.color": "#44474d",
    "svg.hashsalt": "snapgen",  # the same rows give the same file
}


def overview(rows: Sequence[Row], path: Path) -> None:
    """Speed-ups and roofline side by side in one picture, written whole or not at all.

    Args:
        path: .png or .svg.
    """
    groups = _with_fused(rows)
    if not groups:
        _note(path, "No fused op was timed beside a peer")
        return
    figure, (left, right) = _figure(13, max(4.5, _height(groups)), columns=2)
    speedups(groups, left)
    roofline(groups, right)
    _save(figure, path, groups)


def pictures(rows: Sequence[Row], stem: Path) -> list[Path]:
    """``<stem>-speedup`` and ``<stem>-roofline``, each as .svg and .png; returns the paths."""
    groups = _with_fused(rows)
    written: list[Path] = []
    if not groups:
        return written
    for name, draw, size in (
        ("speedup", speedups, (7.5, max(3.0, _height(groups)))),
        ("roofline", roofline, (7.5, 5.0)),
    ):
        for suffix in (".svg", ".png"):
            figure, (axes,) = _figure(*size)
            draw(groups, axes)
            path = stem.with_name(f"{stem.name}-{name}{suffix}")
            _save(figure, path, groups)
            written.append(path)
    return written


def speedups(groups: Sequence[Comparison], axes: Any) -> None:
    """Bars: median of the best peer over the median of the fused op; one line for each op and case, bars by dtype and
    mode."""
    labels = list(dict.fromkeys((g.first.op, g.first.case) for g in groups))
    shown = _parts(groups)
    kinds = list(dict.fromkeys((g.first.dtype, g.first.mode) for g in shown))
    kinds.sort(key=lambda kind: (list(_COLOURS).index(kind[0]), _MODES.index(kind[1])))
    thickness = 0.8 / len(kinds)
    longest = max(g.speedup or 0 for g in shown)
    named: set[tuple[str, str]] = set()
    for group in shown:
        kind, gain = (group.first.dtype, group.first.mode), group.speedup or 0.0
        y = labels.index((group.first.op, group.first.case)) + (kinds.index(kind) - (len(kinds) - 1) / 2) * thickness
        axes.barh(
            y,
            gain,
            height=0.88 * thickness,
            color=_COLOURS[kind[0]],
            alpha=1.0 if kind[1] == "fwd" else 0.55,
            label=None if kind in named else f"{kind[0]} {kind[1]}",
        )
        named.add(kind)
        peer = group.best_peer
        text = f"{gain:.2f}×  {peer.provider if peer else ''}"
        behind = {"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.8}
        axes.text(gain + 0.01 * longest, y, text, va="center", fontsize=7, color="#44474d", bbox=behind)
    axes.axvline(1, color="#44474d", linewidth=0.8)
    axes.set_yticks(range(len(labels)), [f"{op}\n{case}" for op, case in labels])
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_xlim(0, 1.22 * max(longest, 1))
    axes.set_xlabel("times as fast as the best peer, which is named (1: equal)")
    axes.set_title("Fused ops against the best peer", loc="left", fontweight="bold")
    axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.11), ncols=4)


def roofline(groups: Sequence[Comparison], axes: Any) -> None:
    """Achieved GFLOP/s over FLOP/byte under the measured roofs: a point for every case and provider, ours filled and
    joined to the best peer's; a backward is paler."""
    groups = _parts(groups)
    intensities = [g.first.flops / g.first.bytes for g in groups]
    low, high = min(0.3, min(intensities) / 2), max(300.0, 2 * max(intensities))
    # Small cases stay in the caches: the slope is that of the largest case, which has to go to memory.
    copy = max((g.first for g in groups), key=lambda row: row.bytes).copy_gbs
    roofs: dict[float, list[str]] = {}  # a dtype without fast products of its own shares fp32's
    for dtype in dict.fromkeys(g.first.dtype for g in groups):
        roofs.setdefault(max(g.first.gemm_gflops for g in groups if g.first.dtype == dtype), []).append(dtype)
    for gemm, dtypes in roofs.items():
        ridge, colour = max(gemm / copy, low), _COLOURS[dtypes[0]] if len(dtypes) == 1 else _GREY
        axes.plot([low, ridge, high], [copy * low, gemm, gemm], color=colour, linewidth=1.2)
        text = f"{', '.join(dtypes)} products: {gemm:.0f} GFLOP/s"
        axes.text(1.25 * ridge, 0.94 * gemm, text, fontsize=7, color=colour, va="top")
    axes.text(low * 1.6, copy * low * 1.3, f"copies: {copy:.0f} GB/s", fontsize=7, color="#44474d", va="top")
    for group in groups:
        fused, peer = group.fused, group.best_peer
        assert fused is not None and peer is not None  # _with_fused
        x, colour = fused.flops / fused.bytes, _COLOURS[fused.dtype]
        strength = 0.5 if fused.mode == "bwd" else 1.0
        axes.plot([x, x], [peer.gflops, fused.gflops], color=colour, linewidth=0.7, alpha=0.5)
        for row in group.rows:
            if row.provider != fused.provider:
                axes.plot(
                    x,
                    row.gflops,
                    _PROVIDERS[row.provider],
                    markersize=3.5,
                    markerfacecolor="white",
                    markeredgecolor=colour,
                    markeredgewidth=0.6,
                    alpha=0.8 * strength,
                )
        axes.plot(x, fused.gflops, _PROVIDERS[fused.provider], markersize=5.5, color=colour, alpha=strength)
    _name_ops(groups, axes)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(low, high)
    axes.set_ylim(axes.get_ylim()[0] / 1.6)  # room for the lowest name
    axes.grid(which="major", color="#e6e7ea", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel("FLOP per byte that has to move")
    axes.set_ylabel("GFLOP/s")
    axes.set_title("Under this machine's roofline", loc="left", fontweight="bold")
    present = {row.provider for g in groups for row in g.rows}
    handles: list[Any] = []
    for name, marker in _PROVIDERS.items():
        if name in present:
            face = "#44474d" if name in OURS else "white"
            handles += axes.plot(
                [], [], marker, color="#44474d", markerfacecolor=face, linestyle="none", markersize=5, label=name
            )
    for dtype in dict.fromkeys(g.first.dtype for g in groups):
        handles += axes.plot([], [], "s", color=_COLOURS[dtype], linestyle="none", markersize=7, label=dtype)
    axes.legend(handles=handles, frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.11), ncols=6)


def _name_ops(groups: Sequence[Comparison], axes: Any) -> None:
    """The op's name once, below its lowest point."""
    for op in dict.fromkeys(g.first.op for g in groups):
        rows = [row for g in groups if g.first.op == op for row in (g.fused, g.best_peer) if row is not None]
        points = [(row.flops / row.bytes, row.gflops) for row in rows]
        x, y = min(points, key=lambda point: point[1])
        axes.annotate(op, (x, y), (0, -7), textcoords="offset points", ha="center", va="top", fontsize=7)


def _parts(groups: Sequence[Comparison]) -> list[Comparison]:
    """fwd and bwd; fwd+bwd is their sum and would say nothing new."""
    parts = [g for g in groups if g.first.mode != "fwd+bwd"]
    return parts or list(groups)


def _with_fused(rows: Sequence[Row]) -> list[Comparison]:
    return [group for group in compare(rows) if group.speedup is not None]


def _height(groups: Sequence[Comparison]) -> float:
    return 1.3 + 0.17 * len(_parts(groups))


def _figure(width: float, height: float, columns: int = 1) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with matplotlib.rc_context(_STYLE):
        figure, axes = pyplot.subplots(1, columns, figsize=(width, height), squeeze=False, layout="constrained")
    return figure, tuple(axes[0])


def _save(figure: Any, path: Path, groups: Sequence[Comparison]) -> None:
    from matplotlib import pyplot, rc_context

    first = groups[0].first
    figure.suptitle(
        f"{first.device}, {first.threads} threads, malloc {first.malloc}, torch {first.torch}, {first.date[:10]}",
        x=0.01,
        ha="left",
        fontsize=8,
        color="#44474d",
    )
    with whole_file(path) as temporary, rc_context(_STYLE):
        figure.savefig(temporary, dpi=160, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)


def _note(path: Path, text: str) -> None:
    from matplotlib import pyplot

    figure, (axes,) = _figure(6, 1.5)
    axes.axis("off")
    axes.text(0.5, 0.5, text, ha="center", va="center", color="#44474d")
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=160)
    pyplot.close(figure)


@dataclass(frozen=True)
class _Options:
    """Draw measured rows; pictures are named after machine, malloc and thread count."""

    files: Positional[tuple[Path, ...]] = ()
    """CSV files (default: all of bench/results)."""
    folder: Path | None = None
    """Where the pictures go (default: beside the CSV file)."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 where there is nothing to draw."""
    options = tyro.cli(_Options, args=arguments, prog="python -m bench.plot")
    files = options.files or tuple(sorted(RESULTS.glob("*.csv")))
    if not files:
        print(f"no rows in {RESULTS}: run `python -m bench` first", file=sys.stderr)
        return 2
    for file in files:
        rows = read(file)
        for malloc, threads in dict.fromkeys((row.malloc, row.threads) for row in rows):
            chosen = [row for row in rows if (row.malloc, row.threads) == (malloc, threads)]
            for path in pictures(chosen, (options.folder or file.parent) / f"{file.stem}-{malloc}-{threads}"):
                print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
