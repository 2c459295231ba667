#!/usr/bin/env bash
# What the recipes at toy scale share: the corpus, the teacher, its students, and how many updates
# fit into the time. Source it after lib.sh, with `minutes` and `work` set and `audio`, `teacher` and
# `data` set or empty. It makes `work`, fills in `teacher` and `data`, sets `cores`, and leaves the
# environment active.

[[ "$minutes" =~ ^[0-9]+$ && "$minutes" -ge 3 ]] || die "--minutes $minutes: give a whole number from 3"
[[ -z "$audio" || -d "$audio" ]] || die "--audio $audio is not a folder"
[[ -z "$audio" ]] || audio="$(cd "$audio" && pwd)"
mkdir -p "$work"
work="$(cd "$work" && pwd)"
: "${data:=$work/data}" "${teacher:=$work/teacher/checkpoints/checkpoint_last.pt}"

source "$repo/scripts/setup.sh"
cores="$(python -c 'import os; print(len(os.sched_getaffinity(0)))')"
SECONDS=0

# A few updates for their speed, in a folder of their own.
trial=(optimization.max_update=16 common.log_interval=8 checkpoint.no_save=true
    dataset.disable_validation=true)

corpus() {
    if [[ -n "$audio" ]]; then
        fairseq-lowbit prepare "$audio" "$data"
    else
        fairseq-lowbit synthesize "$data"
    fi
    fairseq-lowbit labels "$data" --clusters 50
}

pretrain() {
    OMP_NUM_THREADS="$cores" train teacher "$work/teacher.log" --config-name hubert_fastconv \
        run=demo_pretraining "task.data=$data" "$@"
}

speed_of_pretraining() {
    pretrain "hydra.run.dir=$work/speed/teacher" "${trial[@]}" >/dev/null
    plan_updates teacher "$1"
}

teach() {
    pretrain "hydra.run.dir=$work/teacher" "optimization.max_update=$(<"$work/teacher.updates")"
}

# make_teacher SECONDS: corpus, labels, and a teacher that trains for about so long.
make_teacher() {
    stage corpus corpus
    stage teacher_speed speed_of_pretraining "$1"
    stage teacher teach
}

# student NAME CONFIG OVERRIDES...: trains a student of the teacher; its log is $work/NAME.log.
student() {
    local name="$1" config="$2"
    shift 2
    train "$name" "$work/$name.log" --config-name "$config" run=demo_student "task.data=$data" \
        "task.teacher=$teacher" "$@"
}

# rate_of NAME: updates a second, as last logged.
rate_of() {
    grep -o 'ups=[0-9.]*' "$work/$1.log" | tail -n 1 | cut -d= -f2 ||
        die "$work/$1.log shows no rate of updates"
}

# plan_updates NAME SECONDS: writes how many updates NAME makes in this time.
plan_updates() {
    local rate
    rate="$(rate_of "$1")"
    python -c "print(max(40, int($rate * $2)))" >"$work/$1.updates"
    log "$1: $rate updates a second, $(<"$work/$1.updates") updates in $2 s"
}
