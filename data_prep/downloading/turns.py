"""Decides which row is downloaded next: hosts are spared, and what failed for now comes again later."""

from __future__ import annotations

import heapq
import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from data_prep.downloading.addresses import FetchError, split_url
from data_prep.downloading.courtesy import Courtesy
from data_prep.downloading.failures import can_change

PAUSE_SECONDS = 1.0  # before the second try of a row, doubled before each further one
FAILURES_IN_A_ROW = 5  # after which a host is left alone for a while
REST_SECONDS = 10.0  # the first time, doubled each further time
MAX_RESTS = 2  # after which what is left of a host's rows is given up
DNS_SHARE = 8  # names that failed are asked again by one thread in so many: the resolver may have been overrun
_OF_THE_HOST = ("timeout", "connection_failed", "http_429", "http_503")  # failures that say nothing about one row


@dataclass
class Row:
    """A row to download: ``key`` and ``url`` as img2dataset hands them out."""

    key: Any
    url: str
    host: _Host
    tries: int = 0
    started: float = 0.0
    error: str = ""  # of the last try


@dataclass
class _Host:
    """What is known of a host; it stands in at most one queue of hosts at a time."""

    name: str
    limit: int
    waiting: deque[Row] = field(default_factory=deque)
    active: int = 0
    queued: bool = False
    not_before: float = 0.0
    failures: int = 0  # in a row
    rests: int = 0
    rested_at: float = float("-inf")
    given_up: str = ""  # the error that stands for all rows that are left


