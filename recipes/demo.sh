#!/usr/bin/env bash
# A rehearsal of the real thing at toy scale: pre-train a tiny teacher, distil it to BiT-LA W2A2 and
# W1A1, compare both with calibration alone. Everything it runs is what a full run runs.
#
#   bash recipes/demo.sh                    10 minutes after installation, on 2 CPU cores
#   bash recipes/demo.sh --minutes 60       longer training, better models
#   bash recipes/demo.sh --audio DIR        your own recordings instead of synthesized speech
#   bash recipes/demo.sh --work DIR         where everything goes (default exp/demo_<minutes>min)
#
# Interrupted, the same command goes on where it stopped.
set -euo pipefail

minutes=10 audio="" work=""
while (($#)); do
    case "$1" in
        --minutes | --audio | --work)
            (($# > 1)) || { echo "error: $1 needs a value" >&2; exit 2; }
            declare "${1#--}=$2"
            shift 2
            ;;
        -h | --help)
            sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
            exit 0
            ;;
        *)
            echo "error: unknown option $1; see --help" >&2
            exit 2
            ;;
    esac
done

source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
[[ "$minutes" =~ ^[0-9]+$ && "$minutes" -ge 3 ]] || die "--minutes $minutes: give a whole number from 3"
[[ -z "$audio" || -d "$audio" ]] || die "--audio $audio is not a folder"
[[ -z "$audio" ]] || audio="$(cd "$audio" && pwd)"
mkdir -p "${work:=$repo/exp/demo_${minutes}min}"
work="$(cd "$work" && pwd)"
data="$work/data"
teacher="$work/teacher/checkpoints/checkpoint_last.pt"
students=(w2a2 w1a1)

source "$repo/scripts/setup.sh"
cores="$(python -c 'import os; print(len(os.sched_getaffinity(0)))')"
half="$((cores > 1 ? cores / 2 : 1))"
SECONDS=0

corpus() {
    if [[ -n "$audio" ]]; then
        fairseq-lowbit prepare "$audio" "$data"
    else
        fairseq-lowbit synthesize "$data"
    fi
    fairseq-lowbit labels "$data" --clusters 50
}

# The two kinds of training run, each with what follows as further overrides.
pretrain() {
    OMP_NUM_THREADS="$cores" train teacher "$work/teacher.log" --config-name hubert_fastconv \
        run=demo_pretraining "task.data=$data" "$@"
}

distil() {
    local precision="$1"
    shift
    OMP_NUM_THREADS="$half" train "$precision" "$work/$precision.log" \
        --config-name "bitla_$precision" run=demo_student "task.data=$data" \
        "task.teacher=$teacher" "$@"
}

both() {
    local precision jobs=()
    for precision in "${students[@]}"; do
        "$@" "$precision" &
        jobs+=($!)
    done
    for job in "${jobs[@]}"; do wait "$job" || die "a student failed, see above"; done
}

# How many updates fit: a few are run for their speed, in a folder of their own.
speed_of_pretraining() {
    pretrain "hydra.run.dir=$work/speed/teacher" optimization.max_update=16 common.log_interval=8 \
        checkpoint.no_save=true dataset.disable_validation=true >/dev/null
    plan_updates teacher "$teacher_seconds"
}

speed_of() {
    distil "$1" "hydra.run.dir=$work/speed/$1" optimization.max_update=16 common.log_interval=8 \
        checkpoint.no_save=true dataset.disable_validation=true >/dev/null
}

speed_of_distillation() {
    both speed_of
    local precision
    for precision in "${students[@]}"; do plan_updates "$precision" "$student_seconds"; done
}

# plan_updates RUN SECONDS: writes the number of updates for RUN from the rate last logged.
plan_updates() {
    local rate
    rate="$(grep -o 'ups=[0-9.]*' "$work/$1.log" | tail -n 1 | cut -d= -f2)" ||
        die "$work/$1.log shows no rate of updates"
    python -c "print(max(40, int($rate * $2)))" >"$work/$1.updates"
    log "$1: $rate updates a second, $(<"$work/$1.updates") updates in $2 s"
}

teach() {
    pretrain "hydra.run.dir=$work/teacher" "optimization.max_update=$(<"$work/teacher.updates")"
}

student() {
    distil "$1" "hydra.run.dir=$work/$1" "optimization.max_update=$(<"$work/$1.updates")"
}

evaluate() {
    local precision arguments=(--ptq bitla_w1a1)
    for precision in "${students[@]}"; do
        arguments+=(--student "QAT bitla_$precision=$work/$precision/checkpoints/checkpoint_last.pt")
    done
    OMP_NUM_THREADS="$cores" fairseq-lowbit evaluate "$teacher" --data "$data" --out "$work" \
        "${arguments[@]}"
}

# What does not train: corpus, labels, program starts, measuring speed, and the comparison.
overhead=150
teacher_seconds="$(((minutes * 60 - overhead) * 6 / 10))"
student_seconds="$(((minutes * 60 - overhead) * 4 / 10))"

log "demo of $minutes minutes on $cores cores in $work; a rehearsal at toy scale"
stage corpus corpus
stage teacher_speed speed_of_pretraining
stage teacher teach
stage student_speed speed_of_distillation
stage students both student
log "compare on held-out audio"
evaluate
log "took $((SECONDS / 60)) min $((SECONDS % 60)) s"
