"""Takes Ctrl-C and Ctrl-Z of a terminal in place of a launcher that would die of them, and gives them to its ranks.

Ctrl-C goes to every process of the terminal's foreground group. DeepSpeed's launcher ends by it at once, with a
traceback, while its ranks still save. Therefore a process of its own, started by the first rank of the node, makes
itself the foreground group whenever the launcher's group is, and passes on what is typed: Ctrl-C to the ranks alone.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

TERMINAL = "/dev/tty"  # the controlling terminal of whoever opens it
POLL_SECONDS = 0.25
ENDING_SECONDS = 5.0  # for a launcher to end by itself after its last rank
TYPED = (signal.SIGINT, signal.SIGTSTP, signal.SIGQUIT, signal.SIGHUP)


def keep_launcher_from_keys(environment: Mapping[str, str] = os.environ) -> None:
    """Start the process, if this one is the first rank on its node and was started by a launcher on a terminal.

    It ends with the launcher. To be called early: until then Ctrl-C reaches the launcher.
    """
    from pipeline.distributed.places import discover

    try:
        place = discover(environment)
    except ValueError:  # said by whoever needs the place
        return
    if place.launcher not in ("environment", "mpi") or place.local_rank != 0 or not _shares_terminal(os.getppid()):
        return
    subprocess.Popen(
        [sys.executable, "-I", "-S", __file__, str(os.getppid()), sys.argv[0]],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        process_group=0,
    )


def _shares_terminal(launcher: int) -> bool:
    """Whether this process has a terminal, and the launcher has the same."""
    try:
        os.close(os.open(TERMINAL, os.O_RDWR | os.O_NOCTTY))
        return os.getsid(launcher) == os.getsid(0)
    except OSError:
        return False


def hold(launcher: int, program: str) -> None:
    """What the process does until the launcher has ended."""
    terminal = os.open(TERMINAL, os.O_RDWR | os.O_NOCTTY)
    group, own = os.getpgid(launcher), os.getpgrp()
    signals = {*TYPED, signal.SIGTERM, signal.SIGTTOU, signal.SIGTTIN}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # SIGTTOU: or the group could not be changed from behind
    ranks_seen = time.monotonic()
    try:
        while (state := _state(launcher)) not in ("", "Z"):
            if state != "T" and os.tcgetpgrp(terminal) == group:
                os.tcsetpgrp(terminal, own)
            typed = signal.sigtimedwait(signals, POLL_SECONDS)
            ranks = _ranks(launcher, program)
            ranks_seen = time.monotonic() if ranks else ranks_seen
            if typed is None:
                continue
            if typed.si_signo == signal.SIGTERM:  # of the launcher, which ends what its ranks have started
                return
            if typed.si_signo == signal.SIGINT and time.monotonic() - ranks_seen < ENDING_SECONDS:
                for rank in ranks:
                    _send(rank, signal.SIGINT)
            elif typed.si_signo in TYPED:
                if typed.si_signo == signal.SIGTSTP and os.tcgetpgrp(terminal) == own:
                    os.tcsetpgrp(terminal, group)  # the shell's job is the launcher's group
                _send(-group, typed.si_signo)
                time.sleep(POLL_SECONDS)  # until it is stopped
    except OSError:  # the terminal is gone
        pass
    finally:
        _give_back(terminal, group, own)


def _give_back(terminal: int, group: int, own: int) -> None:
    """The terminal to the launcher's group, where a script may go on; an interactive shell takes it by itself."""
    try:
        if os.tcgetpgrp(terminal) == own:
            os.tcsetpgrp(terminal, group)
    except OSError:
        pass  # nobody is left in it


def _ranks(launcher: int, program: str) -> list[int]:
    """Processes that the launcher has started with this program."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int(_status(int(folder.name))[1])
            if parent == launcher and program.encode() in (folder / "cmdline").read_bytes().split(b"\0"):
                found.append(int(folder.name))
        except (OSError, IndexError):
            continue  # it has ended meanwhile
    return found


def _state(process: int) -> str:
    """One letter of the kernel's, as "T" for stopped; empty where there is no such process."""
    return (_status(process) or [""])[0]


def _status(process: int) -> list[str]:
    """What stands behind the name in /proc/PROCESS/stat: state, parent, group, ..."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return []


def _send(process: int, number: int) -> None:
    try:
        os.kill(process, number)
    except ProcessLookupError:
        pass


if __name__ == "__main__":
    hold(int(sys.argv[1]), sys.argv[2])
