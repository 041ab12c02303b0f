"""CLIP text encoders in the form that is exported; see `snapgen.export.parts`. Gemma-2 is in `snapgen.export.gemma`.

How an app joins what the encoders of a large preset give, as `snapgen.text.join` does: the `hidden_embeds` of CLIP-L
and CLIP-G side by side on their last axis, zeros behind them up to the denoiser's width, Gemma-2's `last_hidden_state`
behind them on the token axis, all permuted to [B, D, 1, L]. The mask is 1 for all tokens of CLIP. `pooled_outputs` side
by side are `pooled_projections`. A pipeline without CLIP-G has zeros for it, one without CLIP-L has CLIP-G's first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from snapgen.export import modules as m
from snapgen.export.parts import Feature, Part, take_weights
from snapgen.export.tools import ExportError


class TextEncoder(Part):
    """transformers' `CLIPTextModelWithProjection` for sequences of one length.

    Needs no padding mask: padding stands behind the end token, and no token sees the ones behind it. Rows of the states
    behind the end token mean nothing to a jointly trained denoiser, whose mask leaves them out; those of CLIP-L and
    CLIP-G count.

    Args:
        trained: the model.
        batch: sequences per call.
        tokens: length of the sequences.
        penultimate: give the states before the last layer, as `snapgen.text.encode_clip` takes them of CLIP-L and
            CLIP-G, as `hidden_embeds`; otherwise the last ones, normed, as `last_hidden_state`.
        file: name of the package.

    Raises:
        ExportError: the model has an activation that is not exported, or fewer positions than `tokens`.
    """

    about = "SnapGen text encoder: token ids to the denoiser's text conditioning"
    end: Tensor
    before: Tensor

    def __init__(
        self,
        trained: Any,
        *,
        batch: int,
        tokens: int,
        penultimate: bool = False,
        file: str = "TextEncoder.mlpackage",
    ) -> None:
        super().__init__()
        config = trained.config
        self.file, self.penultimate = file, penultimate
        if config.hidden_act not in ("quick_gelu", "gelu"):
            raise ExportError(f"text encoder: hidden_act {config.hidden_act!r}; exported are 'quick_gelu' and 'gelu'")
        if tokens > config.max_position_embeddings:
            raise ExportError(f"text encoder: {tokens} tokens; it has {config.max_position_embeddings} positions")
        self.text_model = _ClipText(config, tokens)
        self.text_projection = m.Pointwise(config.hidden_size, config.projection_dim, bias=False)
        take_weights(self, trained, sliced={"text_model.embeddings.position_embedding.weight": tokens})
        # transformers takes eos_token_id 2, which old configs of CLIP hold, to mean the largest id of the sequence.
        self.largest = config.eos_token_id == 2
        self.register_buffer("end", torch.tensor(config.eos_token_id, dtype=torch.int32), persistent=False)
        # Row i sums what stands before token i, to find the first of several end tokens.
        self.register_buffer("before", torch.ones(tokens, tokens).triu(1), persistent=False)
        ids = torch.full((batch, tokens), config.eos_token_id, dtype=torch.int32)
        self.inputs = (Feature("input_ids", "Token ids [B, L], padded behind the end token", ids),)
        self.outputs = (
            ("hidden_embeds", "States of the tokens before the last layer [B, L, D]; joined on D with another CLIP's")
            if penultimate
            else ("last_hidden_state", "States of the tokens [B, L, D]; permute to [B, D, 1, L] for the denoiser"),
            ("pooled_outputs", "Projected state of the end token [B, P], for pooled_projections"),
        )

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        before_last, last = self.text_model(input_ids)  # [B, D, 1, L]
        end = input_ids.amax(1, keepdim=True) if self.largest else self.end
        ends = torch.eq(input_ids, end).float()[:, None, None, :]  # [B, 1, 1, L]
        first = ends * (1.0 - torch.matmul(ends, self.before).clamp(max=1.0))
        pooled = self.text_projection((last * first).sum(3, keepdim=True))
        states = before_last if self.penultimate else last
        return states.squeeze(2).transpose(1, 2).half(), pooled.flatten(1).half()


class _ClipText(nn.Module):
    encoder: Any

    def __init__(self, config: Any, tokens: int) -> None:
        super().__init__()
        width = config.hidden_size
        self.embeddings = nn.ModuleDict(
            dict(
                token_embedding=nn.Embedding(config.vocab_size, width),
                position_embedding=nn.Embedding(tokens, width),
            )
        )
        self.encoder = nn.ModuleDict(
            dict(layers=nn.ModuleList(_ClipLayer(config) for _ in range(config.num_hidden_layers)))
        )
        self.final_layer_norm = m.LayerNorm(width, config.layer_norm_eps)
        # Key m on the channel axis, query s last: a key behind its query is masked.
        causal = torch.full((tokens, tokens), m.MASKED).tril(-1)
        self.register_buffer("causal", causal.reshape(1, tokens, 1, tokens), persistent=False)

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """The states before the last layer, and the last ones, normed; [B, D, 1, L] each."""
        embedded = self.embeddings["token_embedding"](input_ids) + self.embeddings["position_embedding"].weight
        x = embedded.transpose(1, 2)[:, :, None]  # [B, D, 1, L]
        before = x
        for layer in self.encoder["layers"]:
            before, x = x, layer(x, self.causal)
        return before, self.final_layer_norm(x)


class _ClipLayer(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads, self.quick = config.num_attention_heads, config.hidden_act == "quick_gelu"
        names = ("q_proj", "k_proj", "v_proj", "out_proj")
        self.self_attn = nn.ModuleDict({name: m.Pointwise(width, width) for name in names})
        self.layer_norm1 = m.LayerNorm(width, config.layer_norm_eps)
        self.layer_norm2 = m.LayerNorm(width, config.layer_norm_eps)
        self.mlp = nn.ModuleDict(
            dict(fc1=m.Pointwise(width, config.intermediate_size), fc2=m.Pointwise(config.intermediate_size, width))
        )

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        x = x + self._attend(self.layer_norm1(x), bias)
        hidden = self.mlp["fc1"](self.layer_norm2(x))
        hidden = hidden * torch.sigmoid(1.702 * hidden) if self.quick else nn.functional.gelu(hidden)
        return x + self.mlp["fc2"](hidden)

    def _attend(self, x: Tensor, bias: Tensor) -> Tensor:
        width = x.shape[1] // self.heads
        q = self.self_attn["q_proj"](x) * width**-0.5
        k = self.self_attn["k_proj"](x).permute(0, 3, 2, 1)  # [B, L, 1, D]
        v = self.self_attn["v_proj"](x)
        heads = []
        for q_head, k_head, v_head in zip(q.split(width, 1), k.split(width, 3), v.split(width, 1), strict=True):
            weights = (torch.einsum("bkhc,bchq->bkhq", k_head, q_head) + bias).softmax(1)
            heads.append(torch.einsum("bchk,bkhq->bchq", v_head, weights))
        return self.self_attn["out_proj"](torch.cat(heads, dim=1))
