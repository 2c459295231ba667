#!/usr/bin/env bash
# LibriSpeech 960 h, from the archives to low-bit models and their exports, in stages:
#
#   0  check and unpack LibriSpeech
#   1  manifests
#   2  k-means labels of MFCC
#   3  FastConv HuBERT, iteration 1
#   4  k-means labels of its features
#   5  FastConv HuBERT, iteration 2: the float baseline; with --adapt, instead of stages 2 to 5,
#      HuBERT Base adapted to the FastConv front-end by distillation
#   6  quantization-aware training, for every precision by every schedule
#   7  profile
#   8  exports
#   9  SUPERB, for the tasks that --superb names
#
#   bash recipes/librispeech960.sh --data DIR --work DIR
#   bash recipes/librispeech960.sh --data DIR --work DIR --dry-run
#                              shows every command and runs none
#
#   --data DIR                 folder with train-clean-100.tar.gz ..., or with what they unpack to
#   --work DIR                 where everything goes (default exp/librispeech960_<size>)
#   --train "SUBSET..." --valid "SUBSET..." --test "SUBSET..."
#                              parts of LibriSpeech, for example --train train-clean-100
#   --stage N --stop-stage M   only these stages
#   --precisions "NAME..."     default "bitla_w2a2 bitla_w1a1"
#   --schedule NAME            one_step (default), w8a8_w4a4_w2a2_w1a1, w1a2_w1a1, or all: one_step
#                              and, for every precision, the schedules that end with it
#   --adapt SRC                a HuBERT checkpoint, Hugging Face folder or id for stage 5
#   --run gpu1|gpu8|slurm      what trains (default gpu1); the batch stays the same
#   --superb "TASK..."         pr and asr, which need no other corpus than this one; others by
#                              recipes/superb.sh (default none: they train for 100,000 updates and more)
#   --lexicon FILE|espeak      for pr: a word and its phones to a line; espeak makes it, for
#                              speech that it synthesized
#   --nj N                     processes for labels (default: every core)
#   --size base|tiny           tiny rehearses all stages in minutes on two CPU cores
#
# Interrupted, the same command goes on where it stopped. A finished stage is not run again.
set -euo pipefail
# shellcheck source=recipes/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

# What is marked HuBERT is how HuBERT Base was trained: Hsu et al., arXiv 2106.07447, section IV,
# and fairseq's configuration hubert_base_librispeech. What does not change between the stages
# stands in config/base. What is marked untuned is a starting point.

# Stages 0 and 1. Losses are watched on valid; test is for reports.
train="train-clean-100 train-clean-360 train-other-500" # HuBERT
valid="dev-clean dev-other"
test="test-clean test-other"

# Stages 2 and 4.
clusters1=100      # HuBERT
clusters2=500      # HuBERT
layer=6            # whose output stage 4 clusters: HuBERT
fit_seconds=345600 # of training audio that k-means is fitted on: 10 %, HuBERT in stage 4
shards=64          # of the labels of each split, each made as a whole or not at all

# Stages 3 and 5.
pretraining_updates1=250000 # HuBERT, of 32 x 87.5 s of audio
pretraining_updates2=400000 # HuBERT
pretraining_warmup=8        # % of the updates: HuBERT
pretraining_lr=0.0005       # HuBERT
pretraining_least=32000     # samples of the shortest utterance that is used: HuBERT

# Stage 5 with --adapt, untuned.
adaptation_updates=100000
adaptation_warmup=4 # % of the updates
adaptation_lr=0.0002

# Stage 6, untuned. A schedule has as many updates in all as one step.
qat_updates=100000
qat_warmup=4 # % of the updates of a step
qat_lr=0.0002

# Stage 8.
formats=(safetensors hf onnx)

