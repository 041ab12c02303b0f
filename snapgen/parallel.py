"""One process or many: `torchrun --nproc-per-node 8 -m snapgen train ...` runs the same command on all of them.

DDP keeps whole weights on every process; FSDP2 (`fully_shard`) deals weights, gradients, averaged weights and moments
out over them.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.nn.parallel import DistributedDataParallel

from snapgen.settings import Kind

OWN_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"  # torchrun's: a new store for every attempt


@dataclass(frozen=True)
class Processes:
    """The processes of a run, as one of them sees them."""

    kind: Kind
    rank: int
    world: int
    device: torch.device
    side: Any = None
    """A group for what happens beside training, on CPUs: the two never wait for each other's messages."""

    @property
    def first(self) -> bool:
        """Whether this process reports, draws and writes what is written once."""
        return self.rank == 0

    @property
    def many(self) -> bool:
        return self.world > 1

    def wait(self) -> None:
        """Until all are here."""
        if self.many:
            dist.barrier()

    def agree(self, flag: bool) -> bool:
        """Whether any process says so; the same answer on all."""
        return self.agree_on(flag)[0]

    def agree_on(self, *flags: bool) -> tuple[bool, ...]:
        """For each of some questions, whether any process says so."""
        if not self.many:
            return flags
        said = torch.tensor([int(flag) for flag in flags])
        dist.all_reduce(said, op=dist.ReduceOp.MAX)
        return tuple(bool(answer) for answer in said)

    def mean(self, values: Tensor) -> Tensor:
        """The mean over the processes."""
        if not self.many:
            return values
        total = values.clone()
        dist.all_reduce(total)
        return total / self.world

    def same(self, value: Any) -> Any:
        """The first process's value, on all: anything that pickles, between these processes alone."""
        if not self.many:
            return value
        held = [value]
        dist.broadcast_object_list(held, src=0)
        return held[0]


def own_device() -> torch.device:
    """This process's GPU, or the CPU."""
    local = int(os.environ.get("LOCAL_RANK", "0"))
    return torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")


@contextmanager
def processes(kind: Kind = "ddp") -> Iterator[Processes]:
    """Join those that torchrun started, or be alone."""
    if kind not in ("ddp", "fsdp"):
        raise ValueError(f"parallel: got {kind!r}; allowed are ddp and fsdp")
    world, device = int(os.environ.get("WORLD_SIZE", "1")), own_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world == 1:
        yield Processes(kind, 0, 1, device)
        return
    store, rank, _ = next(iter(dist.rendezvous("env://")))
    # torchrun may hand the store of a failed attempt to the next one, with the addresses of processes that are gone. On
    # one machine its count of attempts tells them apart; each of several machines has a count of its own.
    if int(os.environ.get("GROUP_WORLD_SIZE", "1")) == 1:
        store = dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    elif os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0" and os.environ.get(OWN_STORE) != "1":
        raise ValueError(
            f"--max-restarts: on several machines, set {OWN_STORE}=1 before torchrun; else a restart hangs"
        )
    # Gloo beside NCCL: flags and checkpoints travel between CPUs.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    try:
        yield Processes(kind, rank, world, device, dist.new_group(backend="gloo"))
    finally:
        dist.destroy_process_group()


def template(module: nn.Module) -> nn.Module:
    """The module without memory, to hold whole weights later."""
    # Tensors are made on the meta device as they are copied: nothing is held twice.
    known: dict[int, Any] = {
        id(t): nn.Parameter(t.to("meta"), t.requires_grad) if isinstance(t, nn.Parameter) else t.to("meta")
        for t in (*module.parameters(), *module.buffers())
    }
    return copy.deepcopy(module, known)


def shard(modules: Mapping[str, nn.Module], group: Processes) -> None:
    """Deal the modules' weights out over the processes, layer by layer, in place."""
    mesh = init_device_mesh(group.device.type, (group.world,))
    for module in modules.values():
        # FSDP2 takes only contiguous weights; activations may still be channels_last.
        module.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        # A module that applies its parts without calling them has to be gathered whole.
        for layer in () if getattr(module, "gathered_whole", False) else layers(module):
            fully_shard(layer, mesh=mesh)
        fully_shard(module, mesh=mesh)


def layers(module: nn.Module) -> Iterator[nn.Module]:
    """The parts that are gathered one at a time: the elements of the module's lists, outermost first without overlap,
    but for lists whose elements are never called themselves (stages)."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            for element in child:
                if any(isinstance(part, nn.ModuleList) for part in element.children()):
                    yield from layers(element)
                else:
                    yield element
        else:
            yield from layers(child)


@contextmanager
def distributed(call: dict[str, Any], names: Iterable[str], wrappers: Mapping[str, nn.Module]) -> Iterator[None]:
    """While open, `call` has the data-parallel wrappers of the modules `names`, which alone are trained meanwhile."""
    plain = {name: call[name] for name in names if name in wrappers}
    call.update({name: wrappers[name] for name in plain})
    try:
        yield
    finally:
        call.update(plain)


@contextmanager
def resting(modules: Iterable[nn.Module]) -> Iterator[None]:
    """While open, the modules' weights ask for no gradients, so that none are computed. Those that FSDP deals out do as
    before: it fixes that for each when it first gathers them."""
    asleep = [
        parameter
        for module in modules
        if not isinstance(module, FSDPModule)
        for parameter in module.parameters()
        if parameter.requires_grad
    ]
    for parameter in asleep:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asleep:
            parameter.requires_grad_()


def wrapped(module: nn.Module, group: Processes, *, unused: bool) -> nn.Module:
    """The module under DDP."""
    ids = [group.device.index] if group.device.type == "cuda" else None
    return DistributedDataParallel(module, device_ids=ids, find_unused_parameters=unused, gradient_as_bucket_view=True)


@contextmanager
def unsynchronised(modules: Iterable[nn.Module], wait: bool) -> Iterator[None]:
    """While open and if `wait`, gradients stay with their process: another backward pass of the step follows."""
    with ExitStack() as stack:
        for module in modules:
            if isinstance(module, FSDPModule):
                module.set_requires_gradient_sync(not wait)
            elif isinstance(module, DistributedDataParallel) and wait:
                stack.enter_context(module.no_sync())
        yield


def dealt_out_again(modules: Iterable[nn.Module]) -> None:
    """Let go of gathered weights, which FSDP2 keeps of a module's root after a forward pass without a backward one:
    the next pass gathers those that are there now."""
    for module in modules:
        if isinstance(module, FSDPModule):
            module.reshard()


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be dealt out. Every process has to ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def replicated(tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor that is the same on all processes, in the form that goes with `like`."""
    if not isinstance(like, DTensor):
        return tensor
    return DTensor.from_local(tensor, like.device_mesh, [Replicate()] * like.device_mesh.ndim, run_check=False)
