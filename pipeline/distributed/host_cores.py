"""How many CPU cores this process may use, and how the ranks of a node share them among their threads."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch

from pipeline.distributed.endings import host_name
from pipeline.distributed.ranks import Agreement

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # what torch takes its number of threads from


def usable_cores() -> int:
    """Cores that this process may run on: of its affinity mask, as many as its control groups (v2) give time for."""
    cores = len(usable_core_numbers())
    quota = _quota_of_groups(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))
    return cores if quota is None else max(1, min(cores, int(quota)))


def usable_core_numbers() -> frozenset[int]:
    """The numbers of the cores of this process's affinity mask."""
    if not hasattr(os, "sched_getaffinity"):  # not Linux
        return frozenset(range(os.cpu_count() or 1))
    return frozenset(os.sched_getaffinity(0))


def share_cores(agreement: Agreement, environment: Mapping[str, str] = os.environ) -> str | None:
    """Set the number of torch's threads so that the ranks of a host do not contend for its cores.

    Every rank must call it. Each takes its cores divided by the number of ranks on its host that may run on any of
    them. Nothing is changed where a variable of THREAD_VARIABLES is set, or where torch would use no more anyway.
    Returns a line to print if any rank's number was changed, equal on all ranks.
    """
    here = host_name(), usable_core_numbers()
    sharing = sum(host == here[0] and bool(cores & here[1]) for host, cores in agreement.gather(here))
    threads, before = max(1, usable_cores() // sharing), torch.get_num_threads()
    changed = threads < before and not any(environment.get(name) for name in THREAD_VARIABLES)
    if changed:
        torch.set_num_threads(threads)
    found = [one for one in agreement.gather((threads, before, sharing) if changed else None) if one is not None]
    if not found:
        return None
    threads, before, sharing = found[0]
    return (
        f"threads: {threads} per rank instead of {before}, as {sharing} rank{'s share' if sharing > 1 else ' has'} the "
        "cores that a rank may use; OMP_NUM_THREADS sets another number"
    )


def _quota_of_groups(membership: Path, root: Path) -> float | None:
    """The smallest quota, in cores, of the control groups (v2) that ``membership`` names; None without any."""
    try:
        lines = membership.read_text(encoding="ascii").splitlines()
        own = next(line.split("::", 1)[1] for line in lines if line.startswith("0::"))
    except (OSError, ValueError, StopIteration):
        return None
    quotas = []
    folder = root / own.lstrip("/")
    while folder != root.parent:
        try:
            quota, period = (folder / "cpu.max").read_text(encoding="ascii").split()
            quotas += [int(quota) / int(period)] if quota != "max" else []
        except (OSError, ValueError):
            pass  # the root group has none
        folder = folder.parent
    return min(quotas, default=None)
