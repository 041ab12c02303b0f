"""The cases that tests and benchmarks share, and the checks that every op must pass.

A :class:`Case` names sizes, dtype and layout. Its inputs are keyed by the argument names of the registered op, so that
one dict serves the op, its reference, the public function and plain PyTorch (``eager``). ``CASES`` lists, per op, small
cases (for tests) and cases of the model's own shapes (``bench=True``).

Tolerance: the error against fp64 may be at most twice that of plain PyTorch at the same dtype, plus one ulp of the
largest output. No other constant appears.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from snapgen_kernels._library import Op

Inputs = dict[str, Any]
LAYOUTS = ("channels_last", "contiguous", "sliced", "transposed")


@dataclass(frozen=True)
class Case:
    """One call of one op.

    Attributes:
        op: name of the op. name: of the case, unique within the op.
        dims: sizes by name (see the op's ``_inputs_*`` function below), and flags as 0 or 1.
        dtype: of activations and weights.
        layout: of images: ``channels_last``, ``contiguous``, ``sliced`` (every other pixel column of a larger tensor)
        or
            ``transposed`` (height and width swapped in memory). Tokens: ``sliced`` takes every other token; else
            contiguous.
        bench: True for the model's shapes, which benchmarks time.
        offset: added to the activations: a large mean is what breaks one-pass variances.
    """

    op: str
    name: str
    dims: Mapping[str, int]
    dtype: torch.dtype = torch.float32
    layout: str = "channels_last"
    bench: bool = False
    offset: float = 0.0
    seed: int = field(default=0)

    def __hash__(self) -> int:  # `dims` has none
        return hash(str(self))

    def __str__(self) -> str:
        return f"{self.op}-{self.name}-{str(self.dtype).removeprefix('torch.')}-{self.layout}"

    @cached_property
    def spec(self) -> OpSpec:
        return SPECS[self.op]

    def inputs(self, device: torch.device | str = "cpu", requires_grad: bool = False) -> Inputs:
        """Random arguments of the registered op, by name; the same for the same case on every device."""
        generator = torch.Generator().manual_seed(self.seed)
        values = self.spec.make(self, lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64))
        result: Inputs = {}
        for name, value in values.items():
            if isinstance(value, Tensor) and value.is_floating_point():
                value = value.to(torch.float32) if name in ("cos", "sin") else value.to(self.dtype)
                # q [B, N, H, D] is no image: channels_last would put its tokens innermost.
                tokens = name == "q" and self.layout == "channels_last"
                value = (value if tokens else _laid_out(value, self.layout)).to(device)
                value.requires_grad_(requires_grad and name in self.spec.contract.OP.differentiable)
            elif isinstance(value, Tensor):
                value = value.to(device)
            result[name] = value
        return result

    def cost(self) -> tuple[int, int]:
        """(FLOPs, fewest bytes) of the forward, from the op's contract."""
        return self.spec.contract.cost(self)


@dataclass(frozen=True)
class OpSpec:
    """How to make the inputs of an op and to call it in each of its forms, all on the same dict of inputs."""

    name: str
    make: Callable[[Case, Callable[..., Tensor]], Inputs]
    public: Callable[[Inputs], Any]
    eager: Callable[[Inputs], Any]

    @cached_property
    def contract(self) -> ModuleType:
        return importlib.import_module(f"snapgen_kernels.{self.name}")

    @property
    def op(self) -> Op:
        return self.contract.OP

    def registered(self, inputs: Inputs) -> Any:
        """The op through the dispatcher, whatever the mode."""
        outputs = getattr(torch.ops.snapgen, self.name)(*self.arguments(inputs))
        kept = outputs[: self.op.outputs] if isinstance(outputs, (tuple, list)) else (outputs,)
        return kept if len(kept) > 1 else kept[0]

    def reference(self, inputs: Inputs) -> Any:
        return self.contract.reference(*self.arguments(inputs))

    def kernels(self) -> tuple[str, ...]:
        """Device types on which a fused kernel of this op is usable here."""
        from snapgen_kernels import _backend

        return tuple(d for d in ("cpu", "cuda") if _backend.missing_kernel(self.name, d) is None)

    def arguments(self, inputs: Inputs) -> list[Any]:
        return [inputs[name] for name in self.op.arguments]


def _laid_out(value: Tensor, layout: str) -> Tensor:
    if layout not in LAYOUTS:
        raise ValueError(f"layout is {layout!r}; allowed: {', '.join(LAYOUTS)}")
    if value.dim() == 4 and value.shape[-2:] not in ((3, 3), (1, 1)) and layout == "channels_last":
        return value.contiguous(memory_format=torch.channels_last)
    if value.dim() >= 3 and layout == "sliced":
        return torch.stack((value, value + 1), dim=-1).flatten(-2)[..., ::2]
    if value.dim() == 4 and layout == "transposed":
        return value.transpose(2, 3).contiguous().transpose(2, 3)
    return value


# ---- inputs, public call and plain PyTorch of each op ----------------------------------------------------------------

Draw = Callable[..., Tensor]


def _around_one(draw: Draw, size: int) -> Tensor:
    return 1 + 0.2 * draw(size)


def _dw(draw: Draw, channels: int) -> Tensor:
    return draw(channels, 1, 3, 3) / 3


def _pw(draw: Draw, outputs: int, channels: int) -> Tensor:
    return draw(outputs, channels, 1, 1) / channels**0.5


def _inputs_group_norm_silu(case: Case, draw: Draw) -> Inputs:
    d = case.dims  # B, C, H, W, G
    return {
        "x": draw(d["B"], d["C"], d["H"], d["W"]) + case.offset,
        "num_groups": d["G"],
        "weight": _around_one(draw, d["C"]),
        "bias": 0.2 * draw(d["C"]),
        "eps": 1e-5,
    }


def _inputs_sepconv(case: Case, draw: Draw) -> Inputs:
    d = (
        case.dims
    )  # B, C, H, W, O; flags: stride, upsample, bias, shift, residual; G: groups of the norm, absent: no norm
    stride, upsample, normed = d.get("stride", 1), bool(d.get("upsample", 0)), d.get("G", 0) > 0
    scale = 2 if upsample else 1
    height, width = (d["H"] * scale - 1) // stride + 1, (d["W"] * scale - 1) // stride + 1
    return {
        "x": draw(d["B"], d["C"], d["H"], d["W"]) + case.offset,
        "dw_weight": _dw(draw, d["C"]),
        "pw_weight": _pw(draw, d["O"], d["C"]),
        "dw_bias": draw(d["C"]) if d.get("bias") else None,
        "pw_bias": draw(d["O"]) if d.get("bias") else None,
        "norm_weight": _around_one(draw, d["C"]) if normed else None,
        "norm_bias": 0.2 * draw(d["C"]) if normed else None,
        "shift": draw(d["B"], d["O"]) if d.get("shift") else None,
        "residual": draw(d["B"], d["O"], height, width) if d.get("residual") else None,
        "num_groups": d.get("G", 0) or 1,
        "eps": 1e-5,
        "stride": stride,
        "upsample": upsample,
    }


def _inputs_resblock(case: Case, draw: Draw) -> Inputs:
    d = case.dims  # B, C, M, O, H, W, G
    return {
        "x": draw(d["B"], d["C"], d["H"], d["W"]) + case.offset,
        "shift": draw(d["B"], d["M"]),
        "norm1_weight": _around_one(draw, d["C"]),
        "norm1_bias": 0.2 * draw(d["C"]),
        "dw1_weight": _dw(draw, d["C"]),
        "pw1_weight": _pw(draw, d["M"], d["C"]),
        "norm2_weight": _around_one(draw, d["M"]),
        "norm2_bias": 0.2 * draw(d["M"]),
        "dw2_weight": _dw(draw, d["M"]),
        "pw2_weight": _pw(draw, d["O"], d["M"]),
        "shortcut_weight": _pw(draw, d["O"], d["C"]) if d["C"] != d["O"] else None,
        "shortcut_bias": draw(d["O"]) if d["C"] != d["O"] else None,
        "num_groups": d["G"],
        "eps": 1e-5,
    }


def _rope(case: Case) -> tuple[Tensor | None, Tensor | None]:
    d = case.dims
    if not d.get("rope"):
        return None, None
    from snapgen_kernels.qk_norm_rope import rope_2d

    height = next(h for h in range(int(d["N"] ** 0.5), 0, -1) if d["N"] % h == 0) if d["N"] else 0
    return rope_2d(height, d["N"] // height if height else 0, d["D"])


def _inputs_qk_norm_rope(case: Case, draw: Draw) -> Inputs:
    d = case.dims  # B, N, H, D, M; rope
    cos, sin = _rope(case)
    return {
        "q": draw(d["B"], d["N"], d["H"], d["D"]) + case.offset,
        "k": draw(d["B"], d["M"], d["D"]) + case.offset,
        "q_weight": _around_one(draw, d["D"]),
        "k_weight": _around_one(draw, d["D"]),
        "cos": cos,
        "sin": sin,
        "eps": 1e-6,
    }


def _inputs_attention(case: Case, draw: Draw) -> Inputs:
    d = case.dims  # B, N, H, D, M; rope, norm, mask (1: ragged, and the last sample has no key at all)
    normed = bool(d.get("norm", 1))
    values = _inputs_qk_norm_rope(case, draw)
    mask = None
    if d.get("mask"):
        lengths = torch.tensor([max(d["M"] * (d["B"] - i) // d["B"], 0) for i in range(d["B"])])
        if d["B"] > 1:
            lengths[-1] = 0
        mask = torch.arange(d["M"])[None, :] < lengths[:, None]
    return {
        "q": values["q"],
        "k": values["k"],
        "v": draw(d["B"], d["M"], d["D"]),
        "key_mask": mask,
        "q_weight": values["q_weight"] if normed else None,
        "k_weight": values["k_weight"] if normed else None,
        "cos": values["cos"],
        "sin": values["sin"],
        "scale": None,
        "eps": 1e-6,
    }


def _inputs_geglu(case: Case, draw: Draw) -> Inputs:
    d = case.dims  # B, N, C, F; bias, keep
    return {
        "x": draw(d["B"], d["N"], d["C"]) + case.offset,
        "weight": draw(2 * d["F"], d["C"]) / d["C"] ** 0.5,
        "bias": draw(2 * d["F"]) if d.get("bias", 1) else None,
        "keep": bool(d.get("keep", 1)),
    }


def _inputs_decoder_block(case: Case, draw: Draw) -> Inputs:
    d = case.dims  # B, C, M, H, W, G; low: low_memory
    return {
        "x": draw(d["B"], d["C"], d["H"], d["W"]) + case.offset,
        "dw1_weight": _dw(draw, d["C"]),
        "dw1_bias": draw(d["C"]),
        "pw1_weight": _pw(draw, d["M"], d["C"]),
        "dw2_weight": _dw(draw, d["M"]),
        "dw2_bias": draw(d["M"]),
        "norm_weight": _around_one(draw, d["M"]),
        "norm_bias": 0.2 * draw(d["M"]),
        "pw2_weight": _pw(draw, d["C"], d["M"]),
        "num_groups": d["G"],
        "eps": 1e-6,
        "low_memory": bool(d.get("low", 0)),
        "keep_middle": not d.get("low", 0),
    }


def _norm(inputs: Inputs, prefix: str) -> Any:
    from snapgen_kernels.group_norm_silu import Norm

    if inputs[f"{prefix}_weight"] is None:
        return None
    return Norm(inputs["num_groups"], inputs[f"{prefix}_weight"], inputs[f"{prefix}_bias"], inputs["eps"])


def _without(inputs: Inputs, *names: str) -> Inputs:
    return {name: value for name, value in inputs.items() if name not in names}


def _call(name: str, inputs: Inputs) -> Any:
    import snapgen_kernels

    return getattr(snapgen_kernels, name)(**inputs)


def _public_sepconv(inputs: Inputs) -> Any:
    plain = _without(inputs, "norm_weight", "norm_bias", "num_groups", "eps")
    return _call("sepconv", {**plain, "norm": _norm(inputs, "norm")})


def _public_resblock(inputs: Inputs) -> Any:
    plain = _without(inputs, "norm1_weight", "norm1_bias", "norm2_weight", "norm2_bias", "num_groups", "eps")
    return _call("resblock", {**plain, "norm1": _norm(inputs, "norm1"), "norm2": _norm(inputs, "norm2")})


def _eager_norm_silu(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.silu(torch.group_norm(x, groups, weight, bias, eps))


def _eager_group_norm_silu(i: Inputs) -> Tensor:
    return _eager_norm_silu(i["x"], i["num_groups"], i["weight"], i["bias"], i["eps"])


def _eager_sepconv(i: Inputs) -> Tensor:
    x = i["x"]
    if i["norm_weight"] is not None:
        x = _eager_norm_silu(x, i["num_groups"], i["norm_weight"], i["norm_bias"], i["eps"])
    if i["upsample"]:
        x = F.interpolate(x, scale_factor=2.0)
    x = F.conv2d(x, i["dw_weight"], i["dw_bias"], stride=i["stride"], padding=1, groups=x.shape[1])
    x = F.conv2d(x, i["pw_weight"], i["pw_bias"])
    if i["shift"] is not None:
        x = x + i["shift"][:, :, None, None]
    return x if i["residual"] is None else x + i["residual"]


def _eager_resblock(i: Inputs) -> Tensor:
    x = i["x"]
    h = _eager_norm_silu(x, i["num_groups"], i["norm1_weight"], i["norm1_bias"], i["eps"])
    h = F.conv2d(F.conv2d(h, i["dw1_weight"], padding=1, groups=h.shape[1]), i["pw1_weight"])
    h = h + i["shift"][:, :, None, None]
    h = _eager_norm_silu(h, i["num_groups"], i["norm2_weight"], i["norm2_bias"], i["eps"])
    h = F.conv2d(F.conv2d(h, i["dw2_weight"], padding=1, groups=h.shape[1]), i["pw2_weight"])
    return h + (x if i["shortcut_weight"] is None else F.conv2d(x, i["shortcut_weight"], i["shortcut_bias"]))


def _eager_rotary(x: Tensor, weight: Tensor | None, cos: Tensor | None, sin: Tensor | None, eps: float) -> Tensor:
    if weight is not None:
        x = F.rms_norm(x, (x.shape[-1],), weight, eps)
    if cos is None or sin is None:
        return x
    turned = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    return x * cos.to(x.dtype) + turned * sin.to(x.dtype)


def _eager_qk_norm_rope(i: Inputs) -> tuple[Tensor, Tensor]:
    cos, sin = i["cos"], i["sin"]
    cos_q, sin_q = (None, None) if cos is None else (cos[:, None], sin[:, None])
    return (
        _eager_rotary(i["q"], i["q_weight"], cos_q, sin_q, i["eps"]),
        _eager_rotary(i["k"], i["k_weight"], cos, sin, i["eps"]),
    )


def _eager_attention(i: Inputs) -> Tensor:
    q, k = _eager_qk_norm_rope(i)
    heads = q.shape[2]
    k, v = (t[:, None].expand(-1, heads, -1, -1) for t in (k, i["v"]))
    mask = None if i["key_mask"] is None else i["key_mask"][:, None, None, :]
    return F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=mask, scale=i["scale"]).transpose(1, 2)


def _eager_geglu(i: Inputs) -> Tensor:
    value, gate = F.linear(i["x"], i["weight"], i["bias"]).chunk(2, dim=-1)
    return value * F.gelu(gate)


def _eager_decoder_block(i: Inputs) -> Tensor:
    h = F.conv2d(i["x"], i["dw1_weight"], i["dw1_bias"], padding=1, groups=i["x"].shape[1])
    h = F.conv2d(h, i["pw1_weight"])
    h = F.conv2d(h, i["dw2_weight"], i["dw2_bias"], padding=1, groups=h.shape[1])
    h = _eager_norm_silu(h, i["num_groups"], i["norm_weight"], i["norm_bias"], i["eps"])
    return i["x"] + F.conv2d(h, i["pw2_weight"])


def _public_decoder_block(inputs: Inputs) -> Any:
    return _call("decoder_block", _without(inputs, "keep_middle"))


def _named(name: str) -> Callable[[Inputs], Any]:
    return lambda inputs: _call(name, inputs)


SPECS: dict[str, OpSpec] = {
    spec.name: spec
    for spec in (
        OpSpec("group_norm_silu", _inputs_group_norm_silu, _named("group_norm_silu"), _eager_group_norm_silu),
        OpSpec("sepconv", _inputs_sepconv, _public_sepconv, _eager_sepconv),
        OpSpec("resblock", _inputs_resblock, _public_resblock, _eager_resblock),
        OpSpec("qk_norm_rope", _inputs_qk_norm_rope, _named("qk_norm_rope"), _eager_qk_norm_rope),
        OpSpec("attention", _inputs_attention, _named("attention"), _eager_attention),
        OpSpec("geglu", _inputs_geglu, lambda i: _call("geglu", _without(i, "keep")), _eager_geglu),
        OpSpec("decoder_block", _inputs_decoder_block, _public_decoder_block, _eager_decoder_block),
    )
}


# ---- cases -----------------------------------------------------------------------------------------------------------


def _sizes(**dims: int) -> dict[str, int]:
    return dims


_STAGES = ((256, 128), (512, 64), (896, 32))  # channels and latent side of the three stages at 1024 px

_TESTS: dict[str, dict[str, dict[str, int]]] = {
    "group_norm_silu": {
        "small": _sizes(B=2, C=12, H=5, W=7, G=3),
        "one-pixel": _sizes(B=3, C=8, H=1, W=1, G=2),
        "one-channel-groups": _sizes(B=1, C=19, H=4, W=3, G=19),
        "one-group": _sizes(B=1, C=17, H=13, W=11, G=1),
        "wide": _sizes(B=1, C=320, H=9, W=8, G=32),
        "many-chunks": _sizes(B=2, C=64, H=37, W=41, G=8),
    },
    "sepconv": {
        "plain": _sizes(B=2, C=8, H=5, W=7, O=12),
        "all": _sizes(B=2, C=8, H=6, W=5, O=12, G=4, bias=1, shift=1, residual=1),
        "stride": _sizes(B=1, C=6, H=7, W=8, O=5, stride=2, bias=1),
        "upsample": _sizes(B=1, C=8, H=3, W=5, O=4, G=2, upsample=1, residual=1),
        "one-pixel": _sizes(B=1, C=4, H=1, W=1, O=3, G=1, shift=1),
    },
    "resblock": {
        "same": _sizes(B=2, C=8, M=16, O=8, H=5, W=7, G=4),
        "shortcut": _sizes(B=1, C=8, M=24, O=12, H=6, W=3, G=2),
        "one-pixel": _sizes(B=2, C=4, M=8, O=4, H=1, W=1, G=1),
    },
    "qk_norm_rope": {
        "self": _sizes(B=2, N=12, H=3, D=16, M=12, rope=1),
        "cross": _sizes(B=2, N=7, H=2, D=8, M=5),
        "odd-head": _sizes(B=1, N=6, H=5, D=20, M=6, rope=1),
        "one-token": _sizes(B=1, N=1, H=1, D=64, M=1, rope=1),
        "wide-head": _sizes(B=1, N=4, H=2, D=200, M=4, rope=1),
    },
    "attention": {
        "self": _sizes(B=2, N=12, H=3, D=16, M=12, rope=1),
        "cross": _sizes(B=2, N=7, H=2, D=8, M=5),
        "masked": _sizes(B=3, N=5, H=2, D=8, M=11, mask=1),
        "no-norm": _sizes(B=1, N=9, H=2, D=8, M=9, norm=0),
        "rope-only": _sizes(B=1, N=9, H=2, D=8, M=9, norm=0, rope=1),
        "ragged-head": _sizes(B=1, N=6, H=2, D=100, M=6, rope=1),
        "wide-head": _sizes(B=1, N=40, H=2, D=128, M=40),
    },
    "geglu": {
        "small": _sizes(B=2, N=5, C=12, F=7),
        "no-bias": _sizes(B=1, N=3, C=8, F=16, bias=0),
        "not-kept": _sizes(B=1, N=4, C=9, F=40, keep=0),
    },
    "decoder_block": {
        "small": _sizes(B=2, C=8, M=24, H=5, W=7, G=4),
        "one-pixel": _sizes(B=1, C=4, M=8, H=1, W=1, G=2),
        "low-memory": _sizes(B=1, C=20, M=40, H=19, W=3, G=5, low=1),
    },
}

_BENCH: dict[str, dict[str, dict[str, int]]] = {
    "group_norm_silu": {f"{c}ch-{s}": _sizes(B=1, C=c, H=s, W=s, G=32) for c, s in _STAGES}
    | {f"{2 * c}ch-{s}": _sizes(B=1, C=2 * c, H=s, W=s, G=32) for c, s in _STAGES}
    | {"tiny-train": _sizes(B=128, C=48, H=16, W=16, G=8)},
    "sepconv": {f"{c}ch-{s}": _sizes(B=1, C=c, H=s, W=s, O=2 * c, G=32, shift=1) for c, s in _STAGES}
    | {
        "down-256": _sizes(B=1, C=256, H=128, W=128, O=512, stride=2),
        "up-512": _sizes(B=1, C=512, H=64, W=64, O=512, upsample=1),
        "up-128-512": _sizes(B=1, C=128, H=512, W=512, O=128, upsample=1),
    },
    "resblock": {f"{c}ch-{s}": _sizes(B=1, C=c, M=2 * c, O=c, H=s, W=s, G=32) for c, s in _STAGES},
    "qk_norm_rope": {
        "self-14x64-1024": _sizes(B=1, N=1024, H=14, D=64, M=1024, rope=1),
        "cross-14x64-333": _sizes(B=1, N=1024, H=14, D=64, M=333),
    },
    "attention": {
        "self-14x64-1024": _sizes(B=1, N=1024, H=14, D=64, M=1024, rope=1),
        "cross-14x64-1024-333": _sizes(B=1, N=1024, H=14, D=64, M=333),
        "cross-8x64-4096-333": _sizes(B=1, N=4096, H=8, D=64, M=333),
        "cross-4x64-16384-333": _sizes(B=1, N=16384, H=4, D=64, M=333),
    },
    "geglu": {
        "896-2688-1024": _sizes(B=1, N=1024, C=896, F=2688),
        "512-1536-4096": _sizes(B=1, N=4096, C=512, F=1536),
    },
    "decoder_block": {
        "128ch-1024": _sizes(B=1, C=128, M=384, H=1024, W=1024, G=32),
        "128ch-512": _sizes(B=1, C=128, M=384, H=512, W=512, G=32),
        "160ch-128": _sizes(B=1, C=160, M=480, H=128, W=128, G=32),
    },
}


def _cases() -> dict[str, list[Case]]:
    cases: dict[str, list[Case]] = {}
    for op in SPECS:
        cases[op] = []
        for name, dims in _TESTS[op].items():
            cases[op] += [Case(op, name, dims, dtype) for dtype in (torch.float32, torch.bfloat16)]
        first = cases[op][0]
        cases[op] += [replace(first, name="layout", layout=layout) for layout in LAYOUTS[1:]]
        cases[op].append(replace(first, name="offset", offset=100.0))
        for name, dims in _BENCH[op].items():
            cases[op] += [Case(op, name, dims, dtype, bench=True) for dtype in (torch.float32, torch.bfloat16)]
    return cases


CASES: dict[str, list[Case]] = _cases()


def small_cases(op: str) -> list[Case]:
    """The small cases of ``op``."""
    return [case for case in CASES[op] if not case.bench]


def bench_cases(op: str) -> list[Case]:
    """The cases of ``op`` in the model's own shapes."""
    return [case for case in CASES[op] if case.bench]


def model_shapes(batch: int | None = None) -> dict[str, list[dict[str, int]]]:
    """The model's own shapes per op, as ``snapgen_kernels.warmup`` takes them; ``batch`` replaces their batch size."""
    sizes = {op: {case.name: dict(case.dims) for case in bench_cases(op)} for op in SPECS}
    return {
        op: [dims if batch is None else {**dims, "B": batch} for dims in by_name.values()]
        for op, by_name in sizes.items()
    }
