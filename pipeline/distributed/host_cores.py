"""How many CPU cores this process may use."""

from __future__ import annotations

import os
from pathlib import Path


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
