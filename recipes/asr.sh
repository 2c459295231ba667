#!/usr/bin/env bash
# Word errors at toy scale: a float recognizer is trained with CTC on a text read aloud. From it, one
# each in float, at 4, 2 and 1 bits trains on, all alike for as many updates: these are compared.
# `recipes/demo.sh --asr` is this recipe.
#
#   bash recipes/asr.sh                     30 minutes after installation, on 2 CPU cores
#   bash recipes/asr.sh --minutes 120       longer training on more speech, better models
#   bash recipes/asr.sh --text FILE         your own sentences, one a line, instead of the King
#                                           James Bible (kjv); no training hears one longer than
#                                           7.5 s
#   bash recipes/asr.sh --teacher CKPT      the float recognizer starts from this pre-trained model
#                                           instead of random weights
#   bash recipes/asr.sh --work DIR          where everything goes (default exp/asr_<minutes>min)
#
# Voices and sentences of the test are heard by no training. Interrupted, the same command goes on
# where it stopped.
set -euo pipefail
# shellcheck source=recipes/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

minutes=30 text=kjv work="" audio="" teacher="" data=""
options "minutes text work teacher" "$@"
: "${work:=$repo/exp/asr_${minutes}min}"
[[ "$text" == kjv || -f "$text" ]] || die "--text $text: give kjv, or a file with one sentence a line"
[[ "$text" == kjv ]] || text="$(absolute "$text")"
[[ -z "$teacher" || -f "$teacher" ]] || die "--teacher $teacher: there is no such checkpoint"
origin=(model=fastconv_tiny task.init_from=null)
[[ -z "$teacher" ]] || origin=("task.init_from=$(absolute "$teacher")")
# shellcheck source=recipes/toy.sh
source "$repo/recipes/toy.sh"
rows=(fp w4a4 w2a2 w1a1)

# Two processes, each with half of run=demo_asr's batch, for the reason that toy.sh has for teachers.
half_batch=120000 processes=()
((${#teachers[@]} == 0)) ||
    processes=(distributed_training.distributed_world_size=2 "dataset.max_tokens=$half_batch")

# Eight times as much speech as time: what is heard ten times is learned by heart, and does not help
# with voices that are new.
read_text() { fairseq-lowbit synthesize "$data" --text "$text" --minutes "$((8 * minutes))"; }

# recognize NAME RUN OVERRIDES...
recognize() {
    local name="$1" run="$2"
    shift 2
    OMP_NUM_THREADS="$half" train "$name" "$work/$name.log" "$run" --config-name asr_ctc \
        run=demo_asr "task.data=$data" task.freeze=none "task.max_sample_size=$half_batch" \
        model.mask_prob=0.25 model.mask_length=5 "$@"
}

# start RUN OVERRIDES...: what all rows of the table train on from.
start() {
    local run="$1"
    shift
    recognize start "$run" quant=float "${origin[@]}" "${processes[@]}" "$@"
}

# train_on ROW RUN OVERRIDES...
train_on() {
    local row="$1" run="$2" quant="bitla_$1"
    shift 2
    [[ "$row" != fp ]] || quant=float
    recognize "$row" "$run" "quant=$quant" \
        "task.init_from=$work/start/checkpoints/checkpoint_last.pt" "$@"
}

all_at_once() {
    at_once "${#rows[@]}" "$1" "${rows[@]}"
    ((${#failed[@]} == 0)) || die "a training failed, see above"
}

speed_of() { train_on "$1" "$work/speed/$1" "${trial[@]}" >/dev/null; }

# All at once, as they will train; then each makes as many updates as the slowest can, however long
# that takes in the end: they are to be compared.
speed_of_rows() {
    all_at_once speed_of
    local row
    for row in "${rows[@]}"; do plan_updates "$row" "$1"; done
    for row in "${rows[@]}"; do cat "$work/$row.plan"; done |
        cut -d " " -f 1 | sort -t = -k 2 -n | head -n 1 >"$work/rows.plan"
    log "every row: $(<"$work/rows.plan")"
}

# shellcheck disable=SC2046 # settings, one a word
learn() { train_on "$1" "$work/$1" $(<"$work/rows.plan"); }

# compare FOLDER OPTIONS...
compare() {
    local row models=()
    for row in "${rows[@]}"; do
        models+=("${row^^}=$work/$row/checkpoints/checkpoint_last.pt")
    done
    OMP_NUM_THREADS="$cores" fairseq-lowbit wer "${models[@]}" --data "$data" --out "$@"
}

compare_with_lm() {
    fairseq-lowbit ngram "$data/train.wrd" "$work/lm.arpa"
    compare "$work/lm" --lm "$work/lm.arpa"
}

# What does not train takes, in units of the start's trial: 4 the trial of the rows, 2 each start of a
# training (of four at once), 2 each comparison.
left="minutes * 60 - SECONDS"

log "recognition in $minutes minutes on $cores cores in $work; a rehearsal at toy scale"
stage corpus read_text
stage start_speed first_trial start start "($left - 11 * trial_seconds) * 6 / 10"
trial_seconds="$(<"$work/trial.seconds")"
stage start as_planned start start
stage rows_speed speed_of_rows "$left - 6 * trial_seconds"
stage rows all_at_once learn
log "compare on held-out voices and sentences"
compare "$work"
log "the same, decoded with a language model of the training sentences"
compare_with_lm
log "took $((SECONDS / 60)) min $((SECONDS % 60)) s"
