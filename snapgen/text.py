"""Text encoders: CLIP-L and CLIP-G joined on channels, Gemma-2 joined on tokens, each droppable; and a tiny CLIP.

The large ones are those of SnapGen (77 + 256 tokens, 2304 channels, pooled 2048). The tiny one is a CLIP text model of
transformers with a word-level tokenizer, trained together with the denoiser.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from snapgen.devices import sent

CLIP_TOKENS = 77


class TextEmbedding(NamedTuple):
    """What the denoiser is conditioned on."""

    context: Tensor  # [B, L, context_dim]
    mask: Tensor  # bool [B, L], True where a token counts
    pooled: Tensor | None  # [B, pooled_dim]


def build_tiny_text(
    words: Sequence[str], *, hidden_size: int, layers: int, heads: int, max_tokens: int
) -> tuple[Any, nn.Module]:
    """A word-level tokenizer over `words` and a CLIP text model with random weights, both transformers'."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, PreTrainedTokenizerFast

    # CLIPTextModel treats eos id 2 as a historic special case, so <eos> is 3.
    specials = ("<pad>", "<unk>", "<bos>", "<eos>")
    vocabulary = {word: index for index, word in enumerate((*specials, *dict.fromkeys(words)))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", vocabulary["<bos>"]), ("<eos>", vocabulary["<eos>"])]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<bos>",
        eos_token="<eos>",
        model_max_length=max_tokens,
    )
    config = CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        projection_dim=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=max_tokens,
        pad_token_id=vocabulary["<pad>"],
        bos_token_id=vocabulary["<bos>"],
        eos_token_id=vocabulary["<eos>"],
    )
    return tokenizer, CLIPTextModelWithProjection(config)


def encode_tiny(
    tokenizer: Any, encoder: nn.Module, prompts: Sequence[str], device: torch.device | str
) -> TextEmbedding:
    """Embed prompts with the jointly trained CLIP: last hidden states, and the projected end token as pooled.

    Differentiable. Prompts are padded to the longest of the batch.
    """
    tokens = tokenizer(list(prompts), padding=True, return_tensors="pt")
    if tokens.input_ids.shape[1] > tokenizer.model_max_length:
        longest = max(prompts, key=lambda prompt: len(prompt.split()))
        raise ValueError(
            f"prompt: {tokens.input_ids.shape[1] - 2} words are too many, at most {tokenizer.model_max_length - 2} fit "
            f"({longest[:60]!r})"
        )
    ids, mask = sent(tokens.input_ids, device), sent(tokens.attention_mask, device)
    output = encoder(input_ids=ids, attention_mask=mask)
    return TextEmbedding(output.last_hidden_state, mask.bool(), output.text_embeds)


def encode_clip(
    models: Sequence[tuple[Any, nn.Module]], prompts: Sequence[str], device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """CLIP-L and CLIP-G, each a (tokenizer, encoder).

    Returns:
        Penultimate hidden states [B, 77, 768 + 1280] and pooled projections [B, 768 + 1280]. Of a text model without
        projection, which is Stable Diffusion 1's, the last states and the pooled one.
    """
    states, pooled = [], []
    for tokenizer, encoder in models:
        tokens = tokenizer(
            list(prompts), padding="max_length", max_length=CLIP_TOKENS, truncation=True, return_tensors="pt"
        )
        output = encoder(input_ids=sent(tokens.input_ids, device), output_hidden_states=True)
        if hasattr(output, "text_embeds"):
            states.append(output.hidden_states[-2])
            pooled.append(output.text_embeds)
        else:
            states.append(output.last_hidden_state)
            pooled.append(output.pooler_output)
    return torch.cat(states, -1), torch.cat(pooled, -1)


def encode_gemma(
    tokenizer: Any, encoder: nn.Module, prompts: Sequence[str], max_tokens: int, device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """Gemma-2's last hidden states [B, max_tokens, 2304] and bool mask [B, max_tokens]."""
    tokens = tokenizer(list(prompts), padding="max_length", max_length=max_tokens, truncation=True, return_tensors="pt")
    mask = sent(tokens.attention_mask, device)
    output = encoder(input_ids=sent(tokens.input_ids, device), attention_mask=mask)
    return output.last_hidden_state, mask.bool()


def join(
    clip: tuple[Tensor, Tensor] | None,
    gemma: tuple[Tensor, Tensor] | None,
    *,
    context_dim: int,
    pooled_dim: int | None,
    batch: int,
    device: torch.device | str,
    dtype: torch.dtype,
) -> TextEmbedding:
    """CLIP states zero-padded to `context_dim`, then Gemma's tokens behind them; a dropped encoder leaves its part out.

    A dropped CLIP gives a zero pooled vector; a missing CLIP-G leaves its channels zero.

    Raises:
        ValueError: both are dropped, or an encoder is wider than the denoiser's context.
    """
    parts, masks = [], []
    pooled = None if pooled_dim is None else torch.zeros(batch, pooled_dim, device=device, dtype=dtype)
    if clip is not None:
        states, clip_pooled = clip
        if states.shape[-1] > context_dim:
            raise ValueError(
                f"text encoders: CLIP states are {states.shape[-1]} wide, the denoiser takes {context_dim}"
            )
        parts.append(nn.functional.pad(states.to(dtype), (0, context_dim - states.shape[-1])))
        masks.append(torch.ones(states.shape[:2], dtype=torch.bool, device=device))
        if pooled is not None:
            pooled[:, : clip_pooled.shape[-1]] = clip_pooled
    if gemma is not None:
        states, mask = gemma
        if states.shape[-1] != context_dim:
            raise ValueError(
                f"text encoders: Gemma states are {states.shape[-1]} wide, the denoiser takes {context_dim}"
            )
        parts.append(states.to(dtype))
        masks.append(mask)
    if not parts:
        raise ValueError("text encoders: all are dropped; at least one of CLIP-L, CLIP-G and Gemma-2 is needed")
    return TextEmbedding(torch.cat(parts, 1), torch.cat(masks, 1), pooled)
