"""Stores that answer at once, or fail soon."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_prep.stores import requests
from tests.range_server import RangeServer, serving


@pytest.fixture
def content() -> bytes:
    return random.Random(0).randbytes(10_000)


@pytest.fixture
def server(tmp_path: Path, content: bytes) -> Iterator[RangeServer]:
    (tmp_path / "www" / "bucket").mkdir(parents=True)
    (tmp_path / "www" / "bucket" / "file").write_bytes(content)
    (tmp_path / "www" / "bucket" / "empty").write_bytes(b"")
    with serving(tmp_path / "www") as running:
        yield running


@pytest.fixture(params=["http", "s3"])
def url(request: pytest.FixtureRequest, server: RangeServer, monkeypatch) -> str:
    """The address of ``content``: by plain HTTP, and by S3's client, which asks the same server."""
    if request.param == "http":
        return f"{server.url}/bucket/file"
    pytest.importorskip("s3fs", reason="no s3fs: pip install '.[s3]'")
    for name, value in {"ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b", "DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    return "s3://bucket/file"


@pytest.fixture(autouse=True)
def impatient(monkeypatch, tmp_path: Path) -> Iterator[None]:
    """Deadlines of seconds, temporary files of this test, and stores opened anew."""
    monkeypatch.setattr(requests, "DEADLINE_SECONDS", 6.0)
    monkeypatch.setattr(requests, "ATTEMPT_SECONDS", 2.0)
    monkeypatch.setattr(requests, "_FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(requests, "_BUSY_PAUSE_SECONDS", 0.02)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    requests.open_anew()
    yield
    requests.open_anew()
