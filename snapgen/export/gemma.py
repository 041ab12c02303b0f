"""Gemma-2 as text encoder in the form that is exported: one package, or chunks of layers that a phone loads in turn.

Two things keep its activations, which grow past 65504 in this family of models (huggingface/transformers issue 36822),
inside fp16. Both are exact but for rounding, since every RMSNorm undoes a factor on its input:
- the residual stream is held as 1/64 of itself: the factor is folded into the embeddings and into the weights of the
  norms whose outputs are added to it;
- inside attention and feed-forward, v and the gated product are held as 1/16: a norm stands behind either.
The range is then 4.2 million for the residual stream and 1.0 million within a branch. Scores are soft-capped by tanh,
whose argument may overflow without harm.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snapgen.export import modules as m
from snapgen.export.parts import Feature, Part
from snapgen.export.tools import ExportError

RESIDUAL = 64  # the residual stream is held divided by this
BRANCH = 16  # v and the gated product are held divided by this
# Of one package. 2.6B parameters are 5.2 GB in fp16: no phone loads them at once, and no converter does in 24 GiB.
# The table of embeddings alone has 590M.
CHUNK_PARAMETERS = 600_000_000


def gemma_chunks(trained: Any, *, batch: int, tokens: int, budget: int = CHUNK_PARAMETERS) -> list[GemmaChunk]:
    """transformers' `Gemma2Model` as parts of at most `budget` parameters each, in order.

    Layers and the table of embeddings are not cut; each makes a chunk of its own where it exceeds the budget. The parts
    share the memory of fp32 weights that need no change.

    Args:
        trained: the model.
        batch: sequences per call.
        tokens: length of the sequences, padded left or right.
        budget: parameters.

    Raises:
        ExportError: the model has a setting that is not exported, or a weight that no part takes.
    """
    config = trained.config
    _check(config, tokens)
    weights = {name: tensor.detach().to("cpu", torch.float32) for name, tensor in trained.state_dict().items()}
    groups: list[list[str]] = [[]]
    room = budget
    for name, size in _units(weights, config.num_hidden_layers):
        if groups[-1] and size > room:
            groups.append([])
            room = budget
        groups[-1].append(name)
        room -= size
    chunks = []
    for index, group in enumerate(groups):
        own = {name: tensor for name, tensor in weights.items() if _unit(name) in group}
        chunks.append(GemmaChunk(config, group, own, index, len(groups), batch=batch, tokens=tokens))
    left = sorted(name for name in weights if not any(_unit(name) in group for group in groups))
    if left:
        raise ExportError(f"text_encoder_3: {', '.join(left[:3])} belong to no layer that is exported")
    return chunks


class GemmaChunk(Part):
    """Some consecutive layers of Gemma-2 on sequences of one length; see `gemma_chunks`.

    The first also embeds, the last also applies the final norm. Between chunks the residual stream travels as it is
    held: [B, D, 1, L], divided by `RESIDUAL`. Rows of padding mean nothing; the denoiser's mask leaves them out.
    """

    about = "SnapGen text encoder: token ids to Gemma-2's states for the denoiser"
    causal: Tensor
    cos: Tensor
    sin: Tensor

    def __init__(
        self,
        config: Any,
        group: list[str],
        weights: dict[str, Tensor],
        index: int,
        count: int,
        *,
        batch: int,
        tokens: int,
    ) -> None:
        super().__init__()
        width = config.hidden_size
        layers = [name for name in group if name.startswith("layers.")]
        # Weights come from the state dict; none is drawn here, which would take longer than the conversion.
        with torch.device("meta"):
            self.embed_tokens = _Embedding(config) if "embed_tokens" in group else None
            self.layers = nn.ModuleDict({name.split(".")[1]: _Layer(config) for name in layers})
            self.norm = _Norm(width, config.rms_norm_eps, scale=RESIDUAL) if "norm" in group else None
        self.load_state_dict(weights, assign=True)
        self.requires_grad_(False).eval()
        if layers:
            causal = torch.full((tokens, tokens), m.MASKED).tril(-1)  # key m on the channel axis, query s last
            self.register_buffer("causal", causal.reshape(1, tokens, 1, tokens), persistent=False)
            for name, table in zip(("cos", "sin"), _rope(config, tokens), strict=True):
                self.register_buffer(name, table, persistent=False)

        half = torch.float16
        number = f"Chunk{index + 1}" if count > 1 else ""
        self.file = f"TextEncoder3{number}.mlpackage"
        states = torch.zeros(batch, width, 1, tokens, dtype=half)
        inner = f"Residual stream [B, D, 1, L], divided by {RESIDUAL}"
        if self.embed_tokens is not None:
            ids = torch.zeros(batch, tokens, dtype=torch.int32)
            self.inputs = (Feature("input_ids", "Token ids [B, L], padded to L", ids),)
        else:
            self.inputs = (Feature(f"hidden_states_{index}", inner, states),)
        if layers:
            about = "1 where a token counts, 0 where it is padding [B, 1, 1, L]; at least one 1 per sequence"
            mask = torch.ones(batch, 1, 1, tokens, dtype=half)
            self.inputs += (Feature("attention_mask", about, mask),)
        if self.norm is not None:
            about = "States of the tokens [B, L, D]; permute to [B, D, 1, L] for the denoiser"
            self.outputs = (("last_hidden_state", about),)
        else:
            self.outputs = ((f"hidden_states_{index + 1}", inner),)

    @contextlib.contextmanager
    def converting(self) -> Iterator[None]:
        """With its table in fp16: of one in fp32 the converter holds about nine copies, 21 GB for Gemma-2-2b's."""
        if self.embed_tokens is None:
            yield
            return
        table = self.embed_tokens.weight
        self.embed_tokens.weight = nn.Parameter(table.detach().half(), requires_grad=False)
        try:
            yield
        finally:
            self.embed_tokens.weight = table

    def forward(self, **features: Tensor) -> Tensor:
        """Takes `inputs` by name."""
        given = features[self.inputs[0].name]
        x = given if self.embed_tokens is None else self.embed_tokens(given).transpose(1, 2)[:, :, None]
        x = x.float()
        if len(self.layers):
            padding = (features["attention_mask"].float().permute(0, 3, 1, 2) - 1.0) * -m.MASKED  # [B, M, 1, 1]
            bias = torch.minimum(self.causal, padding)  # their sum would leave fp16
            for layer in self.layers.values():
                x = layer(x, bias, (self.cos, self.sin))
        return x.half() if self.norm is None else self.norm(x).squeeze(2).transpose(1, 2).half()


