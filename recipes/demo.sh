#!/usr/bin/env bash
# A rehearsal of the real thing at toy scale: pre-train a tiny teacher, distil it to BiT-LA W2A2 and
# W1A1, compare both with calibration alone. Everything it runs is what a full run runs.
#
#   bash recipes/demo.sh                    10 minutes after installation, on 2 CPU cores
#   bash recipes/demo.sh --minutes 60       longer training, better models
#   bash recipes/demo.sh --audio DIR        your own recordings instead of synthesized speech
#   bash recipes/demo.sh --work DIR         where everything goes (default exp/demo_<minutes>min)
#   bash recipes/demo.sh --asr              word errors of recognizers instead: recipes/asr.sh, which
#                                           takes 30 minutes by default
#
# Interrupted, the same command goes on where it stopped.
set -euo pipefail
# shellcheck source=recipes/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

minutes="" audio="" work="" teacher="" data="" asr=""
options "minutes audio work asr!" "$@"
if [[ -n "$asr" ]]; then
    [[ -z "$audio" ]] || die "--asr reads a text aloud and takes no --audio; recordings that have" \
        "transcripts are trained on with fairseq-hydra-train --config-name asr_ctc"
    exec bash "$repo/recipes/asr.sh" ${minutes:+--minutes "$minutes"} ${work:+--work "$work"}
fi
: "${minutes:=10}"
: "${work:=$repo/exp/demo_${minutes}min}"
# shellcheck source=recipes/toy.sh
source "$repo/recipes/toy.sh"
students=(w2a2 w1a1)

# distil PRECISION RUN OVERRIDES...
distil() {
    local precision="$1"
    shift
    OMP_NUM_THREADS="$half" student "$precision" "bitla_$precision" "$@"
}

both() {
    at_once 2 "$1" "${students[@]}"
    ((${#failed[@]} == 0)) || die "a student failed, see above"
}

speed_of() { distil "$1" "$work/speed/$1" "${trial[@]}" >/dev/null; }

# Both at once, as they will train, each by its own rate: so they end together.
speed_of_distillation() {
    both speed_of
    local precision
    for precision in "${students[@]}"; do plan_updates "$precision" "$1"; done
}

# shellcheck disable=SC2046 # settings, one a word
learn() { distil "$1" "$work/$1" $(<"$work/$1.plan"); }

evaluate() {
    local precision arguments=(--ptq bitla_w1a1 --override run=demo_student)
    for precision in "${students[@]}"; do
        arguments+=(--student "QAT bitla_$precision=$work/$precision/checkpoints/checkpoint_last.pt")
    done
    OMP_NUM_THREADS="$cores" fairseq-lowbit evaluate "$teacher" --data "$data" --out "$work" \
        "${arguments[@]}"
}

# What does not train takes, in units of the teacher's trial: 12 the comparison, 1 each start of a
# training (the students' at once), 2 the students' trial.
left="minutes * 60 - SECONDS"

log "demo of $minutes minutes on $cores cores in $work; a rehearsal at toy scale"
make_teacher "($left - 16 * trial_seconds) * 6 / 10"
stage student_speed speed_of_distillation "$left - 13 * trial_seconds"
stage students both learn
log "compare on held-out audio"
evaluate
log "took $((SECONDS / 60)) min $((SECONDS % 60)) s"
