"""Reads single rows of a prepared split by index: byte ranges of tar shards, no scan, no state but open files."""

from __future__ import annotations

import bisect
import json
import os
import tarfile
from collections import OrderedDict
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_prep.manifest import (
    Manifest,
    ManifestError,
    Shard,
    find_splits,
    index_columns,
    open_index,
    read_manifest,
    row_text,
)
from pipeline.transforms import UnusableSample

MAX_OPEN_SHARDS = 64  # per corpus and process; a shard holds two descriptors
MAX_MEMBER_BYTES = 256 * 2**20
_HEADER_BYTES = tarfile.BLOCKSIZE


class RawSample(NamedTuple):
    """One row as stored: encoded images and its caption."""

    key: str
    images: list[bytes]
    text: str
    meta: dict[str, Any]


class _OpenShard(NamedTuple):
    tar: int  # descriptor
    tar_bytes: int
    index: np.ndarray  # int64 [rows, 2F+1], memory-mapped


class Corpus:
    """Rows 0..len-1 of one split. Opening reads the manifest only; shards are opened on first touch, at most
    ``max_open`` at a time. Copies by pickling or forking read on their own.

    Raises ManifestError when the split is missing, incomplete or altered. What is wrong with a single row is
    UnusableSample with one of these reasons: "missing shard", "unreadable shard", "truncated shard", "index does not
    fit shard", "not a regular file", "bad key", "member too large", "missing image", "missing caption",
    "empty caption", "invalid UTF-8", "invalid metadata".
    """

    def __init__(self, split_dir: Path, max_open: int = MAX_OPEN_SHARDS) -> None:
        self.split_dir = Path(split_dir)
        self.manifest: Manifest = read_manifest(self.split_dir)
        self.name, self.num_images = self.manifest.corpus, self.manifest.num_images
        self._fields = tuple(f for f in self.manifest.fields if f.startswith("image"))
        self._columns = index_columns(self.manifest.fields)
        self._ends = list(accumulate(shard.rows for shard in self.manifest.shards))
        self._max_open = max_open
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()
        if not len(self):
            raise ManifestError(f"{self.split_dir}: no samples in it; prepare it again or leave it out")

    @property
    def fingerprint(self) -> str:
        """Changes when the samples or their order change."""
        return self.manifest.fingerprint()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def read(self, index: int) -> RawSample:
        """Row ``index`` with its images; raises UnusableSample, IndexError outside the split."""
        shard, row, name = self._locate(index)
        images, key = [], name
        for field in self._fields:
            data, key = self._member(shard, row, field, key, verified=True)
            if data is None:
                raise UnusableSample(key, "missing image")
            images.append(data)
        text, meta = self._caption(shard, row, key)
        return RawSample(key, images, text, meta)

    def read_text(self, index: int) -> str:
        """The caption of row ``index``; raises as ``read`` does."""
        shard, row, name = self._locate(index)
        return self._caption(shard, row, name)[0]

    def close(self) -> None:
        """Close every open shard; the next read opens what it needs."""
        while self._open:
            os.close(self._open.popitem()[1].tar)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}

    def __del__(self) -> None:
        if "_open" in self.__dict__:
            self.close()

    def _locate(self, index: int) -> tuple[_OpenShard, np.ndarray, str]:
        """Open shard, index row, and a name for reports until the sample's key is known."""
        if not 0 <= index < len(self):
            raise IndexError(f"{self.split_dir}: row {index} of {len(self)}")
        number = bisect.bisect_right(self._ends, index)
        shard = self.manifest.shards[number]
        within = index - (self._ends[number] - shard.rows)
        name = f"{self.name}/{self.manifest.split}/{shard.file}#{within}"
        opened = self._open_shard(number, shard, name)
        return opened, opened.index[within], name

    def _open_shard(self, number: int, shard: Shard, name: str) -> _OpenShard:
        opened = self._open.get(number)
        if opened is not None:
            self._open.move_to_end(number)
            return opened
        path = self.split_dir / shard.file
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise UnusableSample(name, "missing shard") from None
        except OSError as error:
            raise UnusableSample(name, "unreadable shard") from error
        try:
            opened = _OpenShard(
                descriptor, os.fstat(descriptor).st_size, open_index(self.split_dir, self.manifest, shard)
            )
        except BaseException:
            os.close(descriptor)
            raise
        self._open[number] = opened
        if len(self._open) > self._max_open:
            os.close(self._open.popitem(last=False)[1].tar)
        return opened

    def _caption(self, shard: _OpenShard, row: np.ndarray, key: str) -> tuple[str, dict[str, Any]]:
        meta = _as_object(self._member(shard, row, "meta", key)[0], key)
        text = None
        if "captions" not in meta:
            data = self._member(shard, row, "text", key)[0]
            text = None if data is None else _as_text(data, key)
        try:
            caption = row_text(text, meta, int(row[self._columns.caption]))
        except ValueError:
            raise UnusableSample(key, "missing caption") from None
        if not caption or caption.isspace():
            raise UnusableSample(key, "empty caption")
        try:
            caption.encode("utf-8")
        except UnicodeEncodeError:  # a lone surrogate, which JSON can spell out
            raise UnusableSample(key, "invalid UTF-8") from None
        return caption, meta

    def _member(
        self, shard: _OpenShard, row: np.ndarray, field: str, key: str, verified: bool = False
    ) -> tuple[bytes | None, str]:
        """(content, key) of a field; None where the row lacks it; the key is read from the header if ``verified``."""
        column = self._columns.offset.get(field)
        offset = -1 if column is None else int(row[column])
        if offset == -1:
            return None, key
        size = int(row[self._columns.size[field]])
        if offset < _HEADER_BYTES or offset % _HEADER_BYTES or size < 0:
            raise UnusableSample(key, "index does not fit shard")
        if size > MAX_MEMBER_BYTES:
            raise UnusableSample(key, "member too large")
        if offset + size > shard.tar_bytes:
            raise UnusableSample(key, "truncated shard")
        if not verified:
            return _read_range(shard.tar, offset, size, key), key
        data = _read_range(shard.tar, offset - _HEADER_BYTES, size + _HEADER_BYTES, key)
        return data[_HEADER_BYTES:], _verified_key(data[:_HEADER_BYTES], size, key)


