"""Small files of a store on a disk of this node, named by their hash: fetched once for all processes and jobs there."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

KEPT_BYTES = 4 * 2**30  # of all files together; those that were opened longest ago go
SPARE_BYTES = 2**30  # of the disk, which others need too
_WRITTEN_PER_LOOK = 64  # files written between two looks at how many there are
_written, _warned = [0], [False]
_locks: dict[tuple[int, str], threading.Lock] = {}  # by process, as a lock that is held in a fork stays so


def open_kept(sha256: str, fetch: Callable[[], bytes]) -> int:
    """A descriptor, at its first byte, of the content with this hash: of the file kept on this node, or of memory where
    no disk takes it.

    A file is compared with its hash each time it is opened; a damaged or removed one is fetched again. Raises
    ValueError where what is fetched has another hash, OSError where no descriptor is left, and as ``fetch`` does.
    """
    if not re.fullmatch("[0-9a-f]{64}", sha256):  # of a manifest without hashes
        return _in_memory(fetch())
    with _locks.setdefault((os.getpid(), sha256[0]), threading.Lock()):  # threads that want the same file fetch it once
        return _open_kept(sha256, fetch)


def _open_kept(sha256: str, fetch: Callable[[], bytes]) -> int:
    try:
        path = _folder() / f"{sha256}.kept"
        found = _whole(path, sha256)
        if found is not None:
            return found
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise
        path = None
        _warn(error)
    content = fetch()
    if hashlib.sha256(content).hexdigest() != sha256:
        raise ValueError(f"its SHA-256 is not {sha256}")
    if path is not None:
        try:
            return _keep(path, content)
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                raise
            _warn(error)
    return _in_memory(content)


def own_folder(above: Path, name: str = "openflm") -> Path:
    """The folder of this user in ``above``, which must be there; raises OSError where it can't be used."""
    folder = above / f"{name}-{os.geteuid()}"
    with suppress(FileExistsError):
        os.mkdir(folder, 0o700)
    found = os.lstat(folder)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise PermissionError(errno.EACCES, "there is another's file or folder of this name", str(folder))
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
    return folder


def files_folder() -> Path:
    """Where files of stores are kept: in the folder for temporary files, that ``TMPDIR`` names; raises OSError."""
    return own_folder(Path(tempfile.gettempdir()), "openflm-stores")


def _folder() -> Path:
    folder = files_folder() / "kept"
    with suppress(FileExistsError):
        os.mkdir(folder, 0o700)
    return folder


def _whole(path: Path, sha256: str) -> int | None:
    """A descriptor of a kept file whose content has the hash, None where there is none."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except (FileNotFoundError, NotADirectoryError):
        return None
    with open(descriptor, "rb", closefd=False) as stream:
        if hashlib.file_digest(stream, "sha256").hexdigest() == sha256:
            with suppress(OSError):
                os.utime(descriptor)
            os.lseek(descriptor, 0, os.SEEK_SET)
            return descriptor
    os.close(descriptor)
    return None


def _keep(path: Path, content: bytes) -> int:
    """Write a file beside and rename it; a descriptor of it."""
    found = os.statvfs(path.parent)
    if found.f_bavail * found.f_frsize < len(content) + SPARE_BYTES:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path.parent))
    descriptor, beside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with ExitStack() as undone:  # what is undone unless the file stands at its place
        undone.callback(Path(beside).unlink, missing_ok=True)
        undone.callback(os.close, descriptor)
        with open(descriptor, "wb", closefd=False) as stream:
            stream.write(content)
        os.lseek(descriptor, 0, os.SEEK_SET)
        os.replace(beside, path)
        undone.pop_all()
    _written[0] += 1
    if (_written[0] - 1) % _WRITTEN_PER_LOOK == 0:
        _remove_oldest(path.parent)
    return descriptor


def _remove_oldest(folder: Path) -> None:
    """Keep within KEPT_BYTES; who has a removed file open reads on."""
    found = []
    with os.scandir(folder) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):
                found.append((entry.stat().st_mtime, entry.stat().st_size, entry.path))
    total = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if total <= KEPT_BYTES:
            return
        with suppress(FileNotFoundError):
            os.unlink(path)
        total -= size


def _in_memory(content: bytes) -> int:
    descriptor = os.memfd_create("openflm")
    with open(descriptor, "wb", closefd=False) as stream:
        stream.write(content)
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


def _warn(error: OSError) -> None:
    if not _warned[0]:
        where = f"{error.filename}: " if error.filename else ""
        print(
            f"warning: {where}{error.strerror}: index files of stores are held in memory by each process; let TMPDIR"
            " name a folder with room",
            file=sys.stderr,
            flush=True,
        )
    _warned[0] = True
