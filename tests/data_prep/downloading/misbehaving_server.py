"""A server on this machine that does with the images it has what servers do, a behaviour for each path."""

from __future__ import annotations

import gzip
import re
import selectors
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

WRITTEN = "written"
PAUSE_SECONDS = 0.05  # between the bytes of a drip
SLOW_SECONDS = 60.0  # for which a behaviour that ends at the client's patience goes on at most
HUGE_BYTES = 60_000_000
PAGE = b"<!DOCTYPE html><html><head><title>Gone</title></head><body>This picture is gone.</body></html>" * 20


class Request:
    """One request: ``number`` counts those of its path from 1, ``image`` is what the path names."""

    def __init__(self, connection: socket.socket, number: int, path: str, image: bytes) -> None:
        self.connection, self.number, self.path, self.image = connection, number, path, image

    def answer(self, status: str, body: bytes = b"", *headers: str, length: int | None = None) -> None:
        size = len(body) if length is None else length
        self.head(f"HTTP/1.1 {status}", f"Content-Length: {size}", *headers)
        self.send(body)

    def head(self, *lines: str) -> None:
        self.send("".join(f"{line}\r\n" for line in (*lines, "Connection: close", "")).encode())

    def send(self, content: bytes) -> None:
        self.connection.sendall(content)

    def drip(self, content: bytes) -> None:
        end = time.monotonic() + SLOW_SECONDS
        while time.monotonic() < end:
            self.send(content)
            time.sleep(PAUSE_SECONDS)

    def reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def redirect(self, location: str) -> None:
        self.answer("302 Found", b"", f"Location: {location}")


@dataclass(frozen=True)
class Behaviour:
    """``outcome`` of a URL, a reason of rejection or WRITTEN, after ``requests`` of it by a client that tries what can
    change once more; ``slow`` where the client's patience ends it."""

    act: Callable[[Request], None]
    outcome: str = WRITTEN
    requests: int = 1
    slow: bool = False


def says(status: str, *headers: str, body: bytes | None = None) -> Callable[[Request], None]:
    """An answer of this status, with the image where no other body is given."""
    return lambda request: request.answer(status, request.image if body is None else body, *headers)


def once(act: Callable[[Request], None]) -> Callable[[Request], None]:
    """``act`` at the first request of a path, the image from then on."""
    return lambda request: act(request) if request.number == 1 else says("200 OK")(request)


def _drip_in_headers(request: Request) -> None:
    request.send(b"HTTP/1.1 200 OK\r\nX-Slow: ")
    request.drip(b"x")


def _drip_in_body(request: Request) -> None:
    request.head("HTTP/1.1 200 OK", "Content-Length: 100000")
    request.send(request.image[:600])
    request.drip(b"x")


