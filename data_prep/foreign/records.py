"""Reads the samples of a foreign shard as records, for the filters."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from data_prep.foreign.choosing import Choice, ForeignSample, choose
from data_prep.foreign.tar_samples import TarContent, read_tar
from data_prep.record import Record, Rejection
from data_prep.shard_members import foreign_key

NUMBER = "number"


class Found(NamedTuple):
    """A sample as a record, and where its members lie. ``record.per_caption[NUMBER]`` counts all captions of the
    sample from 0."""

    record: Record
    sample: ForeignSample


def read_shard(
    path: Path, name: str, content: TarContent, split: str, choice: Choice, max_image_bytes: int
) -> Iterator[Found | Rejection]:
    """Every sample of a tar that is called ``name`` in ``split``; what can't be a record is a rejection."""
    yield from content.problems
    with open(path, "rb") as stream:
        for members in content.samples:
            sample = choose(members, choice, stream, name)
            if isinstance(sample, Rejection):
                yield sample
                continue
            where = f"{name}: {sample.key}"
            numbers = [number for number, caption in enumerate(sample.captions) if isinstance(caption, str)]
            if others := len(sample.captions) - len(numbers):
                yield Rejection("malformed_row", where, "captions that are no texts", rows=others)
            if not numbers:
                continue
            if large := next((image for image in sample.images if image.size > max_image_bytes), None):
                yield Rejection("image_bytes_too_large", where, f"{large.size} bytes", rows=len(numbers))
                continue
            images = []
            for image in sample.images:
                stream.seek(image.offset)
                images.append(stream.read(image.size))
            captions = tuple(sample.captions[number] for number in numbers)
            key = foreign_key(split, name, sample.key)
            yield Found(Record(key, tuple(images), captions, sample.content, per_caption={NUMBER: numbers}), sample)


def copied_records(
    shards: dict[str, Path], split: str, choice: Choice, max_image_bytes: int
) -> Iterator[Record | Rejection]:
    """The records of all shards, to be written anew."""
    for name, path in shards.items():
        for found in read_shard(path, name, read_tar(path, name), split, choice, max_image_bytes):
            yield found if isinstance(found, Rejection) else replace(found.record, per_caption={})
