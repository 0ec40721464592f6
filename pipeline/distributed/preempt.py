"""Turns the signals of schedulers and of Ctrl-C into a flag that the loop polls at safe points."""

from __future__ import annotations

import os
import signal
from types import FrameType

EXIT_PREEMPTED = 75
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """A request to stop, set by SIGTERM, SIGUSR1 or SIGINT; a second SIGINT ends the process at once.

    Loader workers inherit the handlers but ignore the signals: their rank decides when to stop.
    """

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._owner = os.getpid()

    @property
    def requested(self) -> bool:
        return self.signal_name is not None

    def listen(self) -> StopRequest:
        """Install the handlers (main thread only)."""
        for number in SIGNALS:
            signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        again = self.signal_name == name
        self.signal_name = name
        if os.getpid() != self._owner:
            return
        if again and number == signal.SIGINT:
            os._exit(128 + number)
        os.write(2, f"{name}: stopping after this step\n".encode())  # print is not safe in a handler
