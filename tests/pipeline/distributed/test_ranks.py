"""Agreements between ranks."""

from __future__ import annotations

import pytest

from pipeline.distributed.places import Place
from pipeline.distributed.ranks import Agreement
from tests.forked_ranks import run_ranks


def agree(place: Place) -> tuple:
    agreement = Agreement()
    big = 2**51 + place.rank
    return agreement.total([place.rank, big]), agreement.largest(place.rank), agreement.gather(f"r{place.rank}")


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 3])
def test_ranks_agree(world_size: int) -> None:
    ranks = range(world_size)
    expected = (
        [sum(ranks), 2**51 * world_size + sum(ranks)] if world_size == 1 else [3, 3 * 2**51 + 3],
        world_size - 1,
        [f"r{rank}" for rank in ranks],
    )
    for found in run_ranks(world_size, agree):
        assert found == expected