class Turns:
    """The rows of one part; for use under a lock. Each row is given out until ``settle`` says that it is done.

    A row is tried ``1 + retries`` times at most, and again only for reasons that can change. ``failing`` keeps the
    hosts that failed last: a process hands it on from part to part, so that a dead one is asked once in each.
    """

    def __init__(
        self,
        rows: Iterable[tuple[Any, str]],
        threads: int,
        courtesy: Courtesy,
        retries: int,
        clock: Callable[[], float] = time.monotonic,
        failing: dict[str, _Host] | None = None,
    ) -> None:
        self._failing = {} if failing is None else failing
        self._courtesy, self._retries, self._clock = courtesy, retries, clock
        self._dns_threads = max(1, threads // DNS_SHARE)
        self._threads = threads
        self._hosts: dict[str, _Host] = {}
        self._ready: deque[_Host] = deque()  # hosts that have a row for now, in turn
        self._later: list[tuple[float, int, _Host]] = []  # hosts that have one from a time on
        self._resting: list[tuple[float, int, Row]] = []  # rows that are tried again from a time on
        self._unresolved: list[Row] = []
        self._number = itertools.count()
        self._active = 0
        self._last_pass = False
        for key, url in rows:
            name = host_of(url)
            host = self._hosts.get(name) or self._hosts.setdefault(name, self._host(name))
            host.waiting.append(Row(key, url, host))
        for host in self._hosts.values():
            self._offer(host)

    def take(self) -> Row | float | None:
        """A row to download now; or the seconds after which to ask again, unless one is settled before; None at the
        end. A row with ``host.given_up`` is to be settled without a download."""
        now = self._clock()
        while self._resting and self._resting[0][0] <= now:
            row = heapq.heappop(self._resting)[2]
            row.host.waiting.append(row)
            self._offer(row.host)
        while self._later and self._later[0][0] <= now:
            self._ready.append(heapq.heappop(self._later)[2])
        while self._ready and self._active < self._threads:
            host = self._ready.popleft()
            host.queued = False
            if not host.waiting or host.not_before > now or host.active >= host.limit:
                self._offer(host)
                continue
            return self._start(host, now)
        if self._active or self._later or self._resting:
            return min([entry[0] - now for entry in (self._later[:1] + self._resting[:1])], default=3600.0)
        if not self._unresolved:
            return None
        self._threads, self._last_pass = self._dns_threads, True  # all else is done
        for row in self._unresolved:
            row.host.waiting.append(row)
            self._offer(row.host)
        self._unresolved = []
        return self.take()

    @property
    def more(self) -> bool:
        """Whether another row may be taken at once."""
        return bool(self._ready)

    def settle(self, row: Row, reason: str | None, retry_after: float | None = None) -> bool:
        """Take back a row that was downloaded (``reason`` None) or failed; whether that was the end of it."""
        now, host = self._clock(), row.host
        host.active -= 1
        self._active -= 1
        if not host.given_up:
            self._judge(host, row, reason, now)
        final = reason is None or not can_change(reason) or row.tries > self._retries or bool(host.given_up)
        if not final and retry_after is not None:
            final = retry_after > self._courtesy.max_wait
            host.not_before = max(host.not_before, now + min(retry_after, self._courtesy.max_wait))
        if not final:
            self._put_off(row, reason, retry_after, now)
        self._offer(host)
        return final

    def _host(self, name: str) -> _Host:
        before = self._failing.get(name)
        if before is None:
            return _Host(name, self._courtesy.per_host)
        rests = MAX_RESTS if before.given_up else before.rests
        limit = 1 if before.failures >= FAILURES_IN_A_ROW else self._courtesy.per_host
        return _Host(name, limit, failures=before.failures, rests=rests, not_before=before.not_before)

    def _start(self, host: _Host, now: float) -> Row:
        row = host.waiting.popleft()
        row.tries, row.started = row.tries + 1, now
        host.active += 1
        self._active += 1
        if not host.given_up:
            host.not_before = max(host.not_before, now + self._courtesy.host_interval)
        self._offer(host)
        return row

    def _put_off(self, row: Row, reason: str | None, retry_after: float | None, now: float) -> None:
        if reason == "dns_failure":
            self._unresolved.append(row)
            return
        pause = PAUSE_SECONDS * 2 ** (row.tries - 1)
        pause = max(pause if retry_after is None else retry_after, 0.0)
        heapq.heappush(self._resting, (now + pause, next(self._number), row))

    def _judge(self, host: _Host, row: Row, reason: str | None, now: float) -> None:
        """Leave a host alone for a while that fails again and again; what began before that does not count again."""
        if reason not in (*_OF_THE_HOST, "dns_failure"):
            host.failures, host.rests, host.limit = 0, 0, self._courtesy.per_host
            self._failing.pop(host.name, None)
            return
        if row.started < host.rested_at:
            return
        host.failures += 1
        self._failing[host.name] = host
        if host.failures < FAILURES_IN_A_ROW:
            return
        if reason == "dns_failure":
            self._without_name(host, row)
        elif host.rests >= MAX_RESTS:
            host.given_up = f"host left alone after {host.failures} failures in a row, the last: {row.error}"
            host.not_before, host.limit = 0.0, self._threads
        else:
            host.not_before = max(host.not_before, now + REST_SECONDS * 2**host.rests)
            host.rests += 1
            host.rested_at, host.limit = now, 1  # one connection to see whether it is back

    def _without_name(self, host: _Host, row: Row) -> None:
        """A name that cannot be resolved is asked again when all else is done, and once only for all of its rows."""
        host.limit = 1
        if self._last_pass:
            host.given_up, host.limit = row.error, self._threads
        else:
            self._unresolved += host.waiting
            host.waiting.clear()

    def _offer(self, host: _Host) -> None:
        """Queue a host that has a row and may have one more connection."""
        if host.queued or not host.waiting or host.active >= host.limit:
            return
        host.queued = True
        if host.not_before <= self._clock():
            self._ready.append(host)
        else:
            heapq.heappush(self._later, (host.not_before, next(self._number), host))


def host_of(url: str) -> str:
    """Whom a URL asks, host and port; the URL itself where it is no address."""
    try:
        _, host, port, _ = split_url(url)
    except (FetchError, AttributeError):
        return str(url)
    return f"{host}:{port}"
