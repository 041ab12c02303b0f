"""What a preset weighs and costs, the ablation ladder, and what this machine can run.

Counts come from the module itself, instantiated without memory on the meta device: parameters by `numel`,
multiply-accumulates from the shapes of every matrix product and convolution that one forward runs.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from snapgen.config import LADDER, PRESETS, Preset, get_preset

TEXT_TOKENS = 77  # context length at which the denoiser's MACs are counted, as CLIP's


@dataclass(frozen=True)
class Count:
    """Parameters, and multiply-accumulates of one forward at batch 1."""

    params: int
    macs: int


def count(module: nn.Module, *args: Any, **kwargs: Any) -> dict[str, Count]:
    """Counts of `module` (on the meta device) and of each part, by name; "" is the whole.

    Args:
        args, kwargs: what its forward takes, on the meta device.
    """
    import snapgen_kernels

    # The fused ops are opaque to the counter; their references are plain matrix products and convolutions.
    with snapgen_kernels.use("reference"), FlopCounterMode(display=False, depth=99) as counter, torch.no_grad():
        module(*args, **kwargs)
    flops = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    root = type(module).__name__

    def macs(name: str, part: nn.Module) -> int:
        if f"{root}.{name}" in flops:
            return flops[f"{root}.{name}"] // 2
        # A container that is never called itself, such as a ModuleList.
        return sum(macs(f"{name}.{child_name}", child) for child_name, child in part.named_children())

    counts = {"": Count(sum(p.numel() for p in module.parameters()), flops.get("Global", 0) // 2)}
    for name, part in module.named_modules():
        if name:
            counts[name] = Count(sum(p.numel() for p in part.parameters()), macs(name, part))
    return counts


def denoiser_counts(flags: dict[str, Any], latent: int | None = None) -> dict[str, Count]:
    """Counts of a denoiser with constructor arguments `flags` at a square latent of side `latent`."""
    from snapgen.mmdit import make_denoiser

    with torch.device("meta"):
        model: Any = make_denoiser(flags)
        config = model.config
        side = latent or config.sample_size
        pooled = None if config.pooled_dim is None else torch.empty(1, config.pooled_dim)
        return count(
            model,
            torch.empty(1, config.in_channels, side, side),
            torch.zeros(1),
            torch.empty(1, getattr(config, "context_tokens", TEXT_TOKENS), config.context_dim),
            pooled_projections=pooled,
        )


def decoder_counts(preset: Preset) -> dict[str, Count]:
    """Counts of a preset's decoder at its resolution."""
    from snapgen.decoder import TinyDecoder

    with torch.device("meta"):
        model = TinyDecoder(**preset.decoder)
        side = preset.resolution // model.upscale
        return count(model, torch.empty(1, model.config.latent_channels, side, side))


def ladder() -> list[dict[str, Any]]:
    """The ablation ladder on the ImageNet preset at a 128x128 latent, beside the published relative changes.

    Each row: step, params, macs, and for steps with published figures `published` and `ours`, both relative changes
    against the same earlier step.
    """
    flags = dict(PRESETS["imagenet-256"].denoiser)
    rows: list[dict[str, Any]] = []
    for rung in LADDER:
        flags.update(rung["flags"])
        whole = denoiser_counts(flags, 128)[""]
        row: dict[str, Any] = dict(step=rung["step"], params=whole.params, macs=whole.macs)
        if "published" in rung:
            base = rows[rung["published"]["against"]]
            published = {key: value for key, value in rung["published"].items() if key != "against"}
            row["published"] = published
            row["ours"] = {key: row[key] / base[key] - 1 for key in published}
            row["against"] = base["step"]
        rows.append(row)
    return rows


def print_presets(console: Console) -> None:
    """Every preset's name and what it is."""
    from snapgen.fusion_presets import FUSION_PRESETS

    for heading, presets in (("SnapGen", PRESETS), ("SnapFusion (snapgen fusion)", FUSION_PRESETS)):
        table = Table(title=heading, show_header=False, title_justify="left", box=None)
        for preset in presets.values():
            table.add_row(f"[bold]{preset.name}[/]", preset.about)
        console.print(table)


