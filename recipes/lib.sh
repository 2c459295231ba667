#!/usr/bin/env bash
# What the recipes share: stages that are skipped once done, logs, and the environment.
# Source it; expects nothing, sets `repo`, and leaves the environment active.

repo="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# fairseq and Hydra announce deprecations of their own at every start.
export PYTHONWARNINGS="${PYTHONWARNINGS:-ignore::UserWarning,ignore::FutureWarning}"

log() { printf '[%(%H:%M:%S)T] %s\n' -1 "$*"; }
die() { printf 'error: %s\n' "$*" >&2; exit 2; }

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

# train LABEL LOG ARGUMENTS...: fairseq-hydra-train with its whole output in LOG and its progress,
# marked with LABEL, on the screen.
train() {
    local label="$1" log_file="$2"
    shift 2
    fairseq-hydra-train "$@" 2>&1 | tee -a "$log_file" |
        { grep --line-buffered -E 'train_inner|valid on|WARNING|ERROR|error' || true; } |
        sed -u -E -e "s/^\[([^]]*)\]\[([^]]*)\]\[[A-Z]*\] - /  $label: /" -e 's/^(.{150}).*/\1/' || {
        tail -n 5 "$log_file" | cut -c1-300 >&2
        die "training '$label' failed; its log is $log_file"
    }
}
