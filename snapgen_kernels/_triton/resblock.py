"""The residual block's forward on the GPU: two halves of ``sepconv.py``, the second one's statistics out of the first
one's product; the contract is in ``snapgen_kernels/resblock.py``.

In units of one C-channel image, with twice as many channels in the middle: the statistics read 1, the first half reads
1 and writes 2, the second reads 2 and the residual 1 and writes 1. The depthwise images (1 and 2, written and read)
stay in the L2 cache where a few samples of them fit.
"""

from __future__ import annotations

from torch import Tensor

from snapgen_kernels._triton import common
from snapgen_kernels._triton.common import new_channels_last
from snapgen_kernels._triton.depthwise import Affine, by_tap
from snapgen_kernels._triton.group_norm_silu import merge_moments, moments
from snapgen_kernels._triton.pointwise import Epilogue, Pair
from snapgen_kernels._triton.sepconv import Half, into, run
from snapgen_kernels.group_norm_silu import new_statistics
from snapgen_kernels.sepconv import new_image


def forward(
    x: Tensor,
    shift: Tensor,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    dw1_weight: Tensor,
    pw1_weight: Tensor,
    norm2_weight: Tensor,
    norm2_bias: Tensor,
    dw2_weight: Tensor,
    pw2_weight: Tensor,
    shortcut_weight: Tensor | None,
    shortcut_bias: Tensor | None,
    num_groups: int,
    eps: float,
) -> tuple[Tensor, ...]:
    """y, h, and mean and rstd of both norms; the arguments are those of ``snapgen::resblock``."""
    batch, _, height, width = x.shape
    y = new_image(x, pw2_weight.shape[0], height, width)
    h = new_channels_last(x, batch, pw1_weight.shape[0], height, width)
    if h.numel() == 0:
        nothing = [t.fill_(float("nan")) for _ in range(2) for t in new_statistics(x, num_groups)]
        return y, h, *nothing
    dense = common.channels_last(x)
    first = moments(dense, num_groups, eps)
    norm1 = Affine(*first, norm1_weight.contiguous(), norm1_bias.contiguous(), num_groups)
    time = Epilogue(shift=shift.contiguous())
    found = run(Half(dense, by_tap(dw1_weight), pw1_weight.contiguous(), None, norm1, time, statistics=True), h)
    assert found is not None
    second = merge_moments(found.part, height * width, found.chunk, num_groups, eps)
    norm2 = Affine(*second, norm2_weight.contiguous(), norm2_bias.contiguous(), num_groups)
    if shortcut_weight is None:
        ending = Epilogue(residual=dense)
    else:
        bias = None if shortcut_bias is None else shortcut_bias.contiguous()
        ending = Epilogue(bias=bias, shortcut=Pair(dense, shortcut_weight.contiguous()))
    out = into(y)
    if out.numel():
        run(Half(h, by_tap(dw2_weight), pw2_weight.contiguous(), None, norm2, ending), out)
    return y if out is y else y.copy_(out), h, *first, *second
