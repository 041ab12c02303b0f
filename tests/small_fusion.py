"""A denoiser of SnapFusion's kind small enough to train in a test, and its tasks."""

import torch
from diffusers import UNet2DConditionModel
from small_models import SMALL
from torch import nn
from weights import random_weights

from snapgen.conditioning import JointText, PipelineText
from snapgen.config import Preset
from snapgen.data.shapes import VOCABULARY
from snapgen.distill.snapfusion import FusionTask
from snapgen.fusion_presets import FUSION_PRESETS, build_fusion
from snapgen.fusion_unet import FusionUNet
from snapgen.pipeline import SnapGenPipeline
from snapgen.tasks import build_autoencoder
from snapgen.text import build_tiny_text
from snapgen.vp import make_scheduler

SMALL_FUSION = Preset(
    name="small-fusion",
    about="for tests",
    resolution=32,
    denoiser=dict(
        FUSION_PRESETS["tiny-fusion"].denoiser,
        sample_size=4,
        channels=(32, 64),
        down=(("RA",), ("R",)),
        mid="RA",
        up=(("R", "RA"), ("RA", "R")),
        num_heads=2,
        context_dim=32,
        pooled_dim=32,
    ),
    decoder=SMALL.decoder,
    encoder=SMALL.encoder,
    text=SMALL.text,
)


def small_fusion(**changes) -> FusionUNet:
    torch.manual_seed(1)
    return build_fusion(SMALL_FUSION, **changes)


def fusion_task(objective=None, *, frozen: bool = False, net: nn.Module | None = None) -> FusionTask:
    """Untrained; `frozen`: the text encoder is not trained."""
    torch.manual_seed(0)
    encoder, decoder = build_autoencoder(SMALL_FUSION)
    tokenizer, text_encoder = build_tiny_text(VOCABULARY, **SMALL_FUSION.text)
    others = {} if objective is None else {"objective": objective}
    net = net or small_fusion()
    text = JointText(tokenizer, text_encoder)
    if frozen:
        parts = dict(tokenizer=tokenizer, text_encoder=text_encoder, joint_text=True)
        text = PipelineText(SnapGenPipeline(net, decoder, make_scheduler(), **parts))
    return FusionTask(
        SMALL_FUSION,
        denoiser=net,
        text=text,
        encoder=encoder,
        decoder=decoder,
        prompts=("a red circle", "two stars"),
        steps=2,
        **others,
    )


def tiny_sd(**changes) -> UNet2DConditionModel:
    """A UNet as Stable Diffusion 1's, tiny, with random weights."""
    torch.manual_seed(2)
    arguments = dict(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=24,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    return random_weights(UNet2DConditionModel(**{**arguments, **changes}))
