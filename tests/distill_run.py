"""What one of two processes does: steps of every objective with DDP and FSDP2; the first writes the weights down.

python -m torch.distributed.run --nproc-per-node 2 tests/distill_run.py OUT
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch
from test_adversarial import few
from test_distill import both_task
from test_train import config, data

from snapgen import io, parallel
from snapgen.data.loader import batches
from snapgen.parallel import Processes
from snapgen.state import TrainState
from snapgen.train import optimizer_step, share_of, wrap

OBJECTIVES = {"knowledge": both_task, "game": few, "penalty": lambda: few(r1=0.1)}


def steps(task, group: Processes, count: int = 1) -> dict[str, torch.Tensor]:
    """All weights, whole, after `count` steps of a batch of 4."""
    plan = config(lr=1e-4, warmup=1, parallel=group.kind)
    share = share_of(plan, group)
    if group.many and group.kind == "fsdp":
        parallel.shard(task.modules, group)
    state = TrainState(task, plan, group)
    wrappers = wrap(task, group)
    stream = batches(data(), share, start=0, seed=0)
    for _ in range(count):
        optimizer_step(task, plan, state, stream, share, wrappers)
    return {name: parallel.whole(p.detach()).clone() for name, p in state.named.items()}


def main(out: Path) -> None:
    torch.set_num_threads(1)
    with parallel.processes("ddp") as group:
        for kind in ("ddp", "fsdp"):
            for name, make in OBJECTIVES.items():
                task = make()
                task.objective.teacher._sharding = kind == "fsdp"  # as load_teacher(sharded=True)
                try:
                    found = steps(task, replace(group, kind=kind))
                except ValueError as error:
                    found, message = {}, str(error)
                    io.write_text(out / f"{kind}-{name}.txt", message)
                if group.first and found:
                    io.save_tensors(out / f"{kind}-{name}.safetensors", found)
                group.wait()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
