#!/usr/bin/env bash
#SBATCH --job-name=scores
#SBATCH --nodes=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=1:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
# The table of scores of runs, and a page that compares them; the last job of slurm/pipeline.sh.
#
#   sbatch slurm/scores.sh [TASK...]                                 default: RUNS/TASK of TASKS of slurm/site.sh
SCRIPTS=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
[ -e "$SCRIPTS/job.sh" ] || # Slurm runs a copy of this file
    SCRIPTS=$(dirname "$(scontrol show job "${SLURM_JOB_ID:-0}" | sed -n '/^ *Command=/ { s|^ *Command=\(.*/scores.sh\).*|\1|p; q }')")
REPOSITORY=$(dirname "$SCRIPTS")
# shellcheck source=slurm/job.sh
source "$SCRIPTS/job.sh" || { echo "error: submit slurm/scores.sh by its path in the repository" >&2; exit 2; }

start "$@"
choose_tasks
RANKS_PER_NODE=1
runs=()
for task in "${tasks[@]}"; do
    runs+=("$RUNS/$(basename "$task" .yaml)")
done
if inside; then
    begin_job
    run_step scores "$PYTHON" -m pipeline.report --scores "${runs[@]}"
    finish '' $?
fi
submit scores.sh 1 -- "${arguments[@]}"
