#!/usr/bin/env bash
# SnapGen's ImageNet model at 256x256 (372M parameters): class prompts through CLIP-L, as the widths of the table tell.
set -euo pipefail
LAUNCH="${LAUNCH:-torchrun --standalone --nproc-per-node 8}"
IMAGENET="${IMAGENET:-data/imagenet/train}"
MODELS="${MODELS:-models}"
RUNS="${RUNS:-runs/imagenet-256}"

$LAUNCH -m snapgen cache "imagenet:$IMAGENET" -o "$RUNS/cache" --resolution 256 --autoencoder "$MODELS/vae-4" \
    --clip-l "$MODELS/clip-l" --precision bf16
$LAUNCH -m snapgen train -o "$RUNS/denoiser" --preset imagenet-256 --data "$RUNS/cache" --steps 400000 --batch-size 1024 \
    --micro-batch 4 --lr 1e-4 --warmup 5000 --cooldown 0 --ema 0.9999 --dtype bf16 --workers 4
