"""The one door to files in stores and on web servers: whole, retried within a deadline, or an error of one line."""

from __future__ import annotations

import os
import random
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from data_prep.stores.failures import (
    StoreError,
    StoreMissing,
    StoreRefused,
    StoreShort,
    StoreUnreachable,
    explained,
    is_bug,
    status_of,
)
from data_prep.stores.plain_http import PlainHttp

DEADLINE_SECONDS = 60.0  # of one operation with all its tries
ATTEMPT_SECONDS = 15.0  # of one request: one that hangs is asked again
MAX_WHOLE_BYTES = 2**30  # of what is held in memory: manifests, indexes
CHUNK_BYTES = 8 * 2**20  # of a file that is read whole
PART_BYTES = 32 * 2**20  # of a large upload, which S3 takes in parts
_PARTS_AT_A_TIME = 4
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.1, 5.0
_BUSY_PAUSE_SECONDS = 1.0  # at least, after an answer that asks for patience
_PACKAGES = {"s3": "'.[s3]'", "s3a": "'.[s3]'", "gs": "gcsfs", "gcs": "gcsfs"}

Found = TypeVar("Found")


def read_range(url: str, start: int, size: int) -> bytes:
    """Bytes ``start`` .. ``start + size`` of an object, all of them; raises StoreError.

    What a try brought is kept, and the rest asked for again. StoreShort says that the object ends before.
    """
    found = bytearray()

    def attempt(files: Any, seconds: float) -> bytes:
        begin = start + len(found)
        data = _call(files, "cat_file", url, start=begin, end=start + size, seconds=seconds)
        if len(data) > size - len(found):
            raise StoreError(f"{url}: {len(data)} bytes for a range of {size - len(found)}: ranges are not served here")
        found.extend(data)
        if len(found) < size:
            length = _call(files, "info", url, seconds=seconds)["size"]
            if length is not None and length < start + size:
                raise StoreShort(f"{url}: {length} bytes, expected at least {start + size}")
            raise OSError(f"the answer ended after {len(data)} bytes")
        return bytes(found)

    return _persist(attempt, url, f"bytes {start} to {start + size}") if size else b""


def read_whole(url: str) -> bytes:
    """The whole content of an object; raises FileNotFoundError where there is none, StoreError."""
    size = size_of(url)
    if size is None:
        raise FileNotFoundError(url)
    if size > MAX_WHOLE_BYTES:
        raise StoreError(f"{url}: {size} bytes, expected at most {MAX_WHOLE_BYTES}")
    return b"".join(read_range(url, at, min(CHUNK_BYTES, size - at)) for at in range(0, size, CHUNK_BYTES))


def size_of(url: str) -> int | None:
    """Bytes of an object, asked of the store and not of a listing; None where there is none. Raises StoreError."""
    found = details_of(url)
    return None if found is None or found.get("type") == "directory" else found["size"]


def details_of(url: str) -> dict[str, Any] | None:
    """What the store says of an object, ``size`` among it, and a checksum under a name of its own."""
    try:
        return _persist(lambda files, seconds: _call(files, "info", url, seconds=seconds), url, "its size")
    except StoreMissing:
        return None


def entries_of(url: str) -> list[tuple[str, int | None]]:
    """Name and size of everything in a folder, by name, the size of a folder None; empty where there is none."""
    try:
        found = _persist(lambda files, seconds: _call(files, "ls", url, detail=True, seconds=seconds), url, "its list")
    except StoreMissing:
        return []
    path = url.partition("://")[2].strip("/")
    named = [(entry["name"].strip("/"), None if entry["type"] == "directory" else entry["size"]) for entry in found]
    return sorted((name.rpartition("/")[2], size) for name, size in named if name != path)  # path: the folder's marker


def lists_folders(url: str) -> bool:
    """Whether this kind of store can say what lies in a folder."""
    return not url.startswith(("http://", "https://"))


def upload(path: Path, url: str) -> None:
    """Write a file to the store, whole or not at all; raises StoreError, and OSError of the file itself."""
    size = path.stat().st_size
    seconds = ATTEMPT_SECONDS + size / 2**20  # at no less than 1 MiB/s
    more = {"chunksize": PART_BYTES, "max_concurrency": _PARTS_AT_A_TIME} if url.startswith(("s3://", "s3a://")) else {}

    def attempt(files: Any, _: float) -> None:
        _call(files, "put_file", str(path), url, seconds=seconds, **more)

    _persist(attempt, url, "writing", deadline=DEADLINE_SECONDS + 2 * seconds)


def remove(url: str) -> None:
    """Remove an object, if there is one; raises StoreError."""
    try:
        _persist(lambda files, seconds: _call(files, "rm_file", url, seconds=seconds), url, "removing")
    except StoreMissing:
        pass


