"""A denoiser of Stable Diffusion 3's kind with `SnapGenUNet`'s call: a small teacher for the tiny world."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin, SD3Transformer2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention_processor import JointAttnProcessor2_0
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from snapgen.unet import SnapGenUNet, UNetOutput


class MMDiT(ModelMixin, ConfigMixin):
    """Velocity of the rectified flow by diffusers' `SD3Transformer2DModel`, which is `transformer` here.

    As in SD3, text has a fixed length: it is padded with zeros to `context_tokens`, and padding is attended to. So what
    a sample gives does not depend on the longest caption of its batch.

    Args:
        sample_size: latent height and width that it is trained at; twice as much is taken.
        in_channels: latent channels.
        patch_size: latent cells on a side of a token.
        num_layers: joint transformer blocks. num_heads, head_dim: of each; their product is the width.
        context_dim: channels of the text tokens. pooled_dim: of the pooled text embedding.
        context_tokens: text tokens after padding.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        *,
        sample_size: int,
        in_channels: int,
        patch_size: int,
        num_layers: int,
        num_heads: int,
        context_dim: int,
        pooled_dim: int,
        context_tokens: int,
        head_dim: int = 64,
    ) -> None:
        super().__init__()
        self.transformer = SD3Transformer2DModel(
            sample_size=sample_size,
            patch_size=patch_size,
            in_channels=in_channels,
            out_channels=in_channels,
            num_layers=num_layers,
            num_attention_heads=num_heads,
            attention_head_dim=head_dim,
            joint_attention_dim=context_dim,
            caption_projection_dim=num_heads * head_dim,
            pooled_projection_dim=pooled_dim,
            pos_embed_max_size=2 * sample_size // patch_size,
            qk_norm="rms_norm",
        )
        self.transformer.set_attn_processor(_JointAttention())
        # Every block starts as the identity (adaLN-Zero of DiT, section 3.2); diffusers leaves that to checkpoints.
        for block in self.transformer.transformer_blocks:
            for norm in (block.norm1, block.norm1_context):
                nn.init.zeros_(norm.linear.weight)
                nn.init.zeros_(norm.linear.bias)
        nn.init.zeros_(self.transformer.proj_out.weight)
        nn.init.zeros_(self.transformer.proj_out.bias)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor | None = None,
        pooled_projections: Tensor | None = None,
        return_dict: bool = True,
    ) -> UNetOutput | tuple[Tensor]:
        """Predict the velocity.

        Args:
            sample: noisy latents [B, in_channels, H, W]; H and W multiples of `patch_size`.
            timestep: 1000 * t with t in [0, 1] (1 is pure noise): a number or [B].
            encoder_hidden_states: text tokens [B, L, context_dim], L at most `context_tokens`.
            encoder_attention_mask: bool [B, L], True where a token counts; the others are set to zero.
            pooled_projections: pooled text [B, pooled_dim].

        Raises:
            ValueError: a shape does not fit, or `pooled_projections` is missing.
        """
        config = self.config
        if sample.ndim != 4 or sample.shape[1] != config.in_channels:
            raise ValueError(f"sample: got shape {tuple(sample.shape)}; expected [B, {config.in_channels}, H, W]")
        if sample.shape[2] % config.patch_size or sample.shape[3] % config.patch_size:
            raise ValueError(
                f"sample: height and width must be multiples of {config.patch_size}, got {tuple(sample.shape[2:])}"
            )
        if pooled_projections is None:
            raise ValueError("pooled_projections: is needed")
        missing = config.context_tokens - encoder_hidden_states.shape[1]
        if encoder_hidden_states.ndim != 3 or encoder_hidden_states.shape[2] != config.context_dim or missing < 0:
            raise ValueError(
                f"encoder_hidden_states: got shape {tuple(encoder_hidden_states.shape)}; "
                f"expected [B, L, {config.context_dim}], L at most {config.context_tokens}"
            )
        context = encoder_hidden_states
        if encoder_attention_mask is not None:
            context = context * encoder_attention_mask.unsqueeze(-1).to(context.dtype)
        velocity = self.transformer(
            hidden_states=sample,
            timestep=torch.as_tensor(timestep, device=sample.device).expand(sample.shape[0]),
            encoder_hidden_states=nn.functional.pad(context, (0, 0, 0, missing)),
            pooled_projections=pooled_projections,
            return_dict=False,
        )[0]
        return UNetOutput(sample=velocity) if return_dict else (velocity,)


class _JointAttention(JointAttnProcessor2_0):
    """diffusers' joint attention, on CPUs as plain products: at a few dozen tokens PyTorch's attention that saves
    memory is several times slower there, its backward above all."""

    def __call__(self, attn: Any, hidden_states: Tensor, *inputs: Any, **named: Any) -> Any:
        with sdpa_kernel(SDPBackend.MATH) if hidden_states.device.type == "cpu" else nullcontext():
            return super().__call__(attn, hidden_states, *inputs, **named)


def make_denoiser(flags: dict[str, Any]) -> nn.Module:
    """A preset's denoiser with fresh weights, of its keyword arguments: those of an `MMDiT` name a `patch_size`."""
    return MMDiT(**flags) if "patch_size" in flags else SnapGenUNet(**flags)
