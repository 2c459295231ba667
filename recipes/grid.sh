#!/usr/bin/env bash
# The paper's grid at toy scale, and what goes beyond it: students of one teacher with equally many
# updates, and the teacher quantized without training, in one table with the paper's word error rates
# beside them for orientation.
#
#   bash recipes/grid.sh                    an hour after installation, on 2 CPU cores
#   bash recipes/grid.sh --minutes 180      longer training, better models
#   bash recipes/grid.sh --work DIR         where everything goes (default exp/grid_<minutes>min)
#   bash recipes/grid.sh --teacher CHECKPOINT --data DIR
#                                           a teacher and its data that are there already, such as
#                                           demo.sh's: all the time is the students'
#   bash recipes/grid.sh --rows "bitla_w1a1 bitla_w1a1_hubert" --seeds 3
#                                           some of the rows, each trained with seeds 1, 2 and 3
#   bash recipes/grid.sh --updates 100000 --run gpu8 --set "model=as_teacher" --teacher ... --data ...
#                                           not at toy scale: the same rows by any of config/run, of
#                                           so many updates, and with any settings of
#                                           fairseq-hydra-train for each
#   bash recipes/grid.sh --nj N             N trainings at once (default: one on every core, and of
#                                           another --run one)
#
# Interrupted, the same command goes on where it stopped. A row that failed is tried again; the
# others and the table do not wait for it. More rows and seeds may be asked for at any time: they make
# as many updates as those that are there.
set -euo pipefail
# shellcheck source=recipes/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

# Each stage's student is the teacher of the next.
previous="task.stages.1.teacher=previous task.stages.2.teacher=previous task.stages.3.teacher=previous"
# name, number of stages (0: calibrated, not trained), configuration and overrides
all_rows=(
    # no training: ranges as they are, learned scales as calibrated
    "ptq_absmax_w8a8             0  absmax_w8a8"
    "ptq_minmax_w8a8             0  minmax_w8a8"
    "ptq_bitl_w8a8               0  bitl_w8a8"
    "ptq_absmax_w4a4             0  absmax_w4a4"
    "ptq_minmax_w4a4             0  minmax_w4a4"
    "ptq_bitl_w4a4               0  bitl_w4a4"
    "ptq_bitl_w4a4_paper         0  bitl_w4a4   form=paper"
    "ptq_absmax_w2a8             0  absmax_w2a8"
    "ptq_minmax_w2a8             0  minmax_w2a8"
    "ptq_bitl_w2a8               0  bitl_w2a8"
    "ptq_sqwq_w2                 0  sqwq_w2"
    "ptq_bitl_w2a2               0  bitl_w2a2"
    "ptq_bitl_w2a2_paper         0  bitl_w2a2   form=paper"
    "ptq_bitla_w2a2              0  bitla_w2a2"
    "ptq_bitla_w1a1              0  bitla_w1a1"
    "ptq_bitla_w1a1_paper        0  bitla_w1a1  form=paper"
    # weights alone; linears; linears and attention
    "sqwq_w8                     1  sqwq_w8     model.precision.squash_std=0.84"
    "sqwq_w4                     1  sqwq_w4     model.precision.squash_std=0.84"
    "sqwq_w2                     1  sqwq_w2"
    "sqwq_w1                     1  sqwq_w1"
    "sqwq_w8_std_0.3             1  sqwq_w8     model.precision.squash_std=0.3"
    "sqwq_w4_std_0.5             1  sqwq_w4     model.precision.squash_std=0.5"
    "bitl_w8a8                   1  bitl_w8a8"
    "bitl_w4a4                   1  bitl_w4a4"
    "bitl_w2a2                   1  bitl_w2a2"
    "bitl_w1a2                   1  bitl_w1a2"
    "bitl_w1a1                   1  bitl_w1a1"
    "bitla_w8a8                  1  bitla_w8a8"
    "bitla_w4a4                  1  bitla_w4a4"
    "bitla_w2a2                  1  bitla_w2a2"
    "bitla_w1a2                  1  bitla_w1a2"
    "bitla_w1a1                  1  bitla_w1a1"
    # as the paper has them; at one bit that is one scale of probabilities for every length
    "bitl_w8a8_paper             1  bitl_w8a8   form=paper"
    "bitl_w4a4_paper             1  bitl_w4a4   form=paper"
    "bitl_w2a2_paper             1  bitl_w2a2   form=paper"
    "bitla_w1a1_paper            1  bitla_w1a1  form=paper"
    # the HuBERT loss instead of distillation
    "sqwq_w2_hubert              1  sqwq_w2     loss=demo_hubert"
    "bitl_w1a1_hubert            1  bitl_w1a1   loss=demo_hubert"
    "bitla_w2a2_hubert           1  bitla_w2a2  loss=demo_hubert"
    "bitla_w1a1_hubert           1  bitla_w1a1  loss=demo_hubert"
    # in stages, with as many updates in all
    "bitla_w1a1_in_2_stages      2  bitla_w1a1  schedule=w1a2_w1a1"
    "bitla_w1a1_in_4_stages      4  bitla_w1a1  schedule=w8a8_w4a4_w2a2_w1a1"
    "bitla_w1a1_of_previous      4  bitla_w1a1  schedule=w8a8_w4a4_w2a2_w1a1 $previous"
    # weight scales and levels, of which activations of 2 bits would show little
    "bitla_w1a1_per_channel      1  bitla_w1a1  rules=per_channel"
    "bitla_w1a1_per_group        1  bitla_w1a1  rules=per_group"
    "bitl_w2a8                   1  bitl_w2a2   model.precision.name=bitl_w2a8"
    "bitl_w2a8_per_channel       1  bitl_w2a2   model.precision.name=bitl_w2a8 rules=per_channel"
    "bitl_w2a8_per_group         1  bitl_w2a2   model.precision.name=bitl_w2a8 rules=per_group"
    "bitl_w2a8_stretched         1  bitl_w2a2   model.precision.name=bitl_w2a8 rules=stretched"
    # a scale per frame for the inputs of linears, and two bits for those of the feed-forward ones
    "bitl_w2a2_per_frame         1  bitl_w2a2   rules=per_frame"
    "bitla_w1a1_per_frame        1  bitla_w1a1  rules=per_frame"
    "bitla_w1a1_ffn_a2           1  bitla_w1a1  rules=ffn_inputs_a2"
    "bitla_w1a1_ffn_a2_per_frame 1  bitla_w1a1  rules=[ffn_inputs_a2,per_frame]"
    # what the paper leaves at 16 bits
    "bitla_w1a1_front_end_w8a8   1  bitla_w1a1  rules=front_end_w8a8"
    "bitla_w1a1_front_end_w4a4   1  bitla_w1a1  rules=front_end_w4a4"
)
# A usual row and a slow one, which tell the speed: what trains the front-end takes longer.
telling=(bitla_w1a1 bitla_w1a1_front_end_w4a4)

