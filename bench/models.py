"""Whole models as cases: the decoder, one forward of the denoiser, a whole picture, one training step. Weights are
random.

A :class:`ModelCase` stands beside the ops' cases in a run. All providers of a case share its weights and inputs, but a
training step has its own for each provider, since it changes them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import snapgen_kernels
from bench.plain import plain
from snapgen.config import PRESETS
from snapgen_kernels.checks import assert_close

MODELS = ("decoder", "denoiser", "picture", "train")
TEXT_TOKENS = 333  # 77 of CLIP and 256 of Gemma-2, as t2i-1024 reads them
CHECK_SIDE = 16  # side of the latents that are checked: fp64 at the model's own size would take minutes
PICTURE_STEPS = 4  # of a picture, without guidance, as a distilled student draws it


@dataclass(frozen=True)
class ModelCase:
    """One model at one size.

    Attributes:
        op: one of ``MODELS``. name: unique within it.
        side: of the square latents. tokens: of the text. narrow: what every width of the preset is divided by.
        bench: False for the sizes that tests use.
        gpu: too large for a processor without one.
        device: where it runs.
    """

    op: str
    name: str
    preset: str
    side: int
    batch: int = 1
    tokens: int = TEXT_TOKENS
    narrow: int = 1
    dtype: torch.dtype = torch.float32
    bench: bool = True
    gpu: bool = False
    device: str = "cpu"

    def __str__(self) -> str:
        return f"{self.op}-{self.name}-{str(self.dtype).removeprefix('torch.')}"

    @property
    def mode(self) -> str:
        """What can be timed: ``fwd`` or ``train``."""
        return "train" if self.op == "train" else "fwd"

    @property
    def row_mode(self) -> str:
        """Its name in the rows: a training step is timed whole."""
        return "step" if self.op == "train" else "fwd"

    @property
    def wall(self) -> bool:
        """Whether the processor's own time counts as well: a picture is what a user waits for."""
        return self.op == "picture"


CASES: tuple[ModelCase, ...] = (
    ModelCase("decoder", "512px", "t2i-1024", 64),
    ModelCase("decoder", "1024px", "t2i-1024", 128),
    ModelCase("decoder", "2048px", "t2i-1024", 256, gpu=True),
    ModelCase("denoiser", "t2i-32x32", "t2i-1024", 32),
    ModelCase("denoiser", "t2i-128x128", "t2i-1024", 128),
    ModelCase("denoiser", "t2i-128x128-b2", "t2i-1024", 128, batch=2, gpu=True),  # with guidance
    ModelCase("train", "tiny-b64", "tiny", 8, batch=64),
    ModelCase("train", "t2i-quarter-b8", "t2i-1024", 32, batch=8, narrow=4),
    ModelCase("train", "t2i-128x128-b8", "t2i-1024", 128, batch=8, gpu=True),
    ModelCase("train", "t2i-128x128-b4", "t2i-1024", 128, batch=4, gpu=True),
    ModelCase("train", "t2i-128x128-b16", "t2i-1024", 128, batch=16, gpu=True),
    ModelCase("train", "imagenet-256-b256", "imagenet-256", 32, batch=256, tokens=77, gpu=True),
    ModelCase("picture", "1024px-4", "t2i-1024", 128, gpu=True),
    ModelCase("decoder", "small", "tiny", 2, bench=False),
    ModelCase("denoiser", "small", "tiny", 4, tokens=5, bench=False),
    ModelCase("picture", "small", "tiny", 4, tokens=5, bench=False),
    ModelCase("train", "small", "tiny", 8, batch=2, bench=False),
    ModelCase("train", "latents", "tiny", 4, batch=2, tokens=5, narrow=2, bench=False),
)


# ---- building --------------------------------------------------------------------------------------------------------


