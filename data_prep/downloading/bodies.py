"""Reads the body of a response within bounds, and refuses what is no image at its first bytes."""

from __future__ import annotations

import http.client
import io
import re
import zlib
from collections.abc import Callable
from email.message import Message
from urllib.parse import urlsplit

from data_prep.downloading.addresses import FetchError

TOO_LARGE = "response larger than the bound"
EMPTY = "response is empty"
NOT_HTTP = "response is not as HTTP wants it"
PLACEHOLDER = "redirected to a placeholder"
LOOK_BYTES = 512
_CHUNK_BYTES = 1 << 16
_TIFF = (b"II*\0", b"MM\0*", b"MM*\0", b"II\0*", b"MM\0+", b"II+\0")  # all that Pillow takes
_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"BM", *_TIFF)
_PAGE = re.compile(rb"<(!doctype\s+html|html|head|body|script|title|meta)\b", re.IGNORECASE)
_GONE = re.compile(
    r"((photo|image|img|picture|file)s?[-_]?)?(unavailable|not[-_]?available|not[-_]?found|removed|deleted|missing"
    r"|placeholder|no[-_]?(image|photo|picture)([-_]?(available|found))?)([-_]\w{1,5})?",
    re.IGNORECASE,
)


def read_body(response: http.client.HTTPResponse, max_bytes: int, look: Callable[[bytes, Message], None]) -> bytes:
    """The whole body, unpacked if the server compressed it, of at most ``max_bytes`` both on the way and unpacked.

    ``look`` is called once, with at least LOOK_BYTES or all of it, and may refuse the rest by raising FetchError.
    """
    unpack = _Unpacker(response.headers.get("Content-Encoding", ""))
    expected, received, looked = response.length, 0, False
    if expected is not None and expected > max_bytes:
        raise FetchError(f"{TOO_LARGE}: {expected} bytes announced")
    content = io.BytesIO()
    while chunk := response.read1(_CHUNK_BYTES):
        received += len(chunk)
        content.write(unpack(chunk, max_bytes + 1 - content.tell()))
        if max(received, content.tell()) > max_bytes:
            raise FetchError(TOO_LARGE)
        if not looked and content.tell() >= LOOK_BYTES:
            looked = True
            look(content.getvalue(), response.headers)
    if expected is not None and expected != received:
        raise FetchError(f"connection broke off after {received} of {expected} bytes")
    if not unpack.complete():
        raise FetchError(f"connection broke off within a compressed body, after {received} bytes")
    if not looked:
        look(content.getvalue(), response.headers)
    return content.getvalue()


def refuse_no_image(head: bytes, headers: Message) -> None:
    """A ``look`` that raises FetchError where the first bytes are of no image, whatever suffix and type say."""
    if not head:
        raise FetchError(EMPTY)
    if head.startswith(_SIGNATURES) or (head.startswith(b"RIFF") and head[8:12] == b"WEBP"):
        return
    declared = headers.get_content_type()
    if declared == "text/html" or _PAGE.match(_without_comments(head)):
        raise FetchError(f"response is a web page: {declared}, starts with {ascii(head[:30])}")
    raise FetchError(f"response is no image: {declared[:60]}, starts with {ascii(head[:30])}")


def leads_to_placeholder(url: str, target: str) -> bool:
    """Whether a redirect leads from an image's address to one like photo_unavailable.png, which is sent for any."""
    before, after = (urlsplit(one).path.rpartition("/")[2].partition(".")[0] for one in (url, target))
    return before != after and _GONE.fullmatch(after) is not None


def _without_comments(head: bytes) -> bytes:
    head = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    while head.startswith((b"<!--", b"<?xml")):
        head = head.partition(b"-->" if head.startswith(b"<!--") else b"?>")[2].lstrip()
    return head


class _Unpacker:
    """Undoes the Content-Encoding of a response, which was not asked for, but is sent by some."""

    def __init__(self, encoding: str) -> None:
        name = encoding.strip().lower()
        if name not in ("", "identity", "gzip", "x-gzip", "deflate"):
            raise FetchError(f"{NOT_HTTP}: compressed by {ascii(name[:40])}, which was not asked for")
        self._zlib = zlib.decompressobj(zlib.MAX_WBITS + 32) if name not in ("", "identity") else None  # gzip or zlib
        self._fed = False

    def __call__(self, chunk: bytes, room: int) -> bytes:
        """At most ``room`` bytes (from 1) of what ``chunk`` holds; the rest of a bomb is never unpacked."""
        if self._zlib is None:
            return chunk
        self._fed = True
        try:
            return self._zlib.decompress(chunk, room)
        except zlib.error as error:
            raise FetchError(f"{NOT_HTTP}: compressed body is damaged ({error})") from error

    def complete(self) -> bool:
        return self._zlib is None or self._zlib.eof or not self._fed
