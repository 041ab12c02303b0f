"""Teachers small enough for tests: a transformer of SD3's kind on the small preset's latents, and an SD3 folder."""

from pathlib import Path

import torch
from small_models import SMALL, denoiser_task
from torch import nn

from snapgen.config import Preset
from snapgen.data.shapes import VOCABULARY
from snapgen.distill.teacher import Teacher
from snapgen.tasks import DenoiserTask, build_denoiser
from snapgen.text import encode_tiny

SMALL_TEACHER = Preset(
    name="small-teacher",
    about="for tests",
    resolution=32,
    denoiser=dict(
        sample_size=4, in_channels=8, patch_size=1, num_layers=3, num_heads=2, head_dim=16, context_dim=32,
        pooled_dim=32, context_tokens=16,
    ),
    decoder=SMALL.decoder,
    encoder=SMALL.encoder,
    text=SMALL.text,
)  # fmt: skip


def spread_weights(module: nn.Module, seed: int = 7) -> nn.Module:
    """Weights as after training in that no gate is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return module


def small_teacher(guidance: float = 1.0) -> Teacher:
    torch.manual_seed(11)
    network, encoder, tokenizer = build_denoiser(SMALL_TEACHER, VOCABULARY)
    spread_weights(network)
    encoder.eval()
    return Teacher(
        network,
        lambda captions: encode_tiny(tokenizer, encoder, captions, "cpu"),
        guidance=guidance,
        record={"teacher": "small"},
    )


def taught_task(make) -> DenoiserTask:
    """The small student's task, with the objective that `make(teacher, student)` gives."""
    plain = denoiser_task()
    student = spread_weights(plain.modules["denoiser"], 3)
    return DenoiserTask(
        SMALL,
        denoiser=student,
        text=plain.text,
        encoder=plain.encoder,
        decoder=plain.decoder,
        objective=make(small_teacher(), student),
        prompts=("a red circle", "two stars"),
    )


def sd3_folder(folder: Path, *, t5: bool = True, channels: int = 8) -> Path:
    """A random Stable Diffusion 3.5 pipeline as diffusers saves it: transformer, scheduler, VAE, CLIP twice, T5."""
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )
    from transformers import (
        CLIPTextConfig,
        CLIPTextModelWithProjection,
        CLIPTokenizer,
        T5Config,
        T5EncoderModel,
        T5Tokenizer,
    )

    torch.manual_seed(5)
    letters = [*"abcdefghijklmnopqrstuvwxyz"]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    clip_words = {word: index for index, word in enumerate(words)}

    def clip(width: int) -> tuple[nn.Module, CLIPTokenizer]:
        config = CLIPTextConfig(
            vocab_size=len(words), hidden_size=width, intermediate_size=32, projection_dim=width,
            num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=77,
            bos_token_id=clip_words["<|startoftext|>"], eos_token_id=clip_words["<|endoftext|>"],
        )  # fmt: skip
        return CLIPTextModelWithProjection(config), CLIPTokenizer(vocab=clip_words, merges=[], model_max_length=77)

    (clip_l, tokenizer), (clip_g, tokenizer_2) = clip(16), clip(24)
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0), *((letter, -2.0) for letter in letters)]
    t5_config = T5Config(vocab_size=200, d_model=48, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=channels, out_channels=channels, num_layers=3, attention_head_dim=8,
        num_attention_heads=4, joint_attention_dim=48, caption_projection_dim=32, pooled_projection_dim=40,
        pos_embed_max_size=8, dual_attention_layers=(0, 1), qk_norm="rms_norm",
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8,), norm_num_groups=4, latent_channels=channels, layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",),
    )  # fmt: skip
    StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=clip_l,
        tokenizer=tokenizer,
        text_encoder_2=clip_g,
        tokenizer_2=tokenizer_2,
        text_encoder_3=T5EncoderModel(t5_config) if t5 else None,
        tokenizer_3=T5Tokenizer(vocab=pieces, model_max_length=256) if t5 else None,
    ).save_pretrained(folder)
    return folder
