"""Verifies a split against its manifest: hashes, counts, offsets, names, texts, images."""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.filters import Limits, check_image
from data_prep.images import ImageProblem
from data_prep.manifest import (
    Manifest,
    ManifestError,
    Shard,
    file_sha256,
    index_columns,
    open_index,
    read_manifest,
)
from data_prep.parallel import ordered_map
from data_prep.prepare import progress
from data_prep.shard_members import in_own_form, key_and_suffix, row_text, safe_key
from data_prep.video.decoding import ClipLimits, check_clip

_DECODED = ("image", "video")  # beginnings of the fields that are


@dataclass
class Findings:
    """Results of a verification; ``problems`` are lines ``FILE: found, expected``."""

    rows: int = 0
    samples: int = 0
    images: int = 0
    problems: list[str] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)


def verify_split(split_dir: Path, limits: Limits, workers: int) -> Findings:
    """Check one split completely; a defect is a line in ``problems``, never an exception."""
    total = Findings()
    try:
        manifest = read_manifest(split_dir)
    except ManifestError as error:
        total.problems.append(str(error))
        return total
    check = partial(verify_shard, split_dir, replace(manifest, shards=()), limits)  # what travels with each shard
    for found in progress(ordered_map(check, manifest.shards, workers, 1), len(manifest.shards), "verifying", "shard"):
        total.rows += found.rows
        total.samples += found.samples
        total.images += found.images
        total.problems += found.problems
        total.keys += found.keys
    for key, count in Counter(total.keys).items():
        if count > 1:
            total.problems.append(f"{split_dir}: key {key} occurs {count} times")
    listed = {name for shard in manifest.shards for name in (shard.file, shard.index_file)}
    for path in sorted([*split_dir.glob("*.tar"), *split_dir.glob("*.npy")]):
        if path.name not in listed:
            total.problems.append(f"{path}: not named by the manifest")
    return total


def verify_shard(split_dir: Path, manifest: Manifest, limits: Limits, shard: Shard) -> Findings:
    """Check one tar with its index; of ``manifest`` the shards are not asked for."""
    found = Findings()
    path = split_dir / shard.file
    for name, expected in ((shard.file, shard.sha256), (shard.index_file, shard.index_sha256)):
        if file_sha256(split_dir / name) != expected:
            found.problems.append(f"{split_dir / name}: its SHA-256 is not the one of the manifest: changed or damaged")
    is_foreign = manifest.caption_key is not None
    try:
        index = np.array(open_index(split_dir, manifest, shard))
        members = _foreign_members(path) if is_foreign else _members(path, found.problems)
    except (ManifestError, tarfile.TarError, EOFError, OSError) as error:
        found.problems.append(f"{path}: {error}")
        return found
    found.rows = len(index)
    found.keys = [] if is_foreign else list(dict.fromkeys(key for key, _, _ in members.values()))
    found.samples = len(np.unique(index[:, 0])) if is_foreign else len(found.keys)
    if found.samples != shard.samples:
        found.problems.append(f"{path}: {found.samples} samples, its manifest says {shard.samples}")
    with open(path, "rb") as stream:
        _check_rows(path, stream, index, members, manifest, limits, found)
    return found


def _members(path: Path, problems: list[str]) -> dict[int, tuple[str, str, int]]:
    """Data offset -> (key, extension, size) of every member, in tar order."""
    members: dict[int, tuple[str, str, int]] = {}
    names: Counter[str] = Counter()
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            key, _, extension = member.name.partition(".")
            names[member.name] += 1
            if not member.isreg():
                problems.append(f"{path}: member {member.name!r} is not a plain file")
            elif key != safe_key(key):
                problems.append(f"{path}: member {member.name!r} has an unsafe name")
            else:
                members[member.offset_data] = (key, extension, member.size)
    problems += [f"{path}: member {name!r} occurs {count} times" for name, count in names.items() if count > 1]
    return members


def _foreign_members(path: Path) -> dict[int, tuple[str, str, int]]:
    """As ``_members``, of another program's tar: what no row names is no problem there, whatever it is."""
    with tarfile.open(path, "r:") as tar:
        named = ((member, key_and_suffix(member.name)) for member in tar if member.isreg())
        return {member.offset_data: (*found, member.size) for member, found in named if found is not None}


def _check_rows(
    path: Path,
    stream: io.BufferedReader,
    index: np.ndarray,
    members: dict[int, tuple[str, str, int]],
    manifest: Manifest,
    limits: Limits,
    found: Findings,
) -> None:
    columns = index_columns(manifest.fields)
    decoded: set[int] = set()
    used: set[int] = set()
    for number, row in enumerate(index.tolist()):
        where = f"{path.name} row {number}"
        contents: dict[str, bytes] = {}
        keys = set()
        for name in manifest.fields:
            offset, size = row[columns.offset[name]], row[columns.size[name]]
            if offset == -1 and size == -1:
                continue
            member = members.get(offset)
            if member is None or member[2] != size:
                found.problems.append(f"{where}: {name} at {offset} with {size} bytes is no member of the tar")
                continue
            keys.add(member[0])
            used.add(offset)
            if name.startswith(_DECODED) and offset in decoded:
                continue
            stream.seek(offset)
            contents[name] = stream.read(size)
            if name.startswith(_DECODED):
                decoded.add(offset)
        if len(keys) > 1:
            found.problems.append(f"{where}: mixes the samples {sorted(keys)}")
        _check_contents(where, contents, row[columns.caption], manifest.caption_key, limits, found)
    for offset, (key, extension, _) in members.items():
        if offset not in used and manifest.caption_key is None:
            found.problems.append(f"{path}: member {key}.{extension} is in no row of the index")


def _check_contents(
    where: str, contents: dict[str, bytes], caption: int, caption_key: str | None, limits: Limits, found: Findings
) -> None:
    for name, content in contents.items():
        if not name.startswith(_DECODED):
            continue
        found.images += 1
        try:
            if name == "video":
                check_clip(content, ClipLimits())
            else:
                check_image(content, limits)
        except ImageProblem as error:
            found.problems.append(f"{where}: {name}: {error}")
    try:
        meta: Any = json.loads(contents["meta"]) if "meta" in contents else None
        text = contents["text"].decode() if "text" in contents else None
        if meta is not None and not isinstance(meta, dict):
            raise ValueError(f"JSON member holds {type(meta).__name__}, expected an object")
        if not row_text(text, in_own_form(meta, text, caption_key), caption).strip():
            raise ValueError("empty caption")
    except (ValueError, RecursionError) as error:
        found.problems.append(f"{where}: {error}")
