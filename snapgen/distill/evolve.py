"""Evolution of a denoiser's architecture by quality for each millisecond (SnapFusion, section 3.1, algorithm 1)."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from snapgen import io
from snapgen.distill.fusion_settings import EvolveConfig
from snapgen.distill.latency import LatencyTable
from snapgen.fusion_unet import FusionUNet
from snapgen.fusion_weights import edited

Quality = Callable[[FusionUNet], float]
Training = Callable[[FusionUNet, Path], FusionUNet]


@dataclass(frozen=True)
class Action:
    """Leaving a block out: what it does to quality and latency.

    Attributes:
        quality: of the net without the block.
        lost: quality lost by that; negative where the net is better without.
        saved: milliseconds saved by that.
        value: delta quality / delta latency = lost / saved (SnapFusion, algorithm 1).
    """

    block: str
    quality: float
    lost: float
    saved: float

    @property
    def value(self) -> float:
        return self.lost / self.saved


def choose(
    net: FusionUNet, actions: Mapping[str, Action], latency: float, config: EvolveConfig, *, last: bool
) -> tuple[str, list[str]]:
    """What a round does: ("drop", blocks), ("copy", blocks) or ("keep", []).

    While the latency is above the objective, the blocks of least value are dropped, up to a group of them, and no more
    than it takes. Once it is met, the blocks of greatest value are copied, in the last round only those that still fit.
    The paper has values of dropping alone measured, and copies by them; whether its copies carry weights it does not
    say, ours do.
    """
    order = sorted(actions.values(), key=lambda action: (action.value, action.block))
    chosen: list[str] = []
    if latency > config.latency:
        for action in order[: config.group]:
            if latency <= config.latency:
                break
            chosen.append(action.block)
            latency -= action.saved
        return "drop", chosen
    for action in reversed(order):
        fits = latency + action.saved <= config.latency
        if len(chosen) < config.group and net.places[action.block].repeatable and (fits or not last):
            chosen.append(action.block)
            latency += action.saved
    return ("copy", chosen) if chosen else ("keep", [])


def evolve(
    net: FusionUNet,
    *,
    quality: Quality,
    training: Training,
    table: LatencyTable,
    config: EvolveConfig,
    out: Path,
    record: Mapping[str, Any] | None = None,
    console: Console | None = None,
) -> FusionUNet:
    """Robust training, then evolution, for `rounds` rounds, then training once more; resumed by calling it again.

    Args:
        net: where it begins.
        quality: of a net, the higher the better; measured once for each block of each round.
        training: trains a net in a folder, to the end if it was begun there, and returns it.
        table: times of every kind of block.
        out: report.json (all rounds), round-01/ ... with training, values and the net that came out, final/.
        record: what else decides the result, for JSON; checked when resumed.

    Returns:
        The last round's net, trained.

    Raises:
        ValueError: `out` holds another evolution, or the table lacks a kind of block.
    """
    _claim(out, net, table, config, record or {})
    say = console.print if console is not None else lambda *_: None
    for number in range(1, config.rounds + 1):
        folder = out / f"round-{number:02d}"
        if not (folder / "round.json").is_file():
            net = training(net, folder / "training")
            found = _round(net, folder, quality, table, config, last=number == config.rounds)
            say(
                f"round {number} of {config.rounds}: quality {found['quality']:.3f} at {found['latency']:.2f} ms, "
                f"{found['action']} {', '.join(found['blocks']) or 'all'}"
            )
        net = _load(folder / "net")
    net = training(net, out / "final" / "training")
    final = {"quality": _remembered(out / "final" / "values.json", "", lambda: quality(net))}
    rounds = [io.read_json(out / f"round-{number:02d}" / "round.json") for number in range(1, config.rounds + 1)]
    latency = table.total(net)
    io.write_json(
        out / "report.json",
        {
            "objective": config.latency,
            "device": table.device,
            "rounds": rounds,
            "final": {**final, "latency": latency, "met": latency <= config.latency, "blocks": _blocks(net)},
        },
    )
    return net


def _round(
    net: FusionUNet, folder: Path, quality: Quality, table: LatencyTable, config: EvolveConfig, *, last: bool
) -> dict[str, Any]:
    """Measure every action, take a group of them, and leave the new net and what was found in `folder`."""
    values = folder / "values.json"
    base = _remembered(values, "", lambda: quality(net))
    actions = {}
    for name, place in net.places.items():
        if place.skippable:
            without = _remembered(values, name, lambda name=name: _without(net, name, quality))  # type: ignore[misc]
            saved = table.block(net, name)
            if saved <= 0:
                raise ValueError(f"table: says that {name} takes {saved} ms; must be more than 0")
            actions[name] = Action(name, without, base - without, saved)
    latency = table.total(net)
    action, chosen = choose(net, actions, latency, config, last=last)
    new = edited(net, drop=chosen if action == "drop" else (), copy=chosen if action == "copy" else ())
    with io.whole_directory(folder / "net") as temporary:
        new.save_pretrained(temporary)
    found = {
        "quality": base,
        "latency": latency,
        "met": latency <= config.latency,
        "action": action,
        "blocks": chosen,
        "latency_after": table.total(new),
        "values": {
            name: {"quality": a.quality, "lost": a.lost, "milliseconds": a.saved, "value": a.value}
            for name, a in actions.items()
        },
        "net": _blocks(net),
    }
    io.write_json(folder / "round.json", found)
    return found


def _without(net: FusionUNet, name: str, quality: Quality) -> float:
    with net.without([name]):
        return quality(net)


def _remembered(path: Path, name: str, measure: Callable[[], float]) -> float:
    """A quality that was measured before an interruption, or is measured now. The whole net's name is ""."""
    known = io.read_json(path) if path.is_file() else {}
    if name not in known:
        known[name] = float(measure())
        io.write_json(path, known)
    return known[name]


def _load(folder: Path) -> FusionUNet:
    net = FusionUNet(**{k: v for k, v in io.read_json(folder / "config.json").items() if not k.startswith("_")})
    file = folder / "diffusion_pytorch_model.safetensors"
    io.load_strictly(net, io.load_tensors(file), file, "the net that its config.json describes")
    return net


def _blocks(net: FusionUNet) -> dict[str, Any]:
    return {name: net.config[name] for name in ("down", "mid", "up")}


def _claim(out: Path, net: FusionUNet, table: LatencyTable, config: EvolveConfig, record: Mapping[str, Any]) -> None:
    """Record what this evolution is, or check that `out` holds the same one."""
    own = {**dataclasses.asdict(config), "net": _blocks(net), "milliseconds": table.milliseconds, **record}
    own = json.loads(json.dumps(own))
    path = out / "config.json"
    if not path.exists():
        io.write_json(path, own)
        return
    there = io.read_json(path)
    differences = [name for name in sorted(own.keys() | there.keys()) if own.get(name) != there.get(name)]
    if differences:
        raise ValueError(f"{out} holds another evolution ({', '.join(differences)} differ); choose another directory")
