"""What is sent to a hub, and that a hub which refuses or is not there is one line."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from pipeline.config.options import ConfigError
from pipeline.export import main
from pipeline.exported.folder import MANIFEST, with_own_hash
from pipeline.exporting.uploading import push, refuse_unreachable

NAMES = ("config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What the manifest of an export lists, and a file that was put beside it later."""
    for name in (*NAMES, "README.md", "samples.json"):
        (tmp_path / name).write_text("{}")
    files = {name: {"bytes": 2, "sha256": ""} for name in NAMES}
    (tmp_path / MANIFEST).write_bytes(with_own_hash({"format_version": 1, "files": files}))
    return tmp_path


@pytest.fixture
def refusing_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A server on loopback that answers 401 to everything, as the hub does to a wrong token."""

    class Refusing(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(401)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def online(monkeypatch: pytest.MonkeyPatch, token: str | None, endpoint: str = "http://127.0.0.1:9") -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: token)
    honest = huggingface_hub.HfApi
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: honest(endpoint=endpoint, token=token))


def test_the_files_of_the_manifest_are_sent_and_no_others(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, dict[str, Any]]] = []

    class Api:
        def create_repo(self, name: str, **options: Any) -> None:
            asked.append((name, options))

        def upload_folder(self, **options: Any) -> str:
            asked.append(("upload", options))
            return "https://hub/me/model"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert push(folder, "me/model") == "https://hub/me/model"
    assert asked[0] == ("me/model", {"private": True, "exist_ok": True})
    assert sorted(asked[1][1]["allow_patterns"]) == sorted([*NAMES, MANIFEST, "README.md"])


def test_no_token_no_network_and_a_wrong_token_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, refusing_hub: str
) -> None:
    with monkeypatch.context() as patch:
        online(patch, None)
        assert main([str(tmp_path), str(tmp_path / "out"), "--push", "me/model"]) == 2
        error = capsys.readouterr().err
        assert "no token of the hub" in error and error.count("\n") == 1
    for endpoint, reason in (("http://127.0.0.1:9", "refused"), (refusing_hub, "401|token")):
        with monkeypatch.context() as patch:
            online(patch, "hf_secret", endpoint)
            with pytest.raises(ConfigError, match=reason) as caught:
                refuse_unreachable("me/model")
        assert "hf_secret" not in str(caught.value) and "\n" not in str(caught.value)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE"):
        refuse_unreachable("me/model")
