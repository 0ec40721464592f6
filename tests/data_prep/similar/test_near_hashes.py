"""Pairs of near hashes are those that comparing all with all finds."""

import numpy as np
import pytest

from data_prep.similar.near_hashes import in_order, pairs_between, pairs_within, write_distinct


def planted(seed, count, copies, flips):
    """Distinct hashes, some of which differ from others in up to ``flips`` bits."""
    numbers = np.random.default_rng(seed)
    hashes = numbers.integers(1, 2**64, count, dtype=np.uint64)
    near = hashes[numbers.integers(0, count, copies)]
    for _ in range(flips):
        near = near ^ (np.uint64(1) << numbers.integers(0, 64, copies, dtype=np.uint64))
    return np.unique(np.concatenate([hashes, near]))


def saved(folder, name, hashes):
    np.save(folder / name, hashes)
    return folder / name


def as_set(arrays):
    pairs = [tuple(pair) for array in arrays for pair in array.tolist()]
    assert len(pairs) == len(set(pairs))  # every pair once
    return set(pairs)


@pytest.mark.parametrize("distance", [0, 1, 3, 6, 8, 12])
@pytest.mark.parametrize("at_a_time", [10**6, 300])  # in one part, and in several
def test_all_near_pairs_are_found_once(tmp_path, distance, at_a_time):
    """A search by a tree misses pairs or fills memory (imagededup); this one is compared with all pairs."""
    hashes = planted(distance, 1500, 900, distance)
    distances = np.bitwise_count(hashes[:, None] ^ hashes[None])
    first, second = np.nonzero(np.triu(distances <= distance, 1))
    expected = set(zip(hashes[first].tolist(), hashes[second].tolist()))
    assert expected or distance == 0
    assert as_set(pairs_within(saved(tmp_path, "a.npy", hashes), distance, 1, at_a_time)) == expected


@pytest.mark.parametrize("distance", [0, 4, 8])
@pytest.mark.parametrize("at_a_time", [10**6, 300])
def test_all_near_pairs_of_two_sets_are_found_once(tmp_path, distance, at_a_time):
    one = planted(1, 1200, 300, 2)
    other = np.unique(np.concatenate([planted(2, 50, 20, 2), one[::5] ^ np.uint64(0b1011), one[1::50]]))
    first, second = np.nonzero(np.bitwise_count(one[:, None] ^ other[None]) <= distance)
    expected = set(zip(one[first].tolist(), other[second].tolist()))
    assert expected
    paths = saved(tmp_path, "a.npy", one), saved(tmp_path, "b.npy", other)
    assert as_set(pairs_between(*paths, distance, 1, at_a_time)) == expected


@pytest.mark.slow(5)
def test_workers_change_nothing(tmp_path):
    path = saved(tmp_path, "a.npy", planted(3, 600, 300, 4))
    alone, together = (np.concatenate(list(pairs_within(path, 4, workers))) for workers in (1, 2))
    assert len(alone) and np.array_equal(alone, together)


def test_values_are_sorted_part_by_part(tmp_path):
    numbers = np.random.default_rng(4)
    values = np.concatenate([numbers.integers(0, 2**64, 5000, dtype=np.uint64), np.zeros(40, np.uint64)])
    values = np.concatenate([values, values[:100], values[:30]])
    parts = list(in_order(values, 200))
    assert max(map(len, parts)) < 400 and np.array_equal(np.concatenate(parts), np.sort(values))
    repeated = write_distinct(values, tmp_path / "out.npy", 200)
    assert np.array_equal(np.load(tmp_path / "out.npy"), np.unique(values[values > 0]))
    assert np.array_equal(repeated, np.sort(values[:100]))


def test_nothing_in_nothing_out(tmp_path):
    empty = np.zeros(0, np.uint64)
    assert not len(write_distinct(empty, tmp_path / "out.npy"))
    path = tmp_path / "out.npy"
    assert not as_set(pairs_within(path, 8)) and not as_set(pairs_between(path, path, 8))
