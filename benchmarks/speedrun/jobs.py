"""Runs commands side by side, each in a session of its own, and tells them to stop when it is told to."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.distributed.launching import launched_ranks
from pipeline.distributed.preempt import EXIT_PREEMPTED, StopRequest

ROOT = Path(__file__).resolve().parents[2]
POLL_SECONDS = 0.2
PATIENCE_SECONDS = 120.0  # a training that is told to stop saves first
LAST_LINES = 3


class Stopped(Exception):
    """The speedrun was told to stop; everything it had started has ended."""

    def __init__(self, signal_name: str) -> None:
        super().__init__(signal_name)
        self.exit_code = 130 if signal_name == "SIGINT" else EXIT_PREEMPTED


@dataclass
class Job:
    """Commands that follow each other; ``output`` takes what they print, ``finish`` is called when all went well.

    ``work`` is about how long it takes, in any unit, and ``begun`` tells which share of it is done.
    """

    label: str
    commands: list[list[str]]
    output: Path
    work: float = 1.0
    begun: Callable[[], float] = lambda: 0.0
    finish: Callable[[], None] = lambda: None


@dataclass
class _Running:
    job: Job
    environment: Mapping[str, str]
    left: deque[list[str]] = field(init=False)
    process: subprocess.Popen[bytes] = field(init=False)

    def __post_init__(self) -> None:
        self.left = deque(self.job.commands)
        self.start_next()

    def start_next(self) -> None:
        self.job.output.parent.mkdir(parents=True, exist_ok=True)
        with open(self.job.output, "ab") as output:
            self.process = subprocess.Popen(
                self.left.popleft(),
                env=self.environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C reaches the speedrun alone, training can save before it ends
            )


def run_jobs(
    jobs: Sequence[Job],
    slots: int,
    threads: int,
    stop: StopRequest,
    show: Callable[[Sequence[Job], Sequence[Job]], None] = lambda running, waiting: None,
) -> list[str]:
    """Run all jobs, ``slots`` at a time, each on ``threads`` threads; returns what failed, a line each.

    A failed job does not end the others. ``show`` is told at each turn what runs and what waits.

    Raises:
        Stopped: a signal came; the commands were told to stop and have ended.
    """
    waiting, running, failures = deque(jobs), [], []
    environment = _environment(threads)
    try:
        while waiting or running:
            if stop.requested:
                raise Stopped(stop.signal_name)
            while waiting and len(running) < slots:
                running.append(_Running(waiting.popleft(), environment))
            show([one.job for one in running], waiting)
            time.sleep(POLL_SECONDS)
            running = [one for one in running if not _ended(one, failures)]
    finally:
        _end_all([one.process for one in running])
    return failures


def _ended(one: _Running, failures: list[str]) -> bool:
    code = one.process.poll()
    if code is None:
        return False
    if code == 0 and one.left:
        one.start_next()
        return False
    if code == 0:
        one.job.finish()
    else:
        failures.append(_failure(one.job, code))
    return True


def _failure(job: Job, code: int) -> str:
    text = job.output.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    said = " / ".join(line.strip() for line in text[-LAST_LINES:]) or "nothing"
    how = f"ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
    how += " (somebody told it to stop)" if code == EXIT_PREEMPTED else ""
    return f"{job.label} {how}; all it said is in {job.output}, the end of it: {said}"


def _end_all(processes: Iterable[subprocess.Popen[bytes]]) -> None:
    """Ask commands to end, then end them with everything they started."""
    living = [process for process in processes if process.poll() is None]
    for process in living:
        for pid in launched_ranks(process.pid) or [process.pid]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + PATIENCE_SECONDS
    for process in living:
        with suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.monotonic()))
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _environment(threads: int) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    own = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": path}
    return {**os.environ, **own, "PYTHONUNBUFFERED": "1"}
