"""Finds files by name in folders, zip and tar archives, which are read where they are: nothing is unpacked."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import stat
import struct
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

from data_prep.record import MissingInput, PrepError, in_one_line

ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
MAX_MEMBERS = 20_000_000
_CHUNK = 1 << 20
# What the standard library raises on damaged archives (RuntimeError: an encrypted member).
_ARCHIVE_ERRORS = (OSError, EOFError, ValueError, RuntimeError, ArithmeticError, struct.error)
_ARCHIVE_ERRORS += (zlib.error, lzma.LZMAError, tarfile.TarError, zipfile.BadZipFile)


class Found(NamedTuple):
    """A file: its name without folders, its size in bytes, and how its content is read, at most ``limit`` bytes and
    one more. Reading raises OSError where the archive is damaged there."""

    name: str
    size: int
    read: Callable[[int], bytes]


class Places:
    """Folders and archives in the order in which they are searched; two archives are one union."""

    def __init__(self, places: Sequence[_Folder | _Archive]) -> None:
        self._places = places

    def find(self, names: Sequence[str]) -> Found | None:
        """The first file called by one of ``names``, paths below a place, the likeliest first; or else the only file
        that lies deeper, in further folders, under such a name."""
        for place in self._places:
            for name in names:
                if (found := place.exactly(name)) is not None:
                    return found
        for place in self._places:
            for name in names:
                if (found := place.deeper(name)) is not None:
                    return found
        return None

    def names(self) -> list[str]:
        """All files by their paths below their places, sorted; links that lead out of a folder are left out."""
        return sorted({name for place in self._places for name in place.names()})


@contextmanager
def open_places(paths: Sequence[Path]) -> Iterator[Places]:
    """The folders and archives ``paths`` to search in; raises PrepError where none is there, an archive is not, or one
    is neither.

    A compressed tar is decompressed once into a temporary file without a name (in TMPDIR), as its members are wanted
    in another order than they lie in. Of an archive only plain files are seen: no links, devices, encrypted or sparse
    members. Names are compared, never followed, so none leads out of it.
    """
    places: list[_Folder | _Archive] = []
    streams: list[BinaryIO] = []
    if paths and not any(path.exists() for path in paths):
        raise MissingInput(f"{', '.join(map(str, paths))}: no such folder or archive")
    try:
        for path in paths:
            places.append(_open(path, streams))
        yield Places(places)
    finally:
        for stream in streams:
            stream.close()


def is_archive(path: Path) -> bool:
    return path.name.lower().endswith(ARCHIVES)


def is_plain_file(path: Path) -> bool:
    """Whether ``path`` is a file, or a link to one: no folder, pipe or device."""
    return _of_path(os.fspath(path)) is not None


def _open(path: Path, streams: list[BinaryIO]) -> _Folder | _Archive:
    if path.is_dir():
        return _Folder(path)
    if not path.exists() and not is_archive(path):
        return _Folder(path)  # one of several, without a file
    if not path.exists():
        raise MissingInput(f"{path}: no such archive")
    if not is_archive(path):
        raise PrepError(f"{path}: a file, expected a folder or an archive ({', '.join(ARCHIVES)})")
    try:
        return _zip(path, streams) if path.name.lower().endswith(".zip") else _tar(path, streams)
    except PrepError:
        raise
    except _ARCHIVE_ERRORS as error:
        found = f"{path}: cannot be read as an archive ({in_one_line(error)})"
        raise PrepError(f"{found}; download it again, or set TMPDIR to a disk with room") from error


class _Folder:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._below: dict[str, list[str]] | None = None

    def exactly(self, name: str) -> Found | None:
        return _of_path(os.path.join(self._path, name))

    def deeper(self, name: str) -> Found | None:
        if self._below is None:
            self._below = _by_last(self._files())
        only = _only(self._below, name)
        return None if only is None else self.exactly(only)

    def names(self) -> list[str]:
        inside = os.path.realpath(self._path) + os.sep
        return [name for name in self._files() if not self._leads_out(name, inside)]

    def _leads_out(self, name: str, inside: str) -> bool:
        path = os.path.join(self._path, name)
        return os.path.islink(path) and not os.path.realpath(path).startswith(inside)

    def _files(self) -> Iterator[str]:
        for folder, _, files in os.walk(self._path):  # links to folders are not followed
            below = os.path.relpath(folder, self._path)
            yield from files if below == os.curdir else (os.path.join(below, file) for file in files)


class _Archive:
    """``members``: name -> (size, how it is read)."""

    def __init__(self, members: dict[str, tuple[int, Callable[[int], bytes]]]) -> None:
        self._members = members
        self._below = _by_last(members)

    def exactly(self, name: str) -> Found | None:
        member = self._members.get(name)
        return None if member is None else Found(name.rpartition("/")[2], *member)

    def deeper(self, name: str) -> Found | None:
        only = _only(self._below, name)
        return None if only is None else self.exactly(only)

    def names(self) -> list[str]:
        return list(self._members)


def _by_last(names: Iterable[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(name.rpartition("/")[2], []).append(name)
    return found


def _only(below: dict[str, list[str]], name: str) -> str | None:
    fitting = [one for one in below.get(name.rpartition("/")[2], ()) if one.endswith(f"/{name}")]
    return fitting[0] if len(fitting) == 1 else None


def _of_path(path: str) -> Found | None:
    """The plain file at ``path``, or that a link there leads to; None for anything else."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None

    def read(limit: int) -> bytes:
        with open(path, "rb") as stream:
            return stream.read(limit + 1)

    return Found(os.path.basename(path), found.st_size, read) if stat.S_ISREG(found.st_mode) else None


