"""Counts again from its files what a split holds, as ``passport`` counted it while it was written."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from data_prep.manifest import Manifest, Shard, index_columns, open_index
from data_prep.parallel import ordered_map
from data_prep.passport import Statistics
from data_prep.prepare import progress
from data_prep.record import Record, Rejection
from data_prep.shard_members import in_own_form, row_text
from data_prep.shard_writer import REJECTED_NAME
from data_prep.video.containers import container_of

_IMAGES = {b"\xff\xd8": "jpg", b"\x89PNG": "png", b"RIFF": "webp"}


def measure_split(split_dir: Path, manifest: Manifest, workers: int) -> Statistics:
    """The statistics of a split that ``verify`` finds sound; raises ManifestError, OSError, ValueError."""
    total = Statistics()
    measure = partial(measure_shard, split_dir, replace(manifest, shards=()))
    shards = progress(ordered_map(measure, manifest.shards, workers, 1), len(manifest.shards), "counting", "shard")
    for statistics in shards:
        total.merge(statistics)
    for rejection in read_rejected(split_dir):
        total.reject(rejection)
    return total


def measure_shard(split_dir: Path, manifest: Manifest, shard: Shard) -> Statistics:
    """The statistics of the samples that the index of ``shard`` names, each once with all captions it has there."""
    statistics = Statistics()
    for record in read_records(split_dir, manifest, shard):
        statistics.add(record)
    return statistics


def read_records(
    split_dir: Path, manifest: Manifest, shard: Shard, wanted: Collection[int] | None = None
) -> Iterator[Record]:
    """The samples of a shard as they were written, or those whose numbers are ``wanted``; their keys are not read."""
    columns = index_columns(manifest.fields)
    captions: dict[tuple[int, ...], list[int]] = {}
    for row in open_index(split_dir, manifest, shard).tolist():
        captions.setdefault(tuple(row[: columns.caption]), []).append(row[columns.caption])
    with open(split_dir / shard.file, "rb") as stream:
        for sample, (places, numbers) in enumerate(captions.items()):
            if wanted is not None and sample not in wanted:
                continue
            contents: dict[str, bytes] = {}
            for name in manifest.fields:
                if places[columns.offset[name]] >= 0:
                    stream.seek(places[columns.offset[name]])
                    contents[name] = stream.read(places[columns.size[name]])
            yield _record(contents, numbers, manifest.caption_key)


def _record(contents: dict[str, bytes], numbers: list[int], caption_key: str | None) -> Record:
    text = contents["text"].decode() if "text" in contents else None
    meta: dict[str, Any] = in_own_form(json.loads(contents.get("meta", b"{}")), text, caption_key) or {}
    images = tuple(content for name, content in contents.items() if name.startswith("image"))
    pictures = images if "video" not in contents else (contents["video"],)
    return Record(
        key="",
        images=images,
        captions=tuple(row_text(text, meta, number) for number in numbers),
        meta=meta,
        extensions=tuple(_extension(content) for content in pictures),
        video=contents.get("video"),
    )


def _extension(content: bytes) -> str:
    """How the writer calls the format of these bytes, "" for one that it never writes."""
    clip = container_of(content)
    if clip is not None:
        return clip[1]
    return next((name for magic, name in _IMAGES.items() if content.startswith(magic)), "")


def read_rejected(split_dir: Path) -> Iterator[Rejection]:
    """The lines of ``rejected.jsonl``, none where it is missing; raises ValueError for what is no line of it."""
    path = split_dir / REJECTED_NAME
    if not path.is_file():
        return
    with open(path, encoding="utf-8") as stream:
        for number, line in enumerate(stream, 1):
            try:
                entry = json.loads(line)
                yield Rejection(entry["reason"], entry["name"], entry.get("detail", ""), entry["rows"])
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise ValueError(f"{path}: line {number} is no rejected record ({error})") from error
