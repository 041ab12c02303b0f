#!/usr/bin/env bash
# The whole method at tiny size, on CPU cores, without any download. Every command may be stopped and started again; what is
# done is passed over. Small models train fastest with a core each, so seeds run side by side:
#   for seed in 0 1; do SEED=$seed OMP_NUM_THREADS=1 recipes/shapes.sh & done; wait; python recipes/table.py runs/shapes-?
# One core of a Xeon with AMX trains 240 pictures a second of a student alone, 140 with the teacher, 165 of the teacher and 49 of
# a student of four steps: 9, 15, 42 and 9 minutes. All seeds share the teacher.
set -euo pipefail
LAUNCH="${LAUNCH:-python}"
SEED="${SEED:-0}"
RUNS="${RUNS:-runs/shapes-$SEED}"
TEACHER="${TEACHER:-runs/shapes-teacher}"
# Page faults of glibc's malloc cost large tensors several times their work.
export MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=8589934592 MALLOC_TOP_PAD_=268435456

# run NAME COMMAND...: unless it is there already.
run() { [[ -d "$RUNS/$1/export" ]] || $LAUNCH -m snapgen "${@:2}" -o "$RUNS/$1" --dtype bf16 --batch-size 64 --seed "$SEED"; }
# score NAME STEPS GUIDANCE: on 100 unseen captions a skill.
score() {
    [[ -f "$RUNS/$1/scores.json" ]] ||
        $LAUNCH -m snapgen eval shapes "$RUNS/$1/export" --steps "$2" --guidance "$3" --per-skill 100 -o "$RUNS/$1/scores.json"
}

mkdir -p "$TEACHER"
( # by whichever seed comes first
    flock 9
    [[ -d "$TEACHER/export" ]] ||
        $LAUNCH -m snapgen train -o "$TEACHER" --preset tiny-teacher --steps 6500 --cooldown 0.3 --dtype bf16 --batch-size 64 --compile
) 9> "$TEACHER/.lock"

# Knowledge distillation: none, output, output and features, and these without timestep scaling.
student=(--steps 2000 --lr 1.5e-3)
run alone train "${student[@]}"
run output distill knowledge --teacher "$TEACHER/export" --layers "${student[@]}"
run features distill knowledge --teacher "$TEACHER/export" "${student[@]}"
run unscaled distill knowledge --teacher "$TEACHER/export" --scaling constant "${student[@]}"
for name in alone output features unscaled; do
    score "$name" 28 4
done

# Few steps, without guidance, of the shipped model: by its own mean velocity over several steps, with guidance, and against the
# heads.
mkdir -p "$RUNS/tiny"
[[ -f "$RUNS/tiny/scores.json" ]] ||
    $LAUNCH -m snapgen eval shapes tiny --steps 28 4 2 1 --per-skill 100 --seed "$SEED" -o "$RUNS/tiny/scores.json"
for steps in 4 2 1; do
    run "steps-$steps" distill steps --init tiny --teacher tiny --guidance 3 --student-steps "$steps" \
        --teacher-steps $((16 / steps)) --scaling constant --kd-weight 10 --head-lr 10 --steps 400 --warmup 20 --cooldown 0.5 \
        --ema 0.98 --lr 3e-4
    score "steps-$steps" "$steps" 1
done

# SnapFusion: v-prediction with blocks left out, then 16 and 8 steps, vanilla and CFG-aware.
run v fusion train --keep-blocks 0.9 --steps 2000
run v-16 fusion distill --teacher "$RUNS/v/export" --student-steps 16 --steps 500 --lr 2e-4
for share in 0 0.1; do
    run "v-8-$share" fusion distill --teacher "$RUNS/v-16/export" --student-steps 8 --cfg-probability "$share" --steps 500 --lr 2e-4
    score "v-8-$share" 8 4
done