def _zip(path: Path, streams: list[BinaryIO]) -> _Archive:
    archive = zipfile.ZipFile(path)
    streams.append(archive)  # type: ignore[arg-type]
    members = {}
    for info in archive.infolist():
        kind = stat.S_IFMT(info.external_attr >> 16)
        if not info.is_dir() and not info.flag_bits & 1 and kind in (0, stat.S_IFREG):
            members.setdefault(_plain(info.filename), (info.file_size, _zip_reader(archive, info)))
        _check_number(path, len(members))
    return _Archive(members)


def _zip_reader(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Callable[[int], bytes]:
    def read(limit: int) -> bytes:
        try:
            with archive.open(info) as stream:
                return stream.read(limit + 1)
        except _ARCHIVE_ERRORS as error:
            raise OSError(in_one_line(f"{archive.filename}: {info.filename}: {error}")) from error

    return read


def _tar(path: Path, streams: list[BinaryIO]) -> _Archive:
    if path.name.lower().endswith(".tar"):
        stream: BinaryIO = open(path, "rb")
        streams.append(stream)
    else:
        stream = _decompressed(path, streams)
    members = {}
    with tarfile.open(fileobj=stream, mode="r:") as tar:
        for member in tar:
            if member.isreg() and not member.issparse():
                read = _range_reader(stream, path, member.offset_data, member.size)
                members[_plain(member.name)] = (member.size, read)  # a later member of a name replaces an earlier one
            tar.members.clear()  # tarfile would keep them all
            _check_number(path, len(members))
    return _Archive(members)


def _decompressed(path: Path, streams: list[BinaryIO]) -> BinaryIO:
    """The tar in a compressed file, as a temporary file."""
    name = path.name.lower()
    opened = lzma.open if name.endswith(".xz") else bz2.open if name.endswith(".bz2") else gzip.open
    temporary = tempfile.TemporaryFile()
    streams.append(temporary)
    try:
        with opened(path, "rb") as source:
            while chunk := source.read(_CHUNK):
                temporary.write(chunk)
    except lzma.LZMAError as error:
        raise OSError(str(error)) from error
    temporary.flush()
    temporary.seek(0)
    return temporary


def _range_reader(stream: BinaryIO, path: Path, offset: int, size: int) -> Callable[[int], bytes]:
    def read(limit: int) -> bytes:
        content = os.pread(stream.fileno(), min(size, limit + 1), offset)
        if len(content) < min(size, limit + 1):
            raise OSError(f"{path}: ends within a member; download it again")
        return content

    return read


def _plain(name: str) -> str:
    return name.removeprefix("./")


def _check_number(path: Path, members: int) -> None:
    if members > MAX_MEMBERS:
        raise PrepError(f"{path}: more than {MAX_MEMBERS:,} members, expected an archive of images")