def denoiser_flags(case: ModelCase) -> dict[str, Any]:
    """The preset's denoiser with every width divided by ``narrow``; heads get narrower first, then fewer."""
    flags = dict(PRESETS[case.preset].denoiser)
    if case.narrow == 1:
        return flags
    channels = tuple(width // case.narrow for width in flags["channels"])
    head = max(flags["head_dim"] // 2, 2)
    return {
        **flags,
        "channels": channels,
        "head_dim": head,
        "num_heads": tuple(width // head for width in channels),
        "temb_dim": flags["temb_dim"] // case.narrow,
    }


class Picture(nn.Module):
    """A denoiser and a decoder that draw: Euler steps of equal length, then the picture."""

    def __init__(self, denoiser: Any, decoder: Any) -> None:
        super().__init__()
        self.denoiser, self.decoder = denoiser, decoder

    def forward(self, latents: Tensor, time: Tensor, context: Tensor, pooled: Tensor) -> Tensor:
        return draw(self.denoiser, self.decoder, (latents, time, context, pooled))


def draw(denoiser: Callable[..., Any], decoder: Callable[[Tensor], Tensor], activations: Sequence[Tensor]) -> Tensor:
    """A picture of noise: ``PICTURE_STEPS`` steps from the given time [B], in thousandths, down to 0."""
    latents, time, context, pooled = activations
    for step in range(PICTURE_STEPS):
        now = time * (1 - step / PICTURE_STEPS)
        velocity = denoiser(latents, now, context, None, pooled, return_dict=False)[0]
        latents = latents - (time[0] / (1000 * PICTURE_STEPS)).to(latents.dtype) * velocity
    return decoder(latents)


def _network(case: ModelCase) -> nn.Module:
    from snapgen.decoder import TinyDecoder
    from snapgen.unet import SnapGenUNet

    # Without scaling, `decode` computes what the decoder's forward does.
    flags = {**PRESETS[case.preset].decoder, "scaling_factor": 1.0, "shift_factor": 0.0}
    if case.op == "decoder":
        return TinyDecoder(**flags)
    denoiser = SnapGenUNet(**denoiser_flags(case))
    return Picture(denoiser, TinyDecoder(**flags)) if case.op == "picture" else denoiser


def without_memory(case: ModelCase) -> nn.Module:
    """The network on the meta device, in the case's dtype; a training step keeps its weights in fp32."""
    with torch.device("meta"):
        network = _network(case)
    # diffusers' own `to` warns about modules to be kept in fp32, of which there are none.
    return nn.Module.to(network, case.dtype if case.op != "train" else torch.float32)


def build(case: ModelCase) -> nn.Module:
    """The network in the case's dtype with random weights, 379M of them in a second."""
    with torch.inference_mode(False), torch.no_grad():
        network = without_memory(case).to_empty(device="cpu")
        # A prime count: no two rows of a matrix repeat each other.
        pool = torch.randn(1_048_573, generator=torch.Generator().manual_seed(0))
        start = 0
        for name, parameter in network.named_parameters():
            count = parameter.numel()
            repeats = (start + count) // len(pool) + 1
            values = pool.repeat(repeats)[start : start + count].view(parameter.shape)
            start = (start + count) % len(pool)
            if parameter.ndim > 1:
                values = values / math.sqrt(parameter[0].numel())
            else:  # a norm's weight, or a bias
                values = 1 + 0.2 * values if "norm" in name and name.endswith("weight") else 0.1 * values
            parameter.copy_(values)
        return _channels_last(network.to(case.device)).eval()


@cache
def _shared(case: ModelCase) -> tuple[nn.Module, tuple[Tensor, ...]]:
    return build(case), feeds(case)


def network_and_feeds(case: ModelCase) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The case's network and inputs, the same to all who ask; :func:`release` forgets them."""
    return _shared(case)


def release() -> None:
    """Free what the last case held."""
    _shared.cache_clear()
    yardstick.cache_clear()


def feeds(case: ModelCase, side: int | None = None, device: str | None = None) -> tuple[Tensor, ...]:
    """Random activations of the network, in the order of its arguments: latents, and with a denoiser also time, text
    tokens and, where it reads it, pooled text. ``device``: the case's unless given."""
    device = device or case.device
    generator = torch.Generator().manual_seed(2412)  # not the seed of any step's noise
    dtype = case.dtype if case.op != "train" else torch.float32

    def draw(*shape: int) -> Tensor:
        if device == "meta":
            return torch.empty(shape, dtype=dtype, device=device)
        return torch.randn(shape, generator=generator).to(device, dtype)

    side = side or case.side
    preset = PRESETS[case.preset]
    with torch.inference_mode(False):
        if case.op == "decoder":
            return (draw(case.batch, preset.decoder["latent_channels"], side, side),)
        flags = denoiser_flags(case)
        found = (
            draw(case.batch, flags["in_channels"], side, side),
            torch.full((case.batch,), 500.0, device=device),
            draw(case.batch, case.tokens, flags["context_dim"]),
        )
        pooled = flags.get("pooled_dim")
        return found if pooled is None else (*found, draw(case.batch, pooled))


def run(network: nn.Module, activations: Sequence[Tensor]) -> Tensor:
    """The network's output: pictures of latents, or a velocity."""
    if len(activations) == 1 or isinstance(network, Picture):
        return network(*activations)
    sample, time, context, *pooled = activations
    return network(sample, time, context, None, *pooled, return_dict=False)[0]


def fused(
    network: Any, *, low_memory: bool | None = None, compiled: bool = False, graph: bool = False
) -> Callable[..., Tensor]:
    """:func:`run` as users of the fused kernels do: pictures come from ``decode``; a function of the activations.

    Args:
        compiled: the denoiser is compiled by torch.compile.
        graph: denoiser and decoder are CUDA graphs, as `SnapGenPipeline.compile` has them on a GPU.
    """
    from snapgen.graphs import Graphed

    def part(function: Callable[..., Tensor], module: nn.Module) -> Callable[..., Tensor]:
        return Graphed(function, module) if graph else function

    whole = isinstance(network, Picture)
    decoder, denoiser = (network.decoder, network.denoiser) if whole else (network, network)
    decode = part(lambda latents: decoder.decode(latents, low_memory=low_memory), decoder)
    if not whole and hasattr(network, "decode"):
        return decode
    called = torch.compile(denoiser, fullgraph=True, dynamic=False) if compiled else denoiser

    def velocity(sample: Tensor, time: Tensor, context: Tensor, mask: None = None, *pooled: Tensor) -> Tensor:
        return called(sample, time, context, mask, *pooled, return_dict=False)[0]

    step = part(velocity, denoiser)
    if whole:
        return lambda *activations: draw(lambda *values, return_dict: (step(*values),), decode, activations)
    return lambda sample, time, context, *pooled: step(sample, time, context, None, *pooled)


def run_fused(network: Any, activations: Sequence[Tensor]) -> Tensor:
    """The output of :func:`fused`; where gradients are recorded, that of the network itself."""
    return run(network, activations) if torch.is_grad_enabled() else fused(network)(*activations)


def tune(case: ModelCase) -> None:
    """Run the case once with every config of its kernels measured."""
    from snapgen_kernels._triton.tuning import tuning

    with tuning(), snapgen_kernels.use("auto"):
        if case.op == "train":
            training(case)()
        else:
            network, activations = network_and_feeds(case)
            with torch.inference_mode():
                fused(network)(*activations)
    release()


def compiled(network: Any, mode: str) -> Any:
    """``torch.compile`` of the network; of a picture, of the two networks that draw it."""
    options: dict[str, Any] = dict(fullgraph=True, dynamic=False, mode=mode)
    if isinstance(network, Picture):
        return Picture(torch.compile(network.denoiser, **options), torch.compile(network.decoder, **options))
    return torch.compile(network, **options)


def contiguous(network: nn.Module, case: ModelCase) -> nn.Module:
    """The same weights in a network whose pictures are contiguous (NCHW) from its first convolution on."""
    other: Any = without_memory(case)
    other.load_state_dict({name: value.contiguous() for name, value in network.state_dict().items()}, assign=True)
    for part in (other.denoiser, other.decoder) if isinstance(other, Picture) else (other,):
        part.conv_in.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))
    return other.eval()


# ---- training --------------------------------------------------------------------------------------------------------


def make_task(case: ModelCase, device: str | None = None) -> tuple[Any, Any]:
    """Task and batch of a training case: ``snapgen train`` as it is where the preset trains its own encoders, else on
    given latents and text, as where the encoders are frozen and their outputs are kept. The same weights at every
    call."""
    from snapgen.conditioning import CachedText, JointText
    from snapgen.data.loader import Batch
    from snapgen.data.shapes import VOCABULARY, ShapesDataset
    from snapgen.decoder import TinyDecoder
    from snapgen.tasks import DenoiserTask, build_autoencoder, build_denoiser
    from snapgen.text import TextEmbedding

    preset, device = PRESETS[case.preset], device or case.device
    if preset.encoder is None or case.narrow > 1:
        latents, _, context, *pooled = feeds(case, device=device)
        if device == "meta":
            network = without_memory(case)
        else:
            network = build(case)
        text = TextEmbedding(context, None, pooled[0] if pooled else None)  # type: ignore[arg-type]  # every token counts
        with torch.device("meta"):
            decoder = TinyDecoder(**preset.decoder)
        task = DenoiserTask(preset, denoiser=network.train(), text=CachedText(text), encoder=None, decoder=decoder)
        positions = range(case.batch)
        return task, Batch(captions=[""] * case.batch, latents=latents, text=text, positions=positions)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        encoder, decoder = build_autoencoder(preset)
        denoiser, text_encoder, tokenizer = build_denoiser(preset, list(VOCABULARY))
    pictures, captions = ShapesDataset(preset.resolution, split="train").batch(range(case.batch))
    modules = dict(denoiser=denoiser, text_encoder=text_encoder, encoder=encoder, decoder=decoder)
    placed: dict[str, Any] = {n: _channels_last(module.to(case.device)).train() for n, module in modules.items()}
    joint = JointText(tokenizer, placed.pop("text_encoder"))
    batch = Batch(captions=list(captions), images=pictures, positions=range(case.batch))
    return DenoiserTask(preset, text=joint, **placed), batch


def _channels_last(network: nn.Module) -> nn.Module:
    return nn.Module.to(network, memory_format=torch.channels_last)  # type: ignore[call-overload]


def training(case: ModelCase, *, layout: str = "channels_last", mode: str | None = None) -> Callable[[], Tensor]:
    """One optimizer step of ``snapgen train`` on weights of its own, as a function that returns the loss.

    Args:
        mode: of torch.compile; None for none.
    """
    from snapgen.data.loader import Share
    from snapgen.train import TrainConfig, TrainState, optimizer_step

    with torch.inference_mode(False):
        task, batch = make_task(case)
        if layout == "contiguous":
            for module in task.modules.values():
                nn.Module.to(module, memory_format=torch.contiguous_format)  # type: ignore[call-overload]
            for module in (task.modules["denoiser"], getattr(task, "encoder", None)):
                if module is not None:
                    module.conv_in.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))
        if mode is not None:
            for module in (*task.modules.values(), getattr(task, "encoder", None)):
                if module is not None:
                    module.compile(dynamic=False, mode=mode)
        config = TrainConfig(batch_size=case.batch, dtype="bf16" if case.dtype == torch.bfloat16 else "fp32")
        state = TrainState(task, config)

    def batches() -> Iterator[Any]:
        while True:
            yield batch

    stream = batches()
    return lambda: optimizer_step(task, config, state, stream, Share(case.batch, case.batch))["loss"]


