"""Counts what the server did, in the text format of Prometheus."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)  # upper bounds of the buckets
BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)


class Histogram:
    """How many values were at most each bound."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def add(self, value: float) -> None:
        place = next((number for number, bound in enumerate(self._bounds) if value <= bound), len(self._bounds))
        self._counts[place] += 1
        self._sum += value

    def lines(self, name: str, labels: str = "") -> Iterator[str]:
        total = 0
        for bound, count in zip((*self._bounds, "+Inf"), self._counts, strict=True):
            total += count
            yield f'{name}_bucket{{{labels}{"," if labels else ""}le="{bound}"}} {total}'
        braced = f"{{{labels}}}" if labels else ""
        yield f"{name}_sum{braced} {self._sum:.6f}"
        yield f"{name}_count{braced} {total}"


class Metrics:
    """Requests by path and code, their seconds, sizes of batches, and gauges that are read when asked for."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._codes: Counter[tuple[str, int]] = Counter()
        self._seconds: dict[str, Histogram] = {}
        self._batches = Histogram(BATCH_SIZES)
        self._gauges: dict[str, tuple[str, Callable[[], float]]] = {}

    def add_gauge(self, name: str, meaning: str, read: Callable[[], float]) -> None:
        self._gauges[name] = meaning, read

    def count_request(self, path: str, code: int, seconds: float) -> None:
        """``path`` is one of the server's own, not what a client wrote: each is kept for ever."""
        with self._lock:
            self._codes[path, code] += 1
            self._seconds.setdefault(path, Histogram(SECONDS)).add(seconds)

    def count_batch(self, size: int) -> None:
        with self._lock:
            self._batches.add(size)

    def text(self) -> str:
        """The exposition format, version 0.0.4 (https://prometheus.io/docs/instrumenting/exposition_formats)."""
        with self._lock:
            return "\n".join(self._lines()) + "\n"

    def _lines(self) -> Iterator[str]:
        yield from _head("openflm_requests_total", "counter", "Requests answered, by path and code.")
        for (path, code), count in sorted(self._codes.items()):
            yield f'openflm_requests_total{{path="{path}",code="{code}"}} {count}'
        yield from _head("openflm_request_seconds", "histogram", "Seconds from request to end of response.")
        for path, histogram in sorted(self._seconds.items()):
            yield from histogram.lines("openflm_request_seconds", f'path="{path}"')
        yield from _head("openflm_batch_size", "histogram", "Requests that the model answered at once.")
        yield from self._batches.lines("openflm_batch_size")
        for name, (meaning, read) in self._gauges.items():
            yield from _head(name, "gauge", meaning)
            yield f"{name} {read():g}"


def _head(name: str, kind: str, meaning: str) -> Iterator[str]:
    yield f"# HELP {name} {meaning}"
    yield f"# TYPE {name} {kind}"
