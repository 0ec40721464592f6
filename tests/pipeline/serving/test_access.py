"""Who is let in: names of the host, origins of pages, tokens."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.serve import main
from pipeline.serving.gate import is_loopback
from tests.pipeline.serving.serving import Served, picture, served

TOKEN = "0123456789abcdef"
IMAGE = {"Content-Type": "image/png"}


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost:8000", "[::1]:80", "127.8.9.1", "LOCALHOST"])
def test_names_of_loopback_are_known(server: Served, host: str) -> None:
    assert server.get("/model", {"Host": host})[0] == 200


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example", "10.0.0.1", "["])
def test_a_name_that_was_led_here_is_refused(server: Served, host: str) -> None:
    for path in ("/", "/model", "/search/pictures/0", "/health"):
        assert server.get(path, {"Host": host})[0] == 421, path


def test_a_page_of_another_site_may_not_ask(server: Served) -> None:
    here = {"Host": "localhost:8000"} | IMAGE
    for headers, expected in (
        ({"Origin": "http://localhost:8000"}, 200),
        ({"Sec-Fetch-Site": "same-origin"}, 200),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "http://localhost:9000"}, 403),
        ({"Origin": "null"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
    ):
        assert server.send("POST", "/caption", picture(), here | headers)[0] == expected, headers


def test_every_response_has_the_headers_that_keep_pages_apart(server: Served) -> None:
    for method, path in (("GET", "/"), ("GET", "/nothing"), ("POST", "/caption"), ("GET", "/search/pictures/0")):
        with server.open(method, path) as response:
            assert response.headers["X-Content-Type-Options"] == "nosniff", path
            assert response.headers["Cross-Origin-Resource-Policy"] == "same-origin", path
            assert "frame-ancestors 'none'" in response.headers["Content-Security-Policy"], path
            assert "Access-Control-Allow-Origin" not in response.headers, path


def test_a_token_is_asked_of_all_that_tells_something(tmp_path: Path) -> None:
    with served(tmp_path, "--host", "0.0.0.0", environment={"OPENFLM_TOKEN": TOKEN}) as server:
        for path in ("/", "/docs", "/openapi.json", "/health"):
            assert server.get(path)[0] == 200, path
        good = {"Authorization": f"Bearer {TOKEN}"}
        for headers in ({}, {"Authorization": f"Basic {TOKEN}"}, {"Authorization": f"Bearer {TOKEN}x"},
                        {"Authorization": "Bearer"}, {"Authorization": f"Bearer {TOKEN[:-1]}"},
                        {"Authorization": "Bearer \xe4\xff"}):  # fmt: skip
            for path in ("/model", "/metrics", "/search/status", "/search/pictures/0", "/nothing"):
                assert server.get(path, headers)[0] == 401, (path, headers)
            assert server.send("POST", "/caption", picture(), IMAGE | headers)[0] == 401
        assert server.send("POST", "/caption", picture(), IMAGE | good)[0] == 200
        assert server.get("/model", good | {"Host": "name.example"})[0] == 200
        assert server.send("POST", "/caption", picture(), IMAGE | good | {"Origin": "http://evil.example"})[0] == 403


def test_a_published_name_is_known_beside_loopback(tmp_path: Path) -> None:
    with served(tmp_path, "--public-name", "pictures.example", "--token", TOKEN) as server:
        good = {"Authorization": f"Bearer {TOKEN}"}
        for host, expected in (("pictures.example", 200), ("localhost", 200), ("other.example", 421)):
            assert server.get("/model", good | {"Host": host})[0] == expected, host


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--host", "0.0.0.0"], "--host 0.0.0.0 serves others than this machine and there is no token"),
        (["--public-name", "x.example"], "--public-name serves others than this machine and there is no token"),
        (["--token", "short"], "found a token of 5 characters; expected at least 16"),
        (["--token", "a token with some blanks"], "without blanks"),
        (["--search", "nowhere"], "--search nowhere: no such folder"),
        (["--host", "no.such.name.invalid"], "--host no.such.name.invalid"),
    ],
)
def test_what_may_not_be_served_is_refused_in_one_line(
    tmp_path: Path, options: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:

    assert main([str(tmp_path), "--port", "0", *options]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1, error


def test_loopback() -> None:
    for host in ("127.0.0.1", "::1", "[::1]", "localhost", "127.1.2.3"):
        assert is_loopback(host), host
    for host in ("0.0.0.0", "::", "", "example.org", "10.0.0.1", "127.0.0.1.example"):
        assert not is_loopback(host), host
