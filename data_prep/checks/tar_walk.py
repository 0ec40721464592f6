"""Walks the headers of a tar to the end of the file and hashes it in the same pass, at the speed of the disk."""

from __future__ import annotations

import hashlib
import os
import tarfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

BLOCK = tarfile.BLOCKSIZE
MAX_MEMBERS = 1_000_000  # of a shard; what is kept of a member takes about 200 bytes
_CHUNK = 1 << 20
_MAX_EXTENSION = 1 << 16  # bytes of a PAX or GNU header, which is held in memory
_COMPRESSED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zXZ": "xz", b"BZh": "bzip2"}
_PLAIN = {b"0": "file", b"\0": "file", b"7": "file"}
_OTHER = {b"1": "hard link", b"2": "link", b"3": "device", b"4": "device", b"5": "folder", b"6": "pipe"}
_ZEROS = bytes(BLOCK)


class Member(NamedTuple):
    """A member of a tar: ``offset`` and ``size`` of its content in bytes; ``kind`` is "file" or something else.

    ``key`` is its name up to the first dot of the file name, ``extension`` what follows, as webdataset divides it.
    """

    offset: int
    size: int
    name: str
    kind: str
    key: str
    extension: str


@dataclass
class Walk:
    """What a tar holds. ``problems`` are (kind, text), of the kinds that ``doctor`` knows; ``notes`` are harmless.

    ``end`` is the position of the end-of-archive block, None without one; readers stop there, this walk does not.
    ``prefix_sha256`` is the hash of the first ``prefix`` bytes that were asked for, "" where the file is shorter.
    """

    bytes: int = 0
    sha256: str = ""
    prefix_sha256: str = ""
    end: int | None = None
    members: list[Member] = field(default_factory=list)
    problems: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def walk_tar(path: Path, prefix: int | None = None) -> Walk:
    """Read and hash the whole file; raises OSError. Nothing is extracted, memory does not follow announced sizes."""
    walk, digest, position = Walk(), hashlib.sha256(), 0
    with open(path, "rb", buffering=0) as stream:
        headers = _Headers(walk, stream.fileno(), os.fstat(stream.fileno()).st_size)
        while chunk := stream.read(_CHUNK):
            left = -1 if prefix is None else prefix - position
            if 0 < left <= len(chunk):
                digest.update(memoryview(chunk)[:left])
                walk.prefix_sha256 = digest.hexdigest()
                digest.update(memoryview(chunk)[left:])
            else:
                digest.update(chunk)
            headers.feed(position, chunk)
            position += len(chunk)
    walk.bytes, walk.sha256 = position, digest.hexdigest()
    headers.finish()
    return walk


def walk_headers(path: Path) -> Walk:
    """The members alone, read header by header without hashing; raises OSError."""
    walk = Walk()
    with open(path, "rb", buffering=0) as stream:
        walk.bytes = os.fstat(stream.fileno()).st_size
        headers = _Headers(walk, stream.fileno(), walk.bytes)
        while headers.position < walk.bytes and not headers.stopped:
            at = headers.position
            headers.feed(at, os.pread(stream.fileno(), BLOCK, at))
        headers.finish()
    return walk


def sample_starts(members: list[Member]) -> list[int]:
    """For each member the offset of the first member of its sample: neighbours of one key, no extension twice."""
    starts: list[int] = []
    key, extensions = None, set()
    for member in members:
        if member.key != key or member.extension in extensions:
            key, extensions, start = member.key, set(), member.offset
        extensions.add(member.extension)
        starts.append(start)
    return starts