data="" work="" stage=0 stop_stage=9 dry_run="" size=base run="" nj="" adapt="" superb="" lexicon=""
precisions="bitla_w2a2 bitla_w1a1" schedule=one_step
known="data work train valid test precisions schedule adapt run nj size superb lexicon"
options "$known stage stop-stage dry-run!" "$@"
# What says how a stage is run, and not what it makes.
no_settings=(run nj)

# --- What was asked for ---------------------------------------------------------------------------

# Enough to see every stage work. The rest is in config/run/demo*.yaml.
tiny_settings() {
    clusters1=20 clusters2=30 layer=2 fit_seconds=600 shards=3
    pretraining_updates1=40 pretraining_updates2=40 pretraining_lr=0.002 pretraining_least=4000
    adaptation_updates=40 adaptation_lr=0.001
    qat_updates=24 qat_lr=0.001
    tiny=(dataset.max_tokens=96000 dataset.validate_interval_updates=20
        checkpoint.save_interval_updates=10 common.log_interval=10)
}

check_options() {
    local name
    one_of --size "$size" base tiny
    [[ "$size" == base || -z "$run" ]] || die "--run $run: --size tiny runs on any machine as it is"
    one_of --run "${run:=gpu1}" gpu1 gpu8 slurm
    one_of --schedule "$schedule" one_step all "${schedules[@]}"
    whole_number --nj "${nj:=$(nproc)}" 1
    [[ -n "$data" ]] || die "--data DIR is missing: the folder with LibriSpeech's archives"
    [[ -d "$data" ]] || die "--data $data is not a folder"
    for name in $precisions; do
        [[ "$name" =~ ^[a-z]+_w[a-z0-9]+$ ]] || die "--precisions: $name is none; bitla_w2a2 is one"
    done
    [[ -n "${precisions// /}" ]] || die "--precisions is empty: name some, such as bitla_w2a2"
    for name in $superb; do one_of --superb "$name" pr asr; done
    [[ -z "$lexicon" || "$lexicon" == espeak || -f "$lexicon" ]] || die "--lexicon $lexicon does not exist"
    [[ -n "${valid// /}" ]] || die "--valid is empty: name what training is watched on"
}

# Fills students, each PRECISION_one_step or PRECISION_by_SCHEDULE, and what these are made of.
list_students() {
    local precision name
    for precision in $precisions; do
        case "$schedule" in
            one_step) add_student "$precision" one_step ;;
            all)
                add_student "$precision" one_step
                for name in "${schedules[@]}"; do
                    ! ends_with "$name" "$precision" || add_student "$precision" "$name"
                done
                ;;
            *)
                ends_with "$schedule" "$precision" || die "--schedule $schedule does not end with" \
                    "$precision: leave that out of --precisions, or take --schedule all"
                add_student "$precision" "$schedule"
                ;;
        esac
    done
}

# A schedule is named by the bits of its stages.
ends_with() { [[ "$2" == *_"${1##*_}" ]]; }

add_student() {
    local name="$1_by_$2"
    [[ "$2" != one_step ]] || name="$1_one_step"
    [[ -z "${precision_of[$name]:-}" ]] || die "--precisions names $1 twice"
    students+=("$name")
    precision_of[$name]="$1" schedule_of[$name]="$2"
}

# What only the package can tell, before anything is run.
check_models() {
    local precision
    if ((stage <= 6 && stop_stage >= 6)); then
        for precision in $precisions; do
            fairseq-lowbit plan "$precision" "run=$(run_or demo_student)" >/dev/null ||
                die "--precisions: $precision is none, see above"
        done
    fi
    if [[ -n "$adapt" ]] && ((stage <= 5 && stop_stage >= 5)); then
        python "$repo/recipes/librispeech_check.py" teacher "$adapt" "$(run_or demo)" ||
            die "--adapt $adapt cannot be taken, see above"
    fi
    if ((stage <= 8 && stop_stage >= 8)); then
        python "$repo/recipes/librispeech_check.py" formats "${formats[@]}" ||
            die "install it, leave the export out of formats at the top, or --stop-stage 7"
    fi
    if [[ -n "$superb" ]] && ((stop_stage >= 9)); then
        python -c 'import fairseq_lowbit.interop.s3prl' 2>/dev/null ||
            die "--superb needs s3prl: see docs/superb.md, or leave it out"
        [[ " $superb " != *" pr "* || -n "$lexicon" || -n "${S3PRL_ROOT:-}" ]] ||
            die "--superb pr needs the phones of words: --lexicon FILE, or S3PRL_ROOT"
    fi
    ((stage <= 5)) || [[ -f "$teacher" ]] ||
        die "--stage $stage needs $teacher, which stage 5 makes"
}

