"""Files of the hub: the local cache first, then a server, for a bounded time."""

from __future__ import annotations

import hashlib
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants
import pytest

from pipeline.weights.hub import Hub, HubError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {"config.json": b'{"model_type": "roberta"}', "model.safetensors": b"weights" * 100}


class Server(BaseHTTPRequestHandler):
    """Answers as the hub does for the files of one repository."""

    def do_HEAD(self) -> None:
        self.reply(with_body=False)

    def do_GET(self) -> None:
        self.reply(with_body=True)

    def reply(self, with_body: bool) -> None:
        name = self.path.removeprefix("/roberta-base/resolve/main/").removeprefix(f"/roberta-base/resolve/{COMMIT}/")
        body = FILES.get(name, b"")
        self.send_response(200 if body else 404)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        if not body:
            self.send_header("X-Error-Code", "EntryNotFound" if "/" not in name else "RepoNotFound")
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, for this process and those that it starts, which may ask the hub."""
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    return tmp_path


@pytest.fixture
def server(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadingHTTPServer]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as served:
        threading.Thread(target=served.serve_forever, daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{served.server_port}")
        yield served
        served.shutdown()


def fill_cache(cache: Path) -> Path:
    """As the hub's own library leaves it."""
    folder = cache / "models--roberta-base" / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    (cache / "models--roberta-base" / "refs").mkdir()
    (cache / "models--roberta-base" / "refs" / "main").write_text(COMMIT)
    for name, body in FILES.items():
        (folder / name).write_bytes(body)
    return folder


def test_the_cache_is_asked_first(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = fill_cache(cache)
    monkeypatch.setattr(Hub, "_ask", None)
    assert Hub().folder("roberta-base", *FILES) == folder


def test_offline_means_the_cache_only(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill_cache(cache)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(Hub, "_ask", None)
    with pytest.raises(HubError, match="not in the local cache, and HF_HUB_OFFLINE forbids"):
        Hub().folder("roberta-base", "config.json", "tokenizer.json")


@pytest.mark.slow
def test_files_are_fetched_and_kept(server: ThreadingHTTPServer, capsys: pytest.CaptureFixture) -> None:
    hub = Hub(60, 60)
    folder = hub.folder("roberta-base", *FILES)
    assert {name: (folder / name).read_bytes() for name in FILES} == FILES
    assert "fetching config.json, model.safetensors of roberta-base from the hub" in capsys.readouterr().out
    with pytest.raises(HubError, match="the hub does not give it") as error:
        hub.folder("roberta-base", "tokenizer.json")
    assert "\n" not in str(error.value)
    server.shutdown()
    assert Hub().folder("roberta-base", *FILES) == folder


@pytest.mark.slow
def test_a_hub_that_is_not_there_or_never_answers_is_given_up(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked once: the second file is not waited for. Then one that refuses: bound, and not listening."""
    asked, ask = [], Hub._ask
    monkeypatch.setattr(Hub, "_ask", lambda self, *words: asked.append(words[0]) or ask(self, *words))
    with socket.socket() as silent, socket.socket() as shut:
        for one in (silent, shut):
            one.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        hub = Hub(connect_seconds=1)
        for name in FILES:
            with pytest.raises(HubError, match=r"the hub does not answer \(nothing within 1 s\)"):
                hub.folder("roberta-base", name)
        assert asked == ["reach"]
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{shut.getsockname()[1]}")
        with pytest.raises(HubError, match=r"the hub does not answer \(.*[Cc]onnect"):
            Hub(60).folder("roberta-base", "config.json")
