"""What can go wrong with a store, told apart: nothing there, refused, too short, busy, or out of reach."""

from __future__ import annotations

import asyncio
from typing import Any

_HTTP = range(300, 600)
_BUGS = (TypeError, AttributeError, NameError, KeyError, IndexError, AssertionError, ImportError, RecursionError)


class StoreError(ValueError):
    """A store that can't give what it was asked for; the message is one line for the user."""


class StoreMissing(StoreError):
    """There is no such object."""


class StoreShort(StoreError):
    """The object ends before the range that was asked for."""


class StoreRefused(StoreError):
    """The store does not let this user read or write there."""


class StoreUnreachable(StoreError):
    """The store did not answer in time, or answered with errors until the deadline."""


def status_of(error: BaseException) -> int | None:
    """The HTTP status in an error of fsspec's stores or of urllib, wherever it hides; 404 and 403 also for Python's own
    errors of that meaning; None where there is none."""
    one: BaseException | None = error
    for _ in range(6):
        if one is None:
            break
        response = getattr(one, "response", None)
        if isinstance(response, dict):  # of botocore
            found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            code = response.get("Error", {}).get("Code")
            if code in ("SlowDown", "RequestLimitExceeded", "Throttling"):
                return 503
            if found in _HTTP:
                return 403 if code in ("ExpiredToken", "InvalidToken", "ExpiredTokenException") else found
        for holder in (one, response):
            for name in ("status_code", "status", "code"):
                found = getattr(holder, name, None)
                if type(found) is int and found in _HTTP:
                    return found
        one = one.__cause__ or one.__context__
    if isinstance(error, FileNotFoundError):
        return 404
    if isinstance(error, PermissionError) or "Credential" in type(error).__name__:
        return 403
    return None


def is_bug(error: Exception) -> bool:
    """Whether an error is of a program, and no try would mend it."""
    return isinstance(error, _BUGS) and status_of(error) is None


def explained(error: BaseException) -> str:
    """An error in a few words."""
    if isinstance(error, TimeoutError | asyncio.TimeoutError) or "Timeout" in type(error).__name__:
        return "no answer in time"
    words: Any = " ".join(str(error).split()) or type(error).__name__
    return words if len(words) <= 200 else f"{words[:200]}..."
