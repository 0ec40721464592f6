"""Downloads from servers that drip, loop, redirect inwards, lie about sizes, or change their address."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from data_prep.downloading import addresses
from data_prep.downloading.addresses import FetchError, is_public, split_url
from data_prep.downloading.bounded_http import MAX_REDIRECTS, Bounds, fetch
from data_prep.downloading.failures import failure_reason

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"
PAUSE = 0.05
LATE = 20.0  # seconds after which a download counts as not bounded; it is given half a second


@contextmanager
def serving(answer: Callable[[bytes, socket.socket], None]) -> Iterator[int]:
    """A server on a free port; ``answer`` is given the request line (b"" for what is no HTTP) and the connection."""

    def handle(connection: socket.socket) -> None:
        with connection:
            try:
                answer(connection.recv(4096).partition(b"\r\n")[0], connection)
            except OSError:
                pass  # the client has had enough, as it should

    def run() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=handle, args=(connection,), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=run, daemon=True).start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)


def sends(*parts: bytes, then: bytes = b"", times: int = 400) -> Callable[[bytes, socket.socket], None]:
    """An answer of ``parts``, after which ``then`` is sent again and again, slowly."""

    def answer(_: bytes, connection: socket.socket) -> None:
        for part in parts:
            connection.sendall(part)
        for _ in range(times if then else 0):
            connection.sendall(then)
            time.sleep(PAUSE)

    return answer


def get(url: str, total: float = 10.0, max_bytes: int = 1000, allow_private: bool = True) -> bytes:
    return fetch(url, Bounds(total, total, max_bytes, allow_private), {}, lambda headers: True)


def get_from(answer: Callable, scheme: str = "http", **options) -> bytes:
    with serving(answer) as port:
        return get(f"{scheme}://127.0.0.1:{port}/", **options)


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def test_a_body_comes_whole() -> None:
    assert get_from(sends(OK)) == b"hello"
    until_the_end = sends(b"HTTP/1.0 200 OK\r\n\r\n", b"x" * 50_000, then=b"y", times=3)
    assert get_from(until_the_end, max_bytes=60_000) == b"x" * 50_000 + b"yyy"
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"
    assert get_from(sends(chunked)) == b"hello"


@pytest.mark.parametrize(
    "answer",
    [
        sends(b"HTTP/1.1 200 OK\r\nX-Slow: ", then=b"x"),  # a header that never ends
        sends(b"HTTP/1.1 200 OK\r\n", then=b"X-Slow: x\r\n", times=90),  # headers that never end
        sends(then=b"HTTP/1.1 100 Continue\r\n\r\n"),
        sends(b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n", then=b"x"),
        sends(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", then=b"1\r\nx\r\n"),
        sends(b"HTTP/1.1 302 Found\r\nLocation: /again\r\nX-Slow: ", then=b"x"),
    ],
)
def test_a_dripping_server_has_so_long_in_all(answer: Callable) -> None:
    """Invariant 7: each byte comes in time, all of them would not."""
    with pytest.raises(OSError, match="timed out"):
        get_from(answer, total=0.5)


def test_a_dripped_tls_handshake_is_bounded_too() -> None:
    with pytest.raises(OSError, match="timed out"):
        get_from(sends(b"\x16\x03\x03\x40\x00", then=b"\2"), scheme="https", total=0.5)


def test_a_resolver_that_does_not_answer_is_bounded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    answered = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: answered.wait(LATE))
    with pytest.raises(OSError, match="name resolution timed out"):
        get("http://slow.test/", total=0.2)
    assert not answered.is_set()
    answered.set()


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (sends(b"HTTP/1.1 302 Found\r\nLocation: /again\r\n\r\n"), f"more than {MAX_REDIRECTS} redirects"),
        (sends(b"HTTP/1.1 302 Found\r\nLocation: file:///etc/passwd\r\n\r\n"), "not http"),
        (sends(b"HTTP/1.1 302 Found\r\nLocation: gopher://127.0.0.1/\r\n\r\n"), "not http"),
        (sends(b"HTTP/1.1 302 Found\r\n\r\n"), "HTTP Error 302"),
        (sends(b"HTTP/1.1 404 Gone\r\n\r\n"), "HTTP Error 404: Gone"),
        (sends(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000000\r\n\r\n"), "larger than the bound"),
        (sends(b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 5000), "larger than the bound"),
        (sends(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhello"), "broke off after 5 of 9"),
        (sends(b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n\r\n\x1f\x8b"), "broke off within a compressed"),
        (sends(b"no HTTP at all\r\n\r\n"), "not as HTTP wants it: .no HTTP"),
        (sends(b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 1000 + b"\r\n"), "headers"),
        (sends(b"HTTP/1.1 200 OK\r\nA: " + b"b" * 100_000), "line"),
    ],
)
def test_what_a_server_may_not_do_is_named(answer: Callable, message: str) -> None:
    with pytest.raises(Exception, match=message):
        get_from(answer)


PRIVATE = (
    *("127.0.0.1", "127.9.9.9", "0.0.0.0", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1"),
    *("224.0.0.1", "240.0.0.1", "255.255.255.255", "192.0.2.1", "198.18.0.1"),
    *("::1", "::", "fe80::1", "fe80::1%eth0", "fd00:ec2::254", "fec0::1", "ff02::1", "2001:db8::1", "::127.0.0.1"),
    *("::ffff:127.0.0.1", "::ffff:169.254.169.254", "2002:7f00:1::", "64:ff9b::169.254.169.254", "64:ff9b:1::a00:1"),
)


@pytest.mark.parametrize("address", PRIVATE)
def test_addresses_of_no_public_network_are_refused(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant 7: a table of URLs must not reach the machine's own network, nor a cloud's metadata."""
    assert not is_public(address)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [(socket.AF_INET, 1, 6, "", (address, 80))])
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("connected"))
    with pytest.raises(OSError, match="private address.*--allow-private-addresses"):
        get("http://name.test/", allow_private=False)


