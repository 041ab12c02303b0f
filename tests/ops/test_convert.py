"""Blocks of diffusers in the modules of this package: exact where they can be, a warning or an error where not."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from snapgen_kernels import CrossAttention, GEGLUFeedForward, MultiQueryAttention
from snapgen_kernels.convert import LossyConversion, cross_attention, geglu_feed_forward, multi_query_attention

DIM, HEADS, HEAD, CONTEXT = 24, 3, 8, 20


def _attention(**changes: Any) -> nn.Module:
    from diffusers.models.attention_processor import Attention

    torch.manual_seed(0)
    block = Attention(**{**dict(query_dim=DIM, heads=HEADS, dim_head=HEAD, qk_norm="rms_norm"), **changes})
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return block.eval()


def _with_eps(eps: float | None) -> nn.Module:
    block = _attention()
    block.norm_k.eps = eps
    return block


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (lambda: _attention(elementwise_affine=False), "its norm_q has no weight"),
        (lambda: _with_eps(1e-3), "its norms have eps 1e-05 and 0.001"),
        (lambda: _with_eps(None), "its norms have eps 1e-05 and None"),
    ],
)
def test_norms_that_cannot_be_converted(source: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        multi_query_attention(source())


def _feed_forward(**changes: Any) -> nn.Module:
    from diffusers.models.attention import FeedForward

    torch.manual_seed(0)
    return FeedForward(**{**dict(dim=DIM, mult=2, activation_fn="geglu"), **changes}).eval()


def _with_equal_heads(block: nn.Module) -> nn.Module:
    with torch.no_grad():
        for layer in (block.to_k, block.to_v):
            layer.weight.copy_(layer.weight[:HEAD].repeat(HEADS, 1))
    return block


def _heads_given(block: nn.Module, as_dict: bool) -> tuple[Any, int | None]:
    return (dict(block.state_dict()), HEADS) if as_dict else (block, None)


@pytest.fixture(autouse=True)
def _no_warning() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error", LossyConversion)
        yield


@pytest.mark.parametrize("as_dict", [False, True])
@pytest.mark.parametrize("changes", [{}, {"qk_norm": None}, {"out_bias": False}], ids=str)
def test_self_attention_of_equal_heads_is_exact(changes: dict[str, Any], as_dict: bool) -> None:
    block = _with_equal_heads(_attention(**changes))
    mine = multi_query_attention(*_heads_given(block, as_dict))
    assert type(mine) is MultiQueryAttention
    x = torch.randn(2, 11, DIM)
    torch.testing.assert_close(mine(x), block(x))


@pytest.mark.parametrize("as_dict", [False, True])
def test_cross_attention_of_equal_heads_is_exact(as_dict: bool) -> None:
    block = _with_equal_heads(_attention(cross_attention_dim=CONTEXT))
    mine = cross_attention(*_heads_given(block, as_dict))
    assert type(mine) is CrossAttention
    x, context = torch.randn(2, 11, DIM), torch.randn(2, 5, CONTEXT)
    torch.testing.assert_close(mine(x, context), block(x, encoder_hidden_states=context))
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]])
    additive = torch.zeros(2, 1, 5).masked_fill(~mask[:, None], -1e4)
    theirs = block(x, encoder_hidden_states=context, attention_mask=additive)
    torch.testing.assert_close(mine(x, context, mask), theirs)


@pytest.mark.parametrize("as_dict", [False, True])
@pytest.mark.parametrize("bias", [True, False])
def test_feed_forward_is_exact(bias: bool, as_dict: bool) -> None:
    block = _feed_forward(bias=bias)
    mine = geglu_feed_forward(block.state_dict() if as_dict else block)
    assert type(mine) is GEGLUFeedForward and (mine.proj_in.bias is not None) == bias
    x = torch.randn(2, 11, DIM)
    torch.testing.assert_close(mine(x), block(x))


def test_heads_that_differ_are_averaged_with_a_warning() -> None:
    block = _attention()
    with pytest.warns(LossyConversion, match=r"lossy: .*% of the keys' weights \(3 heads\) and .* values'") as seen:
        mine = multi_query_attention(block)
    assert seen[0].filename == __file__, "the warning points at the caller"
    for name in ("to_k", "to_v"):
        heads = getattr(block, name).weight.unflatten(0, (HEADS, HEAD))
        torch.testing.assert_close(getattr(mine, name).weight, heads.mean(0))
    torch.testing.assert_close(mine.to_q.weight, block.to_q.weight)
    with pytest.warns(LossyConversion):
        cross_attention(block)


def test_fewer_key_heads_than_query_heads_are_pooled() -> None:
    with pytest.warns(LossyConversion, match=r"\(2 heads\)"):
        mine = multi_query_attention(_attention(heads=4, kv_heads=2, dim_head=6))
    assert mine.to_k.weight.shape == (6, DIM) and mine.num_heads == 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_weights_are_copies_that_can_be_trained(dtype: torch.dtype) -> None:
    block = _with_equal_heads(_attention()).to(dtype).requires_grad_(False)
    mine = multi_query_attention(block)
    feed_forward = geglu_feed_forward(_feed_forward().to(dtype))
    for parameter in (*mine.parameters(), *feed_forward.parameters()):
        assert parameter.dtype == dtype and parameter.requires_grad
    before = block.to_q.weight.clone()
    with torch.no_grad():
        for parameter in mine.parameters():
            parameter.zero_()
    assert torch.equal(block.to_q.weight, before)


def test_eps_is_the_blocks_unless_given() -> None:
    block = _with_equal_heads(_attention(eps=1e-3))
    assert multi_query_attention(block).eps == 1e-3
    assert multi_query_attention(block, eps=1e-4).eps == 1e-4
    assert multi_query_attention(block.state_dict(), HEADS).eps == 1e-5


def _without(block: nn.Module, name: str) -> dict[str, Tensor]:
    return {key: value for key, value in block.state_dict().items() if key != name}


def _with(name: str, value: Any) -> dict[str, Any]:
    return {**_attention().state_dict(), name: value}


@pytest.mark.parametrize(
    ("source", "heads", "error", "message"),
    [
        (lambda: 3, None, TypeError, "source is int"),
        (lambda: _attention().state_dict(), None, ValueError, "num_heads is None"),
        (lambda: _attention(), 5, ValueError, "num_heads is 5; it must divide the 24 rows"),
        (lambda: _attention(), 0, ValueError, "num_heads is 0"),
        (lambda: _without(_attention(), "to_v.weight"), 3, ValueError, "source has no to_v.weight"),
        (lambda: _without(_attention(), "norm_k.weight"), 3, ValueError, "source: has norm_q.weight alone"),
        (lambda: _attention(bias=True), None, ValueError, r"source has to_k.bias, to_q.bias, to_v.bias, for which"),
        (lambda: _attention(cross_attention_dim=CONTEXT), None, ValueError, "cross_attention converts that"),
        (lambda: _attention(qk_norm="layer_norm"), None, ValueError, "norm_k.bias, norm_q.bias"),
        (lambda: _attention(qk_norm="fp32_layer_norm"), None, ValueError, "its norm_q is a FP32LayerNorm"),
        (lambda: _attention(qk_norm="rms_norm_across_heads", kv_heads=3), None, ValueError, "norm_q.weight has shape"),
        (lambda: _attention(scale_qk=False), None, ValueError, "its scale is 1.0"),
        (lambda: _attention(residual_connection=True), None, ValueError, "its residual_connection is True"),
        (lambda: _attention(rescale_output_factor=2.0), None, ValueError, "its rescale_output_factor is 2.0"),
        (lambda: _with("to_k.weight", torch.ones(9, DIM)), 3, ValueError, "to_k.weight has 9 rows"),
        (lambda: _with("to_q.weight", torch.ones(24)), 3, ValueError, "to_q.weight has shape"),
        (lambda: _with("to_q.weight", 3), 3, TypeError, "to_q.weight is int"),
        (lambda: _with("to_out.0.bias", torch.ones(5)), 3, ValueError, "to_out.0.bias has shape"),
    ],
)  # fmt: skip
def test_attention_that_cannot_be_converted(source: Any, heads: int | None, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        multi_query_attention(source(), heads)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (lambda: _feed_forward(activation_fn="gelu"), "its activation is GELU; expected GEGLU"),
        (lambda: _feed_forward(activation_fn="swiglu"), "its activation is SwiGLU; expected GEGLU"),
        (lambda: _feed_forward(activation_fn="gelu").state_dict(), "net.0.proj.weight has shape"),
        (lambda: _feed_forward(dim_out=7), "net.2.weight has shape"),
        (lambda: nn.Linear(3, 3), "source has no net.0.proj.weight"),
    ],
)
def test_feed_forward_that_cannot_be_converted(source: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        geglu_feed_forward(source())
