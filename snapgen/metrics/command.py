"""`snapgen eval clip | fid | geneval | dpg | decoder | digits`: scores as JSON and as a table."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from tyro.conf import OmitArgPrefixes, Positional, Suppress

from snapgen import io
from snapgen.metrics.benchmarks import DrawConfig
from snapgen.parallel import own_device

log = logging.getLogger(__name__)
DEFAULTS = DrawConfig()
ONE = DrawConfig(per_prompt=1)
BATCH = 16  # pictures that a network is given at once


def main_digits(
    checkpoint: Positional[str],
    *,
    steps: tuple[int, ...] = (),
    guidance: float | None = None,
    per_digit: int = 100,
    seed: int = 0,
    untrained: bool = False,
    out: Path | None = None,
    console: Suppress[Console | None] = None,
) -> dict[str, Any]:
    """Whether a checkpoint of preset digits draws the digit that it is asked for, and whether it copies.

    Args:
        checkpoint: A folder that `snapgen train --preset digits --data digits` exported.
        steps: Numbers of Euler steps to score; by default the checkpoint's own.
        guidance: Classifier-free guidance scale; by default the checkpoint's own.
        per_digit: Samples of each digit.
        seed: Decides the noise.
        untrained: Also score the same model with fresh weights.
        out: Also write the scores here as JSON.
    """
    from snapgen.evaluate import untrained as fresh
    from snapgen.metrics.digits import print_digits, score_digits
    from snapgen.pipeline import load

    pipe, console = load(checkpoint).to(own_device()), console or Console()
    guidance = pipe.config.guidance if guidance is None else guidance
    contenders = {"": pipe, **({"untrained, ": fresh(pipe, seed)} if untrained else {})}
    scores = {
        f"{who}{count} steps": score_digits(
            contender, steps=count, guidance=guidance, per_digit=per_digit, seed=seed, console=console
        )
        for who, contender in contenders.items()
        for count in steps or (pipe.config.steps,)
    }
    print_digits(scores, console)
    return _written(scores, out)


def main_clip(
    checkpoint: Positional[str],
    *,
    clip: Path,
    captions: Path,
    pictures: Path,
    config: OmitArgPrefixes[DrawConfig] = ONE,
    out: Path | None = None,
    console: Suppress[Console | None] = None,
) -> dict[str, Any]:
    """CLIP score: the mean cosine between drawn pictures and their captions. Run the same command to resume.

    Args:
        checkpoint: A folder, or the name of a shipped one.
        clip: Folder of a transformers CLIP model with tokenizer and preprocessing.
        captions: Text file with one caption a line.
        pictures: Folder that the pictures are drawn into.
        config: How to draw.
        out: Also write the score here as JSON.
    """
    from snapgen.metrics.features import ClipScore

    console = console or Console()
    texts = read_captions(captions)
    judge = ClipScore(clip, own_device())  # before any drawing, which a mistake here would throw away
    files = _draw_captions(checkpoint, texts, pictures, config, console)
    found: list[float] = []
    for first in track(range(0, len(files), BATCH), "scoring", console=console):
        part = files[first : first + BATCH]
        drawn = torch.cat([_picture(path) for path, _ in part])
        found += judge(drawn, [caption for _, caption in part]).tolist()
    spread = torch.tensor(found, dtype=torch.float64)
    error = float(spread.std() / len(found) ** 0.5) if len(found) > 1 else None
    scores = {"clip_score": float(spread.mean()), "standard_error": error, "pictures": len(found), "clip": clip.name}
    _table(console, "CLIP score", {"mean cosine": f"{scores['clip_score']:.4f}", "pictures": str(len(found))})
    return _written(scores, out)


def main_fid(
    pictures: Positional[Path],
    *,
    reference: Path,
    network: Path,
    checkpoint: str | None = None,
    captions: Path | None = None,
    keep: Path | None = None,
    config: OmitArgPrefixes[DrawConfig] = ONE,
    out: Path | None = None,
    console: Suppress[Console | None] = None,
) -> dict[str, Any]:
    """FID: the Fréchet distance between the features of a folder's pictures and those of real ones.

    Args:
        pictures: Folder of pictures; with `checkpoint`, they are drawn into it first.
        reference: Folder of real pictures, or what `keep` kept of one.
        network: Safetensors file of Inception-v3's weights, or folder of a transformers vision model.
        checkpoint: Draw with this one: a folder, or the name of a shipped one.
        captions: Text file with one caption a line, to draw with.
        keep: Keep the statistics of the real pictures here (.safetensors).
        config: How to draw.
        out: Also write the score here as JSON.
    """
    from snapgen.metrics.features import FeatureNetwork
    from snapgen.metrics.frechet import Statistics, frechet_distance, statistics

    console = console or Console()
    if not reference.exists():
        raise ValueError(f"reference: {reference} does not exist; name a folder of pictures or their statistics")
    features = FeatureNetwork(network, own_device())
    if (checkpoint is None) != (captions is None):
        raise ValueError("checkpoint: drawing needs both a checkpoint and captions")
    skipped: Counter[str] = Counter()
    if reference.is_file():
        real = Statistics.load(reference, features.name)
    else:
        real = statistics(features(batch) for batch in track(list_batches(reference, skipped), "real", console=console))
    if keep is not None:
        real.save(keep, features.name)
    if checkpoint is not None and captions is not None:
        _draw_captions(checkpoint, read_captions(captions), pictures, config, console)
    drawn = statistics(features(batch) for batch in track(list_batches(pictures, skipped), "drawn", console=console))
    scores = {
        "fid": frechet_distance(drawn, real),
        "pictures": drawn.count,
        "reference": real.count,
        "network": features.name,
        "width": len(real.mean),
        "skipped": dict(skipped),
    }
    rows = {"FID": f"{scores['fid']:.3f}", "pictures": f"{drawn.count} against {real.count}", "network": features.name}
    _table(console, "Fréchet distance", rows)
    if min(drawn.count, real.count) <= len(real.mean):
        console.print(
            f"[yellow]note:[/] {min(drawn.count, real.count)} pictures do not determine a covariance of "
            f"{len(real.mean)} features; compare only scores of equal numbers of pictures"
        )
    return _written(scores, out)


def main_geneval(
    checkpoint: Positional[str],
    *,
    prompts: Path,
    out: Path,
    config: OmitArgPrefixes[DrawConfig] = DEFAULTS,
    console: Suppress[Console | None] = None,
) -> None:
    """Draw GenEval's pictures into its folders. Its own program judges them, or snapgen.metrics.geneval.score with a
    detector of yours. Run the same command to resume.

    Args:
        checkpoint: A folder, or the name of a shipped one.
        prompts: GenEval's evaluation_metadata.jsonl, or the folder that holds it.
        out: Folder for the pictures.
        config: How to draw.
    """
    from snapgen.metrics import geneval
    from snapgen.pipeline import load

    console = console or Console()
    found = geneval.read_prompts(prompts)
    geneval.draw(load(checkpoint).to(own_device()), found, out, config, console)
    tags = Counter(entry["tag"] for entry in found)
    _table(console, f"GenEval: {out}", {tag: f"{count} prompts" for tag, count in tags.items()})


def main_dpg(
    checkpoint: Positional[str],
    *,
    prompts: Path,
    out: Path,
    config: OmitArgPrefixes[DrawConfig] = DEFAULTS,
    console: Suppress[Console | None] = None,
) -> None:
    """Draw DPG-Bench's pictures. Its own program judges out/sheets, or snapgen.metrics.dpg.score with a model of yours
    that answers questions. Run the same command to resume.

    Args:
        checkpoint: A folder, or the name of a shipped one.
        prompts: Folder of .txt files, dpg_bench/prompts of ELLA.
        out: Folder for the pictures.
        config: How to draw.
    """
    from snapgen.metrics import dpg
    from snapgen.pipeline import load

    console = console or Console()
    found = dpg.read_prompts(prompts)
    dpg.draw(load(checkpoint).to(own_device()), found, out, config, console)
    _table(console, f"DPG-Bench: {out / 'sheets'}", {"prompts": str(len(found))})


def main_decoder(
    checkpoint: Positional[str],
    *,
    data: str,
    autoencoder: str | None = None,
    resolution: int | None = None,
    count: int = 500,
    out: Path | None = None,
    console: Suppress[Console | None] = None,
) -> dict[str, Any]:
    """PSNR and SSIM of a decoder: pictures encoded and decoded again, against themselves.

    Args:
        checkpoint: A folder with our decoder in decoder/, the name of a shipped one, or the folder of a diffusers
            AutoencoderKL.
        data: A dataset of `snapgen train`; "shapes" are scenes that training never showed.
        autoencoder: Whose encoder: a folder of a diffusers AutoencoderKL, or a checkpoint of ours. By default that of
            `checkpoint`.
        resolution: Pixels a side; by default 64.
        count: Pictures.
        out: Also write the scores here as JSON.
    """
    from snapgen.data.embed import load_encoder
    from snapgen.data.loader import open_dataset
    from snapgen.data.shapes import ShapesDataset
    from snapgen.metrics.pictures import psnr, ssim

    if count < 1:
        raise ValueError(f"count: got {count}; must be at least 1")
    console, side = console or Console(), resolution or 64
    decode = _decoder(checkpoint)
    encoder = load_encoder(autoencoder or checkpoint, device=own_device())
    source = ShapesDataset(side, split="test") if data == "shapes" else open_dataset(data, side)
    count = min(count, len(source))
    found: dict[str, list[Tensor]] = {"psnr": [], "ssim": []}
    for first in track(range(0, count, BATCH), "decoding", console=console):
        images, _ = source.batch(range(first, min(first + BATCH, count)))
        drawn = decode(encoder(images).to(own_device())).float().clamp(-1, 1).cpu()
        # As a file would have them: rounded to bytes.
        drawn = drawn.add(1).mul(127.5).round().div(127.5).sub(1)
        found["psnr"].append(psnr(drawn, images))
        found["ssim"].append(ssim(drawn, images))
    scores: dict[str, Any] = {name: float(torch.cat(values).mean()) for name, values in found.items()}
    scores |= {"pictures": count, "resolution": side, "data": data}
    rows = {"PSNR": f"{scores['psnr']:.2f} dB", "SSIM": f"{scores['ssim']:.4f}", "pictures": f"{count}, {side}x{side}"}
    _table(console, "Decoder", rows)
    return _written(scores, out)


def _decoder(checkpoint: str) -> Callable[[Tensor], Tensor]:
    """Scaled latents to pictures."""
    from snapgen.config import SHIPPED
    from snapgen.data.embed import load_encoder
    from snapgen.decoder import TinyDecoder

    folder = SHIPPED / checkpoint if (SHIPPED / checkpoint).is_dir() else Path(checkpoint)
    if not (folder / "decoder" / "config.json").is_file():
        other = load_encoder(folder, device=own_device())
        return torch.no_grad()(lambda latents: other.module.decode(latents / other.scale + other.shift).sample)
    path = folder / "decoder" / "diffusion_pytorch_model.safetensors"
    weights = io.load_tensors(path)
    decoder = TinyDecoder.from_config(io.read_json(folder / "decoder" / "config.json"))
    io.load_strictly(decoder, weights, path, "the decoder that its config.json describes")
    return decoder.eval().to(own_device()).decode


def read_captions(path: Path) -> list[str]:
    """The captions of a text file, one a line.

    Raises:
        ValueError: it does not exist, is no text, or holds none.
    """
    if not path.is_file():
        raise ValueError(f"captions: {path} does not exist; name a text file with one caption a line")
    try:
        found = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"captions: {path} is no text ({error})") from error
    if not found:
        raise ValueError(f"captions: {path} holds none")
    return found


def list_batches(folder: Path, skipped: Counter[str]) -> Iterator[Tensor]:
    """The pictures of a folder [B, 3, H, W] in [-1, 1], by name, in batches of one size; those that cannot be read are
    counted, with the reason, and logged.

    Raises:
        ValueError: the folder does not exist or holds no picture.
    """
    from snapgen.data.folder import BROKEN, IMAGE_SUFFIXES, NO_PICTURE

    if not folder.is_dir():
        raise ValueError(f"pictures: {folder} is no folder")
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
    if not files:
        raise ValueError(f"pictures: {folder} holds none ({', '.join(IMAGE_SUFFIXES)})")
    held: list[Tensor] = []
    for path in files:
        try:
            picture = _picture(path)
        except BROKEN as error:
            skipped[NO_PICTURE] += 1
            log.warning("%s: skipped, %s (%s)", path, NO_PICTURE, error)
            continue
        if held and (len(held) == BATCH or held[0].shape != picture.shape):
            yield torch.cat(held)
            held = []
        held.append(picture)
    if held:
        yield torch.cat(held)


def _picture(path: Path) -> Tensor:
    from snapgen.data.folder import image_size, load_image
    from snapgen.metrics.pictures import as_tensor

    data = path.read_bytes()
    return as_tensor([load_image(data, image_size(data))])


def _draw_captions(
    checkpoint: str, captions: list[str], out: Path, config: DrawConfig, console: Console
) -> list[tuple[Path, str]]:
    """Draw captions into a folder; every picture and its caption."""
    from snapgen.metrics.benchmarks import claim, draw_files
    from snapgen.pipeline import load

    pipe = load(checkpoint)
    config = config.of(pipe)
    claim(out, {"captions": len(captions), "checkpoint": checkpoint, **config.record()})
    count = config.per_prompt
    files = [
        (number * count + sample, caption, out / f"{number:06d}-{sample}.png")
        for number, caption in enumerate(captions)
        for sample in range(count)
    ]
    draw_files(pipe.to(own_device()), files, config, console)
    return [(path, caption) for _, caption, path in files]


def _table(console: Console, title: str, rows: dict[str, str]) -> None:
    table = Table(title=title, show_header=False)
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)


def _written(scores: dict[str, Any], out: Path | None) -> dict[str, Any]:
    if out is not None:
        io.write_json(out, scores)
    return scores


# `snapgen eval NAME ...`; what they return is for whoever calls them from Python.
EVALS: dict[str, Any] = {
    "clip": main_clip,
    "fid": main_fid,
    "geneval": main_geneval,
    "dpg": main_dpg,
    "decoder": main_decoder,
    "digits": main_digits,
}
