"""Finds out what is wrong with prepared data: names each defect, what is broken by it and what a repair would do."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from data_prep.checks.verify import Findings, Problem, verify_files
from data_prep.filters import Limits
from data_prep.manifest import MANIFEST_NAME, Manifest, ManifestError, is_split, load_manifest, parse_manifest
from data_prep.repairing.leftovers import Leftover, find_leftovers
from data_prep.repairing.rejections import check_rejected

_OPENING = "training refuses to open the split"
_LIES = "its samples can't be trusted, and training refuses to open the split where the size differs"
_NO_TAR = "no reader of tars gets its samples"
_OUT = "takes the shard out of the manifest and moves it into quarantine"
_REBUILD = "rebuilds the index from the tar, or quarantines the shard where that gives other counts"
_DROP = "takes its sample out of the index and counts it as rejected"
_LEAVES = "nothing"


class Kind(NamedTuple):
    """What a kind of problem breaks, and what ``--repair`` does about it."""

    breaks: str
    repair: str


SHARD_IS_LOST = {
    "missing_shard": Kind(_OPENING, "takes the shard out of the manifest"),
    "link_out": Kind("a reader would open a file outside the split; " + _OPENING, _OUT),
    "truncated_shard": Kind(_OPENING, _OUT),
    "changed_shard": Kind(_LIES, _OUT),
    "empty_shard": Kind(_NO_TAR, _OUT),
    "not_a_tar": Kind(_NO_TAR, _OUT),
    "compressed_shard": Kind("samples can't be read by their offsets", _OUT),
    "broken_header": Kind(_NO_TAR + " after that place", _OUT),
    "sparse_member": Kind("offsets do not lead to the content", _OUT),
    "too_many_members": Kind("its index would not fit into memory", _OUT),
}
INDEX_IS_LOST = {
    "missing_index": Kind(_OPENING, _REBUILD),
    "changed_index": Kind("rows may lead to other samples", _REBUILD),
    "bad_index": Kind("no row of the shard can be read", _REBUILD),
}
SAMPLE_IS_LOST = {
    "bad_row": Kind("training skips the row", _DROP),
    "undecodable_image": Kind("training skips the row", _DROP),
    "bad_text": Kind("training skips the row", _DROP),
    "unsafe_name": Kind("training skips the row; extracting the tar would write elsewhere", _DROP),
    "not_a_file": Kind("training skips the row; extracting the tar may write elsewhere", _DROP),
    "duplicate_key": Kind("readers by key mix two samples", _DROP + "; the first of them stays"),
    "unindexed_member": Kind("no row reads it; other programs do", "notes that the sample is left out"),
}
COUNTS_ARE_WRONG = {
    "wrong_counts": Kind(_OPENING, "counts again"),
    "wrong_totals": Kind(_OPENING, "counts again"),
    "rejected_tail": Kind("counts of lost rows", "cuts the lines that a killed repair had added"),
    "rejected_counts": Kind("rows read = written + rejected does not hold by name", "adds lines for what has no name"),
    "rejected_damaged": Kind("names of rejected rows are lost", "keeps what can be read, adds lines for the rest"),
}
FILE_IS_STRAY = {
    "appended_data": Kind(_OPENING, "moves the file into quarantine and keeps a copy that ends where it should"),
    "stray_file": Kind("other programs that take all tars read it", "moves it into quarantine"),
    "orphaned_index": Kind("nothing; it takes room", "moves it into quarantine"),
    "leftover": Kind("nothing; it takes room", "removes it"),
    "superseded": Kind("nothing; it takes room", "moves it into quarantine"),
    "unpublished": Kind("the split is missing", "puts it in its place"),
}
IS_LEFT = {
    "no_manifest": Kind("no program opens the folder", _LEAVES + ": prepare the split again"),
    "trailing_data": Kind("other readers stop before it", _LEAVES + ": the shard is as it was written"),
    "unreadable": Kind("the split can't be checked further", _LEAVES),
}
KINDS = {**SHARD_IS_LOST, **INDEX_IS_LOST, **SAMPLE_IS_LOST, **COUNTS_ARE_WRONG, **FILE_IS_STRAY, **IS_LEFT}


@dataclass
class Diagnosis:
    """What was found in one split; without a readable manifest nothing but that."""

    split_dir: Path
    manifest: Manifest | None
    findings: Findings = field(default_factory=Findings)

    @property
    def problems(self) -> list[Problem]:
        return self.findings.found


def examine(split_dir: Path, limits: Limits | None, workers: int, min_age_seconds: float = 3600) -> Diagnosis:
    """Everything that is wrong with a split; without ``limits`` by headers, sizes and hashes, nothing decoded."""
    manifest, problem = _manifest_of(split_dir)
    if manifest is None:
        return Diagnosis(split_dir, None, Findings(found=[problem]))
    try:
        findings = verify_files(split_dir, manifest, limits, workers)
    except (ManifestError, OSError) as error:  # keys that repeat are read again
        findings = Findings(found=[Problem("unreadable", f"{split_dir}: {error}")])
    findings.found = _causes(findings.found)
    if problem is not None:
        findings.found.append(problem)
    if (wrong := check_rejected(split_dir, manifest)) is not None:
        findings.found.append(Problem(*wrong))
    findings.found += [Problem(one.kind, one.text) for one in find_leftovers(split_dir, min_age_seconds)]
    return Diagnosis(split_dir, manifest, findings)


def _causes(problems: list[Problem]) -> list[Problem]:
    """Without what follows from other problems: rows of a lost index or shard, an end that has data after it."""
    lost = {one.shard for one in problems if one.kind in SHARD_IS_LOST}
    no_index = lost | {one.shard for one in problems if one.kind in INDEX_IS_LOST}
    appended = {one.shard for one in problems if one.kind == "appended_data"}
    follows = {kind: no_index for kind in (*SAMPLE_IS_LOST, "wrong_counts")}
    follows |= {kind: lost for kind in INDEX_IS_LOST} | {"trailing_data": appended | lost}
    return [one for one in problems if one.shard == "" or one.shard not in follows.get(one.kind, ())]


def _manifest_of(split_dir: Path) -> tuple[Manifest | None, Problem | None]:
    """The manifest and what is wrong with it; one whose totals alone are wrong is read nevertheless."""
    try:
        return load_manifest(split_dir), None
    except ManifestError as error:
        problem = str(error)
    path = split_dir / MANIFEST_NAME
    try:
        content = json.loads(path.read_bytes())
        totals = {name: sum(shard[name] for shard in content["shards"]) for name in ("rows", "samples")}
        return parse_manifest(path, {**content, **totals}), Problem("wrong_totals", problem)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):  # ManifestError is a ValueError
        return None, Problem("no_manifest", problem)


def split_folders(path: Path) -> list[Path]:
    """Every folder at or below ``path`` (a split, a corpus, a root of corpora) with a manifest, tars or indexes."""
    below = _visible_folders(path)
    folders = [path, *below, *(deeper for folder in below for deeper in _visible_folders(folder))]
    return [folder for folder in folders if is_split(folder) or _holds_shards(folder)]


def leftovers_below(path: Path, min_age_seconds: float) -> list[Leftover]:
    """What killed preparations left beside the splits of ``path``; of a split what is of that split."""
    if is_split(path):
        return find_leftovers(path.absolute().parent, min_age_seconds, path.absolute().name)
    folders = [path, *(folder for folder in _visible_folders(path) if not is_split(folder))]
    return [one for folder in folders for one in find_leftovers(folder, min_age_seconds)]


def _visible_folders(path: Path) -> list[Path]:
    if is_split(path):
        return []
    with os.scandir(path) as entries:
        return sorted(path / entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def _holds_shards(folder: Path) -> bool:
    with os.scandir(folder) as entries:
        return any(entry.name.endswith((".tar", ".index.npy")) for entry in entries)
