"""Published latencies on Apple's Neural Engine against the auditor's estimates: ``python -m bench.neural_engine``.

Builds each model as its authors describe it, with random weights of the real sizes, converts it, audits the package,
fits the two shares of `snapgen.export.phones` to a part of the published figures, and writes all to
snapgen/export/calibration.json and the table of docs/auditor.md. Nothing is measured: there is no Mac here. It takes
6 GB of memory and 10 minutes on one core.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from snapgen import io
from snapgen.export import phones
from snapgen.export.audit import audit
from snapgen.export.rule_checks import ON_CHIP
from snapgen.export.tools import coremltools, quiet

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "snapgen" / "export" / "calibration.json"
PAGE = ROOT / "docs" / "auditor.md"
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"

SNAPGEN = "SnapGen (CVPR 2025), the authors' slides"
SNAPFUSION = "SnapFusion (arXiv 2306.00980), tables 1 and 8"
README = "apple/ml-stable-diffusion, README: 50 steps and all else, over 50"
GUIDE = "Apple Neural Engine (arXiv 2606.22283), chapter 18"


@dataclass(frozen=True)
class Figure:
    """A published latency. `fitted`: the shares are fitted to it; the others are held out."""

    model: str
    phone: str
    milliseconds: float
    source: str
    fitted: bool = False


# Fitted: what one paper measured of convolutional decoders and a text encoder on three phones. Held out: other authors,
# other phones, Macs, and all denoisers.
FIGURES = (
    Figure("clip-l", "iPhone 12 Pro Max", 6.3, SNAPFUSION, fitted=True),
    Figure("clip-l", "iPhone 13 Pro Max", 5.7, SNAPFUSION, fitted=True),
    Figure("clip-l", "iPhone 14 Pro", 4.0, SNAPFUSION, fitted=True),
    Figure("snapfusion-decoder", "iPhone 12 Pro Max", 187.0, SNAPFUSION, fitted=True),
    Figure("snapfusion-decoder", "iPhone 13 Pro Max", 148.0, SNAPFUSION, fitted=True),
    Figure("snapfusion-decoder", "iPhone 14 Pro", 116.0, SNAPFUSION, fitted=True),
    Figure("sd-decoder", "iPhone 14 Pro", 369.0, SNAPFUSION, fitted=True),
    Figure("sd-unet", "iPhone 14 Pro", 1700.0, SNAPFUSION),
    Figure("sd-unet", "M1", 700.0, README),
    Figure("sd-unet", "M2", 460.0, README),
    Figure("snapgen-denoiser", "iPhone 16 Pro Max", 274.0, SNAPGEN),
    Figure("snapgen-decoder", "iPhone 16 Pro Max", 119.0, SNAPGEN),
    Figure("clip-l", "iPhone 16 Pro Max", 4.0, SNAPGEN),
    Figure("clip-g", "iPhone 16 Pro Max", 23.0, SNAPGEN),
    Figure("conv-3x3-256-28", "M1", 0.507, GUIDE),
    Figure("conv-1x1-512-32", "M1", 0.444, GUIDE),
    Figure("conv-1x1-1024-16", "M1", 0.686, GUIDE),
    Figure("conv-1x1-2048-8", "M1", 1.047, GUIDE),
)


class _Decoder(nn.Module):
    def __init__(self, channels: tuple[int, ...]) -> None:
        from diffusers import AutoencoderKL
        from diffusers.models.attention_processor import AttnProcessor

        super().__init__()
        blocks = len(channels)
        model = AutoencoderKL(
            block_out_channels=channels,
            down_block_types=("DownEncoderBlock2D",) * blocks,
            up_block_types=("UpDecoderBlock2D",) * blocks,
            layers_per_block=2,
        )
        model.set_attn_processor(AttnProcessor())
        self.first, self.decoder = model.post_quant_conv, model.decoder

    def forward(self, z: Tensor) -> Tensor:
        return self.decoder(self.first(z))


class _Clip(nn.Module):
    def __init__(self, width: int, layers: int, heads: int) -> None:
        from transformers import CLIPTextConfig, CLIPTextModel

        super().__init__()
        config = CLIPTextConfig(
            hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=4 * width,
            attn_implementation="eager",
        )  # fmt: skip
        self.model = CLIPTextModel(config)

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(ids).last_hidden_state


def count_sd_unet() -> list[tuple[float, float]]:
    """(FLOPs, bytes through memory) of the steps of Stable Diffusion 1.5's UNet, batch 2, from its layers' shapes.

    Its package takes 8 GB of memory and more to convert, so its layers are counted as the auditor counts the steps that
    they become: a convolution or product is one step; a norm is read for its mean, for its variance, and to be written;
    scores are written, read and written by the softmax, and read. Biases and residual sums are fused.
    """
    from diffusers import UNet2DConditionModel
    from diffusers.models.attention_processor import Attention

    work: list[tuple[float, float]] = []

    def moved(*elements: int) -> float:
        return float(sum(2 * count for count in elements if 2 * count > ON_CHIP))

    def product(layer: Any, given: tuple[Tensor, ...], out: Tensor) -> None:
        macs = out.numel() * layer.weight[0].numel()
        work.append((2.0 * macs, 2.0 * layer.weight.numel() + moved(given[0].numel(), out.numel())))

    def norm(layer: Any, given: tuple[Tensor, ...], out: Tensor) -> None:
        size = given[0].numel()
        work.extend([(float(size), moved(size)), (2.0 * size, moved(size)), (4.0 * size, moved(size, size))])

    def attention(layer: Any, args: tuple[Tensor, ...], kwargs: dict[str, Any], out: Tensor) -> None:
        batch, queries, width = out.shape
        context = kwargs.get("encoder_hidden_states")
        keys = queries if context is None else context.shape[1]
        scores = batch * layer.heads * queries * keys
        side, other = batch * queries * width, batch * keys * width
        work.append((2.0 * scores * width / layer.heads, moved(side, other, scores)))
        work.append((4.0 * scores, moved(scores, scores)))
        work.append((2.0 * scores * width / layer.heads, moved(scores, other, side)))

    with torch.device("meta"):
        model = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
        for layer in model.modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                layer.register_forward_hook(product)
            elif isinstance(layer, (nn.GroupNorm, nn.LayerNorm)):
                layer.register_forward_hook(norm)
            elif isinstance(layer, Attention):
                layer.register_forward_hook(attention, with_kwargs=True)
        with torch.no_grad():
            model(torch.zeros(2, 4, 64, 64), torch.zeros(2), torch.zeros(2, 77, 768))
    return work


def _convert(model: nn.Module, examples: tuple[Tensor, ...], package: Path) -> None:
    """Trace and convert as coremltools does by default, in fp16: what most packages come from."""
    import numpy as np

    ct = coremltools()
    with torch.no_grad(), quiet():
        traced = torch.jit.trace(model.eval(), examples, check_trace=False)
        ct.convert(
            traced,
            inputs=[
                ct.TensorType(shape=it.shape, dtype=np.float16 if it.is_floating_point() else np.int32)
                for it in examples
            ],
            minimum_deployment_target=ct.target.iOS17,
            skip_model_load=True,
            package_dir=str(package),
        )


def _ours(part: str) -> Callable[[Path], None]:
    def build(package: Path) -> None:
        from snapgen.config import PRESETS
        from snapgen.decoder import TinyDecoder
        from snapgen.export.convert import convert
        from snapgen.export.denoiser import Denoiser
        from snapgen.export.parts import Decoder, Part
        from snapgen.unet import SnapGenUNet
        from snapgen_kernels import use

        preset = PRESETS["t2i-1024"]
        with use("reference"):
            made: Part
            if part == "denoiser":
                model = SnapGenUNet(**preset.denoiser).eval()
                made = Denoiser(model, batch=1, height=128, width=128, tokens=333)
            else:
                made = Decoder(TinyDecoder(**preset.decoder).eval(), batch=1, height=128, width=128)
        convert(made, package, "iOS17")

    return build


def _conv(kernel: int, channels: int, size: int) -> Callable[[Path], None]:
    def build(package: Path) -> None:
        model = nn.Conv2d(channels, channels, kernel, padding=kernel // 2)
        _convert(model, (torch.randn(1, channels, size, size),), package)

    return build


_IDS = torch.zeros(1, 77, dtype=torch.int32)
_LATENT = torch.zeros(1, 4, 64, 64)
# Name -> what it is, and how its package is made.
MODELS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "clip-l": ("CLIP-L text encoder, 77 tokens", lambda to: _convert(_Clip(768, 12, 12), (_IDS,), to)),
    "clip-g": ("OpenCLIP bigG text encoder, 77 tokens", lambda to: _convert(_Clip(1280, 32, 20), (_IDS,), to)),
    "sd-decoder": (
        "decoder of Stable Diffusion 1.5, 512x512",
        lambda to: _convert(_Decoder((128, 256, 512, 512)), (_LATENT,), to),
    ),
    "snapfusion-decoder": (
        "the same with half the channels, as SnapFusion prunes it, 512x512",
        lambda to: _convert(_Decoder((64, 128, 256, 256)), (_LATENT,), to),
    ),
    "snapgen-denoiser": ("preset t2i-1024, batch 1, 333 tokens, 1024x1024", _ours("denoiser")),
    "snapgen-decoder": ("decoder of preset t2i-1024, 1024x1024", _ours("decoder")),
    "conv-3x3-256-28": ("one 3x3 convolution, 256 channels, 28x28", _conv(3, 256, 28)),
    "conv-1x1-512-32": ("one 1x1 convolution, 512 channels, 32x32", _conv(1, 512, 32)),
    "conv-1x1-1024-16": ("one 1x1 convolution, 1024 channels, 16x16", _conv(1, 1024, 16)),
    "conv-1x1-2048-8": ("one 1x1 convolution, 2048 channels, 8x8", _conv(1, 2048, 8)),
}


def calibrate(folder: Path) -> dict[str, Any]:
    """Build what is missing in `folder`, audit every model, and fit. The keys are those of `phones.calibration`."""
    audited = {}
    for name, (about, build) in MODELS.items():
        package = folder / f"{name}.mlpackage"
        if not package.exists():
            print(f"building {name}", flush=True)
            torch.manual_seed(0)
            build(package)
        (report,) = audit(package)
        audited[name] = {
            "about": about,
            "operations": len(report.operations),
            "segments": report.segments,
            "work": [[count, int(flops), int(moved)] for count, flops, moved in report.work()],
        }
    counts = Counter(count_sd_unet())
    audited["sd-unet"] = {
        "about": "UNet of Stable Diffusion 1.5, 512x512, batch 2: counted from its layers, not from a package",
        "operations": counts.total(),
        "segments": 1,
        "work": [[count, int(flops), int(moved)] for (flops, moved), count in sorted(counts.items())],
    }
    return {"models": audited} | fitted(audited)


def fitted(models: dict[str, Any]) -> dict[str, Any]:
    """Fit the shares, and set every published figure beside its estimate."""

    def work(figure: Figure) -> tuple[list[tuple[int, float, float]], int, phones.Phone]:
        model = models[figure.model]
        return [tuple(entry) for entry in model["work"]], model["segments"], phones.find(figure.phone)

    shares = phones.fit((*work(figure), figure.milliseconds / 1e3) for figure in FIGURES if figure.fitted)
    figures = []
    for figure in FIGURES:
        estimated = 1e3 * phones.seconds(*work(figure), shares)
        error = estimated / figure.milliseconds - 1
        figures.append(asdict(figure) | {"estimated": round(estimated, 3), "error": round(error, 4)})
    return {"shares": asdict(shares), "figures": figures}


def table(calibration: dict[str, Any]) -> str:
    """The figures as a Markdown table, with the errors' middle and extremes below."""
    lines = ["| model | device | published ms | estimated ms | error | source |", "|---|---|---:|---:|---:|---|"]
    for figure in calibration["figures"]:
        name = f"{figure['model']}{' (fitted)' if figure['fitted'] else ''}"
        lines.append(
            f"| {name} | {figure['phone']} | {figure['milliseconds']:g} | {figure['estimated']:.3g} | "
            f"{figure['error']:+.0%} | {figure['source']} |"
        )
    for said, wanted in (("fitted", True), ("held out", False)):
        errors = sorted(abs(it["error"]) for it in calibration["figures"] if it["fitted"] == wanted)
        middle = (errors[len(errors) // 2] + errors[(len(errors) - 1) // 2]) / 2
        lines += [
            "",
            f"{said.capitalize()}: {len(errors)} figures, median error {middle:.0%}, largest {errors[-1]:.0%}.",
        ]
    shares = calibration["shares"]
    lines += ["", f"Shares: {shares['compute']:.0%} of peak arithmetic, {shares['memory']:.0%} of bandwidth."]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """`python -m bench.neural_engine [FOLDER]`: packages that lie in FOLDER are taken, missing ones are left there."""
    given = sys.argv[1:] if arguments is None else arguments
    with tempfile.TemporaryDirectory() as temporary:
        calibration = calibrate(Path(given[0] if given else temporary))
    io.write_json(RESULT, calibration)
    text = table(calibration)
    print(text)
    if PAGE.exists():
        page = PAGE.read_text(encoding="utf-8")
        head, _, rest = page.partition(BEGIN)
        io.write_text(PAGE, f"{head}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
