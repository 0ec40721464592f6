"""Reads single rows of a prepared split by index: byte ranges of tar shards, no scan, no state but open files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_prep.manifest import (
    Manifest,
    ManifestError,
    find_manifests,
    first_bad_file,
    index_columns,
    open_index,
    read_manifest,
)
from data_prep.shard_members import (
    HEADER_BYTES,
    field_of,
    foreign_key,
    header_name,
    in_own_form,
    key_and_suffix,
    row_text,
)
from data_prep.stores.address import Address, data_path
from data_prep.stores.read_ahead import ReadAhead
from data_prep.stores.split_files import fetch_indexes
from pipeline.data.open_shards import OF_THIS_PROCESS, OpenShard, OpenShards, ShardError
from pipeline.data.remote_shards import RemoteShard
from pipeline.data.shard_copies import ShardCopies
from pipeline.data.shard_files import ShardFiles, open_shard
from pipeline.data.transforms import UnusableSample

MAX_MEMBER_BYTES = 256 * 2**20


class RawSample(NamedTuple):
    """One row as stored: encoded images, or an encoded clip in ``video``, and one text, the ``number``-th of those that
    they share."""

    key: str
    images: list[bytes]
    text: str
    meta: dict[str, Any]
    number: int = 0
    video: bytes | None = None

    @property
    def num_frames(self) -> int | None:
        """Frames of the clip as preparing counted them; None where its metadata do not say so."""
        found = self.meta.get("num_frames")
        return found if type(found) is int and found > 0 else None

    @property
    def num_texts(self) -> int:
        """How many texts the images have; 1 where the metadata do not list them."""
        texts = self.meta.get("captions")
        return len(texts) if isinstance(texts, list) else 1

    def with_text(self, number: int) -> RawSample:
        """The row of another text of the same images; raises UnusableSample as reading that row does."""
        return self._replace(text=_caption(self.text, self.meta, number, self.key), number=number)


class Corpus:
    """Rows 0..len-1 of one split. Opening checks the split, or with a ``manifest`` asks for no file; shards are
    opened on first use and ``kept`` among all of the process. A pickled or forked copy opens its own files.

    Raises ManifestError when the split is missing, incomplete or altered. A single bad row raises
    UnusableSample with one of these reasons: "index does not fit shard", "wrong member", "not a regular file",
    "bad key", "member too large", "missing image", "missing video", "missing caption", "empty caption",
    "invalid UTF-8", "invalid metadata"; or one of ``open_shards.SHARD_REASONS`` with the key "CORPUS/SPLIT/SHARD#ROW".
    A split of which nothing can be read any more raises LostCorpus, a machine that cannot open another file
    OutOfDescriptors.
    """

    def __init__(
        self, split_dir: Path | Address, manifest: Manifest | None = None, kept: OpenShards = OF_THIS_PROCESS
    ) -> None:
        self.split_dir = data_path(split_dir)
        self.manifest = read_manifest(self.split_dir) if manifest is None else manifest
        self.name, self.num_images = self.manifest.corpus, self.manifest.num_images
        self.is_video = self.manifest.is_video
        self._image_fields = tuple(f for f in self.manifest.fields if f.startswith(("image", "video")))
        self._columns = index_columns(self.manifest.fields)
        self._ends = np.cumsum(self.manifest.shards.rows)  # int64 [shards], the row after the last of each
        self._files = ShardFiles(self.split_dir, self.manifest, kept)
        self._copies: ShardCopies | None = None
        self._ahead = ReadAhead() if isinstance(self.split_dir, Address) else None
        if not len(self):
            raise ManifestError(f"{self.split_dir}: no samples in it; prepare it again or leave it out")

    @property
    def fingerprint(self) -> str:
        """Changes when the samples or their order change."""
        return self.manifest.fingerprint()

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def read(self, index: int) -> RawSample:
        """Row ``index`` with images or clip; raises UnusableSample, LostCorpus, and IndexError outside the split."""
        return self._read(index, self._image_fields)

    def read_text(self, index: int) -> str:
        """The caption of row ``index``; raises as ``read`` does."""
        return self.read_without_images(index).text

    def read_without_images(self, index: int) -> RawSample:
        """Row ``index`` without its images or clip; raises as ``read`` does."""
        return self._read(index, ())

    def first_rows(self) -> np.ndarray:
        """Rows int64 [samples], one for each image (or pair): that of its first text. Raises ManifestError."""
        found, start = [], 0
        if self._ahead is not None:
            width = self._columns.width
            shards = self.manifest.shards
            fetch_indexes((self.split_dir / one.index_file, (one.rows, width), one.index_sha256) for one in shards)
        for shard in self.manifest.shards:
            offsets = open_index(self.split_dir, self.manifest, shard)[:, 0]  # rows of a sample follow each other
            found.append(start + np.flatnonzero(np.diff(offsets, prepend=-1)))
            start += shard.rows
        return np.concatenate(found)

    def place(self, index: int) -> tuple[int, int, str]:
        """Shard number, row in the shard, and a name for reports until the sample's key is known."""
        if not 0 <= index < len(self):
            raise IndexError(f"{self.split_dir}: row {index} of {len(self)}")
        number = int(np.searchsorted(self._ends, index, side="right"))
        shard = self.manifest.shards[number]
        row = index - (int(self._ends[number]) - shard.rows)
        return number, row, f"{self.name}/{self.manifest.split}/{shard.file}#{row}"

    def read_ahead(self, indices: Sequence[int]) -> None:
        """Begin to fetch rows that are ``read`` next, in this order, where waiting for each would take long."""
        if self._ahead is not None:
            places = [(index, *self.place(index)[:2]) for index in dict.fromkeys(indices)]
            mine = [one for one in places if self._copies is None or self._copies.get(one[1]) is None]
            self._ahead.expect((index, partial(self._fetched, number, row)) for index, number, row in mine)

    def read_copies_in(self, folder: Path, kept: OpenShards = OF_THIS_PROCESS) -> None:
        """From now on read a shard from its copy in ``folder`` whenever there is one; the samples are the same."""
        self._copies = ShardCopies(folder, self.manifest, kept)

    def close(self) -> None:
        """Close every open shard; the next read opens what it needs."""
        self._files.close()
        if self._copies is not None:
            self._copies.close()
        if self._ahead is not None:
            self._ahead.close()

    def __del__(self) -> None:
        if "_ahead" in self.__dict__:
            self.close()

    def _read(self, index: int, image_fields: tuple[str, ...]) -> RawSample:
        number, row, name = self.place(index)
        sample = None if self._copies is None else self._of_copy(number, row, name, image_fields)
        if sample is not None:
            return sample
        for is_last in (False, True):  # a stale handle of a network file system: open it again
            try:
                shard = self._files.get(number)
            except ShardError as error:
                raise UnusableSample(name, error.reason) from None
            try:
                if self._ahead is None:
                    sample = self._sample(shard, number, row, name, image_fields)
                else:
                    sample = self._remote_sample(shard, index, number, row, name, image_fields)
            except ShardError as error:
                self._files.forget(number)
                if is_last or not error.transient:
                    self._files.note_failure(number, error)
                    raise UnusableSample(name, error.reason) from None
            except OSError as error:
                self._files.make_room(error, is_last)
            except UnusableSample:
                self._files.note_success()
                raise
            else:
                self._files.note_success()
                return sample
        raise AssertionError

    def _fetched(self, number: int, row: int) -> RemoteShard:
        """A shard that holds the members of a row; it is closed, and runs in a thread of its own."""
        shard = open_shard(self.split_dir, self.manifest.fields, self.manifest.shards[number])
        try:
            self._hold(shard, number, row, self._image_fields)
        finally:
            shard.close()
        return shard

    def _remote_sample(
        self, shard: RemoteShard, index: int, number: int, row: int, name: str, image_fields: tuple[str, ...]
    ) -> RawSample:
        """As ``_sample``, in one request, or none where the row was fetched ahead."""
        fetched = self._ahead.take(index) if image_fields else None
        if fetched is None:
            self._hold(shard, number, row, image_fields)
        else:
            shard.take_over(fetched)
        try:
            return self._sample(shard, number, row, name, image_fields)
        finally:
            shard.release()

    def _hold(self, shard: RemoteShard, number: int, row: int, image_fields: tuple[str, ...]) -> None:
        fields = (*image_fields, "text", "meta")
        shard.hold(shard.row(row), self._columns, fields, int(self.manifest.shards.bytes[number]))

    def _of_copy(self, number: int, row: int, name: str, image_fields: tuple[str, ...]) -> RawSample | None:
        """The row from the copy of its shard; None where only the original can say what the row holds."""
        shard = self._copies.get(number)
        if shard is None:
            return None
        try:
            sample = self._sample(shard, number, row, name, image_fields)
        except ShardError:
            self._copies.distrust(number)
            return None
        except (UnusableSample, OSError):  # of the machine, which is exhausted
            return None
        self._files.note_success()
        return sample

    def _sample(
        self, shard: OpenShard, number: int, row_number: int, name: str, image_fields: tuple[str, ...]
    ) -> RawSample:
        row = shard.row(row_number)
        shard_bytes = int(self.manifest.shards.bytes[number])
        key, images, caption_key = name, [], self.manifest.caption_key
        file = None if caption_key is None else self.manifest.shards[number].file
        for field in image_fields:
            data, key = self._member(shard, row, field, name, key, shard_bytes, file)
            if data is None:
                raise UnusableSample(key, "missing video" if field == "video" else "missing image")
            images.append(data)
        data, key = self._member(shard, row, "meta", name, key, shard_bytes, file)
        meta = _as_object(data, key)
        text = None
        if "captions" not in meta or file is not None:
            data, key = self._member(shard, row, "text", name, key, shard_bytes, file)
            text = None if data is None else _as_text(data, key)
        meta = in_own_form(meta, text, caption_key)
        number = int(row[self._columns.caption])
        found = RawSample(key, images, _caption(text, meta, number, key), meta, number)
        return found._replace(images=[], video=images[0]) if images and self.is_video else found

    def _member(
        self, shard: OpenShard, row: np.ndarray, field: str, name: str, key: str, shard_bytes: int, file: str | None
    ) -> tuple[bytes | None, str]:
        """(content, key) of a field after checking its tar header; content is None where the row lacks the field.

        ``key`` is ``name`` until the first header is read; from then on all members must share that header's key.
        ``file`` is the shard's if another program wrote it: its names may hold folders.
        """
        column = self._columns.offset.get(field)
        offset = -1 if column is None else int(row[column])
        if offset == -1:
            return None, key
        size = int(row[self._columns.size[field]])
        if size > MAX_MEMBER_BYTES:
            raise UnusableSample(key, "member too large")
        if offset < HEADER_BYTES or offset % HEADER_BYTES or size < 0 or offset + size > shard_bytes:
            raise UnusableSample(key, "index does not fit shard")
        data = shard.read(offset - HEADER_BYTES, size + HEADER_BYTES)
        try:
            member = header_name(data[:HEADER_BYTES], size)
        except ValueError as error:
            raise UnusableSample(key, str(error)) from None
        found = _own_key(member, key) if file is None else _foreign_key(member, key, self.manifest.split, file)
        if key not in (name, found) or field_of(member) != field.rstrip("0123456789"):
            raise UnusableSample(key, "wrong member")
        return data[HEADER_BYTES:], found


