"""Helps programs that launch ranks: finds a free port for the rendezvous, and the process ids of the ranks."""

from __future__ import annotations

import socket
from contextlib import suppress
from pathlib import Path


def free_port() -> int:
    """A TCP port of this machine that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launched_ranks(group: int) -> list[int]:
    """Process ids of the ranks in a process group (Linux), loader workers left out.

    Send signals to these: a launcher that gets a signal kills its ranks.
    """
    parents: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            _, parent, process_group = (folder / "stat").read_text().rsplit(")", 1)[1].split()[:3]
            command = (folder / "cmdline").read_bytes().split(b"\0")[:4]
            if int(process_group) == group and any(word.endswith(b"pipeline/train.py") for word in command):
                parents[int(folder.name)] = int(parent)
    return [process for process, parent in parents.items() if parent not in parents]
