"""Which shards are copied and removed, against the definitions written out sample by sample and set by set."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.order import SampleOrder, micro_batch_positions
from pipeline.staging import plan
from pipeline.staging.plan import NUM_STRETCHES, Move, Reads, ReadsAhead, next_move


def read_one_by_one(order, shard_samples, ranks, world, micro_batch, accumulation, steps):
    """The shards that ``ranks`` read in ``steps``, a number for each sample, in order."""
    owners = [np.repeat(np.arange(len(samples)), samples) for samples in shard_samples]
    first = [sum(len(samples) for samples in shard_samples[:corpus]) for corpus in range(len(shard_samples))]
    found = []
    for step in steps:
        for micro in range(accumulation):
            for rank in sorted(ranks):
                for position in micro_batch_positions(step, micro, rank, world, micro_batch, accumulation):
                    corpus, index, _ = order.at(position)
                    found.append(first[corpus] + int(owners[corpus][index]))
    return found


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_what_a_node_reads_is_what_its_ranks_read_sample_by_sample(data) -> None:
    draw = data.draw
    corpora = draw(st.integers(1, 3))
    shard_samples = [
        np.array(draw(st.lists(st.integers(1, 9), min_size=1, max_size=6)), dtype=np.int64) for _ in range(corpora)
    ]
    sizes, shuffle = [int(samples.sum()) for samples in shard_samples], draw(st.sampled_from(["full", "blocks"]))
    weights = draw(st.sampled_from([None, [1.0, 2.0, 4.0][:corpora]]))
    order = SampleOrder(sizes, 5, weights, shuffle, block_rows=3, window_blocks=2)
    world, micro_batch, accumulation = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 2))
    ranks = sorted(draw(st.sets(st.integers(0, world - 1), min_size=1)))
    num_steps, step = draw(st.integers(1, 12)), draw(st.integers(0, 13))
    stretch_samples = draw(st.integers(1, 10))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "STRETCH_SAMPLES", stretch_samples)
        ahead = ReadsAhead(order, shard_samples, ranks, world, micro_batch, accumulation, num_steps)
    per_stretch = -(-stretch_samples // (len(ranks) * micro_batch * accumulation))
    assert ahead.steps_per_stretch == per_stretch
    first_seen, counts, arguments = {}, {}, (order, shard_samples, ranks, world, micro_batch, accumulation)
    for number in range(NUM_STRETCHES if step < num_steps else 0):
        start = (step // per_stretch + number) * per_stretch
        stop = min(start + per_stretch, num_steps)
        for shard in read_one_by_one(*arguments, range(max(start, step), stop)):
            first_seen.setdefault(shard, number)
            counts[shard] = counts.get(shard, 0) + 1
    reads = ahead.from_step(step)
    assert reads.shards.tolist() == list(first_seen)
    assert reads.stretch.tolist() == list(first_seen.values())
    assert reads.samples.tolist() == [counts[shard] for shard in first_seen]


def carry_out(reads: Reads, sizes, samples, ready: set[int], left: set[int], limit: int) -> list[Move]:
    """Moves until there is none, on ``ready`` and ``left`` in place; the room is never exceeded after the first."""
    moves = []
    while (move := next_move(reads, sizes, samples, ready, left, limit)) is not None:
        assert len(moves) <= 3 * len(sizes), "no end"
        moves.append(move)
        held = ready | left
        assert set(move.evict) <= held and len(set(move.evict)) == len(move.evict)
        assert move.copy is None or move.copy not in ready
        ready -= set(move.evict)
        left -= {*move.evict, move.copy}
        ready |= {move.copy} - {None}
        assert sum(int(sizes[shard]) for shard in ready | left) <= limit
    return moves


@st.composite
def situations(draw, equal: bool):
    """Reads, sizes, samples, copies ready and left, and a limit; ``equal`` shards are of one size, read whole."""
    count = draw(st.integers(1, 7))
    read = draw(st.permutations(range(count)))[: draw(st.integers(0, count))]
    stretch = sorted(draw(st.lists(st.integers(0, 3), min_size=len(read), max_size=len(read))))
    samples = np.full(count, 8)
    num_read = [8 if equal else draw(st.integers(1, 8)) for _ in read]
    sizes = np.array([10 if equal else draw(st.integers(1, 20)) for _ in range(count)])
    reads = Reads(np.array(read, dtype=np.int64), np.array(stretch, dtype=np.int64), np.array(num_read, dtype=np.int64))
    held = draw(st.sets(st.integers(0, count - 1)))
    ready = {shard for shard in held if draw(st.booleans())}
    return reads, sizes, samples, ready, held - ready, draw(st.integers(0, 10 * count))


@settings(max_examples=80, deadline=None)
@given(situations(equal=True))
def test_in_the_end_no_other_choice_of_copies_is_needed_sooner(situation) -> None:
    """Of shards of one size: among all sets that fit, the least sum of the stretches in which they are read."""
    reads, sizes, samples, ready, left, limit = situation
    carry_out(*situation)
    urgency = dict(zip(reads.shards.tolist(), reads.stretch.tolist()))

    def worth(chosen) -> int:
        return sum(NUM_STRETCHES - urgency.get(shard, NUM_STRETCHES) for shard in chosen)

    room = min(limit // 10, len(sizes))
    assert worth(ready) == max(worth(chosen) for chosen in combinations(range(len(sizes)), room))


@settings(max_examples=80, deadline=None)
@given(situations(equal=False))
def test_nothing_makes_room_for_what_is_read_later_or_hardly_at_all(situation) -> None:
    reads, sizes, samples, ready, left, limit = situation
    urgency = dict(zip(reads.shards.tolist(), reads.stretch.tolist()))
    num_read = dict(zip(reads.shards.tolist(), reads.samples.tolist()))
    before = ready | left
    too_much = sum(int(sizes[shard]) for shard in before) > limit
    move = next_move(*situation)
    if move is None or move.evict == ():
        assert not too_much
        return
    gone = [urgency.get(shard, NUM_STRETCHES) for shard in move.evict]
    stay = [urgency.get(shard, NUM_STRETCHES) for shard in before - set(move.evict)]
    assert min(gone) >= max(stay, default=0), "the last to be read go first"
    if move.copy is None:
        assert too_much
    else:
        assert min(gone) > urgency[move.copy] and num_read[move.copy] * 4 >= samples[move.copy]
    carry_out(*situation)


def test_a_full_shuffle_over_more_than_the_room_keeps_what_it_has() -> None:
    """Every shard is read all the time: moving copies about would cost more than it saves."""
    sizes, samples = np.full(100, 10), np.full(100, 1000)
    ahead = ReadsAhead(SampleOrder([100_000], 1), [samples], [0], 1, 64, 1, 10_000)
    ready: set[int] = set()
    assert len(carry_out(ahead.from_step(0), sizes, samples, ready, set(), 300)) == 30
    assert carry_out(ahead.from_step(5000), sizes, samples, ready, set(), 300) == []


def test_blocks_as_large_as_shards_move_through_the_room_once_an_epoch() -> None:
    """A window of 32 blocks is 32 shards; with room for two windows all are copied before they are read."""
    samples = np.full(256, 1024)
    order = SampleOrder([256 * 1024], 1, shuffle="blocks")
    ahead = ReadsAhead(order, [samples], [0], 1, 64, 1, 256 * 1024 // 64)
    ready: set[int] = set()
    copied, missed = 0, 0
    for step in range(0, 256 * 1024 // 64, ahead.steps_per_stretch):
        now = ahead.from_step(step)
        missed += len(set(now.shards[now.stretch == 0].tolist()) - ready) if step else 0
        copied += sum(move.copy is not None for move in carry_out(now, np.full(256, 10), samples, ready, set(), 640))
    assert (copied, missed) == (256, 0)
