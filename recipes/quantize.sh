#!/usr/bin/env bash
# The low-bit version of a model that you have: quantization-aware training of that model itself,
# with its own front-end, without labels and without pre-training. It ends with a comparison on
# held-out audio, exports and a report page.
#
#   0  the teacher, in this package's own file
#   1  data: manifests, unless DIR has them
#   2  trial: a few updates with the real batch
#   3  plan: what the training will take
#   4  training
#   5  the same precision by calibration alone, for comparison
#   6  evaluation on held-out audio
#   7  exports
#   8  report page
#
#   bash recipes/quantize.sh --teacher SRC --data DIR --precision bitla_w2a2
#
#   --teacher SRC              a checkpoint (.pt), a .safetensors of this package, a folder in the form
#                              of Hugging Face, or the id of such a model on its hub
#   --data DIR                 a folder with train.tsv, valid.tsv and test.tsv, or a folder of audio
#   --precision NAME           such as bitla_w2a2, bitl_w8a8, sqwq_w2
#   --updates N                length of the training (default 20000, untuned)
#   --minutes M                or as many updates as fit into M minutes
#   --batch-seconds S          audio in a batch of one process (default 87.5); less needs less memory
#                              and leaves an update as it is, 700 s
#   --run local|gpu1|gpu8|slurm   what trains (default gpu1, or local where there is no GPU)
#   --override "KEY=VALUE ..." more settings of the training, such as rules=front_end_w8a8
#   --work DIR                 where everything goes (default exp/quantize_<precision>)
#   --stage N --stop-stage M   only these stages; --stop-stage 3 shows the plan and stops
#   --dry-run                  show every command and run none
#
# Interrupted, the same command goes on where it stopped. A finished stage is not run again.
set -euo pipefail
# shellcheck source=recipes/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

# Untuned: starting points for a model of base size, as config/base/student.yaml has them.
default_updates=20000
warmup=4              # % of the updates
update_seconds=700    # of audio in an update
validations=20        # and checkpoints, over the whole training
trial_updates=6       # the first of which is not counted

teacher="" data="" precision="" updates="" minutes="" batch_seconds=87.5 run="" override=""
work="" stage=0 stop_stage=8 dry_run=""
options "teacher data precision updates minutes batch-seconds run override work stage stop-stage \
dry-run!" "$@"
no_settings=(run)

# --- What was asked for ---------------------------------------------------------------------------

check_options() {
    local split
    [[ -n "$teacher" ]] || die "--teacher SRC is missing; see --help"
    [[ -n "$data" ]] || die "--data DIR is missing; see --help"
    [[ -d "$data" ]] || die "--data $data is not a folder"
    [[ -n "$precision" ]] || die "--precision NAME is missing, such as bitla_w2a2; see --help"
    [[ "$precision" =~ ^[a-z]+_w[a-z0-9]+$ ]] || die "--precision $precision: bitla_w2a2 is one"
    [[ -z "$updates" || -z "$minutes" ]] || die "--updates and --minutes contradict each other"
    [[ -n "$minutes" ]] || whole_number --updates "${updates:=$default_updates}" 1
    [[ -z "$minutes" ]] || whole_number --minutes "$minutes" 1
    [[ "$batch_seconds" =~ ^[0-9]+(\.[0-9]+)?$ && "$batch_seconds" == *[1-9]* ]] || die "--batch-seconds $batch_seconds: give seconds"
    if [[ -z "$run" ]]; then
        if nvidia-smi -L >/dev/null 2>&1; then run=gpu1; else run=local; fi
    fi
    one_of --run "$run" local gpu1 gpu8 slurm
    if has_manifests; then
        for split in train valid test; do
            [[ -f "$data/$split.tsv" ]] || die "--data $data has manifests, but no $split.tsv"
            (($(wc -l <"$data/$split.tsv") > 1)) || die "--data: $data/$split.tsv lists no file"
        done
    fi
}

has_manifests() { compgen -G "$data/*.tsv" >/dev/null; }

