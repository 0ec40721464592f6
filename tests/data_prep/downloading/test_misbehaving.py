"""Every URL of a server that misbehaves is accounted for; what can be had is had, in as few requests as it takes."""

from __future__ import annotations

import json
import socket
import sys
import tarfile
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from data_prep.__main__ import build_parser, main
from data_prep.downloading import addresses, polite_pool
from data_prep.downloading.bounded_download import get_image
from data_prep.downloading.bounded_http import Bounds
from data_prep.downloading.courtesy import Courtesy
from data_prep.downloading.failures import can_change, failure_reason
from data_prep.downloading.polite_pool import PolitePool
from data_prep.manifest import read_manifest
from data_prep.options.shared import from_arguments
from tests.data_prep.downloading.misbehaving_server import BEHAVIOURS, FAST, SLOW, WRITTEN, misbehaving
from tests.data_prep.test_filters import encode

# of a server on this machine, which may have other work: no sound download waits for the end of a minute
LOCAL = ["--processes", "1", "--workers", "1", "--timeout", "60", "--retries", "1", "--allow-private-addresses"]
AGENT = "lab-crawler/1.0 (+https://lab.test/crawler)"


def image(name: str) -> bytes:
    """A JPEG of its own for each name."""
    return encode(size=(64, 40 + sum(name.encode()) % 50))


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def prepare(folder: Path, urls: list[str], *more: str) -> tuple[int, Counter[str], dict[str, bytes]]:
    """Exit code of `urls`, outcomes by reason, and the written images by URL."""
    table = folder / f"{len(list(folder.iterdir()))}.tsv"
    table.write_text("url\tcaption\n" + "".join(f"{url}\tof {number}\n" for number, url in enumerate(urls)))
    return run(table, *more)


def run(table: Path, *more: str) -> tuple[int, Counter[str], dict[str, bytes]]:
    """As ``prepare``, of a table that is written."""
    corpus = table.parent / table.stem
    code = main(["urls", "--input", str(table), "--output", str(corpus), *LOCAL, *more])
    if code:
        return code, Counter(), {}
    written = {}
    for shard in sorted(corpus.glob("train/*.tar")):
        with tarfile.open(shard) as tar:
            contents = {member.name: tar.extractfile(member).read() for member in tar}
        metas = {name: json.loads(content) for name, content in contents.items() if name.endswith(".json")}
        written |= {meta["url"]: contents[name.replace(".json", ".jpg")] for name, meta in metas.items()}
    manifest = read_manifest(corpus / "train")
    return code, Counter(manifest.rejected) + Counter({WRITTEN: manifest.rows}), written


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="a host for each behaviour: 127.0.0.2 and after")
def test_every_url_is_accounted_for_and_a_second_run_asks_for_what_can_still_be_had(tmp_path: Path) -> None:
    """Traps: failed rows never retried (img2dataset#6, #171), opt-outs among dead links (#249), HTML as success."""
    with misbehaving(image, len(FAST)) as server, socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # not listening
        urls = {server.url(name, f"{name}.jpg", number): BEHAVIOURS[name].outcome for number, name in enumerate(FAST)}
        urls |= {
            f"http://127.0.0.1:{closed.getsockname()[1]}/x.jpg": "connection_failed",
            f"https://127.0.0.1:{server.port}/ok/x.jpg": "tls_failure",
            "ftp://127.0.0.1/x.jpg": "bad_url",
        }
        table = [*urls, *(url for url in urls if "/ok/" in url)]  # one of them comes again
        options = ["--max-image-bytes", "1000000", "--user-agent", AGENT]
        code, outcomes, written = prepare(tmp_path, table, *options)
        assert code == 0 and server.agents == {AGENT}
        assert outcomes == Counter(urls.values()) + Counter({WRITTEN: 1, "tls_failure": 1})
        expected = {url: image(url.rpartition("/")[2]) for url, outcome in urls.items() if outcome == WRITTEN}
        assert written == expected
        asked = {name: server.requests[f"/{name}/{name}.jpg"] for name in FAST}
        assert asked == {name: BEHAVIOURS[name].requests + (name == "ok") for name in FAST}

        server.requests.clear()
        server.recovered = True
        again = [url for url, outcome in urls.items() if can_change(outcome) and "://127.0.0.1:" not in url]
        code, after, written = run(tmp_path / "0.tsv", *options, "--retry-failed")
        assert code == 0 and written == expected | {url: image(url.rpartition("/")[2]) for url in again}
        assert server.requests == Counter(f"/{url.split('/', 3)[3]}" for url in again)
        gained = Counter(urls[url] for url in again)
        assert after == outcomes - gained + Counter({WRITTEN: len(again)}), "what can't be had stays counted"


