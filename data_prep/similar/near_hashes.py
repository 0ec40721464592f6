"""Finds exactly all pairs of 64-bit hashes within a distance, in memory that does not grow with their number.

The 64 bits are cut into blocks. Two hashes that differ in at most d bits agree in at least k of d + k blocks, so
sorting by each choice of k blocks brings every such pair together (Manku, Jain, Das Sarma, "Detecting Near-Duplicates
for Web Crawling", 2007, section 3). A pair that agrees in more blocks is taken at the first choice alone. Where there
are more hashes than ``at_a_time``, a choice is worked off in parts: the hashes whose chosen blocks fall into one part.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from data_prep.parallel import ordered_map

BITS = 64
AT_A_TIME = 4_000_000  # hashes sorted in memory by each worker; 32 MB
_STRIDE = 250_000  # values read at a time
_PROBES = 1 << 16  # pairs are compared for so many hashes at a time, as the cache holds them
_WITHIN_SPARED, _BETWEEN_SPARED = 7, 3  # bits, by trial at 10 million hashes
_MOST_CHOSEN = 4  # blocks; more are more sortings than they spare comparisons
_MIX = np.uint64(0x9E3779B97F4A7C15)  # spreads the values of blocks evenly over parts; Knuth, 6.4


class _Table(NamedTuple):
    """One choice of blocks: how to bring their bits to the top, and back."""

    moves: tuple[tuple[int, int, int], ...]  # (first bit, width, first bit after the move), bits counted from the low
    chosen_bits: int
    earlier: tuple[int, ...]  # masks of moved blocks: a pair that agrees in one of them came with an earlier choice


def pairs_within(hashes: Path, distance: int, workers: int = 1, at_a_time: int = AT_A_TIME) -> Iterator[np.ndarray]:
    """Pairs of the hashes in the file ``hashes`` (.npy, uint64 [N], distinct) that differ in at most ``distance`` bits,
    as arrays uint64 [P, 2] with the lesser hash first; every pair once, in an order that no worker changes."""
    tables = list(_tables(distance, _bits_for(len(_opened(hashes)), _WITHIN_SPARED)))
    yield from ordered_map(partial(_within, hashes, distance, at_a_time), tables, workers, 1)


def pairs_between(
    one: Path, other: Path, distance: int, workers: int = 1, at_a_time: int = AT_A_TIME
) -> Iterator[np.ndarray]:
    """Pairs of a hash of the file ``one`` and a hash of ``other`` (.npy, uint64 [N] and [M], each without repeats) that
    differ in at most ``distance`` bits, as arrays uint64 [P, 2]; every pair once."""
    fewer, more = sorted((one, other), key=lambda path: len(_opened(path)))
    tables = list(_tables(distance, _bits_for(len(_opened(fewer)), _BETWEEN_SPARED)))
    for pairs in ordered_map(partial(_between, fewer, more, distance, at_a_time), tables, workers, 1):
        yield pairs if fewer is one else pairs[:, ::-1]


def in_order(values: np.ndarray, at_a_time: int = AT_A_TIME) -> Iterator[np.ndarray]:
    """``values`` (uint64 [N]) in ascending order, in sorted arrays that share no value.

    An array holds at most ``at_a_time`` of them, or more if that many agree in their 16 highest bits.
    """
    counts = np.zeros(1 << 16, np.int64)
    for part in strides(values):
        counts += np.bincount((part >> np.uint64(48)).astype(np.int64), minlength=1 << 16)
    ends, begin = np.cumsum(counts), 0
    while begin < len(counts):
        before = int(ends[begin - 1]) if begin else 0
        end = max(begin + 1, int(np.searchsorted(ends, before + at_a_time, side="right")))
        if counts[begin:end].any():
            tops = ((part, part >> np.uint64(48)) for part in strides(values))
            yield np.sort(np.concatenate([part[(top >= begin) & (top < end)] for part, top in tops]))
        begin = end


def write_distinct(values: np.ndarray, path: Path, at_a_time: int = AT_A_TIME) -> np.ndarray:
    """Write ``values`` sorted and without repeats and without 0 to ``path`` (.npy, uint64); gives those that come more
    than once, uint64."""
    repeated, count = [np.zeros(0, np.uint64)], 0
    with open(path, "wb") as stream:
        _write_header(stream, count)
        for part in in_order(values, at_a_time):
            part = part[part != 0]
            again = part[1:] == part[:-1]
            repeated.append(np.unique(part[1:][again]))
            distinct = part[np.concatenate([np.ones(min(1, len(part)), bool), ~again])]
            distinct.tofile(stream)
            count += len(distinct)
        stream.seek(0)
        _write_header(stream, count)
    return np.concatenate(repeated)


def _write_header(stream: IO[bytes], count: int) -> None:
    """The header of a .npy file of so many uint64; NumPy pads it so that the count may grow."""
    header = {"descr": "<u8", "fortran_order": False, "shape": (count,)}
    np.lib.format.write_array_header_1_0(stream, header)


def _within(path: Path, distance: int, at_a_time: int, table: _Table) -> np.ndarray:
    hashes, found = _opened(path), [np.zeros((0, 2), np.uint64)]
    for part in _parts(hashes, table, 1 + len(hashes) // at_a_time):
        part.sort()
        found += [_moved_back(pairs, table) for pairs in _near_neighbours(part, table, distance)]
    return np.sort(np.concatenate(found), axis=1)


def _between(fewer: Path, more: Path, distance: int, at_a_time: int, table: _Table) -> np.ndarray:
    probes, hashes, found = _opened(fewer), _opened(more), [np.zeros((0, 2), np.uint64)]
    parts = 1 + len(hashes) // at_a_time
    for some, moved in zip(_parts(probes, table, parts), _parts(hashes, table, parts)):
        moved.sort()
        found += [_moved_back(pairs, table) for pairs in _near_in(some, moved, table, distance)]
    return np.concatenate(found)


def _opened(path: Path) -> np.ndarray:
    """The array of a .npy file, mapped from disk; an empty one can't be mapped."""
    return np.load(path, mmap_mode="r" if path.stat().st_size > np.lib.format.ARRAY_ALIGN * 2 else None)


