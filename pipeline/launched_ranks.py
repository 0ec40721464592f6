"""Finds the training processes that a launcher has started: they are told to stop, the launcher would kill them."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path


def launched_ranks(group: int) -> list[int]:
    """Training processes of a process group (Linux), without the loader processes that they started."""
    parents: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            _, parent, process_group = (folder / "stat").read_text().rsplit(")", 1)[1].split()[:3]
            command = (folder / "cmdline").read_bytes().split(b"\0")[:4]
            if int(process_group) == group and any(word.endswith(b"pipeline/train.py") for word in command):
                parents[int(folder.name)] = int(parent)
    return [process for process, parent in parents.items() if parent not in parents]