minutes=60 work="" teacher="" data="" audio="" rows="" seeds=1 updates="" run=demo_student set="" nj=""
options "minutes work teacher data rows seeds updates run set nj" "$@"
student_run="$run"
[[ -z "$teacher" || -f "$teacher" ]] || die "--teacher $teacher does not exist"
[[ -z "$data" || -f "$data/train.tsv" ]] || die "--data $data holds no train.tsv"
[[ -z "$teacher$data" || (-n "$teacher" && -n "$data") ]] ||
    die "--teacher and --data go together: the data is what the teacher was trained on"
[[ -z "$teacher" ]] || teacher="$(absolute "$teacher")" data="$(absolute "$data")"
whole_number --seeds "$seeds" 1
[[ -z "$nj" ]] || whole_number --nj "$nj" 1
if [[ -n "$updates" ]]; then
    whole_number --updates "$updates" 4
    ((updates % 4 == 0)) || die "--updates $updates: give a multiple of 4, as rows have up to 4 stages"
fi
if [[ "$student_run" != demo_student ]]; then
    [[ -f "$repo/config/run/$student_run.yaml" ]] || die "--run $student_run: config/run has no such file"
    [[ -n "$teacher" && -n "$updates" ]] || die "--run $student_run: give --updates, --teacher and --data"
fi
read -ra given <<<"$set"
is_given="${teacher:+yes}"

