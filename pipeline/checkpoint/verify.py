"""Finds the newest whole checkpoint of a run, its files divided among the ranks to be hashed."""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.checkpoint.files import HASHING_THREADS, listed, wrong_hash, wrong_size
from pipeline.distributed.ranks import Agreement
from pipeline.distributed.sharing import owners_of

READ_BYTES = 1 << 24
POLL_SECONDS = 1.0  # between two words of the ranks while they hash, far below the silence that ends a job
SAY_SECONDS = 30.0  # between two lines on how far it is


def newest_whole(paths: Sequence[Path], agreement: Agreement) -> tuple[Path | None, list[str]]:
    """The first of rank 0's ``paths`` that passes verification, and those skipped, with the reason.

    Every rank must call it; all get the same. A checkpoint is read once, however many ranks there are.
    """
    skipped = []
    for path in agreement.gather(list(paths))[0]:
        reason = shared_defect(path, agreement)
        if reason is None:
            return path, skipped
        skipped.append(f"{path.name}: {reason}")
    return None, skipped


def shared_defect(path: Path, agreement: Agreement) -> str | None:
    """Why a checkpoint is invalid, None if it is whole; rank 0 reads the manifest, each rank its share of the files."""
    entries, reason = agreement.gather(listed(path) if agreement.is_main else None)[0]
    if reason is not None:
        return reason
    owners = owners_of({name: entry["bytes"] for name, entry in entries.items()}, agreement.world_size)
    own = {name: entry for name, entry in entries.items() if owners[name] == agreement.rank}
    wrong = [reason for name, entry in own.items() if (reason := wrong_size(path, name, entry))]
    if reasons := [reason for part in agreement.gather(wrong) for reason in part]:
        return min(reasons)
    hashing = _Hashing(path, own)
    try:
        _until_hashed(hashing, sum(entry["bytes"] for entry in entries.values()), agreement)
    finally:
        hashing.end()
    return min(filter(None, agreement.gather(hashing.reason)), default=None)


class _Hashing:
    """Threads that hash this rank's share of the files of a checkpoint."""

    def __init__(self, path: Path, entries: dict[str, dict[str, Any]]) -> None:
        self.reason: str | None = None  # why a file is not what the manifest lists
        self.name, self._ended, self.num_bytes = path.name, False, dict.fromkeys(entries, 0)  # hashed by file
        self._pool = ThreadPoolExecutor(HASHING_THREADS, thread_name_prefix="hashing")
        check = partial(wrong_hash, path, sha256=self._sha256)
        self._tasks: list[Future] = [self._pool.submit(check, name, entry) for name, entry in entries.items()]

    def poll(self, seconds: float) -> bool:
        """Wait for at most ``seconds``; whether files are left."""
        ended, left = wait(self._tasks, timeout=seconds)
        self.reason = min(filter(None, (task.result() for task in ended)), default=None)
        return bool(left)

    def end(self) -> None:
        self._ended = True
        self._pool.shutdown(cancel_futures=True)

    def _sha256(self, path: Path) -> str:
        digest = hashlib.sha256()
        with open(path, "rb", buffering=0) as stream:
            while not self._ended and (chunk := stream.read(READ_BYTES)):
                digest.update(chunk)
                self.num_bytes[path.name] += len(chunk)
        return digest.hexdigest()


def _until_hashed(hashing: _Hashing, num_bytes: int, agreement: Agreement) -> None:
    """Return when all ranks have hashed their files, or one has found a wrong one."""
    said = time.monotonic()
    while True:
        is_left = hashing.poll(POLL_SECONDS)
        own = (is_left, hashing.reason is not None, sum(hashing.num_bytes.values()))
        left, wrong, hashed = agreement.total(own)
        if wrong or not left:
            return
        if agreement.is_main and time.monotonic() - said >= SAY_SECONDS:
            said = time.monotonic()
            words = f"{hashed / 2**30:.1f} of {num_bytes / 2**30:.1f} GiB hashed"
            print(f"checking {hashing.name}: {words}", file=sys.stderr, flush=True)
