"""What the endpoints stand on: the model's worker, its limits, and waiting for it no longer than a client does."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import suppress
from typing import Any, NoReturn

from fastapi import HTTPException
from starlette.requests import Request

from pipeline.batching.metrics import Metrics
from pipeline.batching.model import Model
from pipeline.batching.worker import Batch, Ended, Stream, Worker
from pipeline.serving.picture_folder import PictureFolder
from pipeline.serving.uploads import Limits, Uploads

LOG = logging.getLogger("pipeline.serving")
CLIENT_GONE = 499  # no code of HTTP; for the metrics alone, as nobody reads the response


class Service:
    """``state`` is "loading", "ready" or "ending"."""

    def __init__(self, worker: Worker, limits: Limits, folder: PictureFolder | None, metrics: Metrics) -> None:
        self.worker, self.limits, self.folder, self.metrics = worker, limits, folder, metrics
        self.uploads = Uploads(limits)
        self.state = "loading"
        metrics.add_gauge("openflm_queue_length", "Requests that wait for the model.", worker.waiting)
        metrics.add_gauge("openflm_requests_taken", "Requests taken in, not answered.", lambda: self.uploads.taken)

    def refusal(self, path: str) -> tuple[int, str] | None:
        """Code and reason when ``path`` can't be served yet, or no longer."""
        if self.state == "ready" or path in ("/", "/docs", "/openapi.json", "/health", "/metrics"):
            return None
        return 503, "the model is being loaded" if self.state == "loading" else "the server is ending"

    async def ask(self, request: Request, batch: Batch, item: Any) -> Any:
        """The model's answer.

        Raises:
            HTTPException: 422 what the model refuses, 503 no turn in time, 504 no answer in time.
        """
        future = self.worker.submit(batch, item)
        try:
            return await self._wait(request, asyncio.wrap_future(future), self.limits.seconds, future.running)
        except HTTPException:
            raise
        except Exception as error:
            _refuse(error)
        finally:
            future.cancel()

    async def values(self, request: Request, open_values: Callable[[Model], Iterator[Any]]) -> AsyncIterator[Any]:
        """What a stream of the model gives, as it comes. Raises as ``ask`` does."""
        loop, received = asyncio.get_running_loop(), asyncio.Queue()

        def give(value: Any) -> None:
            with suppress(RuntimeError):  # the loop is closed, so the server is ending
                loop.call_soon_threadsafe(received.put_nowait, value)

        stream = Stream(open_values, give)
        self.worker.add_stream(stream)
        deadline = time.monotonic() + self.limits.seconds
        try:
            while True:
                left = max(deadline - time.monotonic(), 0.0)
                value = await self._wait(request, asyncio.ensure_future(received.get()), left, lambda: True)
                if isinstance(value, Ended):
                    if value.error is not None:
                        _refuse(value.error)
                    return
                yield value
        finally:
            stream.cancel()

    async def _wait(
        self, request: Request, answer: asyncio.Future, seconds: float, has_begun: Callable[[], bool]
    ) -> Any:
        gone = asyncio.ensure_future(_disconnected(request.receive))
        try:
            done, _ = await asyncio.wait({answer, gone}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if answer in done:
                return answer.result()
            if gone in done:
                raise HTTPException(CLIENT_GONE, "the client went away")
            if has_begun():
                raise HTTPException(504, f"no answer within {self.limits.seconds:g} s")
            raise HTTPException(503, "too many requests wait; try again", {"Retry-After": "5"})
        finally:
            answer.cancel()
            gone.cancel()


async def _disconnected(receive: Callable[[], Awaitable[Any]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _refuse(error: Exception) -> NoReturn:
    if isinstance(error, ValueError):
        raise HTTPException(422, str(error)) from error
    LOG.error("the model failed", exc_info=error)
    raise HTTPException(500, f"the model failed: {type(error).__name__}; the server's log says where") from error