# ---- costs -----------------------------------------------------------------------------------------------------------


@cache
def costs(case: ModelCase) -> tuple[int, int]:
    """(FLOPs, fewest bytes): products and convolutions as PyTorch counts them on the meta device (nothing else counts);
    weights, inputs and outputs once. A training step also writes each weight and both moments, and reads these."""
    # Only the products of attention written out are counted on every device.
    with sdpa_kernel(SDPBackend.MATH):
        return _costs(case)


def _costs(case: ModelCase) -> tuple[int, int]:
    if case.op == "train":
        parts = step_costs(case)
        (forward, read), (backward, twice) = parts["forward"], parts["backward"]
        return forward + backward, read + 5 * twice // 2
    network = without_memory(case)
    inputs = feeds(case, device="meta")
    with plain(), FlopCounterMode(display=False) as counter, torch.no_grad():
        output = run(network, inputs)
    tensors = [*network.parameters(), *inputs, output]
    return counter.get_total_flops(), sum(t.numel() * t.element_size() for t in tensors)


def step_costs(case: ModelCase) -> dict[str, tuple[int, int]]:
    """The same of a training step's parts, by the names of their ranges. Weights are fp32: the forward reads them and
    the batch, the backward reads them and writes gradients, the optimizer reads and writes them and two moments and
    reads gradients, averages read them and are read and written."""
    from snapgen.seeds import Draws

    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.convolution_backward: _backward_flops})
    with sdpa_kernel(SDPBackend.MATH), plain(), torch.inference_mode(False), counter:
        # The tiny text encoder looks at its tokens, so that it has to have some; all else needs no memory.
        device = "meta" if PRESETS[case.preset].encoder is None or case.narrow > 1 else "cpu"
        task, batch = make_task(replace(case, device="cpu"), device=device)
        (phase,) = task.phases()
        loss, _ = phase.loss(batch, Draws(0, 0, batch.positions, device=device))
        forward = counter.get_total_flops()
        loss.backward()
    weights = 4 * sum(p.numel() for module in task.modules.values() for p in module.parameters())
    backward = counter.get_total_flops() - forward
    read = batch.images if batch.latents is None else batch.latents
    return {
        "forward": (forward, weights + 4 * read.numel()),
        "backward": (backward, 2 * weights),
        "optimizer": (0, 7 * weights),
        "average": (0, 3 * weights),
    }


