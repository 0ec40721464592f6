"""Runs img2dataset with a bound on the bytes and the time of each download, which it lacks."""

from __future__ import annotations

import importlib
import io
import json
import sys
import time
import urllib.request
from functools import partial
from pathlib import Path

from data_prep.lean_imports import leave_out_unused

if __name__ in ("__main__", "__mp_main__"):  # the downloader and the processes that it spawns
    leave_out_unused()

import img2dataset.downloader  # noqa: E402

TOO_LARGE = "response larger than the bound"
TOO_SLOW = "timed out: response not complete within the bound"
NO_HTTP = "address is not http(s)"
_USER_AGENT = "Mozilla/5.0 (compatible; img2dataset)"
_CHUNK_BYTES = 1 << 16
_TOTAL_TIMEOUTS = 3  # a whole download may take so many times the timeout of a single read


class BoundedDownloader(img2dataset.downloader.Downloader):
    """img2dataset's shard worker; it is pickled into the worker processes and sets the bounded step there."""

    max_bytes = 0  # set on the class by main()

    def __init__(self, **options) -> None:
        super().__init__(**options)
        self._max_bytes = self.max_bytes

    def __call__(self, row):
        img2dataset.downloader.download_image = partial(download_bounded, max_bytes=self._max_bytes)
        return super().__call__(row)


def download_bounded(row, timeout, user_agent_token, disallowed_header_directives, max_bytes):
    """Stands in for ``img2dataset.downloader.download_image``: (key, stream or None, error message or None)."""
    key, url = row
    deadline = time.monotonic() + _TOTAL_TIMEOUTS * timeout
    try:
        if not url.lower().startswith(("http://", "https://")):
            return key, None, NO_HTTP
        request = urllib.request.Request(url, headers={"User-Agent": _USER_AGENT})
        with urllib.request.urlopen(request, timeout=timeout) as response:
            if disallowed_header_directives and img2dataset.downloader.is_disallowed(
                response.headers, user_agent_token, disallowed_header_directives
            ):
                return key, None, "Use of image disallowed by X-Robots-Tag directive"
            return _read(key, response, deadline, max_bytes)
    except Exception as error:  # whatever a server can provoke is this row's failure, and is reported as such
        return key, None, str(error) or type(error).__name__


def _read(key, response, deadline, max_bytes):
    content = io.BytesIO()
    while chunk := response.read1(_CHUNK_BYTES):
        content.write(chunk)
        if content.tell() > max_bytes:
            return key, None, TOO_LARGE
        if time.monotonic() > deadline:
            return key, None, TOO_SLOW
    expected = response.headers.get("Content-Length")
    if expected is not None and expected.isdecimal() and int(expected) != content.tell():
        return key, None, f"connection broke off after {content.tell()} of {expected} bytes"
    content.seek(0)
    return key, content, None


def main(options_file: str) -> None:
    """Run img2dataset with the options of a JSON file; ``max_image_bytes`` is ours, the others its own."""
    options = json.loads(Path(options_file).read_text())
    BoundedDownloader.max_bytes = options.pop("max_image_bytes")
    # By name: the package overwrites its attribute `main` by a function.
    img2dataset_main = importlib.import_module("img2dataset.main")
    img2dataset_main.Downloader = BoundedDownloader
    img2dataset_main.download(**options)


if __name__ == "__main__":
    main(sys.argv[1])
