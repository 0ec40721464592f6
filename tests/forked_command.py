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
from collections.abc import Callable
from pathlib import Path

import torch

REPOSITORY = Path(__file__).resolve().parents[1]


def finish(
    command: list[str], folder: Path, seconds: float = 100, prepare: Callable[[], object] | None = None
) -> subprocess.CompletedProcess[str]:
    """Like ``subprocess.run`` of ``[python, FILE, ...]`` or ``[python, "-m", MODULE, ...]`` in ``folder``.

    ``prepare`` is called in the child first. Raises TimeoutExpired, and ends the child, after ``seconds``.
    """
    warm()
    module, arguments = _module(command)
    main = importlib.import_module(module).main
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as error:
        child = os.fork()
        if child == 0:
            _run(main, [module, *arguments], folder, (out.fileno(), error.fileno()), prepare)
        code = _wait(child, seconds)
        out.seek(0)
        error.seek(0)
        if code is None:
            raise subprocess.TimeoutExpired(command, seconds, out.read(), error.read())
        return subprocess.CompletedProcess(command, code, out.read(), error.read())


def warm() -> None:
    """Imports here, once for every fork, what a training loads."""
    import deepspeed.runtime.zero.muon.original_muon  # noqa: F401  with torch's compiler
    import matplotlib.backends.backend_svg
    import matplotlib.figure  # noqa: F401
    from transformers import PreTrainedTokenizerFast  # noqa: F401

    import pipeline.training.loop  # noqa: F401


def _module(command: list[str]) -> tuple[str, list[str]]:
    assert command[0] == sys.executable
    if command[1] == "-m":
        return command[2], command[3:]
    return ".".join(Path(command[1]).relative_to(REPOSITORY).with_suffix("").parts), command[2:]


def _wait(child: int, seconds: float) -> int | None:
    """The exit code; None after ``seconds``, when the child is killed."""
    ended = os.pidfd_open(child)
    try:
        in_time = bool(select.select([ended], [], [], seconds)[0])
    finally:
        os.close(ended)
    if not in_time:
        os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return code if in_time else None


def _run(
    main: Callable[[list[str]], int],
    words: list[str],
    folder: Path,
    streams: tuple[int, int],
    prepare: Callable[[], object] | None,
) -> None:
    code = 99
    try:
        for target, stream in enumerate(streams, start=1):
            os.dup2(stream, target)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        sys.argv = words
        os.chdir(folder)
        torch.set_num_threads(1)
        multiprocessing.process._children.clear()  # the parent's, if any
        if prepare is not None:
            prepare()
        code = main(words[1:])
    except SystemExit as error:  # of argparse
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:  # a fork must never return into pytest: said, and exit code 1 as python's
        traceback.print_exc()
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 0)
