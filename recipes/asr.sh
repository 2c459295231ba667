#!/usr/bin/env bash
# Word errors at toy scale: a float recognizer, trained with CTC on a text read aloud, and the same
# recognizer at 4, 2 and 1 bits, trained on from it. `recipes/demo.sh --asr` is this recipe.
#
#   bash recipes/asr.sh                     30 minutes after installation, on 2 CPU cores
#   bash recipes/asr.sh --minutes 120       longer training on more speech, better models
#   bash recipes/asr.sh --text FILE         your own sentences, one a line, instead of the King
#                                           James Bible (kjv)
#   bash recipes/asr.sh --work DIR          where everything goes (default exp/asr_<minutes>min)
#
# Voices and sentences of the test are heard by no training. Interrupted, the same command goes on
# where it stopped.
set -euo pipefail
# shellcheck source=recipes/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

minutes=30 text=kjv work="" audio="" teacher="" data=""
options "minutes text work" "$@"
: "${work:=$repo/exp/asr_${minutes}min}"
[[ "$text" == kjv || -f "$text" ]] || die "--text $text: give kjv, or a file with one sentence a line"
[[ "$text" == kjv ]] || text="$(absolute "$text")"
# shellcheck source=recipes/toy.sh
source "$repo/recipes/toy.sh"
precisions=(w4a4 w2a2 w1a1)

# Two processes, each with half of run=demo_asr's batch, for the reason that toy.sh has for teachers.
processes=()
((${#teachers[@]} == 0)) ||
    processes=(distributed_training.distributed_world_size=2 dataset.max_tokens=320000)

# Twice as much speech as time: so every sentence is heard several times.
read_text() { fairseq-lowbit synthesize "$data" --text "$text" --minutes "$((2 * minutes))"; }

# recognize NAME RUN OVERRIDES...
recognize() {
    local name="$1" run="$2"
    shift 2
    OMP_NUM_THREADS="$half" train "$name" "$work/$name.log" "$run" --config-name asr_ctc \
        run=demo_asr "task.data=$data" "$@"
}

# float RUN OVERRIDES...: from random weights.
float() {
    local run="$1"
    shift
    recognize fp "$run" model=fastconv_tiny quant=float task.init_from=null task.freeze=none \
        "${processes[@]}" "$@"
}

speed_of_float() {
    local begin="$SECONDS"
    float "$work/speed/fp" "${trial[@]}" >/dev/null
    trial_seconds="$((SECONDS - begin))"
    echo "$trial_seconds" >"$work/trial.seconds"
    plan_updates fp "$1"
}

# shellcheck disable=SC2046 # settings, one a word
learn_float() { float "$work/fp" $(<"$work/fp.plan"); }

# quantized PRECISION RUN OVERRIDES...: from the float recognizer.
quantized() {
    local precision="$1" run="$2"
    shift 2
    recognize "$precision" "$run" "quant=bitla_$precision" \
        "task.init_from=$work/fp/checkpoints/checkpoint_last.pt" "$@"
}

all_at_once() {
    at_once "${#precisions[@]}" "$1" "${precisions[@]}"
    ((${#failed[@]} == 0)) || die "a training failed, see above"
}

speed_of() { quantized "$1" "$work/speed/$1" "${trial[@]}" >/dev/null; }

# All at once, as they will train; then each makes as many updates as the slowest can, however long
# that takes in the end: they are to be compared.
speed_of_quantized() {
    all_at_once speed_of
    local precision
    for precision in "${precisions[@]}"; do plan_updates "$precision" "$1"; done
    for precision in "${precisions[@]}"; do cat "$work/$precision.plan"; done |
        cut -d " " -f 1 | sort -t = -k 2 -n | head -n 1 >"$work/quantized.plan"
    log "every quantized recognizer: $(<"$work/quantized.plan")"
}

# shellcheck disable=SC2046 # settings, one a word
learn() { quantized "$1" "$work/$1" $(<"$work/quantized.plan"); }

compare() {
    local precision models=("FP=$work/fp/checkpoints/checkpoint_last.pt")
    for precision in "${precisions[@]}"; do
        models+=("${precision^^}=$work/$precision/checkpoints/checkpoint_last.pt")
    done
    OMP_NUM_THREADS="$cores" fairseq-lowbit wer "${models[@]}" --data "$data" --out "$work"
}

# What does not train takes, in units of the float trial: 3 the trial of the quantized ones, 1 each
# start of a training (theirs at once), 2 the comparison.
left="minutes * 60 - SECONDS"

log "recognition in $minutes minutes on $cores cores in $work; a rehearsal at toy scale"
stage corpus read_text
stage float_speed speed_of_float "($left - 7 * trial_seconds) * 6 / 10"
trial_seconds="$(<"$work/trial.seconds")"
stage float learn_float
stage quantized_speed speed_of_quantized "$left - 3 * trial_seconds"
stage quantized all_at_once learn
log "compare on held-out voices and sentences"
compare
log "took $((SECONDS / 60)) min $((SECONDS % 60)) s"
