"""`snapgen`: draw, train, inspect, evaluate and export from the command line."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.markup import escape
from tyro.conf import OmitArgPrefixes, Positional, arg

from snapgen.export.options import COREAI_DEFAULTS, DEFAULTS, CoreAIOptions, Options
from snapgen.settings import Source, TrainConfig

console = Console()
ABOUT = "SnapGen: text to pictures, small enough for a phone."
PICTURES = (".png", ".jpg", ".jpeg", ".webp")


def generate(
    prompt: Positional[tuple[str, ...]],
    *,
    out: Annotated[Path, arg(aliases=["-o"])] = Path("out.png"),
    checkpoint: str = "tiny",
    steps: int | None = None,
    guidance: float | None = None,
    seed: int = 0,
    count: int = 1,
    height: int | None = None,
    width: int | None = None,
    low_memory: bool = False,
    packages: Path | None = None,
) -> None:
    """Draw pictures from prompts.

    Args:
        prompt: What to draw; several prompts give a grid.
        out: Picture file to write (.png, .jpg, .webp).
        checkpoint: A folder saved by training or by diffusers, or the name of a shipped one.
        steps: Euler steps; by default the checkpoint's own (tiny: 28, tiny-4: 4).
        guidance: Classifier-free guidance scale; 1 turns it off. By default the checkpoint's own.
        seed: Same seed, same picture.
        count: Pictures for each prompt.
        height: Pixels; by default what the model was trained at.
        width: Pixels; by default what the model was trained at.
        low_memory: Decode in less memory, for large pictures on small machines.
        packages: A folder of Core ML packages of this checkpoint, run by the interpreter in the networks' place.
    """
    import torch

    from snapgen import io
    from snapgen.pictures import save_grid
    from snapgen.pipeline import load

    # Before any drawing, which a mistake here would throw away.
    if out.suffix.lower() not in PICTURES:
        raise ValueError(f"out: got {out}; a picture's name ends in {', '.join(PICTURES)}")
    if out.is_dir():
        raise ValueError(f"out: {out} is a folder; name a picture file")
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed: got {seed}; must fit into 64 bits")
    pipe = load(checkpoint)
    if packages is not None:
        from snapgen.export.runner import packaged_pipeline

        pipe = packaged_pipeline(pipe, packages)
    pictures = pipe(
        list(prompt),
        num_inference_steps=steps,
        guidance_scale=guidance,
        num_images_per_prompt=count,
        generator=torch.Generator().manual_seed(seed),
        height=height,
        width=width,
        low_memory=low_memory or None,
    ).images
    if len(pictures) == 1:
        with io.whole_file(out) as temporary:
            pictures[0].save(temporary)
    else:
        captions = [text for text in prompt for _ in range(count)]
        save_grid(pictures, out, captions=captions, size=max(128, pictures[0].width))
    console.print(f"wrote {out} ({len(pictures)} of {pictures[0].width}x{pictures[0].height} pixels)")


def train(
    *,
    out: Annotated[Path, arg(aliases=["-o"])],
    source: OmitArgPrefixes[Source] = Source(),  # noqa: B008 - frozen
    config: OmitArgPrefixes[TrainConfig] = TrainConfig(),  # noqa: B008 - frozen
    dry_run: bool = False,
) -> None:
    """Train a denoiser, and with `tiny` its text encoder. Run the same command again to resume.

    On several GPUs: torchrun --nproc-per-node 8 -m snapgen train ...

    Args:
        out: The run's folder: checkpoints, sample grids, TensorBoard, and at the end export/ for `snapgen generate`.
        source: What to train, and on what.
        config: How to train.
        dry_run: Only say what would be done, with parameters and an estimate of memory.
    """
    if dry_run:
        from snapgen.plan import print_plan

        print_plan(source, config, console)
        return
    from snapgen.runs import train_denoiser

    exported = train_denoiser(source, config, out, console)
    console.print(f"trained; wrote {exported}")


def train_autoencoder(
    *,
    out: Annotated[Path, arg(aliases=["-o"])],
    preset: str = "tiny",
    data: str = "shapes",
    config: OmitArgPrefixes[TrainConfig] = TrainConfig(),  # noqa: B008
) -> None:
    """Train the encoder and decoder of a preset whose latents are its own. Run the same command again to resume.

    Args:
        out: The run's folder.
        preset: Which model.
        data: "shapes", a folder of pictures and captions, or WebDataset shards (.tar).
        config: How to train.
    """
    from snapgen.runs import train_autoencoder as run

    exported = run(preset, data, config, out, console)
    console.print(f"trained; use it with: snapgen train --autoencoder {exported} -o ...")


def info(*, preset: str | None = None, ladder: bool = False, device: bool = False) -> None:
    """Parameters and MACs of a preset, the ablation ladder, or what this machine can run.

    Args:
        preset: Count this preset, stage by stage.
        ladder: The ablation ladder beside the published changes.
        device: Versions, usable kernels, and why one is not.
    """
    from snapgen import info as pages

    if preset is not None:
        pages.print_preset(preset, console)
    if ladder:
        pages.print_ladder(console)
    if device:
        pages.print_device(console)
    if preset is None and not ladder and not device:
        pages.print_presets(console)
        console.print("more: snapgen info --preset NAME, --ladder, --device")


def evaluate(
    checkpoint: Positional[str] = "tiny",
    *,
    steps: tuple[int, ...] = (),
    guidance: float | None = None,
    per_skill: int = 50,
    seed: int = 0,
    untrained: bool = False,
    packages: Path | None = None,
    out: Annotated[Path | None, arg(aliases=["-o"])] = None,
) -> None:
    """Score a checkpoint on captions of the shapes world that training never showed.

    Args:
        checkpoint: A folder, or the name of a shipped one.
        steps: Numbers of Euler steps to score; by default 28 and 4, of a step-distilled checkpoint its own.
        guidance: Classifier-free guidance scale; by default the checkpoint's own.
        per_skill: Captions for each of the six skills.
        seed: Decides captions and noise.
        untrained: Also score the same model with fresh weights.
        packages: Also score the Core ML packages in this folder, run by the interpreter, which is slow.
        out: Also write the scores here as JSON.
    """
    from snapgen import evaluate as evaluation
    from snapgen import io
    from snapgen.pipeline import load

    pipe = load(checkpoint)
    guidance = pipe.config.guidance if guidance is None else guidance
    steps = steps or ((28, 4) if pipe.config.steps == 28 else (pipe.config.steps,))
    contenders = {"": pipe}
    if untrained:
        contenders["untrained, "] = evaluation.untrained(pipe, seed)
    if packages is not None:
        from snapgen.export.runner import packaged_pipeline

        contenders["packages, "] = packaged_pipeline(pipe, packages)
    scores = {
        f"{who}{count} steps": evaluation.score_shapes(
            contender, steps=count, guidance=guidance, per_skill=per_skill, seed=seed, console=console
        )
        for who, contender in contenders.items()
        for count in steps
    }
    evaluation.print_scores(scores, console)
    if out is not None:
        io.write_json(out, scores)


def export_coreml(
    checkpoint: Positional[str | None] = None,
    *,
    preset: str | None = None,
    out: Annotated[Path, arg(aliases=["-o"])] = Path("out/coreml"),
    options: OmitArgPrefixes[Options] = DEFAULTS,
) -> None:
    """Core ML packages of a checkpoint, checked against PyTorch before anything is kept.

    Args:
        checkpoint: A folder, or the name of a shipped one ("tiny").
        preset: Without a checkpoint: export this preset with random weights, to see sizes and speed on a phone.
        out: Folder for the .mlpackage files.
        options: What to export, and for what.
    """
    from snapgen.export.command import main_coreml

    main_coreml(checkpoint, out, options, preset)


def export_verify(
    folder: Positional[Path],
    *,
    out: Annotated[Path | None, arg(aliases=["-o"])] = None,
    units: tuple[Literal["CPU_ONLY", "CPU_AND_GPU", "CPU_AND_NE", "ALL"], ...] = (
        "CPU_ONLY",
        "CPU_AND_GPU",
        "CPU_AND_NE",
        "ALL",
    ),
    repeats: int = 20,
    timeout: float = 900.0,
) -> None:
    """Check an export by the golden calls that travel with it; on a Mac by Core ML itself. Exit code 2 if it fails.

    Args:
        folder: What `snapgen export coreml` wrote.
        out: Also write what was found here as JSON (Verify.json).
        units: Compute units that Core ML is run on.
        repeats: Timed predictions of each package.
        timeout: Seconds that one function may take on one compute unit.
    """
    from snapgen.export.verify import main_verify

    main_verify(folder, out=out, units=units, repeats=repeats, timeout=timeout)


def export_coreai(
    checkpoint: Positional[str] = "tiny",
    *,
    out: Annotated[Path, arg(aliases=["-o"])] = Path("out/coreai"),
    options: OmitArgPrefixes[CoreAIOptions] = COREAI_DEFAULTS,
) -> None:
    """Core AI assets (iOS 27) of a checkpoint, checked against PyTorch before anything is kept.

    Args:
        checkpoint: A folder, or the name of a shipped one.
        out: Folder for the .aimodel assets.
        options: What to export, and how far to check it.
    """
    from snapgen.export.coreai import main_coreai

    main_coreai(checkpoint, out, options)


def export_audit(
    paths: Positional[tuple[Path, ...]],
    *,
    out: Annotated[Path | None, arg(aliases=["-o"])] = None,
    json: Path | None = None,
    phone: str | None = None,
    strict: bool = False,
) -> None:
    """What the Neural Engine may run of any .mlpackage, what not and why, and what it costs there.

    Args:
        paths: Packages, or folders that hold some; of whatever origin.
        out: HTML page to write.
        json: JSON file to write, with every operation.
        phone: Estimate for this device only ("iPhone 14 Pro", "M2", ...).
        strict: Exit code 2 where an operation falls back by a published rule.
    """
    from snapgen.export.audit_page import main_audit

    if main_audit(paths, out, json, phone, strict, console):
        sys.exit(2)


def export_compare(
    package: Positional[Path],
    checkpoint: Positional[str] = "tiny",
    *,
    case: int = 0,
    out: Annotated[Path | None, arg(aliases=["-o"])] = None,
    options: OmitArgPrefixes[Options] = DEFAULTS,
) -> None:
    """At which layer a package's numbers leave the checkpoint's: every layer, run here, against PyTorch in fp32.

    Args:
        package: An .mlpackage of `snapgen export`.
        checkpoint: What it was exported from: a folder, or the name of a shipped one.
        case: Which of the test cases (times of the denoiser, captions), from 0.
        out: Also write the report here as JSON.
        options: As the package was exported with.
    """
    from snapgen.export.divergence import main_compare

    main_compare(package, checkpoint, out, options, case, console)


def demo(*, out: Annotated[Path, arg(aliases=["-o"])] = Path("out"), per_skill: int = 25) -> None:
    """Draw, score, time, export, and write it all to one report.html.

    Args:
        out: Folder to write to.
        per_skill: Captions for each of the six skills when scoring.
    """
    from snapgen.demo import run

    run(out, per_skill=per_skill, console=console)


COMMANDS: dict[str, Any] = {
    "generate": generate,
    "demo": demo,
    "info": info,
    "train": train,
    "train-autoencoder": train_autoencoder,
}


# Groups have commands of their own, loaded when one of them is asked for; the functions stand for them in the list.


def cache() -> None:
    """Compute latents and embedded captions of a dataset once (snapgen cache --help)."""


def distill() -> None:
    """Learn from a teacher, or to draw in few steps (snapgen distill --help)."""


def fusion() -> None:
    """SnapFusion: train, distil, evolve (snapgen fusion --help)."""


def decoder() -> None:
    """Train, distil or prune a decoder (snapgen decoder --help)."""


def evaluations() -> None:
    """Score a checkpoint: shapes, clip, fid, geneval, dpg, decoder, digits (snapgen eval --help)."""


def export() -> None:
    """Export a checkpoint for phones (snapgen export --help)."""


def _distill() -> dict[str, Any]:
    from snapgen.distill.command import COMMANDS

    return COMMANDS


def _fusion() -> dict[str, Any]:
    from snapgen.distill import fusion_command as commands

    return {
        "train": commands.train_fusion,
        "distill": commands.distill_fusion,
        "evolve": commands.evolve,
        "import": commands.import_sd,
    }


def _decoder() -> dict[str, Any]:
    from snapgen.distill import fusion_command as commands

    return {
        "train": commands.train_decoder,
        "distill": commands.distill_decoder,
        "prune": commands.prune_decoder,
    }


def _evaluations() -> dict[str, Any]:
    from snapgen.metrics import command as metrics

    return {
        "shapes": evaluate,
        "digits": metrics.main_digits,
        "clip": metrics.main_clip,
        "fid": metrics.main_fid,
        "geneval": metrics.main_geneval,
        "dpg": metrics.main_dpg,
        "decoder": metrics.main_decoder,
    }


def _exports() -> dict[str, Any]:
    return {
        "coreml": export_coreml,
        "verify": export_verify,
        "coreai": export_coreai,
        "audit": export_audit,
        "compare": export_compare,
    }


def _cache() -> Any:
    from snapgen.data.command import main_cache

    return main_cache


# What each group's first word is in the list, what it is about, and its commands.
GROUPS: dict[str, tuple[Any, str, Any]] = {
    "cache": (cache, "", _cache),
    "distill": (distill, "Teach a denoiser by another's knowledge, or to draw in few steps.", _distill),
    "fusion": (fusion, "SnapFusion: its denoiser trained, distilled into fewer steps, and evolved.", _fusion),
    "decoder": (decoder, "Decoders: trained on pictures, distilled from prompts, pruned.", _decoder),
    "eval": (evaluations, "Score a checkpoint, a decoder or pictures.", _evaluations),
    "export": (export, "Export a checkpoint for phones, and look into what was exported.", _exports),
}


def _run(arguments: list[str]) -> None:
    group = arguments[0] if arguments and arguments[0] in GROUPS else None
    if group is None:
        listed = COMMANDS | {name: stand_in for name, (stand_in, _, _) in GROUPS.items()}
        tyro.extras.subcommand_cli_from_dict(listed, prog="snapgen", description=ABOUT, args=arguments)
        return
    _, about, load = GROUPS[group]
    commands, rest = load(), arguments[1:]
    if not isinstance(commands, dict):
        tyro.cli(commands, prog=f"snapgen {group}", args=rest)
        return
    if group == "eval" and (not rest or rest[0] not in (*commands, "-h", "--help")):
        rest = ["shapes", *rest]  # the usual one
    tyro.extras.subcommand_cli_from_dict(commands, prog=f"snapgen {group}", description=about, args=rest)


def main(argv: list[str] | None = None) -> None:
    """Entry point: run a command; a mistake of the user's gives one line and exit code 2."""
    # Progress bars of the libraries we call would tear ours; their warnings about the hub do not concern local files.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.showwarning = _show_warning  # type: ignore[assignment]
    try:
        _run(sys.argv[1:] if argv is None else argv)
    except KeyboardInterrupt as interrupt:
        console.print(f"[yellow]{interrupt or 'stopped'}[/]")
        sys.exit(130)
    except (ValueError, OSError, FloatingPointError) as error:
        console.print(f"[red]error:[/] {escape(str(error))}", soft_wrap=True)
        sys.exit(2)


def _show_warning(message: Any, category: type[Warning], *_: Any) -> None:
    # Ours speak to the user; the libraries' deprecations do not.
    if category.__module__.startswith("snapgen"):
        console.print(f"[yellow]note:[/] {escape(str(message))}", soft_wrap=True)


if __name__ == "__main__":
    main()
