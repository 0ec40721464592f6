"""Compares rejected.jsonl with the counts of a manifest, and adds lines to it without counting any twice."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from data_prep.checks.measure import read_rejected
from data_prep.manifest import Manifest
from data_prep.record import Rejection
from data_prep.shard_writer import REJECTED_NAME

LOST = "(its name is lost)"


def check_rejected(split_dir: Path, manifest: Manifest) -> tuple[str, str] | None:
    """(kind, what is wrong) where the file does not hold what the manifest counts; None where it does."""
    path = split_dir / REJECTED_NAME
    try:
        counted, at_end = _count(split_dir, manifest)
    except ValueError as error:
        return "rejected_damaged", str(error)
    if at_end is None and counted == manifest.rejected:
        return None
    if at_end is not None:
        return "rejected_tail", f"{path}: {at_end} lines are those the manifest counts, more follow"
    text = f"{path}: {sum(counted.values())} rows, its manifest counts {sum(manifest.rejected.values())}"
    return "rejected_counts", text


def _count(split_dir: Path, manifest: Manifest) -> tuple[dict[str, int], int | None]:
    """Rows by reason of all lines; after how many lines, if not all, the manifest's counts were reached."""
    counted, reached, number = Counter(), 0 if not manifest.rejected else None, 0
    for number, rejection in enumerate(read_rejected(split_dir), 1):
        counted[rejection.reason] += rejection.rows
        if reached is None and counted[rejection.reason] == manifest.rejected.get(rejection.reason):
            reached = number if counted == manifest.rejected else None
    return dict(counted), reached if reached != number else None


def rewrite_rejected(split_dir: Path, manifest: Manifest, added: Iterable[Rejection]) -> dict[str, int]:
    """Replace the file, whole or not at all, by the lines that ``manifest`` counts, and ``added``; returns the counts.

    Lines after those that the manifest counts were added by a repair that did not end, and are dropped. Counts without
    lines get a line without a name; lines that can't be read are counted as those.
    """
    path, counted = split_dir / REJECTED_NAME, Counter()
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    wanted = Counter(manifest.rejected)
    try:
        with open(beside, "w", encoding="utf-8") as stream:
            for rejection in _readable(split_dir):
                if counted == wanted:
                    break
                counted[rejection.reason] += rejection.rows
                stream.write(_line(rejection))
            lost = [Rejection(reason, LOST, rows=rows) for reason, rows in sorted((wanted - counted).items())]
            for rejection in [*lost, *added]:
                counted[rejection.reason] += rejection.rows
                stream.write(_line(rejection))
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    return dict(sorted(counted.items()))


def _readable(split_dir: Path) -> Iterable[Rejection]:
    try:
        yield from read_rejected(split_dir)
    except ValueError:  # the rest is counted by the manifest, and gets lines without names
        return


def _line(rejection: Rejection) -> str:
    line = {"reason": rejection.reason, "name": rejection.name, "rows": rejection.rows, "detail": rejection.detail}
    return json.dumps(line) + "\n"
