#!/usr/bin/env bash
# The paper's figure of schedules: error over precision, for students that reach it in one step from
# the teacher and for those that reach it in stages, W8A8 > W4A4 > W2A2 > W1A1, each stage taught by
# the original teacher or by the stage before; the spread over seeds as bars.
#
#   bash recipes/schedule.sh                    an hour after installation, on 2 CPU cores
#   bash recipes/schedule.sh --minutes 180      longer training, better models
#   bash recipes/schedule.sh --seeds N          N seeds of everything (default 3)
#   bash recipes/schedule.sh --work DIR         where everything goes (default exp/schedule_<minutes>min)
#
# It trains by recipes/grid.sh, whose other options it takes too: --teacher and --data, and what a run
# that is not at toy scale needs, --updates, --run, --set and --nj. Every way makes as many updates in
# all down to W1A1: one step makes them at each precision, a schedule makes a quarter in each stage.
#
# Interrupted, the same command goes on where it stopped. What failed is tried again, and is a gap of
# the figure until then.
set -euo pipefail
# shellcheck source=recipes/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

rows="bitla_w8a8 bitla_w4a4 bitla_w2a2 bitla_w1a1 bitla_w1a1_in_4_stages bitla_w1a1_of_previous"
minutes=60 work=""
options "minutes seeds work teacher data updates run set nj" "$@"
: "${work:=$repo/exp/schedule_${minutes}min}"

status=0
bash "$repo/recipes/grid.sh" --seeds 3 "$@" --work "$work" --rows "$rows" || status=$?
# 1: some rows failed; the others can be drawn.
((status <= 1)) || exit "$status"
source "$repo/scripts/setup.sh"
fairseq-lowbit schedule-figure "$work/runs" --out "$work" || status=$?
exit "$status"