def _cut(request: Request) -> None:
    request.answer("200 OK", request.image[: len(request.image) // 2], length=len(request.image))


def _cut_chunk(request: Request) -> None:
    request.head("HTTP/1.1 200 OK", "Transfer-Encoding: chunked")
    request.send(f"{len(request.image):x}\r\n".encode() + request.image[: len(request.image) // 2])


def _chunks(request: Request) -> None:
    request.head("HTTP/1.1 200 OK", "Transfer-Encoding: chunked")
    for start in range(0, len(request.image), 1000):
        part = request.image[start : start + 1000]
        request.send(f"{len(part):x}\r\n".encode() + part + b"\r\n")
    request.send(b"0\r\n\r\n")


def _reset_within(request: Request) -> None:
    request.head("HTTP/1.1 200 OK", f"Content-Length: {len(request.image)}")
    request.send(request.image[:600])
    time.sleep(PAUSE_SECONDS)
    request.reset()


def _without_length(request: Request, content: bytes) -> None:
    request.head("HTTP/1.0 200 OK")
    request.send(content)


def _huge(request: Request) -> None:
    request.head("HTTP/1.0 200 OK")
    request.send(request.image)
    for _ in range(HUGE_BYTES >> 16):
        request.send(bytes(1 << 16))


def _late(request: Request) -> None:
    time.sleep(10 * PAUSE_SECONDS)
    says("200 OK")(request)


def _hops(request: Request) -> None:
    """Relative, with a query and a fragment, then with letters outside ASCII; at last the image."""
    name = request.path.rpartition("/")[2].partition("?")[0]
    if "hop=2" in request.path:
        says("200 OK")(request)
    elif "hop=1" in request.path:
        request.redirect(f"/hops/ü/../{name}?hop=2")
    else:
        request.redirect(f"{name}?hop=1#fragment")


def _bomb() -> bytes:
    return gzip.compress(b"\xff\xd8\xff" + bytes(HUGE_BYTES))


BOMB = _bomb()
_COMPRESSED = "Content-Encoding: gzip"
BEHAVIOURS = {
    "ok": Behaviour(says("200 OK")),
    "as-text": Behaviour(says("200 OK", "Content-Type: text/plain")),
    "as-html": Behaviour(says("200 OK", "Content-Type: text/html")),
    "chunks": Behaviour(_chunks),
    "without-length": Behaviour(lambda request: _without_length(request, request.image)),
    "late": Behaviour(_late),
    "hops": Behaviour(_hops, WRITTEN, 3),
    "compressed": Behaviour(lambda request: request.answer("200 OK", gzip.compress(request.image), _COMPRESSED)),
    "other-robot": Behaviour(says("200 OK", "X-Robots-Tag: otherbot: noai, noindex", "X-Robots-Tag: nosnippet")),
    "401": Behaviour(says("401 Unauthorized"), "http_401"),
    "403": Behaviour(says("403 Forbidden"), "http_403"),
    "404": Behaviour(says("404 Not Found", body=PAGE), "http_404"),
    "404-picture": Behaviour(says("404 Not Found"), "http_404"),
    "410": Behaviour(says("410 Gone", body=b""), "http_410"),
    "500": Behaviour(says("500 Internal Server Error", body=PAGE), "http_500", 2),
    "500-once": Behaviour(once(says("500 Internal Server Error", body=PAGE)), WRITTEN, 2),
    "501": Behaviour(says("501 Not Implemented", body=b""), "http_501"),
    "503-once": Behaviour(once(says("503 Busy", "Retry-After: 1", body=PAGE)), WRITTEN, 2),
    "429": Behaviour(says("429 Too Many Requests", "Retry-After: 1", body=b""), "http_429", 2),
    "429-once": Behaviour(once(says("429 Too Many Requests", "Retry-After: 1", body=b"")), WRITTEN, 2),
    "429-long": Behaviour(says("429 Too Many Requests", "Retry-After: 86400", body=b""), "http_429"),
    "silent": Behaviour(lambda request: time.sleep(SLOW_SECONDS), "timeout", 2, slow=True),
    "silent-once": Behaviour(once(lambda request: time.sleep(SLOW_SECONDS)), WRITTEN, 2, slow=True),
    "drip-headers": Behaviour(_drip_in_headers, "timeout", 2, slow=True),
    "drip-body": Behaviour(_drip_in_body, "timeout", 2, slow=True),
    "drip-100": Behaviour(lambda request: request.drip(b"HTTP/1.1 100 Continue\r\n\r\n"), "timeout", 2, slow=True),
    "cut": Behaviour(_cut, "connection_failed", 2),
    "cut-once": Behaviour(once(_cut), WRITTEN, 2),
    "cut-chunk": Behaviour(_cut_chunk, "connection_failed", 2),
    "cut-compressed": Behaviour(
        lambda request: request.answer("200 OK", gzip.compress(request.image)[:-20], _COMPRESSED),
        "connection_failed",
        2,
    ),
    "half": Behaviour(
        lambda request: request.answer("200 OK", request.image[: len(request.image) // 2]), "truncated_image"
    ),
    "reset": Behaviour(lambda request: request.reset(), "connection_failed", 2),
    "reset-within": Behaviour(_reset_within, "connection_failed", 2),
    "reset-once": Behaviour(once(lambda request: request.reset()), WRITTEN, 2),
    "hang-up": Behaviour(lambda request: None, "connection_failed", 2),
    "html": Behaviour(says("200 OK", "Content-Type: text/html; charset=utf-8", body=PAGE), "html_page"),
    "html-as-jpeg": Behaviour(says("200 OK", "Content-Type: image/jpeg", body=PAGE), "html_page"),
    "text-as-jpeg": Behaviour(says("200 OK", "Content-Type: image/jpeg", body=b"no picture"), "not_an_image"),
    "json": Behaviour(says("200 OK", "Content-Type: application/json", body=b'{"error": "gone"}'), "not_an_image"),
    "empty": Behaviour(says("200 OK", body=b""), "empty_image"),
    "204": Behaviour(says("204 No Content", body=b""), "empty_image"),
    "loop": Behaviour(lambda request: request.redirect(request.path), "too_many_redirects", 11),
    "to-file": Behaviour(lambda request: request.redirect("file:///etc/passwd"), "bad_url"),
    "to-nowhere": Behaviour(lambda request: request.redirect("http://[::1/x.jpg"), "bad_url"),
    "to-placeholder": Behaviour(lambda request: request.redirect("/ok/photo_unavailable.png"), "placeholder_image"),
    "huge": Behaviour(lambda request: request.answer("200 OK", request.image, length=10**12), "image_bytes_too_large"),
    "huge-unannounced": Behaviour(_huge, "image_bytes_too_large"),
    "bomb": Behaviour(lambda request: request.answer("200 OK", BOMB, _COMPRESSED), "image_bytes_too_large"),
    "brotli": Behaviour(says("200 OK", "Content-Encoding: br"), "bad_response"),
    "no-http": Behaviour(lambda request: request.send(b"hello there\r\n" + request.image), "bad_response"),
    "many-headers": Behaviour(says("200 OK", *(f"X-{number}: y" for number in range(1000))), "bad_response"),
    "long-header": Behaviour(says("200 OK", "X-Long: " + "y" * 100_000), "bad_response"),
    "noai": Behaviour(says("200 OK", "X-Robots-Tag: max-image-preview: large, NoAI"), "disallowed_by_server"),
    "to-private": Behaviour(lambda request: request.redirect("http://169.254.169.254/latest/"), "private_address"),
}
FAST = [name for name, behaviour in BEHAVIOURS.items() if not behaviour.slow and name != "to-private"]
SLOW = [name for name, behaviour in BEHAVIOURS.items() if behaviour.slow]


@dataclass
class MisbehavingServer:
    """Serves ``images`` (name -> bytes, or a function of the name) at http://ADDRESS:port/BEHAVIOUR/NAME.

    It also answers as a proxy of any host. ``recovered``: from then on every path has its image.
    """

    port: int
    addresses: list[str]
    images: Callable[[str], bytes]
    requests: Counter[str] = field(default_factory=Counter)  # path -> how often
    agents: set[str] = field(default_factory=set)  # values of User-Agent
    recovered: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    def url(self, behaviour: str, name: str, address: int = 0) -> str:
        return f"http://{self.addresses[address % len(self.addresses)]}:{self.port}/{behaviour}/{name}"

    def requests_of(self, behaviour: str) -> int:
        return sum(count for path, count in self.requests.items() if path.startswith(f"/{behaviour}/"))

    def answer(self, connection: socket.socket) -> None:
        try:
            with connection:
                connection.settimeout(SLOW_SECONDS)
                received = connection.recv(4096)
                if received.startswith(b"\x16"):  # TLS, which this is not
                    connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                    return _linger(connection)
                while b"\r\n\r\n" not in received and (more := connection.recv(4096)):
                    received += more
                target = received.split(b" ", 2)[1].decode("ascii")
                path = "/" + target.split("/", 3)[3] if target.startswith("http://") else target
                agent = re.search(rb"\r\nUser-Agent: ([^\r]*)", received)
                with self.lock:
                    self.agents.add(agent[1].decode() if agent else "")
                    self.requests[path.partition("?")[0]] += 1
                    number = self.requests[path.partition("?")[0]]
                behaviour, name = path.split("/")[1], path.rpartition("/")[2].partition("?")[0]
                act = says("200 OK") if self.recovered and behaviour != "hops" else BEHAVIOURS[behaviour].act
                act(Request(connection, number, path, self.images(name)))
                _linger(connection)
        except (OSError, IndexError, UnicodeDecodeError):
            pass  # the client has had enough, as it should


def _linger(connection: socket.socket) -> None:
    """Wait for the client's end: a socket closed with unread bytes would reset what is still on its way."""
    try:
        connection.shutdown(socket.SHUT_WR)
        connection.settimeout(1.0)
        while connection.recv(4096):
            pass
    except OSError:
        pass


@contextmanager
def misbehaving(images: Callable[[str], bytes], num_addresses: int = 1) -> Iterator[MisbehavingServer]:
    """A server on ``num_addresses`` addresses of this machine (127.0.0.1 and after; several on Linux only)."""
    addresses = [f"127.0.{number >> 8}.{number & 255}" for number in range(1, num_addresses + 1)]
    listeners: list[socket.socket] = []
    with selectors.DefaultSelector() as selector:
        for address in addresses:
            port = listeners[0].getsockname()[1] if listeners else 0
            listener = socket.create_server((address, port), backlog=256)
            listeners.append(listener)
            selector.register(listener, selectors.EVENT_READ)
        server = MisbehavingServer(listeners[0].getsockname()[1], addresses, images)
        ended = threading.Event()

        def accept() -> None:
            while not ended.is_set():
                for key, _ in selector.select(timeout=0.2):
                    connection, _ = key.fileobj.accept()  # type: ignore[union-attr]
                    threading.Thread(target=server.answer, args=(connection,), daemon=True).start()

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            ended.set()
            thread.join()
            for listener in listeners:
                listener.close()
