"""A server with the fake model in a process of its own, for tests: started, asked, and always ended."""

from __future__ import annotations

import io
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image

REPOSITORY = Path(__file__).resolve().parents[3]
BOUNDARY = "a-boundary"


class Served:
    """A running server."""

    def __init__(self, process: subprocess.Popen[str], port: int) -> None:
        self.process, self.port, self.address = process, port, f"http://127.0.0.1:{port}/"

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

    def memory_bytes(self) -> int:
        """Resident now."""
        return psutil.Process(self.process.pid).memory_info().rss


@contextmanager
def served(folder: Path, *options: str, environment: Mapping[str, str] = {}, ready: bool = True) -> Iterator[Served]:
    """A server of ``folder`` on a free port, as soon as it is ``ready``."""
    command = [sys.executable, "-m", "tests.pipeline.serving.fake_model", str(folder), "--port", "0", *options]
    process = subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        line = read_line(process)
        found = re.search(r"127\.0\.0\.1:(\d+)|0\.0\.0\.0:(\d+)", line)
        assert found, line + process.stdout.read()
        if ready:
            assert "serving a fake model at" in (line := read_line(process)), line + process.stdout.read()
        yield Served(process, int(found[1] or found[2]))
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def read_line(process: subprocess.Popen[str], seconds: float = 60) -> str:
    assert select.select([process.stdout], [], [], seconds)[0], f"nothing printed within {seconds} s"
    return process.stdout.readline()


def end(one: Served, number: int = signal.SIGTERM, seconds: float = 20) -> tuple[int, str]:
    """Send a signal; the exit code and what was printed since."""
    one.process.send_signal(number)
    code = one.process.wait(seconds)
    return code, one.process.stdout.read()


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


def noise(side: int) -> bytes:
    """A PNG of about 3 * side * side bytes."""
    stream = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(stream, "PNG", compress_level=0)
    return stream.getvalue()
