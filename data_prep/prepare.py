"""Runs the records of a source through the filters into a split."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterable, Iterator
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from tqdm import tqdm

from data_prep.filters import DuplicateFilter, Limits, check_record
from data_prep.manifest import Manifest
from data_prep.parallel import Workers, ordered_map
from data_prep.record import LowYieldError, Record, Rejection
from data_prep.shard_writer import SplitWriter, describe_counts
from data_prep.video.decoding import ClipLimits


def fill_split(
    writer: SplitWriter,
    source: Iterable[Record | Rejection],
    limits: Limits | ClipLimits,
    workers: int | Workers,
    drop_duplicates: bool = False,
    min_yield: float = 0.0,
    total: int | None = None,
    label: str = "",
) -> Manifest:
    """Write what the filters keep of ``source``; every row of it ends up written or counted by reason.

    Raises LowYieldError, writing nothing, when less than the share ``min_yield`` of the rows is kept.
    """
    is_duplicate = DuplicateFilter(drop_duplicates)
    with writer:
        checked = ordered_map(partial(_check, limits=limits), source, workers)
        for record, rejections in progress(checked, total, label):
            for rejection in rejections:
                writer.reject(rejection)
            if record is None:
                continue
            record, rejections = is_duplicate(record)
            for rejection in rejections:
                writer.reject(rejection)
            if record is not None:
                writer.add(record)
        _check_yield(writer, min_yield)
    assert writer.manifest is not None
    return writer.manifest


def start_workers(workers: Workers) -> None:
    """Let processes import what ``fill_split`` needs of them while this one does something else."""
    workers.start(_check)


def _check_yield(writer: SplitWriter, min_yield: float) -> None:
    kept, rejected = writer.rows, sum(writer.rejected.values())
    if kept < min_yield * (kept + rejected):
        share = f"{kept} of {kept + rejected} rows are usable ({kept / (kept + rejected):.1%})"
        raise LowYieldError(
            f"only {share}, --min-yield is {min_yield:.1%}: {describe_counts(writer.rejected)}; nothing written; "
            "lower it, or give --restart to download again"
        )


def _check(item: Record | Rejection, limits: Limits | ClipLimits) -> tuple[Record | None, list[Rejection]]:
    return (None, [item]) if isinstance(item, Rejection) else check_record(item, limits)


def progress(items: Iterable, total: int | None, label: str, unit: str = "sample") -> Iterator:
    """A progress bar on a terminal, silence elsewhere."""
    return iter(tqdm(items, total=total, desc=label, unit=unit, disable=not sys.stderr.isatty(), leave=False))


def provenance(source: str, arguments: dict[str, Any], packages: tuple[str, ...] = ("pillow",)) -> dict[str, Any]:
    """Where a split comes from: source, options, versions; no time and no host, so that equal runs give equal bytes."""
    versions = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return {"source": source, "arguments": arguments, "versions": versions}
