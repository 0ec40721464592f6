"""RUN/ending.json: how the last attempt of a run ended, for whoever decides whether it is started again."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from data_prep.manifest import write_atomically
from pipeline.distributed.endings import Ending

NAME = "ending.json"
WRITE_SECONDS = 5.0  # a disk that hangs must not keep a rank from ending


class LastWords(NamedTuple):
    """The content of the file."""

    rank: int  # the rank that the end began with, and its host
    host: str
    code: int
    reason: str
    stopped: bool  # told to stop: no failure
    names_cause: bool  # the end began with this rank; False: with another one, nobody knows which
    step: int | None  # optimizer steps done, None before the first
    job: str | None  # and which attempt at it
    attempt: int
    time: float  # seconds since 1970, by the clock of the node that wrote it


class LastWordsFile:
    """Takes down how this attempt ends, in a run folder that is there by then."""

    def __init__(self, run: Path, step: Callable[[], int | None], is_main: bool) -> None:
        """Rank 0 removes what an earlier attempt left."""
        self._run, self._step = run, step
        if is_main:
            with suppress(OSError):
                (run / NAME).unlink()

    def write(self, ending: Ending) -> None:
        """Write the file, or give up after WRITE_SECONDS: it never keeps a rank from ending."""
        words = LastWords(
            *(ending.rank, ending.host, ending.code, ending.reason, ending.stopped, ending.names_cause),
            *(self._step(), job_name(os.environ), attempt_number(os.environ), round(time.time(), 3)),
        )
        writing = threading.Thread(target=self._write, args=(words,), daemon=True, name="last words")
        writing.start()
        writing.join(WRITE_SECONDS)

    def _write(self, words: LastWords) -> None:
        try:
            if self._run.is_dir():  # a mistake before the run began leaves no folder
                write_atomically(self._run / NAME, json.dumps(words._asdict(), indent=1) + "\n")
        except OSError as error:
            print(f"{self._run / NAME}: not written: {error.strerror}", file=sys.stderr, flush=True)


def read_last_words(run: Path) -> LastWords | None:
    """How the last attempt ended; None where nobody said so, or the file is none of ours."""
    try:
        found = json.loads((run / NAME).read_text(encoding="utf-8"))
        step, job = found["step"], found["job"]
        return LastWords(
            rank=int(found["rank"]),
            host=str(found["host"]),
            code=int(found["code"]),
            reason=str(found["reason"]),
            stopped=bool(found["stopped"]),
            names_cause=bool(found["names_cause"]),
            step=None if step is None else int(step),
            job=None if job is None else str(job),
            attempt=int(found["attempt"]),
            time=float(found["time"]),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def attempt_number(environment: Mapping[str, str]) -> int:
    """How often the job was started before, by OPENFLM_ATTEMPT; 0 outside of our job scripts."""
    text = environment.get("OPENFLM_ATTEMPT", "")
    return int(text) if text.isdecimal() else 0


def job_name(environment: Mapping[str, str]) -> str | None:
    """The job by Slurm's name for it, JOB or ARRAY_TASK, which is the same at every restart; None outside of Slurm."""
    array, task = environment.get("SLURM_ARRAY_JOB_ID"), environment.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else environment.get("SLURM_JOB_ID")
