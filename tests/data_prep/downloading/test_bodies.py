"""Bodies of responses: unpacked within bounds, images told from pages by their first bytes."""

from __future__ import annotations

import gzip
import io
import zlib
from email.message import Message

import pytest

from data_prep.downloading.addresses import FetchError
from data_prep.downloading.bodies import LOOK_BYTES, leads_to_placeholder, read_body, refuse_no_image
from data_prep.downloading.failures import failure_reason
from data_prep.images import FORMATS
from tests.data_prep.test_filters import encode


class Response:
    """What read_body uses of http.client.HTTPResponse; ``step`` bytes come at a time."""

    def __init__(self, body: bytes, encoding: str | None = None, length: int | None = None, step: int = 7) -> None:
        self.headers, self.length, self._stream, self._step = Message(), length, io.BytesIO(body), step
        self.given = 0
        if encoding:
            self.headers["Content-Encoding"] = encoding

    def read1(self, _: int) -> bytes:
        chunk = self._stream.read(self._step)
        self.given += len(chunk)
        return chunk


def nothing(head: bytes, headers: Message) -> None:
    pass


@pytest.mark.parametrize("step", [1, 7, 100_000])
@pytest.mark.parametrize(
    ("encoding", "pack"),
    [
        (None, bytes),
        ("identity", bytes),
        ("gzip", gzip.compress),
        (" X-GZip ", gzip.compress),
        ("deflate", zlib.compress),
    ],
)
def test_a_body_is_unpacked(encoding, pack, step: int) -> None:
    for content in (b"", b"x", bytes(range(256)) * 20):
        assert read_body(Response(pack(content), encoding, step=step), 6000, nothing) == content


def test_a_bomb_is_not_unpacked_further_than_the_bound() -> None:
    bomb = gzip.compress(bytes(50_000_000))
    response = Response(bomb, "gzip", step=500)
    with pytest.raises(FetchError, match="larger than the bound"):
        read_body(response, 100_000, nothing)
    assert response.given <= 1000  # 500 bytes of it hold 500,000
    with pytest.raises(FetchError, match="larger than the bound"):
        read_body(Response(bomb, "gzip", step=10**6), 100_000, nothing)


@pytest.mark.parametrize(
    ("response", "reason"),
    [
        (Response(gzip.compress(bytes(90))[:-9], "gzip"), "connection_failed"),
        (Response(b"no gzip at all", "gzip"), "bad_response"),
        (Response(b"x", "br"), "bad_response"),
        (Response(b"x" * 101), "image_bytes_too_large"),
        (Response(b"", length=101), "image_bytes_too_large"),
        (Response(b"x" * 50, length=60), "connection_failed"),
    ],
)
def test_what_is_wrong_with_a_body_is_named(response: Response, reason: str) -> None:
    with pytest.raises(FetchError) as caught:
        read_body(response, 100, nothing)
    assert failure_reason(str(caught.value)) == reason


def test_what_is_no_image_is_refused_before_it_is_read() -> None:
    page = Response(b"<html>" + b"x" * 1_000_000, step=100)
    with pytest.raises(FetchError, match="web page"):
        read_body(page, 10**7, refuse_no_image)
    assert page.given < LOOK_BYTES + 100


@pytest.mark.parametrize("image_format", FORMATS)
@pytest.mark.parametrize("declared", ["image/jpeg", "text/html", "application/octet-stream", "nonsense"])
def test_an_image_is_told_by_its_content(image_format: str, declared: str) -> None:
    headers = Message()
    headers["Content-Type"] = declared
    refuse_no_image(encode(image_format=image_format)[:LOOK_BYTES], headers)


@pytest.mark.parametrize(
    ("head", "declared", "reason"),
    [
        (b"<!DOCTYPE html><p>", "image/jpeg", "html_page"),
        (b"\xef\xbb\xbf\r\n <!-- a --> <!-- b --><HTML lang=en>", "image/png", "html_page"),
        (b"<?xml version='1.0'?><!DOCTYPE html>", "image/png", "html_page"),
        (b"Not found", "text/html; charset=utf-8", "html_page"),
        (b"Not found", "text/plain", "not_an_image"),
        (b'{"a": 1}', "application/json", "not_an_image"),
        (b"<?xml version='1.0'?><svg xmlns='http://www.w3.org/2000/svg'/>", "image/svg+xml", "not_an_image"),
        (b"\0\0\0 ftypavif", "image/avif", "not_an_image"),
        (b"RIFF\0\0\0\0WAVE", "image/webp", "not_an_image"),
        (b"<!--" * 128, "image/jpeg", "not_an_image"),
        (b"", "image/jpeg", "empty_image"),
    ],
)
def test_what_is_no_image_has_its_reason(head: bytes, declared: str, reason: str) -> None:
    headers = Message()
    headers["Content-Type"] = declared
    with pytest.raises(FetchError) as caught:
        refuse_no_image(head, headers)
    assert failure_reason(str(caught.value)) == reason


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("https://cdn.test/images/photo_unavailable.png", True),
        ("https://cdn.test/photo_unavailable_l.png", True),
        ("http://i.test/removed.png?x=1", True),
        ("http://i.test/image-not-found.jpg", True),
        ("http://i.test/no_image.gif", True),
        ("http://i.test/placeholder.svg", True),
        ("http://i.test/1234_abcd.jpg", False),
        ("http://i.test/a-removed-wall.jpg", False),
        ("http://i.test/missing-link-1971.jpg", False),
        ("http://i.test/", False),
    ],
)
def test_a_redirect_to_a_picture_for_all_that_is_gone_is_told(target: str, expected: bool) -> None:
    assert leads_to_placeholder("http://a.test/17.jpg", target) is expected
    assert not leads_to_placeholder(target, target)  # to https, say
