"""The MIL interpreter: every operation against PyTorch or numpy, its rounding, and its refusals."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("coremltools", reason="the Core ML export is an optional part")

from snapgen.export import accumulation
from snapgen.export.inspect import describe
from snapgen.export.interpreter import OPERATIONS, Program, UnsupportedOp
from snapgen.export.tools import ExportError, PackageError, coremltools, quiet

pytestmark = pytest.mark.export

X = torch.linspace(-2.9, 3.1, 2 * 4 * 6 * 6).reshape(2, 4, 6, 6)[
    :, :, torch.randperm(6, generator=torch.Generator().manual_seed(0))
]
Y = torch.sin(7 * X) + 1.5
POSITIVE = X.abs() + 0.25
WEIGHT = torch.cos(torch.arange(8 * 4 * 9, dtype=torch.float32)).reshape(8, 4, 3, 3)
MATRIX = torch.sin(torch.arange(5 * 6, dtype=torch.float32)).reshape(5, 6)
ROW = torch.cos(torch.arange(5, dtype=torch.float32))
CHANNEL = torch.sin(torch.arange(4, dtype=torch.float32)) + 2


def expectations() -> dict:
    """Operation -> list of (how to build it from mb, x, y and p = POSITIVE; what PyTorch makes of it)."""
    n = lambda tensor: tensor.numpy()  # noqa: E731
    depthwise = WEIGHT[:4, :1]
    return {
        "abs": [(lambda mb, x, y, p: mb.abs(x=x), X.abs())],
        "add": [(lambda mb, x, y, p: mb.add(x=x, y=y), X + Y)],
        "batch_norm": [
            (
                lambda mb, x, y, p: mb.batch_norm(
                    x=x, mean=n(CHANNEL), variance=n(CHANNEL), gamma=n(-CHANNEL), beta=n(CHANNEL), epsilon=0.5
                ),
                F.batch_norm(X, CHANNEL, CHANNEL, -CHANNEL, CHANNEL, eps=0.5),
            )
        ],
        "cast": [(lambda mb, x, y, p: mb.cast(x=x, dtype="int32"), X.trunc().int())],
        "ceil": [(lambda mb, x, y, p: mb.ceil(x=x), X.ceil())],
        "clip": [(lambda mb, x, y, p: mb.clip(x=x, alpha=-1.0, beta=0.5), X.clamp(-1, 0.5))],
        "concat": [
            (lambda mb, x, y, p: mb.concat(values=[x, y, x], axis=-3), torch.cat((X, Y, X), 1)),
            (
                lambda mb, x, y, p: mb.concat(values=[x, y], axis=1, interleave=True),
                torch.stack((X, Y), 2).flatten(1, 2),
            ),
        ],
        "conv": [
            (
                lambda mb, x, y, p: mb.conv(
                    x=x, weight=n(WEIGHT), pad_type="custom", pad=[1, 0, 2, 1], strides=[2, 1], dilations=[1, 2]
                ),
                F.conv2d(F.pad(X, (2, 1, 1, 0)), WEIGHT, stride=(2, 1), dilation=(1, 2)),
            ),
            (
                lambda mb, x, y, p: mb.conv(x=x, weight=n(depthwise), bias=n(CHANNEL), groups=4, pad_type="valid"),
                F.conv2d(X, depthwise, CHANNEL, groups=4),
            ),
        ],
        "cos": [(lambda mb, x, y, p: mb.cos(x=x), X.cos())],
        "einsum": [
            (
                lambda mb, x, y, p: mb.einsum(values=(x, y), equation="bkhc,bchq->bkhq"),
                torch.einsum("bkhc,bchq->bkhq", X[:, :, :4, :4], Y[:, :4, :4]),
            )
        ],
        "equal": [(lambda mb, x, y, p: mb.equal(x=x, y=x), torch.ones_like(X).bool())],
        "erf": [(lambda mb, x, y, p: mb.erf(x=x), X.erf())],
        "exp": [(lambda mb, x, y, p: mb.exp(x=x), X.exp())],
        "expand_dims": [(lambda mb, x, y, p: mb.expand_dims(x=x, axes=[-1]), X[..., None])],
        "floor": [(lambda mb, x, y, p: mb.floor(x=x), X.floor())],
        "floor_div": [(lambda mb, x, y, p: mb.floor_div(x=x, y=p), X.div(POSITIVE).floor())],
        "gather": [
            (
                lambda mb, x, y, p: mb.gather(x=x, indices=np.int32([[3, -1], [0, 3]]), axis=1, validate_indices=False),
                X[:, torch.tensor([[3, 3], [0, 3]])],
            )
        ],
        "gelu": [
            (lambda mb, x, y, p: mb.gelu(x=x, mode="EXACT"), F.gelu(X)),
            (lambda mb, x, y, p: mb.gelu(x=x, mode="TANH_APPROXIMATION"), F.gelu(X, approximate="tanh")),
            (lambda mb, x, y, p: mb.gelu(x=x, mode="SIGMOID_APPROXIMATION"), X * torch.sigmoid(1.702 * X)),
        ],
        "greater": [(lambda mb, x, y, p: mb.greater(x=x, y=y), X > Y)],
        "greater_equal": [(lambda mb, x, y, p: mb.greater_equal(x=x, y=x), X >= X)],
        "identity": [(lambda mb, x, y, p: mb.identity(x=x), X)],
        "inverse": [(lambda mb, x, y, p: mb.inverse(x=p, epsilon=0.125), 1 / (POSITIVE + 0.125))],
        "layer_norm": [
            (
                lambda mb, x, y, p: mb.layer_norm(x=x, axes=[1], gamma=n(CHANNEL), beta=n(-CHANNEL), epsilon=0.5),
                F.layer_norm(X.movedim(1, -1), (4,), CHANNEL, -CHANNEL, 0.5).movedim(-1, 1),
            )
        ],
        "less": [(lambda mb, x, y, p: mb.less(x=x, y=y), X < Y)],
        "less_equal": [(lambda mb, x, y, p: mb.less_equal(x=x, y=y), X <= Y)],
        "linear": [
            (
                lambda mb, x, y, p: mb.linear(x=mb.reshape(x=x, shape=[48, 6]), weight=n(MATRIX), bias=n(ROW)),
                F.linear(X.reshape(48, 6), MATRIX, ROW),
            )
        ],
        "log": [(lambda mb, x, y, p: mb.log(x=p, epsilon=0.5), (POSITIVE + 0.5).log())],
        "logical_and": [
            (lambda mb, x, y, p: mb.logical_and(x=mb.less(x=x, y=y), y=mb.less(x=x, y=1.0)), (X < Y) & (X < 1))
        ],
        "logical_not": [(lambda mb, x, y, p: mb.logical_not(x=mb.less(x=x, y=y)), X >= Y)],
        "logical_or": [
            (lambda mb, x, y, p: mb.logical_or(x=mb.less(x=x, y=y), y=mb.less(x=x, y=1.0)), (X < Y) | (X < 1))
        ],
        "matmul": [
            (lambda mb, x, y, p: mb.matmul(x=x, y=y, transpose_y=True), X @ Y.mT),
            (lambda mb, x, y, p: mb.matmul(x=x, y=y, transpose_x=True), X.mT @ Y),
        ],
        "maximum": [(lambda mb, x, y, p: mb.maximum(x=x, y=y), X.maximum(Y))],
        "minimum": [(lambda mb, x, y, p: mb.minimum(x=x, y=y), X.minimum(Y))],
        "mul": [(lambda mb, x, y, p: mb.mul(x=x, y=y), X * Y)],
        "not_equal": [(lambda mb, x, y, p: mb.not_equal(x=x, y=x), X != X)],
        "pixel_shuffle": [(lambda mb, x, y, p: mb.pixel_shuffle(x=x, upscale_factor=2), F.pixel_shuffle(X, 2))],
        "pow": [(lambda mb, x, y, p: mb.pow(x=p, y=y), POSITIVE**Y)],
        "real_div": [(lambda mb, x, y, p: mb.real_div(x=x, y=p), X / POSITIVE)],
        "reduce_argmax": [
            (lambda mb, x, y, p: mb.reduce_argmax(x=x, axis=2, keep_dims=True), X.argmax(2, keepdim=True))
        ],
        "reduce_l2_norm": [(lambda mb, x, y, p: mb.reduce_l2_norm(x=x, axes=[-1]), X.norm(dim=-1))],
        "reduce_max": [(lambda mb, x, y, p: mb.reduce_max(x=x, axes=[1, 3]), X.amax((1, 3)))],
        "reduce_mean": [
            (lambda mb, x, y, p: mb.reduce_mean(x=x, axes=[2, 3], keep_dims=True), X.mean((2, 3), keepdim=True)),
            (lambda mb, x, y, p: mb.reduce_mean(x=x, keep_dims=True), X.mean((0, 1, 2, 3), keepdim=True)),
        ],
        "reduce_min": [(lambda mb, x, y, p: mb.reduce_min(x=x, axes=[0]), X.amin(0))],
        "reduce_sum": [(lambda mb, x, y, p: mb.reduce_sum(x=x, axes=[2]), X.sum(2))],
        "reduce_sum_square": [(lambda mb, x, y, p: mb.reduce_sum_square(x=x, axes=[1]), X.square().sum(1))],
        "relu": [(lambda mb, x, y, p: mb.relu(x=x), X.relu())],
        "reshape": [
            (lambda mb, x, y, p: mb.reshape(x=x, shape=[4, -1, 3]), X.reshape(4, -1, 3)),
            (lambda mb, x, y, p: mb.reshape(x=x, shape=[0, 0, -1, 9]), X.reshape(2, 4, 4, 9)),
        ],
        "rsqrt": [(lambda mb, x, y, p: mb.rsqrt(x=p, epsilon=0.5), (POSITIVE + 0.5).rsqrt())],
        "scaled_dot_product_attention": [
            (
                lambda mb, x, y, p: mb.scaled_dot_product_attention(query=x, key=y, value=p),
                F.scaled_dot_product_attention(X, Y, POSITIVE),
            )
        ],
        "select": [(lambda mb, x, y, p: mb.select(cond=mb.less(x=x, y=y), a=x, b=p), torch.where(X < Y, X, POSITIVE))],
        "sigmoid": [(lambda mb, x, y, p: mb.sigmoid(x=x), X.sigmoid())],
        "silu": [(lambda mb, x, y, p: mb.silu(x=x), F.silu(X))],
        "sin": [(lambda mb, x, y, p: mb.sin(x=x), X.sin())],
        "slice_by_index": [
            (
                lambda mb, x, y, p: mb.slice_by_index(
                    x=x,
                    begin=[0, 1, -4, 5],
                    end=[2, 3, 6, 0],
                    stride=[1, 1, 2, -2],
                    begin_mask=[True, False, False, False],
                ),
                X[:, 1:3, -4::2].flip(-1)[..., :5:2],
            ),
            (
                lambda mb, x, y, p: mb.slice_by_index(
                    x=x,
                    begin=[0, -1, 0, 0],
                    end=[0, 0, 0, 3],
                    end_mask=[True, False, True, False],
                    squeeze_mask=[False, True, False, False],
                ),
                X[:, -1, :, :3],
            ),
        ],
        "softmax": [(lambda mb, x, y, p: mb.softmax(x=x, axis=1), X.softmax(1))],
        "split": [
            (lambda mb, x, y, p: mb.split(x=x, split_sizes=[1, 3], axis=1)[1], X[:, 1:]),
            (lambda mb, x, y, p: mb.split(x=x, num_splits=3, axis=2)[1], X[:, :, 2:4]),
        ],
        "sqrt": [(lambda mb, x, y, p: mb.sqrt(x=p), POSITIVE.sqrt())],
        "square": [(lambda mb, x, y, p: mb.square(x=x), X.square())],
        "squeeze": [
            (lambda mb, x, y, p: mb.squeeze(x=mb.reduce_sum(x=x, axes=[1], keep_dims=True), axes=[1]), X.sum(1)),
        ],
        "stack": [(lambda mb, x, y, p: mb.stack(values=[x, y], axis=2), torch.stack((X, Y), 2))],
        "sub": [(lambda mb, x, y, p: mb.sub(x=x, y=y), X - Y)],
        "tanh": [(lambda mb, x, y, p: mb.tanh(x=x), X.tanh())],
        "tile": [(lambda mb, x, y, p: mb.tile(x=x, reps=[1, 2, 1, 3]), X.tile(1, 2, 1, 3))],
        "transpose": [(lambda mb, x, y, p: mb.transpose(x=x, perm=[0, 2, 3, 1]), X.permute(0, 2, 3, 1))],
        "upsample_nearest_neighbor": [
            (
                lambda mb, x, y, p: mb.upsample_nearest_neighbor(x=x, scale_factor_height=2, scale_factor_width=3),
                X.repeat_interleave(2, 2).repeat_interleave(3, 3),
            )
        ],
    }


def others() -> dict:
    """As `expectations`, for the operations that packages of others have."""
    n = lambda tensor: tensor.numpy()  # noqa: E731
    unit = X / 4
    kernel = dict(kernel_sizes=[2, 3], strides=[2, 1])
    indices = torch.tensor([2, 0, 3, 1]).reshape(1, 4, 1, 1).expand(2, 4, 6, 6).contiguous()
    padded = F.pad(X, (1, 1, 1, 0), value=-math.inf)
    return {
        "acos": [(lambda mb, x, y, p: mb.acos(x=mb.mul(x=x, y=np.float32(0.25))), unit.acos())],
        "asin": [(lambda mb, x, y, p: mb.asin(x=mb.mul(x=x, y=np.float32(0.25))), unit.asin())],
        "atan": [(lambda mb, x, y, p: mb.atan(x=x), X.atan())],
        "avg_pool": [
            (lambda mb, x, y, p: mb.avg_pool(x=x, pad_type="valid", **kernel), F.avg_pool2d(X, (2, 3), (2, 1))),
            (
                lambda mb, x, y, p: mb.avg_pool(
                    x=x, kernel_sizes=[3, 3], pad_type="custom", pad=[1, 1, 1, 1], exclude_padding_from_average=True
                ),
                F.avg_pool2d(X, 3, 1, 1, count_include_pad=False),
            ),
        ],
        "clamped_relu": [
            (
                lambda mb, x, y, p: mb.clamped_relu(x=x, alpha=0.5, beta=1.5),
                torch.where(X >= 0, X, 0.5 * X).clamp(max=1.5),
            )
        ],
        "conv_transpose": [
            (
                lambda mb, x, y, p: mb.conv_transpose(
                    x=x, weight=n(WEIGHT.reshape(4, 8, 3, 3)), pad_type="custom", pad=[1, 0, 1, 1], strides=[2, 1]
                ),
                F.conv_transpose2d(X, WEIGHT.reshape(4, 8, 3, 3), stride=(2, 1))[:, :, 1:, 1:-1],
            )
        ],
        "cosh": [(lambda mb, x, y, p: mb.cosh(x=x), X.cosh())],
        "cumsum": [
            (lambda mb, x, y, p: mb.cumsum(x=x, axis=1), X.cumsum(1)),
            (
                lambda mb, x, y, p: mb.cumsum(x=x, axis=2, exclusive=True, reverse=True),
                X.flip(2).cumsum(2).flip(2) - X,
            ),
        ],
        "depth_to_space": [
            (
                lambda mb, x, y, p: mb.depth_to_space(x=x, block_size=2),
                X.reshape(2, 2, 2, 1, 6, 6).permute(0, 3, 4, 1, 5, 2).reshape(2, 1, 12, 12),
            )
        ],
        "elu": [(lambda mb, x, y, p: mb.elu(x=x, alpha=0.7), F.elu(X, 0.7))],
        "exp2": [(lambda mb, x, y, p: mb.exp2(x=x), X.exp2())],
        "flatten2d": [(lambda mb, x, y, p: mb.flatten2d(x=x, axis=2), X.reshape(8, 36))],
        "gather_along_axis": [
            (
                lambda mb, x, y, p: mb.gather_along_axis(
                    x=x, indices=np.int32(n(indices)), axis=1, validate_indices=False
                ),
                X.gather(1, indices),
            )
        ],
        "instance_norm": [
            (
                lambda mb, x, y, p: mb.instance_norm(x=x, gamma=n(CHANNEL), beta=n(-CHANNEL), epsilon=0.5),
                F.instance_norm(X, weight=CHANNEL, bias=-CHANNEL, eps=0.5),
            )
        ],
        "leaky_relu": [(lambda mb, x, y, p: mb.leaky_relu(x=x, alpha=0.2), F.leaky_relu(X, 0.2))],
        "linear_activation": [(lambda mb, x, y, p: mb.linear_activation(x=x, alpha=0.5, beta=2.0), X / 2 + 2)],
        "logical_xor": [
            (lambda mb, x, y, p: mb.logical_xor(x=mb.less(x=x, y=y), y=mb.less(x=x, y=1.0)), (X < Y) ^ (X < 1))
        ],
        "max_pool": [
            (
                lambda mb, x, y, p: mb.max_pool(x=x, pad_type="custom", pad=[1, 0, 1, 1], **kernel),
                F.max_pool2d(padded, (2, 3), (2, 1)),
            )
        ],
        "mod": [(lambda mb, x, y, p: mb.mod(x=x, y=p), X - (X / POSITIVE).floor() * POSITIVE)],
        "one_hot": [
            (
                lambda mb, x, y, p: mb.one_hot(
                    indices=mb.reduce_argmax(x=x, axis=3), one_hot_vector_size=6, axis=1, on_value=2.0, off_value=-1.0
                ),
                F.one_hot(X.argmax(3), 6).movedim(-1, 1) * 3.0 - 1.0,
            )
        ],
        "pad": [
            (
                lambda mb, x, y, p: mb.pad(x=x, pad=[1, 0, 2, 3], mode="constant", constant_val=0.5),
                F.pad(X, (2, 3, 1, 0), value=0.5),
            ),
            (lambda mb, x, y, p: mb.pad(x=x, pad=[1, 0, 2, 3], mode="reflect"), F.pad(X, (2, 3, 1, 0), mode="reflect")),
        ],
        "reduce_argmin": [(lambda mb, x, y, p: mb.reduce_argmin(x=x, axis=2), X.argmin(2))],
        "reduce_l1_norm": [(lambda mb, x, y, p: mb.reduce_l1_norm(x=x, axes=[1, 2]), X.abs().sum((1, 2)))],
        "reduce_log_sum_exp": [(lambda mb, x, y, p: mb.reduce_log_sum_exp(x=x, axes=[-1]), X.logsumexp(-1))],
        "reduce_prod": [(lambda mb, x, y, p: mb.reduce_prod(x=x, axes=[1, 3]), X.prod(3).prod(1))],
        "relu6": [(lambda mb, x, y, p: mb.relu6(x=mb.mul(x=x, y=np.float32(4))), (4 * X).clamp(0, 6))],
        "reverse": [(lambda mb, x, y, p: mb.reverse(x=x, axes=[1, 3]), X.flip(1, 3))],
        "round": [(lambda mb, x, y, p: mb.round(x=x), X.round())],
        "scaled_tanh": [(lambda mb, x, y, p: mb.scaled_tanh(x=x, alpha=0.5, beta=2.0), 0.5 * (2 * X).tanh())],
        "sigmoid_hard": [(lambda mb, x, y, p: mb.sigmoid_hard(x=x, alpha=0.2, beta=0.5), (0.2 * X + 0.5).clamp(0, 1))],
        "sign": [(lambda mb, x, y, p: mb.sign(x=x), X.sign())],
        "sinh": [(lambda mb, x, y, p: mb.sinh(x=x), X.sinh())],
        "slice_by_size": [
            (lambda mb, x, y, p: mb.slice_by_size(x=x, begin=[0, 1, 2, 0], size=[2, 2, -1, 6]), X[:, 1:3, 2:])
        ],
        "softplus": [(lambda mb, x, y, p: mb.softplus(x=x), F.softplus(X))],
        "softsign": [(lambda mb, x, y, p: mb.softsign(x=x), X / (1 + X.abs()))],
        "tan": [(lambda mb, x, y, p: mb.tan(x=mb.mul(x=x, y=np.float32(0.25))), unit.tan())],
        "threshold": [(lambda mb, x, y, p: mb.threshold(x=x, alpha=0.3), X.clamp(min=0.3))],
        "topk": [
            (lambda mb, x, y, p: mb.topk(x=x, k=2, axis=2)[0], X.topk(2, 2).values),
            (lambda mb, x, y, p: mb.topk(x=x, k=3, axis=3, ascending=True)[1], X.topk(3, 3, largest=False).indices),
        ],
    }


def save(program, path: Path) -> Path:
    """A MIL program as a package, its operations as they were written."""
    ct = coremltools()
    with quiet():
        ct.convert(
            program,
            minimum_deployment_target=ct.target.iOS18,
            compute_precision=ct.precision.FLOAT32,
            pass_pipeline=ct.PassPipeline.EMPTY,
            skip_model_load=True,
            package_dir=str(path),
        )
    return path


def build(make, path: Path, **inputs: torch.Tensor) -> Path:
    """`make(mb, **variables)` as a package with inputs of those shapes and dtypes."""
    milpython = coremltools("converters.mil.mil")
    mb, types = milpython.Builder, milpython.types
    kinds = {torch.float32: types.fp32, torch.float16: types.fp16, torch.int32: types.int32}
    names = ", ".join(inputs)
    scope = {"make": make, "mb": mb}
    # The builder names a program's inputs after the parameters of the function that it is given.
    exec(f"def program({names}): return make(mb, {names})", scope)
    specs = [mb.TensorSpec(tuple(tensor.shape), dtype=kinds[tensor.dtype]) for tensor in inputs.values()]
    return save(mb.program(input_specs=specs, opset_version=coremltools().target.iOS18)(scope["program"]), path)


def test_every_operation_agrees_with_pytorch_in_fp32(tmp_path):
    wanted = expectations() | others()
    assert wanted.keys() == OPERATIONS.keys()
    flat = [(name, how, value) for name, cases in wanted.items() for how, value in cases]
    q, k = X[:, :, :4, :4], Y[:, :4, :4]

    def program(mb, x, y, p, q, k):
        return tuple(how(mb, q, k, p) if name == "einsum" else how(mb, x, y, p) for name, how, _ in flat)

    path = build(program, tmp_path / "all.mlpackage", x=X, y=Y, p=POSITIVE, q=q, k=k)
    seen = set()
    outputs = Program(path)(
        {"x": X, "y": Y, "p": POSITIVE, "q": q, "k": k}, watch=lambda operation, name, value: seen.add(operation)
    )
    # Nothing was folded or fused away. identity is one of Core ML's that the converter writes for outputs only.
    assert seen >= wanted.keys() - {"identity"}
    for (name, _, value), got in zip(flat, outputs.values(), strict=True):
        assert got.shape == value.shape, name
        if value.is_floating_point():
            torch.testing.assert_close(got, value, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
        else:
            assert torch.equal(got, value.to(got.dtype)), name


def test_flops_count_the_products(tmp_path):
    def program(mb, x, y):
        convolved = mb.conv(x=x, weight=WEIGHT.numpy(), pad_type="custom", pad=[1, 1, 1, 1])
        return (
            convolved,
            mb.matmul(x=x, y=y, transpose_x=True),
            mb.scaled_dot_product_attention(query=x, key=y, value=y),
        )

    found = describe(build(program, tmp_path / "products.mlpackage", x=X, y=Y))
    assert found["flops"] == 2 * (2 * 8 * 36 * 4 * 9) + 2 * (8 * 6 * 6 * 6) + 2 * (2 * 8 * 6 * 6 * 6)
    assert found["weights"]["float32"] == {"count": 1, "elements": WEIGHT.numel(), "bytes": 4 * WEIGHT.numel()}
    assert found["system"] == "iOS18"


def test_values_round_to_the_declared_dtype_once(tmp_path):
    """A sum of 4096 products of fp16 numbers: exact to half an ulp of fp16, as only fp32 accumulation makes it."""
    generator = torch.Generator().manual_seed(1)
    a, b = torch.randn(4, 4096, generator=generator).half(), torch.randn(4096, 4, generator=generator).half()
    program = Program(build(lambda mb, a, b: mb.matmul(x=a, y=b), tmp_path / "sum.mlpackage", a=a, b=b))
    (got,) = program({"a": a, "b": b}).values()
    exact = a.double() @ b.double()
    assert got.dtype == torch.float16
    ulp = 2.0 ** (exact.abs().log2().floor() - 10)
    assert ((got.double() - exact).abs() <= 0.51 * ulp).all()


def test_overflow_of_fp16_shows(tmp_path):
    x = torch.tensor([100.0, 300.0]).half()
    program = Program(build(lambda mb, x: mb.sqrt(x=mb.mul(x=x, y=x)), tmp_path / "square.mlpackage", x=x))
    (got,) = program({"x": x}).values()
    assert got[0] == 100 and math.isinf(got[1])


@pytest.mark.parametrize("how", ["palettized", "int8"])
def test_compressed_weights_run_as_they_are_stored(tmp_path, how):
    weight = torch.sin(torch.arange(64.0 * 64)).reshape(64, 64, 1, 1)
    x = torch.cos(torch.arange(64.0 * 9)).reshape(1, 64, 3, 3)
    path = build(lambda mb, x: mb.conv(x=x, weight=weight.numpy()), tmp_path / "plain.mlpackage", x=x)
    ct = coremltools()
    with quiet():
        model = ct.models.MLModel(str(path), skip_model_load=True)
        optimize = ct.optimize.coreml
        if how == "palettized":
            config = optimize.OptimizationConfig(optimize.OpPalettizerConfig(mode="uniform", nbits=4))
            model = optimize.palettize_weights(model, config)
        else:
            config = optimize.OptimizationConfig(optimize.OpLinearQuantizerConfig(mode="linear_symmetric"))
            model = optimize.linear_quantize_weights(model, config)
        model.save(str(tmp_path / "small.mlpackage"))
    (got,) = Program(tmp_path / "small.mlpackage")({"x": x}).values()
    exact = F.conv2d(x, weight)
    step = 2 / 15 if how == "palettized" else 2 / 254
    # Every weight is off by at most half a step.
    bound = step / 2 * F.conv2d(x.abs(), torch.ones(1, 64, 1, 1)) + 1e-4
    assert ((got - exact).abs() <= bound).all()
    assert (got - exact).abs().max() > 1e-3  # the stored weights, not the original ones
    stored = sum(entry["bytes"] for entry in describe(tmp_path / "small.mlpackage")["weights"].values())
    assert stored < weight.numel() * 4 / 3


def test_a_missing_operation_is_named(tmp_path):
    path = build(lambda mb, x: mb.erf(x=mb.atanh(x=mb.band_part(x=x))), tmp_path / "odd.mlpackage", x=X)
    with pytest.raises(
        UnsupportedOp, match=r"odd\.mlpackage: has operations that the interpreter lacks: atanh, band_part"
    ):
        Program(path)


def test_wrong_inputs_are_refused(tmp_path):
    path = build(lambda mb, x, y: mb.add(x=x, y=y), tmp_path / "add.mlpackage", x=X, y=Y)
    program = Program(path)
    with pytest.raises(ValueError, match=r"inputs: got \['x'\]; the program takes \['x', 'y'\]"):
        program({"x": X})
    with pytest.raises(ValueError, match=r"inputs: y has shape \(2, 4\); the program takes \(2, 4, 6, 6\)"):
        program({"x": X, "y": X[:, :, 0, 0]})
    with pytest.raises(PackageError, match=r"has no function 'other'; there are \['main'\]"):
        Program(path, function="other")


def test_inputs_are_left_alone(tmp_path):
    path = build(lambda mb, x: (mb.relu(x=x), mb.identity(x=x)), tmp_path / "relu.mlpackage", x=X)
    before = X.clone()
    Program(path)({"x": X})
    assert torch.equal(X, before)


# --- sums in fp16 ---------------------------------------------------------------------------------------------------


def in_order(products) -> np.float16:
    """fp16(s + a * b) over exact products, as fp32 numbers; one by one, by numpy."""
    total = np.float16(0)
    for product in products:
        total = np.float16(np.float32(total) + np.float32(product))
    return total


def narrow(make, path: Path, **inputs: torch.Tensor) -> np.ndarray:
    (got,) = Program(build(make, path, **inputs), accumulate="fp16")(inputs).values()
    assert got.dtype == torch.float16
    return got.numpy()


def drawn(*shape: int) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))) * 3 + 1).half()


def test_products_accumulate_in_fp16(tmp_path):
    a, b = drawn(3, 200), drawn(200, 2)
    wanted = np.array([[in_order(a[i].float() * b[:, j].float()) for j in range(2)] for i in range(3)])
    assert np.array_equal(narrow(lambda mb, a, b: mb.matmul(x=a, y=b), tmp_path / "m.mlpackage", a=a, b=b), wanted)
    # The mode matters: sums in fp32 round otherwise.
    assert not np.array_equal((a.float() @ b.float()).half().numpy(), wanted)

    weight, bias = b.mT.numpy(), np.float16([0.3, -7.0])
    linear = narrow(lambda mb, a: mb.linear(x=a, weight=weight, bias=bias), tmp_path / "l.mlpackage", a=a)
    assert np.array_equal(linear, (wanted.astype(np.float32) + bias.astype(np.float32)).astype(np.float16))

    k, q = drawn(1, 5, 1, 64), drawn(1, 64, 1, 3)
    got = narrow(
        lambda mb, k, q: mb.einsum(values=(k, q), equation="bkhc,bchq->bkhq"), tmp_path / "e.mlpackage", k=k, q=q
    )
    scores = [[in_order(k[0, i, 0].float() * q[0, :, 0, j].float()) for j in range(3)] for i in range(5)]
    assert np.array_equal(got[0, :, 0], np.array(scores))


@pytest.mark.parametrize(
    ("groups", "strides", "dilations"), [(1, (1, 1), (1, 1)), (2, (2, 1), (1, 2)), (4, (1, 1), (1, 1))]
)
def test_convolutions_accumulate_in_fp16(tmp_path, groups, strides, dilations):
    """Over channels of the group, then rows and columns of the kernel; the bias last."""
    x, weight, bias = drawn(1, 4, 6, 7), drawn(4, 4 // groups, 3, 3), drawn(4)
    arguments = dict(weight=weight.numpy(), bias=bias.numpy(), groups=groups)
    got = narrow(
        lambda mb, x: mb.conv(
            x=x, pad_type="custom", pad=[1, 1, 1, 1], strides=list(strides), dilations=list(dilations), **arguments
        ),
        tmp_path / "c.mlpackage",
        x=x,
    )
    padded, per = F.pad(x.float(), (1, 1, 1, 1))[0], 4 // groups
    wanted = np.empty_like(got)
    for out in range(4):
        for row in range(got.shape[2]):
            for column in range(got.shape[3]):
                window = padded[
                    out // per * per : out // per * per + per,
                    row * strides[0] : row * strides[0] + 2 * dilations[0] + 1 : dilations[0],
                    column * strides[1] : column * strides[1] + 2 * dilations[1] + 1 : dilations[1],
                ]
                total = in_order((window * weight[out].float()).flatten())
                wanted[0, out, row, column] = np.float16(np.float32(total) + np.float32(bias[out]))
    assert np.array_equal(got, wanted)


def test_reductions_accumulate_in_fp16(tmp_path):
    x = drawn(3, 20, 30)
    rows = [in_order(row.flatten()) for row in x.float()]
    got = narrow(lambda mb, x: mb.reduce_sum(x=x, axes=[1, 2]), tmp_path / "s.mlpackage", x=x)
    assert np.array_equal(got, np.array(rows))
    got = narrow(lambda mb, x: mb.reduce_mean(x=x, axes=[-1, 1], keep_dims=True), tmp_path / "m.mlpackage", x=x)
    assert np.array_equal(got.reshape(-1), np.array([np.float16(np.float32(row) / np.float32(600)) for row in rows]))

    got = narrow(lambda mb, x: mb.softmax(x=x, axis=1), tmp_path / "x.mlpackage", x=x)
    powers = (x.float() - x.float().amax(1, keepdim=True)).exp().half()
    for i in range(3):
        for j in range(30):
            total = np.float32(in_order(powers[i, :, j].float()))
            wanted = (powers[i, :, j].float().numpy() / total).astype(np.float16)
            assert np.array_equal(got[i, :, j], wanted)


def test_a_sum_in_fp16_may_overflow_on_its_way(tmp_path):
    """60000 + 60000 - 60000 is 60000 in fp32 and inf in fp16, whatever comes after."""
    x = torch.tensor([6e4, 6e4, -6e4]).half()
    path = build(lambda mb, x: mb.reduce_sum(x=x, axes=[0], keep_dims=True), tmp_path / "s.mlpackage", x=x)
    (wide,), (small,) = (Program(path, accumulate=kind)({"x": x}).values() for kind in ("fp32", "fp16"))
    assert wide.item() == 60000 and math.isinf(small.item())


def test_what_is_too_large_or_unknown_for_sums_in_fp16_is_refused(tmp_path, monkeypatch):
    a, b = drawn(3, 200), drawn(200, 2)
    path = build(lambda mb, a, b: mb.matmul(x=a, y=b), tmp_path / "m.mlpackage", a=a, b=b)
    with pytest.raises(ValueError, match="accumulate: got 'bf16'; allowed are 'fp32' and 'fp16'"):
        Program(path, accumulate="bf16")
    monkeypatch.setattr(accumulation, "LIMIT", 1199)
    with pytest.raises(ExportError, match=r"accumulate='fp16': an operation has 1\.2e\+03 additions, at most 1e\+03"):
        Program(path, accumulate="fp16")({"a": a, "b": b})
    norm = build(lambda mb, a: mb.reduce_l2_norm(x=a, axes=[1]), tmp_path / "n.mlpackage", a=a)
    with pytest.raises(UnsupportedOp, match="accumulate='fp16': how reduce_l2_norm sums is not known"):
        Program(norm, accumulate="fp16")({"a": a})