class _Headers:
    """Reads headers from chunks of a tar, which follow each other and hold whole blocks but for the last."""

    def __init__(self, walk: Walk, descriptor: int, size: int) -> None:
        self._walk, self._descriptor, self._size = walk, descriptor, size
        self._pending: dict[str, str] = {}  # of a PAX or GNU header, for the next member
        self.position = 0  # of the next header
        self.stopped = False

    def feed(self, start: int, chunk: bytes) -> None:
        end = start + len(chunk)
        while self.position < end and not self.stopped:
            at = self.position - start
            block = chunk[at : at + BLOCK]
            if len(block) < BLOCK:
                if block.strip(b"\0"):
                    self._stop("truncated_shard", f"ends within a header at byte {self.position}")
                return
            if block == _ZEROS:
                if self._walk.end is None:
                    self._walk.end = self.position
                rest = chunk[at:]
                zeros = len(rest) - len(rest.lstrip(b"\0"))
                self.position += zeros // BLOCK * BLOCK if zeros < len(rest) else len(rest)
            else:
                self._header(block)

    def finish(self) -> None:
        walk = self._walk
        if self._size == 0:
            self._stop("empty_shard", "0 bytes")
        elif not walk.members and not walk.problems:
            self._stop("empty_shard", "a tar without members")
        elif walk.end is None and not walk.problems:
            walk.notes.append("no end-of-archive block")

    def _header(self, block: bytes) -> None:
        walk, at = self._walk, self.position
        beyond = walk.end is not None
        try:
            size = _number(block[124:136])
            total = _number(block[148:156]) + sum(block[148:156]) - 8 * 32
            if zlib.adler32(block) & 0xFFFF != (total + 1) % 65521:  # a sum of bytes in C; RFC 1950, 8.2
                raise ValueError("wrong checksum")
        except ValueError as error:
            name = next((name for magic, name in _COMPRESSED.items() if block.startswith(magic)), None)
            if beyond:
                self._stop("trailing_data", f"data after the end-of-archive block at byte {walk.end}")
            elif at == 0 and name:
                self._stop("compressed_shard", f"compressed by {name}, expected a plain tar")
            elif at == 0:
                self._stop("not_a_tar", f"starts with {block[:12]!r}, expected the header of a tar")
            else:
                self._stop("broken_header", f"no header of a member at byte {at} ({error})")
            return
        if beyond and not any(kind == "trailing_data" for kind, _ in walk.problems):
            walk.problems.append(("trailing_data", f"members after the end-of-archive block at byte {walk.end}"))
        if len(walk.members) >= MAX_MEMBERS:
            self._stop("too_many_members", f"more than {MAX_MEMBERS} members")
            return
        size = int(self._pending.get("size", size)) if block[156:157] not in b"xXgLK" else size
        if not 0 <= size <= self._size - at - BLOCK:
            self._stop(
                "truncated_shard", f"a member at byte {at} announces {size} bytes, {self._size - at - BLOCK} follow"
            )
            return
        self._member(block, at + BLOCK, size)
        self.position = at + BLOCK + -(-size // BLOCK) * BLOCK

    def _member(self, block: bytes, offset: int, size: int) -> None:
        kind = block[156:157]
        if kind in (b"x", b"X", b"g", b"L", b"K"):
            self._extension(kind, offset, size)
            return
        name = block[:100].partition(b"\0")[0]
        if prefix := block[345:500].partition(b"\0")[0]:
            name = prefix + b"/" + name
        pending, self._pending = self._pending, {}
        if kind == b"S" or (pending and any(name.startswith("GNU.sparse") for name in pending)):
            self._stop("sparse_member", f"member {ascii(name)[1:]} is sparse: its bytes do not stand as they are")
            return
        text = pending.get("path") or name.decode("utf-8", "surrogateescape")
        what = _PLAIN.get(kind) or _OTHER.get(kind, "unknown member")
        folder, slash, rest = text.rpartition("/") if "/" in text else ("", "", text)
        key, _, extension = rest.partition(".")
        self._walk.members.append(Member(offset, size, text, what, folder + slash + key, extension))

    def _extension(self, kind: bytes, offset: int, size: int) -> None:
        note = "GNU headers" if kind in b"LK" else "PAX headers"
        if note not in self._walk.notes:
            self._walk.notes.append(note)
        if size > _MAX_EXTENSION:
            self._stop("broken_header", f"a header of {size} bytes at byte {offset}, expected at most {_MAX_EXTENSION}")
            return
        content = os.pread(self._descriptor, size, offset)
        if kind == b"L":
            self._pending["path"] = content.partition(b"\0")[0].decode("utf-8", "surrogateescape")
        elif kind in b"xX":
            try:
                self._pending |= _pax_records(content)
            except ValueError:
                self._stop("broken_header", f"PAX header at byte {offset} can't be read")

    def _stop(self, kind: str, text: str) -> None:
        self._walk.problems.append((kind, text))
        self.stopped = True


def _number(field: bytes) -> int:
    """A number of a header, octal or binary; raises ValueError. POSIX ustar, and GNU tar's manual, "Large numbers"."""
    if field[:1] == b"\x80":
        return int.from_bytes(field[1:], "big")
    digits = field.partition(b"\0")[0].strip()
    if digits and not digits.isdigit():
        raise ValueError(f"{field!r} is no number")
    return int(digits, 8) if digits else 0


def _pax_records(content: bytes) -> dict[str, str]:
    """Records ``LENGTH KEY=VALUE\\n`` of POSIX pax; raises ValueError."""
    records: dict[str, str] = {}
    while content.strip(b"\0"):
        length, _, _ = content.partition(b" ")
        if not length.isdigit() or not len(length) + 3 <= int(length) <= len(content):
            raise ValueError(f"a record of {length[:20]!r} bytes")
        key, equals, value = content[len(length) + 1 : int(length) - 1].partition(b"=")
        if not equals:
            raise ValueError("a record without a value")
        records[key.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        content = content[int(length) :]
    if not (records.get("size", "0").isdecimal() and len(records.get("size", "")) <= 20):
        raise ValueError("a size that is no number")
    return records
