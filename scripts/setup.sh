#!/usr/bin/env bash
# Creates or refreshes .venv so that it holds requirements.txt; returns at once when it already does.
#
#   scripts/setup.sh --test-tools   only the programs that tests use where they are there (Slurm, munge, shellcheck, Chromium)
#   scripts/setup.sh            environment variables: PYTHON (interpreter to use), TORCH_INDEX (pip index for torch)
#
# Missing system packages are installed with apt where that needs no password; otherwise one line says which and how.
# An install that was interrupted is done again from an empty .venv; a .venv made by hand is kept and completed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PATH=${PATH//"$PWD/.venv/bin:"/} # never build .venv with its own interpreter

readonly VENV=.venv LOG=.cache/setup.log
readonly STAMP=$VENV/.openflm-installed UNFINISHED=$VENV/.openflm-installing
readonly MPICH=mpich==5.0.2

say() { printf 'setup: %s\n' "$*"; }
fail() { printf 'error: %s\n' "$*" >&2; exit 2; }

apt_install() { # apt_install PACKAGE... -> installed, or false where we may not
    command -v apt-get >/dev/null || return 1
    local sudo=()
    if [ "$(id -u)" -ne 0 ]; then
        command -v sudo >/dev/null && sudo -n true 2>/dev/null || return 1
        sudo=(sudo -n)
    fi
    say "installing system packages: $*"
    { "${sudo[@]}" apt-get update && "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive \
        apt-get install -y --no-install-recommends "$@"; } >>"$LOG" 2>&1
}

usable() { "$1" -c 'import sys; raise SystemExit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; }
find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.12 python3.11 python3.13}; do
        if command -v "$candidate" >/dev/null && usable "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
    return 1
}

