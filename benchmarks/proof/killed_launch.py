"""Starts training under the real launcher in a session of its own and kills every process of it at a chosen moment."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.checkpoint.files import newest_valid

LIMIT_SECONDS = 400
SET_UP_POLL_SECONDS, POLL_SECONDS = 0.02, 0.001  # the cores belong to the run
STEP_KINDS = ("train", "eval")


@dataclass
class Kill:
    """What a kill aimed at, where it fell, and what the run had by then."""

    aim: str
    fell: str
    seconds: float  # since the launch
    processes: int
    step: int  # last step logged
    saved: int  # step of the newest valid checkpoint, -1 if there is none
    leftovers: list[str]  # unfinished folders

    @property
    def lost_steps(self) -> int:
        return self.step - max(self.saved, 0)

    def as_record(self) -> dict[str, Any]:
        return {**asdict(self), "seconds": round(self.seconds, 2), "lost_steps": self.lost_steps}


class Launcher:
    """Runs one training command, to its end or to a kill."""

    def __init__(self, folder: Path, script: list[str], steps: int, ranks: int = 2) -> None:
        self._folder, self._script, self._steps, self._ranks = folder, script, steps, ranks
        self._set_up_seconds = 10.0  # of the launch before, so that kills aimed at set-up fall into it
        self._evaluate_every = int(script[script.index("--train.eval_every") + 1])

    @staticmethod
    def environment() -> dict[str, str]:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        return os.environ | {"PATH": path, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

    def finish(self, run: Path) -> None:
        """Train to the end; raises RuntimeError with the last words of a run that fails."""
        assert self.start_and_kill(run, None, random.Random(0)) is None

    def start_and_kill(self, run: Path, aim: str | None, chance: random.Random) -> Kill | None:
        """One launch; None when it reached its end before the moment came (or ``aim`` is None)."""
        began = time.monotonic()
        process = self._start(run)
        try:
            moment = _Moment(run, aim, chance, self._set_up_seconds, self._steps, self._evaluate_every)
            while process.poll() is None and not moment.has_come():
                if time.monotonic() - began > LIMIT_SECONDS:
                    raise RuntimeError(f"{run.name}: not finished within {LIMIT_SECONDS} s; see {run}.out")
                time.sleep(SET_UP_POLL_SECONDS if moment.set_up_seconds is None else POLL_SECONDS)
            if moment.set_up_seconds is not None:
                self._set_up_seconds = moment.set_up_seconds
            finished, seconds = process.poll() is not None, time.monotonic() - began
        finally:
            processes = kill_session(process)
        if not finished:
            return self._look(run, aim, moment.first_size, seconds, processes)
        if process.returncode:
            raise RuntimeError(f"{run.name}: exit code {process.returncode}\n{self._output(run).read_text()[-3000:]}")
        return None

    def _start(self, run: Path) -> subprocess.Popen[bytes]:
        launcher = [Path(sys.executable).with_name("deepspeed"), "--num_gpus", self._ranks]
        with self._output(run).open("ab") as output:
            return subprocess.Popen(
                [*map(str, launcher), *self._script, "--output", str(run)],
                cwd=self._folder,
                env=self.environment(),
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _output(self, run: Path) -> Path:
        return run.with_name(run.name + ".out")

    def _look(self, run: Path, aim: str | None, first_size: int, seconds: float, processes: int) -> Kill:
        """Where a kill fell, read from what it left behind."""
        lines = log_lines(run)
        step = max((record["step"] for record in lines), default=0)
        kinds = {(record["kind"], record["step"]) for record in lines}
        folder = run / "checkpoints"
        leftovers = sorted(p.name for p in folder.iterdir() if p.suffix) if folder.is_dir() else []
        path, skipped = newest_valid(run)
        if skipped:
            raise RuntimeError(f"{run.name}: a kill left a published checkpoint that is not valid: {skipped}")
        if log_size(run) == first_size:
            fell = "set-up"
        elif leftovers:
            fell = "saving"
        elif ("train", self._steps) in kinds:
            fell = "finishing"
        elif step % self._evaluate_every == 0 and ("eval", step) not in kinds:
            fell = "evaluating"
        else:
            fell = "training"
        saved = int(path.name.removeprefix("step_")) if path else -1
        return Kill(aim or "", fell, seconds, processes, step, saved, leftovers)


class _Moment:
    """Says when the moment to kill has come: an event in the run's files, and a random wait after it."""

    def __init__(
        self, run: Path, aim: str | None, chance: random.Random, set_up_seconds: float, steps: int, evaluate_every: int
    ) -> None:
        self._run, self._steps, self._evaluate_every = run, steps, evaluate_every
        self.first_size = log_size(run)
        self.set_up_seconds: float | None = None
        self._began = time.monotonic()
        self._seen: set[str] = set()
        self._due: float | None = None
        self._last: tuple[int, dict[str, Any]] = (0, {})  # size of the log, its last record
        waits: dict[str | None, tuple[Callable[[], bool], float]] = {
            "set-up": (lambda: True, set_up_seconds),
            "training": (lambda: self.set_up_seconds is not None, 2.0),
            "saving": (self._is_saving, 0.03),
            "evaluating": (self._is_evaluating, 0.3),
            "finishing": (self._is_finishing, 1.0),
            None: (lambda: False, 0.0),
        }
        self._event, longest = waits[aim]
        self._wait = chance.uniform(0, longest)
        self._saves_to_pass = chance.choice((0, 0, 1, 2, 3))

    def has_come(self) -> bool:
        now = time.monotonic()
        if self.set_up_seconds is None and log_size(self._run) > self.first_size:
            self.set_up_seconds = now - self._began
        if self._due is None and self._event():
            self._due = now + self._wait
        return self._due is not None and now >= self._due

    def _is_saving(self) -> bool:
        """Whether the save has begun that follows those to pass; folders left by an earlier kill do not count."""
        try:
            now = {entry.name for entry in os.scandir(self._run / "checkpoints") if entry.name.endswith(".tmp")}
        except FileNotFoundError:
            return False
        if self.set_up_seconds is not None:
            self._seen |= now
        return len(self._seen) > self._saves_to_pass

    def _is_evaluating(self) -> bool:
        last = self._last_record()
        return last.get("kind") == "train" and last["step"] % self._evaluate_every == 0

    def _is_finishing(self) -> bool:
        return self._last_record().get("step") == self._steps

    def _last_record(self) -> dict[str, Any]:
        if self.set_up_seconds is None:
            return {}
        size = log_size(self._run)
        if size != self._last[0]:
            self._last = size, next(iter(reversed(log_lines(self._run))), {})
        return self._last[1]


