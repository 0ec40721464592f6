"""Copies a split without some of its samples: the members of those that stay as they are, at the speed of the disk."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import tarfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np

from data_prep.checks.measure import measure_shard
from data_prep.corpus_card import MEMBERS
from data_prep.manifest import Manifest, ManifestError, Shard, index_columns, write_manifest
from data_prep.parallel import ordered_map
from data_prep.passport import Statistics
from data_prep.prepare import progress
from data_prep.record import PrepError, Rejection
from data_prep.shard_writer import REJECTED_NAME, put_in_place, refuse_existing, rejected_line, what_was_written
from data_prep.similar.split_samples import ShardSamples, samples_of

_BLOCK, _RECORD = tarfile.BLOCKSIZE, tarfile.RECORDSIZE
_READ_BYTES = 1 << 22


def copy_split(
    source: Path,
    manifest: Manifest,
    target: Path,
    leave_out: dict[int, Rejection],
    provenance: dict[str, Any],
    workers: int = 1,
    overwrite: bool = False,
) -> Manifest:
    """Write to ``target`` the split ``source`` without the samples ``leave_out`` (their number -> why; its ``rows`` are
    counted here). A shard becomes a shard; one of which nothing stays is left out.

    The folder is put in place when it is complete. Raises PrepError where nothing stays or ``target`` is not free, and
    ManifestError for a shard that is not what its manifest says.
    """
    refuse_existing(target, overwrite)
    folder = target.parent / f".{target.name}.{os.getpid()}.part"
    folder.mkdir(parents=True)
    try:
        shards, rejected, statistics = _copy_shards(source, manifest, folder, leave_out, workers)
        if not shards:
            raise PrepError(f"{target}: no sample of {source} stays; nothing written")
        content = provenance | what_was_written(statistics, manifest.provenance.get(MEMBERS, ()))
        copied = replace(manifest, shards=tuple(shards), rejected=dict(sorted(rejected.items())), provenance=content)
        write_manifest(folder, copied)
        put_in_place(folder, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return copied


def _copy_shards(
    source: Path, manifest: Manifest, folder: Path, leave_out: dict[int, Rejection], workers: int
) -> tuple[list[Shard], Counter[str], Statistics]:
    copy_one = partial(_copy_shard, source, replace(manifest, shards=()), folder)
    copied = ordered_map(copy_one, _jobs(manifest.shards, leave_out), workers, 1)
    shards, rejected, first, statistics = [], Counter(), 0, Statistics()
    with open(folder / REJECTED_NAME, "w", encoding="utf-8") as stream:
        bar = progress(copied, len(manifest.shards), f"copying {manifest.corpus}", "shard")
        for (shard, num_rows, counted), old in zip(bar, manifest.shards):
            for sample, rows in num_rows.items():
                why = replace(leave_out[first + sample], rows=rows)
                rejected[why.reason] += rows
                statistics.reject(why)
                stream.write(rejected_line(why))
            if shard is not None:
                shards.append(shard)
                statistics.merge(counted)
            first += old.samples
        stream.flush()
        os.fsync(stream.fileno())
    return shards, rejected, statistics


def _jobs(shards: Iterable[Shard], leave_out: dict[int, Rejection]) -> Iterable[tuple[Shard, int, list[int]]]:
    """Each shard, the number it has, and which of its samples go."""
    numbers, first = np.array(sorted(leave_out), np.int64), 0
    for place, shard in enumerate(shards):
        begin, end = np.searchsorted(numbers, [first, first + shard.samples])
        yield shard, place, (numbers[begin:end] - first).tolist()
        first += shard.samples


def _copy_shard(
    source: Path, manifest: Manifest, folder: Path, job: tuple[Shard, int, list[int]]
) -> tuple[Shard | None, dict[int, int], Statistics]:
    """The shard that was written, None if nothing stays, the rows of each sample that went, what of it is counted."""
    shard, place, gone = job
    samples = samples_of(source, manifest, shard)
    lost = {sample: int(samples.num_rows[sample]) for sample in gone}
    if len(gone) == len(samples.first_rows):
        return None, lost, Statistics()
    file, index_file = f"{place:05d}.tar", f"{place:05d}.index.npy"
    begins, ends = _sample_spans(source / shard.file, samples, manifest)
    stays = np.ones(len(begins), bool)
    stays[gone] = False
    moved, digest, written = np.zeros(len(begins), np.int64), hashlib.sha256(), 0
    with open(source / shard.file, "rb") as old, open(folder / file, "wb") as new:
        for first, last in _runs(stays, begins, ends):
            moved[first:last] = written - begins[first]
            written += _copy_bytes(old, new, int(begins[first]), int(ends[last - 1]), digest)
        end = b"\0" * (2 * _BLOCK + -(written + 2 * _BLOCK) % _RECORD)
        new.write(end)
        digest.update(end)
        new.flush()
        os.fsync(new.fileno())
    index = _moved_index(samples, manifest, stays, moved)
    buffer = io.BytesIO()
    np.save(buffer, index, allow_pickle=False)
    with open(folder / index_file, "wb") as stream:
        stream.write(buffer.getvalue())
        stream.flush()
        os.fsync(stream.fileno())
    copied = Shard(
        file=file,
        index_file=index_file,
        rows=len(index),
        samples=int(stays.sum()),
        bytes=written + len(end),
        sha256=digest.hexdigest(),
        index_sha256=hashlib.sha256(buffer.getvalue()).hexdigest(),
    )
    return copied, lost, measure_shard(folder, manifest, copied)


def _sample_spans(path: Path, samples: ShardSamples, manifest: Manifest) -> tuple[np.ndarray, np.ndarray]:
    """Begin and end of each sample's members in the tar, int64 [samples]; raises ManifestError where samples mix."""
    columns, rows = index_columns(manifest.fields), samples.index[samples.first_rows]
    offsets = rows[:, [columns.offset[name] for name in manifest.fields]]
    sizes = rows[:, [columns.size[name] for name in manifest.fields]]
    begins = np.where(offsets >= 0, offsets, np.iinfo(np.int64).max).min(axis=1) - _BLOCK
    ends = np.where(offsets >= 0, offsets + sizes + -sizes % _BLOCK, 0).max(axis=1)
    if len(begins) and not (begins[0] == 0 and np.array_equal(begins[1:], ends[:-1])):  # other members between them
        begins, ends = _spans_by_key(path, begins)
    if np.any(begins[1:] < ends[:-1]):
        raise ManifestError(f"{path}: members of its samples are mixed; prepare the split again")
    return begins, ends


