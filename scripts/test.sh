#!/usr/bin/env bash
# Lint, format check and tests. Arguments go to pytest: bash scripts/test.sh -k quantizer -x
# What is too slow for every commit is left to scripts/test_full.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh

# One thread per worker: two workers with a thread pool each would fight for the cores.
export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
workers="$(python -c 'import os; print(min(2, os.cpu_count() or 1))')"

ruff check .
ruff format --check .
# loadfile: tests of one file share what it builds once, such as the wheel. In the order they are
# collected, because xdist would leave the files of few but long tests to the end, for one worker.
exec python -m pytest -q -n "$workers" --dist loadfile --no-loadscope-reorder "$@"
