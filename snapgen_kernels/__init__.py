"""SnapGen's operations as fused kernels: forward and backward, in C++ on the CPU and Triton on the GPU.

Importing this package compiles nothing, looks at no device and sets no global: kernels load on first use.
"""

from snapgen_kernels._backend import FusedUnavailable, backends, malloc_keeps_pages, profile_range, profile_ranges, use
from snapgen_kernels.attention import CrossAttention, MultiQueryAttention, attention
from snapgen_kernels.decoder_block import DecoderBlock, decoder_block
from snapgen_kernels.decoding import norm_silu_conv
from snapgen_kernels.geglu import GEGLUFeedForward, geglu
from snapgen_kernels.group_norm_silu import GroupNormSiLU, Norm, group_norm_silu
from snapgen_kernels.qk_norm_rope import qk_norm_rope, rope_2d
from snapgen_kernels.resblock import SepResBlock, resblock
from snapgen_kernels.sepconv import SepConv2d, sepconv
from snapgen_kernels.warmup import warmup

__all__ = [
    "CrossAttention",
    "DecoderBlock",
    "FusedUnavailable",
    "GEGLUFeedForward",
    "GroupNormSiLU",
    "MultiQueryAttention",
    "Norm",
    "SepConv2d",
    "SepResBlock",
    "attention",
    "backends",
    "decoder_block",
    "geglu",
    "group_norm_silu",
    "malloc_keeps_pages",
    "norm_silu_conv",
    "profile_range",
    "profile_ranges",
    "qk_norm_rope",
    "resblock",
    "rope_2d",
    "sepconv",
    "use",
    "warmup",
]
