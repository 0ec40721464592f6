"""Makes a split of finished parts by renaming their shards; it may be ended anywhere, by anything, and done again."""

from __future__ import annotations

import json
import os
import stat
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from data_prep.corpus_card import MEMBERS, write_card
from data_prep.manifest import MANIFEST_NAME, Manifest, is_split, load_manifest, sync_directory, write_manifest
from data_prep.parts.part import read_part
from data_prep.parts.plan import PLAN_NAME, Plan, drop_plan
from data_prep.passport import PASSPORT, Statistics
from data_prep.record import LowYieldError, PrepError, Rejection
from data_prep.sample_fields import fields_of
from data_prep.shard_table import Shard
from data_prep.shard_writer import REJECTED_NAME, describe_counts, nothing_usable, such_as, what_was_written


def seal(plan: Plan, min_yield: float = 0.0) -> Manifest:
    """The split of a plan whose parts are all made: their shards in order, the manifest last; then drop the plan.

    Several processes may do this at once. Where the plan adds to a split (``plan.base``), its files stay as they are,
    and the manifest is replaced. Raises LowYieldError where less than the share ``min_yield`` of all rows is written,
    PrepError where nothing is, and both leave everything as it was.
    """
    try:
        names, manifest = _result(plan)
    except (OSError, PrepError):
        if is_open(plan):
            raise
        return load_manifest(plan.split_dir)  # another process has sealed it, and has dropped the plan
    _check_yield(plan, manifest, min_yield)
    try:
        if not _holds(plan.split_dir, manifest):
            _fill(plan, names, manifest)
    except (OSError, PrepError):
        if not _holds(plan.split_dir, manifest):  # not by another process meanwhile
            raise
    write_card(plan.split_dir.parent)
    drop_plan(plan.folder)
    return manifest


def is_open(plan: Plan) -> bool:
    """Whether the plan is still there: the process that seals a split drops it."""
    return (plan.folder / PLAN_NAME).is_file()


def _holds(split_dir: Path, manifest: Manifest) -> bool:
    return is_split(split_dir) and load_manifest(split_dir).fingerprint() == manifest.fingerprint()


def _fill(plan: Plan, names: list[tuple[int, Shard, Shard]], manifest: Manifest) -> None:
    target = plan.folder / "split" if plan.base is None else plan.split_dir
    if plan.base is None:
        target.mkdir(exist_ok=True)
    elif not _holds(plan.split_dir, plan.base):
        raise PrepError(f"{plan.split_dir}: changed since its failed URLs were planned; give --restart to plan again")
    for number, shard, final in names:
        _rename(plan.done(number) / shard.file, target / final.file, shard.bytes)
        _rename(plan.done(number) / shard.index_file, target / final.index_file, None)
    beside = plan.folder / "attempts" / uuid.uuid4().hex
    beside.mkdir()
    with open(beside / REJECTED_NAME, "w", encoding="utf-8") as stream:
        stream.writelines(_rejected_lines(plan))
        stream.flush()
        os.fsync(stream.fileno())
    write_manifest(beside, manifest)
    for name in (REJECTED_NAME, MANIFEST_NAME):
        os.replace(beside / name, target / name)
    sync_directory(target)
    if plan.base is None:
        if plan.replaces is not None and is_split(plan.split_dir):
            if load_manifest(plan.split_dir).fingerprint() == plan.replaces:
                os.rename(plan.split_dir, plan.folder / "replaced")  # of two processes one finds this place taken
        os.rename(target, plan.split_dir)
        sync_directory(plan.split_dir.parent)


def _result(plan: Plan) -> tuple[list[tuple[int, Shard, Shard]], Manifest]:
    """(part, shard as it is in it, shard as it will be called), and the manifest of the split."""
    known = [] if plan.base is None else list(plan.base.shards)
    rejected = Counter(plan.rejected)
    names: list[tuple[int, Shard, Shard]] = []
    statistics, suffixes = _counted_before(plan)
    for number in range(plan.parts):
        part = read_part(plan, number, whole=False)
        rejected.update(part.rejected)
        statistics.merge(part.statistics)
        suffixes.update(part.suffixes)
        for shard in part.shards:
            name = f"{len(known) + len(names):05d}"
            called = {"file": f"{name}.tar", "index_file": f"{name}.index.npy"}
            names.append((number, shard, Shard(**{**vars(shard), **called})))
    shards = (*known, *(final for _, _, final in names))
    recipe = plan.recipe
    content = recipe.provenance | what_was_written(statistics, suffixes)
    manifest = Manifest(recipe.corpus, recipe.split, fields_of(1), shards, dict(sorted(rejected.items())), content)
    if not shards:
        raise nothing_usable(plan.split_dir, manifest.rejected, _examples(plan))
    return names, manifest


def _counted_before(plan: Plan) -> tuple[Statistics, set[str]]:
    """What is counted without the parts: rows given up before the download, and what a split that is added to has."""
    statistics, suffixes = Statistics(), set()
    if plan.base is not None and PASSPORT in plan.base.provenance:
        statistics = Statistics.from_json(plan.base.provenance[PASSPORT])
        statistics.forget_rejections()  # they stand in the plan, but for those that are tried again
        suffixes.update(plan.base.provenance.get(MEMBERS, ()))
    for line in _lines_of(plan.folder):
        statistics.reject(_rejection(line))
    return statistics, suffixes


def _check_yield(plan: Plan, manifest: Manifest, min_yield: float) -> None:
    kept, lost = manifest.rows, sum(manifest.rejected.values())
    if plan.base is None and kept < min_yield * (kept + lost):
        raise LowYieldError(
            f"only {kept} of {kept + lost} rows are usable ({kept / (kept + lost):.1%}), --min-yield is "
            f"{min_yield:.1%}: {describe_counts(manifest.rejected)}{such_as(_examples(plan))}; nothing written; lower "
            "it, or give --restart to download again"
        )


def _examples(plan: Plan) -> dict[str, Rejection]:
    """The first line of what was rejected."""
    for line in _rejected_lines(plan):
        found = _rejection(line)
        return {found.reason: found}
    return {}


def _rejection(line: str) -> Rejection:
    entry = json.loads(line)
    return Rejection(entry["reason"], entry["name"], entry["detail"], entry["rows"])


def _rename(old: Path, new: Path, size: int | None) -> None:
    """Give a file its final name, or find that it has it."""
    try:
        found = os.lstat(old)
        if not stat.S_ISREG(found.st_mode) or size not in (None, found.st_size):
            raise PrepError(f"{old}: not the file that was written; remove {old.parent} to have the part made again")
        os.rename(old, new)
    except FileNotFoundError:
        if not new.is_file() or new.is_symlink():
            raise


def _rejected_lines(plan: Plan) -> Iterator[str]:
    for folder in (plan.folder, *(plan.done(number) for number in range(plan.parts))):
        yield from _lines_of(folder)


def _lines_of(folder: Path) -> Iterator[str]:
    descriptor = os.open(folder / REJECTED_NAME, os.O_RDONLY | os.O_NOFOLLOW)
    with os.fdopen(descriptor, encoding="utf-8") as stream:
        yield from stream
