#!/usr/bin/env bash
# What the recipes at toy scale share: the corpus, the teacher, its students, and how many updates
# fit into the time. Source it after lib.sh, with `minutes` and `work` set and `audio`, `teacher` and
# `data` set or empty. It makes `work`, fills in `teacher` and `data`, sets `cores`, and leaves the
# environment active. `student_run`, if it is set, trains students instead of run=demo_student.
# shellcheck disable=SC2154 # what lib.sh and the recipe set

[[ "$minutes" =~ ^[0-9]+$ && "$minutes" -ge 3 ]] || die "--minutes $minutes: give a whole number from 3"
[[ -z "$audio" || -d "$audio" ]] || die "--audio $audio is not a folder"
[[ -z "$audio" ]] || audio="$(cd "$audio" && pwd)"
mkdir -p "$work"
work="$(cd "$work" && pwd)"
: "${data:=$work/data}" "${teacher:=$work/teacher/checkpoints/checkpoint_last.pt}"

source "$repo/scripts/setup.sh"
read -r cores gpus < <(
    python -c 'import os, torch; print(len(os.sched_getaffinity(0)), torch.cuda.device_count())'
)

# Threads that wait for each other sleep: by spinning they take the core that the last one needs, as
# soon as anything else runs on this machine.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"

# The minutes go on where an interrupted start has left them.
SECONDS="$(cat "$work/seconds" 2>/dev/null || echo 0)"
trap 'echo "$SECONDS" >"$work/seconds"' EXIT

# Models this small gain little from a second thread, which waits for the first at every operation,
# and lose much by it where other programs run: the teacher trains in two processes instead, each
# with half of run=demo_pretraining's batch.
half="$((cores > 1 ? cores / 2 : 1))" teachers=()
if ((cores > 1 && gpus == 0)); then
    teachers=(distributed_training.distributed_world_size=2 dataset.max_tokens=96000)
fi

# A few updates and a validation, for their speed.
trial=(optimization.max_update=20 common.log_interval=4 checkpoint.no_save=true)

corpus() {
    if [[ -n "$audio" ]]; then
        fairseq-lowbit prepare "$audio" "$data"
    else
        fairseq-lowbit synthesize "$data"
    fi
    fairseq-lowbit labels "$data" --clusters 50
}

# pretrain RUN OVERRIDES...: trains the teacher in the folder RUN.
pretrain() {
    local run="$1"
    shift
    OMP_NUM_THREADS="$half" train teacher "$work/teacher.log" "$run" \
        --config-name hubert_fastconv run=demo_pretraining "task.data=$data" "${teachers[@]}" "$@"
}

# first_trial COMMAND NAME SECONDS: COMMAND RUN OVERRIDES... trains NAME. Its trial tells how many
# updates fit into so many seconds, and how fast this machine starts a program: trial_seconds.
first_trial() {
    local begin="$SECONDS"
    "$1" "$work/speed/$2" "${trial[@]}" >/dev/null
    trial_seconds="$((SECONDS - begin))"
    echo "$trial_seconds" >"$work/trial.seconds"
    plan_updates "$2" "$3"
}

# as_planned COMMAND NAME: the training that the trial has planned.
# shellcheck disable=SC2046 # settings, one a word
as_planned() { "$1" "$work/$2" $(<"$work/$2.plan"); }

# make_teacher SECONDS: corpus, labels, and a teacher that trains for about so long. SECONDS is an
# arithmetic expression, which is evaluated when corpus and trial are done. Sets trial_seconds.
make_teacher() {
    stage corpus corpus
    stage teacher_speed first_trial pretrain teacher "$1"
    trial_seconds="$(<"$work/trial.seconds")"
    stage teacher as_planned pretrain teacher
}

# student NAME CONFIG RUN OVERRIDES...: trains a student of the teacher in the folder RUN; its log is
# $work/NAME.log.
student() {
    local name="$1" config="$2" run="$3"
    shift 3
    train "$name" "$work/$name.log" "$run" --config-name "$config" \
        "run=${student_run:-demo_student}" "task.data=$data" "task.teacher=$teacher" "$@"
}

# rate_of NAME: updates a second in its trial.
rate_of() { python "$repo/recipes/progress.py" rate "$work/speed/$1"; }

# plan_updates NAME SECONDS: writes the settings by which NAME trains for so long, as its trial says.
plan_updates() {
    local seconds="$((($2) > 0 ? ($2) : 0))"
    python "$repo/recipes/progress.py" plan "$work/speed/$1" "$seconds" >"$work/$1.plan"
    log "$1: $(rate_of "$1") updates a second; for $seconds s $(<"$work/$1.plan")"
}
