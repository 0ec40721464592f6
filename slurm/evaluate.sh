#!/usr/bin/env bash
#SBATCH --job-name=evaluate
#SBATCH --nodes=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=12:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
# Scores of a run on held-out data, the items shared by the GPUs of a node.
#
#   sbatch slurm/evaluate.sh --run RUN [OPTIONS of pipeline/evaluate.py]
#   slurm/evaluate.sh [--dry-run] [TASK...] [OPTIONS]                the runs RUNS/TASK, a job of an array for each
#
# Without a run or task: TASKS of slurm/site.sh.
SCRIPTS=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
[ -e "$SCRIPTS/job.sh" ] || # Slurm runs a copy of this file
    SCRIPTS=$(dirname "$(scontrol show job "${SLURM_JOB_ID:-0}" | sed -n '/^ *Command=/ { s|^ *Command=\(.*/evaluate.sh\).*|\1|p; q }')")
REPOSITORY=$(dirname "$SCRIPTS")
# shellcheck source=slurm/job.sh
source "$SCRIPTS/job.sh" || { echo "error: submit slurm/evaluate.sh by its path in the repository" >&2; exit 2; }

start "$@"
choose_tasks
index=${SLURM_ARRAY_TASK_ID:-0}
command=("$PYTHON" pipeline/evaluate.py)
if [ -n "$(value_of run "${options[@]}")" ]; then
    tasks=(run)
else
    [ -n "${tasks[$index]:-}" ] || { say "no task has number $index: there are ${#tasks[@]}"; exit 0; }
    command+=(--run "$RUNS/$(basename "${tasks[$index]}" .yaml)")
fi
command+=("${EVALUATE[@]}" "${options[@]}")
if inside; then
    begin_job
    run_step evaluate "${command[@]}"
    finish '' $?
fi
submit evaluate.sh 1 --array="0-$((${#tasks[@]} - 1))" -- "${arguments[@]}"
[ -z "$DRY_RUN" ] || show_ranks 1 "${command[@]}"
