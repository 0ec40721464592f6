"""Lets all ranks agree on numbers and values, on the host."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from pipeline.distributed.rendezvous import SILENCE


class Agreement:
    """Collectives over numbers on the host, on a gloo group of their own, so that they never wait for a device."""

    def __init__(self, silence: timedelta = SILENCE) -> None:
        """A collective that takes longer than ``silence`` fails."""
        self.alone = not dist.is_initialized() or dist.get_world_size() == 1
        self.rank, self.world_size = (0, 1) if self.alone else (dist.get_rank(), dist.get_world_size())
        self.is_main = self.rank == 0
        self._group = None if self.alone else dist.new_group(backend="gloo", timeout=silence)

    def total(self, numbers: Sequence[int] | Sequence[float]) -> list[float]:
        """The sum over ranks of each number (exact for integers below 2**53)."""
        if self.alone:
            return [float(number) for number in numbers]
        tensor = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(tensor, group=self._group)
        return tensor.tolist()

    def all_agree(self, holds: bool) -> bool:
        """Whether it holds on every rank."""
        return self.total([not holds]) == [0.0]

    def largest(self, number: float) -> float:
        if self.alone:
            return float(number)
        tensor = torch.tensor(number, dtype=torch.float64)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self._group)
        return tensor.item()

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks in order of rank (pickled, between our own processes)."""
        if self.alone:
            return [value]
        values: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(values, value, group=self._group)
        return values

    def gather_to_main(self, value: Any) -> list[Any]:
        """On rank 0 the values of all ranks in order of rank, on the others nothing (pickled, as above)."""
        if self.alone:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.gather_object(value, values if self.is_main else None, dst=0, group=self._group)
        return values if self.is_main else []

    def from_main(self, value: Any) -> Any:
        """The value that rank 0 gives, on every rank (pickled, between our own processes)."""
        if self.alone:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self._group)
        return values[0]

    def wait(self) -> None:
        """A barrier over all ranks."""
        if not self.alone:
            dist.barrier(group=self._group)
