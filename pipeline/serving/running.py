"""Runs the server from its socket to its end: loading, ready, and after SIGTERM or SIGINT finishing what runs."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator

import uvicorn

from pipeline.batching.model import Model
from pipeline.batching.worker import Stream
from pipeline.config.options import ConfigError
from pipeline.serving.app import build_app
from pipeline.serving.connections import BoundedConnection
from pipeline.serving.gate import Access, Gate
from pipeline.serving.service import Service

FURTHER_CONNECTIONS = 512  # open at once, besides those of the requests that are taken in
CLOSING_SECONDS = 3  # for connections to close once all is answered


def listen(host: str, port: int) -> socket.socket:
    """A bound socket; port 0: any free one. Raises ConfigError where it can't be had."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind)
    except OSError as error:
        raise ConfigError(f"--host {host}: {error.strerror}; give an address of this machine") from None
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind(address)
        found.listen(2048)
    except OSError as error:
        found.close()
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(f"--port {port} is in use; give another, or end what listens there") from None
        raise ConfigError(f"--host {host} --port {port}: {error.strerror}; give others") from None
    return found


class Server:
    """One server process. ``run`` returns its exit code."""

    def __init__(self, service: Service, access: Access, load: Callable[[], Model]) -> None:
        self._service, self._load = service, load
        self._failure: Exception | None = None
        app, policy = build_app(service)
        config = uvicorn.Config(
            Gate(app, access, policy, service.metrics, service.refusal),
            http=BoundedConnection,
            ws="none",
            loop="asyncio",
            lifespan="off",
            log_level="error",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            limit_concurrency=service.limits.requests + FURTHER_CONNECTIONS,
            h11_max_incomplete_event_size=1 << 14,
            timeout_graceful_shutdown=CLOSING_SECONDS,
        )
        self._server = _WithoutSignals(config)

    def run(self, listening: socket.socket) -> int:
        """Serve until a signal comes: 0; until the model can't be loaded: raises what it raised."""
        asyncio.run(self._run(listening))
        ended = self._service.worker.end(CLOSING_SECONDS)
        if self._failure is not None:
            raise self._failure
        if not ended:  # a thread in the midst of a model's work would hold the interpreter
            sys.stdout.flush()
            os._exit(0)
        return 0

    async def _run(self, listening: socket.socket) -> None:
        loop, told = asyncio.get_running_loop(), asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._told, told)
        host, port = listening.getsockname()[:2]
        address = f"http://{f'[{host}]' if ':' in host else host}:{port}/"

        def loaded(error: Exception | None) -> None:
            with contextlib.suppress(RuntimeError):  # ended meanwhile
                loop.call_soon_threadsafe(self._loaded, error, address, told)

        print(f"loading; {address}health says when it is done", flush=True)
        self._service.worker.start(self._load, loaded)
        serving = asyncio.create_task(self._server.serve(sockets=[listening]))
        waiting = asyncio.create_task(told.wait())
        await asyncio.wait({serving, waiting}, return_when=asyncio.FIRST_COMPLETED)
        await self._finish_what_runs()
        self._server.should_exit = True
        await serving

    def _told(self, told: asyncio.Event) -> None:
        if told.is_set():  # twice: at once
            self._server.should_exit = self._server.force_exit = True
        self._service.state = "ending"
        told.set()

    def _loaded(self, error: Exception | None, address: str, told: asyncio.Event) -> None:
        if error is not None:
            self._failure = error
            told.set()
        elif self._service.state == "loading":
            service = self._service
            service.state = "ready"
            abilities = service.worker.abilities
            if service.folder is not None and abilities is not None and abilities.search:
                service.worker.set_background(Stream(service.folder.indexing, lambda _: None))
            print(f"serving {service.worker.model.name} at {address} (Ctrl-C ends it)", flush=True)

    async def _finish_what_runs(self) -> None:
        """Until all that was taken in is answered, no longer than one request may take."""
        self._service.state = "ending"
        until = time.monotonic() + self._service.limits.seconds
        while self._service.uploads.taken and time.monotonic() < until and not self._server.force_exit:
            await asyncio.sleep(0.02)


class _WithoutSignals(uvicorn.Server):
    """uvicorn's server without its handlers of signals, which end the process by the signal instead of code 0."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
