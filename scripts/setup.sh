#!/usr/bin/env bash
# Sets up what training and the tests need: torch, fairseq and this package, in a virtualenv.
#
#   source scripts/setup.sh    set up, and leave the environment active in this shell (bash)
#   bash scripts/setup.sh      set up only
#
# An active virtualenv or conda environment is used; without one, .venv is made in the repository.
# What is installed already stays: a torch of your own choice, a fairseq built from source.
# Once done, the next call takes no time, until setup.py, constraints.txt or Python changes.
#
#   PYTHON          the interpreter for .venv; else the first of python3.11, 3.12, 3.13, python3
#   LOWBIT_TORCH    what pip is told to install for torch: "-c constraints.txt torch".
#                   On Linux pip's default index holds a CUDA build of several GB. A CPU needs the
#                   small build from PyTorch's own CPU index: PIP_EXTRA_INDEX_URL is honoured, or
#                   LOWBIT_TORCH="-c constraints.txt torch --index-url <that index>".

if [[ "${BASH_SOURCE[0]}" != "$0" ]]; then
    # Sourced: a child does the work, so that neither `set -e` nor a failure leaks into this shell.
    bash "${BASH_SOURCE[0]}" || return
    if [[ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]]; then
        source "$(dirname "${BASH_SOURCE[0]}")/../.venv/bin/activate"
    fi
    return
fi

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { printf 'setup: %s\n' "$*" >&2; }
fail() { say "$*"; exit 1; }
recent() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }
# -P: a folder of that name in the repository is not an installed module.
has_module() { python -P -c "import importlib.util as u, sys; sys.exit(u.find_spec('$1') is None)"; }

find_python() {
    local candidate candidates="${PYTHON:-python3.11 python3.12 python3.13 python3}"
    for candidate in $candidates; do
        if recent "$candidate" && "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    fail "no Python 3.11 or newer that can make a virtualenv among: $candidates." \
        "Install one (on Debian and Ubuntu with python3-venv too), or name it: PYTHON=/path/to/python"
}

enter_environment() {
    if [[ -n "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]]; then
        recent python || fail "the active environment has no Python 3.11 or newer: deactivate it to" \
            "get a .venv, or activate another"
        return
    fi
    if [[ ! -f .venv/bin/activate ]]; then
        local interpreter
        interpreter="$(find_python)"
        say "making .venv with $interpreter"
        "$interpreter" -m venv .venv
    fi
    source .venv/bin/activate
}

# constraints.txt, with torch and what it requires as they are: no later step may swap the build,
# and a torch of another version may need other versions.
write_pins() {
    python -P - <<'PY'
import re
from importlib.metadata import PackageNotFoundError, requires, version


def normalized(requirement):
    name = re.match(r"[\w.-]+", requirement).group()
    return re.sub(r"[-_.]+", "-", name).lower()


kept = {"torch", *map(normalized, requires("torch") or ())}
for line in open("constraints.txt"):
    name = line.partition("==")[0]
    if "==" in line and normalized(name) in kept:
        try:
            line = f"{name}=={version(name)}\n"
        except PackageNotFoundError:
            pass
    print(line, end="")
PY
}

# What fairseq-fixed, s3prl and this package with its extras demo and dev require, except
#   fairseq-fixed   is there by now, perhaps under another distribution's name,
#   s3prl           is there by now, perhaps from its repository,
#   torchaudio      both work without it, and the build of pip's default index needs CUDA:
#                   beside a CPU torch it breaks `from transformers import HubertModel`.
write_requirements() {
    python -P - <<'PY'
from importlib.metadata import PackageNotFoundError, requires

left_out = ("fairseq-fixed", "s3prl", "torchaudio")


def print_requirements(distribution, extras):
    for requirement in requires(distribution):
        spec, _, marker = requirement.partition(";")
        wanted = "extra ==" not in marker or any(f'"{extra}"' in marker for extra in extras)
        if wanted and not spec.startswith(left_out):
            print(spec if "extra ==" in marker else requirement)


print_requirements("fairseq-lowbit", ("demo", "dev"))
for distribution in ("fairseq-fixed", "s3prl"):
    try:
        print_requirements(distribution, ())
    except PackageNotFoundError:  # one of another distribution: installed with what it needs
        pass
PY
}

# Earlier versions of this script let fairseq-fixed bring torchaudio. It goes if it does not load,
# this script has been here before, and nobody has asked pip for it by name (pip keeps a record).
# Any other torchaudio is its owner's: the doctor names one that does not load, and the way out.
remove_torchaudio_of_earlier_setup() {
    [[ -f "$stamp" ]] || return 0
    python -P - <<'PY' || return 0
import sys
from importlib.metadata import distributions

brought = [
    found
    for found in distributions(name="torchaudio")
    if (found.read_text("INSTALLER") or "").strip() == "pip"
    and found.read_text("REQUESTED") is None
]
sys.exit(not brought)
PY
    if ! python -P -c "import torchaudio" 2>/dev/null; then
        say "removing torchaudio, which an earlier set-up brought: it does not load, and fairseq" \
            "works without it"
        python -m pip --disable-pip-version-check uninstall --quiet --yes torchaudio
    fi
}

install_everything() {
    local scratch="$1"
    local pip=(python -m pip --disable-pip-version-check install)

    python -m pip --version >/dev/null 2>&1 || python -m ensurepip >/dev/null
    if ! has_module torch; then
        say "installing torch (a large download)"
        local torch
        read -ra torch <<<"${LOWBIT_TORCH:--c constraints.txt torch}"
        "${pip[@]}" "${torch[@]}"
    fi
    write_pins >"$scratch/pins.txt"
    pip+=(--quiet -c "$scratch/pins.txt")

    # --no-build-isolation: building in an environment of its own would download torch once more.
    "${pip[@]}" setuptools wheel
    if has_module fairseq; then
        say "keeping the fairseq that is there"
    else
        "${pip[@]}" numpy cython
        say "installing fairseq, built from source the first time (2 to 5 minutes)"
        "${pip[@]}" --no-build-isolation --no-deps fairseq-fixed || fail "fairseq-fixed did not" \
            "install: it needs a C++ compiler and Python's headers (on Debian and Ubuntu: g++" \
            "python3-dev)"
    fi

    if ! has_module s3prl; then
        "${pip[@]}" --no-build-isolation --no-deps s3prl
    fi

    say "installing fairseq-lowbit (editable) and what it needs"
    "${pip[@]}" --no-build-isolation --no-deps --editable .
    write_requirements >"$scratch/requirements.txt"
    # pip's own warning would name what is left out on purpose; what else does not fit, shows here.
    "${pip[@]}" --no-warn-conflicts -r "$scratch/requirements.txt"
    remove_torchaudio_of_earlier_setup
    local intended="fairseq-lowbit .* requires fairseq-fixed|.* requires torchaudio"
    python -m pip check | grep -Ev "^($intended|No broken requirements)" >&2 || true
}

enter_environment
stamp="${VIRTUAL_ENV:-${CONDA_PREFIX:-}}/.fairseq_lowbit_setup"
state="$(python -V) $PWD $(cat setup.py constraints.txt | cksum)"
if [[ ! -f "$stamp" || "$(<"$stamp")" != "$state" ]]; then
    say "into $(dirname "$stamp")"
    scratch="$(mktemp -d)"
    trap 'rm -rf "$scratch"' EXIT
    install_everything "$scratch"
    echo "$state" >"$stamp"
    say "done; 'fairseq-lowbit doctor' finds:"
    fairseq-lowbit doctor >&2 || true
fi
