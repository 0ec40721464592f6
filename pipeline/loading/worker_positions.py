"""Which sample each loader process is reading, so that an error message can name it when one hangs or dies."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from pipeline.data.shard_reader import Corpus
from pipeline.loading.datasets import Started

_IDLE = -1


class WorkerPositions:
    """Process id, corpus and row of every loader process, in anonymous shared memory; create it before they fork."""

    def __init__(self, num_workers: int) -> None:
        memory = mmap.mmap(-1, num_workers * 24)
        self._rows = np.frombuffer(memory, dtype=np.int64).reshape(num_workers, 3)
        self._rows[:, 1] = _IDLE

    @contextmanager
    def track(self, worker: int) -> Iterator[Started]:
        """Record what ``worker`` reads: yields a function to call with the corpus and row of each sample to come."""
        row = self._rows[worker]
        row[0] = os.getpid()

        def started(corpus: int, index: int) -> None:
            row[1:] = corpus, index

        yield started
        row[1] = _IDLE

    def active(self, corpora: Sequence[Corpus]) -> list[tuple[int, str]]:
        """(process id, "CORPUS/SPLIT/SHARD#ROW") of each process that is in the middle of a batch."""
        return [(pid, corpora[corpus].place(index)[2]) for pid, corpus, index in self._rows.tolist() if corpus != _IDLE]
