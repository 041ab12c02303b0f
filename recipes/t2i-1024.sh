#!/usr/bin/env bash
# SnapGen (CVPR 2025): 256, 512 and 1024 pixels, knowledge of SD3.5-Large at 1024, then four steps.
set -euo pipefail
LAUNCH="${LAUNCH:-torchrun --standalone --nproc-per-node 8}"
DATA="${DATA:-data/pictures}"
SD35="${SD35:-models/stable-diffusion-3.5-large}"
GEMMA="${GEMMA:-models/gemma-2-2b}"
RUNS="${RUNS:-runs/t2i-1024}"
encoders=(--clip-l "$SD35/text_encoder" --clip-g "$SD35/text_encoder_2" --gemma "$GEMMA")
common=(--preset t2i-1024 --dtype bf16 --parallel fsdp --ema 0.9999 --encoder-dropout 0.1 --workers 4)

for pixels in 256 512 1024; do
    $LAUNCH -m snapgen cache "$DATA" -o "$RUNS/cache-$pixels" --resolution "$pixels" --buckets --autoencoder "$SD35/vae" \
        "${encoders[@]}" --precision bf16
done

$LAUNCH -m snapgen train -o "$RUNS/256" --data "$RUNS/cache-256" --resolution 256 --steps 400000 --batch-size 8192 \
    --micro-batch 16 --lr 1e-4 --warmup 5000 --cooldown 0 "${common[@]}"
$LAUNCH -m snapgen train -o "$RUNS/512" --data "$RUNS/cache-512" --resolution 512 --init "$RUNS/256/export" --steps 100000 \
    --batch-size 4096 --micro-batch 8 --lr 1e-4 --warmup 1000 --cooldown 0 "${common[@]}"
$LAUNCH -m snapgen distill knowledge -o "$RUNS/1024" --data "$RUNS/cache-1024" --resolution 1024 --init "$RUNS/512/export" \
    --teacher "$SD35" --sharded --steps 100000 --batch-size 2048 --micro-batch 2 --lr 1e-4 --warmup 1000 "${common[@]}"
$LAUNCH -m snapgen distill steps -o "$RUNS/4-steps" --data "$RUNS/cache-1024" --resolution 1024 --init "$RUNS/1024/export" \
    --teacher "${TURBO:-models/stable-diffusion-3.5-large-turbo}" --sharded --student-steps 4 --steps 10000 --batch-size 512 \
    --micro-batch 1 --lr 1e-5 --warmup 500 "${common[@]}"
