"""Verifies a split against its manifest: hashes, counts, offsets, names, texts, images."""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_prep.checks.tar_walk import Member, Walk, sample_starts, walk_headers, walk_tar
from data_prep.filters import Limits, check_image
from data_prep.images import ImageProblem
from data_prep.listed_files import wrong_with
from data_prep.manifest import (
    IndexColumns,
    Manifest,
    ManifestError,
    Shard,
    file_sha256,
    index_columns,
    load_manifest,
    open_index,
)
from data_prep.parallel import ordered_map
from data_prep.prepare import progress
from data_prep.shard_members import in_own_form, row_text
from data_prep.video.decoding import ClipLimits, check_clip

DROPPED = "dropped"  # in a manifest's provenance: shard -> where samples begin that ``doctor`` took out of its index
_DECODED = ("image", "video")  # beginnings of the fields that are
_DAMAGED = "damaged_sample"
_SAFE_KEY = re.compile("[A-Za-z0-9_-]{1,80}")  # what filters.safe_key leaves as it is


class Problem(NamedTuple):
    """A defect: ``text`` is a line ``FILE: found, expected``, ``kind`` one of those of ``doctor``.

    ``rows`` are those of the index of ``shard`` that can't be used, for ``reason`` (a word of filters.REASONS);
    ``starts`` say where samples begin in the tar (``sample_starts``) that stand there although no row reads them.
    """

    kind: str
    text: str
    shard: str = ""
    rows: tuple[int, ...] = ()
    reason: str = ""
    starts: tuple[int, ...] = ()


@dataclass
class Findings:
    """Results of a verification; ``keys`` are 64-bit digests of the samples' keys, uint64 [samples]."""

    rows: int = 0
    samples: int = 0
    images: int = 0
    found: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    keys: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))

    @property
    def problems(self) -> list[str]:
        """The defects as lines."""
        return [problem.text for problem in self.found]


def verify_split(split_dir: Path, limits: Limits | None, workers: int) -> Findings:
    """Check one split completely; a defect is a line in ``problems``, never an exception. See ``verify_shard``."""
    try:
        manifest = load_manifest(split_dir)
    except ManifestError as error:
        return Findings(found=[Problem("no_manifest", str(error))])
    return verify_files(split_dir, manifest, limits, workers)


def verify_files(split_dir: Path, manifest: Manifest, limits: Limits | None, workers: int) -> Findings:
    """Check all files of a split whose manifest is known, and that no key comes twice."""
    total, keys = Findings(), []
    check = partial(verify_shard, split_dir, replace(manifest, shards=()), limits)  # what travels with each shard
    for found in progress(ordered_map(check, manifest.shards, workers, 1), len(manifest.shards), "verifying", "shard"):
        total.rows += found.rows
        total.samples += found.samples
        total.images += found.images
        total.found += found.found
        total.notes += found.notes
        keys.append(found.keys)
    total.found += _repeated_keys(split_dir, manifest, keys)
    listed = {name for shard in manifest.shards for name in (shard.file, shard.index_file)}
    for path in sorted([*split_dir.glob("*.tar"), *split_dir.glob("*.npy")]):
        if path.name not in listed:
            kind = "orphaned_index" if path.suffix == ".npy" else "stray_file"
            total.found.append(Problem(kind, f"{path}: not named by the manifest"))
    return total


