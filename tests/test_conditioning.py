"""What dropout leaves of captions and encoders: exactly the samples that are drawn, and nothing else."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_models import denoiser_task

from snapgen.conditioning import CachedText, JointText, Layout
from snapgen.data.loader import Batch
from snapgen.seeds import Draws
from snapgen.text import CLIP_TOKENS, TextEmbedding

CPU = torch.device("cpu")
LAYOUT = Layout(((3, 2), (4, 5)), gemma=True)
GEMMA_TOKENS = 6


def embedding(batch: int) -> TextEmbedding:
    length = CLIP_TOKENS + GEMMA_TOKENS
    return TextEmbedding(
        torch.ones(batch, length, 8), torch.ones(batch, length, dtype=torch.bool), torch.ones(batch, 7)
    )


@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.booleans()), min_size=1, max_size=5))
def test_a_dropped_encoder_is_not_seen(marks):
    text = LAYOUT.without(embedding(len(marks)), list(zip(*marks, strict=True)))
    for row, (clip_l, clip_g, gemma) in enumerate(marks):
        context, mask, pooled = text.context[row], text.mask[row], text.pooled[row]
        assert context[:CLIP_TOKENS, :3].eq(not clip_l).all()
        assert context[:CLIP_TOKENS, 3:7].eq(not clip_g).all()
        assert context[CLIP_TOKENS:].eq(not gemma).all()
        assert pooled[:2].eq(not clip_l).all() and pooled[2:].eq(not clip_g).all()
        assert mask[:CLIP_TOKENS].eq(not (clip_l and clip_g)).all()
        assert mask[CLIP_TOKENS:].eq(not gemma).all()


def test_what_is_given_is_left_as_it_is():
    given_ = embedding(2)
    LAYOUT.without(given_, [[True, False]] * 3)
    assert given_.context.eq(1).all() and given_.mask.all() and given_.pooled.eq(1).all()


def test_dropped_captions_are_the_empty_one():
    empty = TextEmbedding(*(torch.zeros_like(part) for part in embedding(1)))
    cached = CachedText(empty, caption_dropout=0.5)
    draws = Draws(3, 0, range(200))
    batch = Batch(captions=[str(number) for number in range(200)], text=embedding(200))
    text, captions = cached.embed(batch, draws, {}, CPU)
    gone = [caption == "" for caption in captions]
    assert 60 < sum(gone) < 140
    for row, dropped in enumerate(gone):
        assert text.context[row].eq(not dropped).all() and text.mask[row].eq(not dropped).all()
        assert text.pooled[row].eq(not dropped).all()
    # The same samples in other batches lose the same captions.
    halves = []
    for part in (range(100), range(100, 200)):
        piece = Batch(captions=[str(number) for number in part], text=embedding(100))
        halves += cached.embed(piece, Draws(3, 0, part), {}, CPU)[1]
    assert halves == captions


def test_encoders_are_dropped_each_on_its_own():
    cached = CachedText(embedding(1), caption_dropout=0.0, layout=LAYOUT, encoder_dropout=0.5)
    text, _ = cached.embed(Batch(captions=[""] * 400, text=embedding(400)), Draws(0, 0, range(400)), {}, CPU)
    seen = torch.stack((text.context[:, 0, 0], text.context[:, 0, 3], text.context[:, -1, 0])).bool()
    # Eight combinations of three coins: each about 50 of 400, six standard deviations are 40.
    kinds = (seen.long() * torch.tensor([[1], [2], [4]])).sum(0).bincount(minlength=8)
    assert kinds.min() > 10 and kinds.max() < 90


def test_joint_text_gives_gradients_to_its_encoder():
    task = denoiser_task()
    joint = JointText(task.text.tokenizer, task.modules["text_encoder"], caption_dropout=0.0)
    batch = Batch(captions=["a red circle", "two stars"])
    text, captions = joint.embed(batch, Draws(0, 0, range(2)), task.call, CPU)
    assert captions == batch.captions
    text.context.square().sum().backward()
    assert task.modules["text_encoder"].text_model.embeddings.token_embedding.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("change", [dict(caption_dropout=1.0), dict(caption_dropout=-0.1), dict(encoder_dropout=0.2)])
def test_wrong_shares_are_named(change):
    (name,) = change
    with pytest.raises(ValueError, match=name):
        CachedText(embedding(1), **change)
    if name == "caption_dropout":
        with pytest.raises(ValueError, match=name):
            JointText(None, torch.nn.Identity(), **change)


def test_captions_that_are_not_embedded_are_named():
    with pytest.raises(ValueError, match="not embedded"):
        CachedText(embedding(1)).embed(Batch(captions=["a"]), Draws(0, 0, range(1)), {}, CPU)
