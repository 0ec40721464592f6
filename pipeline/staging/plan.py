"""Which shards a node reads next, and which of them to copy to its disk in place of which others."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from pipeline.data.order import SampleOrder

STRETCH_SAMPLES = 8192  # at least so many samples of a node are one stretch; within it no shard is more urgent
NUM_STRETCHES = 8  # how far ahead the order is looked at
SHARE_TO_DISPLACE = 1 / 4  # of a shard's samples that must be read ahead before another copy makes room for it


class Reads(NamedTuple):
    """What a node reads ahead: shards in the order in which they are first read, int64 [N], each named once; in which
    stretch that is, int64 [N]; and how many samples are read from each, int64 [N]."""

    shards: np.ndarray
    stretch: np.ndarray
    samples: np.ndarray

    def without(self, refused: np.ndarray) -> Reads:
        """Those of the shards that are not ``refused``, bool of all shards."""
        kept = ~refused[self.shards]
        return Reads(*(column[kept] for column in self))


class Move(NamedTuple):
    """Shards to remove, then one to copy, or None."""

    evict: tuple[int, ...]
    copy: int | None


class ReadsAhead:
    """Works out what the ranks of one node read, from the sample order alone.

    ``shard_samples`` are the samples of each shard, int64 for each corpus of ``order``; the shards of all corpora are
    numbered through. ``ranks`` of ``world`` are on the node; the run ends after ``num_steps``.
    """

    def __init__(
        self,
        order: SampleOrder,
        shard_samples: Sequence[np.ndarray],
        ranks: Sequence[int],
        world: int,
        micro_batch: int,
        accumulation: int,
        num_steps: int,
    ) -> None:
        self._order, self._num_steps = order, num_steps
        self._ends = [np.cumsum(samples) for samples in shard_samples]
        self._first = np.cumsum([0, *(len(samples) for samples in shard_samples)])
        per_pass = np.add.outer(np.asarray(sorted(ranks)) * micro_batch, np.arange(micro_batch))
        self._within_step = np.add.outer(np.arange(accumulation) * world * micro_batch, per_pass).ravel()
        self._step_samples = world * accumulation * micro_batch
        self.steps_per_stretch = -(-STRETCH_SAMPLES // len(self._within_step))
        self._read_within = lru_cache(maxsize=NUM_STRETCHES + 1)(self._read_within_now)

    def samples_from(self, step: int) -> int:
        """How many samples the node reads from ``step`` on, repeated ones counted again."""
        return len(self._within_step) * max(self._num_steps - step, 0)

    def from_step(self, step: int) -> Reads:
        """What is read from ``step`` to the end of the last stretch ahead; nothing past the last step."""
        number = step // self.steps_per_stretch + 1
        ends = [stretch * self.steps_per_stretch for stretch in range(number, number + NUM_STRETCHES)]
        bounds = [min(one, self._num_steps) for one in (step, *ends)]
        parts = [self._read_within(start, stop) for start, stop in pairwise(bounds) if start < stop]
        if not parts:
            return Reads(*np.zeros((3, 0), dtype=np.int64))
        shards = np.concatenate([part.shards for part in parts])
        total = np.bincount(shards, weights=np.concatenate([part.samples for part in parts])).astype(np.int64)
        stretch = np.repeat(np.arange(len(parts)), [len(part.shards) for part in parts])
        _, at = np.unique(shards, return_index=True)
        at.sort()
        return Reads(shards[at], stretch[at], total[shards[at]])

    def _read_within_now(self, start: int, stop: int) -> Reads:
        steps = np.arange(start, stop)
        corpora, indices, _ = self._order.at_many(np.add.outer(steps * self._step_samples, self._within_step).ravel())
        shards = np.empty_like(indices)
        for corpus, ends in enumerate(self._ends):
            mine = corpora == corpus
            shards[mine] = self._first[corpus] + np.searchsorted(ends, indices[mine], side="right")
        found, at, samples = np.unique(shards, return_index=True, return_counts=True)
        in_order = np.argsort(at)
        return Reads(found[in_order], np.zeros(len(found), dtype=np.int64), samples[in_order])


def next_move(
    reads: Reads, sizes: np.ndarray, samples: np.ndarray, ready: Collection[int], left: Collection[int], limit: int
) -> Move | None:
    """The next thing to do for the shards that are read ahead; None when nothing would help.

    ``sizes`` (bytes) and ``samples`` are int64 of all shards. ``ready`` are copies in use, ``left`` those of an earlier
    job, which take room too, and need no copying once they are checked. All copies keep within ``limit`` bytes.

    The shard that is read first comes first. While there is room, it is copied. Then the copies that are read last make
    room, if at all: only ones that are read in a later stretch or not at all, and only for a shard of which a quarter
    is read ahead, since a copy costs reading the whole of it.
    """
    stretch = np.full(len(sizes), NUM_STRETCHES)
    stretch[reads.shards] = reads.stretch
    rank = np.full(len(sizes), len(sizes))
    rank[reads.shards] = np.arange(len(reads.shards))
    held = np.array(sorted({*ready, *left}), dtype=np.int64)
    victims = held[np.lexsort((-held, -rank[held]))]  # read last first
    freed = np.cumsum(sizes[victims])
    free = limit - int(sizes[held].sum())
    if free < 0:
        return Move(tuple(victims[: int(np.searchsorted(freed, -free)) + 1].tolist()), None)
    for shard, urgency, num_read in zip(reads.shards.tolist(), reads.stretch.tolist(), reads.samples.tolist()):
        if shard in ready:
            continue
        missing = int(sizes[shard]) - free
        if shard in left or missing <= 0:
            return Move((), shard)
        if num_read < SHARE_TO_DISPLACE * samples[shard]:
            continue
        count = int(np.searchsorted(freed, missing)) + 1
        if count <= len(victims) and stretch[victims[count - 1]] > urgency:
            return Move(tuple(victims[:count].tolist()), shard)
    return None