def log_size(run: Path) -> int:
    """Bytes of log.jsonl and of what a resumed run has taken out of it, so that it only grows."""
    return sum(path.stat().st_size for path in run.glob("log*.jsonl"))


def log_lines(run: Path) -> list[dict[str, Any]]:
    """The whole records of steps in log.jsonl; it may end in a torn line, or be replaced at this moment."""
    try:
        text = (run / "log.jsonl").read_text()
    except FileNotFoundError:
        return []
    records = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return [record for record in records if record["kind"] in STEP_KINDS]


def kill_session(process: subprocess.Popen[bytes]) -> int:
    """SIGKILL to every process of the session that ``process`` leads, until none is left; returns their number."""
    killed: set[int] = set()
    deadline = time.monotonic() + 30
    while found := session_members(process.pid):
        if time.monotonic() > deadline:
            raise RuntimeError(f"processes {sorted(found)} outlive SIGKILL")
        for pid in found:
            killed.add(pid)
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        process.poll()
        time.sleep(0.002)
    process.wait()
    return len(killed)


def session_members(session: int) -> list[int]:
    """Living processes of a session (Linux)."""
    members = []
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit():
            continue
        try:
            fields = Path(entry.path, "stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[3]) == session and fields[0] not in "ZX":
            members.append(int(entry.name))
    return members
