# shellcheck shell=bash disable=SC2154 # variables of job.sh
# Sourced outside of jobs: hands a job script to sbatch with the settings of the site, or shows what would be submitted.

# submit SCRIPT NODES SBATCH_OPTIONS... -- ARGUMENTS... -> the number of the job
submit() {
    local script=$1 count=$2 name options=() told
    shift 2
    name=$(basename "$script" .sh)
    options=(--parsable --job-name="$name" --nodes="$count" --time="$TIME" --chdir="$REPOSITORY" --requeue --open-mode=append)
    [ -z "$PARTITION" ] || options+=(--partition="$PARTITION")
    [ -z "$ACCOUNT" ] || options+=(--account="$ACCOUNT")
    [ -z "$QOS" ] || options+=(--qos="$QOS")
    [ -z "$GPUS_PER_NODE" ] || options+=(--gpus-per-node="$GPUS_PER_NODE")
    options+=(--signal="B:USR1@$SIGNAL_SECONDS" --export=ALL "${SBATCH_MORE[@]}")
    local output=$LOGS/$name-%j.out
    while [ "$1" != -- ]; do
        case $1 in --array=*) check_array "${1#*=}" && output=$LOGS/$name-%A_%a.out ;; esac
        options+=("$1")
        shift
    done
    shift
    set -- sbatch "${options[@]}" --output="$output" "$SCRIPTS/$script" "$@"
    if [ -n "$DRY_RUN" ]; then
        printf '%q ' OPENFLM_SITE="$SITE" "$@" >&2
        printf '\n' >&2
        echo "<$name>"
        return
    fi
    mkdir -p "$LOGS" || fail "LOGS=$LOGS of $SITE cannot be made: a job without it leaves no log"
    if ! told=$(OPENFLM_SITE=$SITE outside_of_jobs "$@" 2>&1); then
        fail "sbatch refused $name: $(tail -n 1 <<<"$told" | sed 's/^sbatch: error: //'); mend $SITE, or what is given to sbatch"
    fi
    told=$(tail -n 1 <<<"$told")
    echo "${told%%;*}"
}

# outside_of_jobs COMMAND...: without the variables of a job that this shell may be in, which would bind the new one
outside_of_jobs() (
    if [ -n "${SLURM_JOB_ID:-}" ]; then
        for name in $(compgen -e | grep -E '^(SLURM|SBATCH|SRUN|PMI|PMIX|OMPI)_' | grep -v -x SLURM_CONF); do unset "$name"; done
        unset OPENFLM_ATTEMPT OPENFLM_END_TIME
    fi
    "$@"
)

# check_array FIRST-LAST: Slurm limits the index, whatever the number of tasks
check_array() {
    local limit last=${1##*-}
    limit=$(scontrol show config 2>/dev/null | awk '$1 == "MaxArraySize" { print $3 }')
    [ "${last%%%*}" -lt "${limit:-1001}" ] ||
        fail "an array up to $last: this cluster's MaxArraySize is $limit, so that indices end at $((limit - 1)); use fewer tasks at a time"
}

# show_ranks NODES COMMAND...: the environment of every rank, as far as it is known before Slurm has chosen nodes
show_ranks() {
    local gpus=${GPUS_PER_NODE:-} rank name
    layout "$1" "${gpus:-0}" "$(nproc)"
    shift
    export_environment
    [ -n "$RANKS_PER_NODE$gpus" ] || say "GPUS_PER_NODE and RANKS_PER_NODE are empty: one rank for each GPU that a node \
turns out to have; shown for one"
    [ -n "$CPUS_PER_RANK" ] || say "CPUS_PER_RANK is empty: a node's CPUs divided by its ranks; shown for a node like this"
    say "each of $((nodes * ranks)) ranks, $cpus CPUs each, runs: $(printf '%q ' "$@")"
    for ((rank = 0; rank < nodes * ranks; rank++)); do
        printf 'rank %s: SLURM_PROCID=%s SLURM_STEP_NUM_TASKS=%s SLURM_LOCALID=%s SLURM_NODEID=%s' \
            "$rank" "$rank" $((nodes * ranks)) $((rank % ranks)) $((rank / ranks))
        for name in "${ours[@]}"; do printf ' %s=%s' "$name" "${!name}"; done
        echo ' OPENFLM_END_TIME=(when Slurm ends the job)'
    done
}
