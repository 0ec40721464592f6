"""Locks a run folder against a second training; the kernel releases the lock when the process ends, however it ends."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import sys
import time
from pathlib import Path

NAME = "lock.json"
WAIT_SECONDS = 20.0  # a process that is being killed may still hold it
_NOT_SUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def lock_run(run: Path, wait_seconds: float = WAIT_SECONDS, doing: str = "trained") -> int | None:
    """Take the lock of a run folder; the returned file descriptor holds it until it is closed or the process ends.

    It guards against ranks that train on for a while after their launcher was killed. Returns None, with a warning,
    where the file system has no locks. ``doing`` says in messages what is done there.

    Raises:
        ValueError: the folder can't be written, or another process still holds the lock after ``wait_seconds``.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
        file = os.open(run / NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise ValueError(
            f"--output {run}: can't be written ({error.strerror}); name a folder on a disk with room that you may write"
        ) from None
    deadline = time.monotonic() + wait_seconds
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() < deadline:
                time.sleep(0.2)
                continue
            raise ValueError(
                f"{run} is being {doing} by {_holder(run)}; wait for it, stop it, or use another --output"
            ) from None
        except OSError as error:
            os.close(file)
            if error.errno not in _NOT_SUPPORTED:
                raise
            print(f"{run}: no lock on this file system ({error.strerror}): start only one run here", file=sys.stderr)
            return None
    os.ftruncate(file, 0)
    os.pwrite(file, json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode(), 0)
    return file


def _holder(run: Path) -> str:
    try:
        holder = json.loads((run / NAME).read_text(encoding="utf-8"))
        return f"process {holder['pid']} on {holder['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
