"""Leaves a caller's process as it was: what libraries change of it while they are imported is put back."""

from __future__ import annotations

import logging
import os
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def untouched() -> Iterator[None]:
    """Around imports and loading: environment variables, filters of warnings, the root logger and signal handlers are
    afterwards what they were before. (Nothing here loads torch.)"""
    variables, root = dict(os.environ), logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    listening = _handlers()
    try:
        with warnings.catch_warnings():
            yield
    finally:
        for name in set(os.environ) - set(variables):
            del os.environ[name]
        for name, value in variables.items():
            if os.environ.get(name) != value:
                os.environ[name] = value
        root.setLevel(level)
        root.handlers[:] = handlers
        for number, handler in _handlers().items():
            if handler is not listening[number] and listening[number] is not None:
                signal.signal(number, listening[number])


def _handlers() -> dict[int, object]:
    """What each signal does; of the main thread only, which alone may change it."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {number: signal.getsignal(number) for number in signal.valid_signals()}
