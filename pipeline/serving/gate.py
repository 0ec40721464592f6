"""The door of the server: who may ask, with which headers every response leaves, and what is counted of it."""

from __future__ import annotations

import hmac
import ipaddress
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipeline.batching.metrics import Metrics

OPEN_PATHS = {"/", "/docs", "/openapi.json", "/health"}  # without a token: they tell nothing of pictures or model


@dataclass(frozen=True)
class Access:
    """``token`` that requests must carry, None: none; ``names`` of hosts that they may name, None: any."""

    token: str | None
    names: frozenset[str] | None
    is_loopback: bool


def is_loopback(host: str) -> bool:
    """Whether an address or name can be this machine's loopback only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class Gate:
    """ASGI application around another."""

    def __init__(
        self,
        app: ASGIApp,
        access: Access,
        policy: str,
        metrics: Metrics,
        refusal: Callable[[str], tuple[int, str] | None],
    ) -> None:
        """``policy`` is the Content-Security-Policy; ``refusal`` gives code and reason if a path can't be had now."""
        self._app, self._access, self._metrics, self._refusal = app, access, metrics, refusal
        self._headers = [
            (b"content-security-policy", policy.encode()),
            (b"x-content-type-options", b"nosniff"),
            (b"x-frame-options", b"DENY"),
            (b"referrer-policy", b"no-referrer"),
            (b"cross-origin-resource-policy", b"same-origin"),
            (b"cross-origin-opener-policy", b"same-origin"),
            (b"cache-control", b"no-store"),
        ]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        began, code = time.monotonic(), 500

        async def send_with_headers(message: Message) -> None:
            nonlocal code
            if message["type"] == "http.response.start":
                code = message["status"]
                message["headers"] = [*message["headers"], *self._headers]
            await send(message)

        try:
            refused = self._refuse(scope["method"], scope["path"], Headers(scope=scope))
            if refused is None:
                await self._app(scope, receive, send_with_headers)
            else:
                await _respond(send_with_headers, *refused)
        finally:
            route = scope.get("route")
            self._metrics.count_request(getattr(route, "path", "other"), code, time.monotonic() - began)

    def _refuse(self, method: str, path: str, headers: Headers) -> tuple[int, str, dict[str, str]] | None:
        """Code, reason and headers of a refusal; None if the request may come in."""
        host = headers.get("host", "")
        if not self._is_known(host):
            return 421, f"this server is not {host[:100]!r}; ask it by the name it was started with", {}
        if method not in ("GET", "HEAD") and not _is_same_origin(headers, host):
            return 403, "a page of another site may not ask this server", {}
        if self._access.token is not None and path not in OPEN_PATHS and not self._has_token(headers):
            return 401, "this server needs its token: Authorization: Bearer TOKEN", {"WWW-Authenticate": "Bearer"}
        if (refused := self._refusal(path)) is not None:
            return *refused, {"Retry-After": "5"}
        return None

    def _is_known(self, host: str) -> bool:
        """A page elsewhere can make a browser take its name for this machine (DNS rebinding): names are compared."""
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        if self._access.is_loopback and is_loopback(name):
            return True
        return self._access.names is None or name in self._access.names

    def _has_token(self, headers: Headers) -> bool:
        scheme, _, given = headers.get("authorization", "").partition(" ")
        expected = self._access.token or ""
        return hmac.compare_digest(given.strip().encode(), expected.encode()) and scheme.lower() == "bearer"


def _is_same_origin(headers: Headers, host: str) -> bool:
    """Browsers name the origin of what a page sends (Fetch standard, 3.2); other programs name none."""
    if headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
        return False
    origin = headers.get("origin")
    try:
        return origin is None or urlsplit(origin).netloc.lower() == host.lower() != ""
    except ValueError:
        return False


async def _respond(send: Callable[[Message], Any], code: int, reason: str, headers: dict[str, str]) -> None:
    body = json.dumps({"detail": reason}).encode()
    lines = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    lines += [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": code, "headers": lines})
    await send({"type": "http.response.body", "body": body})
