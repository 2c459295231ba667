#!/usr/bin/env bash
# What scripts/test.sh does, with the slow tests too: sweeps by every launcher, and runs of several
# processes. A missing optional package is a failure here; whatever else is skipped is listed.
# Arguments go to pytest.
exec bash "$(dirname "${BASH_SOURCE[0]}")/test.sh" --full -rs "$@"
