#!/usr/bin/env bash
# One rank of a step: rank.sh STATE CPUS PROGRAM ARGUMENTS... The first one that fails leaves its exit code in STATE.first.
set -uo pipefail
trap : TERM INT USR1 # they are for the program, which decides when it ends; bash waits for it
state=$1 cpus=$2
shift 2
node=${SLURMD_NODENAME:-$(hostname)}
if ! command -v "$1" >/dev/null; then
    echo "unfit $node: no $1 there; mend PYTHON or CONTAINER of the site's settings, or the mount" | tee -a "$state.unfit" >&2
    sleep 3 # other nodes may have the same to say, before Slurm ends their ranks for this one
    exit 75
fi
usable=$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc)
if [ "${SLURM_LOCALID:-0}" = 0 ] && [ "$usable" -lt "$cpus" ]; then
    echo "slurm: $node: a rank may use $usable of its $cpus CPUs: it is bound to $(sed -n 's/^Cpus_allowed_list:\s*//p' /proc/self/status)" >&2
fi
"$@"
code=$?
[ "$code" = 0 ] || (set -o noclobber; echo "$code $node ${SLURM_PROCID:-0}" >"$state.first") 2>/dev/null
exit "$code"
