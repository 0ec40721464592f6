"""A server with the fake model in a fork of the tests: started, asked, and always ended."""

from __future__ import annotations

import io
import json
import os
import re
import select
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPResponse
from io import RawIOBase
from pathlib import Path
from typing import Any

import psutil
from PIL import Image

from tests.forked_command import Forked, fork
from tests.pipeline.serving import fake_model

BOUNDARY = "a-boundary"
Main = Callable[[list[str]], int]


class Served:
    """A running server."""

    def __init__(self, process: Forked, printed: RawIOBase) -> None:
        self.process, self.printed, self.port = process, printed, 0

    def get(self, path: str, headers: Mapping[str, str] = {}) -> tuple[int, bytes]:
        return self.send("GET", path, b"", headers)

    def post(
        self, path: str, image: bytes | None = None, headers: Mapping[str, str] = {}, **fields: str | list[str]
    ) -> tuple[int, Any]:
        """A form with ``image`` and ``fields``; the code and the JSON that came back."""
        form = headers | {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
        code, body = self.send("POST", path, multipart(image, fields), form)
        return code, json.loads(body)

    def send(self, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] = {}) -> tuple[int, bytes]:
        with self.open(method, path, body, headers) as response:
            return response.status, response.read()

    @contextmanager
    def open(
        self, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] = {}
    ) -> Iterator[HTTPResponse]:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request(method, path, body, dict(headers))
            yield connection.getresponse()
        finally:
            connection.close()

    def raw(self, data: bytes = b"") -> socket.socket:
        """A connection on which ``data`` was sent."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=30)
        connection.sendall(data)
        return connection

    def metric(self, name: str) -> float:
        """The value of a line of /metrics, 0 if there is none."""
        found = re.search(rf"^{re.escape(name)} (\S+)$", self.get("/metrics")[1].decode(), re.M)
        return float(found[1]) if found else 0.0

    def wait_for(self, name: str, value: float) -> None:
        until = time.monotonic() + 20
        while (found := self.metric(name)) != value:
            assert time.monotonic() < until, f"{name} is {found}, expected {value}"
            time.sleep(0.02)

    def read_line(self, seconds: float = 60) -> str:
        """The next line that was printed; "" at the end. Byte by byte, as nothing may wait unseen in a buffer."""
        line = b""
        while not line.endswith(b"\n"):
            assert select.select([self.printed], [], [], seconds)[0], f"after {seconds} s only {line!r} was printed"
            if not (byte := self.printed.read(1)):
                break
            line += byte
        return line.decode()

    def read_rest(self) -> str:
        return self.printed.read().decode()

    def end(self, number: int = signal.SIGTERM, seconds: float = 20) -> tuple[int, str]:
        """Send a signal; the exit code and what was printed since."""
        self.process.send_signal(number)
        code = self.process.wait(seconds)
        return code, self.read_rest()

    def memory_bytes(self) -> int:
        """Resident now."""
        return psutil.Process(self.process.pid).memory_info().rss


@contextmanager
def served(
    folder: Path, *options: str, environment: Mapping[str, str] = {}, ready: bool = True, main: Main = fake_model.main
) -> Iterator[Served]:
    """A server of ``folder`` on a free port, as soon as it is ``ready``, in a fork of this process.

    ``main`` is the program, by default with the fake model.
    """
    arguments = [str(folder), "--port", "0", *options]
    output, into = os.pipe()

    def run() -> int:
        os.environ.update(environment)
        return main(arguments)

    process = Forked(arguments, fork(run, into, into))
    os.close(into)
    with os.fdopen(output, "rb", buffering=0) as printed:
        one = Served(process, printed)
        try:
            line = one.read_line()
            found = re.search(r"\d\.\d:(\d+)/", line)
            assert found, line + one.read_rest()
            one.port = int(found[1])
            if ready:
                assert "serving " in (line := one.read_line()), line + one.read_rest()
            yield one
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()


def multipart(image: bytes | None, fields: Mapping[str, str | list[str]] = {}) -> bytes:
    parts = []
    if image is not None:
        parts.append(b'Content-Disposition: form-data; name="image"; filename="x"\r\n\r\n' + image)
    for name, values in fields.items():
        for value in [values] if isinstance(values, str) else values:
            parts.append(f'Content-Disposition: form-data; name="{name}"\r\n\r\n{value}'.encode())
    begin = f"--{BOUNDARY}\r\n".encode()
    return b"".join(begin + part + b"\r\n" for part in parts) + f"--{BOUNDARY}--\r\n".encode()


def picture(colour: str = "red", size: tuple[int, int] = (40, 30), form: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, colour).save(stream, form)
    return stream.getvalue()
