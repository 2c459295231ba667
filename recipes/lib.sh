#!/usr/bin/env bash
# What the recipes share: options, stages that are skipped once done, jobs at a time, logs, and the
# environment. Source it; expects nothing and sets `repo`.

repo="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# fairseq and Hydra announce deprecations of their own at every start.
export PYTHONWARNINGS="${PYTHONWARNINGS:-ignore::UserWarning,ignore::FutureWarning}"

log() { printf '[%(%H:%M:%S)T] %s\n' -1 "$*"; }
die() { printf 'error: %s\n' "$*" >&2; exit 2; }

# options "NAME..." ARGUMENTS...: --NAME VALUE sets the variable NAME; --help prints the comment at
# the head of the recipe.
options() {
    local known=" $1 "
    shift
    while (($#)); do
        if [[ "$1" == -h || "$1" == --help ]]; then
            sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0"
            exit 0
        fi
        [[ "$1" == --* && "$known" == *" ${1#--} "* ]] || die "unknown option $1; see --help"
        (($# > 1)) || die "$1 needs a value"
        declare -g "${1#--}=$2"
        shift 2
    done
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
# LOG; warnings, errors and its progress, marked with LABEL, on the screen.
train() {
    local label="$1" log_file="$2" run="$3"
    shift 3
    fairseq-hydra-train "$@" "hydra.run.dir=$run" 2>&1 |
        python "$repo/recipes/progress.py" show "$label" "$log_file" "$run" || {
        tail -n 5 "$log_file" | cut -c1-300 >&2
        die "training '$label' failed; its log is $log_file"
    }
}
