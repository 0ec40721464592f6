# shellcheck shell=bash disable=SC2034
# What differs from cluster to cluster. Edit this file, or copy it and let OPENFLM_SITE name the copy.
# Paths may be relative to the repository. What is empty is left to Slurm, or is what the comment says.

# --- what is asked of Slurm ---------------------------------------------------------------------------------------
# `slurm/NAME.sh` hands these to sbatch. With plain `sbatch slurm/NAME.sh` give them there (--partition=... ), as
# sbatch reads no file but the script.
PARTITION=
ACCOUNT=
QOS=
TIME=24:00:00                # of one attempt; training goes on in the next one
NODES=${NODES:-2}            # of pretraining; everything else takes one node. NODES=8 slurm/pretrain_flm.sh works too
GPUS_PER_NODE=               # empty: all that a whole node has
SBATCH_MORE=()               # anything else, like (--constraint=a100 --exclude=node13)

# --- what is on the nodes -----------------------------------------------------------------------------------------
prepare_node() {             # runs once in each job, before anything else: modules, variables
    : # module load cuda/12.8
}
PYTHON=.venv/bin/python      # made by scripts/setup.sh; the same path on all nodes, or in the container
CONTAINER=()                 # what comes before PYTHON, like (apptainer exec --nv /images/openflm.sif)
RANKS_PER_NODE=              # empty: one for each GPU, one without GPUs
CPUS_PER_RANK=               # empty: those of a node divided by its ranks
NETWORK_INTERFACE=           # like ib0, for NCCL and gloo; empty: they choose (gloo the one that leads to rank 0)
HEALTH=yes                   # look at devices, network, disk and clock of every node before training; no: don't

# --- where things are (on a file system that all nodes share) -----------------------------------------------------
DEEPSPEED=ds_configs/zero2.json # how it is trained; every script takes --deepspeed as well
DATA=(data)                  # prepared corpora of pretraining, DIR or DIR:WEIGHT
RUNS=runs                    # a folder for each run
LOGS=logs                    # what jobs print
SCRATCH=                     # node-local disk for caches of compilers; empty: TMPDIR or /tmp

# --- what happens after a failure ---------------------------------------------------------------------------------
SIGNAL_SECONDS=300           # before its time is over the job is told to save; it also reckons that itself
MAX_RESTARTS=50              # of one job
SAME_FAILURE=3               # equal failures in a row, without progress, that end it

# --- what slurm/pipeline.sh does ----------------------------------------------------------------------------------
PREPARE=()                   # arguments of `python -m data_prep`, a string each, like ("synth" "tokenizer"); what is
                             # done is not done again. Empty: all data is there
PRETRAIN=(--recipe flm_base_4m) # options of pretraining, unless a recipe is given to slurm/pretrain_flm.sh
PRETRAIN_EVLGEN=(--recipe evlgen_opt2.7b --model.vision.pretrained eva_vit_g.pth) # likewise of slurm/pretrain_evlgen.sh;
                             # where nodes reach no hub, also --model.language.name and --model.connector.pretrained
FINETUNE=()                  # options of all fine-tuning
TASKS=(vqav2 nlvr2 snli_ve coco_caption coco_retrieval) # recipes; the data of NAME is TASK_DATA/NAME
TASK_DATA=data
EVALUATE=(--split dev)