def verify_shard(split_dir: Path, manifest: Manifest, limits: Limits | None, shard: Shard) -> Findings:
    """Check one tar with its index; of ``manifest`` the shards are not asked for. Without ``limits`` headers, sizes and
    hashes only: no text is read and nothing is decoded."""
    found = Findings()
    path = split_dir / shard.file
    report = lambda kind, text, where=path: found.found.append(Problem(kind, f"{where}: {text}", shard.file))  # noqa: E731
    index = _checked_index(split_dir, manifest, shard, report)
    if (wrong := wrong_with(str(path), None)) is not None:
        report("link_out" if wrong.startswith("a link") else "missing_shard", wrong)
        return found
    try:
        walk = walk_tar(path, shard.bytes)
    except OSError as error:
        report("missing_shard", f"cannot be read ({error.strerror})")
        return found
    is_sound = walk.sha256 == shard.sha256
    if not is_sound and walk.bytes > shard.bytes and walk.prefix_sha256 == shard.sha256:
        report("appended_data", f"{walk.bytes - shard.bytes} bytes after the {shard.bytes} of its manifest")
    elif not is_sound and walk.bytes < shard.bytes:
        report("truncated_shard", f"{walk.bytes} bytes, its manifest says {shard.bytes}: truncated or changed")
    elif not is_sound:
        report("changed_shard", "its SHA-256 is not the one of the manifest: changed or damaged")
    for kind, text in walk.problems:
        if kind == "trailing_data" and manifest.caption_key is not None:  # said when another program's tar was taken in
            found.notes.append(f"{path}: {text}")
        else:
            report(kind, text)
    found.notes += [f"{path}: {note}" for note in walk.notes]
    if index is None:
        return found
    found.rows = len(index)
    dropped = set(dropped_samples(manifest).get(shard.file, ()))
    bad_rows = _check_places(path, index, walk, manifest, dropped, found)
    if found.samples != shard.samples:
        report("wrong_counts", f"{found.samples} samples, its manifest says {shard.samples}")
    if limits is not None:
        with open(path, "rb") as stream:
            _check_rows(path.name, stream, index, bad_rows, manifest, limits, found)
    return found


def dropped_samples(manifest: Manifest) -> dict[str, list[int]]:
    """Shard -> where the samples begin that are left out of its index; anything else counts as nothing."""
    given = manifest.provenance.get(DROPPED)
    found = given.items() if isinstance(given, dict) else ()
    return {
        name: starts
        for name, starts in found
        if isinstance(starts, list) and all(type(start) is int for start in starts)
    }


def _checked_index(split_dir: Path, manifest: Manifest, shard: Shard, report: Any) -> np.ndarray | None:
    """The index, int64 [rows, width], or None where it is not one; one of other counts is returned nevertheless."""
    path = split_dir / shard.index_file
    if (wrong := wrong_with(str(path), None)) is not None:
        report("missing_index", wrong, path)
        return None
    try:
        is_sound = file_sha256(path) == shard.index_sha256
        if not is_sound:
            report("changed_index", "its SHA-256 is not the one of the manifest: changed or damaged", path)
        return np.array(open_index(split_dir, manifest, shard))
    except OSError as error:
        report("missing_index", f"cannot be read ({error.strerror})", path)
    except ManifestError as error:
        report("wrong_counts" if is_sound else "bad_index", str(error).removeprefix(f"{path}: "), path)
    return None


def _check_places(
    path: Path, index: np.ndarray, walk: Walk, manifest: Manifest, dropped: set[int], found: Findings
) -> set[int]:
    """Compare the places that rows name with the members of the tar; returns the rows that can't be read."""
    columns, members = index_columns(manifest.fields), walk.members
    offsets = np.array([member.offset for member in members], np.int64)
    sizes = np.array([member.size for member in members], np.int64)
    numbers: dict[str, int] = {}
    keys = np.array([numbers.setdefault(member.key, len(numbers)) for member in members], np.int64)
    names, used, bad = list(numbers), np.zeros(len(members), bool), set()
    key_of = np.full(len(index), -1, np.int64)
    first_member = np.full(len(index), -1, np.int64)
    for name in manifest.fields:
        offset, size = index[:, columns.offset[name]], index[:, columns.size[name]]
        place = np.searchsorted(offsets, offset).clip(max=max(0, len(members) - 1))
        is_absent = (offset == -1) & (size == -1)
        fits = (offsets[place] == offset) & (sizes[place] == size) if len(members) else np.zeros(len(index), bool)
        for row in np.flatnonzero(~(fits | is_absent)).tolist():
            text = f"{path.name} row {row}: {name} at {offset[row]} with {size[row]} bytes is no member of the tar"
            found.found.append(Problem("bad_row", text, path.name, (row,), _DAMAGED))
            bad.add(row)
        fits &= ~is_absent
        used[place[fits]] = True
        mixed = fits & (key_of >= 0) & (key_of != (keys[place] if len(members) else -1))
        for row in np.flatnonzero(mixed).tolist():
            mixes = sorted({names[key_of[row]], names[keys[place[row]]]})
            text = f"{path.name} row {row}: mixes the samples {mixes}"
            found.found.append(Problem("bad_row", text, path.name, (row,), _DAMAGED))
            bad.add(row)
        is_first = fits & (key_of < 0)
        if len(members):
            key_of[is_first], first_member[is_first] = keys[place[is_first]], place[is_first]
    if manifest.caption_key is not None:  # another program's tar: what no row names is no problem there, whatever it is
        found.samples = len(np.unique(index[:, 0]))
        return bad
    bad |= _check_members(path, walk, used, dropped, key_of, keys, first_member, found)
    of_samples = [names[number] for number in dict.fromkeys(key_of[key_of >= 0].tolist())]
    found.samples = len(of_samples)
    found.keys = np.array([_digest(key) for key in of_samples], np.uint64)
    return bad


