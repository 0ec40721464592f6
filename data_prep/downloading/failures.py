"""Why a download failed, as one of the reasons of rejection, and what that tells about the machine and its network."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping

_FAILURES = (  # what a message starts with or holds -> reason; the first that fits counts
    (r"^Tunnel connection failed: 50[234]", "connection_failed"),  # the proxy could not reach the server
    (r"^HTTP Error 407\b|^proxy |^Tunnel connection failed", "proxy_failed"),
    (r"^HTTP Error (\d{3})", r"http_\1"),
    (r"^host left alone", "host_unavailable"),
    (r"^address is not http\(s\)|unknown url type", "bad_url"),
    (r"^\S+ leads to a private address", "private_address"),
    (r"^response larger than the bound", "image_bytes_too_large"),
    (r"^response is empty", "empty_image"),
    (r"^response is a web page", "html_page"),
    (r"^response is no image", "not_an_image"),
    (r"^redirected to a placeholder", "placeholder_image"),
    (r"^more than \d+ redirects", "too_many_redirects"),
    (r"^Use of image disallowed", "disallowed_by_server"),
    (r"^response is not as HTTP", "bad_response"),
    (r"Name or service|name resolution|nodename|No address|Name does not resolve|unknown error.*resolv", "dns_failure"),
    (r"timed out|timeout", "timeout"),
    (r"CERTIFICATE_VERIFY_FAILED|certificate verify failed", "tls_failure"),
    (
        r"refused|reset|unreachable|No route|broke off|IncompleteRead|Remote end closed|Broken pipe|EOF occurred"
        r"|Connection aborted|host is down|violation of protocol",
        "connection_failed",
    ),
    (r"\[SSL|_ssl\.c|\bTLS\b", "tls_failure"),
)
_CHANGING = {
    *("timeout", "dns_failure", "connection_failed", "host_unavailable", "proxy_failed", "tls_failure"),
    *("http_408", "http_425", "http_429", "lost_by_downloader"),
}
_LASTING_5XX = {"http_501", "http_505"}  # RFC 9110: the server can't do what was asked, or not in this version of HTTP
_SHARE = 0.95  # of the failures that have one reason, for that reason to be the machine's
_NEVER_ARRIVED = {"dns_failure", "connection_failed", "timeout"}


def failure_reason(message: str) -> str:
    """The reason (see filters.REASONS) behind an error message of the downloader."""
    for pattern, reason in _FAILURES:
        match = re.search(pattern, message, re.IGNORECASE)
        if match:
            return match.expand(reason)
    return "download_failed"


def can_change(reason: str) -> bool:
    """Whether another try, a second or a year later, may succeed: not where the address or the content is at fault."""
    return reason in _CHANGING or (re.fullmatch(r"http_5\d\d", reason) is not None and reason not in _LASTING_5XX)


def diagnose(counts: Mapping[str, int], examples: Mapping[str, str]) -> str | None:
    """What keeps this machine from downloading, and what to do about it, in one line; None if links are merely dead.

    ``counts`` has the failures by reason, and "success" where something could be had; ``examples`` a message for a
    reason, as far as there is one. It is for callers to ask only when enough was tried.
    """
    failed = sum(counts.values())
    if not failed or counts.get("success"):
        return None
    reason, count = max(counts.items(), key=lambda entry: entry[1])
    example = f" ({examples[reason][:150]})" if examples.get(reason) else ""
    advice = None
    if count >= _SHARE * failed:
        unreachable = reason == "connection_failed" and re.search(
            "unreachable|No route", examples.get(reason, ""), re.IGNORECASE
        )
        advice = _NO_NETWORK if unreachable else _ADVICE.get(reason)
    if advice is None and sum(counts.get(name, 0) for name in _NEVER_ARRIVED) == failed:
        advice = _NO_NETWORK
    return None if advice is None else f"{count} of {failed} downloads failed by {reason}{example}: {advice}"


class FirstDownloads:
    """The first downloads of a part, which may all fail for a reason that is this machine's.

    Only where they are of several hosts: rows are often sorted, and one host may be dead.
    """

    COUNT, HOSTS = 64, 8

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._examples: dict[str, str] = {}
        self._hosts: set[str] = set()

    def add(self, host: str, message: str | None) -> str | None:
        """Count a first try, ``message`` None where it succeeded; the diagnosis, once there is one."""
        reason = "success" if message is None else failure_reason(message)
        self._counts[reason] += 1
        self._examples.setdefault(reason, message or "")
        self._hosts.add(host)
        if sum(self._counts.values()) < self.COUNT or len(self._hosts) < self.HOSTS:
            return None
        return diagnose(self._counts, self._examples)


_NO_NETWORK = "no network from here to the servers; check it, or name the proxy in http_proxy and https_proxy"
_ADVICE = {
    "dns_failure": "no name can be resolved here; check the name server (`getent hosts example.org`), or name a proxy "
    "that resolves names in http_proxy and https_proxy",
    "proxy_failed": "the proxy refuses or is not there; check http_proxy and https_proxy, their password, and no_proxy",
    "timeout": "no server answers: no network, or a firewall that drops what it forbids; check it, or name the proxy "
    "in http_proxy and https_proxy",
    "connection_failed": "connections are refused or cut, by a firewall perhaps; check the network, or name the proxy "
    "in http_proxy and https_proxy",
    "private_address": "names lead into a private network; check the name server, or give --allow-private-addresses "
    "if these are your own servers",
    "html_page": "a web page comes in place of every image: log in to the network, or check what the proxy sends",
    "tls_failure": "no certificate is accepted; check the clock, and where a proxy opens TLS set SSL_CERT_FILE",
    "http_429": "the servers ask to be asked more slowly; lower --threads and --processes, or set --host-interval",
}
