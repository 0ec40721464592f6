"""Finds samples of splits whose images stand in an earlier sample, as the same bytes or as near-duplicates."""

from __future__ import annotations

import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_prep.similar.hash_files import HashSet
from data_prep.similar.held_out import agreement, rows_with
from data_prep.similar.near_hashes import pairs_between, pairs_within, strides, write_distinct
from data_prep.similar.pictures import MIN_CORRELATION, PLAIN, Look, hashes_of

DISTANCE = 6  # bits of 64
_MIRRORED = Look(mirrored=True)

Row = tuple[int, int]  # number of the set, image row in it


class Repeat(NamedTuple):
    """Sample ``sample`` of set ``number`` goes for ``reason``; ``like`` names the image that stays."""

    number: int
    sample: int
    reason: str
    detail: str
    row: int
    like: Row | None = None


def repeated_samples(
    sets: Sequence[HashSet],
    distance: int = DISTANCE,
    mirrored: bool = False,
    max_repeats: int | None = None,
    perceptual: bool = True,
    workers: int = 1,
    scratch: Path | None = None,
) -> list[Repeat]:
    """The samples to leave out, in the order of sets and samples.

    Of alike samples the one of the earliest set stays, in it the one of the least key. A sample goes if each of its
    images is like one of a sample that stays; so a chain of images, each like the next, keeps every second one. With
    ``max_repeats`` all samples go that have an image whose bytes come more often: a picture that servers send for
    missing ones is none that its caption describes.
    """
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        near = _near_values(sets, Path(folder), distance, mirrored, workers) if perceptual else {}
        again = write_distinct(_column(sets, Path(folder), "digests"), Path(folder) / "digests.npy")
    placeholders = _placeholders(sets, again, max_repeats)
    views = (PLAIN, _MIRRORED) if mirrored else (PLAIN,)
    involved: dict[Row, tuple[int, tuple[int, int]]] = {}  # (hash, digest) of each image that may have a like one
    values = np.array(sorted(near), np.uint64)
    for number, found in enumerate(sets):
        start = 0
        for hashes, digests in zip(strides(found.hashes), strides(found.digests)):
            for place in np.flatnonzero(np.isin(hashes, values) | np.isin(digests[:, 0], again)).tolist():
                digest = (int(digests[place, 0]), int(digests[place, 1]))
                if digest != (0, 0):
                    involved[number, start + place] = (int(hashes[place]), digest)
            start += len(hashes)
    return sorted(_leave_out(sets, involved, near, placeholders, views), key=lambda one: (one.number, one.sample))


