"""The residual block in training: it learns as plain PyTorch does, under autocast, compiled, recomputed, checkpointed
by op name, on several processes, inside torch.func; and it keeps less memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import snapgen_kernels as sk
from snapgen_kernels import checks
from snapgen_kernels._backend import missing_kernel

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
devices = pytest.mark.parametrize("device", DEVICES)
widths = pytest.mark.parametrize("outputs", [8, 12], ids=["same", "shortcut"])
Step = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]


class PlainBlock(nn.Module):
    """SepResBlock of PyTorch's own modules, under the same names."""

    def __init__(self, channels: int, outputs: int, temb: int, groups: int) -> None:
        super().__init__()
        middle = 2 * max(channels, outputs)

        def half(channels: int, outputs: int) -> nn.ModuleDict:
            depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
            return nn.ModuleDict({"depthwise": depthwise, "pointwise": nn.Conv2d(channels, outputs, 1, bias=False)})

        self.norm1, self.conv1 = nn.GroupNorm(groups, channels), half(channels, middle)
        self.time_emb_proj = nn.Linear(temb, middle)
        self.norm2, self.conv2 = nn.GroupNorm(groups, middle), half(middle, outputs)
        self.conv_shortcut = nn.Conv2d(channels, outputs, 1) if channels != outputs else None

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        h = self.conv1["pointwise"](self.conv1["depthwise"](F.silu(self.norm1(x))))
        h = h + self.time_emb_proj(F.silu(temb))[:, :, None, None]
        h = self.conv2["pointwise"](self.conv2["depthwise"](F.silu(self.norm2(h))))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


def _block(outputs: int = 8, seed: int = 0, **options: Any) -> sk.SepResBlock:
    torch.manual_seed(seed)
    return sk.SepResBlock(8, outputs, temb_channels=6, num_groups=4, **options)


def _plain(block: nn.Module) -> PlainBlock:
    outputs = block.conv2.pointwise.out_channels
    plain = PlainBlock(8, outputs, 6, 4).to(next(block.parameters()).device)
    plain.load_state_dict(block.state_dict())
    return plain


