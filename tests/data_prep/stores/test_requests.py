"""Ranges come whole or not at all, whatever the store does; what can't be had is told apart, in one line."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from data_prep.stores import requests
from data_prep.stores.failures import StoreError, StoreMissing, StoreRefused, StoreShort, StoreUnreachable
from data_prep.stores.requests import details_of, entries_of, read_range, read_whole, size_of
from tests.range_server import RangeServer

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("faults", [[], [500], [503, 429], ["cut"], ["drop"], ["cut", "cut", 500, "cut"], ["hang"]])
def test_a_range_is_whole_after_faults(url: str, server: RangeServer, content: bytes, faults: list) -> None:
    server.faults = list(faults)
    assert read_range(url, 100, 5000) == content[100:5100]
    assert server.faults == []


def test_the_rest_of_a_cut_body_is_asked_for_and_not_all_again(server: RangeServer, content: bytes) -> None:
    server.faults = ["cut", "short"]
    assert read_range(f"{server.url}/bucket/file", 0, 8000) == content[:8000]
    assert [wanted for _, _, wanted in server.asked if wanted != "bytes=0-0"] == [
        "bytes=0-7999",
        "bytes=4000-7999",
        "bytes=6000-7999",
    ]


def test_an_announced_short_body_is_no_end_of_the_file(url: str, server: RangeServer, content: bytes) -> None:
    server.faults = ["short", "short"]
    assert read_range(url, 100, 5000) == content[100:5100]


def test_a_whole_file_and_an_empty_one(url: str, content: bytes) -> None:
    assert read_whole(url) == content and size_of(url) == len(content)
    assert read_whole(url.replace("file", "empty")) == b""
    with pytest.raises(FileNotFoundError):
        read_whole(url + "s")
    assert details_of(url + "s") is None and size_of(url + "s") is None


def test_a_range_past_the_end_is_a_short_file_at_once(url: str, server: RangeServer) -> None:
    began = time.monotonic()
    with pytest.raises(StoreShort, match="10000 bytes, expected at least 10400"):
        read_range(url, 9900, 500)
    with pytest.raises(StoreShort, match="ends before bytes 20000 to 20010"):
        read_range(url, 20_000, 10)
    assert time.monotonic() - began < requests.DEADLINE_SECONDS


def test_what_is_missing_is_not_asked_for_again(url: str, server: RangeServer) -> None:
    server.always = 404
    with pytest.raises(StoreMissing, match="file: no such object"):
        read_range(url, 0, 10)
    assert len(server.asked) == 1


def test_who_is_refused_is_asked_once_more_with_new_credentials(url: str, server: RangeServer) -> None:
    server.faults = [403]
    assert len(read_range(url, 0, 10)) == 10
    server.always, before = 403, len(server.asked)
    with pytest.raises(StoreRefused, match="refused .*; give this process credentials"):
        read_range(url, 0, 10)
    assert len(server.asked) == before + 2


def test_a_store_that_never_answers_is_named_with_range_and_tries(url: str, server: RangeServer, monkeypatch) -> None:
    monkeypatch.setattr(requests, "DEADLINE_SECONDS", 1.0)
    server.always, began = 500, time.monotonic()
    with pytest.raises(
        StoreUnreachable, match=r"file: bytes 7 to 17 could not be had in \d+ tries within 1 s"
    ) as error:
        read_range(url, 7, 10)
    assert time.monotonic() - began < 4 and "\n" not in str(error.value)


def test_a_server_that_drips_is_bounded(server: RangeServer, monkeypatch) -> None:
    monkeypatch.setattr(requests, "DEADLINE_SECONDS", 1.5)
    monkeypatch.setattr(requests, "ATTEMPT_SECONDS", 0.5)
    server.always, began = "drip", time.monotonic()
    with pytest.raises(StoreUnreachable):
        read_range(f"{server.url}/bucket/file", 0, 5000)
    assert time.monotonic() - began < 5


def test_a_server_without_ranges_is_refused_before_its_body_is_read(server: RangeServer) -> None:
    server.always = "whole"
    with pytest.raises(StoreError, match="status 200 to a range: this server can't be read by ranges"):
        read_range(f"{server.url}/bucket/file", 5, 10)


def test_a_forked_process_opens_its_own_connections(url: str, content: bytes) -> None:
    assert read_range(url, 0, 10) == content[:10]
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(0 if read_range(url, 0, 5000) == content[:5000] else 3)
        finally:
            os._exit(4)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert read_range(url, 10, 10) == content[10:20]


def test_sizes_and_lists_are_those_of_this_moment(monkeypatch) -> None:
    fsspec = pytest.importorskip("fsspec")
    files = fsspec.filesystem("memory")
    files.pipe("/moment/a/file", b"123")
    assert entries_of("memory://moment") == [("a", None)] and entries_of("memory://moment/a") == [("file", 3)]
    files.pipe("/moment/a/file", b"12345")
    files.pipe("/moment/a/more", b"")
    assert size_of("memory://moment/a/file") == 5 and entries_of("memory://moment/a") == [("file", 5), ("more", 0)]
    assert entries_of("memory://nothing") == [] and size_of("memory://moment/a") is None
    files.rm("/moment", recursive=True)


def test_a_missing_package_names_the_extra(monkeypatch) -> None:
    fsspec = pytest.importorskip("fsspec")

    def missing(*arguments, **options):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "filesystem", missing)
    with pytest.raises(StoreError, match=r"Install s3fs to access S3; pip install '.\[s3\]'"):
        read_range("s3://bucket/file", 0, 10)


def test_a_store_that_nobody_knows() -> None:
    with pytest.raises(StoreError, match="nostore://a/b: no store is called nostore; expected s3://"):
        read_range("nostore://a/b", 0, 10)


def test_nothing_is_written_to_a_web_server(server: RangeServer, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"a")
    with pytest.raises(StoreError, match="a web server is only read"):
        requests.upload(tmp_path / "a", f"{server.url}/a")


def test_redirects_lead_to_web_servers_only(server: RangeServer, content: bytes) -> None:
    server.redirects = {
        "/there": f"{server.url}/bucket/file",
        "/ftp": "ftp://127.0.0.1/x",
        "/disk": "file:///etc/passwd",
    }
    assert read_range(f"{server.url}/there", 3, 10) == content[3:13]
    for name in ("ftp", "disk"):
        with pytest.raises(
            StoreError, match="leads to ftp://.*, expected http or https|leads elsewhere .*file:///etc/passwd"
        ):
            read_range(f"{server.url}/{name}", 0, 10)


def test_a_file_system_without_a_cache_of_its_own_is_read_too() -> None:
    import fsspec

    fsspec.filesystem("memory").pipe("/bucket/file", b"0123456789")
    assert read_range("memory://bucket/file", 2, 5) == b"23456"
    with pytest.raises(StoreShort, match="10 bytes, expected at least 12"):
        read_range("memory://bucket/file", 8, 4)
