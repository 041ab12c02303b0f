#!/usr/bin/env bash
# SnapGen's decoder of 1.38M parameters for the latents of SD3's autoencoder, whose encoder is frozen.
set -euo pipefail
LAUNCH="${LAUNCH:-torchrun --standalone --nproc-per-node 8}"
DATA="${DATA:-data/pictures}"
SD35="${SD35:-models/stable-diffusion-3.5-large}"
RUNS="${RUNS:-runs/decoder}"

$LAUNCH -m snapgen decoder train -o "$RUNS" --preset t2i-1024 --data "$DATA" --encoder "$SD35/vae" --l1 1 --l2 1 \
    --perceptual 0.1 --vgg "${VGG:-models/vgg16.safetensors}" --adversarial 0.05 --adversarial-from 100000 \
    --crops 0 256 200000 512 --steps 400000 --batch-size 1024 --micro-batch 4 --lr 2e-4 --warmup 2000 --dtype bf16 --workers 4
