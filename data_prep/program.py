"""How a program ends whose output nobody reads (`| head`), or finds no room on the disk."""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Callable
from typing import Any, NoReturn, TextIO

EXIT_UNREAD = 141  # what a shell says of a program that SIGPIPE ended


def run_program(main: Callable[[], int]) -> NoReturn:
    """Run ``main`` and end the process with the code it returns.

    A reader that goes away ends the program without a word; a file or output that can't be read or written is one line
    and code 2, Ctrl-C one and 130. What the terminal's encoding lacks, or is no text in a file's name, is printed with
    escapes.
    """
    print_anything()
    try:
        code = main()
    except OSError as error:
        if isinstance(error, BrokenPipeError) and not _unread():
            raise
        code = _explained(error)
    except SystemExit as ended:  # after --help, say
        code = ended.code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    sys.exit(_flushed(code))


def _flushed(code: Any) -> Any:
    try:
        sys.stdout.flush()
        return code
    except OSError as error:
        _drop(sys.stdout)
        return _explained(error)


def _explained(error: OSError) -> int:
    if isinstance(error, BrokenPipeError):
        return EXIT_UNREAD
    place = f"{error.filename}: " if error.filename else ""
    print(f"error: {place}{error.strerror or error}", file=sys.stderr)
    return 2


def print_anything() -> None:
    """Print what the encoding of stdout and stderr lacks with escapes, as stderr does by default."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def outlive_readers() -> None:
    """From now on this process prints to nobody once stdout or stderr can't be written: a long run goes on."""
    print_anything()
    sys.stdout, sys.stderr = _Outliving(sys.stdout), _Outliving(sys.stderr)  # type: ignore[assignment]


class _Outliving:
    """A stream that gives up its file at the first error of writing."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            _drop(self._stream)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            _drop(self._stream)


def _drop(stream: Any) -> None:
    """Lead a stream to /dev/null, with what it still holds: the interpreter flushes it at its end."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)


def _unread() -> bool:
    """Whether the reader of stdout is gone, so that a broken pipe is that one."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    except (OSError, ValueError):
        return False
