#!/usr/bin/env bash
# Makes what the Makefile's targets need on a fresh machine, and nothing that is there already.
#
#   deploy/install.sh python            .venv, with torch, every pinned package, and this checkout, editable
#   deploy/install.sh debian NAME...    programs that tests and benchmarks start (postgres chromium promtool nginx)
set -euo pipefail
cd "$(dirname "$0")/.."

TORCH=torch==2.13.0
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_PROGRESS_BAR=off PIP_ROOT_USER_ACTION=ignore PIP_NO_INPUT=1

fail() { echo "install.sh: $*" >&2; exit 1; }

find_python() {
    local name
    for name in "${PYTHON:-python3}" python3.11; do
        if "$name" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then
            echo "$name"
            return
        fi
    done
    fail "neither ${PYTHON:-python3} ($(${PYTHON:-python3} --version 2>&1 || true)) nor python3.11 is Python 3.11;" \
        "install it, or name it: make PYTHON=/path/to/python3.11 ..."
}

install_python() {
    local python stamp=.venv/.installed
    python=$(find_python)
    rm -f "$stamp"
    if ! .venv/bin/python -c 'import sys, pip; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then
        rm -rf .venv # absent, half made, or of another Python
        "$python" -m venv .venv || fail "cannot make .venv; on Debian, install python3-venv"
    fi
    # Three installs at once, of disjoint packages: the lock has no torch, and none looks at dependencies.
    echo "install.sh: $TORCH and the packages of deploy/requirements.lock, some minutes"
    local jobs=() job part pip=(.venv/bin/pip install -qq --no-compile --no-deps)
    "${pip[@]}" "$TORCH" & jobs+=($!)
    for part in 0 1; do
        "${pip[@]}" -r <(awk -v part=$part '!/^#/ && NR % 2 == part' deploy/requirements.lock) & jobs+=($!)
    done
    for job in "${jobs[@]}"; do
        wait "$job" || fail "a package could not be installed, see above"
    done
    # Where the torch build brings CUDA libraries as dependencies, they come now; a CPU build asks for nothing more.
    .venv/bin/pip install -qq --no-compile "$TORCH"
    .venv/bin/pip install -qq --no-compile --no-deps --no-build-isolation -e .
    # Bytecode, on every core and only here: vLLM alone would spend 20 s more in each of its processes, and where the
    # environment forbids to write it, at every start. Left out: tests, and model families that nothing here loads.
    .venv/bin/python -m compileall -q -j 0 \
        -x 'site-packages/(.*/tests?/|transformers/models/(?!auto|llama)\w+/|anthropic/|pip/|nltk/)' \
        .venv/lib/python3.11/site-packages >/dev/null || true # some packages ship templates that are no Python
    touch "$stamp"
}

# A program, wherever Debian puts it: servers such as postgres lie outside PATH.
has_program() { command -v "$1" >/dev/null || compgen -G "/usr/lib/postgresql/*/bin/$1" >/dev/null || [ -x "/usr/sbin/$1" ]; }

install_debian() {
    local program packages=() policy=/usr/sbin/policy-rc.d
    for program in "$@"; do
        has_program "$program" && continue
        case $program in
            postgres) packages+=(postgresql) ;;
            promtool) packages+=(prometheus) ;;
            *) packages+=("$program") ;;
        esac
    done
    [ ${#packages[@]} -gt 0 ] || return 0
    command -v apt-get >/dev/null || fail "missing: ${packages[*]} (Debian's names); install them, then run this again"
    [ "$(id -u)" = 0 ] || fail "missing: ${packages[*]}; run: sudo apt-get install ${packages[*]}"
    # We want the programs, not Debian's services: the policy forbids the packages to start anything.
    if [ ! -e "$policy" ]; then
        printf '#!/bin/sh\nexit 101\n' >"$policy"
        chmod +x "$policy"
        trap 'rm -f '"$policy" EXIT
    fi
    echo "install.sh: Debian packages ${packages[*]}"
    export DEBIAN_FRONTEND=noninteractive
    local options=(-qq -o DPkg::Lock::Timeout=300 -o Dpkg::Use-Pty=0)
    apt-get "${options[@]}" update
    apt-get "${options[@]}" install -y --no-install-recommends "${packages[@]}" >/dev/null
}

case ${1:-} in
    python) install_python ;;
    debian) shift && install_debian "$@" ;;
    *) fail "expected 'python' or 'debian NAME...', got '${*:-nothing}'" ;;
esac
