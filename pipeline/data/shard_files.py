"""Opens the shards of a split on first use, with retries, and detects within seconds that one or all are gone."""

from __future__ import annotations

import os
import stat
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from data_prep.manifest import MANIFEST_NAME, Manifest, Shard, index_columns
from data_prep.npy import MAX_HEADER_BYTES, parse_header
from data_prep.stores.address import Address
from data_prep.stores.failures import StoreError
from pipeline.data.open_shards import (
    BAD_INDEX,
    MISSING,
    OF_THIS_PROCESS,
    UNREADABLE,
    DataError,
    OpenShard,
    OpenShards,
    ShardError,
    out_of_descriptors,
    refused,
)
from pipeline.data.remote_shards import RemoteShard, open_remote_index_of

SHARD_SECONDS = 2.0  # retries of one file, since storage may fail for a moment
PATIENCE_SECONDS = 20.0  # retries of all files of a process in vain; after that none is retried
FOLDER_SECONDS = 8.0  # retries of the folder of a split, before the run ends
MAX_LOST_IN_A_ROW = 16  # shards, none of them readable, before the whole split counts as lost
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.05, 0.5


class LostCorpus(DataError):
    """No shard of a split can be read any more; the message names the split and what to do."""


class ShardFiles:
    """The shards of one split, opened on first use and kept among those of the process (``OpenShards``).

    An open shard stays readable when its folder is renamed; opening another one then raises LostCorpus. A pickled copy
    opens its own.
    """

    def __init__(self, split_dir: Path, manifest: Manifest, kept: OpenShards = OF_THIS_PROCESS) -> None:
        self._split_dir, self._manifest, self._kept = split_dir, manifest, kept
        self._patience = PATIENCE_SECONDS
        self._lost: set[int] = set()  # shards missing or unreadable since one could last be read

    def get(self, number: int) -> OpenShard:
        """Open shard ``number``; raises ShardError, LostCorpus when many or all shards are lost, OutOfDescriptors."""
        opened = self._kept.get(id(self), number)
        if opened is not None:
            return opened
        try:
            opened = self._opened_in_time(self._manifest.shards[number])
        except ShardError as error:
            self.note_failure(number, error)
            raise
        self._kept.add(id(self), number, opened)
        return opened

    def forget(self, number: int) -> None:
        """Close a shard, so that its next use opens it again."""
        self._kept.close(id(self), number)

    def make_room(self, error: OSError, is_last: bool) -> None:
        """Close shards because of ``error``, one of EXHAUSTED; raises OutOfDescriptors where that has not helped."""
        if not self._kept.give_up_half() or is_last:
            raise out_of_descriptors(error) from None

    def note_success(self) -> None:
        """Call it after a successful read: the count of lost shards starts again."""
        self._lost.clear()

    def note_failure(self, number: int, error: ShardError) -> None:
        """Call it when shard ``number`` raised ``error``; raises LostCorpus when no shard can be read any more."""
        if error.reason not in (MISSING, UNREADABLE):
            return
        self._lost.add(number)
        if not self._folder_comes_back():
            raise LostCorpus(
                f"{self._split_dir} is gone: renamed, deleted or no longer mounted; bring it back and start the same "
                "command again, it continues from the last checkpoint"
            )
        if len(self._lost) >= min(MAX_LOST_IN_A_ROW, len(self._manifest.shards)):
            raise LostCorpus(
                f"{self._split_dir}: {len(self._lost)} shards in a row cannot be read (the last: {error.reason}), its "
                "disk or mount is lost; bring it back and start the same command again, it continues from the last "
                "checkpoint"
            )

    def close(self) -> None:
        self._kept.close(id(self))

    def _opened_in_time(self, shard: Shard) -> OpenShard:
        began, pause = time.monotonic(), _FIRST_PAUSE_SECONDS
        while True:
            try:
                opened = open_shard(self._split_dir, self._manifest.fields, shard)
            except OSError as error:  # of EXHAUSTED
                if self._kept.give_up_half():
                    continue
                if time.monotonic() - began >= SHARD_SECONDS:
                    raise out_of_descriptors(error) from None
            except ShardError as error:
                waited = time.monotonic() - began
                if not error.transient or waited >= min(SHARD_SECONDS, self._patience):
                    self._patience -= min(waited, self._patience)
                    raise
            else:
                if pause > _FIRST_PAUSE_SECONDS:
                    self._patience = PATIENCE_SECONDS
                return opened
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)

    def _folder_comes_back(self) -> bool:
        deadline = time.monotonic() + FOLDER_SECONDS
        while not _exists(self._split_dir / MANIFEST_NAME):
            if time.monotonic() > deadline:
                return False
            time.sleep(_LONGEST_PAUSE_SECONDS)
        return True


def _exists(path: Path | Address) -> bool:
    try:
        return path.exists()
    except (StoreError, OSError):
        return False


def open_shard(folder: Path | Address, fields: tuple[str, ...], shard: Shard) -> OpenShard | RemoteShard:
    """Open tar and index of a shard in ``folder``; raises ShardError, and OSError where the machine is EXHAUSTED.

    Of a tar in a store nothing is asked before it is read.
    """
    width = index_columns(fields).width
    with ExitStack() as opened:  # closes what it holds on an error
        if isinstance(folder, Address):
            shape = (shard.rows, width)
            index = open_remote_index_of(folder, shard.index_file, shape, shard.index_sha256)
            opened.callback(os.close, index)
            first_row = _first_row(index, os.fstat(index).st_size, shape)
            opened.pop_all()
            return RemoteShard(folder / shard.file, OpenShard(-1, index, first_row, width))
        tar, _ = open_plain_file(folder / shard.file)
        opened.callback(os.close, tar)
        index, num_bytes = open_plain_file(folder / shard.index_file)
        opened.callback(os.close, index)
        found = OpenShard(tar, index, _first_row(index, num_bytes, (shard.rows, width)), width)
        opened.pop_all()
    return found


def open_plain_file(path: Path) -> tuple[int, int]:
    """Descriptor and size of a plain file; O_NONBLOCK, or a pipe in its place would never open.

    Raises ShardError, and OSError where the machine is EXHAUSTED.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise ShardError(MISSING, transient=True) from None
    except OSError as error:
        raise refused(error, UNREADABLE) from None
    with ExitStack() as opened:
        opened.callback(os.close, descriptor)
        try:
            found = os.fstat(descriptor)
        except OSError as error:
            raise refused(error, UNREADABLE) from None
        if not stat.S_ISREG(found.st_mode):
            raise ShardError(UNREADABLE)
        opened.pop_all()
    return descriptor, found.st_size


def _first_row(descriptor: int, num_bytes: int, expected: tuple[int, int]) -> int:
    """Byte offset of the first row of an index; raises ShardError if it is not int64 of the expected shape."""
    try:
        header = parse_header(os.pread(descriptor, MAX_HEADER_BYTES, 0))
    except OSError as error:
        raise refused(error, UNREADABLE) from None
    except ValueError:
        raise ShardError(BAD_INDEX) from None
    if header.shape != expected or header.dtype != np.int64 or header.by_columns or num_bytes < header.end:
        raise ShardError(BAD_INDEX)
    return header.start
