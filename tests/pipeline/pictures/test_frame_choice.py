"""Which frames are chosen: against the definitions, for every length of a clip."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest

from pipeline.pictures.frame_choice import head_tail, uniform

LENGTHS, COUNTS = (1, 2, 3, 4, 5, 7, 8, 9, 100, 101), (1, 2, 3, 4, 5, 8)


@pytest.mark.parametrize(("length", "count"), [*itertools.product(LENGTHS, COUNTS)])
def test_frames_are_in_order_and_half_of_each_half(length: int, count: int) -> None:
    for seed in range(20):
        found = head_tail(length, count, seed)
        assert len(found) == count and found == sorted(found) and 0 <= found[0] <= found[-1] < length
        assert found == head_tail(length, count, seed)
        if count > 1 and length > 1:
            assert sum(number < length // 2 for number in found) == count // 2
        if count > 1 and length // 2 >= -(-count // 2):
            assert len(set(found)) == count
    assert uniform(length, count) == [int(k * length / count + 1e-9) for k in range(count)]


def test_a_clip_of_one_frame_repeats_it() -> None:
    assert uniform(1, 4) == head_tail(1, 4, 0) == [0, 0, 0, 0]
    assert head_tail(2, 4, 0) == [0, 0, 1, 1]
    assert head_tail(3, 4, 5)[:2] == [0, 0] and set(head_tail(3, 4, 5)[2:]) == {1, 2}


def test_every_frame_is_as_probable_as_another_of_its_half() -> None:
    """Of 10 frames each is among 2 + 2 with probability 0.4; four standard deviations of 4,000 draws are 0.031."""
    counts = Counter(number for seed in range(4000) for number in head_tail(10, 4, seed))
    assert all(abs(counts[number] / 4000 - 0.4) < 0.031 for number in range(10))
    single = Counter(head_tail(4, 1, seed)[0] for seed in range(4000))
    assert all(abs(single[number] / 4000 - 0.25) < 0.028 for number in range(4))
