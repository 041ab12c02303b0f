"""What the published rules look for: each check says in a few words what speaks against an operation, or None.

`snapgen.export.rules` has the rules that they belong to, with verdicts and sources.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from snapgen.export.graph import Graph, Operation, Value

# Bytes that an operation's tensors may take without streaming from DRAM, on the M1 (guide, chapter 9).
ON_CHIP = 2 << 20
BORDER_BYTES = 64  # the last axis at the borders is laid out in blocks of so many bytes (Apple's rules)


def words(listed: str) -> frozenset[str]:
    """The words of a text."""
    return frozenset(listed.split())


# Operations that were compiled and run on an M1 and on later chips, by appendix A of the guide.
NATIVE = words(
    """
    conv conv_transpose linear matmul einsum avg_pool max_pool l2_pool scaled_dot_product_attention
    batch_norm layer_norm instance_norm l2_norm local_response_norm
    abs add sub mul real_div floor_div pow square sqrt rsqrt inverse maximum minimum cumsum
    equal not_equal greater greater_equal less less_equal logical_not select
    relu relu6 leaky_relu prelu clamped_relu thresholded_relu threshold clip elu sigmoid sigmoid_hard tanh scaled_tanh
    gelu silu softmax softplus softplus_parametric softsign erf exp exp2 log sign ceil floor round
    reduce_sum reduce_mean reduce_max reduce_min reduce_sum_square reduce_l1_norm reduce_l2_norm reduce_log_sum
    reduce_log_sum_exp
    reshape reshape_like expand_dims squeeze flatten2d transpose concat split stack pad slice_by_size slice_by_index
    slice_update reverse tile depth_to_space space_to_depth pixel_shuffle pixel_unshuffle space_to_batch batch_to_space
    identity fill fill_like crop cast quantize dequantize read_state write_state coreml_update_state
    resize resize_bilinear resize_nearest_neighbor upsample_bilinear upsample_nearest_neighbor
    crop_resize resample affine sin cos
    """
)
NO_PATH = words(
    """
    reduce_prod scatter scatter_along_axis scatter_nd mod one_hot non_zero band_part reverse_sequence shape
    sliding_windows logical_and logical_or logical_xor asin acos atan sinh cosh tan asinh acosh atanh
    random_bernoulli random_categorical random_normal non_maximum_suppression range_1d
    """
)
_COMPARISONS = words("equal not_equal greater greater_equal less less_equal logical_not")
TEXTURE = words(
    "resize resize_bilinear resize_nearest_neighbor upsample_bilinear upsample_nearest_neighbor crop_resize resample "
    "affine"
)
_VIEWS = ("reshape", "expand_dims", "squeeze", "identity", "transpose")
NEAREST = ("upsample_nearest_neighbor", "resize_nearest_neighbor")


def type_in(types: Iterable[str], words: str) -> Callable[[Operation, Graph], str | None]:
    types = frozenset(types)
    return lambda op, graph: words.format(op.type) if op.type in types else None


def _tensors(op: Operation) -> tuple[Value, ...]:
    return (*op.read, *op.outputs)


def rank_above_5(op: Operation, graph: Graph) -> str | None:
    worst = max((len(value.shape) for value in _tensors(op)), default=0)
    return f"rank {worst}" if worst > 5 else None


def scalar(op: Operation, graph: Graph) -> str | None:
    scalars = [value.name for value in _tensors(op) if not value.shape and value.dtype not in ("list", "unknown")]
    return f"{scalars[0]} has rank 0" if scalars else None


def fp32(op: Operation, graph: Graph) -> str | None:
    if op.type == "cast":
        return None
    wide = [value for value in _tensors(op) if value.dtype in ("float32", "float64", "bfloat16")]
    return f"{wide[0].name} is {wide[0].dtype}" if wide else None


def integer(op: Operation, graph: Graph) -> str | None:
    kinds = ["int32", "int64", "uint32", "uint64", "string"]
    if op.type not in _COMPARISONS and op.type not in ("select", "cast"):
        kinds.append("bool")
    wrong = [value for value in _tensors(op) if value.dtype in kinds]
    return f"{wrong[0].name} is {wrong[0].dtype}" if wrong else None


def wide_cast(op: Operation, graph: Graph) -> str | None:
    if op.type != "cast" or {value.dtype for value in _tensors(op)} != {"float16", "float32"}:
        return None
    return f"{op.read[0].dtype} to {op.outputs[0].dtype}"


def open_shape(op: Operation, graph: Graph) -> str | None:
    return next((f"{value.name} has an extent that is open" for value in _tensors(op) if value.open), None)


def extent(op: Operation, graph: Graph) -> str | None:
    for value in _tensors(op):
        width, height, channels = (*(extent or 0 for extent in reversed(value.shape[-3:])), 0, 0, 0)[:3]
        for name, extent, most in (("width", width, 16384), ("height", height, 16384), ("channels", channels, 65536)):
            if extent > most:
                return f"{name} {extent} of {value.name}; at most {most}"
    return None


def _kernel(op: Operation) -> tuple[int, ...]:
    weight = op.constants.get("weight")
    if op.type not in ("conv", "conv_transpose") or not weight:
        return ()
    return tuple(extent or 1 for extent in weight[0].value.shape[2:])


def kernel_width(op: Operation, graph: Graph) -> str | None:
    kernel = _kernel(op)
    return f"kernel width {kernel[-1]}" if kernel and kernel[-1] > 13 else None


def kernel_height(op: Operation, graph: Graph) -> str | None:
    kernel = _kernel(op)
    return f"kernel height {kernel[-2]}" if len(kernel) > 1 and kernel[-2] > 29 else None


def conv_3d(op: Operation, graph: Graph) -> str | None:
    return f"{len(_kernel(op))}-D kernel" if len(_kernel(op)) > 2 else None


def factors(op: Operation, graph: Graph) -> str | None:
    if op.type not in ("conv", "conv_transpose"):
        return None
    for name in ("strides", "dilations"):
        for number in op.settings(name):
            rest = number
            for prime in (2, 3):
                while rest and rest % prime == 0:
                    rest //= prime
            if rest != 1:
                return f"{name} {'x'.join(map(str, op.settings(name)))}"
    return None


def palettised_stride(op: Operation, graph: Graph) -> str | None:
    weight = op.constants.get("weight")
    if op.type != "conv" or not weight or not weight[0].form.startswith("constexpr_lut"):
        return None
    strides = op.settings("strides")
    return f"stride {'x'.join(map(str, strides))}" if max(strides, default=1) > 2 else None


def groups(op: Operation, graph: Graph) -> str | None:
    groups = op.setting("groups", 1)
    if op.type != "conv" or groups in (1, 2, 4) or not op.read or len(op.read[0].shape) < 2:
        return None
    depthwise = groups == op.read[0].shape[1]  # exempt: it has a path of its own
    return None if depthwise else f"{groups} groups"


def moving_kernel(op: Operation, graph: Graph) -> str | None:
    if op.type != "conv" or "weight" not in op.inputs or not op.inputs["x"][0].shape:
        return None
    batch = op.inputs["x"][0].shape[0] or 0
    return f"the kernel is computed and the batch is {batch}" if batch > 1 else None


def matmul_depth(op: Operation, graph: Graph) -> str | None:
    if op.type not in ("matmul", "linear"):
        return None
    deep = [value for value in _tensors(op) if len(value.shape) >= 5 and (op.type == "linear" or value.shape[-4] != 1)]
    return f"{deep[0].name} has rank {len(deep[0].shape)}" if deep else None


def linear(op: Operation, graph: Graph) -> str | None:
    return "linear" if op.type == "linear" else None


def padding(op: Operation, graph: Graph) -> str | None:
    pads = op.settings("pad")
    outer = pads[: max(0, len(pads) - 4)] if op.type == "pad" else ()
    return "pads an axis other than height and width" if any(outer) else None


def padding_mode(op: Operation, graph: Graph) -> str | None:
    mode = op.setting("mode", "constant")
    return f"mode {mode}" if op.type == "pad" and mode in ("reflect", "symmetric") else None


def softmax_axis(op: Operation, graph: Graph) -> str | None:
    if op.type != "softmax" or not op.read:
        return None
    x, axis = op.read[0], op.setting("axis", -1)
    rank = len(x.shape)
    if rank < 3 or axis % rank == rank - 3 or x.bytes + op.outputs[0].bytes <= ON_CHIP:
        return None
    return f"over axis {axis % rank} of {'x'.join(map(str, x.shape))}"


def tile(op: Operation, graph: Graph) -> str | None:
    if op.type != "tile":
        return None
    copies = op.settings("reps")
    into = {reader.type for reader in graph.readers(op)} & {"matmul", "einsum", "scaled_dot_product_attention"}
    odd = [number for number in copies if number not in (1, 2, 3, 4, 8)]
    if into:
        return f"its copies go into {sorted(into)[0]}, which could broadcast"
    return f"{odd[0]} copies; native are 2, 3, 4 and 8" if odd else None


def attention(op: Operation, graph: Graph) -> str | None:
    if op.type != "scaled_dot_product_attention":
        return None
    return "with a mask" if "attn_mask" in op.inputs or "attn_mask" in op.constants else "without a mask"


def _behind(value: Value, graph: Graph, through: tuple[str, ...]) -> Operation | None:
    """The operation that makes a tensor, seen through operations of the types `through`."""
    op = graph.made_by(value)
    while op is not None and op.type in through and op.read:
        op = graph.made_by(op.read[0])
    return op


def depthwise_behind_upsampling(op: Operation, graph: Graph) -> str | None:
    if op.type != "conv" or not op.read or len(op.read[0].shape) < 2 or op.setting("groups", 1) == 1:
        return None
    before = _behind(op.read[0], graph, ("identity", "pad"))
    if op.setting("groups") != op.read[0].shape[1] or before is None or before.type not in NEAREST:
        return None
    return f"behind {before.name}"


def transposed_scores(op: Operation, graph: Graph) -> str | None:
    if op.type != "matmul" or "y" not in op.inputs:
        return None
    y = graph.made_by(op.inputs["y"][0])
    turned = bool(op.setting("transpose_y", False))
    while y is not None and y.type in _VIEWS and y.read:
        turned = turned or y.type == "transpose"
        y = graph.made_by(y.read[0])
    return "the transposed scores are its second factor" if turned and y is not None and y.type == "softmax" else None


def infinite(op: Operation, graph: Graph) -> str | None:
    found = [name for name, given in op.constants.items() if any(constant.infinite for constant in given)]
    return f"{found[0]} holds -inf or inf" if found else None


def inflated_epsilon(op: Operation, graph: Graph) -> str | None:
    """eps added to the mean of squares of x / max|x|, where the norm's own eps would be divided by max|x|^2 too."""
    if op.type == "rsqrt" or op.type == "sqrt":
        mean = _behind(op.read[0], graph, ()) if op.read else None
        constant = bool(op.setting("epsilon", 0.0))
        if mean is not None and mean.type == "add":
            constant = "x" in mean.constants or "y" in mean.constants
            mean = graph.made_by(mean.read[0]) if mean.read else None
        if not constant or mean is None or mean.type not in ("reduce_mean", "reduce_sum_square", "reduce_sum"):
            return None
        squares = graph.made_by(mean.read[0]) if mean.read else None
        if squares is not None and squares.type in ("square", "mul", "pow"):
            squares = graph.made_by(squares.read[0])
        if squares is None or squares.type not in ("real_div", "mul") or len(squares.read) < 2:
            return None
        scale = graph.made_by(squares.read[-1])
        while scale is not None and scale.type in ("inverse", "maximum", "add", "clip") and scale.read:
            scale = graph.made_by(scale.read[0])
        if scale is not None and scale.type == "reduce_max":
            largest = graph.made_by(scale.read[0])
            if largest is not None and largest.type == "abs":
                return f"its epsilon is added after the division by {scale.name}"
    return None


def single_last_axis(op: Operation, graph: Graph) -> str | None:
    for value in op.outputs:
        if value.shape and value.shape[-1] == 1 and value.elements * BORDER_BYTES > ON_CHIP:
            return f"{value.name}: {'x'.join(map(str, value.shape))} takes {value.elements * BORDER_BYTES} bytes"
    return None


def width_slice(op: Operation, graph: Graph) -> str | None:
    if op.type not in ("slice_by_index", "slice_by_size") or not op.read:
        return None
    begin = op.settings("begin")
    rank = len(op.read[0].shape)
    ignored = op.settings("begin_mask")
    if len(begin) != rank or not begin[-1] or (len(ignored) == rank and ignored[-1]):
        return None
    return f"starts at {begin[-1]} of the last axis"


def affine_weights(op: Operation, graph: Graph) -> str | None:
    forms = {
        constant.form
        for given in op.constants.values()
        for constant in given
        if constant.form in ("constexpr_affine_dequantize", "constexpr_blockwise_shift_scale")
    }
    return f"weights come from {sorted(forms)[0]}" if forms else None
