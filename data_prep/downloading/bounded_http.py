"""Fetches one address over HTTP with bounds on all that a server decides: time, bytes, redirects, where it leads."""

from __future__ import annotations

import base64
import functools
import http.client
import io
import ipaddress
import queue
import socket
import ssl
import threading
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, unquote, urljoin, urlsplit

TOO_LARGE = "response larger than the bound"
TOO_SLOW = "timed out: response not complete within the bound"
NO_HTTP = "address is not http(s)"
PRIVATE = "leads to a private address"
MAX_REDIRECTS = 10
MAX_ADDRESSES = 3  # of a name, tried in turn
_REDIRECTS = (301, 302, 303, 307, 308)
_CHUNK_BYTES = 1 << 16
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_SAFE = "!$%&'()*+,-./:;=?@[]_~"  # of a path or query, left as they are: what is encoded already stays so


class FetchError(OSError):
    """Why a response is not used, in words that ``failures.failure_reason`` knows."""


@dataclass(frozen=True)
class Bounds:
    """``timeout`` seconds for each operation, ``total`` for all of them; ``max_bytes`` of a body."""

    timeout: float
    total: float
    max_bytes: int
    allow_private: bool = False


def fetch(url: str, bounds: Bounds, headers: dict[str, str], accept: Callable[[Any], bool]) -> bytes:
    """The body behind ``url``, redirects followed; ``accept`` may refuse a response by its headers.

    Every name is resolved once, here, and the connection goes to an address that was checked: one that is not public
    is refused unless ``allow_private``. Where the environment names a proxy, that resolves names, and only addresses
    that are written out are checked. Raises OSError, ValueError or http.client.HTTPException.
    """
    clock = _Clock(bounds)
    for _ in range(MAX_REDIRECTS + 1):
        connection, target = _connection(url, clock, bounds.allow_private)
        try:
            connection.request("GET", target, headers=headers)
            response = connection.getresponse()
            location = response.headers.get("Location")
            if response.status not in _REDIRECTS or location is None:
                return _body(response, clock, accept)
            url = urljoin(url, location)
        finally:
            connection.close()
    raise FetchError(f"more than {MAX_REDIRECTS} redirects")


def _body(response: http.client.HTTPResponse, clock: _Clock, accept: Callable[[Any], bool]) -> bytes:
    if not 200 <= response.status < 300:
        raise FetchError(f"HTTP Error {response.status}: {response.reason[:100]}")
    if not accept(response.headers):
        raise FetchError("Use of image disallowed by X-Robots-Tag directive")
    if response.headers.get("Content-Encoding", "identity").strip().lower() != "identity":
        raise FetchError("response is compressed, which was not asked for")
    content = io.BytesIO()
    expected = response.length
    if expected is not None and expected > clock.bounds.max_bytes:
        raise FetchError(TOO_LARGE)
    while chunk := response.read1(_CHUNK_BYTES):
        content.write(chunk)
        if content.tell() > clock.bounds.max_bytes:
            raise FetchError(TOO_LARGE)
    if expected is not None and expected != content.tell():
        raise FetchError(f"connection broke off after {content.tell()} of {expected} bytes")
    return content.getvalue()


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
    """A connection to one of ``addresses``, by TLS where ``context`` is given; all it does is bounded by ``clock``."""

    def __init__(self, host: str, port: int, addresses: list[Any], clock: _Clock, context: ssl.SSLContext | None):
        super().__init__(host, port)
        self.default_port = 80 if context is None else 443  # which the Host header leaves out
        self._addresses, self._clock, self._context = addresses, clock, context

    def connect(self) -> None:
        plain = self._first_that_answers()
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
    if not allow_private and not _may_be_public(host):
        raise FetchError(f"{host} {PRIVATE}")
    gate = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    if gate.scheme != "http" or not gate.hostname:
        raise FetchError(f"proxy {gate.scheme}://{gate.hostname} is no HTTP proxy")
    addresses = resolve(gate.hostname, gate.port or 80, clock.left(), allow_private=True)
    authorisation = {}
    if gate.username:
        words = f"{unquote(gate.username)}:{unquote(gate.password or '')}"
        authorisation["Proxy-Authorization"] = "Basic " + base64.b64encode(words.encode()).decode()
    if context is not None:
        connection = _Connection(gate.hostname, gate.port or 80, addresses, clock, context)
        connection.set_tunnel(host, port, authorisation)
        return connection, target
    connection = _Connection(host, port, addresses, clock, None)
    if authorisation:
        connection.request = functools.partial(_with_headers, connection.request, authorisation)
    return connection, url_of(scheme, host, port, target)


def _with_headers(request: Callable[..., None], more: dict[str, str], method: str, target: str, headers: dict) -> None:
    request(method, target, headers={**headers, **more})


def split_url(url: str) -> tuple[str, str, int, str]:
    """Scheme, host (IDNA), port, and path with query, percent-encoded where a URL may not hold a character as it is.

    Raises FetchError for what is no address of HTTP.
    """
    try:
        parts = urlsplit(url.strip())
        host, port = (parts.hostname or "").rstrip("."), parts.port
        if ":" not in host and not host.isascii():
            host = host[:253].encode("idna").decode()
    except ValueError as error:  # UnicodeError is one
        raise FetchError(f"{NO_HTTP}: {error}") from error
    if parts.scheme not in ("http", "https") or not host or any(character in host for character in " \\%<>"):
        raise FetchError(NO_HTTP)
    query = f"?{quote(parts.query, _SAFE)}" if parts.query else ""
    target = (quote(parts.path, _SAFE) or "/") + query
    return parts.scheme, host, port or (443 if parts.scheme == "https" else 80), target


def url_of(scheme: str, host: str, port: int, target: str) -> str:
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}{target}"


def resolve(host: str, port: int, seconds: float, allow_private: bool) -> list[Any]:
    """Addresses of a name as ``socket.getaddrinfo`` gives them, at most MAX_ADDRESSES, only public ones by default.

    The resolver cannot be interrupted: it runs in a thread that is left behind when it takes too long.
    """
    answers: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def ask() -> None:
        try:
            answers.put(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except (OSError, UnicodeError) as error:
            answers.put(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        found = answers.get(timeout=seconds)
    except queue.Empty:
        raise FetchError("name resolution timed out") from None
    if isinstance(found, Exception):
        raise found
    public = [one for one in found if allow_private or is_public(one[4][0])]
    if not public:
        raise FetchError(f"{host} {PRIVATE} ({found[0][4][0]}); --allow-private-addresses takes it")
    return public[:MAX_ADDRESSES]


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the open internet, and to nobody's network, machine or cloud metadata."""
    found = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(found, ipaddress.IPv6Address):
        inner = found.ipv4_mapped or found.sixtofour or (found.teredo or (None, None))[1]
        if found in _NAT64:
            inner = ipaddress.IPv4Address(int(found) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
        if found.is_site_local:
            return False
    return found.is_global and not found.is_multicast and not found.is_reserved


def _may_be_public(host: str) -> bool:
    """Whether a host that nobody resolves here could be public: a name but localhost, or a public address."""
    try:
        return is_public(host if ":" in host else socket.inet_ntoa(socket.inet_aton(host)))  # 2130706433 is one, too
    except (ValueError, OSError):
        return host.rpartition(".")[2] != "localhost"


@functools.cache
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()
