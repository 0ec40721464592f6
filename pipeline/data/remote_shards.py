"""Shards in an object store: the index on this node, the samples by ranges of the tar, one request for each."""

from __future__ import annotations

import os
from collections.abc import Sequence
from tarfile import BLOCKSIZE

import numpy as np

from data_prep.manifest import IndexColumns
from data_prep.stores.address import Address
from data_prep.stores.failures import StoreError, StoreMissing, StoreShort
from data_prep.stores.requests import read_range
from data_prep.stores.split_files import open_remote_index
from pipeline.data.open_shards import BAD_INDEX, MISSING, TRUNCATED, DataError, OpenShard, ShardError, refused

MAX_SPAN_BYTES = 32 * 2**20  # of one request for all members of a sample
MAX_GAP_BYTES = 2**20  # between them, read in vain


class LostStore(DataError):
    """A store that does not answer any more, or refuses; the message says what to do."""


class RemoteShard:
    """A tar at an address, and its index, which is open here. Raises as ``OpenShard`` does, and LostStore."""

    def __init__(self, tar: Address, index: OpenShard) -> None:
        self._tar, self._index = tar, index
        self._start, self._held = 0, b""

    def row(self, number: int) -> np.ndarray:
        """One row of the index, int64 [2F+1]."""
        return self._index.row(number)

    def read(self, offset: int, size: int) -> bytes:
        """Bytes of the tar, all of them."""
        begin = offset - self._start
        if 0 <= begin and begin + size <= len(self._held):
            return self._held[begin : begin + size]
        try:
            return read_range(self._tar.url, offset, size)
        except StoreError as error:
            raise as_shard_error(error) from error

    def hold(self, row: np.ndarray, columns: IndexColumns, fields: Sequence[str], num_bytes: int) -> None:
        """Read the members ``fields`` of a row in one request, if they lie together within the ``num_bytes`` of the
        shard, for the reads that follow."""
        pairs = [(columns.offset[one], columns.size[one]) for one in fields if one in columns.offset]
        found = [(int(row[offset]) - BLOCKSIZE, int(row[offset] + row[size])) for offset, size in pairs]
        found = [(start, stop) for start, stop in found if 0 <= start < stop <= num_bytes]
        if found:
            start, stop = min(start for start, _ in found), max(stop for _, stop in found)
            in_vain = stop - start - sum(stop - start for start, stop in found)
            if stop - start <= MAX_SPAN_BYTES and in_vain <= MAX_GAP_BYTES:
                self._held = self.read(start, stop - start)
                self._start = start

    def take_over(self, other: RemoteShard) -> None:
        """Hold what ``other``, of the same shard, holds."""
        self._start, self._held = other._start, other._held

    def release(self) -> None:
        """Hold nothing any more."""
        self._held = b""

    def close(self) -> None:
        os.close(self._index.index)


def open_remote_index_of(folder: Address, name: str, shape: tuple[int, int], sha256: str) -> int:
    """A descriptor of an index; raises ShardError, LostStore, and OSError where the machine is EXHAUSTED."""
    try:
        return open_remote_index(folder / name, shape, sha256)
    except StoreError as error:
        raise as_shard_error(error) from error
    except ValueError:
        raise ShardError(BAD_INDEX) from None
    except OSError as error:
        raise refused(error, BAD_INDEX) from None


def as_shard_error(error: StoreError) -> ShardError | LostStore:
    """A missing or cut shard costs its samples; a store that does not answer costs none, as the run ends."""
    if isinstance(error, StoreMissing):
        return ShardError(MISSING, transient=True)
    if isinstance(error, StoreShort):
        return ShardError(TRUNCATED)
    return LostStore(
        f"{error}; start the same command again when the store answers, it continues from the last checkpoint"
    )
