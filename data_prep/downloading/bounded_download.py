"""Runs img2dataset with bounds on each download, which it lacks (``bounded_http``), politely (``polite_pool``)."""

from __future__ import annotations

import sys
import threading
from functools import partial

import img2dataset.downloader

from data_prep.downloading.bodies import refuse_no_image
from data_prep.downloading.bounded_http import Bounds, fetch
from data_prep.downloading.courtesy import Courtesy
from data_prep.downloading.opt_out import disallowed_by
from data_prep.downloading.polite_pool import DownloadTrouble, PolitePool

_FAILING: dict = {}  # hosts of this process's last downloads that failed


class BoundedDownloader(img2dataset.downloader.Downloader):
    """img2dataset's shard worker with each download bounded; ``trouble`` says why all were given up, if they were."""

    def __init__(self, bounds: Bounds, courtesy: Courtesy, **options) -> None:
        super().__init__(timeout=bounds.timeout, **options)
        self._bounds, self._courtesy = bounds, courtesy
        self.trouble: str | None = None

    def __call__(self, row):
        get = partial(get_image, bounds=self._bounds, courtesy=self._courtesy)
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
            self.trouble = str(error)
            raise


def get_image(url: str, bounds: Bounds, courtesy: Courtesy) -> bytes:
    """The bytes of an image; raises FetchError, or another OSError, in words that ``failure_reason`` knows."""

    def accept(headers) -> bool:
        return disallowed_by(headers, courtesy.disallow, courtesy.user_agent) is None

    return fetch(url, bounds, courtesy.headers(), accept, refuse_no_image)
