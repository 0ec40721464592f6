"""Says every so often what runs, how far it is, and how long the rest will take."""

from __future__ import annotations

import time
from collections.abc import Sequence

from benchmarks.speedrun.jobs import Job

SHOW_SECONDS = 60.0


class Display:
    """Says every so often what runs, how far it is, and how long the rest will take."""

    def __init__(self, jobs: Sequence[Job], done: int) -> None:
        self._total, self._began, self._shown = len(jobs) + done, time.monotonic(), time.monotonic()
        self._first_left = self._left([], jobs)
        self._running: list[str] = []

    def __call__(self, running: Sequence[Job], waiting: Sequence[Job]) -> None:
        labels = [job.label for job in running]
        now = time.monotonic()
        if labels == self._running and now - self._shown < SHOW_SECONDS:
            return
        self._running, self._shown = labels, now
        left = self._left(running, waiting)
        rate = (self._first_left - left) / (now - self._began) if now > self._began else 0.0
        parts = [f"[{self._total - len(waiting) - len(running)}/{self._total} done]"]
        parts += [f"{job.label}: {job.begun():.0%}" for job in running]
        parts += [f"ETA {_time(left / rate)}"] if rate > 0 else []
        print(" | ".join(parts), flush=True)

    @staticmethod
    def _left(running: Sequence[Job], waiting: Sequence[Job]) -> float:
        return sum(job.work * (1 - job.begun()) for job in [*running, *waiting])


def _time(seconds: float) -> str:
    hours, minutes = divmod(int(seconds / 60 + 0.999), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"
