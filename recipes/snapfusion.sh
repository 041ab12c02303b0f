#!/usr/bin/env bash
# SnapFusion (NeurIPS 2023) from Stable Diffusion 1.5: predict v, distil to 16 steps, give the efficient denoiser its
# weights, distil that to 16 and to 8, and halve the decoder.
set -euo pipefail
LAUNCH="${LAUNCH:-torchrun --standalone --nproc-per-node 8}"
DATA="${DATA:-data/pictures}"
SD15="${SD15:-models/stable-diffusion-v1-5}"
RUNS="${RUNS:-runs/snapfusion}"
common=(--data "$DATA" --batch-size 2048 --micro-batch 8 --dtype bf16 --weight-decay 0.01 --workers 4)

python -m snapgen fusion import "$SD15" -o "$RUNS/sd15"
python -m snapgen fusion import "$SD15" -o "$RUNS/efficient" --preset snapfusion
$LAUNCH -m snapgen fusion train -o "$RUNS/sd15-v" --init "$RUNS/sd15" --steps 20000 --lr 5e-5 "${common[@]}"
$LAUNCH -m snapgen fusion train -o "$RUNS/efficient-v" --init "$RUNS/efficient" --keep-blocks 0.9 --steps 100000 --lr 5e-5 \
    "${common[@]}"
$LAUNCH -m snapgen fusion distill -o "$RUNS/sd15-16" --teacher "$RUNS/sd15-v/export" --student-steps 16 --steps 20000 --lr 5e-5 \
    "${common[@]}"
$LAUNCH -m snapgen fusion distill -o "$RUNS/efficient-16" --teacher "$RUNS/efficient-v/export" --student-steps 16 \
    --steps 20000 --lr 5e-5 "${common[@]}"
$LAUNCH -m snapgen fusion distill -o "$RUNS/efficient-8" --teacher "$RUNS/sd15-16/export" --init "$RUNS/efficient-16/export" \
    --student-steps 8 --steps 20000 --lr 5e-5 "${common[@]}"
python -m snapgen decoder prune "$SD15" -o "$RUNS/half"
$LAUNCH -m snapgen decoder distill -o "$RUNS/decoder" --teacher "$RUNS/sd15-v/export" --decoder "$RUNS/half" --draw-steps 50 \
    --guidance 7.5 --steps 50000 --batch-size 512 --micro-batch 2 --lr 1e-4 --dtype bf16
