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


def ordered_map(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int, chunk_size: int = 32
) -> Iterator[Result]:
    """``map(function, items)`` in ``workers`` processes; ``function`` must pickle. One worker means this process.

    Raises ChildProcessError when a worker dies.
    """
    if workers <= 1:
        yield from map(function, items)
        return
    chunks = _chunks(items, chunk_size)
    # spawn, not fork: the parent may hold threads (pyarrow), and a forked copy of a locked lock never opens.
    context = multiprocessing.get_context("spawn")
    with held_signals():
        executor = ProcessPoolExecutor(workers, mp_context=context, initializer=_ignore_interrupt)
    try:
        pending: deque = deque()
        for chunk in chunks:
            with held_signals(), _interrupts_blocked():  # it starts workers as they are needed
                pending.append(executor.submit(_run_chunk, function, chunk))
            if len(pending) >= 3 * workers:
                yield from _result(pending.popleft())
        while pending:
            yield from _result(pending.popleft())
    except BrokenProcessPool as error:
        raise ChildProcessError("a worker process died (out of memory?); give fewer --workers") from error
    finally:
        with held_signals():
            executor.shutdown(wait=True, cancel_futures=True)


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
