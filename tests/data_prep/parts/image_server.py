"""A server on this machine with an image behind each number, which can be told to fail, and `urls` commands for it."""

from __future__ import annotations

import http.server
import io
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

REPOSITORY = Path(__file__).resolve().parents[3]


def jpeg(number: int) -> bytes:
    """Another picture for each number."""
    stream = io.BytesIO()
    Image.new("RGB", (24, 20), (number % 256, number // 256 % 256, 90)).save(stream, "JPEG")
    return stream.getvalue()


class _Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        number = int(self.path[1:])
        self.server.asked.append(number)
        time.sleep(self.server.seconds)
        status = self.server.status.get(number, 200)
        content = jpeg(number) if status == 200 else b"no"
        try:
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
        except OSError:
            pass  # the client was killed


class ImageServer(http.server.ThreadingHTTPServer):
    """``asked`` are the numbers of all requests, ``status`` answers other than 200, ``seconds`` each answer takes."""

    request_queue_size = 128
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked: list[int] = []
        self.status: dict[int, int] = {}
        self.seconds = 0.0

    def table(self, path: Path, count: int) -> Path:
        """A table of URLs of the numbers from 0."""
        lines = (f"http://127.0.0.1:{self.server_port}/{number}\tpicture {number}\n" for number in range(count))
        path.write_text("url\tcaption\n" + "".join(lines))
        return path


@contextmanager
def image_server() -> Iterator[ImageServer]:
    server = ImageServer()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def arguments(table: Path, output: Path, *more: str, rows_per_part: int = 20) -> list[str]:
    """The command line of ``data_prep`` for small parts."""
    words = ["urls", "--input", str(table), "--output", str(output), "--rows-per-part", str(rows_per_part)]
    words += ["--samples-per-shard", "8", "--allow-private-addresses", "--retries", "0", "--timeout", "60"]
    return [*words, "--processes", "1", "--threads", "4", *more]


def program(words: list[str], *launcher: str) -> list[str]:
    return [*launcher, sys.executable, "-m", "data_prep", *words]


def mpirun(processes: int) -> list[str]:
    """The launcher that is here, Open MPI's or MPICH's; none where there is none."""
    found = shutil.which("mpirun", path=_search_path())
    if found is None:
        return []
    said = subprocess.run([found, "--version"], capture_output=True, text=True).stdout
    more = ["--oversubscribe", "--bind-to", "none", "--allow-run-as-root"] if "Open MPI" in said else []
    return [found, "-n", str(processes), *more]


def _search_path() -> str:
    return f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


def start(command: list[str], log: Path, **variables: str) -> subprocess.Popen:
    """The command in a session of its own, what it says in ``log``."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "OMPI_"))}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "PATH": _search_path(), **variables}
    with log.open("ab") as stream:
        return subprocess.Popen(
            command, cwd=log.parent, env=environment, stdout=stream, stderr=stream, start_new_session=True
        )


def files(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
