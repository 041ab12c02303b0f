#!/usr/bin/env bash
# The whole method at tiny size, on two CPU cores, without any download. Two cores of a Xeon with AMX train 320 pictures a
# second of the student alone, 168 with its teacher, 80 of the teacher itself: about 20 minutes for a student, 80 for the
# teacher (few-step students are not timed), which may be stopped and started again. For the spread between seeds:
#   for seed in 0 1 2; do SEED=$seed recipes/shapes.sh; done; python recipes/table.py runs/shapes-*
set -euo pipefail
LAUNCH="${LAUNCH:-python}"
SEED="${SEED:-0}"
RUNS="${RUNS:-runs/shapes-$SEED}"
# Page faults of glibc's malloc cost large tensors several times their work.
export MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=8589934592 MALLOC_TOP_PAD_=268435456
common=(--dtype bf16 --batch-size 64 --seed "$SEED")

$LAUNCH -m snapgen train -o "$RUNS/teacher" --preset tiny-teacher --steps 6000 "${common[@]}"

# Knowledge distillation: none, output, output and features, and these without timestep scaling.
$LAUNCH -m snapgen train -o "$RUNS/alone" --steps 3000 "${common[@]}"
$LAUNCH -m snapgen distill knowledge -o "$RUNS/output" --teacher "$RUNS/teacher/export" --layers --steps 3000 "${common[@]}"
$LAUNCH -m snapgen distill knowledge -o "$RUNS/features" --teacher "$RUNS/teacher/export" --steps 3000 "${common[@]}"
$LAUNCH -m snapgen distill knowledge -o "$RUNS/unscaled" --teacher "$RUNS/teacher/export" --scaling constant --steps 3000 "${common[@]}"
for student in alone output features unscaled; do
    $LAUNCH -m snapgen eval shapes "$RUNS/$student/export" --steps 28 --per-skill 100 -o "$RUNS/$student/scores.json"
done

# Few steps: 4, 2 and 1, without guidance.
for steps in 4 2 1; do
    $LAUNCH -m snapgen distill steps -o "$RUNS/steps-$steps" --init "$RUNS/features/export" --teacher "$RUNS/features/export" \
        --guidance 4 --student-steps "$steps" --head-lr 10 --steps 1500 --lr 1e-4 "${common[@]}"
    $LAUNCH -m snapgen eval shapes "$RUNS/steps-$steps/export" --steps "$steps" --guidance 1 --per-skill 100 \
        -o "$RUNS/steps-$steps/scores.json"
done

# SnapFusion: v-prediction with blocks left out, then 16 and 8 steps, vanilla and CFG-aware.
$LAUNCH -m snapgen fusion train -o "$RUNS/v" --keep-blocks 0.9 --steps 2500 "${common[@]}"
$LAUNCH -m snapgen fusion distill -o "$RUNS/v-16" --teacher "$RUNS/v/export" --student-steps 16 --steps 1000 --lr 2e-4 "${common[@]}"
for share in 0 0.1; do
    $LAUNCH -m snapgen fusion distill -o "$RUNS/v-8-$share" --teacher "$RUNS/v-16/export" --student-steps 8 \
        --cfg-probability "$share" --steps 1000 --lr 2e-4 "${common[@]}"
    $LAUNCH -m snapgen eval shapes "$RUNS/v-8-$share/export" --steps 8 --per-skill 100 -o "$RUNS/v-8-$share/scores.json"
done
