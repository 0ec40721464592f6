"""Writes a split: deterministic tar shards, their indexes, the list of rejected records, and the manifest last."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import tarfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.corpus_card import MEMBERS, write_card
from data_prep.manifest import (
    CAPTIONS,
    Manifest,
    Shard,
    index_columns,
    is_split,
    sync_directory,
    write_manifest,
)
from data_prep.passport import PASSPORT, Statistics
from data_prep.record import PrepError, Record, Rejection
from data_prep.sample_fields import CLIP_FIELDS, fields_of

REJECTED_NAME = "rejected.jsonl"
_BLOCK = tarfile.BLOCKSIZE
_HEADER = tarfile.TarInfo().tobuf(tarfile.USTAR_FORMAT)  # mtime, uid, gid 0 and mode 644: equal content, equal bytes


class ShardFolder:
    """Writes records into the shards of a folder, and names what is not written in its ``rejected.jsonl``."""

    def __init__(self, folder: Path, num_images: int = 1, samples_per_shard: int = 2000, videos: bool = False) -> None:
        """``num_images`` of a sample, or with ``videos`` a clip in each; the folder must be there."""
        self.folder = folder
        self.fields = CLIP_FIELDS if videos else fields_of(num_images)
        self.shards: list[Shard] = []
        self.rejected: Counter[str] = Counter()
        self.examples: dict[str, Rejection] = {}  # reason -> the first that was rejected for it
        self.rows = 0
        self.statistics = Statistics()
        self.suffixes: set[str] = set()  # of the members written, such as jpg
        self._num_images, self._videos, self._samples_per_shard = num_images, videos, samples_per_shard
        self._shard: _ShardWriter | None = None
        self._rejected_stream = open(folder / REJECTED_NAME, "w", encoding="utf-8")

    def add(self, record: Record) -> None:
        """Write a checked record (safe key, known extensions); raises PrepError for another number of images, and for
        a clip among images or images among clips."""
        is_video = record.video is not None
        if is_video != self._videos or len(record.images) != (0 if is_video else self._num_images):
            expected = "a clip" if self._videos else self._num_images
            found = "a clip" if is_video else f"{len(record.images)} image(s)"
            found += f", expected {expected} as in the rest of the split"
            raise PrepError(f"record {record.key} has {found}; prepare it as a corpus of its own")
        if self._shard is None:
            self._shard = _ShardWriter(self.folder, len(self.shards), self.fields)
        self.suffixes |= self._shard.add(record)
        self.rows += len(record.captions)
        self.statistics.add(record)
        if self._shard.samples == self._samples_per_shard:
            self._close_shard()

    def reject(self, rejection: Rejection, again: dict[str, Any] | None = None) -> None:
        """Count and name a record that is not written; ``again`` is what is needed to try it once more."""
        self.rejected[rejection.reason] += rejection.rows
        self.examples.setdefault(rejection.reason, rejection)
        self.statistics.reject(rejection)
        self._rejected_stream.write(rejected_line(rejection, again))

    def add_shard(self, shard: Shard, suffixes: Iterable[str], statistics: Statistics) -> None:
        """Take a shard whose files lie in the folder already; ``suffixes``: what follows the keys of its members,
        ``statistics``: what its samples count for."""
        self._close_shard()
        self.suffixes.update(suffixes)
        self.statistics.merge(statistics)
        self.shards.append(shard)
        self.rows += shard.rows

    def _close_shard(self) -> None:
        if self._shard is not None:
            self.shards.append(self._shard.close())
            self._shard = None

    def close(self) -> None:
        """Close the last shard; everything is on the disk then."""
        self._close_shard()
        _sync_and_close(self._rejected_stream)

    def abandon(self) -> None:
        """Close what is open, whatever comes of it."""
        with contextlib.suppress(OSError):  # a full disk takes what is still buffered neither
            self._rejected_stream.close()
        if self._shard is not None:
            self._shard.abandon()


def rejected_line(rejection: Rejection, again: dict[str, Any] | None = None) -> str:
    """A line of ``rejected.jsonl``."""
    line = {"reason": rejection.reason, "name": rejection.name, "rows": rejection.rows, "detail": rejection.detail}
    return json.dumps(line if again is None else {**line, "again": again}) + "\n"


class SplitWriter:
    """Context manager that writes a split into a hidden folder and renames it to ``split_dir`` when it is complete.

    An exception (Ctrl-C included) removes what was made, empty folders above it too, and leaves ``split_dir`` as it
    was. Raises PrepError when ``split_dir`` holds a finished split and ``overwrite`` is not given.
    """

    def __init__(
        self,
        split_dir: Path,
        corpus: str,
        split: str,
        num_images: int = 1,
        samples_per_shard: int = 2000,
        overwrite: bool = False,
        provenance: dict[str, Any] | None = None,
        texts: str = CAPTIONS,
        videos: bool = False,
        caption_key: str | None = None,
    ) -> None:
        """``num_images`` of a sample, or with ``videos`` a clip in each; ``caption_key`` is the manifest's."""
        self._split_dir = Path(split_dir)
        self._corpus, self._split = corpus, split
        self._kind = {"num_images": num_images, "samples_per_shard": samples_per_shard, "videos": videos}
        self._provenance, self._texts, self._caption_key = provenance or {}, texts, caption_key
        self.manifest: Manifest | None = None
        refuse_existing(self._split_dir, overwrite)
        self.folder = self._split_dir.parent / f".{self._split_dir.name}.{os.getpid()}.part"

    def __enter__(self) -> SplitWriter:
        self._new = [folder for folder in (self.folder, *self.folder.parents) if not folder.exists()]
        self.folder.mkdir(parents=True)
        try:
            self._written = ShardFolder(self.folder, **self._kind)
        except OSError:
            self._remove()
            raise
        return self

    @property
    def rejected(self) -> Counter[str]:
        return self._written.rejected

    @property
    def examples(self) -> dict[str, Rejection]:
        return self._written.examples

    @property
    def rows(self) -> int:
        return self._written.rows

    @property
    def statistics(self) -> Statistics:
        return self._written.statistics

    def add(self, record: Record) -> None:
        """Write a checked record; see ``ShardFolder.add``."""
        self._written.add(record)

    def add_shard(self, shard: Shard, suffixes: Iterable[str], statistics: Statistics) -> None:
        """Take a shard that lies in ``folder`` already; see ``ShardFolder.add_shard``."""
        self._written.add_shard(shard, suffixes, statistics)

    def reject(self, rejection: Rejection) -> None:
        """Count and name a record that is not written."""
        self._written.reject(rejection)

    def __exit__(self, error_type: type[BaseException] | None, error: object, trace: object) -> None:
        complete = False
        try:
            if error_type is None:
                self._finish()
                complete = True
        finally:
            if not complete:
                self._written.abandon()
                self._remove()

    def _remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        for above in self._new[1:]:
            with contextlib.suppress(OSError):  # others have begun to write there
                above.rmdir()

    def _finish(self) -> None:
        self._written.close()
        if not self._written.shards:
            raise nothing_usable(self._split_dir, self._written.rejected, self._written.examples)
        self.manifest = Manifest(
            corpus=self._corpus,
            split=self._split,
            fields=self._written.fields,
            shards=tuple(self._written.shards),
            rejected=dict(sorted(self._written.rejected.items())),
            provenance=self._provenance | what_was_written(self._written.statistics, self._written.suffixes),
            texts=self._texts,
            caption_key=self._caption_key,
        )
        write_manifest(self.folder, self.manifest)
        put_in_place(self.folder, self._split_dir)


