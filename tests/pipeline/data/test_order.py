"""The sample order: bijective, complete, independent of topology, weighted, and well shuffled."""

from __future__ import annotations

import pickle
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.order import (
    BLOCK_SIZE,
    SampleOrder,
    SampleRef,
    block_counts,
    micro_batch_positions,
    mix_words,
    permute,
    permute_blocks,
    sample_seed,
)

SIZES = st.lists(st.integers(1, 300), min_size=1, max_size=4)
SHUFFLES = st.fixed_dictionaries({
    "shuffle": st.sampled_from(["full", "blocks", "none"]),
    "block_rows": st.integers(1, 40),
    "window_blocks": st.integers(1, 9),
})  # fmt: skip
SEEDS = st.integers(0, 2**63 - 1)
GOLDEN_ORDER = [9, 5, 0, 1, 7, 3, 2, 6, 4, 8]
GOLDEN_BLOCKS = [6, 8, 0, 7, 1, 2, 9, 4, 11, 5, 3, 10]
GOLDEN_SEED = 16005210142278337112


@given(size=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_permutation_is_a_bijection(size, key):
    """Invariant 1."""
    images = permute(np.arange(size), np.full(size, size), np.full(size, key, dtype=np.uint64))
    assert sorted(images.tolist()) == list(range(size))


@pytest.mark.parametrize("size", [2**40 - 1, 2**40, 2**40 + 1, 2**52 + 3])
def test_permutation_of_huge_ranges_stays_inside_without_collision(size):
    values = np.concatenate([np.arange(2000), size - 1 - np.arange(2000)])
    images = permute(values, np.full(4000, size), np.full(4000, 7, dtype=np.uint64))
    assert images.min() >= 0 and images.max() < size and len(set(images.tolist())) == 4000


@given(
    size=st.integers(1, 3000),
    block_rows=st.integers(1, 700),
    window_blocks=st.integers(1, 20),
    key=st.integers(0, 2**64 - 1),
)
def test_permutation_of_blocks_is_a_bijection_with_local_windows(size, block_rows, window_blocks, key):
    """Invariant 1; a window of positions touches few blocks, whatever does not divide evenly."""
    keys = np.full(size, key, dtype=np.uint64)
    images = permute_blocks(np.arange(size), np.full(size, size), keys, block_rows, window_blocks)
    assert sorted(images.tolist()) == list(range(size))
    for start in range(0, size, block_rows * window_blocks):
        touched = {row // block_rows for row in images[start : start + block_rows * window_blocks].tolist()}
        assert len(touched) <= window_blocks + 1


def test_huge_permutation_of_blocks_has_no_collision():
    size = 2**40 + 12345
    values = np.concatenate([np.arange(20_000), size - 1 - np.arange(20_000)])
    images = permute_blocks(values, np.full(40_000, size), np.full(40_000, 7, dtype=np.uint64), 1024, 4)
    assert images.min() >= 0 and images.max() < size and len(set(images.tolist())) == 40_000


def test_blocks_are_well_shuffled_but_for_what_they_give_up():
    n, block_rows, window = 100_000, 100, 800
    order = SampleOrder([n], 0, shuffle="blocks", block_rows=block_rows, window_blocks=8)
    first, second = (order.at_many(np.arange(e * n, (e + 1) * n))[1] for e in range(2))
    for a, b in [(first, np.arange(n)), (first, second), (first[window:], first[:-window])]:
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.12  # 125 windows of 8 blocks: four deviations
    inside = first.reshape(-1, window)
    assert abs(np.mean(np.diff(inside, axis=1) == 1) - 1 / window) < 0.001  # neighbours meet by chance only
    share = np.mean([len(set(row // block_rows)) for row in inside[:, :100]])  # a batch of 100 draws on all 8 blocks
    assert share > 7.9
    companions = [{frozenset(set(row // block_rows)) for row in e.reshape(-1, window)} for e in (first, second)]
    assert not companions[0] & companions[1]


@given(sizes=SIZES, seed=SEEDS, shuffle=SHUFFLES, weighted=st.booleans(), position=st.integers(0, 5000))
def test_rows_read_together_are_the_block(sizes, seed, shuffle, weighted, position):
    order = SampleOrder(sizes, seed, [1.0] * len(sizes) if weighted else None, **shuffle)
    corpus, index, _ = order.at(position)
    rows = order.read_together(corpus, index)
    if shuffle["shuffle"] != "blocks":
        assert rows is None
        return
    assert index in rows and 0 <= rows.start and rows.stop <= sizes[corpus] and len(rows) <= shuffle["block_rows"]
    assert all(order.read_together(corpus, row) == rows for row in (rows[0], rows[-1]))


@given(sizes=SIZES, seed=SEEDS, epoch=st.integers(0, 50), shuffle=SHUFFLES)
def test_every_sample_exactly_once_an_epoch(sizes, seed, epoch, shuffle):
    """Invariant 1."""
    order = SampleOrder(sizes, seed, **shuffle)
    n = order.epoch_size
    corpus, index, epochs = order.at_many(np.arange(epoch * n, (epoch + 1) * n))
    assert set(epochs.tolist()) == {epoch}
    assert sorted(zip(corpus.tolist(), index.tolist())) == [(c, i) for c, s in enumerate(sizes) for i in range(s)]


@given(sizes=SIZES, seed=SEEDS, position=st.integers(0, 10**12), shuffle=SHUFFLES, data=st.data())
def test_restart_anywhere_continues_the_same_stream(sizes, seed, position, shuffle, data):
    """Invariant 1."""
    weights = data.draw(st.none() | st.lists(st.floats(0.1, 10), min_size=len(sizes), max_size=len(sizes)))
    running = SampleOrder(sizes, seed, weights, **shuffle)
    restarted = pickle.loads(pickle.dumps(SampleOrder(sizes, seed, weights, **shuffle)))
    stretch = running.at_many(np.arange(position, position + 40))
    for offset in (0, 1, 17, 39):
        assert restarted.at(position + offset) == SampleRef(*(int(column[offset]) for column in stretch))


@settings(max_examples=50)
@given(
    topologies=st.lists(st.permutations([1, 2, 3, 4]), min_size=2, max_size=4),
    step=st.integers(0, 10**6),
)
def test_global_batches_do_not_depend_on_topology(topologies, step):
    """Invariant 1: 24 samples a step over every factoring into ranks, accumulation and micro-batch."""
    batches = []
    for a, b, c, d in topologies:
        world, accumulation, micro_batch = a * d, b, c
        positions = [
            position
            for micro in range(accumulation)
            for rank in range(world)
            for position in micro_batch_positions(step, micro, rank, world, micro_batch, accumulation)
        ]
        batches.append(positions)
    assert all(batch == list(range(step * 24, (step + 1) * 24)) for batch in batches)


@pytest.mark.slow
@given(
    sizes=st.lists(st.integers(1, 700), min_size=2, max_size=4),
    seed=SEEDS,
    data=st.data(),
    block=st.integers(0, 1000),
    shuffle=SHUFFLES,
)
def test_weights_are_honoured_in_every_block_and_epochs_do_not_repeat(sizes, seed, data, block, shuffle):
    """Invariant 1, weighted."""
    weights = data.draw(st.lists(st.floats(0.05, 10), min_size=len(sizes), max_size=len(sizes)))
    order = SampleOrder(sizes, seed, weights, **shuffle)
    corpus, index, epoch = order.at_many(np.arange(block * BLOCK_SIZE, (block + 1) * BLOCK_SIZE))
    found = Counter(corpus.tolist())
    for number, weight in enumerate(weights):
        assert abs(found[number] - weight / sum(weights) * BLOCK_SIZE) < 1
    seen = Counter(zip(corpus.tolist(), epoch.tolist(), index.tolist()))
    assert max(seen.values()) == 1


def test_weighted_corpus_is_exhausted_before_it_repeats():
    """Invariant 1: whole epochs of each corpus of a mix, across block borders."""
    order = SampleOrder([1500, 70], 3, [3, 1])
    corpus, index, epoch = order.at_many(np.arange(4 * BLOCK_SIZE))
    for number, size in enumerate([1500, 70]):
        of_first_epochs = index[(corpus == number) & (epoch < (corpus == number).sum() // size)]
        counts = np.bincount(of_first_epochs, minlength=size)
        assert counts.min() == counts.max() > 0


def test_shuffle_looks_random():
    n = 10_000
    order = SampleOrder([n], 0)
    first = order.at_many(np.arange(n))[1]
    second = order.at_many(np.arange(n, 2 * n))[1]
    other_seed = SampleOrder([n], 1).at_many(np.arange(n))[1]
    for a, b in [(first, np.arange(n)), (first, second), (first, other_seed), (first[1:], first[:-1])]:
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.05
        assert np.mean(np.asarray(a) == np.asarray(b)) < 0.002
    # where the first hundred positions of many epochs land, in ten equal bins: chi-square with 9 degrees of freedom
    places = np.concatenate([order.at_many(np.arange(e * n, e * n + 100))[1] for e in range(100)])
    counts = np.bincount(places * 10 // n, minlength=10)
    assert ((counts - 1000) ** 2 / 1000).sum() < 33.7  # p = 1e-4


@pytest.mark.slow
def test_small_permutations_are_all_reached_evenly():
    orders = Counter(tuple(SampleOrder([4], seed).at_many(np.arange(4))[1].tolist()) for seed in range(4800))
    assert len(orders) == 24
    counts = np.array(list(orders.values()))
    assert ((counts - 200) ** 2 / 200).sum() < 55  # 23 degrees of freedom, p = 2e-4


def test_order_is_fixed_across_versions():
    """Resuming a run with a newer version must see the same samples: these figures may never change."""
    assert SampleOrder([10], 0).at_many(np.arange(10))[1].tolist() == GOLDEN_ORDER
    blocks = SampleOrder([12], 0, shuffle="blocks", block_rows=3, window_blocks=2)
    assert blocks.at_many(np.arange(12))[1].tolist() == GOLDEN_BLOCKS
    assert sample_seed(1, 2, 3, 4) == GOLDEN_SEED


def test_sample_seeds_differ_in_every_word():
    seeds = {sample_seed(s, e, c, i) for s in range(4) for e in range(4) for c in range(4) for i in range(64)}
    assert len(seeds) == 4 * 4 * 4 * 64 and all(0 <= seed < 2**64 for seed in seeds)
    assert mix_words(1, 23) != mix_words(12, 3)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (([],), "at least one corpus"),
        (([3, 0],), "none empty"),
        (([3, 3], 0, [1.0]), "1 weights for 2 corpora"),
        (([3, 3], 0, [1.0, -1.0]), "positive"),
        (([3, 3], 0, [1.0, float("nan")]), "positive"),
        (([3, 3], 0, [1.0, 1e-6]), "below 1/1024"),
        (([3], 0, None, "partly"), "shuffle"),
        (([3], 0, None, "blocks", 0), "blocks of 0 rows"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    """Invariant 9."""
    with pytest.raises(ValueError, match=message):
        SampleOrder(*arguments, **({} if len(arguments) > 1 else {"seed": 0}))


def test_out_of_range_is_refused():
    with pytest.raises(ValueError, match="position -1"):
        SampleOrder([3], 0).at(-1)
    with pytest.raises(ValueError, match="out of range"):
        micro_batch_positions(0, 0, 2, 2, 4, 1)


def test_block_counts_are_largest_remainders():
    assert block_counts([1, 1, 1], 3).tolist() == [342, 341, 341]
    assert block_counts([0.3, 0.7], 2).tolist() == [307, 717]
