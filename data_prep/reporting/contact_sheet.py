"""Small pictures of samples of a split, drawn at random from a seed, with what their files say of them."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from data_prep.checks.measure import read_records
from data_prep.images import ImageProblem
from data_prep.manifest import Manifest, Shard
from data_prep.parallel import ordered_map
from data_prep.prepare import progress
from data_prep.record import Record
from data_prep.thumbnails import thumbnail
from data_prep.video.decoding import read_frames

_MAX_PIXELS = 50_000_000


@dataclass(frozen=True)
class Picture:
    """A sample to show: JPEG data URIs of its images (a clip's first frame), "" for one that can't be decoded."""

    images: tuple[str, ...]
    captions: tuple[str, ...]
    about: str


class Repeated(NamedTuple):
    """An image that stands in ``count`` samples."""

    count: int
    picture: Picture


def contact_sheet(split_dir: Path, manifest: Manifest, number: int, seed: int) -> list[Picture]:
    """At most ``number`` samples, the same for the same split and seed, in the order of the split."""
    samples = manifest.shards.samples
    chosen = sorted(random.Random(seed).sample(range(manifest.samples), min(number, manifest.samples)))
    first = np.concatenate([[0], np.cumsum(samples)])
    wanted: dict[int, set[int]] = {}
    for sample in chosen:
        shard = int(np.searchsorted(first, sample, side="right")) - 1
        wanted.setdefault(shard, set()).add(sample - int(first[shard]))
    sheet = []
    for shard, places in wanted.items():
        sheet += map(picture, read_records(split_dir, manifest, manifest.shards[shard], places))
    return sheet


def picture(record: Record) -> Picture:
    """What the page shows of a sample."""
    size = f"{record.meta['num_frames']} frames" if "num_frames" in record.meta else ""
    facts = [size, str(record.meta.get("url") or record.meta.get("file") or "")]
    images = record.images if record.video is None else (_first_frame(record.video),)
    return Picture(tuple(map(thumbnail, images)), record.captions, ", ".join(filter(None, facts)))


def _first_frame(video: bytes) -> Image.Image | None:
    try:
        return read_frames(video, 1, lambda _: [0], _MAX_PIXELS)[0]
    except ImageProblem:
        return None


def repeated_images(split_dir: Path, manifest: Manifest, workers: int, number: int) -> list[Repeated]:
    """The ``number`` images whose bytes stand in most samples: often a site's picture for what it has lost. Reads the
    whole split; 8 bytes of memory an image."""
    hashes = partial(_image_hashes, split_dir, replace(manifest, shards=()))
    shards = progress(ordered_map(hashes, manifest.shards, workers, 1), len(manifest.shards), "hashing", "shard")
    by_shard = list(shards)
    values, counts = np.unique(np.concatenate([np.empty(0, np.uint64), *by_shard]), return_counts=True)
    most = sorted(np.flatnonzero(counts > 1).tolist(), key=lambda place: (-counts[place], values[place]))[:number]
    found = []
    for place in most:
        shard = next(shard for shard, own in enumerate(by_shard) if values[place] in own)
        records = read_records(split_dir, manifest, manifest.shards[shard])
        same = (one for one in records for image in one.images if _digest(image) == values[place])
        found.append(Repeated(int(counts[place]), picture(next(same))))
    return found


def _image_hashes(split_dir: Path, manifest: Manifest, shard: Shard) -> np.ndarray:
    """64 bits of BLAKE2 of each image, uint64 [images]."""
    records = read_records(split_dir, manifest, shard)
    return np.array([_digest(image) for record in records for image in record.images], np.uint64)


def _digest(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest())