# A run keeps three checkpoints, each of weights and two moments, and writes a fourth before it
# removes one. Stage 0 looks after the corpus.
check_space() {
    local name runs=0 each=5
    [[ "$size" == base ]] || each=0
    for name in "${trainings[@]}"; do
        [[ -e "$work/$name" ]] || runs=$((runs + $(steps_of "${schedule_of[$name]:-one_step}")))
    done
    need_space "$work" $((runs * each + 1)) "$runs trainings and their exports"
}

# steps_of SCHEDULE: how many stages of its own a training has.
steps_of() {
    if [[ "$1" == one_step ]]; then
        echo 1
    else
        grep -c '^ *- {precision:' "$configs/schedule/$1.yaml"
    fi
}

# --- The stages -----------------------------------------------------------------------------------

unpack() { step fairseq-lowbit librispeech "$data" "$corpus" "${subsets[@]}" --unpack-only; }

manifests() { step fairseq-lowbit librispeech "$data" "$corpus" "${subsets[@]}"; }

# labels NAME CLUSTERS ARGUMENTS...
labels() {
    local name="$1" clusters="$2"
    shift 2
    step fairseq-lowbit labels "$corpus" --splits "${splits[@]}" --name "$name" \
        --clusters "$clusters" --fit-seconds "$fit_seconds" "$@" --shards "$shards" --workers "$nj"
}

labels_of_mfcc() { labels "$labels1" "$clusters1"; }

labels_of_features() {
    labels "$labels2" "$clusters2" --model "$(checkpoint_in iteration1)" --layer "$layer"
}

# pretrain NAME LABELS UPDATES
pretrain() {
    set_length "$3" "$pretraining_warmup" "$pretraining_lr"
    train "$1" "$stage_log" "$work/$1" --config-name hubert_fastconv \
        "run=$(run_or demo_pretraining)" "task.data=$corpus" "task.labels=[$2]" \
        "task.min_sample_size=$pretraining_least" "${length[@]}"
}

adapt() {
    set_length "$adaptation_updates" "$adaptation_warmup" "$adaptation_lr"
    train adapted "$stage_log" "$work/adapted" --config-name fastconv_adaptation \
        "run=$(run_or demo)" "task.data=$corpus" "task.teacher=$adapt" "${length[@]}"
}

# quantize STUDENT
quantize() {
    local precision="${precision_of[$1]}" schedule="${schedule_of[$1]}" settings
    set_length "$((qat_updates / $(steps_of "$schedule")))" "$qat_warmup" "$qat_lr"
    choose_precision "$precision"
    [[ "$schedule" == one_step ]] || settings+=("schedule=$schedule")
    train "$1" "$stage_log" "$work/$1" "${settings[@]}" "run=$(run_or demo_student)" \
        "task.data=$corpus" "task.teacher=$teacher" task.normalize=as_teacher "${length[@]}"
}

# set_length UPDATES WARMUP LR: sets `length`, overrides; WARMUP in % of the updates.
set_length() {
    length=("optimization.max_update=$1" "lr_scheduler.warmup_updates=$(($1 * $2 / 100))"
        "optimization.lr=[$3]" "${tiny[@]}")
}

