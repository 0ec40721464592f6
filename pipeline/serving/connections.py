"""Connections that no client can hold open by sending little, or nothing."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_SECONDS = 10.0  # from connecting, or from the first byte of a further request, to the end of its headers
LINGER_SECONDS = 5.0  # that the rest of a refused upload is thrown away, so that the client can read the refusal


class BoundedConnection(H11Protocol):
    """uvicorn's connection with two limits it lacks, and an answer to clients that end in the midst of an upload."""

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._limit(HEADER_SECONDS)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._unlimit()
        elif self._deadline is None:
            self._limit(HEADER_SECONDS)

    def on_response_complete(self) -> None:
        is_unread = self.cycle is not None and self.cycle.more_body
        super().on_response_complete()
        if is_unread:
            self._limit(LINGER_SECONDS)

    def eof_received(self) -> None:
        if self.cycle is not None and self.cycle.more_body and not self.cycle.response_started:
            self.send_400_response("the upload ended before its end")

    def connection_lost(self, error: Exception | None) -> None:
        self._unlimit()
        super().connection_lost(error)

    def _limit(self, seconds: float) -> None:
        self._unlimit()
        self._deadline = self.loop.call_later(seconds, self._close)

    def _unlimit(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _close(self) -> Any:
        self._deadline = None
        self.transport.close()