def _backward_flops(dy: Sequence[int], x: Sequence[int], weight: Sequence[int], *rest: Any, **named: Any) -> int:
    """Of a convolution's gradients by its input and its weight, each the forward's. PyTorch's own count leaves groups
    out of the latter, which makes a depthwise convolution's as many times too large as it has channels."""
    _, _, _, _, transposed, _, _, needs = rest
    per_pixel = math.prod(weight[1:])
    return 2 * math.prod(x if transposed else dy) * per_pixel * (int(needs[0]) + int(needs[1]))


# ---- correctness -----------------------------------------------------------------------------------------------------


@contextmanager
def _alike(case: ModelCase) -> Iterator[None]:
    """The arithmetic of the case: autocast where it trains in bf16."""
    autocast = case.op == "train" and case.dtype == torch.bfloat16
    with torch.autocast(case.device, torch.bfloat16) if autocast else nullcontext():
        yield


def _checked(case: ModelCase) -> tuple[nn.Module, tuple[Tensor, ...], int]:
    side = min(case.side, CHECK_SIDE)
    network = build(case) if case.op == "train" else network_and_feeds(case)[0]
    inputs = feeds(case, side)
    return network, tuple(value[:2] for value in inputs) if case.op == "train" else inputs, side


def check(case: ModelCase) -> str:
    """Compare the fused network with fp64 and with plain PyTorch in the case's dtype: its output, and for a training
    case the gradients of all parameters. Returns the size of the latents that were compared.

    Raises:
        AssertionError: an error is more than twice plain PyTorch's (and one ulp for an output).
    """
    with torch.inference_mode(False), torch.set_grad_enabled(case.op == "train"):
        network, inputs, side = _checked(case)
        with snapgen_kernels.use("auto"):
            mine = _results(case, network, inputs, run_fused)
        with plain():
            eager = _results(case, network, inputs, run)
        double = _results_in_double(case, network, inputs)
    (output, gradients), (plain_output, plain_gradients), (exact, exact_gradients) = mine, eager, double
    distance = ((plain_output.double() - exact).norm() / exact.norm()).item()
    assert distance <= torch.finfo(case.dtype).eps ** 0.5, f"{case}: plain PyTorch is {distance:.2g} from fp64"
    rounded = output.to(case.dtype)
    assert_close(f"{case}: output", rounded, plain_output.to(case.dtype), exact)
    if case.op == "train":
        found, allowed = (_distance(g, exact_gradients) for g in (gradients, plain_gradients))
        allowed = 2 * allowed + torch.finfo(case.dtype).eps
        assert found <= allowed, f"{case}: gradients are {found:.3g} from fp64; allowed {allowed:.3g}"
    return f"at {inputs[0].shape[0]}x{side}x{side}"


