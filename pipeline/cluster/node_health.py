"""Whether a node is fit to train on: its devices, disks, limits, and what earlier jobs left on it."""

from __future__ import annotations

import os
import re
import resource
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipeline.distributed.endings import host_name

MIB, GIB = 1 << 20, 1 << 30
PROBE_BYTES = 16 * MIB  # written and read on each disk
MIN_SHM_BYTES = 256 * MIB  # batches of loader processes travel in it
MIN_MEMLOCK_BYTES = 64 * MIB  # where there is InfiniBand, whose buffers are locked
MAX_CLOCK_SECONDS = 10.0
SHM = Path("/dev/shm")
INFINIBAND = Path("/sys/class/infiniband")


@dataclass
class Report:
    """What was found on one node.

    ``unfit``: why it should not be used; ``shared``: what is wrong with what all nodes should share; ``judge`` tells by
    it what no other node would change (``mend``).
    """

    node: str
    devices: list[str] = field(default_factory=list)
    cores: int = 0
    memlock_mib: float | None = None  # None is unlimited
    mib_per_second: dict[str, float] = field(default_factory=dict)  # by what was done
    clock_seconds: float | None = None  # ahead of rank 0's
    leftovers: list[str] = field(default_factory=list)
    unfit: list[str] = field(default_factory=list)
    shared: list[str] = field(default_factory=list)
    mend: list[str] = field(default_factory=list)

    def line(self) -> str:
        """All of it for people."""
        speeds = [f"{what} {speed:.0f} MiB/s" for what, speed in self.mib_per_second.items()]
        lock = "unlimited" if self.memlock_mib is None else f"{self.memlock_mib:.0f} MiB"
        clock = [] if self.clock_seconds is None else [f"clock {self.clock_seconds:+.2f} s"]
        devices = ", ".join(self.devices) or "no GPU"
        left = [f"left behind: {'; '.join(self.leftovers[:5])}"] if self.leftovers else []
        parts = [devices, f"{self.cores} cores", f"memlock {lock}", *speeds, *clock, *left]
        return f"{self.node}: {', '.join(parts)}"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def check_node(run: Path | None, data: Iterable[Path] = (), min_free_gib: float = 1.0) -> Report:
    """Look at this node. Disks are written to, in the run's folder and in /dev/shm, and read again."""
    report = Report(host_name(), cores=len(os.sched_getaffinity(0)))
    check_devices(report)
    check_memlock(report, resource.getrlimit(resource.RLIMIT_MEMLOCK)[0], has_infiniband())
    if run is not None:
        folder = next(path for path in (run.absolute(), *run.absolute().parents) if path.is_dir())
        check_disk(report, folder, "run", min_free_gib * GIB, is_shared=True)
    check_disk(report, SHM, "shm", MIN_SHM_BYTES, is_shared=False)
    for path in data:
        check_data(report, path)
    check_leftovers(report)
    return report


def check_devices(report: Report) -> None:
    """Every GPU multiplies two matrices of whole numbers, whose product is known exactly."""
    import torch

    if not torch.cuda.is_available():
        return
    for number in range(torch.cuda.device_count()):
        try:
            name = torch.cuda.get_device_name(number)
            report.devices.append(name)
            ones = torch.ones(1024, 1024, device=torch.device("cuda", number))
            if not bool((ones @ ones == 1024).all()):
                report.unfit.append(f"GPU {number} ({name}) computes wrongly")
            free, total = torch.cuda.mem_get_info(number)
            if total - free > 4 * GIB:
                report.unfit.append(f"GPU {number} ({name}): {(total - free) / GIB:.1f} GiB are in use by others")
        except RuntimeError as error:
            report.unfit.append(f"GPU {number}: {' '.join(str(error).split())[:200]}")


def check_memlock(report: Report, limit: int, infiniband: bool) -> None:
    """The limit inside of a job may be another one than that of a login."""
    unlimited = limit == resource.RLIM_INFINITY
    report.memlock_mib = None if unlimited else limit / MIB
    if infiniband and not unlimited and limit < MIN_MEMLOCK_BYTES:
        report.unfit.append(
            f"memlock is {limit / MIB:.3g} MiB in this job, InfiniBand needs {MIN_MEMLOCK_BYTES // MIB} or more; set "
            "LimitMEMLOCK=infinity for slurmd, or PropagateResourceLimitsExcept=MEMLOCK"
        )


def has_infiniband() -> bool:
    return INFINIBAND.is_dir() and any(INFINIBAND.iterdir())