def _check_members(
    path: Path,
    walk: Walk,
    used: np.ndarray,
    dropped: set[int],
    key_of: np.ndarray,
    keys: np.ndarray,
    first_member: np.ndarray,
    found: Findings,
) -> set[int]:
    """Check the members by themselves: names, kinds, repeats, and that each is in a row. Returns bad rows."""
    bad: set[int] = set()
    members = walk.members
    unsafe = {key for key in {member.key for member in members} if not _SAFE_KEY.fullmatch(key)}
    odd = [n for n, member in enumerate(members) if not used[n] or member.kind != "file" or member.key in unsafe]
    starts = sample_starts(members) if odd else []
    rows_of = _Groups(key_of)
    for number in odd:
        member, start = members[number], starts[number]
        rows = tuple(rows_of[int(keys[number])].tolist()) if used[number] else ()
        if not rows and start in dropped:
            continue
        if member.kind != "file":
            kind, text = "not_a_file", f"is not a plain file ({member.kind})"
        elif member.key in unsafe:
            kind, text = "unsafe_name", "has an unsafe name"
        else:
            kind, text = "unindexed_member", "is in no row of the index"
        text = f"{path}: member {ascii(member.name)} {text}"
        found.found.append(Problem(kind, text, path.name, rows, _DAMAGED, (start,)))
        bad.update(rows)
    found.found += _repeated_in(path, members, key_of, first_member)
    return bad


def _repeated_in(path: Path, members: list[Member], key_of: np.ndarray, first_member: np.ndarray) -> Iterator[Problem]:
    """A problem for each key under which rows lead to several samples of a tar."""
    samples = np.unique(np.stack([key_of, first_member]), axis=1)[0]
    numbers, counts = np.unique(samples[samples >= 0], return_counts=True)
    repeated = numbers[counts > 1].tolist()
    names = Counter(member.name for member in members) if repeated else Counter()
    rows_of = _Groups(key_of)
    for key in repeated:
        rows = rows_of[key]
        later = rows[first_member[rows] != first_member[rows[0]]]
        name = members[first_member[rows[0]]].name
        text = f"{path}: member {ascii(name)} occurs {max(2, names[name])} times"
        yield Problem("duplicate_key", text, path.name, tuple(later.tolist()), "duplicate_key")


class _Groups:
    """Where each value stands in an array, found by bisection."""

    def __init__(self, values: np.ndarray) -> None:
        self._order = np.argsort(values, kind="stable")
        self._sorted = values[self._order]

    def __getitem__(self, value: int) -> np.ndarray:
        left, right = np.searchsorted(self._sorted, [value, value + 1])
        return self._order[left:right]


def _digest(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest())


