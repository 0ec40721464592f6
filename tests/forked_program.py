"""The training program on several ranks without a launcher, forked from this warm process: nobody ends the others."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from pipeline.distributed.launching import reserve_port
from tests.forked_command import warm


@dataclass
class Job:
    """Running ranks, each with its output in a file."""

    pids: list[int]
    folder: Path

    def finish(self, seconds: float = 60, stopped: int | None = None) -> list[int]:
        """Exit codes of all ranks; raises AssertionError, and ends them, when one is still there after ``seconds``.

        A rank that is ``stopped`` by SIGSTOP is killed when all others have ended, as a launcher does.
        """
        deadline, codes = time.monotonic() + seconds, {}
        try:
            while len(codes) < len(self.pids):
                for rank, pid in enumerate(self.pids):
                    if rank not in codes and (found := os.waitpid(pid, os.WNOHANG))[0]:
                        codes[rank] = os.waitstatus_to_exitcode(found[1])
                if len(codes) == len(self.pids) - 1 and stopped is not None and stopped not in codes:
                    os.kill(self.pids[stopped], signal.SIGKILL)
                assert time.monotonic() < deadline, f"after {seconds} s only {sorted(codes)} have ended"
                time.sleep(0.05)
        finally:
            for rank, pid in enumerate(self.pids):
                if rank not in codes:
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
        return [codes[rank] for rank in range(len(self.pids))]

    def output(self, rank: int) -> str:
        return (self.folder / f"rank{rank}.txt").read_text()

    def wait_for_step(self, run: Path, step: int, seconds: float = 200) -> None:
        deadline = time.monotonic() + seconds
        while True:
            lines = (run / "log.jsonl").read_text().splitlines() if (run / "log.jsonl").exists() else []
            if any(json.loads(line)["step"] >= step for line in lines[:-1]):
                return
            assert time.monotonic() < deadline, f"no step {step} after {seconds} s: {self.output(0)}"
            time.sleep(0.02)

    def workers(self, rank: int) -> list[int]:
        """The loader processes of a rank."""
        return [
            int(pid) for pid in Path(f"/proc/{self.pids[rank]}/task/{self.pids[rank]}/children").read_text().split()
        ]


def start_program(
    world: int,
    arguments: list[str | Path],
    folder: Path,
    main: Callable[[list[str]], int] | None = None,
    prepare: Callable[[int], None] | None = None,
    meeting: dict[str, str] | None = None,
) -> Job:
    """``pipeline/train.py``, or the program ``main``, with these arguments on every rank; output goes to ``folder``.

    ``prepare`` is called with the rank in each rank's process first; ``meeting`` are variables of another meeting
    point than the one that this process opens.
    """
    from pipeline.train import main as train

    warm()

    folder.mkdir(parents=True, exist_ok=True)
    listening, variables = (None, meeting) if meeting else reserve_port()
    pids = []
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            places = {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
            _become(folder / f"rank{rank}.txt", places | variables)
            _run(main or train, [str(argument) for argument in arguments], rank, prepare)
        pids.append(pid)
    if listening is not None:
        listening.close()
    return Job(pids, folder)


def _become(output: Path, environment: dict[str, str]) -> None:
    stream = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    os.environ.update(environment)
    torch.set_num_threads(1)
    multiprocessing.process._children.clear()  # the parent's, if any


def _run(main: Callable, arguments: list[str], rank: int, prepare: Callable[[int], None] | None) -> None:
    code = 99
    try:
        if prepare is not None:
            prepare(rank)
        code = main(arguments)
    except BaseException:  # a fork must never return into pytest: said, and exit code 99
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
