"""What ranks that work each by itself tell each other through their store: that all are to stop, how far they are."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from pipeline.distributed.ranks import Agreement
from pipeline.distributed.rendezvous import SILENCE

POLL_SECONDS = 0.1


class Board:
    """Counters and a wish to stop that every rank can see at any time, without waiting for another rank."""

    def __init__(self, store: Any, agreement: Agreement, silence: timedelta = SILENCE) -> None:
        """``store``: the one at which the ranks met, None for a rank alone; every rank must call it."""
        self._store, self._world_size, self._silence = store, agreement.world_size, silence.total_seconds()
        self._prefix = agreement.from_main(f"board {secrets.token_hex(8)}: ")  # a restarted job may find an old store
        self._done, self._is_stopped = 0, False

    def advance(self, count: int) -> int:
        """Note that ``count`` further items are done; the number done by all ranks so far."""
        if self._store is None:
            self._done += count
            return self._done
        return self._store.add(f"{self._prefix}done", count)

    def stopped(self, told_to_stop: bool) -> bool:
        """Whether this rank, or any other one, was told to stop."""
        if self._store is None or self._is_stopped:
            return told_to_stop or self._is_stopped
        if told_to_stop:
            self._store.set(f"{self._prefix}stop", "")
        self._is_stopped = told_to_stop or self._store.check([f"{self._prefix}stop"])
        return self._is_stopped

    def wait_for_all(self, name: str, told_to_stop: Callable[[], bool] = lambda: False) -> None:
        """Return when all ranks have called it for the same ``name``, which may take as long as one of them gets on.

        Meanwhile ``told_to_stop`` is asked for this rank, and told to the others.

        Raises:
            RuntimeError: no item was done within ``silence``; ``endings.silent_rank`` knows it.
        """
        if self._store is None:
            return
        self._store.add(f"{self._prefix}{name}", 1)
        done, moved = -1, time.monotonic()
        while self._store.add(f"{self._prefix}{name}", 0) < self._world_size:
            self.stopped(told_to_stop())
            if (now_done := self.advance(0)) != done:
                done, moved = now_done, time.monotonic()
            if time.monotonic() > moved + self._silence:
                raise RuntimeError(f"Timed out waiting for the other ranks: nothing was done for {self._silence:g} s")
            time.sleep(POLL_SECONDS)
