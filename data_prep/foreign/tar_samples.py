"""Reads which samples a tar of another program holds, and where their members lie; no content is looked at."""

from __future__ import annotations

import os
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

from data_prep.record import Rejection
from data_prep.shard_members import key_and_suffix

_CHUNK = 1 << 20


class Member(NamedTuple):
    """A plain file in a tar: its name, the byte offset of its content, its size in bytes."""

    name: str
    offset: int
    size: int


@dataclass
class TarSample:
    """The members of one key, by what follows the key in their names, in lower case: "jpg", "caption.txt"."""

    key: str
    members: dict[str, Member] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    repeated: Counter[str] = field(default_factory=Counter)


class TarContent(NamedTuple):
    """The samples of a tar in its order, and what of it is no sample."""

    samples: list[TarSample]
    problems: list[Rejection]


def read_tar(path: Path, name: str) -> TarContent:
    """All samples of a tar, wherever the members of one stand; ``name`` is the tar's, for the rejections.

    Offsets are the tar parser's own, which knows GNU's long names and PAX headers. A tar is read up to its end mark, as
    every reader does, or as far as it can be; what stands behind is a rejection. A tar with sparse members is rejected
    whole: where members after those lie is uncertain.
    """
    samples: dict[str, TarSample] = {}
    problems: list[Rejection] = []
    with open(path, "rb") as stream:
        end = 0
        try:
            with tarfile.open(fileobj=stream, mode="r:") as tar:
                for member in _members(tar):
                    if member.issparse():
                        return TarContent([], [_broken(name, f"{member.name!r} is sparse; pack its files again")])
                    _place(member, name, samples, problems)
                end = tar.offset
        except (tarfile.TarError, OSError, ValueError, OverflowError, EOFError) as error:
            problems.append(_broken(name, str(error)))
        else:
            problems += _behind(stream, end, name)
        problems += _cut_off(samples, os.fstat(stream.fileno()).st_size, name)
    for sample in samples.values():
        if sample.repeated:
            lost = max(sample.repeated.values())
            problems.append(Rejection("duplicate_key", f"{name}: {sample.key}", "again in the same shard", rows=lost))
    return TarContent(list(samples.values()), problems)


def _members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The members of a tar; raises ValueError where they don't follow each other, or the parser would never end."""
    before = -1
    for member in tar:
        if member.offset <= before or member.size < 0:
            raise ValueError(f"member at byte {member.offset} after that at {before}, of {member.size} bytes")
        before = member.offset
        yield member


def _place(member: tarfile.TarInfo, name: str, samples: dict[str, TarSample], problems: list[Rejection]) -> None:
    if member.isdir():
        return
    found = key_and_suffix(member.name)
    if found is None:
        problems.append(Rejection("no_key", f"{name}: {_shown(member.name)}"))
        return
    key, suffix = found
    sample = samples.setdefault(key, TarSample(_shown(key)))
    if not member.isreg():
        sample.problems.append(f"{_shown(member.name)} is a link or a device")
    elif suffix in sample.members:
        sample.repeated[suffix] += 1
    else:
        sample.members[suffix] = Member(member.name, member.offset_data, member.size)


def _cut_off(samples: dict[str, TarSample], num_bytes: int, name: str) -> list[Rejection]:
    """Take the samples with members beyond the end of the file out of ``samples``."""
    cut = [
        key for key, sample in samples.items() if any(m.offset + m.size > num_bytes for m in sample.members.values())
    ]
    for key in cut:
        del samples[key]
    return [Rejection("truncated_shard", f"{name}: {_shown(key)}", f"the file has {num_bytes} bytes") for key in cut]


def _behind(stream: BinaryIO, end: int, name: str) -> list[Rejection]:
    """What is wrong with what stands from byte ``end`` on, where the parser found no further member."""
    stream.seek(end)
    mark = stream.read(tarfile.BLOCKSIZE)
    if len(mark) < tarfile.BLOCKSIZE:
        return [_broken(name, "ends without an end mark: its writer was killed, or it was cut off")]
    after = _first_byte_after(stream, end)
    if after is None:
        return []
    detail = f"the tar ends at byte {end}, but not its file: data at byte {after}; damaged, or several tars in one file"
    return [Rejection("data_after_end", name, detail)]


def _first_byte_after(stream: BinaryIO, end: int) -> int | None:
    """Where the first byte other than zero stands from ``end`` on."""
    stream.seek(end)
    while chunk := stream.read(_CHUNK):
        if chunk.count(0) != len(chunk):
            return end + len(chunk) - len(chunk.lstrip(b"\0"))
        end += len(chunk)
    return None


def _broken(name: str, detail: str) -> Rejection:
    return Rejection("unreadable_shard", name, detail[:200])


def _shown(name: str) -> str:
    """A name that was not UTF-8 with escapes."""
    return name.encode("utf-8", "backslashreplace").decode()