ensure_python() { # sets python; an existing .venv keeps its own interpreter
    if [ -x $VENV/bin/python ] && usable $VENV/bin/python && [ ! -e $UNFINISHED ] && [ -z "${PYTHON:-}" ]; then
        python=$VENV/bin/python
        return
    fi
    if ! python=$(find_python); then
        [ -z "${PYTHON:-}" ] || fail "PYTHON=$PYTHON is not a Python 3.11, 3.12 or 3.13"
        apt_install python3 python3-venv || true
        find_python >/dev/null || apt_install python3.11 python3.11-venv || true
        python=$(find_python) || fail "Python 3.11, 3.12 or 3.13 is missing; install it with: sudo apt-get install python3.11 python3.11-venv"
    fi
    if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
        local package
        package=$("$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')
        { apt_install "$package" && "$python" -c 'import ensurepip, venv' 2>/dev/null; } ||
            fail "the venv module of $python is missing; install it with: sudo apt-get install $package"
    fi
}

ensure_compiler() { # only torch.compile, CPU offload and fused optimizers build code, so its absence is no error
    command -v c++ >/dev/null || command -v g++ >/dev/null || apt_install g++ ||
        say "no C++ compiler: torch.compile and DeepSpeed's fused operators will not work; install one with: sudo apt-get install g++"
}

ensure_room() { # before minutes of downloads that would end in pip's words
    local needed=3 free
    [ ! -e /dev/nvidiactl ] || needed=10
    free=$(df -Pk . | awk 'NR == 2 { print int($4 / 1048576) }')
    [ "${free:-$needed}" -ge $needed ] ||
        fail "$free GiB are free in $PWD, .venv takes about $needed; make room, or clone the repository onto a larger disk"
}

torch_index() { # on a machine without NVIDIA GPU, PyTorch's own index saves gigabytes of CUDA packages
    if [ -n "${TORCH_INDEX:-}" ]; then
        echo "$TORCH_INDEX"
    elif [ ! -e /dev/nvidiactl ] && [ ! -e /dev/dxg ]; then
        local index=https://download.pytorch.org/whl/cpu
        "$python" -c "import urllib.request as u; u.urlopen('$index/torch/', timeout=5)" 2>/dev/null && echo $index
    fi
    return 0
}

ensure_test_tools() { # tests that need them are skipped without, and say so
    local missing=()
    command -v shellcheck >/dev/null || missing+=(shellcheck)
    PATH=$PATH:/usr/sbin:/sbin command -v slurmctld >/dev/null || missing+=(slurm-wlm munge)
    [ ${#missing[@]} -eq 0 ] || RUNLEVEL=1 apt_install "${missing[@]}" || # 1: no daemon is started
        say "tests that need ${missing[*]} are skipped; install with: sudo apt-get install ${missing[*]}"
    command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null ||
        apt_install chromium || # on its own: not every distribution has it
        say "tests that need chromium are skipped; install with: sudo apt-get install chromium"
}

fingerprint() { { "$1" -V; cat requirements.txt; echo $MPICH; } | sha256sum | cut -d' ' -f1; }

pip_install() {
    if ! $VENV/bin/python -m pip install --disable-pip-version-check --progress-bar off "$@" >>"$LOG" 2>&1; then
        grep -E '^ *(ERROR|error):' "$LOG" | tail -n 5 >&2 || true
        fail "pip install failed; the whole output is in $LOG; run the same command again once the cause is gone"
    fi
}

mend_launchers() { # pip writes the interpreter's path bare into a package's scripts; a kernel splits it at a space
    local script first
    case $PWD in *[[:space:]]*) ;; *) [ ${#PWD} -gt 80 ] || return 0 ;; esac # and an older one cuts it at 127 bytes
    for script in "$VENV"/bin/*; do
        IFS= read -r first <"$script" 2>/dev/null || continue
        case $first in "#!$PWD/$VENV/bin/python"*) ;; *) continue ;; esac
        { # sh starts the interpreter, to which the same two lines are a text
            printf "#!/bin/sh\n'''exec' \"%s\" \"\$0\" \"\$@\"\n' '''\n" "${first#??}"
            tail -n +2 "$script"
        } >$VENV/mended && cat $VENV/mended >"$script" # its mode stays
    done
    rm -f $VENV/mended
}

{ mkdir -p .cache && : >>.cache/setup.lock; } 2>/dev/null ||
    fail "$(id -un) may not write in $PWD; clone the repository into a folder of your own"
exec 9>.cache/setup.lock
command -v flock >/dev/null && flock 9
if [ "${1:-}" = --test-tools ]; then
    ensure_test_tools
    exit 0
fi
if [ ! -e $UNFINISHED ] && [ -x $VENV/bin/python ] &&
    [ "$(cat $STAMP 2>/dev/null)" = "$(fingerprint "${PYTHON:-$VENV/bin/python}")" ]; then
    exit 0
fi

started=$SECONDS
: >"$LOG"
cache=${PIP_CACHE_DIR:-${XDG_CACHE_HOME:-${HOME:-/nonexistent}/.cache}/pip}
{ mkdir -p "$cache" && [ -w "$cache" ]; } 2>/dev/null || export PIP_NO_CACHE_DIR=1 # or it cannot build DeepSpeed's wheel
ensure_python
ensure_compiler
if [ "$python" != $VENV/bin/python ]; then
    ensure_room
    say "creating $VENV with $("$python" -V)"
    "$python" -m venv --clear $VENV >>"$LOG" 2>&1 || fail "python -m venv failed; the whole output is in $LOG"
fi
touch $UNFINISHED
rm -f $STAMP
say "installing requirements.txt into $VENV; a first install downloads about 1 GB (progress: tail -f $LOG)"
index=$(torch_index)
pip_install ${index:+--extra-index-url "$index"} -r requirements.txt
if ! $VENV/bin/python -c 'import mpi4py; mpi4py.rc.initialize = False; from mpi4py import MPI' 2>/dev/null; then
    say "no MPI library on this machine: installing $MPICH into $VENV"
    pip_install $MPICH
fi
mend_launchers
fingerprint $VENV/bin/python >$STAMP
rm -f $UNFINISHED
say "ready after $((SECONDS - started)) s"
