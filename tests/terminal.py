"""Commands as a person runs them: by a shell on a terminal, where Ctrl-C and Ctrl-Z are typed."""

from __future__ import annotations

import os
import pty
import select
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

CTRL_C, CTRL_Z = b"\x03", b"\x1a"


def type_into(
    command: str,
    keys: Sequence[tuple[str, bytes]],
    folder: Path,
    environment: dict[str, str] | None = None,
    job_control: bool = True,
    seconds: float = 300,
) -> str:
    """What a terminal shows until bash has run ``command``; each key is typed once its text was shown since the last.

    With ``job_control`` the command is a job of its own, as at a prompt; without, as in a script.
    """
    process, terminal = pty.fork()
    if process == 0:
        os.chdir(folder)
        os.environ.update(environment or {})
        os.execvp("bash", ["bash", "--norc", "-c", ("set -m; " if job_control else "") + command])
    shown, since, waiting, deadline = "", 0, list(keys), time.monotonic() + seconds
    try:
        while time.monotonic() < deadline:
            if waiting and waiting[0][0] in shown[since:]:
                since = len(shown)
                os.write(terminal, waiting.pop(0)[1])
            if not select.select([terminal], [], [], 0.1)[0]:
                continue
            try:
                shown += os.read(terminal, 1 << 16).decode(errors="replace").replace("\r\n", "\n")
            except OSError:  # nobody has the terminal open any more
                return shown
        raise AssertionError(f"not at its end after {seconds:g} s:\n{shown}")
    finally:
        os.close(terminal)
        for number in [int(path.name) for path in Path("/proc").glob("[0-9]*")]:
            with suppress(ProcessLookupError):
                if os.getsid(number) == process:  # whoever was started from this terminal and is left
                    os.kill(number, signal.SIGKILL)
        os.waitpid(process, 0)
