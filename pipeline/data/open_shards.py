"""The open shards of this process over all corpora, as many as its limit of file descriptors leaves room for."""

from __future__ import annotations

import errno
import os
import resource
from collections import OrderedDict
from typing import NamedTuple

import numpy as np

MAX_OPEN_SHARDS = 512  # a parallel file system keeps state for each open file of each client
SHARE_OF_LIMIT = 1 / 4  # of ``ulimit -n`` for shards; sockets, pipes and libraries need the rest
DESCRIPTORS = 2  # of a shard: tar and index
EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # says nothing about the file that was to be opened or read

MISSING, UNREADABLE, TRUNCATED, BAD_INDEX = "missing shard", "unreadable shard", "truncated shard", "unreadable index"
SHARD_REASONS = (MISSING, UNREADABLE, TRUNCATED, BAD_INDEX)  # reasons that cost a shard, not one sample


class ShardError(Exception):
    """A shard that cannot be used; ``reason`` is one of SHARD_REASONS."""

    def __init__(self, reason: str, transient: bool = False) -> None:
        super().__init__(reason)
        self.reason, self.transient = reason, transient


class DataError(RuntimeError):
    """Nothing can be read any more, and no other sample would help; the message says what to do."""


class OutOfDescriptors(DataError):
    """This process or machine cannot open another file, with no shard left to close."""


class OpenShard(NamedTuple):
    """File descriptors of a tar and its index, read and not mapped: a map of a truncated file kills the process.

    Reading raises ShardError, and OSError where the machine is EXHAUSTED.
    """

    tar: int
    index: int
    first_row_at: int
    width: int

    def row(self, number: int) -> np.ndarray:
        """One row of the index, int64 [2F+1]."""
        size = self.width * 8
        try:
            data = os.pread(self.index, size, self.first_row_at + number * size)
        except OSError as error:
            raise refused(error, BAD_INDEX) from None
        if len(data) < size:
            raise ShardError(BAD_INDEX)
        return np.frombuffer(data, dtype=np.int64)

    def read(self, offset: int, size: int) -> bytes:
        """Bytes of the tar, all of them."""
        try:
            data = os.pread(self.tar, size, offset)
            while 0 < len(data) < size:  # a signal or a network file system may cut a read short
                more = os.pread(self.tar, size - len(data), offset + len(data))
                if not more:
                    break
                data += more
        except OSError as error:
            raise refused(error, UNREADABLE) from None
        if len(data) < size:
            raise ShardError(TRUNCATED)
        return data

    def close(self) -> None:
        os.close(self.tar)
        os.close(self.index)


class OpenShards:
    """At most ``limit`` open shards (None: by ``open_shards_limit`` on first use); the least recently used is closed
    first. A key is a corpus, by any number of its own, and the number of a shard."""

    def __init__(self, limit: int | None = None) -> None:
        self._limit = limit
        self._open: OrderedDict[tuple[int, int], OpenShard] = OrderedDict()

    def get(self, corpus: int, number: int) -> OpenShard | None:
        """The shard if it is open; it then counts as just used."""
        opened = self._open.get((corpus, number))
        if opened is not None:
            self._open.move_to_end((corpus, number))
        return opened

    def add(self, corpus: int, number: int, opened: OpenShard) -> None:
        if self._limit is None:
            self._limit = open_shards_limit()
        self._open[corpus, number] = opened
        self._close_beyond(self._limit)

    def close(self, corpus: int, number: int | None = None) -> None:
        """Close a shard of a corpus, or all of them."""
        numbers = [number] if number is not None else [one for owner, one in list(self._open) if owner == corpus]
        for one in numbers:
            opened = self._open.pop((corpus, one), None)
            if opened is not None:
                opened.close()

    def close_removed(self, corpus: int) -> None:
        """Close the shards of a corpus whose tar was removed, as its space is free only then."""
        for owner, number in list(self._open):
            if owner == corpus and os.fstat(self._open[owner, number].tar).st_nlink == 0:
                self.close(owner, number)

    def give_up_half(self) -> bool:
        """Close half of the shards and keep no more than the rest from now on; False if none is open."""
        if not self._open:
            return False
        self._limit = max(len(self._open) // 2, 1)
        self._close_beyond(len(self._open) // 2)
        return True

    def __reduce__(self) -> tuple:
        return _of_this_process, ()  # descriptors do not travel: where a corpus is unpickled, that process keeps them

    def _close_beyond(self, limit: int) -> None:
        while len(self._open) > limit:
            self._open.popitem(last=False)[1].close()


OF_THIS_PROCESS = OpenShards()  # a forked process goes on with its own copy of the descriptors


def _of_this_process() -> OpenShards:
    return OF_THIS_PROCESS


def open_shards_limit() -> int:
    """How many shards a process may hold open by its limit of descriptors (``ulimit -n``)."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return MAX_OPEN_SHARDS
    return max(1, min(MAX_OPEN_SHARDS, int(soft * SHARE_OF_LIMIT) // DESCRIPTORS))


def refused(error: OSError, reason: str) -> Exception:
    """What to raise for ``error`` of the operating system: itself where it says nothing about the shard."""
    return error if error.errno in EXHAUSTED else ShardError(reason, transient=True)


def out_of_descriptors(error: OSError) -> OutOfDescriptors:
    """The error of a process that cannot open one more file, for people."""
    if error.errno == errno.EMFILE:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = "any number" if hard == resource.RLIM_INFINITY else str(hard)
        return OutOfDescriptors(
            f"too many open files: the limit is {soft} per process (ulimit -n), and no shard is left to close; raise "
            f"it before the start, such as `ulimit -n 4096` ({most} allowed here)"
        )
    if error.errno == errno.ENFILE:
        return OutOfDescriptors(
            "too many open files on this machine, in all processes together; end some, or raise fs.file-max (sysctl)"
        )
    return OutOfDescriptors(
        "the machine has no memory left to open or read a file; lower data.num_workers or data.prefetch, or end other "
        "processes"
    )