def _repeated_keys(split_dir: Path, manifest: Manifest, keys: list[np.ndarray]) -> Iterator[Problem]:
    """A problem for each shard and key that an earlier shard has: 8 bytes of memory a sample, names read again."""
    digests = np.concatenate([np.empty(0, np.uint64), *keys])
    values, counts = np.unique(digests, return_counts=True)
    repeated = {int(value): int(count) for value, count in zip(values[counts > 1], counts[counts > 1])}
    seen: set[str] = set()
    for number, own in enumerate(keys):
        if not repeated or not np.isin(own, np.array(list(repeated), np.uint64)).any():
            continue
        shard = manifest.shards[number]
        for key, rows in rows_by_key(split_dir, manifest, shard).items():
            if (count := repeated.get(_digest(key))) is None:
                continue
            if key in seen:
                text = f"{split_dir}: key {key} occurs {count} times, here in {shard.file}"
                yield Problem("duplicate_key", text, shard.file, tuple(rows), "duplicate_key")
            seen.add(key)


def rows_by_key(split_dir: Path, manifest: Manifest, shard: Shard) -> dict[str, list[int]]:
    """The rows of a shard's index by the key of their sample; raises ManifestError, OSError."""
    columns = index_columns(manifest.fields)
    key_at = {member.offset: member.key for member in walk_headers(split_dir / shard.file).members}
    rows: dict[str, list[int]] = defaultdict(list)
    for number, row in enumerate(open_index(split_dir, manifest, shard).tolist()):
        key = next((key_at[row[at]] for at in columns.offset.values() if row[at] in key_at), None)
        if key is not None:
            rows[key].append(number)
    return rows


def _check_rows(
    name: str,
    stream: io.BufferedReader,
    index: np.ndarray,
    bad_rows: set[int],
    manifest: Manifest,
    limits: Limits,
    found: Findings,
) -> None:
    """Read the texts of each row and decode each image once."""
    columns = index_columns(manifest.fields)
    decoded: dict[int, list[int]] = {}  # offset -> rows
    wrong: dict[int, tuple[str, str]] = {}  # offset of an image that can't be used -> (what is wrong, reason)
    for number, row in enumerate(index.tolist()):
        if number in bad_rows:
            continue
        contents = _contents(stream, row, columns, decoded)
        for offset, (field_name, content) in contents.items():
            if not field_name.startswith(_DECODED):
                continue
            found.images += 1
            try:
                check_clip(content, ClipLimits()) if field_name == "video" else check_image(content, limits)
            except ImageProblem as error:
                wrong[offset] = (f"{name} row {number}: {field_name}: {error}", error.reason)
        for field_name, at in columns.offset.items():
            if field_name.startswith(_DECODED) and row[at] >= 0:
                decoded.setdefault(row[at], []).append(number)
        texts = {field_name: content for field_name, content in contents.values() if field_name in ("text", "meta")}
        _check_texts(f"{name} row {number}", name, number, texts, row[columns.caption], manifest.caption_key, found)
    for offset, (text, reason) in wrong.items():
        found.found.append(Problem("undecodable_image", text, name, tuple(decoded[offset]), reason))


def _contents(
    stream: io.BufferedReader, row: list[int], columns: IndexColumns, decoded: dict[int, Any]
) -> dict[int, tuple[str, bytes]]:
    """Offset -> (field, content) of a row, without images that were decoded before."""
    contents: dict[int, tuple[str, bytes]] = {}
    for name, at in columns.offset.items():
        if row[at] >= 0 and not (name.startswith(_DECODED) and row[at] in decoded):
            stream.seek(row[at])
            contents[row[at]] = (name, stream.read(row[columns.size[name]]))
    return contents


def _check_texts(
    where: str,
    shard: str,
    row: int,
    contents: dict[str, bytes],
    caption: int,
    caption_key: str | None,
    found: Findings,
) -> None:
    try:
        meta: Any = json.loads(contents["meta"]) if "meta" in contents else None
        text = contents["text"].decode() if "text" in contents else None
        if meta is not None and not isinstance(meta, dict):
            raise ValueError(f"JSON member holds {type(meta).__name__}, expected an object")
        if not row_text(text, in_own_form(meta, text, caption_key), caption).strip():
            found.found.append(Problem("bad_text", f"{where}: empty caption", shard, (row,), "empty_caption"))
    except (ValueError, RecursionError) as error:
        found.found.append(Problem("bad_text", f"{where}: {error}", shard, (row,), _DAMAGED))
