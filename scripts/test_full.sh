#!/usr/bin/env bash
# What scripts/test.sh does, with the slow tests too: sweeps by every launcher, and runs of several
# processes. A missing optional package is a failure here; whatever else is skipped is listed.
# Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh

# The extra bench has a folder of its own: transformers would load torchao in every other test.
# Without what else they require, which is torch and there already.
libraries="$(python -c 'import sys; print(sys.prefix)')/fairseq_lowbit_bench"
[[ -d "$libraries/brevitas" && -d "$libraries/torchao" ]] ||
    python -m pip --disable-pip-version-check install --quiet --no-deps --upgrade \
        -c constraints.txt --target "$libraries" torchao brevitas dependencies unfoldNd

exec bash scripts/test.sh --full -rs "$@"