def _leave_out(
    sets: Sequence[HashSet],
    involved: dict[Row, tuple[int, tuple[int, int]]],
    near: dict[int, set[int]],
    placeholders: Counter[tuple[int, int]],
    views: tuple[Look, ...],
) -> Iterator[Repeat]:
    samples: dict[tuple[int, int], list[int]] = defaultdict(list)
    for number, row in involved:
        samples[number, row // sets[number].about.num_images].append(row)
    kept_bytes: dict[tuple[int, int], Row] = {}
    kept_hashes: dict[int, list[Row]] = defaultdict(list)
    for number, sample in sorted(samples, key=lambda one: (one[0], bytes(sets[one[0]].keys[one[1]]), one[1])):
        rows, num_images = sorted(samples[number, sample]), sets[number].about.num_images
        if any(involved[number, row][1] in placeholders for row in rows):
            row = next(row for row in rows if involved[number, row][1] in placeholders)
            yield Repeat(number, sample, "repeated_image", f"{placeholders[involved[number, row][1]]} times", row)
            continue
        likes = [
            _like(sets, (number, row), involved[number, row], near, kept_bytes, kept_hashes, views) for row in rows
        ]
        if len(rows) == num_images and all(likes):
            exact = all(same for _, same in likes)
            other, row = likes[0][0]
            reason = "duplicate_image" if exact else "near_duplicate_image"
            detail = f"{'the bytes of' if exact else 'like'} {sets[other].name} {sets[other].key(row)}"
            yield Repeat(number, sample, reason, detail, rows[0], likes[0][0])
            continue
        for row in rows:
            value, digest = involved[number, row]
            kept_bytes.setdefault(digest, (number, row))
            if value:
                kept_hashes[value].append((number, row))


def _like(
    sets: Sequence[HashSet],
    row: Row,
    identity: tuple[int, tuple[int, int]],
    near: dict[int, set[int]],
    kept_bytes: dict[tuple[int, int], Row],
    kept_hashes: dict[int, list[Row]],
    views: tuple[Look, ...],
) -> tuple[Row, bool] | None:
    """The first image that stays and is like this one, and whether it has the same bytes; None if there is none."""
    value, digest = identity
    if digest in kept_bytes:
        return kept_bytes[digest], True
    candidates = sorted(other for one in near.get(value, ()) for other in kept_hashes.get(one, ()))
    if not candidates:
        return None
    mine = np.asarray(sets[row[0]].pictures[row[1]])[None].repeat(len(candidates), axis=0)
    others = np.stack([sets[number].pictures[other] for number, other in candidates])
    alike = np.max([agreement(mine, others, look) for look in views], axis=0)
    good = np.flatnonzero(alike >= MIN_CORRELATION)
    return (candidates[good[0]], False) if len(good) else None


def _near_values(
    sets: Sequence[HashSet], folder: Path, distance: int, mirrored: bool, workers: int
) -> dict[int, set[int]]:
    """Hashes that are near each other or come more than once: each with those that it may be like, itself too."""
    distinct, near = folder / "distinct.npy", defaultdict(set)
    for value in write_distinct(_column(sets, folder, "hashes"), distinct).tolist():
        near[value].add(value)
    pairs = list(pairs_within(distinct, distance, workers))
    if mirrored:
        turned = folder / "mirrored.npy"
        write_distinct(_column(sets, folder, "mirrored"), turned)
        flipped = np.concatenate([np.zeros((0, 2), np.uint64), *pairs_between(distinct, turned, distance, workers)])
        backs = _rows_of_mirrored(sets, np.unique(flipped[:, 1]))
        pairs.append(np.array([(one, back) for one, other in flipped.tolist() for back in backs[other]], np.uint64))
    for one, other in (pair for part in pairs for pair in part.reshape(-1, 2).tolist()):
        for value in (one, other):
            near[value] |= {one, other}
    return near


def _rows_of_mirrored(sets: Sequence[HashSet], wanted: np.ndarray) -> dict[int, set[int]]:
    """The hashes of images whose mirrored pictures have these hashes."""
    found = defaultdict(set)
    for one in sets:
        for value, rows in rows_with(_Mirrored(one), wanted).items():
            found[value] |= {int(one.hashes[row]) for row in rows}
    return found


class _Mirrored:
    """The hashes of mirrored pictures as ``strides`` reads an array; 0 where the image has no hash."""

    def __init__(self, found: HashSet) -> None:
        self._found = found

    def __len__(self) -> int:
        return len(self._found.hashes)

    def __getitem__(self, rows: slice) -> np.ndarray:
        hashes = hashes_of(np.asarray(self._found.pictures[rows]), _MIRRORED)
        return np.where(np.asarray(self._found.hashes[rows]) != 0, hashes, np.uint64(0))


def _column(sets: Sequence[HashSet], folder: Path, name: str) -> np.ndarray:
    """One value of every image of all sets, uint64, in a file of ``folder``."""
    path = folder / f"{name}.values"
    with open(path, "wb") as stream:
        for found in sets:
            values = {"hashes": found.hashes, "digests": found.digests[:, 0], "mirrored": _Mirrored(found)}[name]
            for part in strides(values):
                part.astype("<u8").tofile(stream)
    return np.memmap(path, "<u8", "r") if path.stat().st_size else np.zeros(0, np.uint64)


def _placeholders(sets: Sequence[HashSet], again: np.ndarray, max_repeats: int | None) -> Counter[tuple[int, int]]:
    """Digests that come more than ``max_repeats`` times, with their counts."""
    counts: Counter[tuple[int, int]] = Counter()
    if max_repeats is not None:
        for found in sets:
            for part in strides(found.digests):
                digests = part[np.isin(part[:, 0], again) & part.any(axis=1)]
                counts.update(map(tuple, digests.tolist()))
    return Counter({digest: count for digest, count in counts.items() if count > (max_repeats or 0)})
