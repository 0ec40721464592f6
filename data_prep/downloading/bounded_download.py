"""Runs img2dataset with bounds on each download, which it lacks (``bounded_http``), politely (``polite_pool``)."""

from __future__ import annotations

import importlib
import io
import json
import sys
import threading
from functools import partial
from pathlib import Path

from data_prep.downloading.lean_imports import leave_out_unused

if __name__ in ("__main__", "__mp_main__"):  # the downloader and the processes that it spawns
    leave_out_unused()

import img2dataset.downloader  # noqa: E402

from data_prep.downloading.bodies import refuse_no_image  # noqa: E402
from data_prep.downloading.bounded_http import Bounds, fetch  # noqa: E402
from data_prep.downloading.courtesy import Courtesy  # noqa: E402
from data_prep.downloading.failures import TROUBLE_FILE, read_trouble  # noqa: E402
from data_prep.downloading.opt_out import disallowed_by  # noqa: E402
from data_prep.downloading.polite_pool import DownloadTrouble, PolitePool  # noqa: E402
from data_prep.manifest import write_atomically  # noqa: E402

_FAILING: dict = {}  # hosts of this process's last downloads that failed
_TOTAL_TIMEOUTS = 3  # a whole download may take so many times the timeout of a single read


class BoundedDownloader(img2dataset.downloader.Downloader):
    """img2dataset's shard worker; it is pickled into the worker processes and sets the bounded step there."""

    bounds: dict = {}  # max_bytes, allow_private; set on the class by main()
    courtesy: dict = {}  # fields of Courtesy

    def __init__(self, **options) -> None:
        super().__init__(**options)
        self._bounds, self._courtesy = self.bounds, Courtesy(**self.courtesy)

    def __call__(self, row):
        if read_trouble(self.output_folder) is not None:
            return False, row
        get = partial(get_image, bounds=_bounds(self.timeout, **self._bounds), courtesy=self._courtesy)
        img2dataset.downloader.ThreadPool = partial(
            PolitePool, get=get, courtesy=self._courtesy, retries=self.retries, failing=_FAILING
        )
        # It would hold back rows until earlier ones are written: the pool wants all, and bounds what it holds itself.
        img2dataset.downloader.Semaphore = lambda _: threading.Semaphore(sys.maxsize)
        return super().__call__(row)

    def download_shard(self, row):
        try:
            super().download_shard(row)
        except DownloadTrouble as error:
            write_atomically(Path(self.output_folder) / TROUBLE_FILE, str(error))
            raise


def get_image(url: str, bounds: Bounds, courtesy: Courtesy) -> bytes:
    """The bytes of an image; raises FetchError, or another OSError, in words that ``failure_reason`` knows."""

    def accept(headers) -> bool:
        return disallowed_by(headers, courtesy.disallow, courtesy.user_agent) is None

    return fetch(url, bounds, courtesy.headers(), accept, refuse_no_image)


def download_bounded(
    row, timeout, user_agent_token, disallowed_header_directives, max_bytes: int, allow_private: bool = False
):
    """One try, as ``img2dataset.downloader.download_image`` is called: (key, stream or None, error message or None)."""
    key, url = row
    agent = {} if user_agent_token is None else {"user_agent": user_agent_token}
    courtesy = Courtesy(disallow=tuple(disallowed_header_directives or ()), **agent)
    try:
        return key, io.BytesIO(get_image(url, _bounds(timeout, max_bytes, allow_private), courtesy)), None
    except Exception as error:  # whatever a server can provoke is this row's failure, and is reported as such
        return key, None, str(error) or type(error).__name__


def _bounds(timeout: float, max_bytes: int, allow_private: bool = False) -> Bounds:
    return Bounds(timeout, _TOTAL_TIMEOUTS * timeout, max_bytes, allow_private)


def main(options_file: str) -> None:
    """Run img2dataset with the options of a JSON file; ``bounds`` and ``courtesy`` are ours, the others its own."""
    options = json.loads(Path(options_file).read_text())
    BoundedDownloader.bounds = options.pop("bounds")
    BoundedDownloader.courtesy = options.pop("courtesy", {})
    # By name: the package overwrites its attribute `main` by a function.
    img2dataset_main = importlib.import_module("img2dataset.main")
    img2dataset_main.Downloader = BoundedDownloader
    img2dataset_main.download(**options)


if __name__ == "__main__":
    main(sys.argv[1])
