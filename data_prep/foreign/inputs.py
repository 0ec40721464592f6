"""Finds the shards of another program: which tars, under which names, and what their writer says of them."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_prep.manifest import MANIFEST_NAME
from data_prep.record import PrepError

_COMPRESSED = {  # how such a file begins -> what unpacks it
    b"\x1f\x8b": "gzip; run `gunzip` on it",
    b"BZh": "bzip2; run `bunzip2` on it",
    b"\xfd7zXZ\0": "xz; run `unxz` on it",
    b"\x28\xb5\x2f\xfd": "zstandard; run `unzstd` on it",
}
_COMPRESSED_NAMES = (".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")


def find_shards(inputs: Sequence[Path]) -> dict[str, Path]:
    """Name in the split -> file, for the tars that are given or lie in the folders given, at any depth.

    A name is the file's own, with the folders before it where two files have the same. Hidden files and folders are
    passed over. Raises PrepError for a compressed tar, for a split of ours, and where there is no tar.
    """
    files = [file for path in inputs for file in (_tars(path) if path.is_dir() else [path])]
    if not files:
        raise PrepError(f"{', '.join(map(str, inputs))}: no .tar in it; give the shards, or their folder, by --input")
    for file in files:
        _check_tar(file)
    resolved = [file.resolve() for file in files]
    twice = next((file for file, count in Counter(resolved).items() if count > 1), None)
    if twice is not None:
        raise PrepError(f"{twice}: given twice; give each shard once")
    shards = dict(sorted(zip(_distinct_names(files), files)))
    odd = next((file for name, file in shards.items() if not name.isprintable()), None)
    if odd is not None:
        raise PrepError(f"{ascii(str(odd))}: a name with signs that can't be printed; call the shard otherwise")
    return shards


def _tars(folder: Path) -> list[Path]:
    found, compressed = [], []
    for above, folders, names in os.walk(folder, followlinks=True):
        if MANIFEST_NAME in names:
            raise PrepError(f"{above}: a prepared split already; training reads it as it is (--data {above})")
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        visible = sorted(name for name in names if not name.startswith("."))
        found += [Path(above) / name for name in visible if name.endswith(".tar")]
        compressed += [Path(above) / name for name in visible if name.endswith(_COMPRESSED_NAMES)]
    if compressed:
        raise PrepError(f"{compressed[0]}: a compressed tar, in which no sample can be found by its place; unpack it")
    return found


def _check_tar(file: Path) -> None:
    try:
        with open(file, "rb") as stream:
            begin = stream.read(8)
    except OSError as error:
        raise PrepError(f"{file}: {error.strerror}; give tars, or folders of them, by --input") from error
    for magic, advice in _COMPRESSED.items():
        if begin.startswith(magic):
            raise PrepError(f"{file}: found {advice}, expected a tar that is not compressed")


def _distinct_names(files: list[Path]) -> list[str]:
    """File names, with as many folders before them as tell them apart."""
    for depth in range(1, 1 + max(len(file.parts) for file in files)):
        names = ["_".join(file.absolute().parts[-depth:]).replace("/", "_") for file in files]
        if len(set(names)) == len(names):
            return [name if name.endswith(".tar") else f"{name}.tar" for name in names]
    raise AssertionError(files)  # absolute names differ


def download_statistics(files: Sequence[Path]) -> dict[str, Any]:
    """What img2dataset wrote beside its shards (NUMBER_stats.json), added up: URLs tried, downloaded, failures by
    message; nothing where there are no such files."""
    total: Counter[str] = Counter()
    messages: Counter[str] = Counter()
    for file in files:
        try:
            stats = json.loads(file.with_name(f"{file.stem}_stats.json").read_bytes())
            found = {"urls": int(stats["count"]), "downloaded": int(stats["successes"])}
            failures = {str(message): int(count) for message, count in stats["status_dict"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):  # none of img2dataset's
            continue
        total.update(found)
        messages.update(failures)
    failed = {message: count for message, count in messages.most_common(20) if message != "success"}
    return {"downloads": {**total, "failures": failed}} if total else {}
