"""Layers as the Neural Engine wants them: channels-first 4-D tensors, 1x1 convolutions, norms that hold in fp16.

Each takes the state dict of the layer that was trained: names are the same, and load hooks reshape, reorder or fold the
weights where the form differs. Shapes in names: B batch, C channels, S tokens (S = H * W of an image), L context
tokens, D head width, M keys. A token sequence is [B, C, 1, S].
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MASKED = -40000.0  # added to a score that is masked out: finite in fp16, where -inf would make NaN on the engine


def silu(x: Tensor) -> Tensor:
    """x * sigmoid(x). Core ML's backend fuses the two into its own fp16 `silu`; Core AI would wrap F.silu in fp32."""
    return x * torch.sigmoid(x)


def scaled_rsqrt(x: Tensor, dims: tuple[int, ...], eps: float) -> tuple[Tensor, Tensor]:
    """y and r with y * r = x / sqrt(mean(x^2 over dims) + eps), without leaving the range of fp16.

    With m = max(max|x|, sqrt(eps)), y = x / m and r = 1 / sqrt(mean(y^2) + eps / m^2). Both terms under the root lie in
    [0, 1] and their sum above 1 / n, so that no square overflows (|x| > 255 would) or vanishes (|x| < 2e-4 would), and
    eps keeps its meaning at every magnitude. Where sqrt(eps) is below fp16's smallest normal number, 2^-14, m is at
    least that, since an engine may take subnormal numbers for 0.
    """
    root = torch.tensor(eps**0.5)  # a tensor: a number over a tensor becomes Core ML's `inverse`, 1 / (x + 1e-4)
    least = root if eps >= 2.0**-28 else torch.tensor(2.0**-14)
    scale = torch.maximum(x.abs().amax(dims, keepdim=True), least)
    y = x / scale
    small = root / scale
    return y, torch.rsqrt((y * y).mean(dims, keepdim=True) + small * small)


class Pointwise(nn.Conv2d):
    """A 1x1 convolution that also loads the weight of an nn.Linear."""

    def __init__(self, in_channels: int, out_channels: int, bias: bool = True) -> None:
        super().__init__(in_channels, out_channels, 1, bias=bias)
        self.register_load_state_dict_pre_hook(on_weight("weight", lambda w: w.reshape(*w.shape[:2], 1, 1)))


class RMSNorm(nn.Module):
    """RMSNorm over `dim` of a 4-D tensor, times `factor`, which is folded into the weight on loading."""

    def __init__(self, width: int, eps: float, *, dim: int, factor: float = 1.0, order: Tensor | None = None) -> None:
        super().__init__()
        self.eps, self.dim = eps, dim
        shape = [1, 1, 1, 1]
        shape[dim] = width
        self.weight = nn.Parameter(torch.empty(shape))
        chosen = torch.arange(width) if order is None else order
        self.register_load_state_dict_pre_hook(on_weight("weight", lambda w: (w[chosen] * factor).reshape(shape)))

    def forward(self, x: Tensor) -> Tensor:
        y, r = scaled_rsqrt(x, (self.dim,), self.eps)
        return y * r * self.weight


class LayerNorm(nn.Module):
    """LayerNorm over the channels of [B, C, 1, S]."""

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(1, width, 1, 1))
        self.bias = nn.Parameter(torch.empty(1, width, 1, 1))
        for name in ("weight", "bias"):
            self.register_load_state_dict_pre_hook(on_weight(name, lambda w: w.reshape(1, -1, 1, 1)))

    def forward(self, x: Tensor) -> Tensor:
        y, r = scaled_rsqrt(x - x.mean(1, keepdim=True), (1,), self.eps)
        return y * r * self.weight + self.bias


