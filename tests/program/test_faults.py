"""Some cells of the matrix of faults, one for each phase and each fault; the command makes them all."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from benchmarks.proof.faults import (
    DISK_FULL,
    EXCEPTION,
    FAULTS,
    KILL,
    LONG,
    PHASES,
    READ_ONLY,
    STOP,
    TERM_ALL,
    TERM_ONE,
    TIME_LIMIT,
    Cell,
    matrix,
)

CELLS = [  # phase, fault, ranks, exit codes, what is said
    ("set-up", TERM_ONE, 2, [75, 75], "told to stop by SIGTERM before the first step"),
    ("loader", KILL, 2, [75, -9], "gone without a word"),
    ("step", EXCEPTION, 2, [1, 1], "RuntimeError: planted by the fault matrix"),
    ("evaluation", TERM_ALL, 1, [75], "SIGTERM: stopping after this step"),
    ("save", TERM_ALL, 1, [75], "SIGTERM: stopping after this step"),
    ("save", DISK_FULL, 1, [2], "ALARM: checkpoint step_00000002 was not written"),
    ("step", LONG, 2, [75, 75], "rank 1 on HOST: does not get on for"),
    ("evaluation", LONG, 1, [0], ""),
    ("save", LONG, 1, [0], ""),
    ("report", READ_ONLY, 1, [0], "warning: no report (PermissionError"),
    ("loader", STOP, 2, [75, -9], "no heartbeat for"),
    ("step", TIME_LIMIT, 1, [75], "the job's time limit: stopping after this step"),
]
QUICK = (KILL, EXCEPTION, DISK_FULL, READ_ONLY, STOP)  # the others: make extended


def may_mount(folder: Path) -> bool:
    if os.geteuid() != 0 or shutil.which("mount") is None:
        return False
    if subprocess.run(["mount", "-t", "tmpfs", "none", folder], capture_output=True).returncode:
        return False
    return subprocess.run(["umount", folder]).returncode == 0


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str, str, int], Cell]]:
    with matrix(tmp_path_factory.mktemp("faults")) as run:
        yield run


@pytest.mark.slow
@pytest.mark.parametrize(
    ("phase", "fault", "world", "codes", "said"),
    [pytest.param(*cell, marks=() if cell[1] in QUICK else pytest.mark.extended) for cell in CELLS],
)
def test_a_fault_ends_in_time_and_is_said_and_the_run_goes_on(
    make: Callable[[str, str, int], Cell],
    tmp_path: Path,
    phase: str,
    fault: str,
    world: int,
    codes: list[int],
    said: str,
) -> None:
    if fault == DISK_FULL and not may_mount(tmp_path):
        pytest.skip("a full disk needs the right to mount a tmpfs")
    cell = make(phase, fault, world)
    assert cell.codes == codes and said in "\n".join(cell.said), cell
    assert cell.holds, cell
    words = cell.last_words
    if fault in (DISK_FULL, READ_ONLY):
        assert words is None or words.code == max(codes)  # perhaps it could not be written either
    elif not any(codes):
        assert words.code == 0 and cell.said == []
    else:
        assert words.stopped == (fault in (TERM_ONE, TERM_ALL, TIME_LIMIT)) and words.names_cause
        assert words.code == max(codes) and (words.stopped or words.rank == world - 1)
        assert words.reason in " ".join(cell.said) or words.reason.startswith("told to stop by")


def test_every_phase_and_every_fault_has_a_cell() -> None:
    assert {cell[0] for cell in CELLS} == set(PHASES) and {cell[1] for cell in CELLS} == set(FAULTS)