def what_was_written(statistics: Statistics, suffixes: Iterable[str]) -> dict[str, Any]:
    """What the provenance of a split says of its content: its passport, and what follows the keys of its members."""
    return ({MEMBERS: sorted(suffixes)} if suffixes else {}) | {PASSPORT: statistics.as_json()}


def nothing_usable(split_dir: Path, rejected: dict[str, int], examples: dict[str, Rejection]) -> PrepError:
    """The error of a split without a record."""
    return PrepError(f"{split_dir}: no usable record ({describe_counts(rejected)}{such_as(examples)}); nothing written")


def such_as(examples: dict[str, Rejection]) -> str:
    """The first of some examples, to follow their counts in a message."""
    first = next(iter(examples.values()), None)
    return "" if first is None else f", such as {first.name}" + (f" ({first.detail})" if first.detail else "")


def refuse_existing(split_dir: Path, overwrite: bool) -> None:
    """Raises PrepError if ``split_dir`` holds a split, without ``overwrite``, or anything else, or lies in a file."""
    above = next((folder for folder in split_dir.absolute().parents if folder.exists()), split_dir)
    if not above.is_dir():
        raise PrepError(f"{above}: a file, expected a folder; give another --output")
    if is_split(split_dir) and not overwrite:
        raise PrepError(f"{split_dir}: already prepared; give --overwrite to replace it, or another --output")
    if split_dir.exists() and not is_split(split_dir) and (not split_dir.is_dir() or any(split_dir.iterdir())):
        raise PrepError(f"{split_dir}: holds something that is no finished split; move it away first")


