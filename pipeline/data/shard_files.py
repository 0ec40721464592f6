"""Opens the shards of a split on first use, with retries, and detects within seconds that one or all are gone."""

from __future__ import annotations

import io
import os
import stat
import time
from collections import OrderedDict
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_prep.manifest import INDEX_DAMAGE, MANIFEST_NAME, Manifest, Shard, index_columns

MISSING, UNREADABLE, TRUNCATED, BAD_INDEX = "missing shard", "unreadable shard", "truncated shard", "unreadable index"
SHARD_REASONS = (MISSING, UNREADABLE, TRUNCATED, BAD_INDEX)  # reasons that cost a shard, not one sample

SHARD_SECONDS = 2.0  # retries of one file, since storage may fail for a moment
PATIENCE_SECONDS = 20.0  # retries of all files of a process in vain; after that none is retried
FOLDER_SECONDS = 8.0  # retries of the folder of a split, before the run ends
MAX_LOST_IN_A_ROW = 16  # shards, none of them readable, before the whole split counts as lost
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.05, 0.5
_HEADER_BYTES = 4096  # of an index; its header takes 128


class ShardError(Exception):
    """A shard that cannot be used; ``reason`` is one of SHARD_REASONS."""

    def __init__(self, reason: str, transient: bool = False) -> None:
        super().__init__(reason)
        self.reason, self.transient = reason, transient


class LostCorpus(RuntimeError):
    """No shard of a split can be read any more; the message names the split and what to do."""


class OpenShard(NamedTuple):
    """File descriptors of a tar and its index, read and not mapped: a map of a truncated file kills the process."""

    tar: int
    index: int
    first_row_at: int
    width: int

    def row(self, number: int) -> np.ndarray:
        """One row of the index, int64 [2F+1]; raises ShardError."""
        size = self.width * 8
        try:
            data = os.pread(self.index, size, self.first_row_at + number * size)
        except OSError:
            raise ShardError(BAD_INDEX, transient=True) from None
        if len(data) < size:
            raise ShardError(BAD_INDEX)
        return np.frombuffer(data, dtype=np.int64)

    def read(self, offset: int, size: int) -> bytes:
        """Bytes of the tar, all of them; raises ShardError."""
        try:
            data = os.pread(self.tar, size, offset)
            while 0 < len(data) < size:  # a signal or a network file system may cut a read short
                more = os.pread(self.tar, size - len(data), offset + len(data))
                if not more:
                    break
                data += more
        except OSError:
            raise ShardError(UNREADABLE, transient=True) from None
        if len(data) < size:
            raise ShardError(TRUNCATED)
        return data

    def close(self) -> None:
        os.close(self.tar)
        os.close(self.index)


class ShardFiles:
    """Keeps at most ``max_open`` shards of a split open and closes the least recently used first.

    An open shard stays readable when its folder is renamed; opening another one then raises LostCorpus.
    """

    def __init__(self, split_dir: Path, manifest: Manifest, max_open: int) -> None:
        self._split_dir, self._manifest, self._max_open = split_dir, manifest, max_open
        self._open: OrderedDict[int, OpenShard] = OrderedDict()
        self._patience = PATIENCE_SECONDS
        self._lost: set[int] = set()  # shards missing or unreadable since one could last be read

    def get(self, number: int) -> OpenShard:
        """Open shard ``number``; raises ShardError, or LostCorpus when many or all shards are lost."""
        opened = self._open.get(number)
        if opened is not None:
            self._open.move_to_end(number)
            return opened
        shard = self._manifest.shards[number]
        try:
            opened = self._opened_in_time(shard)
        except ShardError as error:
            self.note_failure(number, error)
            raise
        self._open[number] = opened
        if len(self._open) > self._max_open:
            self._open.popitem(last=False)[1].close()
        return opened

    def forget(self, number: int) -> None:
        """Close a shard, so that its next use opens it again."""
        if number in self._open:
            self._open.pop(number).close()

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
        while self._open:
            self._open.popitem()[1].close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}

    def _opened_in_time(self, shard: Shard) -> OpenShard:
        began, pause = time.monotonic(), _FIRST_PAUSE_SECONDS
        while True:
            try:
                opened = self._open_now(shard)
            except ShardError as error:
                waited = time.monotonic() - began
                if not error.transient or waited >= min(SHARD_SECONDS, self._patience):
                    self._patience -= min(waited, self._patience)
                    raise
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
            else:
                if pause > _FIRST_PAUSE_SECONDS:
                    self._patience = PATIENCE_SECONDS
                return opened

    def _open_now(self, shard: Shard) -> OpenShard:
        width = index_columns(self._manifest.fields).width
        with ExitStack() as opened:  # closes what it holds on an error
            tar, _ = _open_file(self._split_dir / shard.file)
            opened.callback(os.close, tar)
            index, num_bytes = _open_file(self._split_dir / shard.index_file)
            opened.callback(os.close, index)
            found = OpenShard(tar, index, _first_row(index, num_bytes, (shard.rows, width)), width)
            opened.pop_all()
        return found

    def _folder_comes_back(self) -> bool:
        deadline = time.monotonic() + FOLDER_SECONDS
        while not os.path.exists(self._split_dir / MANIFEST_NAME):
            if time.monotonic() > deadline:
                return False
            time.sleep(_LONGEST_PAUSE_SECONDS)
        return True


def _open_file(path: Path) -> tuple[int, int]:
    """Descriptor and size of a plain file; O_NONBLOCK, or a pipe in its place would never open."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise ShardError(MISSING, transient=True) from None
    except OSError:
        raise ShardError(UNREADABLE, transient=True) from None
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode):
        os.close(descriptor)
        raise ShardError(UNREADABLE)
    return descriptor, found.st_size


def _first_row(descriptor: int, num_bytes: int, expected: tuple[int, int]) -> int:
    """Byte offset of the first row of an index; raises ShardError if it is not int64 of the expected shape."""
    try:
        head = io.BytesIO(os.pread(descriptor, _HEADER_BYTES, 0))
        version = np.lib.format.read_magic(head)
        read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, by_columns, dtype = read_header[version](head)
    except OSError:
        raise ShardError(UNREADABLE, transient=True) from None
    except INDEX_DAMAGE:
        raise ShardError(BAD_INDEX) from None
    fits = shape == expected and dtype == np.dtype("<i8") and not by_columns
    if not fits or num_bytes < head.tell() + expected[0] * expected[1] * 8:
        raise ShardError(BAD_INDEX)
    return head.tell()