def _spans_by_key(path: Path, within: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """As the tar itself says: the successive members with the key of the member that begins at ``within``."""
    begins, ends, keys = [], [], []
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            key = member.name.rpartition("/")[2].partition(".")[0]
            end = member.offset_data + member.size + -member.size % _BLOCK
            if keys and keys[-1] == key:
                ends[-1] = end
            else:
                begins.append(member.offset)
                ends.append(end)
                keys.append(key)
    places = np.searchsorted(begins, within, side="right") - 1
    if len(np.unique(places)) != len(within):
        raise ManifestError(f"{path}: samples with the same key follow each other; prepare the split again")
    return np.array(begins, np.int64)[places], np.array(ends, np.int64)[places]


def _runs(stays: np.ndarray, begins: np.ndarray, ends: np.ndarray) -> Iterable[tuple[int, int]]:
    """First and end of the longest stretches of samples that stay and follow each other in the tar."""
    numbers = np.flatnonzero(stays)
    cuts = np.flatnonzero((np.diff(numbers) > 1) | (begins[numbers[1:]] != ends[numbers[:-1]])) + 1
    for part in np.split(numbers, cuts):
        yield int(part[0]), int(part[-1]) + 1


def _copy_bytes(old: IO[bytes], new: IO[bytes], begin: int, end: int, digest: Any) -> int:
    old.seek(begin)
    left = end - begin
    while left:
        content = old.read(min(left, _READ_BYTES))
        if not content:
            raise ManifestError(
                f"{old.name}: ends before byte {end}; `python -m data_prep verify` says what is damaged"
            )
        new.write(content)
        digest.update(content)
        left -= len(content)
    return end - begin


def _moved_index(samples: ShardSamples, manifest: Manifest, stays: np.ndarray, moved: np.ndarray) -> np.ndarray:
    """The index of the samples that stay, their offsets moved by ``moved`` bytes."""
    sample_of_row = np.repeat(np.arange(len(stays)), samples.num_rows)
    index = samples.index.copy()
    for column in index_columns(manifest.fields).offset.values():
        index[:, column] += np.where(index[:, column] >= 0, moved[sample_of_row], 0)
    return index[stays[sample_of_row]]


def target_of(root: Path, manifest: Manifest, taken: Sequence[Path] = ()) -> Path:
    """ROOT/CORPUS/SPLIT, where the copy of a split goes; raises PrepError if it is ``taken`` by another."""
    target = root / manifest.corpus / manifest.split
    if target in taken:
        raise PrepError(f"{target}: two of the splits are {manifest.corpus}/{manifest.split}; give them one at a time")
    return target
