#!/usr/bin/env bash
# What the recipes share: options, stages that are skipped once done, jobs at a time, logs, and the
# environment. Source it; sets `repo`. Needs bash 4.4.
# shellcheck disable=SC2154 # what the recipe sets, such as `work`

repo="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# fairseq and Hydra announce deprecations of their own at every start.
export PYTHONWARNINGS="${PYTHONWARNINGS:-ignore::UserWarning,ignore::FutureWarning}"

log() { printf '[%(%H:%M:%S)T] %s\n' -1 "$*"; }
die() { printf 'error: %s\n' "$*" >&2; exit 2; }

# options "NAME..." ARGUMENTS...: --NAME VALUE sets the variable NAME, in which - becomes _. A NAME!
# in the list is a switch: without a value, it sets its variable to yes. --help prints the comment
# at the head of the recipe.
options() {
    local known=" $1 " name variable
    shift
    while (($#)); do
        if [[ "$1" == -h || "$1" == --help ]]; then
            sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0"
            exit 0
        fi
        [[ "$1" == --* ]] || die "unknown option $1; see --help"
        name="${1#--}" variable="${1#--}"
        variable="${variable//-/_}"
        if [[ "$known" == *" $name! "* ]]; then
            declare -g "$variable=yes"
            shift
        else
            [[ "$known" == *" $name "* ]] || die "unknown option $1; see --help"
            (($# > 1)) || die "$1 needs a value"
            declare -g "$variable=$2"
            shift 2
        fi
    done
}

absolute() { if [[ "$1" == /* ]]; then echo "$1"; else echo "$PWD/$1"; fi; }

# one_of OPTION VALUE ALLOWED...
one_of() {
    local option="$1" value="$2" allowed
    shift 2
    for allowed in "$@"; do [[ "$value" != "$allowed" ]] || return 0; done
    die "$option $value: choose one of $*"
}

# whole_number OPTION VALUE LEAST
whole_number() {
    if [[ ! "$2" =~ ^(0|[1-9][0-9]{0,8})$ ]] || (($2 < $3)); then
        die "$1 $2: give a whole number from $3"
    fi
}

# need_space FOLDER GIGABYTES WHAT: refuses a disk that will not hold WHAT. FOLDER may not be there
# yet.
need_space() {
    local folder="$1" free
    while [[ ! -d "$folder" ]]; do folder="$(dirname "$folder")"; done
    free="$(($(df -Pk "$folder" | awk 'NR == 2 { print $4 }') / 1000000))"
    ((free >= $2)) || die "$1 has $free GB free; $3 need about $2 GB"
}

# stage NAME COMMAND...: runs the command unless $work/NAME.done exists.
stage() {
    local name="$1"
    shift
    if [[ -f "$work/$name.done" ]]; then
        log "$name: done before"
        return
    fi
    log "$name"
    "$@"
    touch "$work/$name.done"
}

# at_once COUNT COMMAND NAME...: COMMAND NAME for every name, COUNT at a time. One that fails stops
# no other; `failed` holds the names of those that did. Interrupted, all end.
at_once() {
    local count="$1" command="$2" name pid
    local -A started=()
    shift 2
    failed=()
    set -m # each job a process group of its own, which can be ended as a whole
    trap end_jobs INT TERM
    for name in "$@"; do
        while (($(jobs -rp | wc -l) >= count)); do wait -n || true; done
        "$command" "$name" &
        started[$!]="$name"
    done
    for pid in "${!started[@]}"; do wait "$pid" || failed+=("${started[$pid]}"); done
    trap - INT TERM
    set +m
}

end_jobs() {
    local pid
    for pid in $(jobs -p); do kill -TERM -- "-$pid" 2>/dev/null || true; done
    exit 130
}

# train LABEL LOG RUN ARGUMENTS...: fairseq-hydra-train into the folder RUN, with its whole output in
# LOG; warnings, errors and its progress, marked with LABEL, on the screen. In a dry run it is only
# shown.
train() {
    local label="$1" log_file="$2" run="$3"
    shift 3
    if [[ -n "${dry_run:-}" ]]; then
        show_command fairseq-hydra-train "$@" "hydra.run.dir=$run"
        return
    fi
    fairseq-hydra-train "$@" "hydra.run.dir=$run" 2>&1 |
        python "$repo/recipes/progress.py" show "$label" "$log_file" "$run" || {
        tail -n 5 "$log_file" | cut -c1-300 >&2
        die "training '$label' failed; its log is $log_file"
    }
}

# choose_precision NAME: sets `settings`, the arguments of fairseq-hydra-train for it.
choose_precision() {
    settings=(--config-name "$1")
    # Of a precision without a file of its own, everything but the name is any other's.
    [[ -f "$repo/config/$1.yaml" ]] ||
        settings=(--config-name bitla_w1a1 "model.precision.name=$1")
}

# ---- Recipes in numbered stages -----------------------------------------------------------------
#
# Such a recipe adds its stages in order, then runs those from $stage to $stop_stage:
#
#     work="" nj=1 stage=0 stop_stage=1 dry_run=""
#     options "work nj stage stop-stage dry-run!" "$@"
#     no_settings=(nj)
#     labels() { step fairseq-lowbit labels "$work/data" --workers "$nj"; }
#     add_stage 1 labels "k-means labels" labels
#     run_stages
#
# A stage is a function that does everything by `step` and `train "..." "$stage_log"`, so that a dry
# run can show its commands without running them. These commands are also the settings of the stage:
# $work/stamps keeps them, as NUMBER_NAME.begun and, once it has ended well, NUMBER_NAME.done. A
# number may have several stages. Variables named in `no_settings` only say how a stage is run, and
# may change between two starts.

no_settings=() stage_log=""
stage_numbers=() stage_ids=() stage_titles=() stage_commands=()
declare -A is_light=()

# add_stage NUMBER NAME TITLE COMMAND...: words of COMMAND hold no spaces. Numbers do not fall.
add_stage() {
    stage_numbers+=("$1") stage_ids+=("$1_$2") stage_titles+=("$3")
    shift 3
    stage_commands+=("$*")
}

# add_light_stage: the same for one that takes little time and that nothing is trained from: it is
# run again where others are refused, because its settings or what it is made from have changed.
add_light_stage() {
    add_stage "$@"
    is_light[$1_$2]=yes
}

# step COMMAND...: runs it, its output on the screen and in the stage's log. In a dry run it is only
# shown.
step() {
    if [[ -n "${dry_run:-}" ]]; then
        show_command "$@"
        return
    fi
    # tee outlives Ctrl-C for the last words of the command.
    "$@" 2>&1 | tee -ia "$stage_log" || die "${*:1:2} failed; the log is $stage_log"
}

show_command() {
    local word line=""
    for word in "$@"; do
        [[ "$word" =~ ^[A-Za-z0-9_./:=,+@%-]+$ ]] || word="${word@Q}"
        line+=" $word"
    done
    printf '%s\n' "${line# }"
}

# Checks everything that can be checked before the first stage is run.
run_stages() {
    local index selected=()
    check_stage_range
    for index in "${!stage_ids[@]}"; do ! is_selected "$index" || selected+=("$index"); done
    ((${#selected[@]})) || die "--stage $stage --stop-stage $stop_stage: nothing to do there"
    if [[ -n "$dry_run" ]]; then
        for index in "${selected[@]}"; do show_stage "$index"; done
        return
    fi
    mkdir -p "$work/stamps" "$work/logs"
    lock_work
    for index in "${selected[@]}"; do check_stamps "$index"; done
    trap 'log "interrupted; the same command goes on where it stopped"; exit 130' INT
    for index in "${selected[@]}"; do run_stage "$index"; done
    trap - INT
}

is_selected() { ((stage_numbers[$1] >= stage && stage_numbers[$1] <= stop_stage)); }

check_stage_range() {
    local last="${stage_numbers[${#stage_numbers[@]} - 1]}"
    whole_number --stage "$stage" 0
    whole_number --stop-stage "$stop_stage" 0
    ((stage <= stop_stage)) || die "--stage $stage lies behind --stop-stage $stop_stage"
    ((stop_stage <= last)) || die "--stop-stage $stop_stage: the last stage is $last"
}

# Two starts at once would spoil each other. What they start inherits the lock: a training that
# outlives a killed recipe holds it too. Where there is no flock, it is up to the user.
lock_work() {
    command -v flock >/dev/null || return 0
    exec {lock_file}>"$work/stamps/lock"
    flock -n "$lock_file" ||
        die "$work is in use by another start of a recipe, or by what it left running"
}

show_stage() {
    local note=""
    [[ ! -f "$work/stamps/${stage_ids[$1]}.done" ]] || note=" (finished before)"
    printf '# stage %s: %s%s\n' "${stage_ids[$1]/_/ }" "${stage_titles[$1]}" "$note"
    ${stage_commands[$1]}
}

# settings_of INDEX: the commands of a stage, with what only says how it is run left open.
settings_of() (
    dry_run=yes
    for _name in "${no_settings[@]}"; do declare "$_name=<$_name>"; done
    ${stage_commands[$1]}
)

# A finished stage is refused if its settings have changed, or what it was made from is made again:
# its results would not belong to the others. A stage that was only begun may go on with other
# settings, such as a smaller batch.
check_stamps() {
    local id="${stage_ids[$1]}" stamp problem=""
    stamp="$work/stamps/$id"
    if [[ -f "$stamp.done" && -z "${is_light[$id]:-}" ]]; then
        problem="$(outdated_by "$1")"
        [[ -z "$problem" ]] ||
            die "stage ${id/_/ } was finished before $problem: $(way_out "$stamp")"
        problem="$(changed_settings "$stamp.done" "$1")"
        [[ -z "$problem" ]] ||
            die "stage ${id/_/ } was finished with other settings ($problem): $(way_out "$stamp")"
    elif [[ -f "$stamp.begun" ]]; then
        problem="$(changed_settings "$stamp.begun" "$1")"
        [[ -z "$problem" ]] || log "stage ${id/_/ } was begun with other settings: $problem"
    fi
}

way_out() {
    echo "take another --work, or remove $1.done, its results and those of the stages behind it"
}

# outdated_by INDEX: of the stages with lower numbers the first that will run, or that ran later. Of
# light ones only light ones are made.
outdated_by() {
    local other stamp="$work/stamps/${stage_ids[$1]}.done"
    for other in "${!stage_ids[@]}"; do
        ((stage_numbers[other] < stage_numbers[$1])) || return 0
        [[ -z "${is_light[${stage_ids[other]}]:-}" || -n "${is_light[${stage_ids[$1]}]:-}" ]] ||
            continue
        local before="$work/stamps/${stage_ids[other]}.done"
        if [[ "$before" -nt "$stamp" ]] || { [[ ! -f "$before" ]] && is_selected "$other"; }; then
            echo "stage ${stage_ids[other]/_/ }"
            return
        fi
    done
}

# changed_settings STAMP INDEX: the words that differ, "was A B, is C D"; nothing if none do.
changed_settings() {
    local changes
    changes="$(diff <(tr ' ' '\n' <"$1") <(settings_of "$2" | tr ' ' '\n'))" || true
    [[ -n "$changes" ]] || return 0
    printf 'was %s, is %s' "$(words_marked '<' "$changes")" "$(words_marked '>' "$changes")"
}

words_marked() { sed -n "s/^$1 //p" <<<"$2" | head -n 5 | paste -sd ' '; }

# run_stage INDEX
run_stage() {
    local id="${stage_ids[$1]}" begin="$SECONDS" stamp
    stamp="$work/stamps/$id"
    stage_log="$work/logs/$id.log"
    if is_finished "$1"; then
        log "stage ${id/_/ }: finished before"
        return
    fi
    log "stage ${id/_/ }: ${stage_titles[$1]}; log $stage_log"
    rm -f "$stamp.done"
    settings_of "$1" >"$stamp.begun"
    ${stage_commands[$1]}
    mv "$stamp.begun" "$stamp.done"
    log "stage ${id/_/ }: took $(duration $((SECONDS - begin)))$(next_stage "$1")"
}

is_finished() {
    local stamp="$work/stamps/${stage_ids[$1]}.done"
    [[ -f "$stamp" && -z "$(changed_settings "$stamp" "$1")" && -z "$(outdated_by "$1")" ]]
}

next_stage() {
    local next="$(($1 + 1))"
    if ((next < ${#stage_ids[@]} && stage_numbers[next] <= stop_stage)); then
        printf '; next: stage %s' "${stage_ids[next]/_/ }"
    fi
}

# duration SECONDS: 3 h 25 min, 4 min 7 s or 12 s.
duration() {
    if (($1 >= 3600)); then
        echo "$(($1 / 3600)) h $(($1 % 3600 / 60)) min"
    elif (($1 >= 60)); then
        echo "$(($1 / 60)) min $(($1 % 60)) s"
    else
        echo "$1 s"
    fi
}
