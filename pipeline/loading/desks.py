"""Where each loader process is at work, so that a hang or a death can be told by its sample."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from pipeline.data.shard_reader import Corpus
from pipeline.loading.datasets import Started

_IDLE = -1


class Desks:
    """One row per process in shared memory without a name: its id, corpus and row. Made before the workers fork."""

    def __init__(self, num_workers: int) -> None:
        memory = mmap.mmap(-1, num_workers * 24)
        self._rows = np.frombuffer(memory, dtype=np.int64).reshape(num_workers, 3)
        self._rows[:, 1] = _IDLE

    @contextmanager
    def take(self, worker: int) -> Iterator[Started]:
        """Yields what is to be told of each sample before it is read."""
        row = self._rows[worker]
        row[0] = os.getpid()

        def started(corpus: int, index: int) -> None:
            row[1:] = corpus, index

        yield started
        row[1] = _IDLE

    def at_work(self, corpora: Sequence[Corpus]) -> list[tuple[int, str]]:
        """(process id, "CORPUS/SPLIT/SHARD#ROW") of each process that is in the middle of a batch."""
        return [(pid, corpora[corpus].place(index)[2]) for pid, corpus, index in self._rows.tolist() if corpus != _IDLE]
