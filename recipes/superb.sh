#!/usr/bin/env bash
# SUPERB by s3prl: tasks on models, several at once, and their table. docs/superb.md says what each
# task needs.
#
#   bash recipes/superb.sh --models "fp=teacher.pt w1a1=exp/w1a1/checkpoints/checkpoint_last.pt" \
#       --data-asr DIR --data-ks DIR
#
#   --models "NAME=SOURCE..."  what to judge: checkpoints, exports, folders or ids of Hugging Face
#   --data-TASK DIR            its corpus, for each of pr asr ks qbe ic sf asv sd er sid
#   --tasks "TASK..."          default: every task whose corpus is named
#   --lr-TASK RATE             another learning rate than config/superb has
#   --lexicon FILE|espeak      for pr: a word and its phones to a line; espeak makes it, for
#                              speech that it synthesized
#   --work DIR                 where everything goes (default exp/superb)
#   --nj N                     tasks at once (default 1)
#   --workers N                processes of each task that read audio (default 4)
#   --device NAME              default: cuda where there is a GPU, else cpu
#   --slurm "ARGUMENTS"        every task by srun ARGUMENTS, for example "-p gpu --gres=gpu:1"
#   --updates N --batch N      fewer than SUPERB's, for a rehearsal: the table marks its figures
#   --dry-run                  shows every command and runs none
#
# Interrupted, the same command goes on where it stopped. A task that failed is tried again;
# finished ones stay finished, and no other task or the table waits for one that fails.
set -euo pipefail
# shellcheck source=recipes/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

all=(pr asr ks qbe ic sf asv sd er sid)
models="" tasks="" lexicon="" work="" nj=1 workers=4 device="" slurm="" updates="" batch="" dry_run=""
known="models tasks lexicon work nj workers device slurm updates batch dry-run!"
for task in "${all[@]}"; do
    known+=" data-$task lr-$task"
    declare "data_$task=" "lr_$task="
done
options "$known" "$@"

# --- What was asked for ---------------------------------------------------------------------------

check_options() {
    local task name data_name
    whole_number --nj "$nj" 1
    whole_number --workers "$workers" 0
    [[ -z "$updates" ]] || whole_number --updates "$updates" 1
    [[ -z "$batch" ]] || whole_number --batch "$batch" 1
    for task in $tasks; do one_of --tasks "$task" "${all[@]}"; done
    for task in "${all[@]}"; do
        data_name="data_$task"
        [[ -n "$tasks_given" || -z "${!data_name}" ]] || tasks+=" $task"
        [[ -z "${!data_name}" || -d "${!data_name}" ]] ||
            die "--data-$task ${!data_name} is not a folder"
    done
    [[ -n "${tasks// /}" ]] || die "no task has a corpus: name some, such as --data-asr DIR"
    for task in $tasks; do
        data_name="data_$task"
        [[ -n "${!data_name}" ]] || die "--tasks names $task: --data-$task DIR is missing"
    done
    [[ -n "${models// /}" ]] || die '--models "NAME=SOURCE..." is missing'
    for name in $models; do
        [[ "$name" =~ ^[A-Za-z0-9._-]+=.+$ ]] || die "--models $name: give NAME=SOURCE"
        [[ -z "${source_of[${name%%=*}]:-}" ]] || die "--models names ${name%%=*} twice"
        source_of[${name%%=*}]="${name#*=}"
        names+=("${name%%=*}")
    done
}

# --- A task on a model ----------------------------------------------------------------------------

# set_command JOB: sets `command` and `folder` for a job NAME/TASK.
set_command() {
    local name="${1%/*}" task="${1##*/}" data_name lr_name
    data_name="data_$task" lr_name="lr_$task" folder="$work/$1"
    command=(fairseq-lowbit superb "$task" "${source_of[$name]}" --name "$name")
    command+=(--data "${!data_name}" --out "$folder" --workers "$workers")
    [[ -z "${!lr_name}" ]] || command+=(--lr "${!lr_name}")
    [[ -z "$updates" || "$task" == qbe ]] || command+=(--updates "$updates")
    [[ -z "$batch" || "$task" == qbe ]] || command+=(--batch "$batch")
    [[ -z "$lexicon" || "$task" != pr ]] || command+=(--lexicon "$lexicon")
    [[ -z "$device" ]] || command+=(--device "$device")
    # One that is finished only reads its result, and need not wait for a place.
    # shellcheck disable=SC2206 # arguments, one a word
    [[ -z "$slurm" || -f "$folder/result.json" ]] || command=(srun $slurm "${command[@]}")
}

run_job() {
    local command folder
    set_command "$1"
    mkdir -p "$folder"
    log "$1: log $folder/screen.txt"
    if ! "${command[@]}" >>"$folder/screen.txt" 2>&1; then
        tail -n 1 "$folder/screen.txt" >&2
        die "$1 failed; its log is $folder/screen.txt"
    fi
    log "$1: $(tail -n 2 "$folder/screen.txt" | head -n 1)"
}

# --- Go -------------------------------------------------------------------------------------------

declare -A source_of=()
names=() jobs=() tasks_given="$tasks"
check_options
work="$(absolute "${work:-$repo/exp/superb}")"
for task in $tasks; do
    for name in "${names[@]}"; do jobs+=("$name/$task"); done
done
table=(fairseq-lowbit superb-table "$work" --csv "$work/superb.csv" --markdown "$work/superb.md")

if [[ -n "$dry_run" ]]; then
    for job in "${jobs[@]}"; do
        set_command "$job"
        show_command "${command[@]}"
    done
    show_command "${table[@]}"
    exit
fi
source "$repo/scripts/setup.sh"
mkdir -p "$work"
log "${#jobs[@]} tasks, $nj at once, in $work"
at_once "$nj" run_job "${jobs[@]}"
left_out=("${failed[@]}")
[[ -z "$(find "$work" -name result.json -print -quit)" ]] || "${table[@]}"
((${#left_out[@]} == 0)) || die "failed: ${left_out[*]}; the same command tries them again"
