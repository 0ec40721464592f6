"""A web server on this machine that serves a folder by ranges, as S3 does, and misbehaves where it is told to."""

from __future__ import annotations

import http.server
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class RangeServer(http.server.ThreadingHTTPServer):
    """Serves ``folder``. ``faults`` is what happens to the next requests for parts of files, one each, in order:

    a status such as 503, ``cut`` (half of the body, then the connection ends), ``short`` (half of the body, announced
    so), ``drop`` (no answer), ``whole`` (the range is ignored), ``drip`` (a byte every 50 ms), ``hang``, or ``ok``.
    ``always`` happens to all when ``faults`` are used up.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self, folder: Path, handler: type[http.server.BaseHTTPRequestHandler] | None = None) -> None:
        super().__init__(("127.0.0.1", 0), handler or Handler)
        self.folder, self.faults, self.always = folder, [], "ok"
        self.redirects: dict[str, str] = {}  # path -> where it leads
        self.asked: list[tuple[str, str, str]] = []  # method, path, range
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def next_fault(self) -> str | int:
        with self.lock:
            return self.faults.pop(0) if self.faults else self.always

    def handle_error(self, request, client_address) -> None:
        """A client that has gone away is no news."""


@contextmanager
def serving(folder: Path) -> Iterator[RangeServer]:
    with RangeServer(folder) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(has_body=False)

    def do_GET(self) -> None:
        self._answer(has_body=True)

    def _answer(self, has_body: bool) -> None:
        path, wanted = self.path.partition("?")[0], self.headers.get("Range", "")
        self.server.asked.append((self.command, path, wanted))
        fault = self.server.next_fault() if has_body and wanted not in ("", "bytes=0-0") else "ok"
        if path in self.server.redirects:
            self._send(302, b"", {"Location": self.server.redirects[path]})
            return
        file = self.server.folder / path.lstrip("/")
        if fault == "drop":
            self.close_connection = True
            return
        if isinstance(fault, int) or not file.is_file():
            self._send(fault if isinstance(fault, int) else 404, b"<Error><Code>Fault</Code></Error>" * has_body, {})
            return
        content = file.read_bytes()
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", wanted)
        if found is None or fault == "whole":
            self._send(200, content if has_body else b"", {}, len(content))
            return
        start, stop = int(found[1]), min(int(found[2]) + 1, len(content))
        if start >= len(content):
            self._send(416, b"", {"Content-Range": f"bytes */{len(content)}"})
            return
        body = content[start:stop]
        if fault == "short":
            body = body[: len(body) // 2]
        place = {"Content-Range": f"bytes {start}-{start + len(body) - 1}/{len(content)}"}
        self._send(206, body, place, fault=fault)

    def _send(self, status: int, body: bytes, more: dict, length: int | None = None, fault: str | int = "ok") -> None:
        self.send_response(status)
        for name, value in more.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.send_header("Last-Modified", "Sun, 01 Nov 2026 00:00:00 GMT")
        self.send_header("ETag", '"0"')
        self.end_headers()
        if fault == "hang":
            time.sleep(2)
        if fault == "drip":
            for byte in body:
                self.wfile.write(bytes([byte]))
                time.sleep(0.05)
        elif fault == "cut":
            self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
        else:
            self.wfile.write(body)

    def log_message(self, *arguments) -> None:
        """Say nothing."""
