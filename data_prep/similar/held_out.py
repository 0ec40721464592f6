"""Finds images of a split that are copies or near-duplicates of held-out images."""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_prep.similar.hash_files import HashSet
from data_prep.similar.near_hashes import pairs_between, strides, write_distinct
from data_prep.similar.pictures import INNER, MIN_CORRELATION, PLAIN, Look, correlations, hashes_of, looks, same_colours

DISTANCE = 8  # bits of 64
_HELD_OUT_AT_A_TIME = 50_000  # images, each looked at in up to 40 ways
_COMPARED_AT_A_TIME = 2048  # pairs of pictures


class Match(NamedTuple):
    """Image ``row`` of the split is image ``other_row`` of the held-out set number ``other``, or nearly."""

    row: int
    other: int
    other_row: int
    exact: bool  # the same bytes
    distance: int  # bits
    correlation: float
    look: Look | None = None  # at the held-out picture, or at the split's where that is the larger

    def detail(self, others: Sequence[HashSet]) -> str:
        """For `rejected.jsonl` and lists: which held-out image, and how near."""
        name = f"{others[self.other].name} {others[self.other].key(self.other_row)}"
        if self.exact:
            return f"the bytes of {name}"
        mirrored = ", mirrored" if self.look is not None and self.look.mirrored else ""
        return f"like {name}: distance {self.distance}, correlation {self.correlation:.2f}{mirrored}"


class _Searched(NamedTuple):
    """Hashes of the split's images under ``look``, and the file of them sorted, without repeats."""

    hashes: np.ndarray
    distinct: Path
    look: Look


def held_out_matches(
    split: HashSet,
    others: Sequence[HashSet],
    distance: int = DISTANCE,
    crops: bool = True,
    mirrored: bool = False,
    workers: int = 1,
    scratch: Path | None = None,
) -> list[Match]:
    """The best match of each image of ``split`` that has any, in the order of its rows.

    Memory holds the hashes of 50,000 held-out images and the matches; sorted hashes of the split lie in a temporary
    folder below ``scratch``.
    """
    best: dict[int, Match] = {}
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        searches = [(_Searched(split.hashes, Path(folder) / "split.npy", PLAIN), looks(crops, mirrored))]
        if crops:
            searches.append((_Searched(split.inner, Path(folder) / "inner.npy", INNER), looks(False, mirrored)))
        for searched, _ in searches:
            write_distinct(searched.hashes, searched.distinct)
        for number, other in enumerate(others):
            for match in _same_bytes(split, other, number):
                best.setdefault(match.row, match)
            for start in range(0, len(other.hashes), _HELD_OUT_AT_A_TIME):
                held_rows = np.arange(start, min(start + _HELD_OUT_AT_A_TIME, len(other.hashes)))
                held_rows = held_rows[np.asarray(other.hashes[held_rows]) != 0]
                for searched, views in searches:
                    for match in _near(split, searched, other, number, held_rows, views, distance, workers):
                        known = best.get(match.row)
                        if known is None or (not known.exact and match.correlation > known.correlation):
                            best[match.row] = match
    return [best[row] for row in sorted(best)]


def _same_bytes(split: HashSet, other: HashSet, number: int) -> Iterator[Match]:
    held = {(int(one), int(two)): row for row, (one, two) in reversed(list(enumerate(np.array(other.digests))))}
    firsts, start = np.unique(np.array(other.digests[:, 0])), 0
    for part in strides(split.digests):
        for place in np.flatnonzero(np.isin(part[:, 0], firsts) & part.any(axis=1)):
            other_row = held.get((int(part[place, 0]), int(part[place, 1])))
            if other_row is not None:
                yield Match(start + int(place), number, other_row, True, 0, 1.0)
        start += len(part)


def _near(
    split: HashSet,
    searched: _Searched,
    other: HashSet,
    number: int,
    held_rows: np.ndarray,
    views: list[Look],
    distance: int,
    workers: int,
) -> Iterator[Match]:
    """Matches of near hashes whose pictures agree."""
    pictures = np.asarray(other.pictures[held_rows])
    seen = np.stack([hashes_of(pictures, look) for look in views], axis=1)  # [held out, looks]
    held_file = searched.distinct.with_name("held.npy")
    np.save(held_file, np.unique(seen))
    near = pairs_between(searched.distinct, held_file, distance, workers)
    pairs = np.concatenate([np.zeros((0, 2), np.uint64), *near])
    rows_of = rows_with(searched.hashes, np.unique(pairs[:, 0]))
    order = np.argsort(seen, axis=None, kind="stable")
    ordered = seen.ravel()[order]
    begins, ends = np.searchsorted(ordered, pairs[:, 1]), np.searchsorted(ordered, pairs[:, 1], side="right")
    by_look: dict[int, list[tuple[int, int, int]]] = defaultdict(list)
    for (value, held), begin, end in zip(pairs.tolist(), begins.tolist(), ends.tolist()):
        for place in order[begin:end].tolist():
            row_number, look = divmod(place, len(views))
            by_look[look] += [(row, row_number, (value ^ held).bit_count()) for row in rows_of[value]]
    for look, found in sorted(by_look.items()):
        at_held_out = searched.look == PLAIN
        view = views[look] if at_held_out else searched.look._replace(mirrored=views[look].mirrored)
        for start in range(0, len(found), _COMPARED_AT_A_TIME):
            part = found[start : start + _COMPARED_AT_A_TIME]
            rows, numbers = [row for row, _, _ in part], [one for _, one, _ in part]
            sides = pictures[numbers], split.pictures[rows]
            alike = agreement(*(sides if at_held_out else sides[::-1]), view)
            for (row, one, bits), value in zip(part, alike.tolist()):
                if value >= MIN_CORRELATION:
                    yield Match(row, number, int(held_rows[one]), False, bits, value, view)


def agreement(one: np.ndarray, other: np.ndarray, look: Look) -> np.ndarray:
    """Correlations, float64 [N], of pictures uint8 [N, 1152], ``one`` under ``look``; 0 where colours differ."""
    return np.where(same_colours(one, other, look), correlations(one, other, look), 0.0)


def rows_with(hashes: np.ndarray, wanted: np.ndarray) -> dict[int, list[int]]:
    """Where each of the sorted values ``wanted`` stands in ``hashes``, uint64."""
    rows, start = defaultdict(list), 0
    for part in strides(hashes):
        for place in np.flatnonzero(np.isin(part, wanted)).tolist():
            rows[int(part[place])].append(start + place)
        start += len(part)
    return rows
