"""Copies of one corpus's shards on the disk of a node: made, checked and removed by one process at a time."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

from data_prep.manifest import Manifest, Shard, index_columns
from data_prep.stores.address import Address
from data_prep.stores.failures import StoreError
from data_prep.stores.read_ahead import ReadAhead
from data_prep.stores.requests import read_range, size_of
from pipeline.data.open_shards import MISSING, ShardError
from pipeline.data.shard_files import open_plain_file

SPARE_BYTES = 2**30  # of the disk, which others need too: no copy is made into them
_CHUNK_BYTES = 4 * 2**20
_INDEX_HEAD_BYTES = 128
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
READY = "ready"
_LEFT, _PART = "left", "part"


Read = Callable[[int, int], bytes]  # bytes of a file, by the number of bytes and the first of them


class OtherContent(Exception):
    """A shard whose bytes are not those of the manifest; the message names it."""


class Stopped(Exception):
    """Copying was told to stop."""


def remove_leftovers(folder: Path, kept: Collection[str]) -> None:
    """Remove from the folder of this user the copies of corpora other than ``kept`` that no process works on."""
    for name in os.listdir(folder):
        if name not in kept:
            lock = _lock(folder / name, needed=True)
            if lock is not None:
                shutil.rmtree(folder / name, ignore_errors=True)
                os.close(lock)


class NodeFolder:
    """The copies of one version of a corpus, in a folder of its own: NAME/ready holds those in use, NAME/left what an
    earlier process left, to be checked before it is used, NAME/part what is being copied.

    The process that has ``take``n the folder holds a lock of the kernel on it, which ends with the process. Its other
    methods raise OSError when a disk fails, and ShardError when the original does.
    """

    def __init__(self, folder: Path, split_dir: Path | Address, manifest: Manifest) -> None:
        self.name = name_of(manifest)
        self.path, self._split_dir, self._manifest = folder / self.name, split_dir, manifest
        width, shards = index_columns(manifest.fields).width, manifest.shards
        self.sizes = shards.bytes + shards.rows * (width * 8) + _INDEX_HEAD_BYTES  # bytes of a copy, int64 [shards]
        self.ready: set[int] = set()
        self.left: set[int] = set()
        self._lock: int | None = None
        self._writing: int | None = None
        os.register_at_fork(after_in_child=self._close_part)  # or a copy that is removed later keeps its room

    @property
    def taken(self) -> bool:
        return self._lock is not None

    def take(self) -> bool:
        """Become the one that changes the folder; False while another process is. Copies of before are set aside."""
        self.path.mkdir(mode=0o700, exist_ok=True)
        lock = _lock(self.path, needed=False)
        if lock is None:
            return False
        try:
            self._set_aside()
        except OSError:
            os.close(lock)
            raise
        self._lock = lock
        return True

    def add(self, number: int, stopped: Callable[[], bool] = lambda: False) -> None:
        """Put a whole, verified copy of a shard into use: an earlier one if there is one, else a new one.

        It need not be flushed to the disk: what a power cut leaves of it is checked before it is used again.
        Raises OtherContent where the original is not what the manifest says, and Stopped.
        """
        shard = self._manifest.shards[number]
        files = ((shard.index_file, shard.index_sha256, None), (shard.file, shard.sha256, shard.bytes))
        if number in self.left:
            self.left.discard(number)
            if not all(self._is_whole(*file, stopped) for file in files):
                self._remove(number, _LEFT)
        with ExitStack() as undo:
            undo.callback(self._remove, number, _LEFT)
            for name, sha256, size in files:
                if not os.path.exists(self.path / _LEFT / name):
                    self._copy(name, sha256, size, int(self.sizes[number]), stopped)
            for name, _, _ in files:  # the tar last: a copy is there when its tar is
                os.replace(self.path / _LEFT / name, self.path / READY / name)
            undo.pop_all()
        self.ready.add(number)

    def remove(self, number: int) -> None:
        """Remove a copy; who has it open reads on."""
        self._remove(number, READY if number in self.ready else _LEFT)
        self.ready.discard(number)
        self.left.discard(number)

    def forget_removed(self) -> None:
        """Take note of copies that somebody else has removed."""
        there = set(os.listdir(self.path / READY))
        self.ready = {number for number in self.ready if there.issuperset(self._names(self._manifest.shards[number]))}

    def close(self) -> None:
        """Leave the folder to others; the copies stay."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _set_aside(self) -> None:
        """Move all copies to NAME/left, and remove what is no whole copy."""
        shutil.rmtree(self.path / _PART, ignore_errors=True)
        for name in (_PART, _LEFT, READY):
            (self.path / name).mkdir(mode=0o700, exist_ok=True)
        for name in os.listdir(self.path / READY):
            with suppress(FileNotFoundError):  # another process does the same where locks are granted to all
                os.replace(self.path / READY / name, self.path / _LEFT / name)
        there, files = set(os.listdir(self.path / _LEFT)), [self._names(shard) for shard in self._manifest.shards]
        self.left = {number for number, names in enumerate(files) if there.issuperset(names)}
        for name in there.difference(*(files[number] for number in self.left)):
            _remove(self.path / _LEFT / name)

    def _remove(self, number: int, place: str) -> None:
        for name in self._names(self._manifest.shards[number]):
            _remove(self.path / place / name)

    @staticmethod
    def _names(shard: Shard) -> tuple[str, str]:
        return shard.file, shard.index_file

    def _is_whole(self, name: str, sha256: str, size: int | None, stopped: Callable[[], bool]) -> bool:
        try:
            source, found = open_plain_file(self.path / _LEFT / name)
        except (OSError, ShardError):
            return False
        try:
            whole = _pass_on(partial(os.pread, source), found, None, stopped)
            return size in (None, found) and _is_hash(sha256, whole)
        except OSError:
            return False
        finally:
            os.close(source)

    def _copy(self, name: str, sha256: str, size: int | None, limit: int, stopped: Callable[[], bool]) -> None:
        """Copy a file of the original into NAME/left by way of NAME/part."""
        part = self.path / _PART / name
        with ExitStack() as at_end:
            at_end.callback(_remove, part)
            read, found = at_end.enter_context(self._original(name))
            if size not in (None, found) or found > limit:
                raise OtherContent(f"{self._split_dir / name}: {found} bytes are not what its manifest says")
            if shutil.disk_usage(self.path).free < found + SPARE_BYTES:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
            at_end.callback(self._close_part)
            self._writing = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            if not _is_hash(sha256, _pass_on(read, found, self._writing, stopped)):
                raise OtherContent(f"{self._split_dir / name}: its SHA-256 is not that of its manifest")
            os.replace(part, self.path / _LEFT / name)

    @contextmanager
    def _original(self, name: str) -> Iterator[tuple[Read, int]]:
        """How a file of the original is read, and its bytes; of a store several ranges are fetched at a time."""
        if not isinstance(self._split_dir, Address):
            source, found = open_plain_file(self._split_dir / name)
            try:
                yield partial(os.pread, source), found
            finally:
                os.close(source)
            return
        url, ahead = (self._split_dir / name).url, ReadAhead()
        try:
            found = size_of(url)
            if found is None:
                raise ShardError(MISSING, transient=True)
            ranges = [(at, min(_CHUNK_BYTES, found - at)) for at in range(0, found, _CHUNK_BYTES)]
            ahead.expect((at, partial(read_range, url, at, size)) for at, size in ranges)
            yield lambda size, at: ahead.take(at), found
        except StoreError as error:
            raise OSError(errno.EIO, str(error)) from error
        finally:
            ahead.close()

    def _close_part(self) -> None:
        descriptor, self._writing = self._writing, None
        if descriptor is not None:
            os.close(descriptor)


