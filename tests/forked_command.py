"""A command line of ours in a fork of this warm process: as a fresh interpreter runs it, without 13 s of imports."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import select
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import torch

REPOSITORY = Path(__file__).resolve().parents[1]


class Forked:
    """A forked process with the members of ``subprocess.Popen`` that programs of ours use."""

    def __init__(self, command: list[str], pid: int) -> None:
        self.command, self.pid, self.returncode = command, pid, None

    def poll(self) -> int | None:
        return self._collect(os.WNOHANG)

    def wait(self, timeout: float | None = None) -> int:
        """The exit code; raises TimeoutExpired after ``timeout`` seconds."""
        if self.returncode is None:
            ended = os.pidfd_open(self.pid)
            try:
                if not select.select([ended], [], [], timeout)[0]:
                    raise subprocess.TimeoutExpired(self.command, timeout)
            finally:
                os.close(ended)
        return self._collect(0)

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def _collect(self, flags: int) -> int | None:
        if self.returncode is None and (found := os.waitpid(self.pid, flags))[0]:
            self.returncode = os.waitstatus_to_exitcode(found[1])
        return self.returncode


def finish(
    command: list[str], folder: Path, seconds: float = 100, prepare: Callable[[], object] = lambda: None
) -> subprocess.CompletedProcess[str]:
    """Like ``subprocess.run`` of ``[python, FILE, ...]`` or ``[python, "-m", MODULE, ...]`` in ``folder``.

    ``prepare`` is called in the child first. Raises TimeoutExpired, and ends the child, after ``seconds``.
    """
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as error:
        child = start(command, folder, out.fileno(), error.fileno(), prepare=prepare)
        try:
            child.wait(seconds)
        finally:
            child.send_signal(signal.SIGKILL)
            child.wait()
            out.seek(0)
            error.seek(0)
        return subprocess.CompletedProcess(command, child.returncode, out.read(), error.read())


def start(
    command: list[str],
    folder: Path,
    out: int,
    error: int,
    environment: Mapping[str, str] | None = None,
    prepare: Callable[[], object] = lambda: None,
    new_session: bool = False,
) -> Forked:
    """Start a command as ``finish`` does; what it prints goes to the file descriptors ``out`` and ``error``."""
    warm()
    assert command[0] == sys.executable
    if command[1] == "-m":
        module, arguments = command[2], command[3:]
        module += ".__main__" if hasattr(importlib.import_module(module), "__path__") else ""
    else:
        file, *arguments = command[1:]
        module = ".".join(Path(file).relative_to(REPOSITORY).with_suffix("").parts)
    main = importlib.import_module(module).main

    def run() -> int | None:
        if new_session:
            os.setsid()
        sys.argv = [module, *arguments]
        os.environ.update(environment or {})
        os.chdir(folder)
        prepare()
        return main(list(arguments))

    return Forked(command, fork(run, out, error))


def fork(function: Callable[[], int | None], out: int | None = None, error: int | None = None) -> int:
    """Process id of a fork that calls ``function`` and exits with what it returns; a traceback is printed, code 1."""
    child = os.fork()
    if child:
        return child
    code = 99
    try:
        for target, stream in ((1, out), (2, error)):
            if stream is not None:
                os.dup2(stream, target)
        # Not closed when a fork of this fork puts its own in their place.
        sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
        torch.set_num_threads(1)
        multiprocessing.process._children.clear()  # the parent's, if any
        code = function() or 0
    except SystemExit as ending:  # of argparse
        code = ending.code if isinstance(ending.code, int) else 1
    except BaseException:  # a fork must never return into pytest
        traceback.print_exc()
        code = 1
    finally:
        with suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def warm() -> None:
    """Imports here, once for every fork, what a training loads."""
    import deepspeed.runtime.zero.muon.original_muon  # noqa: F401  with torch's compiler
    from transformers import PreTrainedTokenizerFast  # noqa: F401

    import pipeline.training.loop  # noqa: F401
