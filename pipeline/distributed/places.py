"""Finds the rank of this process in the environment of any launcher."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """The rank of this process among ``world_size`` ranks, and its number ``local_rank`` on its node."""

    rank: int
    world_size: int
    local_rank: int
    launcher: str  # "environment" (deepspeed, torchrun), "mpi", "slurm" or "single"
    local_world_size: int | None = None  # ranks on this node, None where the launcher does not say

    @property
    def is_main(self) -> bool:
        return self.rank == 0


@dataclass(frozen=True)
class _Launcher:
    """The variables of one launcher; of several names the first that is set counts."""

    name: str
    rank: str
    size: str
    local_rank: tuple[str, ...]
    local_size: tuple[str, ...]


_LAUNCHERS = (  # docs/launchers.md has this table for people
    _Launcher("environment", "RANK", "WORLD_SIZE", ("LOCAL_RANK",), ("LOCAL_WORLD_SIZE", "LOCAL_SIZE")),
    _Launcher(
        *("mpi", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
        *(("OMPI_COMM_WORLD_LOCAL_RANK",), ("OMPI_COMM_WORLD_LOCAL_SIZE",)),
    ),
    _Launcher("slurm", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", ("SLURM_LOCALID",), ()),
    _Launcher("mpi", "PMI_RANK", "PMI_SIZE", ("MPI_LOCALRANKID", "PMI_LOCAL_RANK"), ("MPI_LOCALNRANKS",)),
)


def discover(environment: Mapping[str, str]) -> Place:
    """The place of this process in the environment of deepspeed, torchrun, mpirun (Open MPI, MPICH) or srun.

    RANK and WORLD_SIZE take precedence. Slurm's variables count in a step of several tasks, unless PMI_SIZE differs:
    mpirun inside an allocation starts its daemons through Slurm, and then PMI's variables count.

    Raises:
        ValueError: the numbers are incomplete or contradict each other.
    """
    for launcher in _LAUNCHERS:
        if launcher.size in environment and launcher.rank in environment:
            place = _place(launcher, environment)
            if launcher.name != "slurm" or _slurm_counts(place, environment):
                _refuse_contradiction(place, environment)
                return place
    for name, harmless, other in (("RANK", "0", "WORLD_SIZE"), ("WORLD_SIZE", "1", "RANK")):
        if environment.get(name, harmless) != harmless:
            found = f"{name}={environment[name]} without {other}"
            raise ValueError(f"{found}; start the ranks by deepspeed or torchrun")
    return Place(0, 1, 0, "single", 1)


def _place(launcher: _Launcher, environment: Mapping[str, str]) -> Place:
    rank, size = number(environment, launcher.rank), number(environment, launcher.size)
    local_key = next((key for key in launcher.local_rank if key in environment), None)
    local_rank = number(environment, local_key) if local_key else rank
    size_key = next((key for key in launcher.local_size if key in environment), None)
    local_size = number(environment, size_key) if size_key else None
    if launcher.name == "slurm":
        local_size = _tasks_on_node(environment)
    if not 0 <= rank < size or local_rank < 0:
        raise ValueError(f"{launcher.rank}={rank} does not fit {launcher.size}={size}; start all ranks by one launcher")
    if local_size is not None and not local_rank < local_size <= size:
        raise ValueError(
            f"{local_key or launcher.rank}={local_rank}, {size_key or 'SLURM_STEP_TASKS_PER_NODE'}={local_size} and "
            f"{launcher.size}={size} contradict each other; start all ranks by one launcher"
        )
    return Place(rank, size, local_rank, launcher.name, local_size)


def _slurm_counts(place: Place, environment: Mapping[str, str]) -> bool:
    return place.world_size > 1 and environment.get("PMI_SIZE", str(place.world_size)) == str(place.world_size)


def _refuse_contradiction(place: Place, environment: Mapping[str, str]) -> None:
    """Raise ValueError where RANK and WORLD_SIZE are left over from somewhere else, or several jobs are one step."""
    if place.launcher == "slurm" and environment.get("SLURM_HET_SIZE", "1") != "1":
        raise ValueError(
            f"found a heterogeneous Slurm job of {environment['SLURM_HET_SIZE']} components, whose ranks Slurm numbers "
            "by component; expected one component, or RANK and WORLD_SIZE set for every rank"
        )
    if place.launcher != "environment":
        return
    for launcher in _LAUNCHERS[1:]:
        if launcher.size not in environment or launcher.rank not in environment:
            continue
        tasks, task = number(environment, launcher.size), number(environment, launcher.rank)
        same_size = tasks == place.world_size and "TORCHELASTIC_RUN_ID" not in environment
        if tasks > place.world_size or (tasks > 1 and same_size and task != place.rank):
            raise ValueError(
                f"RANK={place.rank}, WORLD_SIZE={place.world_size} contradict {launcher.rank}={task}, "
                f"{launcher.size}={tasks}; unset RANK and WORLD_SIZE, which win otherwise"
            )


def _tasks_on_node(environment: Mapping[str, str]) -> int | None:
    """This node's count in SLURM_STEP_TASKS_PER_NODE, written like ``4(x2),3``: two nodes of 4 tasks, one of 3."""
    counts: list[int] = []
    for part in environment.get("SLURM_STEP_TASKS_PER_NODE", "").split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if found is None:
            return None
        counts += [int(found[1])] * int(found[2] or 1)
    node = environment.get("SLURM_NODEID", "")
    return counts[int(node)] if node.isdecimal() and int(node) < len(counts) else None


def number(environment: Mapping[str, str], key: str) -> int:
    """An environment variable as a whole number; raises ValueError naming the variable."""
    try:
        return int(environment[key])
    except ValueError:
        raise ValueError(f"{key}={environment[key]!r} is not a whole number; unset it or use a launcher") from None
