"""Makes a split of foreign shards where they lie: hard links to the tars, and an index of what of them is kept."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from data_prep.filters import Limits, check_record
from data_prep.foreign.choosing import Choice
from data_prep.foreign.records import NUMBER, Found, read_shard
from data_prep.foreign.tar_samples import Member, read_tar
from data_prep.manifest import Manifest, Shard, file_sha256, index_columns, write_atomically
from data_prep.parallel import ordered_map
from data_prep.passport import Statistics
from data_prep.prepare import progress
from data_prep.record import PrepError, Record, Rejection
from data_prep.sample_fields import fields_of
from data_prep.shard_members import HEADER_BYTES, field_of, header_name, key_and_suffix
from data_prep.shard_writer import SplitWriter


class IndexedShard(NamedTuple):
    """What of a tar is kept: its index, int64 [rows, 2*F+1], of so many samples, which are counted; what is not.
    ``suffixes`` of all members, kept or not."""

    name: str
    index: np.ndarray
    samples: int
    num_bytes: int
    sha256: str
    suffixes: set[str]
    statistics: Statistics
    rejections: list[Rejection]


def link_split(
    writer: SplitWriter, shards: dict[str, Path], split: str, choice: Choice, limits: Limits, workers: int
) -> Manifest:
    """Fill the split of ``writer`` with links to ``shards``, whose images are all decoded and judged.

    Raises PrepError where a tar can't be linked, or not be read by its index.
    """
    with writer:
        for name, path in shards.items():
            _link(path, writer.folder / name)
        index = partial(index_shard, writer.folder, split=split, choice=choice, limits=limits)
        for found in progress(ordered_map(index, shards, workers, 1), len(shards), split, "shard"):
            for rejection in found.rejections:
                writer.reject(rejection)
            if found.samples:
                writer.add_shard(_with_index(writer.folder, found), found.suffixes, found.statistics)
            else:
                (writer.folder / found.name).unlink()
    assert writer.manifest is not None
    return writer.manifest


def _link(path: Path, link: Path) -> None:
    try:
        os.link(path.resolve(), link)
    except OSError as error:
        raise PrepError(
            f"{path}: can't be linked into {link.parent.parent} ({error.strerror}); give an --output on the file "
            "system of the shards, or --copy to write them anew"
        ) from error


def _with_index(folder: Path, found: IndexedShard) -> Shard:
    stream = io.BytesIO()
    np.save(stream, found.index, allow_pickle=False)
    index_file = f"{Path(found.name).stem}.index.npy"
    write_atomically(folder / index_file, stream.getvalue())
    index_sha256 = hashlib.sha256(stream.getvalue()).hexdigest()
    return Shard(found.name, index_file, len(found.index), found.samples, found.num_bytes, found.sha256, index_sha256)


def index_shard(folder: Path, name: str, split: str, choice: Choice, limits: Limits) -> IndexedShard:
    """Judge every sample of the tar ``folder / name``; raises PrepError where it can't be read by an index."""
    path, fields = folder / name, fields_of(choice.num_images)
    rows, statistics, rejections, content = [], Statistics(), [], read_tar(path, name)
    with open(path, "rb") as stream:
        for found in read_shard(path, name, content, split, choice, limits.max_image_bytes):
            if isinstance(found, Rejection):
                rejections.append(found)
                continue
            kept = _kept(found, limits, rejections)
            if kept is not None:
                places = [*found.sample.images, found.sample.text, found.sample.meta]
                _check_headers(stream, name, dict(zip(fields, places, strict=True)))
                rows += [_row(places, number) for number in kept.per_caption[NUMBER]]
                statistics.add(kept)
    index = np.asarray(rows, dtype=np.int64).reshape(-1, index_columns(fields).width)
    members = (member for sample in content.samples for member in sample.members.values())
    suffixes = {member.name.rpartition("/")[2].partition(".")[2] for member in members}
    return IndexedShard(
        name, index, statistics.samples, path.stat().st_size, file_sha256(path), suffixes, statistics, rejections
    )


def _kept(found: Found, limits: Limits, rejections: list[Rejection]) -> Record | None:
    """The record with the captions that the filters keep, if they keep the images as they are."""
    kept, problems = check_record(found.record, limits)
    rejections += problems
    if kept is None:
        return None
    if any(after is not before for after, before in zip(kept.images, found.record.images, strict=True)):
        rejections.append(Rejection("needs_conversion", kept.key, rows=len(kept.captions)))
        return None
    return kept


def _row(places: Sequence[Member | None], number: int) -> list[int]:
    return [cell for member in places for cell in ((-1, -1) if member is None else member[1:])] + [number]


def _check_headers(stream: BinaryIO, shard: str, places: dict[str, Member | None]) -> None:
    """Raise PrepError unless the header right before each member says what it is, which is what readers check."""
    keys = set()
    for field, member in places.items():
        if member is None:
            continue
        stream.seek(member.offset - HEADER_BYTES)
        try:
            name = header_name(stream.read(HEADER_BYTES), member.size)
        except ValueError:
            name = ""
        found = key_and_suffix(name)
        keys.add(found and found[0])
        if None in keys or len(keys) > 1 or field_of(name) != field.rstrip("0123456789"):
            raise PrepError(
                f"{shard}: {member.name!r} has a name that is longer than a tar header holds, or a header older than "
                "POSIX's; give --copy to write its shards anew"
            )
