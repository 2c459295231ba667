#!/usr/bin/env bash
# Frozen-feature probes, as SUPERB has them, of any models, on what is always at hand.
#
#   bash recipes/probe.sh FP=teacher.pt W1A1=exp/w1a1/checkpoints/checkpoint_last.pt
#                                           on synthesized speech: phones, letters, words, speakers,
#                                           accents
#   --data DIR                              on this folder of fairseq-lowbit synthesize or prepare
#   --audio DIR                             on your recordings, each in a folder named by its label
#   --transcripts FILE                      for --audio: letters instead, lines of path<TAB>text
#   --tasks A,B                             not all of them
#   --work DIR                              where everything goes (default exp/probes)
#
# Rows of other models are added to a table that is there. Interrupted, the same command goes on
# where it stopped. docs/probes.md tells what the rows show.
set -euo pipefail
# shellcheck source=recipes/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

models=()
while (($#)) && [[ "$1" != -* ]]; do
    models+=("$1")
    shift
done
data="" audio="" transcripts="" tasks="" work=""
options "data audio transcripts tasks work" "$@"
: "${work:=$repo/exp/probes}"
((${#models[@]})) || die "name a model or more, before the options; see --help"
[[ -z "$data" || -z "$audio" ]] || die "--data and --audio exclude each other"
[[ -z "$transcripts" || -n "$audio" ]] || die "--transcripts needs --audio"
[[ -z "$tasks" || -z "$audio" ]] || die "--tasks belongs to --data, or to synthesized speech"

source "$repo/scripts/setup.sh"
mkdir -p "$work"
if [[ -n "$audio" ]]; then
    on=(--audio "$audio" ${transcripts:+--transcripts "$transcripts"})
else
    [[ -n "$data" ]] || stage corpus fairseq-lowbit synthesize "$work/data"
    on=(--data "${data:-$work/data}" ${tasks:+--tasks "$tasks"})
fi
fairseq-lowbit probe "${models[@]}" "${on[@]}" --out "$work"
