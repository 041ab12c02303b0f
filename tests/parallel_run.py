"""What every process of a test under torchrun runs: OUT KIND STEPS [STOP_AT]. Prints the losses on the first."""

import json
import os
import sys
from pathlib import Path

import torch
from small_models import QUIET, autoencoder_task, denoiser_task
from small_teachers import taught_task

from snapgen import train as training
from snapgen.data.shapes import ShapesDataset
from snapgen.distill.features import LayerPair
from snapgen.distill.knowledge import KnowledgeDistillation

out, kind, steps = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
stop_at = int(sys.argv[4]) if len(sys.argv) > 4 else 0
micro = int(os.environ.get("MICRO", "0")) or None
rank = int(os.environ.get("RANK", "0"))
torch.set_num_threads(1)
losses: dict[int, float] = {}
report = training._Meter.report


def reporting(self):
    totals = {name: self.run.group.mean(value.float().cpu()) for name, value in sorted(self.totals.items())}
    losses[self.run.state.step] = float(totals["loss"]) / self.count
    report(self)


training._Meter.report = reporting


class Data(ShapesDataset):
    read = 0

    def batch(self, indices):
        Data.read += 1
        if stop_at and rank == 1 and Data.read == stop_at and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), 9)  # a lost worker
        return super().batch(indices)


config = training.TrainConfig(
    steps=steps,
    batch_size=8,
    micro_batch=micro,
    warmup=2,
    cooldown=0.0,
    save_every=3,
    sample_every=int(os.environ.get("SAMPLE_EVERY", "100")),
    log_every=1,
    lr=2e-3,
    parallel=kind,
    recompute=bool(os.environ.get("RECOMPUTE")),
)


def knowledge_task():
    layers = LayerPair("transformer.transformer_blocks.2", "up.0.layers.1.transformer")

    def objective(teacher, student):
        torch.manual_seed(2)
        return KnowledgeDistillation(teacher, student, pairs=(layers,))

    return taught_task(objective)


tasks = {"autoencoder": autoencoder_task, "denoiser": denoiser_task, "knowledge": knowledge_task}
task = tasks[os.environ.get("TASK", "denoiser")]()
training.train(task, Data(32, length=1000), config, out, console=QUIET)
if rank == 0:
    print(json.dumps(losses))
