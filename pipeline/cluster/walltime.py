"""When a run must stop to be saved before its job's time is over."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping

VARIABLE = "OPENFLM_END_TIME"  # seconds since 1970, from the job's script
MARGIN_SECONDS = 15.0  # for what follows the last save: the report, the end of the processes
REMEMBERED = 20


class Walltime:
    """Tells rank 0 that the run must stop; the ranks agree on it as on a signal.

    It is asked wherever a signal is polled: the longest time between two questions of late is what one more step, or
    one more batch of an evaluation, may take.
    """

    def __init__(
        self, end_time: float, save_seconds: Callable[[], float], clock: Callable[[], float] = time.time
    ) -> None:
        """``end_time``: seconds since 1970; ``save_seconds``: what a save that begins now may take."""
        self._end, self._save_seconds, self._clock = end_time, save_seconds, clock
        self._asked: float | None = None
        self._pauses: deque[float] = deque(maxlen=REMEMBERED)

    def is_up(self) -> bool:
        """Whether what is left is less than the rest of this step, one more, a save and the margin."""
        now = self._clock()
        if self._asked is not None:
            self._pauses.append(now - self._asked)
        self._asked = now
        return self._end - now < 2 * max(self._pauses, default=0.0) + self._save_seconds() + MARGIN_SECONDS


def end_time(environment: Mapping[str, str], now: float) -> float | None:
    """When the job's time is over, in seconds since 1970; None where it has no end, or one that is past.

    Raises:
        ValueError: the variable is no time.
    """
    text = environment.get(VARIABLE, "").strip()
    if not text:
        return None
    if not text.isdecimal():
        raise ValueError(f"{VARIABLE}: found {text!r}, expected seconds since 1970, as of `date +%s`; or unset it")
    return float(text) if float(text) > now else None
