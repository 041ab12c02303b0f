"""A process of `test_cache.py`: caches a folder of pictures with the small encoder and tiny text encoders.

python tests/cache_run.py DATA OUT, slowly, so that it can be killed between any two batches
"""

import sys
import time
from pathlib import Path

import torch
from small_models import SMALL

from snapgen.data.buckets import Buckets
from snapgen.data.cache import CacheConfig, write_cache
from snapgen.data.embed import FrozenText, LatentEncoder
from snapgen.data.folder import ImageFolder
from snapgen.tasks import build_autoencoder

WORDS = ["picture", *map(str, range(40))]
CONFIG = CacheConfig(shard_size=3, batch_size=2, dtype="bf16")


def encoder() -> LatentEncoder:
    torch.manual_seed(0)
    module, _ = build_autoencoder(SMALL)
    return LatentEncoder(module=module.eval(), scale=1.5, shift=0.25)


def text(width: int = 24) -> FrozenText:
    """Small CLIP and Gemma-2 of transformers, with word-level tokenizers."""
    from transformers import CLIPTextModelWithProjection, Gemma2Config, Gemma2Model

    from snapgen.text import build_tiny_text

    torch.manual_seed(1)
    tokenizer, clip = build_tiny_text(WORDS, hidden_size=16, layers=2, heads=2, max_tokens=77)
    assert isinstance(clip, CLIPTextModelWithProjection)
    settings = dict(num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=8)
    gemma = Gemma2Model(Gemma2Config(vocab_size=60, hidden_size=width, intermediate_size=32, **settings))
    return FrozenText(clips=[(tokenizer, clip.eval())], tokens=(tokenizer, gemma.eval()), max_tokens=6)


def dataset(root: Path) -> ImageFolder:
    return ImageFolder(root, 32, bucketing=Buckets(resolution=32, unit=8))


if __name__ == "__main__":
    torch.set_num_threads(1)
    slow = encoder()
    slow.module.register_forward_pre_hook(lambda *_: time.sleep(0.1))
    write_cache(dataset(Path(sys.argv[1])), Path(sys.argv[2]), encoder=slow, text=text(), config=CONFIG)
