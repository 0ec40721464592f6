"""Turns the signals of schedulers and of Ctrl-C into a flag that the loop polls, or, before that, into the end."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

EXIT_PREEMPTED = 75
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
TIME_LIMIT = "the job's time limit"  # beside the names of signals
UNWIND_SECONDS = 10.0  # for the main thread to end by itself, which it cannot while it waits inside a library


class Stopped(BaseException):
    """Told to stop while there is nothing to save: no Exception, so that nobody takes it for a failure of his own."""

    def __init__(self, signal_name: str) -> None:
        super().__init__(f"told to stop by {signal_name} before the first step: nothing to save")


class StopRequest:
    """A request to stop, set by SIGTERM, SIGUSR1, SIGINT or the end of the job's time; a second SIGINT ends the
    process at once.

    With ``at_once`` a signal raises Stopped in the main thread, wherever it is, until ``poll_from_here``. If the main
    thread does not end by that within ``UNWIND_SECONDS``, a thread calls ``when_stuck`` with the error.

    Loader workers inherit the handlers but ignore the signals: their rank decides when to stop.
    """

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self.when_stuck: Callable[[Stopped], None] = _end
        self.time_is_up: Callable[[], bool] = lambda: False  # asked whenever somebody polls
        self._at_once = False
        self._owner = os.getpid()
        self._before: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        if self.signal_name is None and self.time_is_up():
            self._say(TIME_LIMIT)
            self.signal_name = TIME_LIMIT
        return self.signal_name is not None

    def listen(self, at_once: bool = False) -> StopRequest:
        """Install the handlers (main thread only)."""
        self._at_once = at_once
        for number in SIGNALS:
            self._before.setdefault(number, signal.signal(number, self._note))
        if at_once:
            read_end, write_end = os.pipe()
            os.set_blocking(write_end, False)
            signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)  # written to even where no handler can run
            threading.Thread(target=self._see_to_it, args=(read_end,), daemon=True, name="signals").start()
        return self

    def poll_from_here(self) -> None:
        """From now on a signal only sets the flag, which somebody polls."""
        self._at_once = False
        signal.set_wakeup_fd(-1)

    def ignore(self) -> None:
        """From now on signals change nothing: the process is about to end, with a code of its own."""
        self.poll_from_here()
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def close(self) -> None:
        """Listen no more; what listened before does again."""
        self.poll_from_here()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        again = self.signal_name == name
        self.signal_name = name
        if os.getpid() != self._owner:
            return
        if again and number == signal.SIGINT:
            os._exit(128 + number)
        if self._at_once:
            if not again:  # launchers send it more than once, and the end must not be disturbed
                raise Stopped(name)
            return
        self._say(name)

    def _say(self, name: str) -> None:
        os.write(2, f"{name}: stopping after this step\n".encode())  # print is not safe in a handler

    def _see_to_it(self, read_end: int) -> None:
        while True:
            numbers = [number for number in os.read(read_end, 64) if number in SIGNALS]
            if numbers and self._at_once:
                time.sleep(UNWIND_SECONDS)
                if self._at_once:
                    self.when_stuck(Stopped(signal.Signals(numbers[0]).name))


def end_at_once() -> None:
    """Let signals end this process with EXIT_PREEMPTED while it has nothing but imports to do (main thread only)."""
    for number in SIGNALS:
        signal.signal(number, lambda number, _: _end(Stopped(signal.Signals(number).name)))


def _end(stopped: Stopped) -> None:
    os.write(2, f"error: {stopped}\n".encode())
    os._exit(EXIT_PREEMPTED)