def describe_counts(counts: dict[str, int]) -> str:
    """For example ``3 http_404, 1 empty_caption``, most frequent first."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count} {reason}" for reason, count in ordered) or "none rejected"


def put_in_place(folder: Path, split_dir: Path) -> None:
    """Give the complete split in ``folder`` its place, that of an older one too, and name it in the corpus card."""
    old = split_dir.parent / f".{split_dir.name}.{os.getpid()}.old"
    if split_dir.exists():
        os.rename(split_dir, old)
    os.rename(folder, split_dir)
    sync_directory(split_dir.parent)
    shutil.rmtree(old, ignore_errors=True)
    write_card(split_dir.parent)


class _ShardWriter:
    """Writes one tar and the index of its rows, and hashes the tar on the way."""

    def __init__(self, folder: Path, number: int, fields: tuple[str, ...]) -> None:
        self._folder, self._fields = folder, fields
        self._columns = index_columns(fields)
        self._file, self._index_file = f"{number:05d}.tar", f"{number:05d}.index.npy"
        self._stream = open(folder / self._file, "wb")
        self._hash = hashlib.sha256()
        self._position = 0
        self._rows: list[list[int]] = []
        self.samples = 0

    def add(self, record: Record) -> set[str]:
        """Write a sample; returns what follows the key in the names of its members."""
        captions = list(record.captions)
        content = {**record.meta, **record.per_caption, "captions": captions}
        meta = json.dumps(content, ensure_ascii=False, allow_nan=False).encode()
        members = {"text": ("txt", captions[0].encode()), "meta": ("json", meta)}
        if record.video is not None:
            members["video"] = record.extensions[0], record.video
        extensions = record.extensions if record.video is None else ()
        for number, (content, extension) in enumerate(zip(record.images, extensions, strict=True)):
            members[self._fields[number]] = (f"{number}.{extension}" if len(record.images) > 1 else extension, content)
        row = [-1] * self._columns.width
        for field in self._fields:
            extension, content = members[field]
            row[self._columns.offset[field]] = self._add_member(f"{record.key}.{extension}", content)
            row[self._columns.size[field]] = len(content)
        for caption_number in range(len(captions)):
            self._rows.append([*row[:-1], caption_number])
        self.samples += 1
        return {extension for extension, _ in members.values()}

    def _add_member(self, name: str, content: bytes) -> int:
        self._write(tar_header(name, len(content)))
        offset = self._position
        self._write(content)
        self._write(b"\0" * (-len(content) % _BLOCK))
        return offset

    def _write(self, content: bytes) -> None:
        self._stream.write(content)
        self._hash.update(content)
        self._position += len(content)

    def close(self) -> Shard:
        end = self._position + 2 * _BLOCK
        self._write(b"\0" * (2 * _BLOCK + -end % tarfile.RECORDSIZE))
        _sync_and_close(self._stream)
        buffer = io.BytesIO()
        np.save(buffer, np.asarray(self._rows, dtype=np.int64), allow_pickle=False)
        with open(self._folder / self._index_file, "wb") as stream:
            stream.write(buffer.getvalue())
            _sync_and_close(stream)
        return Shard(
            file=self._file,
            index_file=self._index_file,
            rows=len(self._rows),
            samples=self.samples,
            bytes=self._position,
            sha256=self._hash.hexdigest(),
            index_sha256=hashlib.sha256(buffer.getvalue()).hexdigest(),
        )

    def abandon(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.close()


def tar_header(name: str, size: int) -> bytes:
    """The header that tarfile makes of a member of these, for short names by the places that differ alone, which takes
    a tenth of the time. POSIX.1-1988, ustar."""
    encoded = name.encode("utf-8", "surrogateescape")
    if len(encoded) > tarfile.LENGTH_NAME or size >= 8**11:
        info = tarfile.TarInfo(name)
        info.size = size
        return info.tobuf(tarfile.USTAR_FORMAT)
    header = bytearray(_HEADER)
    header[: len(encoded)] = encoded
    header[124:135] = b"%011o" % size
    header[148:156] = b" " * 8  # the checksum is taken as if it were blank
    header[148:155] = b"%06o\0" % sum(header)
    return bytes(header)


def _sync_and_close(stream: Any) -> None:
    stream.flush()
    os.fsync(stream.fileno())
    stream.close()