def check_disk(report: Report, folder: Path, name: str, min_free: float, is_shared: bool) -> None:
    """Write and read a file there."""
    wrong = report.shared if is_shared else report.unfit
    probe = folder / f".health-{report.node}-{os.getpid()}"
    try:
        free = shutil.disk_usage(folder).free
        if free < min_free:
            wrong.append(f"{folder}: {free / GIB:.2f} GiB are free, expected {min_free / GIB:.2f}; free some")
            return
        content = os.urandom(MIB) * (PROBE_BYTES // MIB)
        report.mib_per_second[f"{name} write"] = PROBE_BYTES / MIB / _seconds(lambda: _write(probe, content))
        found: list[bytes] = []
        report.mib_per_second[f"{name} read"] = PROBE_BYTES / MIB / _seconds(lambda: found.append(probe.read_bytes()))
        if found[0] != content:
            wrong.append(f"{folder}: what is read is not what was written")
    except OSError as error:
        wrong.append(f"{folder}: {error.strerror or error}")
    finally:
        with suppress(OSError):
            probe.unlink(missing_ok=True)


def check_data(report: Report, path: Path) -> None:
    try:
        next(iter(path.iterdir()), None)
    except FileNotFoundError:
        report.shared.append(f"{path}: no such folder here; mount it, or name another by --data")
    except OSError as error:
        report.shared.append(f"{path}: {error.strerror or error}")


def check_leftovers(report: Report, proc: Path = Path("/proc"), environment: Mapping[str, str] = os.environ) -> None:
    """Processes of this user from an earlier attempt of this job that hold GPUs, and unused segments of /dev/shm."""
    in_use: set[str] = set()
    for process in _own_processes(proc):
        files = _open_files(process)
        in_use |= {file for file in files if file.startswith(str(SHM))}
        gpus = sorted({file for file in files if re.fullmatch(r"/dev/nvidia\d+", file)})
        if gpus and is_of_earlier_attempt(_environment(process), environment):
            what = f"process {process.name} of an earlier attempt holds {', '.join(gpus)}"
            report.leftovers.append(what)
            report.unfit.append(f"{what}; kill it")
    segments = [path for path in SHM.iterdir() if _is_own_file(path) and str(path) not in in_use]
    if segments:
        size = sum(path.stat().st_size for path in segments if path.exists())
        report.leftovers.append(f"{len(segments)} unused files of {size / MIB:.0f} MiB in {SHM}, as {segments[0].name}")


def is_of_earlier_attempt(found: Mapping[str, str], own: Mapping[str, str]) -> bool:
    """Whether a process belongs to the same job, started before: other jobs of the user may share the node."""
    job = own.get("SLURM_JOB_ID")
    attempt, own_attempt = (one.get("SLURM_RESTART_COUNT", "0") for one in (found, own))
    return job is not None and found.get("SLURM_JOB_ID") == job and attempt != own_attempt


def judge(reports: list[Report]) -> int:
    """Compare the nodes, complete their reports, and the exit code: 0 fit, 75 without the unfit ones, 2 mend it.

    Fewer GPUs than most have, or a clock apart from most, is found here; so is what is wrong on all nodes.
    """
    most = max(len(report.devices) for report in reports)
    clocks = sorted(report.clock_seconds for report in reports if report.clock_seconds is not None)
    for report in reports:
        if len(report.devices) < most:
            report.unfit.append(f"{len(report.devices)} GPUs, others have {most}")
        if report.clock_seconds is not None:
            apart = report.clock_seconds - clocks[len(clocks) // 2]
            if abs(apart) > MAX_CLOCK_SECONDS:
                report.unfit.append(f"its clock is {apart:+.0f} s apart from most; mend its NTP")
    shared_by_all = all(report.shared for report in reports)
    for report in reports:
        (report.mend if shared_by_all else report.unfit).extend(report.shared)
    if len(reports) > 1 and all(report.unfit for report in reports):
        for report in reports:
            report.mend, report.unfit = report.mend + report.unfit, []
    if any(report.mend for report in reports):
        return 2
    return 75 if any(report.unfit for report in reports) else 0


def _write(path: Path, content: bytes) -> None:
    with open(path, "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def _seconds(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return max(time.perf_counter() - began, 1e-6)


def _own_processes(proc: Path) -> list[Path]:
    return [path for path in proc.iterdir() if path.name.isdecimal() and _is_own_file(path)]


def _is_own_file(path: Path) -> bool:
    try:
        return path.stat().st_uid == os.getuid()
    except OSError:
        return False


def _open_files(process: Path) -> set[str]:
    """What a process has open or mapped."""
    found: set[str] = set()
    try:
        for one in (process / "fd").iterdir():
            with suppress(FileNotFoundError):  # closed meanwhile
                found.add(os.readlink(one))
        maps = (process / "maps").read_text(errors="replace")
        found |= {line.split(maxsplit=5)[5] for line in maps.splitlines() if line.count(" ") >= 5 and "/" in line}
    except OSError:  # it has ended, or is not ours to look at
        pass
    return {file.removesuffix(" (deleted)") for file in found}


def _environment(process: Path) -> dict[str, str]:
    try:
        pairs = (process / "environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return {}
    return dict(pair.split("=", 1) for pair in pairs if "=" in pair)
