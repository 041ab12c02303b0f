"""How a denoiser in training is told what to draw: embedded captions, with what dropout leaves of them.

Captions are dropped for classifier-free guidance (Ho and Salimans, 2022). Where there are several text encoders, each
is dropped on its own as well, as SD3 does, so that the model can be run without any of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from snapgen.data import embed
from snapgen.data.loader import Batch
from snapgen.devices import sent
from snapgen.seeds import Draws
from snapgen.text import CLIP_TOKENS, TextEmbedding, encode_tiny


class Conditioning(Protocol):
    """What embeds captions.

    Attributes:
        modules: what is trained with the denoiser, by name.
    """

    modules: dict[str, nn.Module]

    def embed(
        self, batch: Batch, draws: Draws, call: Mapping[str, nn.Module], device: torch.device
    ) -> tuple[TextEmbedding, list[str]]:
        """The batch's captions embedded, and the captions themselves, both as dropout left them.

        Args:
            call: the trained modules, to be called.
        """
        ...

    def read(self, captions: Sequence[str], call: Mapping[str, nn.Module], device: torch.device) -> TextEmbedding:
        """Captions embedded as they are."""
        ...

    def components(self) -> dict[str, Any]:
        """What a pipeline is given beside the trained modules."""
        ...

    def record(self) -> dict[str, Any]:
        """What of this decides the weights, for JSON."""
        ...


class JointText:
    """The tiny CLIP that is trained together with the denoiser.

    Args:
        caption_dropout: share of captions replaced by the empty one.
    """

    def __init__(self, tokenizer: Any, encoder: nn.Module, *, caption_dropout: float = 0.1) -> None:
        self.modules: dict[str, nn.Module] = {"text_encoder": encoder}
        self.tokenizer = tokenizer
        self.caption_dropout = _share("caption_dropout", caption_dropout)

    def embed(
        self, batch: Batch, draws: Draws, call: Mapping[str, nn.Module], device: torch.device
    ) -> tuple[TextEmbedding, list[str]]:
        _, captions = _dropout(batch.captions, draws, self.caption_dropout)
        return self.read(captions, call, device), captions

    def read(self, captions: Sequence[str], call: Mapping[str, nn.Module], device: torch.device) -> TextEmbedding:
        return encode_tiny(self.tokenizer, call["text_encoder"], captions, device)

    def components(self) -> dict[str, Any]:
        return dict(tokenizer=self.tokenizer, joint_text=True)

    def record(self) -> dict[str, Any]:
        return {"caption_dropout": self.caption_dropout}


@dataclass(frozen=True)
class Layout:
    """Where each encoder's part stands in a joined embedding (`snapgen.text.join`): CLIPs beside each other on the
    channels of the first tokens, Gemma on the tokens behind.

    Attributes:
        clips: widths of the CLIPs' states and of their pooled projections; () for none.
        gemma: whether there is a Gemma.
    """

    clips: tuple[tuple[int, int], ...]
    gemma: bool

    @property
    def encoders(self) -> int:
        return len(self.clips) + self.gemma

    def without(self, text: TextEmbedding, dropped: Sequence[Sequence[bool]]) -> TextEmbedding:
        """An embedding in which, for each encoder, the samples that `dropped` marks do not see it: zeros, and tokens
        of none masked."""
        context, mask = text.context.clone(), text.mask.clone()
        pooled = None if text.pooled is None else text.pooled.clone()
        gone = [sent(torch.tensor(list(marks)), context.device) for marks in dropped]
        first = CLIP_TOKENS if self.clips else 0
        start = pooled_start = 0
        for (width, pooled_width), marks in zip(self.clips, gone, strict=False):
            context[:, :first, start : start + width].masked_fill_(marks.view(-1, 1, 1), 0)
            if pooled is not None:
                pooled[:, pooled_start : pooled_start + pooled_width].masked_fill_(marks.view(-1, 1), 0)
            start, pooled_start = start + width, pooled_start + pooled_width
        if self.clips:
            every = torch.stack(gone[: len(self.clips)]).all(0)
            mask[:, :first] &= ~every.view(-1, 1)
        if self.gemma:
            context[:, first:].masked_fill_(gone[-1].view(-1, 1, 1), 0)
            mask[:, first:] &= ~gone[-1].view(-1, 1)
        return TextEmbedding(context, mask, pooled)


class CachedText:
    """Captions that were embedded beforehand.

    Args:
        empty: the empty caption, embedded (batch 1), which takes the place of those dropped.
        caption_dropout: share of captions replaced by the empty one.
        layout: which encoders made the embeddings; needed for `encoder_dropout`.
        encoder_dropout: share of samples that do not see an encoder, for each of them.
    """

    def __init__(
        self,
        empty: TextEmbedding,
        *,
        caption_dropout: float = 0.1,
        layout: Layout | None = None,
        encoder_dropout: float = 0.0,
    ) -> None:
        if encoder_dropout and layout is None:
            raise ValueError(
                f"encoder_dropout: got {encoder_dropout}; needs a layout that says which encoders there are"
            )
        self.modules: dict[str, nn.Module] = {}
        self.empty, self.layout = empty, layout
        self._moved: TextEmbedding = empty  # to where batches are
        self.caption_dropout = _share("caption_dropout", caption_dropout)
        self.encoder_dropout = _share("encoder_dropout", encoder_dropout)

    def embed(
        self, batch: Batch, draws: Draws, call: Mapping[str, nn.Module], device: torch.device
    ) -> tuple[TextEmbedding, list[str]]:
        if batch.text is None:
            raise ValueError("data: its captions are not embedded")
        dropped, captions = _dropout(batch.captions, draws, self.caption_dropout)
        where = batch.text.context.device
        if self._moved.context.device != where:
            self._moved = TextEmbedding(*(None if part is None else part.to(where) for part in self.empty))  # type: ignore[arg-type]
        marks = sent(torch.tensor(dropped), where)

        def chosen(own: Tensor | None, empty: Tensor | None) -> Any:
            if own is None or empty is None:
                return None
            return torch.where(marks.view(-1, *(1,) * (own.ndim - 1)), empty.to(own.dtype), own)

        text = TextEmbedding(*(chosen(own, empty) for own, empty in zip(batch.text, self._moved, strict=True)))
        return _thinned(text, self.layout, draws, self.encoder_dropout), captions

    def read(self, captions: Sequence[str], call: Mapping[str, nn.Module], device: torch.device) -> TextEmbedding:
        """The empty caption, as often as it is asked for: no other can be embedded any more."""
        if any(captions):
            raise ValueError(f"captions: got {next(filter(None, captions))!r}; only the empty caption is kept embedded")
        parts = (
            None if part is None else part.to(device).expand(len(captions), *part.shape[1:]) for part in self.empty
        )
        return TextEmbedding(*parts)  # type: ignore[arg-type]

    def components(self) -> dict[str, Any]:
        return {}

    def record(self) -> dict[str, Any]:
        return {"caption_dropout": self.caption_dropout, "encoder_dropout": self.encoder_dropout}


class FrozenText:
    """Frozen text encoders that read captions as they come (`snapgen.data.embed`).

    Args:
        encoders: CLIP-L, CLIP-G and Gemma-2, as far as they are there.
        caption_dropout: share of captions replaced by the empty one.
        encoder_dropout: share of samples that do not see an encoder, for each of them.
    """

    def __init__(
        self, encoders: embed.FrozenText, *, caption_dropout: float = 0.1, encoder_dropout: float = 0.0
    ) -> None:
        self.modules: dict[str, nn.Module] = {}
        self.encoders = encoders
        self.layout = Layout(tuple((a, b) for a, b in encoders.clip_widths), encoders.tokens is not None)
        self.caption_dropout = _share("caption_dropout", caption_dropout)
        self.encoder_dropout = _share("encoder_dropout", encoder_dropout)

    def embed(
        self, batch: Batch, draws: Draws, call: Mapping[str, nn.Module], device: torch.device
    ) -> tuple[TextEmbedding, list[str]]:
        _, captions = _dropout(batch.captions, draws, self.caption_dropout)
        text = self.read(captions, call, device)
        return _thinned(text, self.layout, draws, self.encoder_dropout), captions

    def read(self, captions: Sequence[str], call: Mapping[str, nn.Module], device: torch.device) -> TextEmbedding:
        text = self.encoders(captions, device)
        pooled = None if text.pooled is None else text.pooled.to(device, torch.float32)
        return TextEmbedding(text.context.to(device, torch.float32), text.mask.to(device), pooled)

    def components(self) -> dict[str, Any]:
        names = ["text_encoder", "text_encoder_2"][: len(self.encoders.clips)]
        parts = dict(zip(names, self.encoders.clips, strict=True))
        if self.encoders.tokens is not None:
            parts["text_encoder_3"] = self.encoders.tokens
        found: dict[str, Any] = {"max_tokens": self.encoders.max_tokens}
        for name, (tokenizer, encoder) in parts.items():
            found |= {name: encoder, name.replace("text_encoder", "tokenizer"): tokenizer}
        return found

    def record(self) -> dict[str, Any]:
        return {
            "caption_dropout": self.caption_dropout,
            "encoder_dropout": self.encoder_dropout,
            "encoders": self.encoders.record(),
        }


class PipelineText:
    """The text encoders of a pipeline as they are, frozen: what a teacher reads, its student may have to read too.

    Args:
        pipe: a `SnapGenPipeline`.
        caption_dropout: share of captions replaced by the empty one.
    """

    def __init__(self, pipe: Any, *, caption_dropout: float = 0.1) -> None:
        self.modules: dict[str, nn.Module] = {}
        self.pipe, self.caption_dropout = pipe, _share("caption_dropout", caption_dropout)
        for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
            if getattr(pipe, name) is not None:
                getattr(pipe, name).requires_grad_(False).eval()

    def embed(
        self, batch: Batch, draws: Draws, call: Mapping[str, nn.Module], device: torch.device
    ) -> tuple[TextEmbedding, list[str]]:
        _, captions = _dropout(batch.captions, draws, self.caption_dropout)
        return self.read(captions, call, device), captions

    @torch.no_grad()
    def read(self, captions: Sequence[str], call: Mapping[str, nn.Module], device: torch.device) -> TextEmbedding:
        return self.pipe.embed(captions)

    def components(self) -> dict[str, Any]:
        parts = {name: part for name, part in self.pipe.components.items() if name.startswith(("text", "token"))}
        return dict(parts, joint_text=self.pipe.config.joint_text, max_tokens=self.pipe.config.max_tokens)

    def record(self) -> dict[str, Any]:
        return {"caption_dropout": self.caption_dropout}


def _share(name: str, value: float) -> float:
    if not 0 <= value < 1:
        raise ValueError(f"{name}: got {value}; must lie in [0, 1)")
    return value


def _dropout(captions: Sequence[str], draws: Draws, share: float) -> tuple[list[bool], list[str]]:
    """Which captions are dropped, and the captions with the empty one in their place."""
    dropped = draws.chosen(share)
    return dropped, ["" if drop else caption for caption, drop in zip(captions, dropped, strict=True)]


def _thinned(text: TextEmbedding, layout: Layout | None, draws: Draws, share: float) -> TextEmbedding:
    if not share or layout is None:
        return text
    return layout.without(text, [draws.chosen(share) for _ in range(layout.encoders)])
