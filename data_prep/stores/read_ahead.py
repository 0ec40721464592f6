"""Fetches what is read next in a few threads, so that a reader does not wait for each answer of a store."""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

THREADS = 8  # no more than connections of a store's pool: queued requests grow stale
HELD = 16  # answers that are fetched or held at a time


class ReadAhead:
    """Jobs by key, begun in their order, ``HELD`` at a time, and taken by key. A forked or pickled copy has none."""

    def __init__(self) -> None:
        self._reset()

    def expect(self, jobs: Iterable[tuple[Hashable, Callable[[], Any]]]) -> None:
        """Begin with ``jobs``; those of before that nobody took are forgotten."""
        if self._pid != os.getpid():
            self._reset()
        for future in self._begun.values():
            future.cancel()
        self._begun.clear()
        self._waiting = deque(jobs)
        self._fill()

    def take(self, key: Hashable) -> Any:
        """What the job gave, waiting for it; None where none was begun. Raises as the job did."""
        if self._pid != os.getpid():
            self._reset()
        future = self._begun.pop(key, None)
        if future is None:
            return None
        try:
            return future.result()
        finally:
            self._fill()

    def close(self) -> None:
        if self._threads is not None and self._pid == os.getpid() and not sys.is_finalizing():
            self._threads.shutdown(wait=False, cancel_futures=True)
        self._reset()

    def __reduce__(self) -> tuple:
        return ReadAhead, ()

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._waiting: deque[tuple[Hashable, Callable[[], Any]]] = deque()
        self._begun: dict[Hashable, Future] = {}
        self._threads: ThreadPoolExecutor | None = None

    def _fill(self) -> None:
        while self._waiting and len(self._begun) < HELD:
            if self._threads is None:
                self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="read-ahead")
            key, job = self._waiting.popleft()
            self._begun[key] = self._threads.submit(job)
