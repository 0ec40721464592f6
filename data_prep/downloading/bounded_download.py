"""Runs img2dataset with bounds on each download, which it lacks (``bounded_http``)."""

from __future__ import annotations

import importlib
import io
import json
import sys
from functools import partial
from pathlib import Path

from data_prep.downloading.lean_imports import leave_out_unused

if __name__ in ("__main__", "__mp_main__"):  # the downloader and the processes that it spawns
    leave_out_unused()

import img2dataset.downloader  # noqa: E402

from data_prep.downloading.bounded_http import Bounds, fetch

_USER_AGENT = "Mozilla/5.0 (compatible; img2dataset)"
_TOTAL_TIMEOUTS = 3  # a whole download may take so many times the timeout of a single read


class BoundedDownloader(img2dataset.downloader.Downloader):
    """img2dataset's shard worker; it is pickled into the worker processes and sets the bounded step there."""

    bounds: dict = {}  # keyword arguments of download_bounded, set on the class by main()

    def __init__(self, **options) -> None:
        super().__init__(**options)
        self._bounds = self.bounds

    def __call__(self, row):
        img2dataset.downloader.download_image = partial(download_bounded, **self._bounds)
        return super().__call__(row)


def download_bounded(
    row, timeout, user_agent_token, disallowed_header_directives, max_bytes: int, allow_private: bool = False
):
    """Stands in for ``img2dataset.downloader.download_image``: (key, stream or None, error message or None)."""
    key, url = row

    def accept(headers) -> bool:
        return not disallowed_header_directives or not img2dataset.downloader.is_disallowed(
            headers, user_agent_token, disallowed_header_directives
        )

    bounds = Bounds(timeout, _TOTAL_TIMEOUTS * timeout, max_bytes, allow_private)
    try:
        return key, io.BytesIO(fetch(url, bounds, {"User-Agent": _USER_AGENT}, accept)), None
    except Exception as error:  # whatever a server can provoke is this row's failure, and is reported as such
        return key, None, str(error) or type(error).__name__


def main(options_file: str) -> None:
    """Run img2dataset with the options of a JSON file; ``bounds`` are ours, the others its own."""
    options = json.loads(Path(options_file).read_text())
    BoundedDownloader.bounds = options.pop("bounds")
    # By name: the package overwrites its attribute `main` by a function.
    img2dataset_main = importlib.import_module("img2dataset.main")
    img2dataset_main.Downloader = BoundedDownloader
    img2dataset_main.download(**options)


if __name__ == "__main__":
    main(sys.argv[1])
