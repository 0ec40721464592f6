"""Divides named things among the ranks by size, the same way on every rank."""

from __future__ import annotations

import heapq
from collections.abc import Mapping


def owners_of(sizes: Mapping[str, int], world_size: int) -> dict[str, int]:
    """The rank of each name: the largest first, each to the rank with the least so far, the lowest of several."""
    loads = [(0, rank) for rank in range(world_size)]
    owners = {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        load, owners[name] = loads[0]
        heapq.heapreplace(loads, (load + sizes[name], owners[name]))
    return owners