def _results(
    case: ModelCase, network: nn.Module, inputs: Sequence[Tensor], runner: Callable[..., Tensor]
) -> tuple[Tensor, list[Tensor]]:
    with _alike(case):
        output = runner(network, inputs)
    if not torch.is_grad_enabled():
        return output, []
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(2)).to(output)
    return output.detach(), list(torch.autograd.grad(output, list(network.parameters()), upstream))


def _results_in_double(case: ModelCase, network: nn.Module, inputs: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    wide = without_memory(case)
    wide.load_state_dict({name: value.double() for name, value in network.state_dict().items()}, assign=True)
    numbers = [value.double() if index != 1 or len(inputs) == 1 else value for index, value in enumerate(inputs)]
    with snapgen_kernels.use("reference"):
        output = run(wide, numbers)
    if not torch.is_grad_enabled():
        return output, []
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(2)).to(output)
    return output.detach(), list(torch.autograd.grad(output, list(wide.parameters()), upstream))


def _distance(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Root mean square over the tensors of each one's relative error, so that a small tensor counts as much as a large
    one."""
    errors = [((f.double() - e).norm() / e.norm().clamp_min(1e-30)).item() for f, e in zip(found, exact, strict=True)]
    return math.sqrt(sum(error * error for error in errors) / len(errors))


@cache
def yardstick(case: ModelCase) -> Tensor:
    """Plain PyTorch's output at the case's own size, which every peer is compared with."""
    network, inputs = network_and_feeds(case)
    with plain(), torch.inference_mode():
        return run(network, inputs)
