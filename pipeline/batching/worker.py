"""The one thread that runs the model: requests in batches, streams by steps, the search index when nothing waits."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from pipeline.batching.metrics import Metrics
from pipeline.batching.model import Abilities, Model, abilities_of

LOG = logging.getLogger("pipeline.serving")
BACKGROUND_PAUSES = 4  # while others wait, the background rests so many times as long as its last step took
Batch = Callable[[Model, Sequence[Any]], Sequence[Any]]


@dataclass
class _Request:
    batch: Batch  # requests of equal ones share a call
    item: Any
    answer: Future = field(default_factory=Future)
    arrived: float = field(default_factory=time.monotonic)


class Stream:
    """An iterator that the worker advances, a value at a time, between the batches."""

    def __init__(self, open_values: Callable[[Model], Iterator[Any]], give: Callable[[Any], None]) -> None:
        """``give`` is called in the worker's thread with each value, at the end with ``Ended``."""
        self._open_values, self.give = open_values, give
        self._values: Iterator[Any] | None = None
        self.is_cancelled = False

    def cancel(self) -> None:
        self.is_cancelled = True

    def step(self, model: Model) -> bool:
        """Whether more may come."""
        if not self.is_cancelled:
            try:
                self._values = self._values if self._values is not None else self._open_values(model)
                self.give(next(self._values))
                return True
            except StopIteration:
                self.give(Ended())
            except Exception as error:
                self.give(Ended(error))
        if hasattr(self._values, "close"):
            self._values.close()
        return False


@dataclass(frozen=True)
class Ended:
    """The last that a stream gives: its error, None if it was read to its end."""

    error: Exception | None = None


class Worker:
    """Loads the model and answers until it is ended. All methods may be called from any thread."""

    def __init__(self, batch_size: int, wait_seconds: float, metrics: Metrics) -> None:
        """A request waits at most ``wait_seconds`` for others of its batch, and for none while a stream runs."""
        self._batch_size, self._wait_seconds, self._metrics = batch_size, wait_seconds, metrics
        self._requests: deque[_Request] = deque()
        self._streams: list[Stream] = []
        self._background: Stream | None = None
        self._background_until = 0.0  # it rests
        self._changed = threading.Condition()
        self._is_ended = False
        self._thread: threading.Thread | None = None
        self.model: Model | None = None  # until it is loaded
        self.abilities: Abilities | None = None

    def start(self, load: Callable[[], Model], then: Callable[[Exception | None], None]) -> None:
        """Load the model in the worker's thread; ``then`` is called there with the error, or None when it is ready."""
        self._thread = threading.Thread(target=self._run, args=(load, then), name="model", daemon=True)
        self._thread.start()

    def submit(self, batch: Batch, item: Any) -> Future:
        """The answer to come. Cancelling it drops a request that does not run yet."""
        request = _Request(batch, item)
        with self._changed:
            self._requests.append(request)
            self._changed.notify_all()
        return request.answer

    def add_stream(self, stream: Stream) -> None:
        with self._changed:
            self._streams.append(stream)
            self._changed.notify_all()

    def set_background(self, stream: Stream) -> None:
        """What is advanced when nothing else is to do."""
        with self._changed:
            self._background = stream
            self._changed.notify_all()

    def waiting(self) -> int:
        """Requests and streams that are not answered yet, those of the running batch not counted."""
        return len(self._requests) + len(self._streams)

    def end(self, seconds: float) -> bool:
        """Stop after what is running; whether the thread ended within ``seconds``."""
        with self._changed:
            self._is_ended = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(seconds)
        return self._thread is None or not self._thread.is_alive()

    def _run(self, load: Callable[[], Model], then: Callable[[Exception | None], None]) -> None:
        try:
            model = load()
            self.abilities = abilities_of(model)
        except Exception as error:
            then(error)
            return
        self.model = model
        then(None)
        while not self._is_ended:
            if batch := self._next_batch():
                self._answer(model, batch)
            for stream in tuple(self._streams):
                if not stream.step(model):
                    self._streams.remove(stream)
            self._advance_background(model)

    def _next_batch(self) -> list[_Request]:
        """The oldest request and those like it; [] when streams, the background or the end are to be seen to."""
        with self._changed:
            self._changed.wait_for(lambda: self._requests or self._streams or self._background or self._is_ended)
            if not self._requests or self._is_ended:
                return []
            first = self._requests[0]
            until = first.arrived + self._wait_seconds
            while (left := until - time.monotonic()) > 0 and not self._streams and not self._is_ended:
                if len(self._alike(first.batch)) >= self._batch_size:
                    break
                self._changed.wait(left)
            found = self._alike(first.batch)[: self._batch_size]
            taken = set(map(id, found))
            self._requests = deque(one for one in self._requests if id(one) not in taken)
        return [one for one in found if one.answer.set_running_or_notify_cancel()]

    def _alike(self, batch: Hashable) -> list[_Request]:
        return [one for one in self._requests if one.batch == batch]

    def _answer(self, model: Model, requests: Sequence[_Request]) -> None:
        """Ask once for all; if that fails, once for each, so that only the request at fault is refused."""
        self._metrics.count_batch(len(requests))
        try:
            answers = requests[0].batch(model, [one.item for one in requests])
        except Exception as error:
            if len(requests) == 1:
                requests[0].answer.set_exception(error)
            else:
                for one in requests:
                    self._answer(model, [one])
            return
        for one, answer in zip(requests, answers, strict=True):
            one.answer.set_result(answer)

    def _advance_background(self, model: Model) -> None:
        began = time.monotonic()
        if self._background is None or (self._requests or self._streams) and began < self._background_until:
            return
        if not self._background.step(model):
            self._background = None
        ended = time.monotonic()
        self._background_until = ended + BACKGROUND_PAUSES * (ended - began)
