"""Files of JSON lines that carry a step: appended a line at a time, cut back when a run goes back to a checkpoint."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_prep.manifest import write_atomically


class StepLines:
    """Appends records to one file; each is out of the process at once, so a kill tears the last line at most.

    A last line that a kill left torn is cut off when the file is opened. A full disk loses lines, with an alarm on
    stderr, and not the run.
    """

    def __init__(self, path: Path) -> None:
        self._file: int | None = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        self._path, self._torn = path, False
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.ftruncate(self._file, whole)

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record by a single write; nothing once closed."""
        if self._file is None:
            return
        line = (json.dumps(record) + "\n").encode()
        try:
            whole = os.write(self._file, b"\n" + line if self._torn else line) >= len(line)
            reason = "No space left on device"
        except OSError as error:
            whole, reason = False, str(error)
        if not whole and not self._torn:
            print(f"ALARM: {self._path} loses lines: {reason}; the run goes on", file=sys.stderr, flush=True)
        self._torn = not whole

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


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