def name_of(manifest: Manifest) -> str:
    """The name of the folder of a corpus's copies: another one for every other content."""
    return manifest.fingerprint()[:32]


def _lock(folder: Path, needed: bool) -> int | None:
    """A descriptor that holds the lock of ``folder``; None if another process holds it, or the folder has gone.

    Where the file system has no locks, None if one is ``needed``: two jobs at once then make and remove the same whole
    copies, in vain but without harm.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.stat(folder).st_ino == os.fstat(descriptor).st_ino:
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    except OSError as error:
        if error.errno in _NO_LOCKS and not needed:
            return descriptor
        if error.errno not in _NO_LOCKS:
            os.close(descriptor)
            raise
    os.close(descriptor)
    return None


def _pass_on(read: Read, size: int, target: int | None, stopped: Callable[[], bool]) -> str:
    """SHA-256 of the first ``size`` bytes of a file, written to ``target`` on the way; raises OSError, Stopped."""
    digest, done = hashlib.sha256(), 0
    while done < size:
        if stopped():
            raise Stopped
        data = read(min(_CHUNK_BYTES, size - done), done)
        if not data:
            raise OSError(errno.EIO, "the file ends too early")
        digest.update(data)
        done += len(data)
        while target is not None and data:
            data = data[os.write(target, data) :]
    return digest.hexdigest()


def _is_hash(listed: str, found: str) -> bool:
    """Whether the hash of a file is the one in the manifest, if there is one."""
    return listed == found or not re.fullmatch("[0-9a-f]{64}", listed)


def _remove(path: Path) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
    except IsADirectoryError:
        shutil.rmtree(path, ignore_errors=True)