def strides(values: np.ndarray) -> Iterator[np.ndarray]:
    """``values`` 250,000 at a time, read into memory."""
    for start in range(0, len(values), _STRIDE):
        yield np.array(values[start : start + _STRIDE])


def _bits_for(count: int, spared: int) -> float:
    """So many bits must be chosen that few hashes agree in them by chance; ``spared`` weighs that against sorting."""
    return np.log2(max(count, 2)) - spared


def _tables(distance: int, least_bits: float) -> Iterator[_Table]:
    """The choices of the fewest blocks that have ``least_bits`` together."""
    chosen = 1
    while BITS * chosen // (distance + chosen) < least_bits and chosen < _MOST_CHOSEN:
        chosen += 1
    num_blocks = distance + chosen
    edges = [BITS - BITS * number // num_blocks for number in range(num_blocks + 1)]
    blocks = [(low, high - low) for high, low in itertools.pairwise(edges)]  # the highest bits first
    for choice in itertools.combinations(range(num_blocks), chosen):
        rest = [number for number in range(num_blocks) if number not in choice]
        top, moves, masks = BITS, [], {}
        for number in (*choice, *rest):
            low, width = blocks[number]
            top -= width
            masks[number] = ((1 << width) - 1) << top
            if moves and moves[-1][0] == low + width:  # it follows the one before here and there
                moves[-1] = (low, width + moves[-1][1], top)
            else:
                moves.append((low, width, top))
        before = tuple(masks[number] for number in rest if number < choice[-1])
        yield _Table(tuple(moves), sum(blocks[number][1] for number in choice), before)


def _moved(hashes: np.ndarray, table: _Table) -> np.ndarray:
    found = np.zeros_like(hashes)
    for low, width, top in table.moves:
        found |= ((hashes >> np.uint64(low)) & np.uint64((1 << width) - 1)) << np.uint64(top)
    return found


def _moved_back(hashes: np.ndarray, table: _Table) -> np.ndarray:
    found = np.zeros_like(hashes)
    for low, width, top in table.moves:
        found |= ((hashes >> np.uint64(top)) & np.uint64((1 << width) - 1)) << np.uint64(low)
    return found


def _parts(hashes: np.ndarray, table: _Table, parts: int) -> Iterator[np.ndarray]:
    """The moved hashes in ``parts``, all that agree in the chosen blocks in one."""
    for number in range(parts):
        found = [np.zeros(0, np.uint64)]
        for stride in strides(hashes):
            moved = _moved(stride, table)
            if parts > 1:
                chosen = (moved >> np.uint64(BITS - table.chosen_bits)) * _MIX
                moved = moved[(chosen >> np.uint64(32)) % np.uint64(parts) == number]
            found.append(moved)
        yield np.concatenate(found)


def _near_neighbours(moved: np.ndarray, table: _Table, distance: int) -> Iterator[np.ndarray]:
    """Near pairs among sorted ``moved`` that agree in the chosen blocks."""
    limit = np.uint64(1 << (BITS - table.chosen_bits))
    for start in range(0, len(moved), _PROBES):
        places = np.arange(start, min(start + _PROBES, len(moved)))
        ahead = 1
        while len(places := places[places + ahead < len(moved)]):
            differing = moved[places] ^ moved[places + ahead]
            agree = differing < limit
            places, differing = places[agree], differing[agree]
            near = _first_seen(differing, table, distance)
            if near.any():
                yield np.stack([moved[places[near]], moved[places[near] + ahead]], axis=1)
            ahead += 1


def _near_in(probes: np.ndarray, moved: np.ndarray, table: _Table, distance: int) -> Iterator[np.ndarray]:
    """Near pairs of ``probes`` and sorted ``moved`` that agree in the chosen blocks."""
    rest = np.uint64((1 << (BITS - table.chosen_bits)) - 1)
    for start in range(0, len(probes), _PROBES):
        part = np.sort(probes[start : start + _PROBES])
        places, ends = np.searchsorted(moved, part & ~rest), np.searchsorted(moved, part | rest, side="right")
        while len(open_ := np.flatnonzero(places < ends)):
            part, places, ends = part[open_], places[open_], ends[open_]
            near = _first_seen(part ^ moved[places], table, distance)
            if near.any():
                yield np.stack([part[near], moved[places[near]]], axis=1)
            places = places + 1


def _first_seen(differing: np.ndarray, table: _Table, distance: int) -> np.ndarray:
    """Which of pairs with these ``differing`` bits are near, and agree in no earlier choice of blocks; bool [P]."""
    near = np.bitwise_count(differing) <= distance
    if near.any():
        places = np.flatnonzero(near)
        for mask in table.earlier:
            near[places] &= (differing[places] & np.uint64(mask)) != 0
    return near
