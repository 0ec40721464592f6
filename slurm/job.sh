# shellcheck shell=bash
# Sourced by every job script: settings, the environment of the ranks, their start, signals, what follows from their end.

set -uo pipefail

say() { printf 'slurm: %s\n' "$*" >&2; }
fail() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

# absolute PATH -> one that is relative starts at the repository
absolute() { case $1 in /*) printf '%s' "$1" ;; *) printf '%s/%s' "$REPOSITORY" "$1" ;; esac; }

load_site() { # the settings, as absolute paths
    SITE=${OPENFLM_SITE:-$SCRIPTS/site.sh}
    [ -r "$SITE" ] || fail "OPENFLM_SITE=$SITE: no such file on $(hostname); name a copy of slurm/site.sh"
    # shellcheck source=slurm/site.sh
    source "$SITE" || fail "$SITE: not read to its end; see the line above"
    local name
    for name in PYTHON RUNS LOGS TASK_DATA DEEPSPEED; do
        [ -n "${!name:-}" ] || fail "$SITE: $name is empty; see slurm/site.sh for what it may be"
        printf -v "$name" '%s' "$(absolute "${!name}")"
    done
    for name in NODES GPUS_PER_NODE RANKS_PER_NODE CPUS_PER_RANK SIGNAL_SECONDS MAX_RESTARTS SAME_FAILURE; do
        [[ ${!name-} =~ ^[0-9]*$ ]] || fail "$SITE: $name=${!name} is no whole number"
    done
    [ "${#DATA[@]}" -gt 0 ] || fail "$SITE: DATA is empty; name the folders of prepared corpora"
    local folders=()
    for name in "${DATA[@]}"; do folders+=("$(absolute "$name")"); done
    DATA=("${folders[@]}")
    SITE=$(readlink -f "$SITE")
}

# value_of OPTION ARGUMENTS... -> the value of --OPTION VALUE or --OPTION=VALUE, of several the last
value_of() {
    local option=$1 found=
    shift
    while [ $# -gt 0 ]; do
        case $1 in
        "--$option") found=${2:-} ;;
        "--$option="*) found=${1#*=} ;;
        esac
        shift
    done
    printf '%s' "$found"
}

start() { # start ARGUMENTS...: settings; sets DRY_RUN and arguments
    DRY_RUN='' arguments=()
    local word
    for word in "$@"; do
        if [ "$word" = --dry-run ]; then DRY_RUN=yes; else arguments+=("$word"); fi
    done
    # shellcheck disable=SC2034 # of slurm/pretrain_evlgen.sh; a site's file may be older than it
    PRETRAIN_EVLGEN=()
    load_site
    # shellcheck source=slurm/submit.sh
    source "$SCRIPTS/submit.sh"
}

inside() { [ -n "${SLURM_JOB_ID:-}" ] && [ -z "$DRY_RUN" ]; } # an allocation: the work is done here

choose_tasks() { # sets tasks (the words before the first option, or TASKS) and options (what follows)
    tasks=() options=()
    local word
    for word in "${arguments[@]}"; do
        if [ ${#options[@]} = 0 ] && [[ $word != --* ]]; then tasks+=("$word"); else options+=("$word"); fi
    done
    [ ${#tasks[@]} -gt 0 ] || tasks=("${TASKS[@]}")
    [ ${#tasks[@]} -gt 0 ] || fail "$SITE: TASKS is empty; name recipes of tasks"
}

# train_command RECIPE OPTIONS...: sets command and RUN; an option that is given wins
train_command() {
    local recipe=$1 given
    shift
    given=$(value_of recipe "$@")
    recipe=${given:-$recipe}
    command=("$PYTHON" pipeline/train.py)
    [ -n "$(value_of deepspeed "$@")" ] || command+=(--deepspeed "$DEEPSPEED")
    [ -n "$given" ] || command+=(--recipe "$recipe")
    [ -n "$(value_of data "$@")" ] || command+=(--data "${DATA[@]}")
    RUN=$(value_of output "$@")
    [ -n "$RUN" ] || command+=(--output "${RUN:=$RUNS/$(basename "$recipe" .yaml)}")
    RUN=$(absolute "$RUN")
    command+=("$@")
}

# pretrain SCRIPT RECIPE OPTIONS...: trains within an allocation, else submits SCRIPT with the arguments it was given
pretrain() {
    local script=$1
    shift
    train_command "$@"
    if inside; then
        begin_job
        check_nodes --run "$RUN"
        run_step train "${command[@]}"
        finish "$RUN" $?
    fi
    submit "$script" "$NODES" -- "${arguments[@]}"
    [ -z "$DRY_RUN" ] || show_ranks "$NODES" "${command[@]}"
}

pretraining_run() { # the run that fine-tuning starts from
    local run recipe
    run=$(value_of output "${PRETRAIN[@]}")
    recipe=$(value_of recipe "${PRETRAIN[@]}")
    absolute "${run:-$RUNS/$(basename "${recipe:-flm_base_4m}" .yaml)}"
}

# smallest COUNTS -> the least number of a list that Slurm writes like 4(x2),3
smallest() { tr ',' '\n' <<<"$1" | sed 's/(x[0-9]*)//' | sort -n | head -n 1; }

# layout NODES GPUS CPUS: sets nodes, ranks (of a node) and cpus (of a rank) of the step, from what a node has
layout() {
    nodes=$1
    ranks=${RANKS_PER_NODE:-$2}
    [ "${ranks:-0}" -gt 0 ] || ranks=1
    cpus=${CPUS_PER_RANK:-$(($3 / ranks))}
    [ "$cpus" -gt 0 ] || cpus=1
}

export_environment() { # what every rank gets besides Slurm's own variables
    unset RANK WORLD_SIZE LOCAL_RANK LOCAL_SIZE LOCAL_WORLD_SIZE # of another launch; ranks read those of their step
    unset SLURM_CPUS_PER_TASK SRUN_CPUS_PER_TASK SLURM_TRES_PER_TASK # srun is told, and may be told once only
    unset SLURM_CPU_BIND SLURM_CPU_BIND_LIST SLURM_CPU_BIND_TYPE SLURM_CPU_BIND_VERBOSE SLURM_EXPORT_ENV
    local name
    for name in $(compgen -e | grep -E '^(PMI|PMIX|OMPI)_' || true); do unset "$name"; done
    ours=(OPENFLM_ATTEMPT PYTHONUNBUFFERED TORCH_EXTENSIONS_DIR TRITON_CACHE_DIR)
    local end caches
    caches=${SCRATCH:-${TMPDIR:-/tmp}}/openflm-$(id -u)-${job:-JOB} # compilers race on shared disks
    export OPENFLM_ATTEMPT=${SLURM_RESTART_COUNT:-0} PYTHONUNBUFFERED=1
    export TORCH_EXTENSIONS_DIR=$caches/torch TRITON_CACHE_DIR=$caches/triton
    if [ -n "${NETWORK_INTERFACE:-}" ]; then
        export GLOO_SOCKET_IFNAME=$NETWORK_INTERFACE NCCL_SOCKET_IFNAME=$NETWORK_INTERFACE
        ours+=(GLOO_SOCKET_IFNAME NCCL_SOCKET_IFNAME)
    fi
    unset OPENFLM_END_TIME
    if end=$(date -d "$(job_field EndTime)" +%s 2>/dev/null) && [ -n "${job:-}" ]; then # "Unknown" without a limit
        export OPENFLM_END_TIME=$end
        ours+=(OPENFLM_END_TIME)
    fi
}

# job_field NAME -> what Slurm knows of this job, nothing outside of one
job_field() {
    [ -z "${job:-}" ] || scontrol show job "$job" | tr ' ' '\n' | sed -n "s/^$1=//p" | head -n 1
}

begin_job() { # within an allocation: settings, environment, layout
    [ "${SLURM_HET_SIZE:-1}" = 1 ] || fail "a heterogeneous job of $SLURM_HET_SIZE components: its ranks are numbered by \
component; submit one component"
    cd "$REPOSITORY" || exit 2
    prepare_node
    mkdir -p "$RUNS" "$LOGS" || fail "RUNS or LOGS of $SITE cannot be made on $(hostname)"
    local have=${SLURM_GPUS_ON_NODE:-0}
    if [ "${GPUS_PER_NODE:-0}" -gt 0 ] && [ -n "${SLURM_GPUS_ON_NODE:-}${SLURM_PROCID:-}" ] && [ "$have" != "$GPUS_PER_NODE" ]; then
        fail "this job has $have GPUs a node, $SITE says GPUS_PER_NODE=$GPUS_PER_NODE; submit it with slurm/NAME.sh, or \
sbatch --gpus-per-node=$GPUS_PER_NODE"
    fi
    [ "$have" != 0 ] || have=${GPUS_PER_NODE:-0}
    layout "${SLURM_JOB_NUM_NODES:?}" "$have" "$(smallest "${SLURM_JOB_CPUS_PER_NODE:-1}")"
    job=$SLURM_JOB_ID
    [ -z "${SLURM_ARRAY_TASK_ID:-}" ] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID # a bare number means all tasks
    export_environment
    state=$LOGS/.job-$job-$OPENFLM_ATTEMPT
    rm -f "$state".*
    step='' signalled='' told=''
    trap 'forward USR1' USR1
    if [ -n "${OPENFLM_END_TIME:-}" ] && [ $((OPENFLM_END_TIME - $(date +%s))) -lt $((SIGNAL_SECONDS + 60)) ]; then
        trap '' USR1 # it would come at once, in every attempt anew
        say "the job's time is shorter than $SIGNAL_SECONDS s and a minute: without Slurm's signal, training saves in time by itself"
    fi
    trap 'forward TERM' TERM
    trap 'forward INT' INT
    say "job $job, attempt $OPENFLM_ATTEMPT: $nodes nodes ($SLURM_JOB_NODELIST) x $ranks ranks x $cpus CPUs"
}

forward() { # a signal reaches the ranks themselves, not srun, which would pass it to some of them only
    signalled=$1
    [ "$told" = USR1 ] || told=$1 # the one that comes before the time limit
    [ -z "$step" ] || scancel --signal="$1" "$step" 2>/dev/null || true
}

# run_step NAME COMMAND... -> the exit code of the rank that failed first, 0 if none did; takes $nodes, $ranks, $cpus
run_step() {
    local name=$1 code now
    shift
    rm -f "$state.first"
    srun --job-name="$name" --nodes="$nodes" --ntasks=$((nodes * ranks)) --ntasks-per-node="$ranks" \
        --cpus-per-task="$cpus" --export=ALL --mpi=none --kill-on-bad-exit=1 --wait=60 \
        "${CONTAINER[@]}" bash "$SCRIPTS/rank.sh" "$state" "$cpus" "$@" &
    local child=$!
    while [ -z "$step" ] && kill -0 "$child" 2>/dev/null; do # until Slurm has it, signals are kept
        step=$(squeue --steps --jobs="$SLURM_JOB_ID" --noheader --format='%i %j' | awk -v name="$name" '$2 == name { print $1 }')
        [ -n "$step" ] || sleep 0.2
    done
    [ -z "$signalled" ] || forward "$signalled"
    signalled=again code=0
    while [ -n "$signalled" ]; do # bash leaves wait for every signal that it traps
        signalled=
        wait "$child"
        now=$?
        [ "$now" = 127 ] || code=$now # 127: its code was taken before
    done
    step=
    if [ "$code" != 0 ] && [ -s "$state.first" ]; then read -r code _ <"$state.first"; fi
    return "$code"
}

unfit_nodes() { sed -n 's/^unfit \([^:]*\):.*/\1/p' "$state.unfit" 2>/dev/null | sort -u; }

# check_nodes OPTIONS...
check_nodes() { # ends the job, or starts it again without them, where nodes are unfit
    [ "${HEALTH:-yes}" = yes ] || return 0
    local code=0 ranks=1 cpus=1
    run_step health "$PYTHON" -m pipeline.health "$@" >"$state.health" || code=$?
    grep -v '^unfit ' "$state.health"
    grep '^unfit ' "$state.health" >>"$state.unfit"
    [ "$code" = 0 ] || finish '' "$code"
}

is_ended() { [ "$(job_field JobState)" != RUNNING ]; } # by Slurm, which waits for this script: COMPLETING

near_the_limit() { [ -n "${OPENFLM_END_TIME:-}" ] && [ "$(date +%s)" -gt $((OPENFLM_END_TIME - 90)) ]; }

# finish RUN CODE: ends the job, or starts it again; RUN is empty where what goes on is no training run
finish() {
    local run=$1 code=$2 verdict=0 unfit excluded
    unfit=$(unfit_nodes)
    if [ "$code" = 0 ]; then
        rm -f "$state".*
        exit 0
    elif [ -n "$unfit" ]; then # one node less each time: that comes to an end by itself
        sort -u "$state.unfit" >&2
        [ "$(wc -l <<<"$unfit")" -lt "$nodes" ] || fail "no node of the job is fit; mend what stands above"
        enough_without "$unfit" || fail "too few nodes of the partition are left without them; mend what stands above"
        requeue "$unfit"
    elif is_ended && [ "$(job_field Restarts)" = "$OPENFLM_ATTEMPT" ] && [ "$told" != USR1 ] && ! near_the_limit; then
        say "cancelled; submitted again, it goes on"
        exit "$code"
    elif [ -z "$run" ]; then
        # 128 + a signal: a program that does not listen to it was ended by it
        if [ -n "$told" ] || [ "$code" = 75 ]; then [ "$OPENFLM_ATTEMPT" -ge "$MAX_RESTARTS" ] || requeue ''; fi
        exit "$code"
    fi
    excluded=$("$PYTHON" -m pipeline.restart --run "$run" --job "$job" --attempt "$OPENFLM_ATTEMPT" --code "$code" \
        --nodes "$(scontrol show hostnames "$SLURM_JOB_NODELIST" | paste -s -d ' ')" \
        --max-restarts "$MAX_RESTARTS" --same-failure "$SAME_FAILURE") || verdict=$?
    [ "$verdict" = 0 ] || exit "$verdict"
    requeue "$(sed -n 's/^exclude //p' <<<"$excluded")"
}

keep_out() { # NODES -> these and those the job is kept off already, as one list
    printf '%s\n' "$1" "$(job_field ExcNodeList)" | grep -v -x -e '(null)' -e '' | paste -s -d ,
}

enough_without() { # NODES: whether the partition has enough other nodes; else a job would wait for ever
    local partition all left
    partition=$(job_field Partition)
    all=$(sinfo --noheader --Node --partition "$partition" --format %N | sort -u) || return 0
    left=$(grep -v -x -c -F -f <(scontrol show hostnames "$(keep_out "$1")") <<<"$all")
    [ "$left" -ge "$nodes" ] && return
    say "without ${1//$'\n'/, } partition $partition has $left nodes left, the job needs $nodes"
    return 1
}

# requeue NODES: the same job again, without these nodes where it can do without
requeue() {
    local all=
    if [ "$(job_field BatchFlag)" != 1 ]; then
        say "not a batch job: start the same command again, it goes on"
        exit 75
    fi
    if [ "$(job_field Restarts)" != "$OPENFLM_ATTEMPT" ]; then # by a preemption, or scontrol requeue
        say "Slurm has put the job back into its queue"
        exit 75
    fi
    rm -f "$state".*
    trap '' TERM INT USR1 # Slurm ends this script, which still has to name the nodes
    if [ -n "$1" ]; then
        if enough_without "$1"; then all=$(keep_out "$1"); else say "so the next attempt may get them again"; fi
    fi
    scontrol requeue "$job" || {
        say "Slurm does not requeue this job (JobRequeue=0?): submit the same command again, it goes on"
        exit 75
    }
    if [ -n "$all" ]; then
        say "without ${1//$'\n'/, }"
        scontrol update "JobId=$job" "ExcNodeList=$all" || say "the next attempt may get these nodes again"
    fi
    exit 75
}
