"""Prepares a split while it is killed at random moments and resumed by another engine, and looks at it all the time."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from data_prep.manifest import file_sha256, read_manifest
from data_prep.parts.part import read_part
from data_prep.parts.plan import FOLDERS, open_plan, plan_folder
from data_prep.record import PrepError
from tests.data_prep.parts.image_server import ImageServer, arguments, files, mpirun, program, start


@dataclass
class Course:
    """What happened: the engine of each attempt, whether it was killed, how many parts were there then."""

    attempts: list[tuple[str, bool, int]] = field(default_factory=list)
    looks: int = 0


def attempt_commands(number: int, table: Path, output: Path, rows_per_part: int) -> tuple[str, list[list[str]]]:
    """Name and commands of the attempt: engines and numbers of workers in turn."""
    word = lambda *more: arguments(table, output, *more, rows_per_part=rows_per_part)  # noqa: E731
    ways: list[tuple[str, Callable[[], list[list[str]]]]] = [
        ("processes 2", lambda: [program(word("--processes", "2"))]),
        ("array of 2", lambda: [program(word("--engine", "array", "--array", f"{n}/2")) for n in range(2)]),
        ("processes 1", lambda: [program(word())]),
    ]
    if mpirun(1):
        ways.insert(1, ("mpi 2", lambda: [program(word("--engine", "mpi"), *mpirun(3))]))
    name, commands = ways[number % len(ways)]
    return name, commands()


def prepare_with_kills(
    table: Path, output: Path, kills: int, seed: int, longest: float, rows_per_part: int, expected: dict[str, bytes]
) -> Course:
    """Make the split ``output/train``, killed ``kills`` times within ``longest`` seconds of an attempt.

    Raises AssertionError where a part or the split is not whole at a moment, an attempt fails by itself, or a split
    that is made does not have the files ``expected``.
    """
    source, course, killed, number = random.Random(seed), Course(), 0, 0
    while not (output / "train").exists() or killed < kills:
        if (output / "train").exists():  # it was faster than the kills: once more from the start
            shutil.rmtree(output)
        name, commands = attempt_commands(number, table, output, rows_per_part)
        number += 1
        moment = source.uniform(0.5, longest) if killed < kills else 600.0
        log = output.parent / f"log{number}"
        running = [start(command, log) for command in commands]
        ended = _watch(running, output / "train", moment, course)
        codes = [one.wait() for one in running]
        course.attempts.append((name, not ended, _parts_there(output / "train")))
        if ended:
            assert codes == [0] * len(codes), log.read_text()
            assert files(output / "train") == expected
        else:
            killed += 1
    return course


def _watch(running: list[subprocess.Popen], split: Path, seconds: float, course: Course) -> bool:
    """Look at what is there until all have ended, or the moment of the kill; whether they ended by themselves."""
    deadline = time.monotonic() + seconds
    while any(one.poll() is None for one in running):
        if time.monotonic() > deadline:
            for one in running:
                _kill_session(one.pid)
            return False
        check_parts(split)
        course.looks += 1
        time.sleep(0.2)
    return True


def _kill_session(leader: int) -> None:
    """SIGKILL to a launched command and all below it; it leads a session of its own."""
    found = [leader]
    for parent in found:
        for children in Path("/proc").glob(f"{parent}/task/*/children"):
            try:
                found += map(int, children.read_text().split())
            except OSError:
                continue  # it has ended meanwhile
    for pid in found:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def check_parts(split: Path) -> None:
    """Every part that is published is whole, and so is the split once it is seen."""
    if split.exists():
        read_manifest(split)
        return
    folder = plan_folder(split)
    try:
        plan = open_plan(folder)
        for number in range(plan.parts):
            if plan.done(number).exists():
                sealing = (folder / "split").exists()
                for shard in read_part(plan, number, whole=not sealing).shards:
                    if not sealing:
                        assert file_sha256(plan.done(number) / shard.file) == shard.sha256
    except (PrepError, FileNotFoundError):
        if folder.exists() and not (folder / "split").exists() and not split.exists() and _is_plan(folder):
            raise


def _is_plan(folder: Path) -> bool:
    return all((folder / name).is_dir() for name in FOLDERS)


def _parts_there(split: Path) -> int:
    done = plan_folder(split) / "done"
    return len(list(done.iterdir())) if done.is_dir() else 0


def asked_more_than_once(server: ImageServer, count: int) -> int:
    """How many numbers were downloaded again after a kill."""
    return sum(server.asked.count(number) > 1 for number in range(count))
