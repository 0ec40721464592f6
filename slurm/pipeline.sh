#!/usr/bin/env bash
# Everything by one command: data, pretraining, a fine-tuning and an evaluation for each task, the table of scores.
#
#   slurm/pipeline.sh [--dry-run]            on a login node, or within a job; the settings are in slurm/site.sh
#
# Each stage waits for the one before it and is cancelled if that fails; the table comes in any case. Run again after
# something was mended, it goes on: finished runs are left as they are.
SCRIPTS=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
REPOSITORY=$(dirname "$SCRIPTS")
# shellcheck source=slurm/job.sh
source "$SCRIPTS/job.sh"

start "$@"
[ ${#arguments[@]} = 0 ] || fail "slurm/pipeline.sh takes no $(printf '%q ' "${arguments[@]}"): its settings are in $SITE"

after() { printf '%s\n' --dependency="$1" --kill-on-invalid-dep=yes; }

last=$((${#TASKS[@]} - 1))
[ "$last" -ge 0 ] || fail "$SITE: TASKS is empty; name recipes of tasks"
first=''
before=(--hold) # until all are submitted: a job that has ended is nothing to wait for
if [ ${#PREPARE[@]} -gt 0 ]; then
    data=$(submit prep_data.sh 1 "${before[@]}" --) || exit 2
    first=$data
    mapfile -t before < <(after "afterok:$data")
fi
pretraining=$(submit pretrain_flm.sh "$NODES" "${before[@]}" --) || exit 2
first=${first:-$pretraining}
mapfile -t before < <(after "afterok:$pretraining")
tuning=$(submit finetune.sh 1 --array="0-$last" "${before[@]}" --) || exit 2
mapfile -t before < <(after "aftercorr:$tuning")
evaluation=$(submit evaluate.sh 1 --array="0-$last" "${before[@]}" --) || exit 2
table=$(submit scores.sh 1 --dependency="afterany:$evaluation" --) || exit 2
if [ -z "$DRY_RUN" ]; then
    scontrol release "$first" || exit 2
    say "${data:+data $data, }pretraining $pretraining, fine-tuning $tuning, evaluation $evaluation; table of scores: \
$LOGS/scores-$table.out"
fi
