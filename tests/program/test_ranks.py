"""Rank discovery from any launcher's environment, agreements between ranks, and signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.distributed.preempt import StopRequest
from pipeline.distributed.ranks import Agreement, Place, discover, rendezvous
from tests.forked_ranks import run_ranks

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, Place(0, 1, 0, "single")),
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
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, Place(0, 1, 0, "single")),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, Place(0, 1, 0, "single")),
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
    ],
)
def test_discover_refuses(environment: dict[str, str], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        discover(environment)


def test_rendezvous() -> None:
    explicit = {"MASTER_ADDR": "n1", "MASTER_PORT": "1234"}
    assert rendezvous(Place(0, 2, 0, "environment"), explicit) == ("n1", 1234)
    slurm = Place(0, 2, 0, "slurm")
    assert rendezvous(slurm, {"SLURM_JOB_ID": "7"}) == ("127.0.0.1", 20_007)
    nodes = {"SLURM_JOB_ID": "7", "SLURM_STEP_NUM_NODES": "2", "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1"}
    assert rendezvous(slurm, nodes)[0] == "10.0.0.1"


def agree(place: Place) -> tuple:
    agreement = Agreement()
    big = 2**51 + place.rank
    return agreement.total([place.rank, big]), agreement.largest(place.rank), agreement.gather(f"r{place.rank}")


@pytest.mark.parametrize("world_size", [1, 3])
def test_ranks_agree(world_size: int) -> None:
    ranks = range(world_size)
    expected = (
        [sum(ranks), 2**51 * world_size + sum(ranks)] if world_size == 1 else [3, 3 * 2**51 + 3],
        world_size - 1,
        [f"r{rank}" for rank in ranks],
    )
    for found in run_ranks(world_size, agree):
        assert found == expected


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_signals_become_a_request(name: str) -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    try:
        stop = StopRequest().listen()
        assert not stop.requested
        os.kill(os.getpid(), getattr(signal, name))
        assert stop.requested and stop.signal_name == name
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_second_ctrl_c_ends_at_once() -> None:
    program = (
        "import time; from pipeline.distributed.preempt import StopRequest; StopRequest().listen();"
        "print('ready', flush=True); time.sleep(60); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", program], cwd=REPOSITORY, stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=10) == 130
    finally:
        process.kill()
        process.wait()
