"""The files of a split in a store: which of them are not as listed, and its indexes on this node."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from data_prep.stores.address import Address
from data_prep.stores.failures import StoreError, StoreMissing, StoreShort
from data_prep.stores.kept_files import open_kept
from data_prep.stores.requests import entries_of, lists_folders, read_range, size_of

MAX_HEADER_BYTES = 4096  # of an index
LISTED_FROM = 64  # shards; for fewer each file is asked for by itself
THREADS = 16


class ListedShard(Protocol):
    """What is asked of a shard of a manifest."""

    file: str
    index_file: str
    bytes: int


def wrong_remote_file(folder: Address, shards: Sequence[tuple[int, ListedShard]]) -> tuple[int, str] | None:
    """Number of the first of the numbered ``shards`` with a file that is not as listed, and what is wrong with it.

    Sizes come from a list of this moment or from the store's answer about the file itself.
    """
    names = [name for _, shard in shards for name in (shard.file, shard.index_file)]
    try:
        if len(shards) >= LISTED_FROM and lists_folders(folder.url):
            sizes = dict(entries_of(folder.url))
        else:
            with ThreadPoolExecutor(THREADS) as threads:
                sizes = dict(zip(names, threads.map(lambda name: size_of((folder / name).url), names)))
    except StoreError as error:
        return (shards[0][0] if shards else -1), str(error)
    for number, shard in shards:
        for name, expected in ((shard.file, shard.bytes), (shard.index_file, None)):
            found = sizes.get(name)
            if found is None:
                return number, f"{folder / name}: named by the manifest but missing; upload the split again"
            if expected not in (None, found):
                wrong = f"{found} bytes, its manifest says {expected}: truncated or changed; upload the split again"
                return number, f"{folder / name}: {wrong}"
    return None


def open_remote_index(path: Address, shape: tuple[int, int], sha256: str) -> int:
    """A descriptor of the index at ``path``, int64 of this shape, from this node if it was fetched before.

    Raises StoreError, ValueError for a file that is not the one that the manifest names, and OSError.
    """
    most = shape[0] * shape[1] * 8 + MAX_HEADER_BYTES

    def fetch() -> bytes:
        size = size_of(path.url)
        if size is None:
            raise StoreMissing(f"{path}: no such object")
        if size > most:
            raise ValueError(f"{size} bytes, expected at most {most}")
        return read_range(path.url, 0, size)

    try:
        return open_kept(sha256, fetch)
    except StoreShort as error:  # it was replaced at this moment
        raise ValueError(str(error)) from error


def fetch_indexes(indexes: Iterable[tuple[Address, tuple[int, int], str]]) -> None:
    """Have the indexes on this node, many at a time; what can't be had is left to who needs it."""

    def fetch(one: tuple[Address, tuple[int, int], str]) -> None:
        try:
            os.close(open_remote_index(*one))
        except (ValueError, OSError):  # said when it is read
            return

    with ThreadPoolExecutor(THREADS) as threads:
        list(threads.map(fetch, indexes))
