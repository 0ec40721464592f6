"""Fetches one address over HTTP with bounds on all that a server decides: time, bytes, redirects, where it leads."""

from __future__ import annotations

import base64
import functools
import http.client
import io
import socket
import ssl
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from email.message import Message
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import SplitResult, unquote, urlsplit

from data_prep.downloading.addresses import PRIVATE, FetchError, may_be_public, redirected, resolve, split_url, url_of
from data_prep.downloading.bodies import NOT_HTTP, PLACEHOLDER, leads_to_placeholder, read_body

TOO_SLOW = "timed out: response not complete within the bound"
MAX_REDIRECTS = 10
_REDIRECTS = (301, 302, 303, 307, 308)
_TRY_LATER = (429, 503)  # statuses that may come with Retry-After


@dataclass(frozen=True)
class Bounds:
    """``timeout`` seconds for each operation, ``total`` for all of them; ``max_bytes`` of a body."""

    timeout: float
    total: float
    max_bytes: int
    allow_private: bool = False


def fetch(
    url: str,
    bounds: Bounds,
    headers: dict[str, str],
    accept: Callable[[Message], bool],
    look: Callable[[bytes, Message], None] = lambda head, headers: None,
) -> bytes:
    """The body behind ``url``, redirects followed; ``accept`` may refuse a response by its headers, ``look`` by its
    first bytes (``bodies.read_body``).

    Every name is resolved once, here, and the connection goes to an address that was checked: one that is not public
    is refused unless ``allow_private``. Where the environment names a proxy, that resolves names, and only addresses
    that are written out are checked. Raises OSError, of which FetchError names what is wrong with a response.
    """
    clock = _Clock(bounds)
    for _ in range(MAX_REDIRECTS + 1):
        connection, target = _connection(url, clock, bounds.allow_private)
        try:
            connection.request("GET", target, headers=headers)
            response = connection.getresponse()
            location = response.headers.get("Location")
            if response.status not in _REDIRECTS or location is None:
                _check_head(response, accept)
                return read_body(response, bounds.max_bytes, look)
            url, before = redirected(url, location), url
            if leads_to_placeholder(before, url):
                raise FetchError(f"{PLACEHOLDER}: {ascii(url[:150])}")
        except http.client.RemoteDisconnected as error:
            raise FetchError("connection broke off before the response") from error
        except http.client.IncompleteRead as error:
            raise FetchError("connection broke off within a chunk") from error
        except OSError:  # TLS has errors that are a ValueError as well
            raise
        except (http.client.HTTPException, ValueError) as error:
            raise FetchError(f"{NOT_HTTP}: {ascii(str(error))[:100]}") from error
        finally:
            connection.close()
    raise FetchError(f"more than {MAX_REDIRECTS} redirects")


def _check_head(response: http.client.HTTPResponse, accept: Callable[[Message], bool]) -> None:
    if not 200 <= response.status < 300:
        later = retry_after(response.headers, time.time()) if response.status in _TRY_LATER else None
        raise FetchError(f"HTTP Error {response.status}: {response.reason[:100]}", later)
    if not accept(response.headers):
        raise FetchError("Use of image disallowed by X-Robots-Tag directive")


def retry_after(headers: Message, now: float) -> float | None:
    """Seconds from ``now`` (of the epoch) until the server wants to be asked again: a number, or an HTTP date."""
    value = headers.get("Retry-After", "").strip()
    if value.isascii() and value.isdigit():
        return float(value[:9])
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - now)
    except (ValueError, TypeError, OverflowError):
        return None


class _Clock:
    """What is left of the time for a download."""

    def __init__(self, bounds: Bounds) -> None:
        self.bounds = bounds
        self._deadline = time.monotonic() + bounds.total

    def left(self) -> float:
        """Seconds that the next operation may take; raises FetchError when there are none."""
        seconds = self._deadline - time.monotonic()
        if seconds <= 0:
            raise FetchError(TOO_SLOW)
        return min(seconds, self.bounds.timeout)


