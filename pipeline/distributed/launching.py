"""Helps programs that launch ranks: a port at which they meet, and their process ids."""

from __future__ import annotations

import socket
from contextlib import suppress
from pathlib import Path


def reserve_port() -> tuple[socket.socket, dict[str, str]]:
    """A socket that listens at a port of this host that the system chose, and the variables by which ranks find it.

    Rank 0 must inherit the socket, by a fork or as one of ``pass_fds``; the launcher closes its own after that.
    """
    listening = socket.create_server(("127.0.0.1", 0), backlog=1024)
    listening.set_inheritable(True)
    address, port = listening.getsockname()
    return listening, {
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
        "MASTER_LISTEN_FD": str(listening.fileno()),
    }


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