def print_preset(name: str, console: Console) -> None:
    """Parameters and MACs of each stage of a preset's denoiser and decoder."""
    from snapgen.fusion_presets import FUSION_PRESETS, fusion_counts

    preset = FUSION_PRESETS[name] if name in FUSION_PRESETS else get_preset(name)
    console.print(f"[bold]{preset.name}[/]: {preset.about}")
    denoiser = (fusion_counts if name in FUSION_PRESETS else denoiser_counts)(preset.denoiser)
    side = preset.denoiser["sample_size"]
    console.print(_table(f"denoiser, latent {side}x{side}x{preset.denoiser['in_channels']}", denoiser, "down up mid"))
    decoder = decoder_counts(preset)
    console.print(_table(f"decoder, {preset.resolution}x{preset.resolution}", decoder, "stages upsamplers"))
    for what, target, own in (
        ("parameters", preset.target_params, denoiser[""].params),
        ("MACs", preset.target_macs, denoiser[""].macs),
    ):
        if target:
            console.print(f"published {what} of the denoiser: {si(target)}; ours {own / target - 1:+.2%}")


def print_ladder(console: Console) -> None:
    """The ablation ladder beside the published deltas."""
    table = Table(title="Ablation ladder, latent 128x128, context 768")
    for heading in ("step", "params", "MACs", "against", "ours", "published"):
        table.add_column(heading, justify="left" if heading in ("step", "against") else "right")
    for row in ladder():
        ours = ", ".join(f"{key} {value:+.1%}" for key, value in row.get("ours", {}).items())
        published = ", ".join(f"{key} {value:+.0%}" for key, value in row.get("published", {}).items())
        table.add_row(
            row["step"], si(row["params"]), si(row["macs"]), row.get("against", ""), ours, published or "not given"
        )
    console.print(table)


def machine() -> dict[str, str]:
    """Processor, threads, GPU and the versions of what matters here, by name."""
    packages = ("snapgen", "torch", "triton", "diffusers", "transformers", "safetensors", "coremltools", "numpy")
    return {
        "processor": _processor(),
        "threads": str(torch.get_num_threads()),
        "GPU": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "python": platform.python_version(),
        **{package: _version(package) for package in packages},
    }


def print_device(console: Console) -> None:
    """Versions, and which kernels are usable here or why not."""
    import snapgen_kernels

    table = Table(title="This machine", show_header=False)
    for name, value in machine().items():
        table.add_row(name, value)
    console.print(table)
    found = snapgen_kernels.backends()
    kernels = Table(title=f"Kernels (mode {found['mode']})")
    for heading in ("backend", "usable", "which, or why not"):
        kernels.add_column(heading)
    for name, which in (("cpp", "variant"), ("triton", "version"), ("cuda", "device")):
        status = found[name]
        kernels.add_row(
            name, "yes" if status["available"] else "no", str(status.get(which) or status.get("reason") or "")
        )
    console.print(kernels)
    ops = Table(title="What each op runs on")
    for heading in ("op", "cpu", "cuda"):
        ops.add_column(heading)
    for op, devices in found["ops"].items():
        ops.add_row(op, devices["cpu"], devices["cuda"])
    console.print(ops)


def _table(title: str, counts: dict[str, Count], groups: str) -> Table:
    table = Table(title=title)
    table.add_column("stage")
    table.add_column("params", justify="right")
    table.add_column("MACs", justify="right")
    lists = groups.split()
    for name, part in counts.items():
        # One line per entry of a module list, and per other direct child.
        depth = name.count(".")
        inside_list = depth == 1 and name.split(".")[0] in lists and name.split(".")[1].isdigit()
        top = depth == 0 and name and not any(other.startswith(f"{name}.0") for other in counts if name in lists)
        if inside_list or (top and part.params):
            table.add_row(name, si(part.params), si(part.macs))
    table.add_section()
    table.add_row("all", si(counts[""].params), si(counts[""].macs))
    return table


def si(value: float) -> str:
    """A count with a decimal prefix: 1.38M."""
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:.2f}{name}"
    return f"{value:.0f}"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except FileNotFoundError:
        pass
    return platform.processor() or platform.machine()
