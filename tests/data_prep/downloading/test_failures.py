"""Reasons behind messages, what may be tried again, and when it is the network and not the links."""

from __future__ import annotations

import socket
from collections import Counter

import pytest

from data_prep.downloading.failures import FirstDownloads, can_change, diagnose, failure_reason
from data_prep.filters import REASONS


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ("HTTP Error 404: timed out X-Robots-Tag private address", "http_404"),  # the words of a server
        ("HTTP Error 407: Proxy Authentication Required", "proxy_failed"),
        ("Tunnel connection failed: 403 Forbidden", "proxy_failed"),
        ("Tunnel connection failed: 503 Service Unavailable", "connection_failed"),
        ("proxy gate.test:3128: [Errno 111] Connection refused", "proxy_failed"),
        ("proxy gate.test:3128: [Errno -2] Name or service not known", "proxy_failed"),
        ("host left alone after 7 failures in a row, the last: timed out", "host_unavailable"),
        ("response is not as HTTP wants it: 'timed out'", "bad_response"),
        ("response is a web page: text/html, starts with b'<html> timed out'", "html_page"),
        ("response is a web page: text/html, starts with b'leads to a private address'", "html_page"),
        ("response is not as HTTP wants it: 'X-Robots-Tag'", "bad_response"),
        ("a.test leads to a private address (10.0.0.1); --allow-private-addresses takes it", "private_address"),
        ("Use of image disallowed by X-Robots-Tag directive", "disallowed_by_server"),
        ("response is no image: image/jpeg, starts with b'connection reset'", "not_an_image"),
        ("[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: self-signed certificate", "tls_failure"),
        ("[SSL: WRONG_VERSION_NUMBER] wrong version number (_ssl.c:1006)", "tls_failure"),
        ("_ssl.c:989: The handshake operation timed out", "timeout"),
        ("[SSL: UNEXPECTED_EOF_WHILE_READING] EOF occurred in violation of protocol", "connection_failed"),
        ("[Errno 101] Network is unreachable", "connection_failed"),
        ("[Errno 104] Connection reset by peer", "connection_failed"),
        *[(str(socket.gaierror(code, text)), "dns_failure") for code, text in (
            (socket.EAI_AGAIN, "Temporary failure in name resolution"),
            (socket.EAI_NONAME, "Name or service not known"),
            (socket.EAI_NODATA, "No address associated with hostname"),
            (socket.EAI_FAIL, "Non-recoverable failure in name resolution"),
        )],
    ],
)  # fmt: skip
def test_a_message_has_one_reason(message: str, reason: str) -> None:
    assert failure_reason(message) == reason
    assert reason in REASONS or reason.startswith("http_")


def test_what_can_change() -> None:
    lasting = [
        *("http_404", "http_410", "http_403", "http_401", "http_451", "http_501", "http_505", "private_address"),
        *("bad_url", "html_page", "not_an_image", "disallowed_by_server", "too_many_redirects", "empty_caption"),
    ]
    changing = [f"http_{status}" for status in (408, 425, 429, 500, 502, 503, 504, 520, 522, 599)]
    changing += [
        "timeout",
        "dns_failure",
        "connection_failed",
        "host_unavailable",
        "proxy_failed",
        "lost_by_downloader",
    ]
    assert not any(map(can_change, lasting)) and all(map(can_change, changing))


@pytest.mark.parametrize(
    ("counts", "example", "expected"),
    [
        ({"dns_failure": 100}, "[Errno -3] Temporary failure in name resolution", "check the name server"),
        ({"proxy_failed": 100}, "HTTP Error 407: Proxy Authentication Required", "check http_proxy"),
        ({"connection_failed": 100}, "[Errno 101] Network is unreachable", "no network from here"),
        ({"connection_failed": 100}, "[Errno 111] Connection refused", "firewall"),
        ({"timeout": 99, "http_404": 1}, "timed out", "no server answers"),
        ({"dns_failure": 40, "timeout": 30, "connection_failed": 30}, "x", "no network from here"),
        ({"private_address": 100}, "a.test leads to a private address (10.0.0.1)", "--allow-private-addresses"),
        ({"html_page": 100}, "response is a web page", "log in to the network"),
        ({"tls_failure": 100}, "certificate verify failed", "SSL_CERT_FILE"),
        ({"http_429": 100}, "HTTP Error 429: Too Many Requests", "--host-interval"),
    ],
)
def test_the_network_is_named_where_nothing_comes(counts: dict[str, int], example: str, expected: str) -> None:
    reason = max(counts, key=lambda name: counts[name])
    message = diagnose(counts, {reason: example})
    assert message is not None and expected in message and example in message and "\n" not in message
    assert message.startswith(f"{counts[reason]} of {sum(counts.values())} downloads failed by {reason}")
    assert diagnose({**counts, "success": 1}, {reason: example}) is None


@pytest.mark.parametrize(
    "counts",
    [{}, {"http_404": 100}, {"dns_failure": 60, "http_404": 40}, {"http_404": 50, "timeout": 30, "dns_failure": 20}],
)
def test_dead_links_are_no_trouble_of_the_network(counts: dict[str, int]) -> None:
    assert diagnose(counts, {}) is None


def test_the_first_downloads_tell_when_they_are_of_several_hosts() -> None:
    """A sorted table may begin with a thousand rows of a host that is gone."""
    one_host, several = FirstDownloads(), FirstDownloads()
    message = "[Errno -2] Name or service not known"
    assert not any(one_host.add("gone.test:80", message) for _ in range(1000))
    found = [several.add(f"h{number % 9}.test:80", message) for number in range(64)]
    assert found[:63] == [None] * 63 and found[63] is not None and "64 of 64" in found[63]
    mixed = FirstDownloads()
    assert not any(mixed.add(f"h{n}.test", None if n == 30 else message) for n in range(500))
    assert Counter(found)[None] == 63