@pytest.mark.parametrize(
    "address", ["93.184.216.34", "2606:2800:220:1::", "::ffff:93.184.216.34", "64:ff9b::93.184.216.34"]
)
def test_public_addresses_are_not(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize("host", ["2130706433", "0x7f.1", "127.1", "[::ffff:127.0.0.1]", "localhost"])
def test_other_spellings_of_this_machine_are_resolved_first(host: str) -> None:
    with pytest.raises(OSError, match="private address"):
        get(f"http://{host}/", allow_private=False)


class Names:
    """A resolver: all names are this machine, whose address counts as public, but for those with an own answer."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **others: str) -> None:
        self.asked: list[str] = []
        self.others = others
        monkeypatch.setattr(socket, "getaddrinfo", self)
        public = is_public
        monkeypatch.setattr(addresses, "is_public", lambda address: address == "127.0.0.1" or public(address))

    def __call__(self, host: str, port: int, **_: object) -> list:
        self.asked.append(host)
        address = self.others.get(host.partition(".")[0], "127.0.0.1")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]


@pytest.mark.parametrize("target", ["http://inner.test/", "http://169.254.169.254/latest/meta-data", "//inner.test/x"])
def test_a_redirect_inwards_is_refused(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    names = Names(monkeypatch, inner="10.1.2.3", **{"169": "169.254.169.254"})
    with serving(sends(f"HTTP/1.1 302 Found\r\nLocation: {target}\r\n\r\n".encode())) as port:
        with pytest.raises(OSError, match="private address"):
            get(f"http://outer.test:{port}/", allow_private=False)
    assert len(names.asked) == 2


def test_a_name_is_resolved_once_so_that_it_cannot_change_after_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    names = Names(monkeypatch)
    connected: list[object] = []
    connect = socket.socket.connect
    monkeypatch.setattr(socket.socket, "connect", lambda self, to: connected.append(to) or connect(self, to))
    with serving(sends(OK)) as port:
        assert get(f"http://rebinding.test:{port}/", allow_private=False) == b"hello"
    assert names.asked == ["rebinding.test"] and connected == [("127.0.0.1", port)]


def test_another_address_of_a_name_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed, serving(sends(OK)) as port:
        closed.bind(("127.0.0.1", 0))  # not listening
        addresses = [
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", p)) for p in (closed.getsockname()[1], port)
        ]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: addresses)
        assert get("http://two.test/") == b"hello"


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://h/a b/ü.jpg?q=ä c&d=%20#f", ("http", "h", 80, "/a%20b/%C3%BC.jpg?q=%C3%A4%20c&d=%20")),
        (" HTTPS://Exämple.COM:8443 ", ("https", "xn--exmple-cua.com", 8443, "/")),
        ("http://例え.テスト/画像.png", ("http", "xn--r8jz45g.xn--zckzah", 80, "/%E7%94%BB%E5%83%8F.png")),
        ("http://[2001:db8::1]/x", ("http", "2001:db8::1", 80, "/x")),
        ("http://user:word@h./x", ("http", "h", 80, "/x")),
        ("http://h/\r\nX-Injected: 1", ("http", "h", 80, "/X-Injected:%201")),
    ],
)
def test_addresses_are_percent_encoded(url: str, expected: tuple) -> None:
    assert split_url(url) == expected


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "ftp://h/x", "http://", "http:///x", "http://h:x/", "http://[::1/"]
)
def test_other_addresses_are_refused(url: str) -> None:
    with pytest.raises(OSError, match="not http"):
        split_url(url)


def test_blanks_and_other_letters_are_downloaded() -> None:
    requests: list[bytes] = []

    def answer(line: bytes, connection: socket.socket) -> None:
        requests.append(line)
        connection.sendall(OK)

    with serving(answer) as port:
        assert get(f"http://127.0.0.1:{port}/a b/ü.jpg?x=1 2") == b"hello"
    assert requests == [b"GET /a%20b/%C3%BC.jpg?x=1%202 HTTP/1.1"]


def test_a_status_to_try_again_later_says_when() -> None:
    for status, header, expected in (
        (429, b"Retry-After: 7", 7.0),
        (503, b"Retry-After: 0", 0.0),
        (429, b"A: b", None),
    ):
        with pytest.raises(FetchError, match=f"HTTP Error {status}") as caught:
            get_from(sends(b"HTTP/1.1 %d Later\r\n%s\r\n\r\n" % (status, header)))
        assert caught.value.retry_after == expected
    with pytest.raises(FetchError) as caught:  # of other statuses it does not count
        get_from(sends(b"HTTP/1.1 404 No\r\nRetry-After: 7\r\n\r\n"))
    assert caught.value.retry_after is None


def test_letters_of_a_redirect_arrive_as_they_were_sent() -> None:
    requests: list[bytes] = []

    def answer(line: bytes, connection: socket.socket) -> None:
        requests.append(line)
        here = "HTTP/1.1 302 Found\r\nLocation: ä/ü.jpg?x#y\r\n\r\n".encode()
        connection.sendall(here if line.startswith(b"GET /a/b ") else OK)

    with serving(answer) as port:
        assert get(f"http://user:word@127.0.0.1:{port}/a/b#c") == b"hello"
    assert requests == [b"GET /a/b HTTP/1.1", b"GET /a/%C3%A4/%C3%BC.jpg?x HTTP/1.1"]


@pytest.mark.parametrize(
    ("chunks", "message"),
    [
        (b"5\r\nhel", "broke off within a chunk"),
        (b"5\r\nhello\r\n", "broke off within a chunk"),
        (b"many\r\nhello", "broke off within a chunk"),
    ],
)
def test_chunks_that_break_off_are_no_body(chunks: bytes, message: str) -> None:
    with pytest.raises(OSError, match=message):
        get_from(sends(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks))


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_proxy_that_is_not_there_or_refuses_is_named(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    refuses = sends(b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n")
    with socket.socket() as closed, serving(refuses) as port:
        closed.bind(("127.0.0.1", 0))  # not listening
        for proxy in (f"127.0.0.1:{closed.getsockname()[1]}", f"127.0.0.1:{port}", "nowhere.invalid:3128", "[::1"):
            for name in ("http_proxy", "https_proxy"):
                monkeypatch.setenv(name, f"http://{proxy}")
            with pytest.raises(OSError) as caught:
                get(f"{scheme}://outside.test/", allow_private=False)
            assert failure_reason(str(caught.value)) == "proxy_failed", caught.value


def test_a_proxy_resolves_names_and_is_not_asked_for_private_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    requests: list[bytes] = []

    def answer(line: bytes, connection: socket.socket) -> None:
        requests.append(line)
        connection.sendall(OK if line.startswith(b"GET") else b"HTTP/1.1 403 No\r\n\r\n")

    with serving(answer) as port:
        for name in ("http_proxy", "https_proxy"):
            monkeypatch.setenv(name, f"http://me:secret@127.0.0.1:{port}")
        assert get("http://outside.test/ü", allow_private=False) == b"hello"
        with pytest.raises(OSError, match="403"):
            get("https://outside.test/", allow_private=False)
        for host in ("169.254.169.254", "2130706433", "localhost", "[::1]"):
            with pytest.raises(OSError, match="private address"):
                get(f"http://{host}/", allow_private=False)
    assert requests == [b"GET http://outside.test:80/%C3%BC HTTP/1.1", b"CONNECT outside.test:443 HTTP/1.0"]
