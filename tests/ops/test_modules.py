"""The modules: state dicts of plain PyTorch, the numbers of plain PyTorch, errors that name the argument."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import snapgen_kernels as sk


def test_state_dict_keys() -> None:
    def keys(module: nn.Module) -> set[str]:
        return set(module.state_dict())

    assert keys(sk.SepConv2d(4, 6)) == {"depthwise.weight", "pointwise.weight"}
    assert keys(sk.SepConv2d(4, 6, dw_bias=True, pw_bias=True)) - keys(sk.SepConv2d(4, 6)) == {
        "depthwise.bias",
        "pointwise.bias",
    }
    block = {f"{n}.{p}" for n in ("norm1", "norm2", "time_emb_proj") for p in ("weight", "bias")}
    block |= {f"conv{i}.{part}.weight" for i in (1, 2) for part in ("depthwise", "pointwise")}
    assert keys(sk.SepResBlock(8, 8, temb_channels=4, num_groups=4)) == block
    shortcut = {"conv_shortcut.weight", "conv_shortcut.bias"}
    assert keys(sk.SepResBlock(8, 12, temb_channels=4, num_groups=4)) == block | shortcut
    attention = {
        "to_q.weight",
        "to_k.weight",
        "to_v.weight",
        "norm_q.weight",
        "norm_k.weight",
        "to_out.weight",
        "to_out.bias",
    }
    assert keys(sk.MultiQueryAttention(16, 2, head_dim=8)) == attention
    assert keys(sk.CrossAttention(16, 12, 2, head_dim=8)) == attention
    assert keys(sk.MultiQueryAttention(16, 2, head_dim=8, qk_norm=False)) == attention - {
        "norm_q.weight",
        "norm_k.weight",
    }
    assert keys(sk.GEGLUFeedForward(8, 12)) == {"proj_in.weight", "proj_in.bias", "proj_out.weight", "proj_out.bias"}
    decoder = {"depthwise1", "depthwise2", "norm"}
    assert keys(sk.DecoderBlock(32)) == {f"{n}.{p}" for n in decoder for p in ("weight", "bias")} | {
        "pointwise1.weight",
        "pointwise2.weight",
    }


def _close(mine: Tensor, plain: Tensor) -> None:
    torch.testing.assert_close(mine, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("outputs", [8, 12])
def test_res_block_is_its_plain_submodules(outputs: int) -> None:
    block = sk.SepResBlock(8, outputs, temb_channels=6, num_groups=4)
    assert block.conv1.pointwise.out_channels == 2 * outputs
    x, temb = torch.randn(2, 8, 5, 6), torch.randn(2, 6)
    h = block.conv1.pointwise(block.conv1.depthwise(F.silu(block.norm1(x))))
    h = h + block.time_emb_proj(F.silu(temb))[:, :, None, None]
    h = block.conv2.pointwise(block.conv2.depthwise(F.silu(block.norm2(h))))
    _close(block(x, temb), h + (x if block.conv_shortcut is None else block.conv_shortcut(x)))


def test_decoder_block_is_its_plain_submodules() -> None:
    block = sk.DecoderBlock(8, num_groups=4)
    x = torch.randn(2, 8, 5, 6)
    h = block.depthwise2(block.pointwise1(block.depthwise1(x)))
    _close(block(x), x + block.pointwise2(F.silu(block.norm(h))))


def test_feed_forward_is_its_plain_submodules() -> None:
    module = sk.GEGLUFeedForward(8, 12)
    x = torch.randn(2, 5, 8)
    value, gate = module.proj_in(x).chunk(2, -1)
    _close(module(x), module.proj_out(value * F.gelu(gate)))


def test_self_attention_is_its_plain_submodules() -> None:
    module = sk.MultiQueryAttention(24, 3, head_dim=8)
    nn.init.normal_(module.norm_q.weight)
    x = torch.randn(2, 12, 24)
    cos, sin = sk.rope_2d(3, 4, 8)
    q = module.norm_q(module.to_q(x).view(2, 12, 3, 8)).transpose(1, 2)
    k, v = module.norm_k(module.to_k(x))[:, None], module.to_v(x)[:, None]

    def turned(t: Tensor) -> Tensor:
        return t * cos + torch.stack((-t[..., 1::2], t[..., ::2]), -1).flatten(-2) * sin

    o = F.scaled_dot_product_attention(turned(q), turned(k).expand_as(q), v.expand_as(q))
    _close(module(x, (cos, sin)), module.to_out(o.transpose(1, 2).flatten(-2)))


def test_cross_attention_ignores_masked_keys_and_zeroes_a_sample_without_keys() -> None:
    module = sk.CrossAttention(24, 10, 3, head_dim=8)
    x, context = torch.randn(2, 5, 24), torch.randn(2, 7, 10)
    mask = torch.zeros(2, 7, dtype=torch.bool)
    mask[0, :4] = True
    for mode in ("auto", "reference"):
        with sk.use(mode):
            y = module(x, context, mask)
            _close(y[:1], module(x[:1], context[:1, :4]))
            torch.testing.assert_close(y[1], module.to_out.bias.expand(5, 24))
            grad = torch.autograd.grad(y.sum(), module.parameters())
            assert all(g.isfinite().all() for g in grad)


def test_rope_turns_by_relative_position() -> None:
    """q . k after rotation depends on the offsets of row and column alone, and the norm stays."""
    cos, sin = sk.rope_2d(6, 5, 16)
    q, k = torch.randn(16), torch.randn(16)
    ones = torch.ones(16)

    def score(a: tuple[int, int], b: tuple[int, int]) -> Tensor:
        at = [row * 5 + column for row, column in (a, b)]
        turned_q, _ = sk.qk_norm_rope(q.expand(1, 30, 1, 16), k.expand(1, 30, 16), ones, ones, cos, sin)
        _, turned_k = sk.qk_norm_rope(q.expand(1, 30, 1, 16), k.expand(1, 30, 16), ones, ones, cos, sin)
        return turned_q[0, at[0], 0] @ turned_k[0, at[1]]

    _close(score((0, 0), (2, 1)), score((3, 2), (5, 3)))
    _close(score((1, 4), (4, 0)), score((2, 4), (5, 0)))
    assert (score((0, 0), (2, 1)) - score((0, 0), (1, 2))).abs() > 1e-3
    _close((cos.square() + sin.square()), torch.ones(30, 16))


def test_rope_follows_its_formula() -> None:
    cos, sin = sk.rope_2d(3, 4, 8, theta=100.0)
    frequencies = [1.0, 100.0 ** (-0.5)]
    angle = torch.tensor(
        [2 * f for f in frequencies for _ in range(2)] + [3 * f for f in frequencies for _ in range(2)]
    )
    _close(cos[2 * 4 + 3], angle.cos())
    _close(sin[2 * 4 + 3], angle.sin())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sk.rope_2d(2, 2, 6), "head_dim is 6"),
        (lambda: sk.SepConv2d(4, 4, stride=3), "stride is 3"),
        (lambda: sk.group_norm_silu(torch.ones(1, 6, 2, 2), 4, torch.ones(6), torch.ones(6)), "num_groups is 4"),
        (lambda: sk.MultiQueryAttention(8, 2, head_dim=4)(torch.ones(8, 8)), "x has shape"),
        (lambda: sk.GEGLUFeedForward(8, 4)(torch.ones(2, 3, 9)), "weight has shape"),
        (
            lambda: sk.CrossAttention(8, 6, 2, head_dim=4)(
                torch.ones(1, 3, 8), torch.ones(1, 2, 6), torch.ones(1, 3) > 0
            ),
            "key_mask",
        ),
        (
            lambda: sk.attention(
                torch.ones(1, 2, 1, 4), torch.ones(1, 2, 4), torch.ones(1, 2, 4), q_weight=torch.ones(4)
            ),
            "k_weight is None",
        ),
    ],
)
def test_errors_name_the_argument(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]


def test_activation_checkpointing_and_functional_gradients() -> None:
    block = sk.SepResBlock(8, 8, temb_channels=4, num_groups=4)
    x, temb = torch.randn(2, 8, 4, 4, requires_grad=True), torch.randn(2, 4)
    plain = torch.autograd.grad(block(x, temb).sum(), x)[0]
    saved = torch.utils.checkpoint.checkpoint(block, x, temb, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(saved.sum(), x)[0], plain)
    functional = torch.func.grad(lambda t: block(t, temb).sum())(x.detach())
    torch.testing.assert_close(functional, plain)


@pytest.mark.parametrize("mode", ["auto", "reference"])
def test_group_norm_silu_without_affine_parameters(mode: str) -> None:
    x = torch.randn(2, 8, 3, 5, requires_grad=True)
    with sk.use(mode):
        y = sk.GroupNormSiLU(4, 8, affine=False)(x)
    expected = F.silu(F.group_norm(x, 4))
    torch.testing.assert_close(y, expected)
    gradient, wanted = (torch.autograd.grad(out.square().sum(), x)[0] for out in (y, expected))
    torch.testing.assert_close(gradient, wanted)
