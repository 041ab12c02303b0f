"""The blocks between the kernels and the UNet: transformer block, spatial transformer, and the un-fused ablations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from snapgen_kernels import CrossAttention, GEGLUFeedForward, MultiQueryAttention, SepConv2d, SepResBlock

Rope = tuple[Tensor, Tensor]  # (cos, sin), each [H*W, head_dim]


class MultiHeadAttention(nn.Module):
    """One KV head per query head, through diffusers: the ablation ladder's first rungs. Takes no RoPE, no key mask."""

    def __init__(self, dim: int, context_dim: int | None, num_heads: int, *, head_dim: int, qk_norm: bool) -> None:
        super().__init__()
        from diffusers.models.attention_processor import Attention

        self.attention = Attention(
            query_dim=dim,
            cross_attention_dim=context_dim,
            heads=num_heads,
            dim_head=head_dim,
            qk_norm="rms_norm" if qk_norm else None,
        )

    def forward(self, x: Tensor, context: Tensor | None = None, key_mask: Tensor | None = None) -> Tensor:
        if key_mask is not None:
            # diffusers' Attention wants an additive mask over the heads.
            key_mask = torch.zeros_like(key_mask, dtype=x.dtype).masked_fill(~key_mask, -1e4)[:, None]
        return self.attention(x, encoder_hidden_states=context, attention_mask=key_mask)


class TransformerBlock(nn.Module):
    """Pre-norm [self-attention,] cross-attention, gated feed-forward on tokens [B, N, C].

    Args:
        dim: C.
        context_dim: channels of the text tokens.
        num_heads: query heads; `kv_heads="one"` shares one KV head among them (multi-query attention).
        self_attention: False drops it, as in the high-resolution stages (SnapGen, section 3.1).
        ff_ratio: hidden width of the feed-forward over `dim`.
    """

    def __init__(
        self,
        dim: int,
        context_dim: int,
        num_heads: int,
        *,
        head_dim: int,
        self_attention: bool,
        ff_ratio: float,
        kv_heads: str,
        qk_norm: bool,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim) if self_attention else None
        self.attn1: nn.Module | None = None
        self.attn2: nn.Module
        if kv_heads == "one":
            if self_attention:
                self.attn1 = MultiQueryAttention(dim, num_heads, head_dim=head_dim, qk_norm=qk_norm)
            self.attn2 = CrossAttention(dim, context_dim, num_heads, head_dim=head_dim, qk_norm=qk_norm)
        elif kv_heads == "all":
            if self_attention:
                self.attn1 = MultiHeadAttention(dim, None, num_heads, head_dim=head_dim, qk_norm=qk_norm)
            self.attn2 = MultiHeadAttention(dim, context_dim, num_heads, head_dim=head_dim, qk_norm=qk_norm)
        else:
            raise ValueError(f"kv_heads: got {kv_heads!r}; allowed are 'one' and 'all'")
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = GEGLUFeedForward(dim, int(ff_ratio * dim))

    def forward(self, x_BNC: Tensor, context_BLD: Tensor, key_mask_BL: Tensor | None, rope: Rope | None) -> Tensor:
        if self.attn1 is not None and self.norm1 is not None:
            normed = self.norm1(x_BNC)
            x_BNC = x_BNC + (self.attn1(normed, rope=rope) if rope is not None else self.attn1(normed))
        x_BNC = x_BNC + self.attn2(self.norm2(x_BNC), context_BLD, key_mask_BL)
        return x_BNC + self.ff(self.norm3(x_BNC))


class SpatialTransformer(nn.Module):
    """GroupNorm, project in, `depth` transformer blocks on the H*W tokens, project out, add the input."""

    def __init__(self, channels: int, context_dim: int, depth: int, *, norm_groups: int, **block: Any) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(norm_groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels)
        self.blocks = nn.ModuleList(TransformerBlock(channels, context_dim, **block) for _ in range(depth))
        self.proj_out = nn.Linear(channels, channels)

    def forward(self, x_BCHW: Tensor, context: Tensor, key_mask: Tensor | None, rope: Rope | None) -> Tensor:
        height, width = x_BCHW.shape[-2:]
        # With channels_last memory both reshapes are views.
        tokens = self.proj_in(self.norm(x_BCHW).permute(0, 2, 3, 1).flatten(1, 2))
        for block in self.blocks:
            tokens = block(tokens, context, key_mask, rope)
        tokens = self.proj_out(tokens).unflatten(1, (height, width))
        return x_BCHW + tokens.permute(0, 3, 1, 2)


def make_res_block(conv: str, in_channels: int, out_channels: int, temb_channels: int, norm_groups: int) -> nn.Module:
    """A residual block of the kind `conv`: "expanded" (ours), "separable" (no expansion) or "dense" (SDXL's)."""
    if conv == "dense":
        from diffusers.models.resnet import ResnetBlock2D

        return ResnetBlock2D(
            in_channels=in_channels,
            out_channels=out_channels,
            temb_channels=temb_channels,
            groups=norm_groups,
            eps=1e-5,
        )
    mid = {"expanded": 2 * max(in_channels, out_channels), "separable": out_channels}.get(conv)
    if mid is None:
        raise ValueError(f"conv: got {conv!r}; allowed are 'expanded', 'separable' and 'dense'")
    return SepResBlock(in_channels, out_channels, mid_channels=mid, temb_channels=temb_channels, num_groups=norm_groups)


class Downsample(nn.Module):
    """Halve the resolution with a stride-2 convolution, separable unless `conv` is "dense"."""

    def __init__(self, channels: int, conv: str) -> None:
        super().__init__()
        self.conv = (
            nn.Conv2d(channels, channels, 3, stride=2, padding=1)
            if conv == "dense"
            else SepConv2d(channels, channels, stride=2)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Upsample(nn.Module):
    """Double the resolution: nearest neighbour, then a convolution, separable unless `conv` is "dense"."""

    def __init__(self, channels: int, conv: str) -> None:
        super().__init__()
        self.dense = conv == "dense"
        self.conv = (
            nn.Conv2d(channels, channels, 3, padding=1) if self.dense else SepConv2d(channels, channels, upsample=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.dense:
            x = nn.functional.interpolate(x, scale_factor=2.0, mode="nearest")
        return self.conv(x)
