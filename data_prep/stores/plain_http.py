"""Reads ranges of files from a plain web server, each answer bounded in bytes and seconds."""

from __future__ import annotations

import time
import urllib.request
from http.client import HTTPException, HTTPResponse
from typing import Any
from urllib.error import HTTPError
from urllib.parse import quote

from data_prep.stores.failures import StoreError

_CHUNK_BYTES = 64 * 1024


class PlainHttp:
    """The members of an fsspec file system that reading needs; ``seconds`` bound one request in all."""

    async_impl = False

    def cat_file(self, url: str, start: int, end: int, seconds: float) -> bytes:
        """Bytes ``start`` .. ``end``, or fewer where the answer ends early.

        Raises OSError, and StoreError for a server that does not serve ranges.
        """
        deadline = time.monotonic() + seconds
        with self._ask(url, f"bytes={start}-{end - 1}", seconds) as answer:
            length = answer.getheader("Content-Length")
            is_range = answer.status == 206 and _range_start(answer) == start
            if not is_range and not (start == 0 and length == str(end)):
                raise StoreError(f"{url}: status {answer.status} to a range: this server can't be read by ranges")
            data = bytearray()
            while len(data) < end - start:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{len(data)} of {end - start} bytes within {seconds:g} s")
                try:
                    more = answer.read1(min(_CHUNK_BYTES, end - start - len(data)))
                except HTTPException as error:
                    raise OSError(str(error)) from error
                if not more:
                    break
                data += more
        return bytes(data)

    def info(self, url: str, seconds: float) -> dict[str, Any]:
        """``size`` in bytes, and ``type``; raises OSError."""
        try:
            with self._ask(url, "bytes=0-0", seconds) as answer:
                if answer.status == 206:
                    total = (answer.getheader("Content-Range") or "").rpartition("/")[2]
                else:
                    total = answer.getheader("Content-Length") or ""
        except HTTPError as error:
            if error.code != 416:  # of an empty file
                raise
            total = (error.headers.get("Content-Range") or "").rpartition("/")[2]
        if not total.isdigit():
            raise StoreError(f"{url}: the server does not say how long it is; expected Content-Length or Content-Range")
        return {"size": int(total), "type": "file"}

    def ls(self, url: str, detail: bool, seconds: float) -> Any:
        raise StoreError(f"{url}: a web server does not list its folders; name the file, or the folder of a corpus")

    def put_file(self, path: str, url: str, seconds: float) -> None:
        raise StoreError(f"{url}: a web server is only read; write to a store like s3://BUCKET/FOLDER")

    def rm_file(self, url: str, seconds: float) -> None:
        raise StoreError(f"{url}: a web server is only read")

    def _ask(self, url: str, range_header: str, seconds: float) -> HTTPResponse:
        url = quote(url, safe="%/:=&?~#+!$,;'@()*[]")
        headers = {"Range": range_header, "Accept-Encoding": "identity", "User-Agent": "openflm"}
        try:
            opener = urllib.request.build_opener(_WebOnly)
            return opener.open(urllib.request.Request(url, headers=headers), timeout=seconds)
        except HTTPException as error:
            raise OSError(str(error) or type(error).__name__) from error


class _WebOnly(urllib.request.HTTPRedirectHandler):
    """Follows redirects to http and https."""

    def redirect_request(self, request: Any, answer: Any, code: int, reason: str, headers: Any, target: str) -> Any:
        if not target.lower().startswith(("http://", "https://")):
            raise StoreError(f"{request.full_url}: leads to {target:.200}, expected http or https")
        return super().redirect_request(request, answer, code, reason, headers, target)


def _range_start(answer: HTTPResponse) -> int | None:
    first = (answer.getheader("Content-Range") or "").removeprefix("bytes ").partition("-")[0]
    return int(first) if first.isdigit() else None
