"""Files of JSON lines that carry a step: appended a line at a time, cut back when a run goes back to a checkpoint."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_prep.manifest import write_atomically


class StepLines:
    """Appends records to one file; each is out of the process at once, so a kill tears the last line at most.

    A last line that a kill left torn is cut off when the file is opened, at the first line. A disk that is full, cannot
    be written or is gone loses lines, with an alarm on stderr, and not the run; each line tries again.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._file, self._closed = path, -1, False
        self._torn = self._losing = False

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record by a single write; nothing once closed."""
        if self._closed:
            return
        line = (json.dumps(record) + "\n").encode()
        try:
            if self._file < 0:
                self._file = _open_whole(self._path)
            written = os.write(self._file, b"\n" + line if self._torn else line)
            self._torn = 0 < written < len(line)
            reason = None if written >= len(line) else os.strerror(errno.ENOSPC)
        except OSError as error:
            reason = error.strerror
        if reason is not None and not self._losing:
            print(f"ALARM: {self._path} loses lines: {reason}; the run goes on", file=sys.stderr, flush=True)
        self._losing = reason is not None

    def close(self) -> None:
        self._closed = True
        if self._file >= 0:
            with contextlib.suppress(OSError):  # what a network file system could not write, told before
                os.close(self._file)
            self._file = -1


def _open_whole(path: Path) -> int:
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.ftruncate(file, whole)
    return file


def cut_back(path: Path, step: int) -> list[str]:
    """Take the lines of later steps than ``step`` out of a file, in one move, and return them.

    Lines that are torn or carry no step are dropped; a file that is not there has no lines.
    """
    kept: list[str] = []
    overtaken: list[str] = []
    torn = 0
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    for line in text.splitlines(keepends=True):
        found = step_of(line) if line.endswith("\n") else None
        if found is None:
            torn += 1
        else:
            (kept if found <= step else overtaken).append(line)
    if overtaken or torn:
        write_atomically(path, "".join(kept))
    return overtaken


def step_of(line: str) -> int | None:
    """The step of a line, None if the line is torn or has none."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    found = record.get("step") if isinstance(record, dict) else None
    return found if isinstance(found, int) else None
