"""Downloads the rows of one parquet file by img2dataset, and hands over each image as it comes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet

from data_prep.downloading.bounded_http import Bounds
from data_prep.downloading.courtesy import Courtesy
from data_prep.record import LowYieldError, PrepError

_TOTAL_TIMEOUTS = 3  # a whole download may take so many times the timeout of a single read
Received = Callable[[int, bytes | None, str | None], None]


@dataclass(frozen=True)
class FetchOptions:
    """``timeout`` seconds per read (three times that for a whole download), ``retries`` after a failure;
    ``allow_private_addresses`` to download from one's own network."""

    threads: int = 32
    timeout: int = 10
    retries: int = 1
    max_image_bytes: int = 50_000_000
    allow_private_addresses: bool = False
    courtesy: Courtesy = Courtesy()


def download(table: Path, rows: int, scratch: Path, options: FetchOptions, received: Received) -> None:
    """Download the addresses (column ``url``) of the parquet file ``table``, which has ``rows`` rows.

    ``received`` is called in this thread for each row, in the order in which they end, with its number in the file and
    either the bytes or an error message. A row may be left out where img2dataset fails over it. ``scratch`` is a
    folder for small files, which stay there. Raises what ``received`` raises, LowYieldError where the first downloads
    show that this machine or its network keeps all from coming, and PrepError when img2dataset fails.
    """
    # Here, not above: it takes a second to import, and only processes that download need it.
    from img2dataset.reader import Reader

    from data_prep.downloading.bounded_download import BoundedDownloader

    total = _TOTAL_TIMEOUTS * options.timeout
    bounds = Bounds(options.timeout, total, options.max_image_bytes, options.allow_private_addresses)
    writer = _Receiver(received)
    downloader = BoundedDownloader(
        bounds,
        options.courtesy,
        sample_writer_class=lambda *_: writer,
        resizer=_as_it_came,  # the filters judge and shrink, for every source alike
        thread_count=options.threads,
        save_caption=False,
        extract_exif=False,
        output_folder=str(scratch),
        column_list=["url"],
        number_sample_per_shard=rows,
        oom_shard_count=1,
        compute_hash=None,
        verify_hash_type=None,
        encode_format="jpg",
        retries=options.retries,
        user_agent_token=None,
        disallowed_header_directives=None,  # ``courtesy`` has them
    )
    reader = Reader(str(table.absolute()), "parquet", "url", None, None, None, None, rows, set(), str(scratch))
    for shard in reader:
        done, _ = downloader(shard)
        if writer.error is not None:
            raise writer.error
        if downloader.trouble is not None:
            raise LowYieldError(downloader.trouble)
        if not done:
            raise PrepError(f"img2dataset failed over {table}; what it said stands in the log of the part")


def read_rows(table: Path, columns: list[str]) -> Iterator[dict[str, Any]]:
    """The rows of a part as dictionaries."""
    with pyarrow.parquet.ParquetFile(table) as file:
        for batch in file.iter_batches(batch_size=1000, columns=columns):
            yield from batch.to_pylist()


class _Receiver:
    """Stands where img2dataset has a writer of samples."""

    def __init__(self, received: Received) -> None:
        self._received = received
        self.error: Exception | None = None

    def write(self, image: bytes | None, key: str, caption: str | None, meta: dict[str, Any]) -> None:
        if self.error is not None:  # img2dataset prints what is raised here, and goes on
            return
        try:
            self._received(int(key), image, meta["error_message"])
        except Exception as error:
            self.error = error
            raise

    def close(self) -> None:
        """Nothing is open."""


def _as_it_came(stream: Any, boxes: Any = None) -> tuple[bytes, None, None, None, None, None]:
    return stream.read(), None, None, None, None, None
