"""Finds the rank of this process in any launcher's environment, connects the ranks, and lets them agree on numbers."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist

LOOPBACK = "127.0.0.1"
DEFAULT_PORT = 29500
_SILENCE = timedelta(minutes=30)  # until a hanging rank is noticed; with gloo a dead one is noticed at once
_LOST_RANK_WORDS = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting")


@dataclass(frozen=True)
class Place:
    """The rank of this process among ``world_size`` ranks, and its number ``local_rank`` on its node."""

    rank: int
    world_size: int
    local_rank: int
    launcher: str  # "environment" (deepspeed, torchrun), "mpi", "slurm" or "single"

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def discover(environment: Mapping[str, str]) -> Place:
    """The place of this process in the environment of deepspeed, torchrun, mpirun (Open MPI, MPICH) or srun.

    RANK and WORLD_SIZE take precedence. Slurm's variables count in a step of several tasks, unless PMI_SIZE differs:
    mpirun inside an allocation starts its daemons through Slurm, and then PMI's variables count.

    Raises:
        ValueError: the numbers are incomplete or contradict each other.
    """
    tables = (
        ("environment", "RANK", "WORLD_SIZE", ("LOCAL_RANK",)),
        ("mpi", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", ("OMPI_COMM_WORLD_LOCAL_RANK",)),
        ("slurm", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", ("SLURM_LOCALID",)),
        ("mpi", "PMI_RANK", "PMI_SIZE", ("MPI_LOCALRANKID", "PMI_LOCAL_RANK")),
    )
    for launcher, rank_key, size_key, local_keys in tables:
        if size_key not in environment or rank_key not in environment:
            continue
        world_size = _number(environment, size_key)
        if launcher == "slurm" and (world_size == 1 or environment.get("PMI_SIZE", str(world_size)) != str(world_size)):
            continue
        rank = _number(environment, rank_key)
        local_key = next((key for key in local_keys if key in environment), None)
        local_rank = _number(environment, local_key) if local_key else rank
        if not 0 <= rank < world_size or local_rank < 0:
            raise ValueError(f"{rank_key}={rank} does not fit {size_key}={world_size}; start all ranks by one launcher")
        return Place(rank, world_size, local_rank, launcher)
    if "RANK" in environment and environment["RANK"] != "0":
        raise ValueError(f"RANK={environment['RANK']} without WORLD_SIZE; start the ranks by deepspeed or torchrun")
    return Place(0, 1, 0, "single")


def rendezvous(place: Place, environment: Mapping[str, str]) -> tuple[str, int]:
    """Address and port where the ranks meet."""
    if "MASTER_ADDR" in environment:
        return environment["MASTER_ADDR"], int(environment.get("MASTER_PORT", DEFAULT_PORT))
    if place.launcher == "mpi":
        return _mpi_rendezvous()
    if place.launcher == "slurm":
        single_node = environment.get("SLURM_STEP_NUM_NODES", "1") == "1"
        address = LOOPBACK if single_node else environment.get("SLURM_LAUNCH_NODE_IPADDR", LOOPBACK)
        return address, 20_000 + int(environment.get("SLURM_JOB_ID", "0")) % 20_000
    return LOOPBACK, DEFAULT_PORT


def connect(place: Place, device: torch.device, environment: MutableMapping[str, str] = os.environ) -> None:
    """Create the process group (nccl on CUDA, gloo elsewhere) and set the environment variables that libraries read."""
    address, port = rendezvous(place, environment)
    environment.update(
        RANK=str(place.rank),
        WORLD_SIZE=str(place.world_size),
        LOCAL_RANK=str(place.local_rank),
        MASTER_ADDR=address,
        MASTER_PORT=str(port),
    )
    backend = "nccl" if device.type == "cuda" else "gloo"
    if place.world_size == 1:  # without a port, which another process could hold
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    else:
        dist.init_process_group(backend, rank=place.rank, world_size=place.world_size, timeout=_SILENCE)


class Agreement:
    """Collectives over numbers on the host, on a gloo group of their own, so that they never wait for a device."""

    def __init__(self) -> None:
        self.alone = not dist.is_initialized() or dist.get_world_size() == 1
        self.is_main = self.alone or dist.get_rank() == 0
        self._group = None if self.alone else dist.new_group(backend="gloo", timeout=_SILENCE)

    def total(self, numbers: Sequence[int] | Sequence[float]) -> list[float]:
        """The sum over ranks of each number (exact for integers below 2**53)."""
        if self.alone:
            return [float(number) for number in numbers]
        tensor = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(tensor, group=self._group)
        return tensor.tolist()

    def all_agree(self, holds: bool) -> bool:
        """Whether it holds on every rank."""
        return self.total([not holds]) == [0.0]

    def largest(self, number: float) -> float:
        if self.alone:
            return float(number)
        tensor = torch.tensor(number, dtype=torch.float64)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self._group)
        return tensor.item()

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks in order of rank (pickled, between our own processes)."""
        if self.alone:
            return [value]
        values: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(values, value, group=self._group)
        return values

    def wait(self) -> None:
        """A barrier over all ranks."""
        if not self.alone:
            dist.barrier(group=self._group)


def lost_rank(error: BaseException) -> str | None:
    """One line if ``error`` means that another rank is gone or silent, None for every other error."""
    found = next((words for words in _LOST_RANK_WORDS if words in str(error)), None)
    if not isinstance(error, RuntimeError) or found is None:
        return None
    return f"another rank is gone or silent ({found.strip()}); its own last message has the cause"


def leave(code: int, agreement: Agreement | None = None) -> NoReturn:
    """End this process with ``code`` after flushing its output and, given an ``agreement``, after a barrier.

    The interpreter's shutdown is skipped, because gloo's threads may abort a correct run in it.
    """
    if agreement is not None:
        agreement.wait()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _number(environment: Mapping[str, str], key: str) -> int:
    try:
        return int(environment[key])
    except ValueError:
        raise ValueError(f"{key}={environment[key]!r} is not a whole number; unset it or use a launcher") from None


def _mpi_rendezvous() -> tuple[str, int]:
    """Rank 0 picks a free port and tells the others through MPI."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise ValueError(
            f"started by mpirun but mpi4py cannot be used ({error}); set MASTER_ADDR and MASTER_PORT"
        ) from error
    world = MPI.COMM_WORLD
    meeting = None
    if world.Get_rank() == 0:
        local = world.Split_type(MPI.COMM_TYPE_SHARED)
        with socket.socket() as probe:
            probe.bind(("", 0))
            address = LOOPBACK if local.Get_size() == world.Get_size() else _own_address()
            meeting = (address, probe.getsockname()[1])
    else:
        world.Split_type(MPI.COMM_TYPE_SHARED)
    return world.bcast(meeting, root=0)


def _own_address() -> str:
    """The address of this host on the route to other hosts, by the routing table; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("10.255.255.255", 1))
            return probe.getsockname()[0]
        except OSError:
            return socket.gethostbyname(socket.gethostname())
