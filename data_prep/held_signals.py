"""Signals that wait until locks are free: a handler that raises in the middle of an acquisition leaves it locked."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

RAISING = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def held_signals() -> Iterator[None]:
    """Within, SIGINT and SIGTERM are only noted; the first of them is raised again at the end.

    Python's locks with a Python-level ``__enter__`` (``threading.Condition``, so every queue, future and pool) stay
    taken for ever when a handler raises between the acquisition and the ``with`` block.
    """
    if threading.current_thread() is not threading.main_thread():  # handlers run in the main thread only
        yield
        return
    noted: list[int] = []
    before = {number: signal.getsignal(number) for number in RAISING}
    before = {number: handler for number, handler in before.items() if handler is not None}  # None: not Python's
    for number in before:
        signal.signal(number, lambda number, _: noted.append(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in noted[:1]:
            signal.raise_signal(number)
