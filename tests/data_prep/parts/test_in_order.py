"""Results in any order come out in the order of their numbers, in bounded memory."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from data_prep.parts.in_order import InOrder
from data_prep.record import Record


@pytest.mark.parametrize("max_bytes", [0, 30, 10**6])
@pytest.mark.parametrize("seed", range(20))
def test_any_order_becomes_the_order_of_numbers(tmp_path: Path, seed: int, max_bytes: int) -> None:
    source = random.Random(seed)
    numbers = list(range(40))
    source.shuffle(numbers)
    lost = set(source.sample(numbers, 3))
    records = [None if n % 7 == 0 else Record(f"{n}", (source.randbytes(n % 11),), ("x",)) for n in range(40)]
    order, found = InOrder(tmp_path / "spill", max_bytes), []
    for number in numbers:
        if number not in lost:
            found += order.put(number, records[number], number * 2)
            assert order._held_bytes <= max_bytes
    for number in order.missing(40):
        found += order.put(number, None, number * 2)
    order.close()
    assert found == [(n, None if n in lost else records[n], n * 2) for n in range(40)]
    assert (tmp_path / "spill").exists() == (max_bytes < 50) or max_bytes == 30
