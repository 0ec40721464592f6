"""Hashes every image of a split, a shard at a time in worker processes."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_prep.filters import Limits
from data_prep.images import ImageProblem
from data_prep.manifest import Manifest, Shard, is_split, read_manifest
from data_prep.parallel import ordered_map
from data_prep.prepare import progress
from data_prep.record import PrepError
from data_prep.similar.hash_files import (
    FOLDER,
    About,
    HashSet,
    HashWriter,
    has_hashes,
    open_hashes,
    stale_reason,
    versions,
)
from data_prep.similar.near_hashes import in_order, strides
from data_prep.similar.pictures import INNER, PICTURE_BYTES, hashes_of, picture_of, tells_enough
from data_prep.similar.split_samples import image_fields, key_before, samples_of, spans_of

NUM_COMMONEST = 20
_NONE = np.uint64(0)  # the hash of what has none


class _Hashed(NamedTuple):
    """Of one shard, as ``HashWriter.add`` takes it."""

    hashes: np.ndarray
    inner: np.ndarray
    digests: np.ndarray
    keys: list[bytes]
    pictures: np.ndarray
    unreadable: int


def hashes_at(path: Path, workers: int, max_pixels: int = Limits.max_pixels, anew: bool = False) -> HashSet:
    """The hashes of the split at ``path``, made if they are not there or are stale (or ``anew``); or those in the
    folder of hashes ``path``. Raises PrepError or ManifestError."""
    if is_split(path):
        reason = "asked for" if anew else stale_reason(path)
        if reason is not None:
            _hash_split(path, workers, max_pixels)
        return open_hashes(path / FOLDER)
    if has_hashes(path):
        return open_hashes(path)
    raise PrepError(f"{path}: neither a prepared split nor a folder of hashes; name CORPUS/SPLIT, or one of --export")


def _hash_split(split_dir: Path, workers: int, max_pixels: int) -> None:
    manifest = read_manifest(split_dir)
    image_fields(split_dir, manifest)
    bare = replace(manifest, shards=())  # what travels with each shard
    hash_one = partial(_hash_shard, split_dir, bare, max_pixels)
    unreadable = 0
    with HashWriter(split_dir / FOLDER, manifest.samples, manifest.num_images) as writer:
        shards = ordered_map(hash_one, manifest.shards, workers, 1)
        for found in progress(shards, len(manifest.shards), f"hashing {manifest.corpus}", "shard"):
            arrays = found._asdict()
            unreadable += arrays.pop("unreadable")
            writer.add(**arrays)
        about = About(
            corpus=manifest.corpus,
            split=manifest.split,
            fingerprint=manifest.fingerprint(),
            samples=manifest.samples,
            num_images=manifest.num_images,
            without_hash=sum(int(np.count_nonzero(part == 0)) for part in strides(writer.hashes)),
            unreadable=unreadable,
            versions=versions(),
            commonest=_commonest(writer.digests, writer.keys, manifest.num_images),
        )
        writer.finish(about)


def _hash_shard(split_dir: Path, manifest: Manifest, max_pixels: int, shard: Shard) -> _Hashed:
    samples, fields = samples_of(split_dir, manifest, shard), image_fields(split_dir, manifest)
    count = len(samples.first_rows) * len(fields)
    pictures, digests = np.zeros((count, PICTURE_BYTES), np.uint8), np.zeros((count, 2), np.uint64)
    readable, absent, keys = np.zeros(count, bool), 0, []
    with open(split_dir / shard.file, "rb") as stream:
        for number, row in enumerate(samples.index[samples.first_rows]):
            found = [span for span in spans_of(row, manifest, manifest.fields) if span is not None]
            keys.append(key_before(stream, found[0][0], manifest, shard.file).encode("utf-8", "surrogateescape"))
            for image, span in enumerate(spans_of(row, manifest, fields)):
                place = number * len(fields) + image
                if span is None:
                    absent += 1
                    continue
                stream.seek(span[0])
                content = stream.read(span[1])
                digests[place] = digest_of(content)
                try:
                    pictures[place] = picture_of(content, max_pixels)
                    readable[place] = True
                except ImageProblem:
                    continue
    hashes, inner = np.where(
        readable & tells_enough(pictures), [hashes_of(pictures), hashes_of(pictures, INNER)], _NONE
    )
    return _Hashed(hashes, inner, digests, keys, pictures, count - absent - int(readable.sum()))


def digest_of(content: bytes) -> np.ndarray:
    """BLAKE2b of 16 bytes, as uint64 [2]."""
    return np.frombuffer(hashlib.blake2b(content, digest_size=16).digest(), "<u8")


def _commonest(digests: np.ndarray, keys: np.ndarray, num_images: int) -> list[tuple[str, int, str]]:
    """Digest, count and a key of the encoded images that come most often, those that come once left out."""
    counts: Counter[int] = Counter()
    for part in in_order(digests[:, 0]):
        values, found = np.unique(part, return_counts=True)
        most = np.argsort(-found, kind="stable")[:NUM_COMMONEST]
        counts.update({int(values[one]): int(found[one]) for one in most if found[one] > 1 and values[one] != 0})
    result = []
    wanted = dict(counts.most_common(NUM_COMMONEST))
    places = {value: _first_place(digests[:, 0], value) for value in wanted}
    for value, count in wanted.items():
        digest = np.asarray(digests[places[value]]).astype("<u8").tobytes().hex()
        result.append((digest, count, keys[places[value] // num_images].decode("utf-8", "surrogateescape")))
    return result


def _first_place(values: np.ndarray, wanted: int) -> int:
    start = 0
    for part in strides(values):
        if len(found := np.flatnonzero(part == np.uint64(wanted))):
            return start + int(found[0])
        start += len(part)
    raise AssertionError("the value came from there")
