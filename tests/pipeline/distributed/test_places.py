"""Rank discovery from the environment of any launcher."""

from __future__ import annotations

import pytest

from pipeline.distributed.places import Place, discover


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, Place(0, 1, 0, "single", 1)),
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, Place(3, 8, 1, "environment")),
        (
            {"OMPI_COMM_WORLD_RANK": "5", "OMPI_COMM_WORLD_SIZE": "6", "OMPI_COMM_WORLD_LOCAL_RANK": "2"},
            Place(5, 6, 2, "mpi"),
        ),
        ({"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1"}, Place(1, 2, 1, "mpi")),
        ({"SLURM_PROCID": "9", "SLURM_STEP_NUM_TASKS": "16", "SLURM_LOCALID": "1"}, Place(9, 16, 1, "slurm")),
        # srun --mpi=pmi2 sets both; mpirun inside an allocation has one Slurm task per node
        ({"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "PMI_RANK": "1", "PMI_SIZE": "2"}, Place(1, 2, 1, "slurm")),
        ({"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "PMI_RANK": "5", "PMI_SIZE": "8"}, Place(5, 8, 5, "mpi")),
        # a plain python in a batch script of several tasks, or in `srun --pty bash`
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, Place(0, 1, 0, "single", 1)),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, Place(0, 1, 0, "single", 1)),
        # deepspeed and torchrun say how many ranks a node has, each in its own words
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_SIZE": "2"}, Place(3, 8, 1, "environment", 2)),
        (
            {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"},
            Place(3, 8, 1, "environment", 4),
        ),
        # srun writes the tasks of each node in runs
        (
            {
                **{"SLURM_PROCID": "9", "SLURM_STEP_NUM_TASKS": "11", "SLURM_LOCALID": "1", "SLURM_NODEID": "2"},
                **{"SLURM_STEP_TASKS_PER_NODE": "4(x2),3"},
            },
            Place(9, 11, 1, "slurm", 3),
        ),
        # RANK and WORLD_SIZE set from Slurm's own numbers, as a batch script does it
        (
            {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"},
            Place(1, 2, 1, "environment"),
        ),
        # torchrun under srun numbers its ranks as it likes
        (
            {
                **{"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "TORCHELASTIC_RUN_ID": "x"},
                **{"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"},
            },
            Place(1, 2, 0, "environment"),
        ),
        # torchrun under srun: its own numbers win
        (
            {"RANK": "4", "WORLD_SIZE": "8", "LOCAL_RANK": "0", "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"},
            Place(4, 8, 0, "environment"),
        ),
    ],
)
def test_discover(environment: dict[str, str], place: Place) -> None:
    assert discover(environment) == place


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"RANK": "8", "WORLD_SIZE": "8"}, "RANK=8 does not fit WORLD_SIZE=8"),
        ({"RANK": "x", "WORLD_SIZE": "8"}, "RANK='x' is not a whole number"),
        ({"RANK": "2"}, "RANK=2 without WORLD_SIZE"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 without RANK"),
        ({"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "2", "LOCAL_SIZE": "2"}, "LOCAL_RANK=2, LOCAL_SIZE=2"),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_SIZE": "4"}, "LOCAL_SIZE=4 and WORLD_SIZE=2"),
        (  # left over in the shell from where srun was typed
            {"RANK": "0", "WORLD_SIZE": "1", "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "4"},
            "RANK=0, WORLD_SIZE=1 contradict SLURM_PROCID=1, SLURM_STEP_NUM_TASKS=4; unset RANK",
        ),
        (
            {"RANK": "0", "WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"},
            "contradict OMPI_COMM_WORLD_RANK=1",
        ),
        ({"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "4", "SLURM_HET_SIZE": "2"}, "heterogeneous Slurm job of 2"),
    ],
)
def test_discover_refuses(environment: dict[str, str], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        discover(environment)