declare -A stages_of=() settings_of=()
known=() names=() trained=()
# choose SEED: adds the rows that were asked for. Calibration has one seed.
choose() {
    local row name stages settings
    for row in "${all_rows[@]}"; do
        read -r name stages settings <<<"$row"
        known+=("$name")
        [[ -z "$rows" || " $rows " == *" $name "* ]] || continue
        if (($1 > 1)); then
            ((stages > 0)) || continue
            name+="_seed$1" settings+=" common.seed=$1"
        fi
        # The settings of that loss for minutes of training are for this scale alone.
        [[ "$student_run" == demo_student ]] || settings="${settings/demo_hubert/hubert}"
        names+=("$name")
        stages_of[$name]="$stages" settings_of[$name]="$settings"
        ((stages == 0)) || trained+=("$name")
    done
}
for ((seed = 1; seed <= seeds; seed++)); do choose "$seed"; done
for name in $rows; do one_of --rows "$name" "${known[@]}"; done
((${#names[@]})) || die "--rows is empty"

: "${work:=$repo/exp/grid_${minutes}min}"
# shellcheck source=recipes/toy.sh
source "$repo/recipes/toy.sh"
# Models this small gain little from a second thread: one student on every core.
if [[ "$student_run" == demo_student ]]; then : "${nj:=$cores}"; else : "${nj:=1}"; fi

# keep FILE VALUE: refuses a start whose rows would not compare with those that are there.
keep() {
    [[ ! -f "$work/$1" || "$(<"$work/$1")" == "$2" ]] ||
        die "the rows in $work have $1 $(<"$work/$1"), not $2: take another --work"
    echo "$2" >"$work/$1"
}

# grow NAME RUN OVERRIDES...: trains the student of a row in the folder RUN.
grow() {
    local name="$1" run="$2" settings
    shift 2
    read -ra settings <<<"${settings_of[$name]}"
    OMP_NUM_THREADS=1 student "$name" "${settings[0]}" "$run" "${settings[@]:1}" "$@" "${given[@]}"
}

speed_of() { grow "$1" "$work/speed/$1" "${trial[@]}" >/dev/null; }

# Writes how many updates every row makes, a multiple of what the stages divide by.
plan_rows() {
    local name rates=() timed=()
    for name in "${telling[@]}"; do [[ -z "${stages_of[$name]:-}" ]] || timed+=("$name"); done
    ((${#timed[@]})) || timed=("${trained[0]}")
    at_once "$nj" speed_of "${timed[@]}"
    ((${#failed[@]} == 0)) || die "${failed[*]} failed, see above"
    for name in "${timed[@]}"; do rates+=("$(rate_of "$name")"); done
    python - "$((rows_seconds * nj / ${#trained[@]}))" "${rates[@]}" >"$work/updates" <<'PY'
import sys

seconds, *rates = map(float, sys.argv[1:])
print(max(24, int(seconds * len(rates) / sum(1 / rate for rate in rates)) // 12 * 12))
PY
    log "${rates[*]} updates a second (${timed[*]}): $(<"$work/updates") updates for every row"
}

train_row() {
    local updates="$(($(<"$work/updates") / ${stages_of[$1]}))"
    grow "$1" "$work/runs/$1" "optimization.max_update=$updates" \
        "lr_scheduler.warmup_updates=$((updates / 10 + 1))"
}

calibrate_row() {
    local setting settings overrides=()
    read -ra settings <<<"${settings_of[$1]}"
    for setting in "run=$student_run" "${settings[@]:1}" "${given[@]}"; do
        overrides+=(--override "$setting")
    done
    OMP_NUM_THREADS=1 fairseq-lowbit ptq "$teacher" --data "$data" "${overrides[@]}" \
        --precision "${settings[0]}" --out "$work/ptq/${1#ptq_}.pt" >"$work/$1.log" ||
        die "calibration failed; its log is $work/$1.log"
}

make_row() { if ((stages_of[$1])); then train_row "$1"; else calibrate_row "$1"; fi; }

finish_row() { stage "row_$1" make_row "$1"; }

# What does not train, in seconds: corpus, labels and measuring speed; of every row and every stage
# on one core start, calibration and validation, and the measurement, one after the other, which
# mostly trains probes.
models=0
for name in "${names[@]}"; do models="$((models + (stages_of[$name] ? stages_of[$name] : 1)))"; done
overhead="$((90 + models * 15 / nj + models * 25))"
training_seconds="$((minutes * 60 > overhead ? minutes * 60 - overhead : 0))"
teacher_seconds="$((training_seconds * 3 / 10))"
[[ -z "$is_given" ]] || teacher_seconds=0
rows_seconds="$((training_seconds - teacher_seconds))"

log "${#names[@]} rows in $work, ${updates:+each of $updates updates, }$nj at once"
mkdir -p "$work/ptq" "$work/runs"
keep settings "$teacher run=$student_run ${given[*]}"
[[ -n "$updates" ]] || log "it takes $minutes minutes; a rehearsal at toy scale"
[[ -n "$updates" ]] || ((training_seconds > 0)) ||
    log "that is too short: every row makes a few updates, and it takes longer"
[[ -n "$is_given" ]] || make_teacher "$teacher_seconds"
if [[ -n "$updates" ]]; then
    keep updates "$updates"
elif ((${#trained[@]})); then
    stage speed plan_rows
fi
at_once "$nj" finish_row "${names[@]}"
left_out=("${failed[@]}")

log "measure on held-out audio"
status=0
shopt -s nullglob
OMP_NUM_THREADS="$cores" fairseq-lowbit sweep-table "$work/runs" "$work"/ptq/*.pt --paper \
    --markdown "$work/grid.md" --csv "$work/grid.csv" || status=$?
log "took $((SECONDS / 60)) min $((SECONDS % 60)) s; the table is $work/grid.md and $work/grid.csv"
if ((${#left_out[@]})); then
    log "failed: ${left_out[*]}; the same command tries them again"
    status=1
fi
exit "$status"