# run_or DEMO: --run, or at tiny size the group DEMO.
run_or() { if [[ "$size" == tiny ]]; then echo "$1"; else echo "$run"; fi; }

checkpoint_in() { echo "$work/$1/checkpoints/checkpoint_last.pt"; }

profile() {
    local name checkpoints=()
    for name in "$baseline" "${students[@]}"; do checkpoints+=("$(checkpoint_in "$name")"); done
    step fairseq-lowbit profile "${checkpoints[@]}"
}

# export_model NAME FORMAT
export_model() {
    local place="$work/exports/$1"
    [[ "$2" == hf ]] || place+=".$2"
    step fairseq-lowbit export "$(checkpoint_in "$1")" --to "$2" "$place"
}

superb() {
    local name task models=() command=(bash "$repo/recipes/superb.sh")
    for name in "$baseline" "${students[@]}"; do models+=("$name=$(checkpoint_in "$name")"); done
    command+=(--models "${models[*]}" --work "$work/superb")
    for task in ${superb:-asr}; do command+=("--data-$task" "$data"); done
    [[ -z "$lexicon" ]] || command+=(--lexicon "$lexicon")
    [[ "$size" == base ]] || command+=(--updates 20 --batch 4)
    if [[ -n "$superb" ]]; then
        step "${command[@]}"
    else
        step echo "--superb names no task; this runs one:"
        step echo "$(show_command "${command[@]}")"
    fi
}

# --- Go -------------------------------------------------------------------------------------------

configs="$repo/config"
mapfile -t schedules < <(basename -s .yaml "$configs"/schedule/w*.yaml)
declare -A precision_of=() schedule_of=()
students=() tiny=()
[[ "$size" != tiny ]] || tiny_settings
check_options
list_students

data="$(absolute "$data")" work="$(absolute "${work:-$repo/exp/librispeech960_$size}")"
[[ ! -e "$adapt" ]] || adapt="$(absolute "$adapt")"
[[ ! -f "$lexicon" ]] || lexicon="$(absolute "$lexicon")"
corpus="$work/data"
labels1="mfcc_km$clusters1" labels2="layer${layer}_km$clusters2"
if [[ -z "$adapt" ]]; then teachers=(iteration1 iteration2); else teachers=(adapted); fi
trainings=("${teachers[@]}" "${students[@]}")
baseline="${teachers[-1]}"
teacher="$(checkpoint_in "$baseline")"
read -ra subsets <<<"--train $train --valid $valid --test $test"
splits=(train valid)
[[ -z "${test// /}" ]] || splits+=(test)

add_stage 0 unpack "check and unpack LibriSpeech" unpack
add_stage 1 manifests "manifests" manifests
if [[ -z "$adapt" ]]; then
    add_stage 2 labels "$clusters1 k-means labels of MFCC" labels_of_mfcc
    add_stage 3 iteration1 "FastConv HuBERT, iteration 1" \
        pretrain iteration1 "$labels1" "$pretraining_updates1"
    add_stage 4 labels "$clusters2 k-means labels of layer $layer" labels_of_features
    add_stage 5 iteration2 "FastConv HuBERT, iteration 2" \
        pretrain iteration2 "$labels2" "$pretraining_updates2"
else
    add_stage 5 adapted "$adapt with the FastConv front-end" adapt
fi
for name in "${students[@]}"; do
    add_stage 6 "$name" "quantization-aware training" quantize "$name"
done
add_light_stage 7 profile "what the models cost" profile
for format in "${formats[@]}"; do
    for name in "$baseline" "${students[@]}"; do
        add_light_stage 8 "${name}_$format" "export to $format" export_model "$name" "$format"
    done
done
add_light_stage 9 superb "SUPERB" superb

check_stage_range
if [[ -z "$dry_run" ]]; then
    source "$repo/scripts/setup.sh"
    # Threads that wait for each other sleep instead of taking a core.
    export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"
    ((stop_stage < 3)) || check_space
    check_models
fi
run_stages
