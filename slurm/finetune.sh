#!/usr/bin/env bash
#SBATCH --job-name=finetune
#SBATCH --nodes=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.out
#SBATCH --array=0-4
# Fine-tuning of the pretrained model, a job of an array for each task.
#
#   sbatch slurm/finetune.sh                                         TASKS of slurm/site.sh; --array=0-N for N + 1 of them
#   slurm/finetune.sh [--dry-run] [TASK...] [OPTIONS of pipeline/train.py]
#
# A task is a recipe; its data is TASK_DATA/TASK, its run RUNS/TASK.
SCRIPTS=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
[ -e "$SCRIPTS/job.sh" ] || # Slurm runs a copy of this file
    SCRIPTS=$(dirname "$(scontrol show job "${SLURM_JOB_ID:-0}" | sed -n '/^ *Command=/ { s|^ *Command=\(.*/finetune.sh\).*|\1|p; q }')")
REPOSITORY=$(dirname "$SCRIPTS")
# shellcheck source=slurm/job.sh
source "$SCRIPTS/job.sh" || { echo "error: submit slurm/finetune.sh by its path in the repository" >&2; exit 2; }

start "$@"
choose_tasks
index=${SLURM_ARRAY_TASK_ID:-0}
task=${tasks[$index]:-}
[ -n "$task" ] || { say "no task has number $index: there are ${#tasks[@]}"; exit 0; }
options=("${FINETUNE[@]}" "${options[@]}")
[ -n "$(value_of data "${options[@]}")" ] || options+=(--data "$TASK_DATA/$(basename "$task" .yaml)")
[ -n "$(value_of model.weights "${options[@]}")" ] || options+=(--model.weights "$(pretraining_run)")
train_command "$task" "${options[@]}"
if inside; then
    begin_job
    [ "${SLURM_ARRAY_TASK_COUNT:-1}" -ge "${#tasks[@]}" ] || [ "$index" != 0 ] ||
        say "this array has ${SLURM_ARRAY_TASK_COUNT:-1} of ${#tasks[@]} tasks; for all: --array=0-$((${#tasks[@]} - 1))"
    check_nodes --run "$RUN"
    run_step train "${command[@]}"
    finish "$RUN" $?
fi
submit finetune.sh 1 --array="0-$((${#tasks[@]} - 1))" -- "${arguments[@]}"
[ -z "$DRY_RUN" ] || show_ranks 1 "${command[@]}"
