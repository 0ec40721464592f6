"""Repairs a split: what its new manifest needs is written before it, what only the old one named is moved after it."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.checks.measure import measure_split
from data_prep.checks.tar_walk import sample_starts, walk_headers
from data_prep.checks.verify import DROPPED, Problem, dropped_samples
from data_prep.manifest import (
    Manifest,
    Shard,
    index_columns,
    sync_directory,
    write_atomically,
    write_manifest,
)
from data_prep.npy import load_array
from data_prep.passport import PASSPORT
from data_prep.record import Rejection
from data_prep.repairing.diagnosis import COUNTS_ARE_WRONG, INDEX_IS_LOST, SAMPLE_IS_LOST, SHARD_IS_LOST, Diagnosis
from data_prep.repairing.leftovers import Leftover, find_leftovers
from data_prep.repairing.rebuild import index_bytes, rebuild_index
from data_prep.repairing.rejections import rewrite_rejected

REPAIRS = "repairs"  # in a manifest's provenance: what was done, a repair each
_MOVED = "quarantine.jsonl"  # in quarantine: what was moved there, and why


@dataclass
class _Repair:
    """What a repair of a split changes."""

    shards: list[Shard] = field(default_factory=list)
    rejections: list[Rejection] = field(default_factory=list)
    dropped: dict[str, list[int]] = field(default_factory=dict)
    quarantined: dict[str, str] = field(default_factory=dict)  # file -> why
    lines: list[str] = field(default_factory=list)


def repair_split(diagnosis: Diagnosis, quarantine: Path, workers: int) -> list[str]:
    """Repair what ``examine`` found in a split; returns a line for each thing that was done.

    A kill at any moment leaves a split that reads as the old or the new manifest says, and that can be repaired again.
    Files go to ``quarantine``, none is deleted but those of killed runs. Nothing is written where nothing was found.
    """
    manifest, folder = diagnosis.manifest, diagnosis.split_dir
    if manifest is None or not diagnosis.problems:
        return []
    if manifest.caption_key is not None:
        again = "`python -m data_prep webdataset` with --overwrite takes them in again, as far as they can be read"
        return [f"{folder}: shards of another program, left as they are; {again}"]
    problems: dict[str, list[Problem]] = defaultdict(list)
    for problem in diagnosis.problems:
        problems[problem.shard].append(problem)
    repair = _Repair(dropped={name: list(starts) for name, starts in dropped_samples(manifest).items()})
    for shard in manifest.shards:
        repaired = _repair_shard(folder, manifest, shard, problems[shard.file], quarantine, repair)
        if repaired is not None:
            repair.shards.append(repaired)
    if not repair.shards and manifest.shards:
        return [f"{folder}: no usable shard would be left; nothing changed; prepare the split again"]
    kinds = {problem.kind for problem in diagnosis.problems}
    if repair.shards != list(manifest.shards) or repair.dropped or kinds & COUNTS_ARE_WRONG.keys():
        _commit(folder, manifest, repair, workers)
    _move_strays(folder, repair, quarantine)
    left = {problem.text for problem in diagnosis.problems if problem.kind == "leftover"}
    for leftover in find_leftovers(folder, 0) if left else []:
        repair.lines += clear(leftover, quarantine) if leftover.text in left else []
    return repair.lines


def _repair_shard(
    folder: Path, manifest: Manifest, shard: Shard, problems: list[Problem], quarantine: Path, repair: _Repair
) -> Shard | None:
    """The shard as the new manifest names it, None for one to quarantine. Index files that it needs are written."""
    kinds = {problem.kind for problem in problems}
    if not kinds & {*SHARD_IS_LOST, *INDEX_IS_LOST, *SAMPLE_IS_LOST, "wrong_counts", "appended_data"}:
        return shard
    lost = next((problem for problem in problems if problem.kind in SHARD_IS_LOST), None)
    if lost is not None:
        return _give_up(shard, lost.text, shard.rows, repair)
    if "appended_data" in kinds:
        _cut(folder / shard.file, shard.bytes, quarantine)
        repair.lines.append(f"{folder / shard.file}: cut to the {shard.bytes} bytes of its manifest")
    starts = set(repair.dropped.get(shard.file, ()))
    index = None if kinds & INDEX_IS_LOST.keys() else _load(folder / shard.index_file, manifest)
    if index is None:
        index = rebuild_index(folder / shard.file, manifest.fields, starts)
        if (len(index), _num_samples(index, manifest)) != (shard.rows, shard.samples):
            found = f"{len(index)} rows, {_num_samples(index, manifest)} samples"
            text = f"an index made from it has {found}, its manifest says {shard.rows}, {shard.samples}"
            return _give_up(shard, f"{folder / shard.file}: {text}", shard.rows, repair)
        repair.lines.append(f"{folder / shard.index_file}: made again from its tar")
    index = _without_bad_samples(folder, manifest, shard, index, problems, repair)
    if not len(index):
        return _give_up(shard, f"{folder / shard.file}: no usable sample is left", 0, repair)
    return _write_index(folder, manifest, shard, index)


def _give_up(shard: Shard, why: str, rows: int, repair: _Repair) -> None:
    """Leave a shard out, ``rows`` of which are not counted as rejected by another reason."""
    if rows:
        repair.rejections.append(Rejection("damaged_shard", shard.file, why, rows=rows))
    repair.quarantined |= {shard.file: why, shard.index_file: why}
    repair.dropped.pop(shard.file, None)
    repair.lines.append(f"{shard.file}: taken out of the manifest ({shard.rows} rows)")


def _load(path: Path, manifest: Manifest) -> np.ndarray | None:
    """An index with whatever number of rows; None where it is none of this split."""
    try:
        index = load_array(path)
    except (OSError, ValueError):
        return None
    width = index_columns(manifest.fields).width
    return index if index.dtype == np.int64 and index.ndim == 2 and index.shape[1] == width else None


def _without_bad_samples(
    folder: Path, manifest: Manifest, shard: Shard, index: np.ndarray, problems: list[Problem], repair: _Repair
) -> np.ndarray:
    """The index without the samples of bad rows, each of which is rejected by its reason."""
    bad = {row: problem.reason for problem in problems for row in problem.rows if row < len(index)}
    left_out = {start for problem in problems for start in problem.starts}
    if not bad and not left_out:
        return index
    members = walk_headers(folder / shard.file).members
    start_at = {member.offset: (start, member.key) for member, start in zip(members, sample_starts(members))}
    offsets = list(index_columns(manifest.fields).offset.values())
    samples = [
        next((start_at[place] for place in row if place in start_at), (None, shard.file))
        for row in index[:, offsets].tolist()
    ]
    reasons = {samples[row][0]: reason for row, reason in reversed(bad.items()) if samples[row][0] is not None}
    is_bad = np.array([row in bad or samples[row][0] in reasons for row in range(len(index))], bool)
    rows: Counter[tuple[str, str]] = Counter()
    for row in np.flatnonzero(is_bad).tolist():
        rows[(samples[row][1], bad.get(row) or reasons[samples[row][0]])] += 1
    for (key, reason), count in rows.items():
        repair.rejections.append(Rejection(reason, key, f"found in {shard.file}", rows=count))
        repair.lines.append(f"{folder / shard.file}: sample {key} left out of the index ({reason})")
    kept = {samples[row][0] for row in np.flatnonzero(~is_bad).tolist()}
    gone = ({start for start in (*reasons, *left_out)} | set(repair.dropped.get(shard.file, ()))) - kept
    if gone:
        repair.dropped[shard.file] = sorted(gone)
    return index[~is_bad]


def _write_index(folder: Path, manifest: Manifest, shard: Shard, index: np.ndarray) -> Shard:
    """The shard with this index, which is written where it is not there. Another index has another name: the old one
    is the index of the split until the new manifest is written."""
    content = index_bytes(index)
    digest = hashlib.sha256(content).hexdigest()
    name = shard.index_file if digest == shard.index_sha256 else f"{Path(shard.file).stem}.index.{digest[:8]}.npy"
    path = folder / name
    if path.is_symlink() or not path.is_file() or path.read_bytes() != content:
        write_atomically(path, content)
    samples = _num_samples(index, manifest)
    return replace(shard, index_file=name, index_sha256=digest, rows=len(index), samples=samples)


def _num_samples(index: np.ndarray, manifest: Manifest) -> int:
    """Distinct samples of an index, told apart by the places of all their members."""
    return len(np.unique(index[:, :-1], axis=0))


def _commit(folder: Path, manifest: Manifest, repair: _Repair, workers: int) -> None:
    """Write the rejected records, then the manifest."""
    rejected = rewrite_rejected(folder, manifest, repair.rejections)
    lost = Counter()
    for rejection in repair.rejections:
        lost[rejection.reason] += rejection.rows
    record = {"quarantined": sorted(repair.quarantined), "rejected": dict(sorted(lost.items()))}
    given: dict[str, Any] = {name: value for name, value in manifest.provenance.items() if name != DROPPED}
    before = given.get(REPAIRS)
    given |= {REPAIRS: [*(before if isinstance(before, list) else []), record]}
    if repair.dropped:
        given[DROPPED] = dict(sorted(repair.dropped.items()))
    changed = replace(manifest, shards=tuple(repair.shards), rejected=rejected, provenance=given)
    if PASSPORT in given:
        try:
            given[PASSPORT] = measure_split(folder, changed, workers).as_json()
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            del given[PASSPORT]
            repair.lines.append(f"{folder}: no passport any more ({error}); --decode finds samples that can't be read")
    write_manifest(folder, changed)
    repair.lines.append(f"{folder}: manifest rewritten, {changed.rows} rows, {len(changed.shards)} shards")


def _move_strays(folder: Path, repair: _Repair, quarantine: Path) -> None:
    """Move tars and indexes into quarantine that the manifest does not name any more, or never did."""
    named = {name for shard in repair.shards for name in (shard.file, shard.index_file)}
    for path in sorted([*folder.glob("*.tar"), *folder.glob("*.npy")]):
        if path.name not in named and not path.is_dir():
            why = repair.quarantined.get(path.name, "not named by the manifest")
            repair.lines.append(f"{path}: moved to {move_away(path, quarantine, why)}")


def _cut(path: Path, size: int, quarantine: Path) -> None:
    """Replace a file by its first ``size`` bytes; the file itself is kept in quarantine."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(path, "rb") as source, open(beside, "wb") as stream:
            while size and (content := source.read(min(size, 1 << 20))):
                size -= len(content)
                stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        quarantine.mkdir(parents=True, exist_ok=True)
        kept = _free_name(quarantine / path.name)
        try:
            os.link(path, kept)
        except OSError:  # another file system, or one without links
            shutil.copyfile(path, kept)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def clear(leftover: Leftover, quarantine: Path) -> list[str]:
    """Do with a leftover what its kind says; a line for what was done."""
    path = leftover.path
    if leftover.kind == "leftover":
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        return [f"{path}: removed"]
    if leftover.kind == "unpublished" and not leftover.split_dir.exists():
        os.rename(path, leftover.split_dir)
        sync_directory(path.parent)
        return [f"{path}: put in its place, {leftover.split_dir}"]
    if leftover.kind == "superseded":
        return [f"{path}: moved to {move_away(path, quarantine, leftover.text)}"]
    return []


def move_away(path: Path, quarantine: Path, why: str) -> Path:
    """Move a file or folder into quarantine, note why there, and return where it is; nothing there is replaced."""
    quarantine.mkdir(parents=True, exist_ok=True)
    target = _free_name(quarantine / path.name)
    with open(quarantine / _MOVED, "a", encoding="utf-8") as stream:
        stream.write(json.dumps({"file": target.name, "from": path.parent.name, "why": why}) + "\n")
    try:
        os.rename(path, target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        beside = target.with_name(f".{target.name}.{os.getpid()}")
        shutil.copytree(path, beside, symlinks=True) if path.is_dir() else shutil.copy2(
            path, beside, follow_symlinks=False
        )
        os.rename(beside, target)
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    sync_directory(path.parent)
    return target


def _free_name(path: Path) -> Path:
    number, free = 0, path
    while os.path.lexists(free):
        number += 1
        free = path.with_name(f"{path.name}.{number}")
    return free