def _persist(attempt: Callable[[Any, float], Found], url: str, what: str, deadline: float | None = None) -> Found:
    """What ``attempt`` gives, with a file system and the seconds of one request, tried until the deadline."""
    began, tries, pause, renewed = time.monotonic(), 0, _FIRST_PAUSE_SECONDS, False
    deadline = DEADLINE_SECONDS if deadline is None else deadline
    while True:
        tries += 1
        left = deadline - (time.monotonic() - began)
        try:
            return attempt(_files(url), max(min(ATTEMPT_SECONDS, left), 0.1))
        except StoreError:
            raise
        except Exception as error:  # the libraries of stores raise what they like; what it is, is decided here
            if is_bug(error):
                raise
            problem, status = error, status_of(error)
            if status is not None and 300 <= status < 400:  # to another region, or to what is not followed
                raise StoreError(f"{url}: leads elsewhere ({explained(error)}); give the address itself") from error
            if status == 404:
                raise StoreMissing(f"{url}: no such object") from error
            if status == 416:
                raise StoreShort(f"{url}: ends before {what}") from error
            if status in (401, 403) and renewed:
                raise StoreRefused(
                    f"{url}: refused ({explained(error)}); give this process credentials that may read it, by the"
                    " store's usual variables or files"
                ) from error
            if status in (401, 403):  # a token that has expired: read what is valid now
                renewed = True
                _forget(url)
                continue
            if status in (429, 503):
                pause = max(pause, _BUSY_PAUSE_SECONDS)
        wait = pause * random.uniform(0.5, 1.0)  # or all processes ask again at the same moment
        if time.monotonic() - began + wait >= deadline:
            raise StoreUnreachable(
                f"{url}: {what} could not be had in {tries} tries within {deadline:g} s ({explained(problem)})"
            ) from problem
        time.sleep(wait)
        pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)


def _call(files: Any, name: str, *args: Any, seconds: float, **options: Any) -> Any:
    """A method of an fsspec file system within ``seconds``, where it can be bounded."""
    if isinstance(files, PlainHttp):
        return getattr(files, name)(*args, seconds=seconds, **options)
    if name in ("ls", "info"):
        options["refresh"] = True  # sizes of an earlier listing may be stale
    if not files.async_impl:
        if name == "cat_file":  # by an open file, which would read 5 MiB ahead of the range
            options["cache_type"] = "none"
        return getattr(files, name)(*args, **options)
    import fsspec.asyn

    method = getattr(files, f"_{name}")
    return fsspec.asyn.sync(files.loop, method, *args, timeout=seconds, **options)


_lock = threading.Lock()
_opened: dict[str, Any] = {}  # scheme -> file system of this process
_of_parents: list[Any] = []  # kept, as taking them down would use the parent's connections
_watching: list[bool] = []


def _files(url: str) -> Any:
    """The file system of an address, opened anew in each process; raises StoreError."""
    scheme = url.partition("://")[0]
    with _lock:
        if not _watching:
            os.register_at_fork(after_in_child=open_anew)
            _watching.append(True)
        if scheme not in _opened:
            _opened[scheme] = _open(scheme, url)
        return _opened[scheme]


def _open(scheme: str, url: str) -> Any:
    if scheme in ("http", "https"):
        return PlainHttp()
    import fsspec

    options: dict[str, Any] = {}
    if scheme in ("s3", "s3a"):
        once = {"max_attempts": 1}  # tries are counted here
        options["config_kwargs"] = {"connect_timeout": 10, "read_timeout": ATTEMPT_SECONDS, "retries": once}
        options["config_kwargs"]["max_pool_connections"] = 32
    try:
        files = fsspec.filesystem(scheme, skip_instance_cache=True, use_listings_cache=False, **options)
    except ImportError as error:
        package = _PACKAGES.get(scheme)
        advice = f"pip install {package}" if package else "install the package that it names"
        raise StoreError(f"{url}: {error}; {advice}") from None
    except ValueError:
        raise StoreError(
            f"{url}: no store is called {scheme}; expected s3://, gs://, hf:// or another of fsspec"
        ) from None
    if scheme in ("s3", "s3a"):
        files.retries = 1
        files.connect()  # seconds of reading from the disk, which are none of a request's
    return files


def _forget(url: str) -> None:
    with _lock:
        _of_parents.append(_opened.pop(url.partition("://")[0], None))


def open_anew() -> None:
    """Leave what is open to others: a forked process calls it, as its parent's connections are not its own."""
    global _lock
    _lock = threading.Lock()
    _of_parents.append(dict(_opened))
    _opened.clear()
    if "fsspec.asyn" in sys.modules:
        sys.modules["fsspec.asyn"].reset_lock()