def _batch(outputs: int = 8, device: str = "cpu", samples: int = 4, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """x, time embedding, and what the block should learn to give. x needs a gradient, as inside a network: PyTorch
    2.11 to 2.13 crash in the channels_last backward of group_norm where it does not."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((samples, 8, 9, 7), (samples, 6), (samples, outputs, 9, 7))
    x, temb, target = (torch.randn(shape, generator=generator).to(device) for shape in shapes)
    return x.contiguous(memory_format=torch.channels_last).requires_grad_(), temb, target


def _as(dtype: torch.dtype, batch: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    x, temb, target = batch
    return x.detach().to(dtype).requires_grad_(), temb.to(dtype), target.to(dtype)


def _loss(model: nn.Module, x: Tensor, temb: Tensor, target: Tensor) -> Tensor:
    return (model(x, temb).to(target.dtype) - target).square().mean()


def _autocast_loss(model: nn.Module, x: Tensor, temb: Tensor, target: Tensor) -> Tensor:
    with torch.autocast(x.device.type, torch.bfloat16):
        y = model(x, temb)
    return (y.to(target.dtype) - target).square().mean()


def _gradients(model: Any, batch: tuple[Tensor, ...], block: nn.Module | None = None) -> dict[str, Tensor]:
    """Of the loss, by x and by each parameter (of ``block``, where ``model`` is another view of it)."""
    leaves = {"x": batch[0], **dict((block or model).named_parameters())}
    return dict(zip(leaves, torch.autograd.grad(_loss(model, *batch), list(leaves.values())), strict=True))


def _assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    different = [name for name, value in expected.items() if not torch.equal(found[name], value)]
    assert not different


def _train(model: nn.Module, step: Step, batch: tuple[Tensor, Tensor, Tensor], count: int) -> tuple[Tensor, Tensor]:
    """The losses, and all parameters afterwards."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(count):
        optimizer.zero_grad()
        loss = step(model, *batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses), torch.cat([p.detach().flatten() for p in model.parameters()])


@devices
@widths
@pytest.mark.parametrize("step", [_loss, _autocast_loss], ids=["fp32", "autocast"])
def test_it_learns_as_plain_modules_do(step: Step, outputs: int, device: str) -> None:
    """Ten steps from the same weights: the loss falls at each, and the weights end as near to fp64's as eager's do."""
    found: dict[str, list[Tensor]] = {"mine": [], "plain": [], "exact": []}
    for seed in range(3):
        block, batch = _block(outputs, seed).to(device), _batch(outputs, device, seed=seed)
        plain, exact = _plain(block), _plain(block).double()
        losses, weights = _train(block, step, batch, 10)
        assert (losses.diff() < 0).all(), losses
        found["mine"].append(weights)
        found["plain"].append(_train(plain, step, batch, 10)[1])
        found["exact"].append(_train(exact, _loss, _as(torch.float64, batch), 10)[1])
    checks.assert_close("weights", *(torch.stack(found[name]) for name in ("mine", "plain", "exact")))


@widths
def test_weights_go_to_plain_modules_and_back(outputs: int) -> None:
    block = _block(outputs)
    plain = _plain(block)
    x, temb, target = _batch(outputs)
    torch.testing.assert_close(block(x, temb), plain(x, temb), rtol=1e-4, atol=1e-5)
    _train(plain, _loss, (x, temb, target), 1)
    before = {name: value.clone() for name, value in plain.state_dict().items()}
    block.load_state_dict(plain.state_dict())
    assert list(block.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in block.state_dict().items())
    torch.testing.assert_close(block(x, temb), plain(x, temb), rtol=1e-4, atol=1e-5)


@devices
@widths
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_a_compiled_step_is_the_plain_one(recompute: bool, outputs: int, device: str) -> None:
    torch._dynamo.reset()
    block, batch = _block(outputs, recompute=recompute).to(device), _batch(outputs, device)
    traced: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        traced.extend(
            str(n.target) for m in graph.modules() if isinstance(m, torch.fx.GraphModule) for n in m.graph.nodes
        )
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    compiled = torch.compile(block, fullgraph=True, backend=backend)
    torch.testing.assert_close(_gradients(compiled, batch, block), _gradients(block, batch))
    assert missing_kernel("resblock", device) is not None or "snapgen.resblock" in traced


def test_gradients_add_up_over_passes() -> None:
    block, batches = _block(), [_batch(seed=seed) for seed in range(3)]
    expected: dict[str, Tensor] = {}
    for batch in batches:
        _loss(block, *batch).backward()
        alone = _gradients(block, batch)
        expected = {name: expected[name] + g for name, g in alone.items()} if expected else alone
    _assert_equal({name: p.grad for name, p in block.named_parameters()}, _without_x(expected))


def _without_x(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in gradients.items() if name != "x"}


# ---- recomputing -----------------------------------------------------------------------------------------------------


class _Calls(TorchDispatchMode):
    """Counts calls of ops, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))

    def of(self, name: str) -> int:
        return self.names.count(f"{name}.default")


@contextmanager
def _kept_bytes(model: nn.Module) -> Iterator[list[int]]:
    """One entry: what autograd keeps of the calls inside, parameters apart, each storage once."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages: dict[int, Tensor] = {}  # holds the tensors, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    result: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield result
    kept = [tensor.untyped_storage().nbytes() for place, tensor in storages.items() if place not in parameters]
    result.append(sum(kept))


def _bytes_of(model: nn.Module, step: Step, batch: tuple[Tensor, Tensor, Tensor]) -> int:
    with _kept_bytes(model) as kept:
        loss = step(model, *batch)
    assert loss.requires_grad
    return kept[0]


@devices
@widths
def test_recomputing_gives_the_same_bits_of_less_memory(outputs: int, device: str) -> None:
    block, batch = _block(outputs).to(device), _batch(outputs, device)
    kept = _gradients(block, batch)
    usual = _bytes_of(block, _loss, batch)
    block.recompute = True
    _assert_equal(_gradients(block, batch), kept)
    x, temb, target = batch
    assert _bytes_of(block, _loss, batch) < usual - x.nbytes
    # x and the shift, and of what is around the block the time embedding, its SiLU and the loss.
    shift = temb.shape[0] * block.norm2.num_channels * temb.element_size()
    assert _bytes_of(block, _loss, batch) <= x.nbytes + shift + 2 * temb.nbytes + target.nbytes
    assert block.state_dict().keys() == _block(outputs).state_dict().keys()


@pytest.mark.skipif(missing_kernel("resblock", "cpu") is not None, reason="the C++ extension is not built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@widths
def test_it_keeps_at_most_half_of_what_plain_modules_keep(outputs: int, dtype: torch.dtype) -> None:
    block = _block(outputs).to(dtype)
    batch = _as(dtype, _batch(outputs))
    assert _bytes_of(block, _loss, batch) <= _bytes_of(_plain(block).to(dtype), _loss, batch) / 2


@pytest.mark.skipif(missing_kernel("resblock", "cpu") is not None, reason="the C++ extension is not built")
@pytest.mark.parametrize(("policy", "forwards"), [("MUST_SAVE", 1), ("PREFER_RECOMPUTE", 2)])
def test_checkpointing_by_op_name(policy: str, forwards: int) -> None:
    """The op is run again in the backward unless a policy keeps what it gave; gradients are the same to the bit."""
    block, batch = _block(12), _batch(12)
    kept = _gradients(block, batch)
    save = {torch.ops.snapgen.resblock.default: CheckpointPolicy[policy]}

    def chosen(context: Any, op: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
        return save.get(op, CheckpointPolicy.PREFER_RECOMPUTE)

    def checkpointed(x: Tensor, temb: Tensor) -> Tensor:
        contexts = partial(create_selective_checkpoint_contexts, chosen)
        return checkpoint(block, x, temb, use_reentrant=False, context_fn=contexts)

    with _Calls() as calls:
        found = _gradients(checkpointed, batch, block)
    assert calls.of("snapgen.resblock") == forwards and calls.of("snapgen.resblock_backward") == 1
    _assert_equal(found, kept)


# ---- torch.func ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_gradients_per_sample(recompute: bool) -> None:
    """vmap over grad, of the parameters: PyTorch runs there, with the numbers of one backward pass for each sample."""
    block, (x, temb, target) = _block(12, recompute=recompute), _batch(12)
    parameters = {name: value.detach() for name, value in block.named_parameters()}

    def loss(values: dict[str, Tensor], x: Tensor, temb: Tensor, target: Tensor) -> Tensor:
        y = torch.func.functional_call(block, values, (x[None], temb[None]))
        return (y[0] - target).square().mean()

    found = torch.vmap(torch.func.grad(loss), in_dims=(None, 0, 0, 0))(parameters, x, temb, target)
    for index in range(len(x)):
        alone = _gradients(block, (x[index, None], temb[index, None], target[index, None]))
        for name, expected in _without_x(alone).items():
            torch.testing.assert_close(found[name][index], expected, rtol=1e-4, atol=1e-5)


def test_fused_mode_says_that_functional_transforms_are_not_carried() -> None:
    block, (x, temb, _) = _block(), _batch()
    with sk.use("fused"), pytest.raises(sk.FusedUnavailable, match=r"torch\.func transform|not built"):
        torch.func.grad(lambda x: block(x, temb).sum())(x)


# ---- several processes -----------------------------------------------------------------------------------------------


def _half(rank: int, batch: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
    return tuple(t.chunk(2)[rank] for t in batch)


def _data_parallel(rank: int) -> dict[str, Tensor]:
    """Gradients of a batch of which each process has half."""
    model = nn.parallel.DistributedDataParallel(_block(12))
    _loss(model, *_half(rank, _batch(12))).backward()
    return {name: p.grad for name, p in model.module.named_parameters()}


def _sharded(rank: int, recompute: bool = False) -> dict[str, Tensor]:
    """The same with every parameter split over the processes."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = _block(12, recompute=recompute)
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    _loss(model, *_half(rank, _batch(12))).backward()
    return {name: p.grad.full_tensor() for name, p in model.named_parameters()}


def _process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    found = {
        "ddp": _data_parallel(rank),
        "fsdp": _sharded(rank),
        "fsdp, recomputed": _sharded(rank, recompute=True),
    }
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch was built without torch.distributed")
def test_two_processes_have_the_gradients_of_one(tmp_path: Path) -> None:
    """DDP and FSDP2 over gloo: each process holds the gradients of the whole batch, the same to the bit."""
    torch.multiprocessing.spawn(_process, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    block = _block(12)
    alone = _without_x(_gradients(block, _batch(12)))
    for way, gradients in first.items():
        assert gradients.keys() == alone.keys()
        for name, found in gradients.items():
            assert torch.equal(found, second[way][name]), f"{way}: {name}"
            torch.testing.assert_close(found, alone[name], rtol=1e-4, atol=1e-6, msg=lambda m, w=way: f"{w}: {m}")
