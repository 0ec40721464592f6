#!/usr/bin/env bash
#SBATCH --job-name=pretrain_flm
#SBATCH --nodes=2
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
# Pretraining on all GPUs of all nodes of a job; continues the run that is in its folder.
#
#   sbatch slurm/pretrain_flm.sh [OPTIONS of pipeline/train.py]      what the cluster gives by default
#   slurm/pretrain_flm.sh [--dry-run] [OPTIONS]                      the same with the settings of slurm/site.sh
#
# Any recipe (--recipe NAME), that of PRETRAIN in slurm/site.sh by default; the run is RUNS/NAME unless --output names another.
SCRIPTS=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
[ -e "$SCRIPTS/job.sh" ] || # Slurm runs a copy of this file
    SCRIPTS=$(dirname "$(scontrol show job "${SLURM_JOB_ID:-0}" | sed -n '/^ *Command=/ { s|^ *Command=\(.*/pretrain_flm.sh\).*|\1|p; q }')")
REPOSITORY=$(dirname "$SCRIPTS")
# shellcheck source=slurm/job.sh
source "$SCRIPTS/job.sh" || { echo "error: submit slurm/pretrain_flm.sh by its path in the repository" >&2; exit 2; }

start "$@" # sets DRY_RUN and arguments
options=("${arguments[@]}")
[ -n "$(value_of recipe "${options[@]}")" ] || options=("${PRETRAIN[@]}" "${options[@]}")
pretrain pretrain_flm.sh flm_base_4m "${options[@]}"
