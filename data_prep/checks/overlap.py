"""Finds images of training splits that stand in held-out splits, of the same corpus or of another."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.manifest import ManifestError, index_columns, open_index, read_manifest

TRAIN = "train"
_FLICKR8K_FILE = re.compile(r"(\d+)_[0-9a-f]{10}\.jpg")


class Overlap(NamedTuple):
    """A line for each pair of splits that was compared, and how many images training splits share with others."""

    lines: list[str]
    shared: int


class SplitImages(NamedTuple):
    """The images of a split by identity, such as "coco/9"; ``unknown`` samples say nothing of theirs."""

    identities: set[str]
    unknown: int


def compare_splits(split_dirs: Sequence[Path]) -> Overlap:
    """Compare each split called train with each of another name; raises ManifestError for unreadable ones."""
    images = {split_dir: images_of(split_dir) for split_dir in dict.fromkeys(split_dirs)}
    lines, total = [], 0
    for split_dir, found in images.items():
        if found.unknown:
            lines.append(
                f"{split_dir}: {found.unknown} samples do not say which image they hold; they are not compared"
            )
    for train, held_out in itertools.product(images, repeat=2):
        if train.name != TRAIN or held_out.name == TRAIN:
            continue
        shared = images[train].identities & images[held_out].identities
        if shared:
            total += len(shared)
            lines.append(f"{train} and {held_out}: {len(shared)} images in both, such as {min(shared)}")
    if not total:
        lines.append(f"no image of a training split stands in a held-out one ({len(images)} splits compared)")
    return Overlap(lines, total)


def images_of(split_dir: Path) -> SplitImages:
    """Which images a prepared split holds, by its KEY.json; raises ManifestError."""
    identities: set[str] = set()
    unknown = 0
    for meta in _metas(split_dir):
        found = _identities(meta)
        identities.update(found)
        unknown += not found
    return SplitImages(identities, unknown)


def _identities(meta: dict[str, Any]) -> list[str]:
    """The identities of a sample's images; those of corpora without such a list by file name or address."""
    if isinstance(given := meta.get("image_identities"), list):
        return [str(one) for one in given]
    if match := _FLICKR8K_FILE.fullmatch(str(meta.get("file"))):  # Flickr30k names the same photographs by the number
        return [f"flickr/{match[1]}"]
    return [f"url/{meta['url']}"] if isinstance(meta.get("url"), str) else []


def _metas(split_dir: Path) -> Iterator[dict[str, Any]]:
    manifest = read_manifest(split_dir)
    columns = index_columns(manifest.fields)
    for shard in manifest.shards:
        index = open_index(split_dir, manifest, shard)
        places = dict.fromkeys(map(tuple, index[:, [columns.offset["meta"], columns.size["meta"]]].tolist()))
        with open(split_dir / shard.file, "rb") as stream:
            for offset, size in places:
                try:
                    stream.seek(offset)
                    meta = json.loads(stream.read(size))
                    assert isinstance(meta, dict)
                except (ValueError, AssertionError, RecursionError) as error:
                    raise ManifestError(
                        f"{split_dir / shard.file}: no metadata at byte {offset}; `python -m data_prep verify` says "
                        "what is damaged"
                    ) from error
                yield meta