class _Embedding(nn.Embedding):
    """Gemma's factor sqrt(width) and the residual stream's are folded into the table."""

    def __init__(self, config: Any) -> None:
        super().__init__(config.vocab_size, config.hidden_size)
        factor = config.hidden_size**0.5 / RESIDUAL
        self.register_load_state_dict_pre_hook(m.on_weight("weight", lambda w: w * factor))


class _Norm(nn.Module):
    """Gemma's RMSNorm over the channels of [B, C, 1, S]: x / rms(x) * (1 + weight) * factor; x is held as x / scale."""

    def __init__(self, width: int, eps: float, *, scale: float = 1.0, factor: float = 1.0) -> None:
        super().__init__()
        self.eps = eps / scale**2
        self.weight = nn.Parameter(torch.empty(1, width, 1, 1))
        self.register_load_state_dict_pre_hook(
            m.on_weight("weight", lambda w: ((1.0 + w) * factor).reshape(1, -1, 1, 1))
        )

    def forward(self, x: Tensor) -> Tensor:
        y, r = m.scaled_rsqrt(x, (1,), self.eps)
        return y * r * self.weight


class _Layer(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        width, hidden, eps = config.hidden_size, config.intermediate_size, config.rms_norm_eps
        self.self_attn = _Attention(config)
        self.mlp = nn.ModuleDict(
            dict(
                gate_proj=m.Pointwise(width, hidden, bias=False),
                up_proj=m.Pointwise(width, hidden, bias=False),
                down_proj=m.Pointwise(hidden, width, bias=False),
            )
        )
        self.input_layernorm = _Norm(width, eps, scale=RESIDUAL)
        self.post_attention_layernorm = _Norm(width, eps, scale=BRANCH, factor=1 / RESIDUAL)
        self.pre_feedforward_layernorm = _Norm(width, eps, scale=RESIDUAL)
        self.post_feedforward_layernorm = _Norm(width, eps, scale=BRANCH, factor=1 / RESIDUAL)

    def forward(self, x: Tensor, bias: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.post_attention_layernorm(self.self_attn(self.input_layernorm(x), bias, rope))
        normed = self.pre_feedforward_layernorm(x)
        gate = F.gelu(self.mlp["gate_proj"](normed), approximate="tanh")
        hidden = gate * (self.mlp["up_proj"](normed) * (1 / BRANCH))
        return x + self.post_feedforward_layernorm(self.mlp["down_proj"](hidden))


class _Attention(nn.Module):
    """Grouped-query attention: queries of one group share a head of k and v as it is; nothing copies it."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        width, bias = config.hidden_size, bool(config.attention_bias)
        self.heads, self.kv_heads, self.head_dim = _heads(config)
        self.cap = config.attn_logit_softcapping
        self.q_proj = m.Pointwise(width, self.heads * self.head_dim, bias)
        self.k_proj = m.Pointwise(width, self.kv_heads * self.head_dim, bias)
        self.v_proj = m.Pointwise(width, self.kv_heads * self.head_dim, bias)
        self.o_proj = m.Pointwise(self.heads * self.head_dim, width, bias)

    def forward(self, x: Tensor, bias: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """x [B, D, 1, S], bias [B, M, 1, S] added to scores; the result is divided by `BRANCH`."""
        queries = self._turned(self.q_proj(x), self.heads, rope)
        keys = [key.permute(0, 3, 2, 1) for key in self._turned(self.k_proj(x), self.kv_heads, rope)]
        values = (self.v_proj(x) * (1 / BRANCH)).split(self.head_dim, dim=1)
        heads = []
        for index, query in enumerate(queries):
            group = index * self.kv_heads // self.heads
            scores = torch.einsum("bkhc,bchq->bkhq", keys[group], query)
            if self.cap is not None:
                scores = torch.tanh(scores) * self.cap
            heads.append(torch.einsum("bchk,bkhq->bchq", values[group], (scores + bias).softmax(1)))
        return self.o_proj(torch.cat(heads, dim=1))

    def _turned(self, x: Tensor, heads: int, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        """Heads [B, head_dim, 1, S] with their positions."""
        batch, _, _, tokens = x.shape
        turned = m.rotate(x.reshape(batch, heads, self.head_dim, tokens), *rope)
        return turned.reshape(batch, heads * self.head_dim, 1, tokens).split(self.head_dim, dim=1)


def _heads(config: Any) -> tuple[int, int, int]:
    return config.num_attention_heads, config.num_key_value_heads, config.head_dim


def _rope(config: Any, tokens: int) -> tuple[Tensor, Tensor]:
    """Tables [1, 1, head_dim, L] for q and k, with the root of the scores' factor in them.

    q . k then comes out as the argument of the soft cap's tanh (or as the score where there is none), small in fp16.
    """
    width = config.head_dim
    root = (config.query_pre_attn_scalar**-0.5 / (config.attn_logit_softcapping or 1.0)) ** 0.5
    frequencies = config.rope_parameters["rope_theta"] ** (-torch.arange(0, width, 2, dtype=torch.float32) / width)
    angles = torch.outer(frequencies, torch.arange(tokens, dtype=torch.float32)).repeat(2, 1)
    sign = torch.where(torch.arange(width) < width // 2, -1.0, 1.0)[:, None]
    return (angles.cos() * root)[None, None], (angles.sin() * sign * root)[None, None]


def _units(weights: dict[str, Tensor], layers: int) -> Iterator[tuple[str, int]]:
    """What is not cut, in order of execution, and its parameters."""
    for name in ("embed_tokens", *(f"layers.{index}" for index in range(layers)), "norm"):
        yield name, sum(tensor.numel() for key, tensor in weights.items() if _unit(key) == name)


def _unit(name: str) -> str:
    parts = name.split(".")
    return ".".join(parts[: 2 if parts[0] == "layers" else 1])


def _check(config: Any, tokens: int) -> None:
    """Refuse what is not exported."""
    window = config.sliding_window
    kind = (config.rope_parameters or {}).get("rope_type", "default")
    problems = {
        f"hidden_activation {config.hidden_activation!r}; exported is 'gelu_pytorch_tanh'": (
            config.hidden_activation != "gelu_pytorch_tanh"
        ),
        "bidirectional attention; exported is causal attention": bool(config.use_bidirectional_attention),
        f"rope_type {kind!r}; exported is 'default'": kind != "default",
        # Within the window sliding attention is full attention.
        f"{tokens} tokens; its sliding window is {window}, and only shorter texts are exported": (
            window is not None and tokens > window
        ),
    }
    for problem, found in problems.items():
        if found:
            raise ExportError(f"text_encoder_3: {problem}")
