#!/usr/bin/env bash
#SBATCH --job-name=prep_data
#SBATCH --nodes=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
# Preparation of data on one node, by one process that uses its cores; what is downloaded also by an array of such jobs.
#
#   sbatch [--array=0-7] slurm/prep_data.sh [VERB OPTIONS of python -m data_prep]
#   slurm/prep_data.sh [--dry-run] [--array=0-7] [VERB OPTIONS]
#
# Without a verb: every line of PREPARE of slurm/site.sh, those that are done left out. The tasks of an array share the
# parts of one split; any of them may be cancelled, preempted, or submitted again.
SCRIPTS=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
[ -e "$SCRIPTS/job.sh" ] || # Slurm runs a copy of this file
    SCRIPTS=$(dirname "$(scontrol show job "${SLURM_JOB_ID:-0}" | sed -n '/^ *Command=/ { s|^ *Command=\(.*/prep_data.sh\).*|\1|p; q }')")
REPOSITORY=$(dirname "$SCRIPTS")
# shellcheck source=slurm/job.sh
source "$SCRIPTS/job.sh" || { echo "error: submit slurm/prep_data.sh by its path in the repository" >&2; exit 2; }

share_parts() { # within an array: this task takes its share of the parts
    [ ${#arguments[@]} -gt 0 ] || fail "an array shares the parts of one split: name the verb that downloads it"
    [ -z "$(value_of engine "${arguments[@]}")" ] || return 0
    "${CONTAINER[@]}" "$PYTHON" -m data_prep "${arguments[0]}" --help | grep -q -e --engine ||
        fail "${arguments[0]} downloads nothing that an array could share: submit it without --array"
    arguments+=(--engine array)
}

start "$@"
RANKS_PER_NODE=1
array=()
case ${arguments[0]:-} in --array=*) array=("${arguments[0]}") arguments=("${arguments[@]:1}") ;; esac
if inside; then
    begin_job
    [ -z "${SLURM_ARRAY_TASK_ID:-}" ] || share_parts
    if [ ${#arguments[@]} -gt 0 ]; then
        run_step prepare "$PYTHON" -m data_prep "${arguments[@]}"
        finish '' $?
    fi
    for line in "${PREPARE[@]}"; do
        done=$LOGS/.prepared-$(sha256sum <<<"$line" | cut -c 1-16)
        [ ! -e "$done" ] || { say "done before: $line"; continue; }
        read -ra words <<<"$line"
        run_step prepare "$PYTHON" -m data_prep "${words[@]}" || finish '' $?
        touch "$done"
    done
    finish '' 0
fi
submit prep_data.sh 1 "${array[@]}" -- "${arguments[@]}"
[ -z "$DRY_RUN" ] || show_ranks 1 "$PYTHON" -m data_prep "${arguments[@]:-${PREPARE[0]:-}}"
