"""A pipeline's denoiser and decoder as CUDA graphs: at batch 1 a GPU is done with most kernels before the processor has
launched the next one, and a graph launches them all at once.

A graph replays the same kernels on the same memory. So each set of shapes has a graph of its own, whose inputs are
copied into buffers that stay; prompts, times, noise and the number of steps are contents of these and need no new one.
Captions are padded to one length for the same reason.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KEPT = 8  # sets of shapes of a function
WARMUPS = 3  # calls before a capture: they choose configs, compile kernels and let libraries take their workspaces

Replay = Callable[[], None]
Capture = Callable[[Callable[[], Tensor]], tuple[Tensor, Replay]]


def cuda_capture(function: Callable[[], Tensor]) -> tuple[Tensor, Replay]:
    """Record what `function` launches on the current device: its output, which a replay writes anew, and the replay.

    Raises:
        torch.AcceleratorError: it does something that a graph cannot hold, such as waiting for the device.
    """
    # A stream of this device: PyTorch's own for captures is of the device that was current at the first of all.
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARMUPS):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        output = function()
    return output, graph.replay


class _Recorded(NamedTuple):
    inputs: tuple[Tensor | None, ...]
    output: Tensor
    replay: Replay


class Graphed:
    """A function of tensors, recorded once for each set of shapes and dtypes and then replayed. Of more than `KEPT`
    sets the one that was called longest ago is forgotten: each holds the memory of all that its call makes.

    The output is overwritten by the next call with the same shapes.

    Args:
        function: tensors or None to a tensor, without gradients, on the GPU alone.
        module: whose weights it uses. Where these have moved, what was recorded is forgotten.
        capture: how to record; :func:`cuda_capture`.
    """

    def __init__(self, function: Callable[..., Tensor], module: nn.Module, capture: Capture = cuda_capture) -> None:
        self.function, self.module, self.capture = function, module, capture
        self.recorded: dict[tuple[Any, ...], _Recorded] = {}
        self._weights = self._places()

    def __call__(self, *inputs: Tensor | None) -> Tensor:
        key = tuple(None if value is None else (value.shape, value.dtype, value.device) for value in inputs)
        with self._on_its_device(inputs):
            found = self.recorded.pop(key, None) or self._record(inputs)
            self.recorded[key] = found  # the last in order
            for held, value in zip(found.inputs, inputs, strict=True):
                if held is not None and value is not None:
                    held.copy_(value)
            found.replay()
        return found.output

    def check(self) -> None:
        """Forget what was recorded if the weights no longer stand where they stood; changed in place they may be."""
        if self._places() != self._weights:
            self.recorded.clear()
            self._weights = self._places()

    def _record(self, inputs: Sequence[Tensor | None]) -> _Recorded:
        while len(self.recorded) >= KEPT:
            del self.recorded[next(iter(self.recorded))]
        # Buffers made in inference mode could not be written outside of it.
        with torch.inference_mode(False), torch.no_grad():
            held = tuple(None if value is None else value.detach().clone() for value in inputs)
            output, replay = self.capture(lambda: self.function(*held))
        return _Recorded(held, output, replay)

    @staticmethod
    def _on_its_device(inputs: Sequence[Tensor | None]) -> AbstractContextManager[Any]:
        """Graphs are of the device that is current while they are recorded."""
        device = next(value.device for value in inputs if value is not None)
        return torch.cuda.device(device) if device.type == "cuda" else nullcontext()

    def _places(self) -> tuple[int, ...]:
        return tuple(tensor.data_ptr() for tensor in (*self.module.parameters(), *self.module.buffers()))


class Graphs:
    """A pipeline's denoiser and decoder, recorded.

    Args:
        tokens: that every context is padded to; longer ones have graphs of their own.
        inductor: compile the denoiser by torch.compile, as one graph of its own, before it is recorded.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        decoder: Any,
        tokens: int,
        capture: Capture = cuda_capture,
        *,
        inductor: bool = False,
    ) -> None:
        self.tokens = tokens
        called = torch.compile(denoiser, fullgraph=True, dynamic=False) if inductor else denoiser

        def velocity(*inputs: Tensor | None) -> Tensor:
            return called(*inputs, return_dict=False)[0]

        self._velocity = Graphed(velocity, denoiser, capture)
        self._decode = Graphed(decoder.decode, decoder, capture)

    def check(self) -> None:
        """See `Graphed.check`."""
        self._velocity.check()
        self._decode.check()

    def denoiser(
        self,
        sample: Tensor,
        timestep: Tensor,
        context: Tensor,
        mask: Tensor | None,
        pooled: Tensor | None,
        return_dict: bool = False,
    ) -> tuple[Tensor]:
        """`SnapGenUNet.forward` with `return_dict` off, in the sampler's words."""
        if mask is None:
            mask = torch.ones(context.shape[:2], dtype=torch.bool, device=context.device)
        missing = max(0, self.tokens - context.shape[1])
        padded = F.pad(context, (0, 0, 0, missing)), F.pad(mask, (0, missing))
        times = timestep.to(sample.device, torch.float32).expand(len(sample))
        return (self._velocity(sample, times, *padded, pooled),)

    def decode(self, latents: Tensor) -> Tensor:
        """The decoder's pictures of the denoiser's latents."""
        return self._decode(latents)
