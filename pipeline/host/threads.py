"""How many threads a rank computes with: its part of the cores it may use, beside other ranks and other programs."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.distributed.endings import host_name
from pipeline.distributed.host_cores import usable_core_numbers, usable_cores

CHOSEN_BY = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # what torch takes its number of threads from
SPINS = "1000"  # what libgomp takes by itself where it knows of more threads than cores
CROWDED_SHARE = 0.25  # of the cores busy elsewhere, from which on it is said
_BUSY_FIELDS = (0, 1, 2, 5, 6, 7)  # of a cpu line in /proc/stat: user, nice, system, irq, softirq, steal


def wait_briefly(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let OpenMP's threads sleep soon when they wait for each other; to be called before torch is imported.

    By default they spin for milliseconds, each on a core. Where other programs want the cores too, a thread spins
    while the one that it waits for has no core: two trainings side by side were 100 times slower than with this.
    """
    if "OMP_WAIT_POLICY" not in environment:
        environment.setdefault("GOMP_SPINCOUNT", SPINS)


class BusyCores:
    """How busy the cores of this process are, from the moment on at which this is made."""

    def __init__(self) -> None:
        self._cores = usable_core_numbers()
        self._began, self._busy = time.monotonic(), _busy_seconds(self._cores)

    def elsewhere(self, own_seconds: float) -> float | None:
        """Cores that others kept busy meanwhile; ``own_seconds`` of CPU time are ours. None where nobody knows."""
        busy, elapsed = _busy_seconds(self._cores), time.monotonic() - self._began
        if self._busy is None or busy is None or elapsed <= 0:
            return None
        return max(0.0, (busy - self._busy - own_seconds) / elapsed)


class Threads(NamedTuple):
    """How a rank shares the cores of its host."""

    number: int  # of torch's threads
    cores: int  # that the rank may use
    ranks: int  # of this run that may run on any of them
    chosen_by: str | None  # the variable of CHOSEN_BY that decided
    busy_elsewhere: float | None  # cores that other programs kept busy while this one started

    @property
    def lines(self) -> list[str]:
        """What is printed of it: the number, and whether there are too few cores."""
        shared = f"{self.cores} cores for {self.ranks} rank{'s' if self.ranks > 1 else ''}"
        by = f" as {self.chosen_by} says" if self.chosen_by else "; OMP_NUM_THREADS sets another number"
        lines = [f"threads: {self.number} per rank, {shared} on this host{by}"]
        if self.busy_elsewhere is not None and self.busy_elsewhere > CROWDED_SHARE * self.cores:
            half = max(1, self.number // 2)
            less = f", or start each with OMP_NUM_THREADS={half}" if self.number > half else ""
            lines.append(
                f"load: other programs keep {self.busy_elsewhere:.1f} of these {self.cores} cores busy: steps take "
                f"longer than on an idle machine, and their times vary; wait for the others{less}"
            )
        return lines


def share_cores(
    agreement: Any,
    busy: BusyCores | None = None,
    num_workers: int = 0,
    environment: Mapping[str, str] = os.environ,
) -> Threads:
    """Set the number of torch's threads so that the ranks of a host do not contend for its cores.

    Every rank of the ``Agreement`` must call it. Each takes its cores divided by the number of ranks on its host that
    may run on any of them, without ``num_workers`` of them for its loader processes (on a CPU 0: they need little
    beside the steps), but no more than torch takes by itself. A variable of CHOSEN_BY wins, but for the 1 that torchrun
    sets where nobody has chosen.
    """
    import torch

    here = host_name(), usable_core_numbers()
    everybody = agreement.gather((*here, time.process_time()))
    beside = [own for host, cores, own in everybody if host == here[0] and cores & here[1]]
    cores, before = usable_cores(), torch.get_num_threads()
    by_torchrun = _set_by_torchrun(environment)
    chosen_by = None if by_torchrun else next((name for name in CHOSEN_BY if environment.get(name)), None)
    number = max(1, cores // len(beside) - num_workers)
    number = before if chosen_by else number if by_torchrun else min(number, before)
    if number != before:
        torch.set_num_threads(number)
    elsewhere = None if busy is None else busy.elsewhere(sum(beside))
    return Threads(number, cores, len(beside), chosen_by, None if elsewhere is None else round(elsewhere, 1))


def _set_by_torchrun(environment: Mapping[str, str], parent: Path | None = None) -> bool:
    """Whether OMP_NUM_THREADS is torchrun's own 1: it was started without the variable, so that nobody has chosen."""
    if "TORCHELASTIC_RUN_ID" not in environment or environment.get("OMP_NUM_THREADS") != "1":
        return False
    parent = parent or Path(f"/proc/{os.getppid()}")
    try:
        words = (parent / "environ").read_bytes().split(b"\0")
    except OSError:
        return False
    return not any(word.startswith(b"OMP_NUM_THREADS=") for word in words)


def _busy_seconds(cores: frozenset[int], stat: Path = Path("/proc/stat")) -> float | None:
    """Seconds that these cores have worked since the machine was started; None where there is no such file."""
    try:
        lines = [line.split() for line in stat.read_text().splitlines()]
    except OSError:
        return None
    named = {f"cpu{core}" for core in cores}
    ticks = [int(words[1 + field]) for words in lines if words and words[0] in named for field in _BUSY_FIELDS]
    return sum(ticks) / os.sysconf("SC_CLK_TCK") if ticks else None
