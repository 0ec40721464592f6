"""Local copies of what programs can only read from a disk: tokenizers, lists, tables."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from data_prep.stores.address import Address
from data_prep.stores.failures import StoreError
from data_prep.stores.kept_files import files_folder
from data_prep.stores.requests import CHUNK_BYTES, details_of, entries_of, lists_folders, read_range

_DESCRIBED = (".parquet", ".tsv", ".csv", ".jsonl", ".ndjson", ".tab", ".gz")


def fetch_small_files(folder: Address, names: Sequence[str]) -> Path:
    """A folder on this node with those of the small files ``names`` that there are in ``folder``, fetched anew.

    It is called by the hash of what it holds, so that processes share it. Raises StoreError, OSError.
    """
    found: dict[str, bytes] = {}
    for name in names:
        with suppress(FileNotFoundError):
            found[name] = (folder / name).read_bytes()
    digest = hashlib.sha256(
        repr(sorted((name, hashlib.sha256(data).digest()) for name, data in found.items())).encode()
    )
    above = files_folder()
    place = above / f"files-{digest.hexdigest()[:32]}"
    if all(_holds(place / name, data) for name, data in found.items()) and place.is_dir():
        return place
    beside = Path(tempfile.mkdtemp(dir=above, prefix=f".{place.name}."))
    for name, data in found.items():
        (beside / name).write_bytes(data)
    shutil.rmtree(place, ignore_errors=True)
    try:
        os.rename(beside, place)
    except OSError:  # another process was first
        shutil.rmtree(beside)
    return place


def fetch_tables(path: Address, folder: Path) -> Path:
    """Copy a table, or the tables of a folder, into the local ``folder``; the copy under its own name.

    A copy of the store's present size and checksum is taken again. Raises StoreError, OSError.
    """
    found = details_of(path.url)
    if found is not None and found.get("type") != "directory":
        _fetch(path, folder / path.name)
        return folder / path.name
    entries = entries_of(path.url) if lists_folders(path.url) else []
    names = [name for name, size in entries if size is not None and name.lower().endswith(_DESCRIBED)]
    if not names:
        raise StoreError(f"{path}: neither a table nor a folder of tables; name a TSV, CSV, JSONL or parquet file")
    for name in names:
        _fetch(path / name, folder / path.name / name)
    return folder / path.name


def _fetch(source: Address, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    details = details_of(source.url)
    if details is None:
        raise StoreError(f"{source}: no such object")
    mark = repr([details["size"], *(str(details.get(name)) for name in ("ETag", "etag", "md5Hash", "LastModified"))])
    state = target.with_name(f".{target.name}.state")
    if target.exists() and state.exists() and state.read_text() == mark and target.stat().st_size == details["size"]:
        return
    state.unlink(missing_ok=True)
    beside = target.with_name(f".{target.name}.part")
    with open(beside, "wb") as stream:
        for start in range(0, details["size"], CHUNK_BYTES):
            stream.write(read_range(source.url, start, min(CHUNK_BYTES, details["size"] - start)))
    os.replace(beside, target)
    state.write_text(mark)


def _holds(path: Path, data: bytes) -> bool:
    try:
        return path.read_bytes() == data
    except OSError:
        return False