# --- The stages -----------------------------------------------------------------------------------

import_teacher() { step fairseq-lowbit import-teacher "$source_model" "$teacher"; }

prepare() { step fairseq-lowbit prepare "$audio" "$data"; }

# train_student LABEL OVERRIDES...: trains in $work/LABEL.
train_student() {
    local label="$1" settings
    shift
    choose_precision "$precision"
    train "$label" "$stage_log" "$work/$label" "${settings[@]}" model=as_teacher "run=$run" \
        "task.data=$data" "task.teacher=$teacher" "task.seconds_per_update=$update_seconds" \
        "dataset.max_tokens=$(samples "$batch_seconds")" "${overrides[@]}" "$@"
}

samples() { awk -v seconds="$1" 'BEGIN { printf "%d", seconds * 16000 }'; }

trial() {
    (train_student trial "optimization.max_update=$trial_updates" common.log_interval=1 \
        checkpoint.no_save=true) || die "if memory was short, --batch-seconds with a smaller number helps"
}

plan() {
    local length=(--updates "$updates")
    [[ -z "$minutes" ]] || length=(--minutes "$minutes")
    step python "$repo/recipes/quantize_plan.py" "$work/trial" "$work/plan" "${length[@]}" \
        --warmup "$warmup" --validations "$validations"
}

learn() {
    local length
    # What the plan says is known once there is one; as settings, what it was made from.
    if [[ -n "$dry_run" ]]; then
        length=("optimization.max_update=${updates:-<$minutes minutes>}")
    else
        mapfile -t length <"$work/plan"
    fi
    train_student "$precision" "${length[@]}"
}

calibrate() {
    step fairseq-lowbit ptq "$teacher" --precision "$precision" --data "$data" --out "$work/ptq.pt"
}

evaluate() {
    step fairseq-lowbit evaluate "$teacher" --data "$data" --out "$work/evaluation" \
        --student "QAT $precision=$student" --student "PTQ $precision=$work/ptq.pt"
}

# export_model FORMAT
export_model() {
    local place="$work/export/$precision"
    [[ "$1" == hf ]] || place+=".$1"
    step fairseq-lowbit export "$student" --to "$1" "$place"
}

report() {
    step fairseq-lowbit report "$work/$precision" "$work/ptq.pt" --out "$work/report.html"
}

# --- Go -------------------------------------------------------------------------------------------

check_options
read -ra overrides <<<"$override"
work="$(absolute "${work:-$repo/exp/quantize_$precision}")"
source_model="$teacher" teacher="$work/teacher.safetensors"
[[ ! -e "$source_model" ]] || source_model="$(absolute "$source_model")"
audio="$(absolute "$data")" data="$work/data"
formats=(safetensors hf onnx)

add_stage 0 teacher "$source_model" import_teacher
if compgen -G "$audio/*.tsv" >/dev/null; then
    data="$audio"
else
    add_stage 1 data "manifests for $audio" prepare
fi
add_light_stage 2 trial "a few updates with the real batch" trial
add_light_stage 3 plan "what the training will take" plan
add_stage 4 training "QAT, $precision" learn
add_stage 5 ptq "$precision by calibration alone" calibrate
add_light_stage 6 evaluation "comparison on held-out audio" evaluate

if [[ -z "$dry_run" ]]; then
    source "$repo/scripts/setup.sh"
    # Threads that wait for each other sleep instead of taking a core.
    export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"
    mkdir -p "$work"
    # Once imported, the teacher is read from there: a hub may be out of reach.
    readable="$source_model"
    [[ ! -f "$teacher" ]] || readable="$teacher"
    python "$repo/recipes/quantize_outlook.py" "$readable" "$precision" "$work/formats" \
        "${overrides[@]}" || exit 2
    mapfile -t formats <"$work/formats"
fi
for format in "${formats[@]}"; do
    add_light_stage 7 "$format" "$format export" export_model "$format"
done
add_light_stage 8 report "report page" report
student="$work/$precision/checkpoints/checkpoint_last.pt"
run_stages
