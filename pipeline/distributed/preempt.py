"""Turns the signals of schedulers and of Ctrl-C into a flag that the loop polls, or, before that, into the end."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from pipeline.distributed.places import discover

EXIT_PREEMPTED = 75
EXIT_INTERRUPTED = 130  # what a shell says of a program that Ctrl-C ended
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
TIME_LIMIT = "the job's time limit"  # beside the names of signals
UNWIND_SECONDS = 10.0  # for the main thread to end by itself, which it cannot while it waits inside a library


class Stopped(BaseException):
    """Told to stop while there is nothing to save: no Exception, so that nobody takes it for a failure of his own."""

    def __init__(self, signal_name: str) -> None:
        super().__init__(f"told to stop by {signal_name} before the first step: nothing to save")
        self.by_keyboard = signal_name == "SIGINT"


class StopRequest:
    """A request to stop, set by SIGTERM, SIGUSR1, SIGINT or the end of the job's time; a second SIGINT ends the
    process at once, whatever the main thread does.

    With ``at_once`` a signal raises Stopped in the main thread, wherever it is, until ``poll_from_here``. If the main
    thread does not end by that within ``UNWIND_SECONDS``, a thread calls ``when_stuck`` with the error.

    Loader workers inherit the handlers but ignore the signals: their rank decides when to stop.
    """

    def __init__(self, ends: str = "after this step") -> None:
        """``ends`` says when the process will have stopped."""
        self.signal_name: str | None = None
        self.when_stuck: Callable[[Stopped], None] = _end
        self.time_is_up: Callable[[], bool] = lambda: False  # asked whenever somebody polls
        self._ends = ends
        self._at_once = self._deaf = False
        self._owner = os.getpid()
        self._before: dict[int, Any] = {}
        self._forking = threading.local()
        self._wakeup = -1  # the end of a pipe that the kernel's handler writes to, even where Python's can't run

    @property
    def requested(self) -> bool:
        if self.signal_name is None and self.time_is_up():
            self.signal_name = TIME_LIMIT
            if _speaks():
                _write(f"{TIME_LIMIT}: stopping {self._ends}")
        return self.signal_name is not None

    def listen(self, at_once: bool = False) -> StopRequest:
        """Install the handlers (main thread only)."""
        self._at_once = at_once
        for number in SIGNALS:
            self._before.setdefault(number, signal.signal(number, self._note))
        read_end, self._wakeup = os.pipe()
        os.set_blocking(self._wakeup, False)
        signal.set_wakeup_fd(self._wakeup, warn_on_full_buffer=False)
        os.register_at_fork(before=self._hold, after_in_child=self._leave_to_parent, after_in_parent=self._release)
        threading.Thread(target=self._see_to_it, args=(read_end,), daemon=True, name="signals").start()
        return self

    def poll_from_here(self) -> None:
        """From now on a signal only sets the flag, which somebody polls."""
        self._at_once = False

    def ignore(self) -> None:
        """From now on signals change nothing: the process is about to end, with a code of its own."""
        self.poll_from_here()
        self._deaf = True
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def close(self) -> None:
        """Listen no more; what listened before does again."""
        self.poll_from_here()
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._wakeup >= 0:
            signal.set_wakeup_fd(-1)
            os.close(self._wakeup)
            self._wakeup = -1

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:
            return
        name = signal.Signals(number).name
        again, self.signal_name = self.signal_name == name, name
        if self._at_once and not again:  # launchers send it more than once, and the end must not be disturbed
            raise Stopped(name)

    def _see_to_it(self, read_end: int) -> None:
        """The thread: says that a signal came, and ends the process by the second SIGINT."""
        interrupts = 0
        while numbers := os.read(read_end, 64):
            for number in numbers:
                if number not in SIGNALS or self._deaf:
                    continue
                interrupts += number == signal.SIGINT
                if interrupts > 1:
                    if _speaks():
                        _write("SIGINT again: ended without saving; the same command goes on")
                    os._exit(EXIT_INTERRUPTED)
                if self._at_once:
                    threading.Thread(target=self._end_if_stuck, args=(number,), daemon=True, name="unwinding").start()
                elif _speaks():
                    more = "; Ctrl-C again ends it at once, without saving" if number == signal.SIGINT else ""
                    _write(f"{signal.Signals(number).name}: stopping {self._ends}{more}")
        os.close(read_end)

    def _end_if_stuck(self, number: int) -> None:
        time.sleep(UNWIND_SECONDS)
        if self._at_once:
            self.when_stuck(Stopped(signal.Signals(number).name))

    def _hold(self) -> None:
        """Before a fork: a signal waits that reaches the new process before it has left the pipe to its parent."""
        self._forking.mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)

    def _release(self) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, self._forking.mask)

    def _leave_to_parent(self) -> None:
        """In a forked process: Ctrl-C reaches the parent by itself, and must not count twice there."""
        if self._wakeup >= 0:
            signal.set_wakeup_fd(-1)
        self._release()


def end_at_once() -> None:
    """Let signals end this process with EXIT_PREEMPTED while it has nothing but imports to do (main thread only)."""
    for number in SIGNALS:
        signal.signal(number, lambda number, _: _end(Stopped(signal.Signals(number).name)))


def _end(stopped: Stopped) -> None:
    if _speaks():
        _write(f"error: {stopped}")
    os._exit(EXIT_PREEMPTED)


def _speaks() -> bool:
    """Whether this process says what concerns all ranks of its node: the first of them does."""
    try:
        return discover(os.environ).local_rank == 0
    except ValueError:
        return True


def _write(line: str) -> None:
    os.write(2, f"{line}\n".encode())  # print is not safe in a handler
