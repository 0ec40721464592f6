"""Why a download failed, as one of the reasons of rejection."""

from __future__ import annotations

import re

_FAILURES = (
    (r"HTTP Error (\d{3})", r"http_\1"),
    (r"private address", "private_address"),
    (r"larger than the bound", "image_bytes_too_large"),
    (r"not http\(s\)|unknown url type", "bad_url"),
    (r"Name or service|name resolution|nodename|No address", "dns_failure"),
    (r"timed out|timeout", "timeout"),
    (r"X-Robots-Tag", "disallowed_by_server"),
    (
        r"refused|reset|unreachable|No route|broke off|IncompleteRead|Remote end closed|Broken pipe|EOF occurred",
        "connection_failed",
    ),
)
_CHANGING = {"timeout", "dns_failure", "connection_failed", "http_408", "http_425", "http_429", "lost_by_downloader"}


def failure_reason(message: str) -> str:
    """The reason (see filters.REASONS) behind an error message of the downloader."""
    for pattern, reason in _FAILURES:
        match = re.search(pattern, message, re.IGNORECASE)
        if match:
            return match.expand(reason)
    return "download_failed"


def can_change(reason: str) -> bool:
    """Whether another try, a second or a year later, may succeed: not where the address or the content is at fault."""
    return reason in _CHANGING or re.fullmatch(r"http_5\d\d", reason) is not None