def open_corpora(paths: list[str | Path], split: str, num_images: int = 1) -> list[Corpus]:
    """Every corpus of ``split`` under ``paths``, in the order given; raises ManifestError, also for one given twice."""
    corpora: list[Corpus] = []
    for path in paths:
        for split_dir in find_splits(Path(path), split, num_images):
            if any(corpus.split_dir.resolve() == split_dir.resolve() for corpus in corpora):
                raise ManifestError(f"{split_dir}: given twice; name each corpus once and use a weight to repeat it")
            corpora.append(Corpus(split_dir))
    return corpora


def _read_range(descriptor: int, offset: int, size: int, name: str) -> bytes:
    try:
        data = os.pread(descriptor, size, offset)
        while 0 < len(data) < size:  # a signal or a network file system may cut a read short
            more = os.pread(descriptor, size - len(data), offset + len(data))
            if not more:
                break
            data += more
    except OSError as error:
        raise UnusableSample(name, "unreadable shard") from error
    if len(data) < size:
        raise UnusableSample(name, "truncated shard")
    return data


def _verified_key(header: bytes, size: int, name: str) -> str:
    """The sample's key from the tar header before its image, which must be a plain file of the indexed size.

    POSIX ustar: name 0-99, size 124-135, checksum 148-155, type 156, magic 257-261, directory prefix 345-499.
    """
    try:
        member = header[:100].rstrip(b"\0").decode("utf-8")
        found_size, checksum = (int(header[a:b].strip(b" \0") or b"0", 8) for a, b in ((124, 136), (148, 156)))
    except ValueError:  # UnicodeDecodeError is one
        raise UnusableSample(name, "index does not fit shard") from None
    if header[257:262] != b"ustar" or sum(header) - sum(header[148:156]) + 8 * ord(" ") != checksum:
        raise UnusableSample(name, "index does not fit shard")
    if header[156:157] not in (tarfile.REGTYPE, tarfile.AREGTYPE):
        raise UnusableSample(name, "not a regular file")
    if found_size != size:
        raise UnusableSample(name, "index does not fit shard")
    key = member.split(".")[0]
    if not key or "/" in member or "\\" in member or header[345:346] != b"\0" or not key.isprintable():
        raise UnusableSample(name, "bad key")
    return key


def _as_text(data: bytes, key: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise UnusableSample(key, "invalid UTF-8") from None


def _as_object(data: bytes | None, key: str) -> dict[str, Any]:
    if data is None:
        return {}
    try:
        meta = json.loads(_as_text(data, key))
    except (json.JSONDecodeError, RecursionError):
        raise UnusableSample(key, "invalid metadata") from None
    if not isinstance(meta, dict):
        raise UnusableSample(key, "invalid metadata")
    return meta
