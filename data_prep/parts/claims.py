"""Says who works on which part, by files: no clock of another machine is trusted, and no lock of a file system.

Claims save work, nothing else: where two processes make the same part, one of the two results is published.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from pathlib import Path
from typing import Any

from data_prep.parts.plan import Plan

FREE, HELD, MOVING, STALE = "free", "held", "moving", "stale"
STALE_SECONDS = 180.0  # network file systems show a file that was changed up to 90 s late


class Claim:
    """A part that this process works on; ``beat`` from time to time says that it does."""

    def __init__(self, path: Path, content: dict[str, Any]) -> None:
        self._path, self._content = path, content

    def beat(self, **state: Any) -> None:
        """Raise the counter and show ``state``; nothing once another process has taken the claim over."""
        if self._is_mine():
            self._content |= {**state, "beats": self._content["beats"] + 1}
            beside = self._path.with_name(f".{self._content['attempt']}")
            beside.write_text(json.dumps(self._content))
            os.replace(beside, self._path)

    def release(self) -> None:
        if self._is_mine():
            self._path.unlink(missing_ok=True)

    def _is_mine(self) -> bool:
        return (_read(self._path) or {}).get("attempt") == self._content["attempt"]


class Claims:
    """The claims of a plan as this process sees them; whether one moves is judged by this process's own clock."""

    def __init__(self, plan: Plan, stale_seconds: float | None = None) -> None:
        self._plan = plan
        self._stale_seconds = STALE_SECONDS if stale_seconds is None else stale_seconds
        self._seen: dict[int, tuple[Any, float, bool]] = {}  # part -> content, when it changed here, whether it did

    def take(self, number: int, attempt: str, run: str) -> Claim | None:
        """The claim on a part that nobody works on; one that stands still is taken over. None if somebody does."""
        path = self._path(number)
        state = self.state(number)
        if state == STALE:
            self._clear(number, attempt)
        elif state != FREE:
            return None
        content = {"attempt": attempt, "run": run, "place": _place(), "pid": os.getpid(), "start": _start(os.getpid())}
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW, 0o666)
        except FileExistsError:
            return None
        with os.fdopen(descriptor, "w") as stream:
            json.dump(content := {**content, "beats": 0}, stream)
        return Claim(path, content)

    def state(self, number: int) -> str:
        """FREE, HELD by somebody, MOVING (its counter rose while we looked), or STALE."""
        path = self._path(number)
        if not os.path.lexists(path):
            self._seen.pop(number, None)
            return FREE
        content, now = _read(path), time.monotonic()
        if content and content.get("place") == _place() and _start(content.get("pid")) != content.get("start"):
            return STALE  # of a process of this machine that has ended
        before = self._seen.get(number)
        if before is None or before[0] != content:
            self._seen[number] = content, now, before is not None
            return HELD if before is None else MOVING
        if now - before[1] > self._stale_seconds:
            return STALE
        return MOVING if before[2] else HELD

    def clear_run(self, run: str) -> None:
        """Remove the claims of a run of which nothing is left alive, with what its attempts had written."""
        for name in os.listdir(self._plan.folder / "claims"):
            if name.endswith(".json") and (_read(self._plan.folder / "claims" / name) or {}).get("run") == run:
                self._clear(int(name.split(".")[0]), run)

    def _clear(self, number: int, by: str) -> None:
        """Remove a claim; of several processes that do so, one finds it. In between it may be a new one: then two work
        on the part."""
        path = self._path(number)
        gone = path.with_name(f".{number:05d}.{by}.gone")
        try:
            os.rename(path, gone)
        except FileNotFoundError:
            return
        attempt = (_read(gone) or {}).get("attempt")
        gone.unlink(missing_ok=True)
        self._seen.pop(number, None)
        if isinstance(attempt, str) and attempt.isalnum():
            shutil.rmtree(self._plan.folder / "attempts" / attempt, ignore_errors=True)

    def _path(self, number: int) -> Path:
        return self._plan.folder / "claims" / f"{number:05d}.json"


def read_claim(plan: Plan, number: int) -> dict[str, Any]:
    """What the owner of a part shows of its state; empty where there is none."""
    return _read(plan.folder / "claims" / f"{number:05d}.json") or {}


def _read(path: Path) -> dict[str, Any] | None:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as stream:
            content = json.loads(stream.read(100_000))
    except (OSError, ValueError):  # not there, or being written at this moment
        return None
    return content if isinstance(content, dict) else None


def _place() -> str:
    """Where a process number means the same: a machine since its start, and a container of it."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # no Linux: only standing still tells
        return f"{socket.gethostname()} {os.getpid()}"


def _start(pid: Any) -> str | None:
    """When a process of this machine was started, in ticks since the machine was; None if it is not there."""
    try:
        fields = Path(f"/proc/{int(pid)}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] == "Z" else fields[19]
    except (OSError, ValueError, TypeError, IndexError):
        return None
