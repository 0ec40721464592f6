"""Keeps copies of the shards that a node reads next on its disk, in a thread of one rank, while the run trains."""

from __future__ import annotations

import errno
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pipeline.data.open_shards import ShardError
from pipeline.data.shard_reader import Corpus
from pipeline.distributed.endings import host_name
from pipeline.staging.node_folder import NodeFolder, OtherContent, Stopped, remove_leftovers
from pipeline.staging.plan import Move, ReadsAhead, next_move

GIB = 2**30
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
LOCK_SECONDS = 30.0  # between two tries to take a corpus over from another job
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 1.0, 60.0  # after a failure, doubled at every further one


class Stager:
    """Copies and removes shards in the folder ``base`` of this user, at most ``limit`` bytes of them.

    Nothing that goes wrong here concerns training, which reads the originals instead; it is said once.
    """

    def __init__(
        self, base: Path, corpora: Sequence[Corpus], ahead: ReadsAhead, samples: np.ndarray, limit: int
    ) -> None:
        """``ahead`` and ``samples``, those of each shard of all corpora, int64, are about the same ``corpora``."""
        self._base, self._ahead, self._samples, self._limit = base, ahead, samples, limit
        self._folders = [NodeFolder(base, corpus.split_dir, corpus.manifest) for corpus in corpora]
        self._first = np.cumsum([0, *(len(folder.sizes) for folder in self._folders)])
        self._sizes = np.concatenate([folder.sizes for folder in self._folders])
        self._refused = np.zeros(len(self._sizes), dtype=bool)  # their originals are not what the manifest says
        self._step = 0
        self._warning: str | None = None
        self._warned = False
        self._cleaned = False
        self._moved, self._ended = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._work, name="staging", daemon=True)

    def take_folders(self) -> None:
        """Take the folders of the corpora that no other job has taken: from then on every copy in use is verified.

        Raises OSError.
        """
        for folder in self._folders:
            if not folder.taken:
                folder.take()

    def start(self, step: int) -> None:
        """Begin to copy what is read from ``step`` on, after ``take_folders``."""
        self._step = step
        self._thread.start()

    def description(self, step: int) -> str:
        """A line for the start of a run at ``step``."""
        total, times = int(self._sizes.sum()) / GIB, self._ahead.samples_from(step) / int(self._samples.sum())
        return (
            f"staging: up to {self._limit / GIB:.3g} of {total:.3g} GiB of shards on each node, in {self._base}; this "
            f"node reads a sample {times:.3g} times from here on"
        )

    def follow(self, step: int) -> None:
        """Call it at every step, with the one whose samples are taken next: copying goes on from there."""
        stretch = self._ahead.steps_per_stretch
        if step // stretch != self._step // stretch:
            self._moved.set()
        self._step = step
        self._say_warning()

    def close(self) -> None:
        """End copying; the copies stay for a later run."""
        self._ended.set()
        self._moved.set()
        if self._thread.is_alive():
            self._thread.join()
        self._say_warning()
        for folder in self._folders:
            folder.close()

    def _work(self) -> None:
        pause = 0.0
        while not self._ended.is_set():
            self._moved.clear()
            move = None
            try:
                self._remove_leftovers()
                self.take_folders()
                move = self._next_move()
                if move is not None:
                    self._carry_out(move)
            except Stopped:
                return
            except OtherContent as error:
                self._refused[move.copy] = True
                self._warn(f"{error}; it is not copied")
            except (OSError, ShardError) as error:
                if isinstance(error, OSError) and error.errno in FULL:
                    self._limit = int(self._sizes[list(self._held())].sum())
                self._warn(f"{reason(error)}; tried again from time to time")
                pause = min(max(2 * pause, FIRST_PAUSE_SECONDS), LONGEST_PAUSE_SECONDS)
                self._ended.wait(pause)
            else:
                pause = 0.0
                if move is None:
                    self._moved.wait(LOCK_SECONDS)

    def _remove_leftovers(self) -> None:
        if not self._cleaned:
            self._cleaned = True
            remove_leftovers(self._base, {folder.name for folder in self._folders})

    def _next_move(self) -> Move | None:
        for folder in self._folders:
            if folder.taken:
                folder.forget_removed()
        taken = np.repeat([folder.taken for folder in self._folders], np.diff(self._first))
        reads = self._ahead.from_step(self._step).without(self._refused | ~taken)
        ready = self._numbers("ready")
        return next_move(reads, self._sizes, self._samples, ready, self._numbers("left"), self._limit)

    def _carry_out(self, move: Move) -> None:
        for shard in move.evict:
            folder, number = self._place(shard)
            folder.remove(number)
        if move.copy is not None:
            folder, number = self._place(move.copy)
            folder.add(number, self._ended.is_set)

    def _place(self, shard: int) -> tuple[NodeFolder, int]:
        corpus = int(np.searchsorted(self._first, shard, side="right")) - 1
        return self._folders[corpus], shard - int(self._first[corpus])

    def _held(self) -> set[int]:
        return self._numbers("ready") | self._numbers("left")

    def _numbers(self, which: str) -> set[int]:
        """Copies that are ``ready`` or ``left``, numbered through over all corpora."""
        firsts = zip(self._first.tolist(), self._folders)
        return {first + number for first, folder in firsts for number in getattr(folder, which)}

    def _say_warning(self) -> None:
        """In the main thread: one that is forked meanwhile holds no lock."""
        if self._warning is not None:
            print(self._warning, file=sys.stderr, flush=True)
            self._warning = None

    def _warn(self, what: str) -> None:
        if not self._warned:
            self._warning = f"warning: staging in {self._base} on {host_name()}: {what}; originals are read instead"
        self._warned = True


def reason(error: OSError | ShardError) -> str:
    """What failed, and where, if the error says so."""
    if isinstance(error, ShardError):
        return error.reason
    return ": ".join(str(part) for part in (error.filename, error.strerror) if part)
