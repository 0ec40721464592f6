"""A map over processes that keeps the order and holds a bounded number of items in memory."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, TypeVar

from data_prep.held_signals import held_signals

Item = TypeVar("Item")
Result = TypeVar("Result")
_MOMENT_SECONDS = 0.1


class Workers:
    """Context manager: processes for maps that follow each other; one worker means this process."""

    def __init__(self, number: int) -> None:
        self._number = number
        self._executor: ProcessPoolExecutor | None = None

    def __enter__(self) -> Workers:
        if self._number > 1:
            # spawn, not fork: the parent may hold threads (pyarrow), and a forked copy of a locked lock never opens.
            context = multiprocessing.get_context("spawn")
            with held_signals():
                self._executor = ProcessPoolExecutor(self._number, mp_context=context, initializer=_ignore_interrupt)
        return self

    def start(self, function: Callable) -> None:
        """Start the processes, and let them import what ``function`` needs while this one does something else."""
        for _ in range(self._number if self._executor else 0):
            self._submit(function, [])

    def map(self, function: Callable[[Item], Result], items: Iterable[Item], chunk_size: int = 32) -> Iterator[Result]:
        """As ``ordered_map``."""
        if self._executor is None:
            yield from map(function, items)
            return
        try:
            pending: deque = deque()
            for chunk in _chunks(items, chunk_size):
                pending.append(self._submit(function, chunk))
                if len(pending) >= 3 * self._number:
                    yield from _result(pending.popleft())
            while pending:
                yield from _result(pending.popleft())
        except BrokenProcessPool as error:
            raise ChildProcessError("a worker process died (out of memory?); give fewer --workers") from error

    def _submit(self, function: Callable[[Item], Result], chunk: list[Item]) -> Future:
        assert self._executor is not None
        with held_signals(), _interrupts_blocked():  # it starts processes as they are needed
            return self._executor.submit(_run_chunk, function, chunk)

    def __exit__(self, *_: object) -> None:
        if self._executor is not None:
            with held_signals():
                self._executor.shutdown(wait=True, cancel_futures=True)


def ordered_map(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int | Workers, chunk_size: int = 32
) -> Iterator[Result]:
    """``map(function, items)`` in ``workers`` processes; ``function`` must pickle. One worker means this process.

    Raises ChildProcessError when a worker dies.
    """
    if isinstance(workers, Workers):
        yield from workers.map(function, items, chunk_size)
        return
    with Workers(workers) as processes:
        yield from processes.map(function, items, chunk_size)


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Processes that are started within begin without Ctrl-C, which may come before they can ignore it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _result(future: Future) -> Any:
    while True:
        with held_signals():  # for a moment each time: an interrupt must not wait for the result
            if wait([future], _MOMENT_SECONDS).done:
                return future.result()


def default_workers() -> int:
    """One process per core that this one may run on: of a machine a job may have a part only."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _chunks(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    iterator = iter(items)
    return iter(lambda: list(itertools.islice(iterator, size)), [])


def _run_chunk(function: Callable[[Item], Result], chunk: list[Item]) -> list[Result]:
    return list(map(function, chunk))


def _ignore_interrupt() -> None:
    """Ignore Ctrl-C in a worker: the terminal sends it to the parent too, which ends the workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
