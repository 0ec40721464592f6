"""Threads that download the rows of one part, in place of the thread pool of img2dataset."""

from __future__ import annotations

import io
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from data_prep.downloading.courtesy import Courtesy
from data_prep.downloading.failures import FirstDownloads, failure_reason
from data_prep.downloading.turns import Row, Turns, host_of

_PUT_SECONDS = 0.2  # after which a thread with a result looks whether anybody still wants it
_RESULTS_PER_THREAD = 2  # that wait for the writer: they are images in memory

Result = tuple[Any, io.BytesIO | None, str | None]  # key, content, error message, as img2dataset wants them


class DownloadTrouble(Exception):
    """None of the first downloads succeeded, for a reason of this machine or its network; the message is for users."""


class PolitePool:
    """Has what img2dataset uses of ``multiprocessing.pool.ThreadPool``; what comes when is decided by ``Turns``.

    ``get`` gives the bytes behind a URL or raises; ``retry_after`` of the error is heeded. ``failing`` is what one pool
    hands on to the next of its process (see ``Turns``).
    """

    def __init__(
        self,
        threads: int,
        get: Callable[[str], bytes],
        courtesy: Courtesy,
        retries: int,
        failing: dict[str, Any] | None = None,
    ) -> None:
        self._failing = failing
        self._num_threads, self._get, self._courtesy, self._retries = threads, get, courtesy, retries
        self._results: queue.Queue[Result | Exception | None] = queue.Queue(_RESULTS_PER_THREAD * threads)
        self._changed = threading.Condition()
        self._closed = False
        self._first: FirstDownloads | None = FirstDownloads()

    def __enter__(self) -> PolitePool:
        return self

    def __exit__(self, *_: object) -> None:
        self.terminate()

    def imap_unordered(self, _: object, rows: Iterable[tuple[Any, str]]) -> Iterator[Result]:
        """(key, content, error message) of every row, as they come. img2dataset's own function is not called.

        Raises DownloadTrouble where the first downloads say that going on is of no use.
        """
        turns = Turns(rows, self._num_threads, self._courtesy, self._retries, failing=self._failing)
        for _number in range(self._num_threads):
            threading.Thread(target=self._work, args=(turns,), daemon=True).start()
        working = self._num_threads
        while working:
            result = self._results.get()
            if isinstance(result, Exception):
                self.terminate()
                raise result
            if result is None:
                working -= 1
            else:
                yield result

    def terminate(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def join(self) -> None:
        """Threads end on their own: each within the bounds of its download."""

    def _work(self, turns: Turns) -> None:
        try:
            while (row := self._next(turns)) is not None:
                content, error = self._download(row)
                self._settle(turns, row, content, error)
            self._put(None)
        except Exception as error:  # a fault of ours: img2dataset's loop, and with it the part, must not wait for ever
            self._put(error)

    def _next(self, turns: Turns) -> Row | None:
        with self._changed:
            while not self._closed:
                found = turns.take()
                if found is None:
                    self._changed.notify_all()  # all rows are done
                elif isinstance(found, Row) and turns.more:
                    self._changed.notify()  # one wakes the next: a thread that settled a row is the first to ask
                if not isinstance(found, float):
                    return found
                self._changed.wait(max(found, 0.001))
        return None

    def _download(self, row: Row) -> tuple[bytes | None, Exception | None]:
        if row.host.given_up:
            return None, None
        try:
            return self._get(row.url), None
        except Exception as error:  # whatever a server can provoke is this row's failure, and is reported as such
            return None, error

    def _settle(self, turns: Turns, row: Row, content: bytes | None, error: Exception | None) -> None:
        if content is None:
            row.error = (str(error) or type(error).__name__) if error else row.error or row.host.given_up
        message = None if content is not None else row.error
        with self._changed:
            reason = None if message is None else failure_reason(message)
            final = turns.settle(row, reason, getattr(error, "retry_after", None))
            trouble = self._look(row, message)
        if trouble is not None:
            self._put(DownloadTrouble(trouble))
        if final:
            self._put((row.key, None if content is None else io.BytesIO(content), message))

    def _look(self, row: Row, message: str | None) -> str | None:
        if self._first is None or row.tries > 1 or row.host.given_up:
            return None
        if message is None:
            self._first = None  # the network is there
            return None
        return self._first.add(host_of(row.url), message)

    def _put(self, result: Result | Exception | None) -> None:
        while not self._closed:
            try:
                self._results.put(result, timeout=_PUT_SECONDS)
                return
            except queue.Full:
                continue  # the writer is slower than we are