def download_all(urls: list[str], total: float, allow_private: bool = True) -> dict[str, str]:
    bounds = Bounds(total, total, 1_000_000, allow_private)
    pool = PolitePool(16, lambda url: get_image(url, bounds, Courtesy()), Courtesy(), 1)
    found = {
        key: WRITTEN if message is None else failure_reason(message)
        for key, _, message in pool.imap_unordered(0, zip(urls, urls, strict=True))
    }
    assert set(found) == set(urls)
    return found


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="a host for each behaviour: 127.0.0.2 and after")
def test_silence_and_drips_end_at_the_total_deadline_and_are_tried_again() -> None:
    with misbehaving(image, len(SLOW)) as server:
        urls = {server.url(name, f"{name}.jpg", number): name for number, name in enumerate(SLOW)}
        found = download_all(list(urls), total=3.0)
        assert {urls[url]: outcome for url, outcome in found.items()} == {
            name: BEHAVIOURS[name].outcome for name in SLOW
        }
        assert {name: server.requests_of(name) for name in SLOW} == {name: 2 for name in SLOW}


def test_a_redirect_into_the_private_network_is_counted_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        addresses, "is_public", lambda address, public=addresses.is_public: address == "127.0.0.1" or public(address)
    )
    with misbehaving(image) as server:
        urls = [server.url("to-private", "x.jpg"), server.url("ok", "y.jpg")]
        found = download_all(urls, 60.0, allow_private=False)
        assert [found[url] for url in urls] == ["private_address", WRITTEN]
        assert server.requests_of("to-private") == 1


@pytest.mark.slow
def test_a_proxy_that_refuses_ends_the_run_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """No network, told apart from dead links after the first downloads, not after the first part."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # not listening
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{closed.getsockname()[1]}")
        urls = [f"http://h{number % 50}.test/{number}.jpg" for number in range(3000)]
        code, _, _ = prepare(tmp_path, urls, "--min-yield", "0")
    message = capsys.readouterr().err
    assert code == 3 and message.count("\n") == 1
    assert "64 of 64 downloads failed by proxy_failed" in message and "check http_proxy" in message
    assert not (tmp_path / "0" / "train").exists()


def test_options_towards_servers_are_checked_and_handed_on(capsys: pytest.CaptureFixture) -> None:
    parse = build_parser().parse_args
    table = ["urls", "--input", "x.tsv"]
    assert from_arguments(Courtesy, parse(table)) == Courtesy()
    more = ["--user-agent", AGENT, "--disallow", "", "--per-host", "2", "--host-interval", "0.5", "--max-wait", "0"]
    assert from_arguments(Courtesy, parse([*table, *more])) == Courtesy(AGENT, (), 2, 0.5, 0.0)
    assert from_arguments(Courtesy, parse([*table, "--disallow", "noai, X"])).disallow == ("noai", "X")
    for wrong in (["--user-agent", "a\r\nX: y"], ["--user-agent", "ü"], ["--user-agent", " "], ["--max-wait", "nan"]):
        with pytest.raises(SystemExit) as caught:
            parse([*table, *wrong])
        assert caught.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_a_pool_that_nobody_reads_any_more_ends_its_threads() -> None:
    before = threading.active_count()
    with PolitePool(8, lambda url: b"x", Courtesy(), 0) as pool:
        next(pool.imap_unordered(None, [(number, f"http://h{number}.test/") for number in range(1000)]))
    deadline = time.monotonic() + 60
    while threading.active_count() > before:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_fault_of_ours_ends_the_part_instead_of_holding_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(polite_pool, "failure_reason", lambda message: 1 / 0)
    pool = PolitePool(2, lambda url: (_ for _ in ()).throw(OSError("timed out")), Courtesy(), 0)
    with pytest.raises(ZeroDivisionError):
        list(pool.imap_unordered(None, [(0, "http://a.test/")]))