class _Connection(http.client.HTTPConnection):
    """A connection to one of ``addresses``, by TLS where ``context`` is given; all it does is bounded by ``clock``.

    Where the addresses are those of ``proxy``, errors of reaching it name it."""

    def __init__(
        self,
        host: str,
        port: int,
        addresses: list[Any],
        clock: _Clock,
        context: ssl.SSLContext | None,
        proxy: str | None = None,
    ) -> None:
        super().__init__(host, port)
        self.default_port = 80 if context is None else 443  # which the Host header leaves out
        self._addresses, self._clock, self._context, self._proxy = addresses, clock, context, proxy

    def connect(self) -> None:
        try:
            plain = self._first_that_answers()
        except OSError as error:
            if self._proxy is None:
                raise
            raise FetchError(f"proxy {self._proxy}: {error}") from error
        self.sock = _BoundedSocket(plain, self._clock)
        if self._tunnel_host:
            self._tunnel()
        if self._context is not None:
            plain.settimeout(self._clock.left())
            secure = self._context.wrap_socket(plain, server_hostname=self._tunnel_host or self.host)
            self.sock = _BoundedSocket(secure, self._clock)

    def _first_that_answers(self) -> socket.socket:
        for number, (family, kind, protocol, _, address) in enumerate(self._addresses, start=1):
            connected = socket.socket(family, kind, protocol)
            try:
                connected.settimeout(self._clock.left())
                connected.connect(address)
                return connected
            except BaseException as error:
                connected.close()
                if not isinstance(error, OSError) or isinstance(error, FetchError) or number == len(self._addresses):
                    raise
        raise FetchError("No address associated with hostname")


class _BoundedSocket:
    """The part of a socket that http.client uses; each operation gets the time that is left."""

    def __init__(self, connected: socket.socket, clock: _Clock) -> None:
        self._connected, self._clock = connected, clock

    def sendall(self, data: bytes) -> None:
        self._connected.settimeout(self._clock.left())
        self._connected.sendall(data)

    def makefile(self, mode: str) -> io.BufferedReader:
        assert mode == "rb"
        return io.BufferedReader(_BoundedReader(self._connected, self._clock))

    def close(self) -> None:
        self._connected.close()  # a file that was made of it keeps it open until it is closed, too


class _BoundedReader(io.RawIOBase):
    def __init__(self, connected: socket.socket, clock: _Clock) -> None:
        self._connected, self._clock = connected, clock
        self._file = connected.makefile("rb", buffering=0)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self._connected.settimeout(self._clock.left())
        return self._file.readinto(buffer)

    def close(self) -> None:
        self._file.close()
        super().close()


def _connection(url: str, clock: _Clock, allow_private: bool) -> tuple[_Connection, str]:
    """A connection for a request, not open yet, and the target that the request names."""
    scheme, host, port, target = split_url(url)
    proxy = None if urllib.request.proxy_bypass(host) else urllib.request.getproxies().get(scheme)
    context = _tls() if scheme == "https" else None
    if proxy is None:
        return _Connection(host, port, resolve(host, port, clock.left(), allow_private), clock, context), target
    if not allow_private and not may_be_public(host):
        raise FetchError(f"{host} {PRIVATE}")
    gate, gate_host, gate_port = _gate(proxy)
    name = f"{gate_host}:{gate_port}"
    try:
        addresses = resolve(gate_host, gate_port, clock.left(), allow_private=True)
    except OSError as error:
        raise FetchError(f"proxy {name}: {error}") from error
    authorisation = {}
    if gate.username:
        words = f"{unquote(gate.username)}:{unquote(gate.password or '')}"
        authorisation["Proxy-Authorization"] = "Basic " + base64.b64encode(words.encode()).decode()
    if context is not None:
        connection = _Connection(gate_host, gate_port, addresses, clock, context, name)
        connection.set_tunnel(host, port, authorisation)
        return connection, target
    connection = _Connection(host, port, addresses, clock, None, name)
    if authorisation:
        connection.request = functools.partial(_with_headers, connection.request, authorisation)
    return connection, url_of(scheme, host, port, target)


def _gate(proxy: str) -> tuple[SplitResult, str, int]:
    """A proxy of the environment, with its host and port; its password is in no message."""
    try:
        gate = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
        if gate.scheme == "http" and gate.hostname:
            return gate, gate.hostname, gate.port or 80
    except ValueError as error:
        raise FetchError("proxy setting is no address; see http_proxy and https_proxy") from error
    raise FetchError(f"proxy {gate.scheme}://{gate.hostname} is no HTTP proxy")


def _with_headers(request: Callable[..., None], more: dict[str, str], method: str, target: str, headers: dict) -> None:
    request(method, target, headers={**headers, **more})


@functools.cache
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()
