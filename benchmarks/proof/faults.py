"""Whatever fails, wherever it fails: every cell of a matrix of faults ends in time, says why, and resumes exactly.

    python -m benchmarks.proof.faults [--world 1 2] [--phases step save] [--faults "disk full"] [--output FILE.json]

A cell trains a tiny FLM for six steps on one or two ranks, forked from this process without a launcher that would end
them, and lets one fault happen in one phase. Then the fault is taken away and the same command runs again: its losses
must be those of a run that nobody disturbed. Full disks are a tmpfs that is filled to the last byte (which needs root);
a read-only disk is a run folder without write permission, for ranks that have no right to override permissions.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import json
import os
import platform
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline.cluster import heartbeats
from pipeline.cluster.last_words import LastWords, read_last_words
from pipeline.distributed.watch import GRACE_SECONDS
from pipeline.recording.run_log import read_log
from tests.forked_program import start_program
from tests.tiny_corpus import make_corpus

STEPS, LIMIT_SECONDS = 6, 120
OPTIONS = ["--recipe", "flm_tiny", "--train.steps", str(STEPS), "--train.log_every", "1", "--train.eval_every", "3"]
OPTIONS += ["--train.save_every", "2", "--data.num_workers", "1", "--tracking.tensorboard", "false"]
PHASES = {  # where the fault happens: (module, name in it, the call that it comes in)
    "set-up": ("pipeline.training.session", "open_training_data", 1),
    "loader": ("pipeline.training.loop", "_collect", 3),
    "step": ("pipeline.engine.engine", "_losses", 5),
    "evaluation": ("pipeline.training.loop", "evaluate", 2),
    "save": ("pipeline.checkpoint.files", "PartWriter.finish", 1),
    "report": ("pipeline.reporting.page", "write_report", 1),
}
EXCEPTION, KILL, TERM_ALL, TERM_ONE = "exception on one rank", "SIGKILL of one rank", "SIGTERM to all", "SIGTERM to one"
DISK_FULL, READ_ONLY, TIME_LIMIT, STOP = "disk full", "read-only", "time limit", "SIGSTOP of one rank"
LONG = "a rank takes longer than a step may"  # which is no fault in an evaluation or a save
FAULTS = (EXCEPTION, KILL, TERM_ALL, TERM_ONE, DISK_FULL, READ_ONLY, TIME_LIMIT, STOP, LONG)
STOP_MINUTES = {"set_up": 0.5, "step": 0.15, "evaluation": 0.15, "save": 0.15}  # until a stopped rank is told of
LONGER_SECONDS = 5.0  # than a step may take
_CAP_DAC_OVERRIDE, _CAP_DAC_READ_SEARCH, _CAP_VERSION_3 = 1, 2, 0x20080522  # linux/capability.h
_SAID = re.compile(r"error: |ALARM: |warning: |not all ranks are|: stopping after this step|checkpoint skipped")


@dataclass
class Cell:
    """What a fault did."""

    phase: str
    fault: str
    world: int
    codes: list[int]
    seconds: float  # from the fault to the end of the last rank
    said: list[str]  # first line of each rank that tells of it
    left: list[str]  # unfinished files and folders in the run
    resumed_equal: bool
    last_words: LastWords | None  # RUN/ending.json

    @property
    def holds(self) -> bool:
        """It ended by a code for a scheduler, was not silent, and went on as if nothing had been.

        Of a run whose only process is killed or stopped nobody is left to say so but its launcher.
        """
        known = all(code in (0, 1, 2, 75, -signal.SIGKILL) for code in self.codes)
        left_alone = (self.world == 1 and self.fault in (KILL, STOP)) or (self.fault == LONG and not any(self.codes))
        return known and (bool(self.said) or left_alone) and self.resumed_equal


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", type=int, nargs="+", default=[1, 2], choices=[1, 2], help="numbers of ranks")
    parser.add_argument("--phases", nargs="+", default=list(PHASES), choices=list(PHASES))
    parser.add_argument("--faults", nargs="+", default=list(FAULTS), choices=FAULTS)
    parser.add_argument("--output", type=Path, help="write the cells as JSON here")
    arguments = parser.parse_args(argv)
    cells = []
    with tempfile.TemporaryDirectory() as folder, matrix(Path(folder)) as run:
        for world in arguments.world:
            for phase in arguments.phases:
                for fault in arguments.faults:
                    cells.append(run(phase, fault, world))
                    print(row(cells[-1]), flush=True)
    if arguments.output:
        machine = {"python": platform.python_version(), "machine": platform.machine(), "cores": os.cpu_count()}
        command = " ".join(["python -m benchmarks.proof.faults", *(argv or sys.argv[1:])])
        content = {"command": command, **machine, "cells": [asdict(cell) for cell in cells]}
        arguments.output.write_text(json.dumps(content, indent=1) + "\n")
    failed = [cell for cell in cells if not cell.holds]
    print(f"{len(cells) - len(failed)} of {len(cells)} cells hold")
    return 1 if failed else 0


def row(cell: Cell) -> str:
    """A line of a Markdown table."""
    said = "; ".join(line[:160].replace("|", "/") for line in cell.said) or "(nobody is left)"
    codes = ", ".join("killed" if code == -signal.SIGKILL else str(code) for code in cell.codes)
    resumed = "equal" if cell.resumed_equal else "DIFFERENT"
    left = ", ".join(cell.left) or "-"
    return (
        f"| {cell.phase} | {cell.fault} | {cell.world} | {codes} | {cell.seconds:.1f} | {said} | {left} | {resumed} |"
    )


@contextmanager
def matrix(folder: Path) -> Iterator[Callable[[str, str, int], Cell]]:
    """A function that makes one cell; data, undisturbed runs and the disk that can be full are shared by all."""
    data = make_corpus(folder / "data", train=64, dev=16)
    disk = folder / "disk"
    disk.mkdir()
    mounted = (
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96m", "none", disk], capture_output=True).returncode == 0
    )
    whole: dict[int, dict[int, float]] = {}

    def run(phase: str, fault: str, world: int) -> Cell:
        if world not in whole:
            whole[world] = undisturbed(data, folder / f"whole{world}", world)
        name = re.sub(r"\W+", "_", f"{phase}_{fault}_{world}")
        if fault == DISK_FULL and not mounted:
            raise RuntimeError("a full disk needs the right to mount a tmpfs: run as root")
        return make_cell(phase, fault, world, data, (disk if fault == DISK_FULL else folder) / name, whole[world])

    try:
        yield run
    finally:
        if mounted:
            subprocess.run(["umount", "-l", disk], check=False)


def undisturbed(data: Path, run: Path, world: int) -> dict[int, float]:
    job = start_program(world, [*OPTIONS, "--data", data, "--output", run], run.with_name(run.name + "_out"))
    codes = job.finish(LIMIT_SECONDS)
    if any(codes):
        raise RuntimeError(f"the undisturbed run ended with {codes}: {job.output(0)}")
    return losses(run)


def make_cell(phase: str, fault: str, world: int, data: Path, run: Path, expected: dict[int, float]) -> Cell:
    notes = Path(tempfile.mkdtemp(dir=data.parent))
    arguments = [*OPTIONS, "--data", data, "--output", run]
    if fault in (STOP, LONG):
        for name, minutes in (STOP_MINUTES if fault == STOP else {"step": STOP_MINUTES["step"]}).items():
            arguments += [f"--train.{name}_timeout_minutes", str(minutes)]
    run.mkdir()  # a set-up meets a disk that became full or read-only after the folder was made
    victim = 0 if phase == "report" or fault == TIME_LIMIT else world - 1  # only rank 0 writes a report, sees the time

    def prepare(rank: int) -> None:
        obey_permissions()
        (notes / f"pid{rank}").write_text(str(os.getpid()))
        heartbeats.BEAT_SECONDS = 0.5
        os.environ["OPENFLM_END_TIME"] = str(int(time.time()) + 10**6)
        if rank == victim:
            plant(phase, lambda: happen(fault, phase, world, run, notes))

    job = start_program(world, arguments, notes / "out", prepare=prepare)
    codes = job.finish(LIMIT_SECONDS, stopped=victim if fault == STOP else None)
    ended = time.time()
    happened = (notes / "happened").stat().st_mtime if (notes / "happened").exists() else ended
    told = [next((line for line in job.output(rank).splitlines() if _SAID.search(line)), "") for rank in range(world)]
    places = {str(run): "RUN", str(data): "DATA", socket.gethostname(): "HOST"}
    for place, name in places.items():
        told = [line.replace(place, name) for line in told]
    said = [line for line in told if line]
    left = sorted(str(path.relative_to(run)) for path in run.rglob("*") if is_leftover(path))
    last_words = read_last_words(run)
    heal(run)
    again = start_program(world, [*OPTIONS, "--data", data, "--output", run], notes / "again")
    resumed = again.finish(LIMIT_SECONDS) == [0] * world and losses(run) == expected
    subprocess.run(["rm", "-rf", run], check=False)
    return Cell(phase, fault, world, codes, ended - happened, said, left, resumed, last_words)


def plant(phase: str, fault: Callable[[], None]) -> None:
    """Let ``fault`` happen once, in the call that the phase names."""
    module, name, turn = PHASES[phase]
    *owners, name = name.split(".")
    owner = importlib.import_module(module)
    for one in owners:
        owner = getattr(owner, one)
    original, calls = getattr(owner, name), []

    def disturbed(*arguments, **options):
        calls.append(None)
        if len(calls) == turn:
            fault()
        return original(*arguments, **options)

    setattr(owner, name, disturbed)


def happen(fault: str, phase: str, world: int, run: Path, notes: Path) -> None:
    (notes / "happened").touch()
    if fault == EXCEPTION:
        raise RuntimeError("planted by the fault matrix")
    if fault == KILL:
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault == STOP:
        os.kill(os.getpid(), signal.SIGSTOP)
    elif fault == LONG:
        grace = GRACE_SECONDS if phase == "step" else 0.0  # for a rank that is told to end by itself
        time.sleep(60 * STOP_MINUTES["step"] + grace + LONGER_SECONDS)
    elif fault == TERM_ONE:
        os.kill(os.getpid(), signal.SIGTERM)
    elif fault == TERM_ALL:
        for rank in range(world):
            os.kill(int((notes / f"pid{rank}").read_text()), signal.SIGTERM)
    elif fault == TIME_LIMIT:  # it is near at once
        importlib.import_module("pipeline.cluster.walltime").MARGIN_SECONDS = 10.0**9
    elif fault == DISK_FULL:
        with open(run.parent / "ballast", "wb", buffering=0) as ballast:
            for size in (1 << 20, 1 << 12, 1):
                try:
                    while ballast.write(b"\0" * size) == size:
                        pass
                except OSError:
                    continue
    elif fault == READ_ONLY:
        for path in (*run.rglob("*"), run):
            path.chmod(0o555 if path.is_dir() else 0o444)


def heal(run: Path) -> None:
    """Take a fault of the disk away."""
    (run.parent / "ballast").unlink(missing_ok=True)
    for path in (run, *run.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)


def obey_permissions() -> None:
    """Give up root's right to write what permissions forbid, for this process."""
    if os.geteuid() != 0:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(_CAP_VERSION_3, 0)
    rights = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable, twice
    if libc.capget(header, rights):
        raise OSError(ctypes.get_errno(), "capget")
    for number in range(3):
        rights[number] &= ~(1 << _CAP_DAC_OVERRIDE | 1 << _CAP_DAC_READ_SEARCH)
    if libc.capset(header, rights):
        raise OSError(ctypes.get_errno(), "capset")


def is_leftover(path: Path) -> bool:
    return path.name.endswith((".tmp", ".removed", ".part")) or (path.name.startswith(".") and path.is_file())


def losses(run: Path) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in read_log(run / "log.jsonl") if record["kind"] == "train"}


if __name__ == "__main__":
    sys.exit(main())