def open_corpora(paths: Sequence[str | Path], split: str, num_images: int = 1, videos: bool = False) -> list[Corpus]:
    """Every corpus of ``split`` under ``paths``, in the order given; raises ManifestError, also for one given twice.

    For a program of one process; ranks open by ``loading/shared_opening.py``.
    """
    found = [one for path in paths for one in find_manifests(data_path(path), split, num_images, videos=videos)]
    refuse_twice([folder for folder, _ in found])
    for folder, manifest in found:
        bad = first_bad_file(folder, manifest.shards, range(len(manifest.shards)))
        if bad is not None:
            raise ManifestError(bad[1])
    return [Corpus(folder, manifest) for folder, manifest in found]


def refuse_twice(split_dirs: Sequence[Path]) -> None:
    """Raise ManifestError for a folder that is named twice, through links also."""
    resolved = [folder.resolve() for folder in split_dirs]
    twice = next((one for number, one in enumerate(resolved) if one in resolved[:number]), None)
    if twice is not None:
        raise ManifestError(f"{twice}: given twice; name each corpus once and use a weight (DIR:WEIGHT) to repeat it")


def _caption(text: str | None, meta: dict[str, Any], number: int, key: str) -> str:
    try:
        caption = row_text(text, meta, number)
    except ValueError:
        raise UnusableSample(key, "missing caption") from None
    if not caption or caption.isspace():
        raise UnusableSample(key, "empty caption")
    try:
        caption.encode("utf-8")
    except UnicodeEncodeError:  # a lone surrogate, which JSON can spell out
        raise UnusableSample(key, "invalid UTF-8") from None
    return caption


def _own_key(member: str, name: str) -> str:
    key = member.split(".")[0]
    if not key or "/" in member or "\\" in member or not key.isprintable():
        raise UnusableSample(name, "bad key")
    return key


def _foreign_key(member: str, name: str, split: str, file: str) -> str:
    found = key_and_suffix(member)
    if found is None:
        raise UnusableSample(name, "bad key")
    return foreign_key(split, file, found[0])


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
