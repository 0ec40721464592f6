"""Addresses of HTTP: how a URL is read, what a name resolves to, and which addresses are public."""

from __future__ import annotations

import ipaddress
import queue
import re
import socket
import threading
from typing import Any
from urllib.parse import quote, urljoin, urlsplit

NO_HTTP = "address is not http(s)"
PRIVATE = "leads to a private address"
MAX_ADDRESSES = 3  # of a name, tried in turn
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")  # all that IANA has given away of IPv6
_NO_HOST = re.compile(r"[\0-\x20\x7f%/<>?@#\\\[\]^|]")  # WHATWG's forbidden host code points
_SAFE = "!$%&'()*+,-./:;=?@[]_~"  # of a path or query, left as they are: what is encoded already stays so


class FetchError(OSError):
    """Why a response is not used, in words that ``failures.failure_reason`` knows.

    ``retry_after``: seconds after which the server wants to be asked again, where it says so.
    """

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


def split_url(url: str) -> tuple[str, str, int, str]:
    """Scheme, host (IDNA), port, and path with query, percent-encoded where a URL may not hold a character as it is.

    Raises FetchError for what is no address of HTTP.
    """
    try:
        parts = urlsplit(url.strip())
        host, port = (parts.hostname or "").rstrip("."), parts.port
        if ":" not in host and not host.isascii():
            host = host[:253].encode("idna").decode()
        query = f"?{quote(parts.query, _SAFE)}" if parts.query else ""
        target = (quote(parts.path, _SAFE) or "/") + query
    except ValueError as error:  # UnicodeError is one
        raise FetchError(f"{NO_HTTP}: {ascii(str(error))[:100]}") from error
    if parts.scheme not in ("http", "https") or not host or _NO_HOST.search(host):
        raise FetchError(NO_HTTP)
    if port == 0:
        raise FetchError(f"{NO_HTTP}: port 0")
    return parts.scheme, host, port or (443 if parts.scheme == "https" else 80), target


def redirected(url: str, location: str) -> str:
    """The address that a Location header names, relative to ``url`` or not; letters outside ASCII are UTF-8 there.

    ``location`` is as http.client decodes it, by Latin-1. Raises FetchError for what is no address.
    """
    try:
        location = location.encode("latin-1").decode("utf-8")
    except UnicodeError:
        pass  # Latin-1 indeed
    try:
        return urljoin(url, location.strip())
    except ValueError as error:
        raise FetchError(f"{NO_HTTP}: redirect to {ascii(location[:100])}") from error


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
        except UnicodeError as error:  # a label of more than 63 letters, say
            answers.put(FetchError(f"{NO_HTTP}: {error}"))
        except OSError as error:
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
        if found not in _GLOBAL_UNICAST:
            return False
    return found.is_global and not found.is_multicast and not found.is_reserved


def may_be_public(host: str) -> bool:
    """Whether a host that nobody resolves here could be public: a name but localhost, or a public address."""
    try:
        return is_public(host if ":" in host else socket.inet_ntoa(socket.inet_aton(host)))  # 2130706433 is one, too
    except (ValueError, OSError):
        return host.rpartition(".")[2] != "localhost"
