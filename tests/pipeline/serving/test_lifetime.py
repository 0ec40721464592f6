"""Loading, ending by a signal, being killed and started again."""

from __future__ import annotations

import json
import signal
import socket
import threading
import time
from pathlib import Path

import pytest

from pipeline.serve import main
from tests.pipeline.serving.serving import Served, picture, served

IMAGE = {"Content-Type": "image/png"}


def test_health_is_bad_until_the_model_is_loaded(tmp_path: Path) -> None:
    with served(tmp_path, environment={"SECONDS_TO_LOAD": "0.5"}, ready=False) as server:
        assert server.get("/health") == (503, b'{"status":"loading"}')
        assert server.send("POST", "/caption", picture(), IMAGE)[0] == 503
        assert server.get("/")[0] == 200
        assert "serving a fake model" in server.read_line()
        assert server.get("/health") == (200, b'{"status":"ready"}')
        assert server.send("POST", "/caption", picture(), IMAGE)[0] == 200


def test_a_signal_while_it_loads_ends_it(tmp_path: Path) -> None:
    with served(tmp_path, environment={"SECONDS_TO_LOAD": "1"}, ready=False) as server:
        assert server.end() == (0, "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_what_runs_and_refuses_what_is_new(tmp_path: Path, number: int) -> None:
    found: list[tuple[int, bytes]] = []
    with served(tmp_path, environment={"SECONDS_A_CALL": "0.5"}) as server:
        asking = threading.Thread(target=lambda: found.append(server.send("POST", "/caption", picture(), IMAGE)))
        asking.start()
        server.wait_for("openflm_requests_taken", 1)
        server.process.send_signal(number)
        server_is_ending(server)
        assert server.send("POST", "/caption", picture(), IMAGE)[0] == 503
        code, printed = server.process.wait(20), server.read_rest()
        asking.join(20)
    assert code == 0 and printed == ""
    assert found[0][0] == 200 and json.loads(found[0][1])["caption"].startswith("a red thing")


def request(path: str = "/caption") -> bytes:
    """A whole request with a picture, as it stands on the wire."""
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\nContent-Length: {len(picture())}"
    return head.encode() + b"\r\n\r\n" + picture()


def server_is_ending(server: Served) -> None:
    until = time.monotonic() + 10
    while server.get("/health") != (503, b'{"status":"ending"}'):
        assert time.monotonic() < until
        time.sleep(0.01)


def test_it_ends_in_time_beside_a_model_that_hangs(tmp_path: Path) -> None:
    with served(tmp_path, "--timeout", "1", environment={"SECONDS_A_CALL": "30"}) as server:
        asking = server.raw(request())
        server.wait_for("openflm_requests_taken", 1)
        code, _ = server.end(seconds=15)
        asking.close()
        assert code == 0


def test_a_second_signal_ends_it_at_once(tmp_path: Path) -> None:
    with served(tmp_path, "--timeout", "600", environment={"SECONDS_A_WORD": "2"}) as server:
        connection = server.raw(request("/caption?stream=true"))
        server.wait_for("openflm_requests_taken", 1)
        server.process.send_signal(signal.SIGINT)
        server_is_ending(server)
        code, _ = server.end(signal.SIGINT, seconds=12)
        connection.close()
        assert code == 0


def test_killed_and_started_again_it_serves(tmp_path: Path) -> None:
    with served(tmp_path) as server:
        port = server.port
        idle = server.raw()
        assert server.send("POST", "/caption", picture(), IMAGE)[0] == 200
        server.process.send_signal(signal.SIGKILL)
        server.process.wait()
        idle.close()
    with served(tmp_path, "--port", str(port)) as server:
        assert server.port == port and server.send("POST", "/caption", picture(), IMAGE)[0] == 200


def test_a_port_in_use_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main([str(tmp_path), "--port", port]) == 2
    assert capsys.readouterr().err == f"error: --port {port} is in use; give another, or end what listens there\n"
