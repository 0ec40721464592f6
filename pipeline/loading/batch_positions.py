"""Which positions of the order each micro-batch of a rank holds, in training and in evaluation."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from pipeline.data.order import micro_batch_positions


@dataclass(frozen=True)
class TrainBatches:
    """Positions of each micro-batch of one rank for steps ``start_step`` .. ``num_steps``-1, less those of the steps
    ``skipped``, of which nothing is read."""

    start_step: int
    num_steps: int
    rank: int
    world: int
    micro_batch: int
    accumulation: int
    skipped: frozenset[int] = frozenset()

    @property
    def most(self) -> int:
        return len(self)

    @property
    def largest(self) -> int:
        return self.micro_batch

    def __len__(self) -> int:
        num_skipped = sum(self.start_step <= step < self.num_steps for step in self.skipped)
        return (max(self.num_steps - self.start_step, 0) - num_skipped) * self.accumulation

    def __iter__(self) -> Iterator[range]:
        for step in range(self.start_step, self.num_steps):
            if step in self.skipped:
                continue
            for micro in range(self.accumulation):
                yield micro_batch_positions(step, micro, self.rank, self.world, self.micro_batch, self.accumulation)


@dataclass(frozen=True)
class EvalBatches:
    """Positions of the batches of an evaluation, dealt to the ranks in turn: which positions share a batch does not
    depend on the number of ranks."""

    all: tuple[Sequence[int], ...]
    rank: int
    world: int

    @property
    def most(self) -> int:
        """The largest number of batches of any rank."""
        return -(-len(self.all) // self.world)

    @property
    def largest(self) -> int:
        return max(map(len, self.all))

    def without(self, done: Collection[int]) -> EvalBatches:
        """The batches that are left, the positions ``done`` taken out."""
        left = ([position for position in batch if position not in done] for batch in self.all)
        return EvalBatches(tuple(batch for batch in left if batch), self.rank, self.world)

    def __len__(self) -> int:
        return len(range(self.rank, len(self.all), self.world))

    def __iter__(self) -> Iterator[Sequence[int]]:
        return iter(self.all[self.rank :: self.world])
