"""Reads copies of shards that lie in a folder of this node, as long as they are there and whole."""

from __future__ import annotations

from pathlib import Path

from data_prep.manifest import Manifest
from pipeline.data.open_shards import MISSING, OF_THIS_PROCESS, OpenShard, OpenShards, ShardError
from pipeline.data.shard_files import open_shard

OPENED_PER_LOOK = 32  # copies opened between two looks for open ones that were removed
MAX_DISTRUSTED = 16  # copies that failed in this process; after that it opens none any more


class ShardCopies:
    """The copies of one corpus in ``folder``, where another process puts and removes them at any time: a copy is the
    tar and the index under the names of the originals, and whole as soon as the tar is there."""

    def __init__(self, folder: Path, manifest: Manifest, kept: OpenShards = OF_THIS_PROCESS) -> None:
        self._folder, self._manifest, self._kept = folder, manifest, kept
        self._distrusted: set[int] = set()
        self._num_opened = 0

    def get(self, number: int) -> OpenShard | None:
        """The copy of shard ``number``; None where there is none, or none that can be used. Raises nothing."""
        opened = self._kept.get(id(self), number)
        if opened is not None:
            return opened
        if number in self._distrusted or len(self._distrusted) >= MAX_DISTRUSTED:
            return None
        try:
            opened = open_shard(self._folder, self._manifest.fields, self._manifest.shards[number])
            self._kept.add(id(self), number, opened)
            self._num_opened += 1
            if self._num_opened % OPENED_PER_LOOK == 0:
                self._kept.close_removed(id(self))
        except ShardError as error:
            if error.reason != MISSING:
                self.distrust(number)
            return None
        except OSError:  # the machine is exhausted: opening the original says what to do
            return None
        return opened

    def distrust(self, number: int) -> None:
        """Call it when a copy could not be read: this process does not use it again."""
        self._distrusted.add(number)
        self._kept.close(id(self), number)

    def close(self) -> None:
        self._kept.close(id(self))