class GroupNorm(nn.Module):
    """GroupNorm of [B, C, H, W] in rank 4: groups become the channel axis, a group's channels and rows the height."""

    def __init__(self, num_groups: int, channels: int, eps: float) -> None:
        super().__init__()
        self.num_groups, self.eps = num_groups, eps
        self.weight = nn.Parameter(torch.empty(1, channels, 1, 1))
        self.bias = nn.Parameter(torch.empty(1, channels, 1, 1))
        for name in ("weight", "bias"):
            self.register_load_state_dict_pre_hook(on_weight(name, lambda w: w.reshape(1, -1, 1, 1)))

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        grouped = x.reshape(batch, self.num_groups, channels // self.num_groups * height, width)
        y, r = scaled_rsqrt(grouped - grouped.mean((2, 3), keepdim=True), (2, 3), self.eps)
        return (y * r).reshape(batch, channels, height, width) * self.weight + self.bias


class SepConv(nn.Module):
    """Depthwise 3x3 and pointwise convolution, of stride 1 or 2, or behind a nearest 2x upsampling.

    Upsampling and the depthwise convolution become one convolution at low resolution that makes the four pixels of
    each 2x2 cell as four channels, and a pixel shuffle: the same products, and no depthwise convolution behind an
    upsampling, on which Core ML's compiler hangs (apple/coremltools issue 2367).
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, stride: int = 1, upsample: bool = False, dw_bias: bool = False
    ) -> None:
        super().__init__()
        self.upsample = upsample
        self.depthwise = nn.Conv2d(
            in_channels,
            in_channels * (4 if upsample else 1),
            3,
            stride=stride,
            padding=1,
            groups=in_channels,
            bias=dw_bias,
        )
        self.pointwise = Pointwise(in_channels, out_channels, bias=False)
        if upsample:
            self.depthwise.register_load_state_dict_pre_hook(on_weight("weight", phases))
            self.depthwise.register_load_state_dict_pre_hook(on_weight("bias", lambda b: b.repeat_interleave(4)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(x)
        if self.upsample:
            x = F.pixel_shuffle(x, 2)
        return self.pointwise(x)


def phases(weight: Tensor) -> Tensor:
    """The 3x3 kernels [4C, 1, 3, 3], at low resolution, of a nearest 2x upsampling and a convolution by [C, 1, 3, 3].

    Kernel 4c + 2a + b makes the pixel (a, b) of each cell. Along one axis, pixel 0 sees its left neighbour once and its
    own cell twice, pixel 1 its own cell twice and its right neighbour once.
    """
    taps = torch.tensor([[[1, 0, 0], [0, 1, 1], [0, 0, 0]], [[0, 0, 0], [1, 1, 0], [0, 0, 1]]]).to(weight)
    return torch.einsum("aik,bjl,ckl->cabij", taps, taps, weight[:, 0]).reshape(-1, 1, 3, 3)


class ResBlock(nn.Module):
    """The expanded separable residual block; takes SiLU(time embedding) as [B, T, 1, 1]."""

    def __init__(self, in_channels: int, out_channels: int, mid: int, temb: int, num_groups: int, eps: float) -> None:
        super().__init__()
        self.norm1 = GroupNorm(num_groups, in_channels, eps)
        self.conv1 = SepConv(in_channels, mid)
        self.time_emb_proj = Pointwise(temb, mid)
        self.norm2 = GroupNorm(num_groups, mid, eps)
        self.conv2 = SepConv(mid, out_channels)
        self.conv_shortcut = Pointwise(in_channels, out_channels) if in_channels != out_channels else None

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        h = self.conv1(silu(self.norm1(x))) + self.time_emb_proj(temb)
        h = self.conv2(silu(self.norm2(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class DecoderBlock(nn.Module):
    """The tiny decoder's block."""

    def __init__(self, channels: int, middle: int, num_groups: int, eps: float) -> None:
        super().__init__()
        self.depthwise1 = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.pointwise1 = Pointwise(channels, middle, bias=False)
        self.depthwise2 = nn.Conv2d(middle, middle, 3, padding=1, groups=middle)
        self.norm = GroupNorm(num_groups, middle, eps)
        self.pointwise2 = Pointwise(middle, channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.pointwise2(silu(self.norm(self.depthwise2(self.pointwise1(self.depthwise1(x))))))


class GEGLU(nn.Module):
    """Gated feed-forward on [B, C, 1, S]."""

    def __init__(self, width: int, hidden: int, bias: bool) -> None:
        super().__init__()
        self.proj_in = Pointwise(width, 2 * hidden, bias)
        self.proj_out = Pointwise(hidden, width, bias)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj_in(x).chunk(2, dim=1)
        return self.proj_out(value * F.gelu(gate))


class Attention(nn.Module):
    """Multi-query attention on [B, C, 1, S], self or cross, one head of queries after the other.

    All heads share k and v as they are; nothing copies them. Scores stand as [B, M, 1, S], keys on the channel axis,
    where the engine's softmax is fast. The scale is folded into the norm of q (or into q's projection). RoPE turns the
    channel pairs (2i, 2i + 1); the channels of q and k are reordered on loading so that the pairs are (i, i + D/2),
    which leaves q . k as it is and makes the rotation two slices and a concatenation. With `query_chunk`, a head's
    queries go that many at a time, so that their scores stay on the engine.
    """

    def __init__(
        self,
        dim: int,
        source_dim: int,
        num_heads: int,
        head_dim: int,
        *,
        qk_norm: bool,
        rope: bool,
        eps: float,
        query_chunk: int | None = None,
    ) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.rope, self.query_chunk = num_heads, head_dim, rope, query_chunk
        order = pairs_apart(head_dim) if rope else torch.arange(head_dim)
        scale = head_dim**-0.5
        self.to_q = Pointwise(dim, num_heads * head_dim, bias=False)
        self.to_k = Pointwise(source_dim, head_dim, bias=False)
        self.to_v = Pointwise(source_dim, head_dim, bias=False)
        self.to_out = Pointwise(num_heads * head_dim, dim)
        self.norm_q = RMSNorm(head_dim, eps, dim=2, factor=scale, order=order) if qk_norm else None
        self.norm_k = RMSNorm(head_dim, eps, dim=2, order=order) if qk_norm else None
        q_scale = 1.0 if qk_norm else scale
        for projection, heads, factor in ((self.to_q, num_heads, q_scale), (self.to_k, 1, 1.0)):
            projection.register_load_state_dict_pre_hook(on_weight("weight", _reordered(heads, order, factor)))

    def forward(self, x: Tensor, source: Tensor, rope: tuple[Tensor, Tensor] | None, bias: Tensor | None) -> Tensor:
        """x [B, dim, 1, S], source [B, source_dim, 1, M], rope [1, 1, D, S] each, bias [B, M, 1, 1] added to scores."""
        batch, tokens, keys = x.shape[0], x.shape[3], source.shape[3]
        q = self.to_q(x).reshape(batch, self.num_heads, self.head_dim, tokens)
        k = self.to_k(source).reshape(batch, 1, self.head_dim, keys)
        v = self.to_v(source)  # [B, D, 1, M]
        if self.norm_q is not None and self.norm_k is not None:
            q, k = self.norm_q(q), self.norm_k(k)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        k = k.permute(0, 3, 1, 2)  # [B, M, 1, D]
        q = q.reshape(batch, self.num_heads * self.head_dim, 1, tokens)
        queries = min(tokens, self.query_chunk or tokens)
        heads = []
        for head in q.split(self.head_dim, dim=1):
            parts = []
            for part in head.split(queries, dim=3) if queries < tokens else (head,):
                scores = torch.einsum("bkhc,bchq->bkhq", k, part)
                weights = (scores if bias is None else scores + bias).softmax(1)
                parts.append(torch.einsum("bchk,bkhq->bchq", v, weights))
            heads.append(torch.cat(parts, dim=3) if len(parts) > 1 else parts[0])
        return self.to_out(torch.cat(heads, dim=1))


def pairs_apart(width: int) -> Tensor:
    """The order of channels that moves pair (2i, 2i + 1) to (i, i + width / 2)."""
    return torch.arange(width).reshape(-1, 2).T.reshape(-1)


def rope_tables(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """`snapgen_kernels.rope_2d`'s tables [S, D] as [1, 1, D, S], ordered by `pairs_apart`, with rot's sign in sin."""
    width = cos.shape[1]
    order = pairs_apart(width)
    sign = torch.where(torch.arange(width) < width // 2, -1.0, 1.0)[:, None]
    return cos.T[order][None, None], (sin.T[order] * sign)[None, None]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x * cos + (second half, first half of x) * sin along the width D of [B, H, D, S]."""
    first, second = x.chunk(2, dim=2)
    return x * cos + torch.cat((second, first), dim=2) * sin


class TransformerBlock(nn.Module):
    """Pre-norm [self-attention,] cross-attention, gated feed-forward on [B, C, 1, S]."""

    def __init__(self, attn1: Attention | None, attn2: Attention, ff: GEGLU, width: int, eps: float) -> None:
        super().__init__()
        self.norm1 = LayerNorm(width, eps) if attn1 is not None else None
        self.attn1 = attn1
        self.norm2 = LayerNorm(width, eps)
        self.attn2 = attn2
        self.norm3 = LayerNorm(width, eps)
        self.ff = ff

    def forward(self, x: Tensor, context: Tensor, bias: Tensor, rope: tuple[Tensor, Tensor] | None) -> Tensor:
        if self.attn1 is not None and self.norm1 is not None:
            normed = self.norm1(x)
            x = x + self.attn1(normed, normed, rope, None)
        x = x + self.attn2(self.norm2(x), context, None, bias)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """GroupNorm, project in, transformer blocks on the H * W tokens, project out, add the input."""

    def __init__(self, channels: int, num_groups: int, eps: float, blocks: list[TransformerBlock]) -> None:
        super().__init__()
        self.norm = GroupNorm(num_groups, channels, eps)
        self.proj_in = Pointwise(channels, channels)
        self.blocks = nn.ModuleList(blocks)
        self.proj_out = Pointwise(channels, channels)

    def forward(self, x: Tensor, context: Tensor, bias: Tensor, rope: tuple[Tensor, Tensor] | None) -> Tensor:
        batch, channels, height, width = x.shape
        tokens = self.proj_in(self.norm(x)).reshape(batch, channels, 1, height * width)
        for block in self.blocks:
            tokens = block(tokens, context, bias, rope)
        return x + self.proj_out(tokens.reshape(batch, channels, height, width))


def _reordered(heads: int, order: Tensor, factor: float) -> Callable[[Tensor], Tensor]:
    def apply(weight: Tensor) -> Tensor:
        split = weight.reshape(heads, len(order), *weight.shape[1:])
        return (split[:, order] * factor).reshape(weight.shape)

    return apply


def on_weight(name: str, change: Callable[[Tensor], Tensor]) -> Callable[..., None]:
    """A load hook that replaces the module's entry `name`; the caller's tensors stay as they are."""

    def hook(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: object) -> None:
        if prefix + name in state_dict:
            state_dict[prefix + name] = change(state_dict[prefix + name])

    return hook
