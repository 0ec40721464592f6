"""Uploads prepared data to an object store, a split's manifest last, so that half of an upload is never a split."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.manifest import MANIFEST_NAME, ManifestError, file_sha256, is_split, load_manifest, read_manifest
from data_prep.record import PrepError
from data_prep.stores.address import Address
from data_prep.stores.requests import CHUNK_BYTES, PART_BYTES, details_of, lists_folders, read_range, remove, upload

FILES_AT_A_TIME = 4
_OF_SHARDS = (".tar", ".npy")


@dataclass(frozen=True)
class Upload:
    """A file and the address that it goes to."""

    source: Path
    target: Address


@dataclass
class Uploaded:
    """What an upload did: files written and those that were there already, with the bytes written."""

    written: int = 0
    there: int = 0
    bytes: int = 0


def plan_upload(source: Path, target: Address) -> list[Upload]:
    """Every file of the split, corpus or root ``source``, in the order in which they go: manifests at the end.

    Of a split those that its manifest names and others that are no shards; hidden files and folders stay. Raises
    PrepError where nothing is prepared, ManifestError for a split that is not whole.
    """
    refuse_unwritable(target)
    if not source.is_dir():
        raise PrepError(f"{source}: no such folder; name a prepared split, corpus or root")
    found = sorted(_files(source, target), key=lambda one: one.source.name == MANIFEST_NAME)
    if not found or found[-1].source.name != MANIFEST_NAME:
        raise PrepError(f"{source}: nothing prepared here; name a split, a corpus or a root of corpora")
    return found


def refuse_unwritable(target: Address) -> None:
    """Raises PrepError for an address that this program cannot write to."""
    if lists_folders(target.url) is False or target.url.startswith("hf://"):
        hint = "`hf upload`" if target.url.startswith("hf://") else "the server's own means"
        raise PrepError(f"{target}: cannot be written by this program; use {hint}, or a store like s3://BUCKET/FOLDER")


def upload_files(plan: list[Upload], overwrite: bool, say: Callable[[str], None] = print) -> Uploaded:
    """Upload what is not there yet with equal bytes; raises PrepError, StoreError.

    Where another split has its place, PrepError, or with ``overwrite`` that split's manifest is removed first.
    """
    done = Uploaded()
    manifests = [one for one in plan if one.source.name == MANIFEST_NAME]
    for one in manifests:
        _make_way(one, overwrite)
    others = plan[: len(plan) - len(manifests)]
    with ThreadPoolExecutor(FILES_AT_A_TIME) as threads, ExitStack() as stopped:
        stopped.callback(threads.shutdown, wait=False, cancel_futures=True)  # files not begun when one fails, or Ctrl-C
        for number, (one, was_there) in enumerate(zip(others, threads.map(_bring, others)), start=1):
            _count(done, one, was_there)
            if number % 100 == 0:
                say(f"{number} of {len(plan)} files, {done.bytes / 2**20:.0f} MiB written")
    for one in manifests:
        _count(done, one, _bring(one))
    return done


def verify_uploads(plan: list[Upload]) -> list[str]:
    """What is wrong with the uploaded files, read again: their SHA-256 must be the manifest's, or the local file's."""
    problems = []
    hashes = _listed_hashes(plan)
    with ThreadPoolExecutor(FILES_AT_A_TIME) as threads:
        for one, found in zip(plan, threads.map(lambda one: _remote_sha256(one.target), plan)):
            if found is None:
                problems.append(f"{one.target}: not there")
            elif found != (hashes.get(one.source) or file_sha256(one.source)):
                problems.append(f"{one.target}: its SHA-256 is not that of {one.source}")
    return problems


def _files(folder: Path, target: Address) -> Iterator[Upload]:
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    if is_split(folder):
        shards = read_manifest(folder).shards
        yield from (Upload(folder / name, target / name) for one in shards for name in (one.file, one.index_file))
        names = [name for name in names if not name.endswith(_OF_SHARDS)]
    elif any(name.endswith(".tar") for name in names):
        raise ManifestError(f"{folder}: tar files without a {MANIFEST_NAME}; prepare the split again, or move it away")
    for name in names:
        if (folder / name).is_dir():
            yield from _files(folder / name, target / name)
        elif (folder / name).is_file():
            yield Upload(folder / name, target / name)


def _make_way(manifest: Upload, overwrite: bool) -> None:
    """Have no other split's manifest at the target."""
    if details_of(manifest.target.url) is None:
        return
    ours, theirs = manifest.source.read_bytes(), b""
    try:
        theirs = manifest.target.read_bytes()
    except FileNotFoundError:
        return
    if ours == theirs:
        return
    folder = manifest.target.parent
    if not overwrite:
        same = _fingerprint(folder) == load_manifest(manifest.source.parent).fingerprint()
        what = "this split with another manifest" if same else "another split"
        raise PrepError(f"{folder}: {what} is there; give --overwrite to replace it, or another address")
    remove(manifest.target.url)


def _fingerprint(folder: Address) -> str | None:
    try:
        return load_manifest(folder).fingerprint()
    except ManifestError:
        return None


def _bring(one: Upload) -> bool:
    """Whether the file was there already; raises PrepError where it does not arrive whole."""
    size = one.source.stat().st_size
    details = details_of(one.target.url)
    if details is not None and details["size"] == size and _is_equal(one, details):
        return True
    upload(one.source, one.target.url)
    details = details_of(one.target.url)
    if details is None or details["size"] != size:
        found = "nothing" if details is None else f"{details['size']} bytes"
        raise PrepError(f"{one.target}: {found} after writing {size} bytes; run the same command again")
    return False


def _is_equal(one: Upload, details: dict[str, Any]) -> bool:
    """By the store's checksum where it has one that is known, else by reading the object."""
    etag = str(details.get("ETag") or "").strip('"').lower()
    if etag and one.target.url.startswith("s3"):
        return etag == s3_etag(one.source, parts="-" in etag)
    if details.get("md5Hash"):  # of Google's store
        return base64.b64decode(details["md5Hash"]).hex() == _md5(one.source)
    return _remote_sha256(one.target) == file_sha256(one.source)


def s3_etag(path: Path, parts: bool) -> str:
    """What S3 calls an object of this content that was put at once, or in parts of PART_BYTES: its MD5, or the MD5 of
    the parts' MD5s and their number (docs.aws.amazon.com/AmazonS3/latest/userguide/checking-object-integrity.html)."""
    if not parts:
        return _md5(path)
    sums = []
    with open(path, "rb") as stream:
        while data := stream.read(PART_BYTES):
            sums.append(hashlib.md5(data, usedforsecurity=False).digest())
    return f"{hashlib.md5(b''.join(sums), usedforsecurity=False).hexdigest()}-{len(sums)}"


def _md5(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _remote_sha256(target: Address) -> str | None:
    details, digest = details_of(target.url), hashlib.sha256()
    if details is None:
        return None
    for start in range(0, details["size"], CHUNK_BYTES):
        digest.update(read_range(target.url, start, min(CHUNK_BYTES, details["size"] - start)))
    return digest.hexdigest()


def _listed_hashes(plan: list[Upload]) -> dict[Path, str]:
    """The SHA-256 that manifests give of their files."""
    found: dict[Path, str] = {}
    for one in plan:
        if one.source.name == MANIFEST_NAME:
            folder = one.source.parent
            for shard in load_manifest(folder).shards:
                found |= {folder / shard.file: shard.sha256, folder / shard.index_file: shard.index_sha256}
    return found


def _count(done: Uploaded, one: Upload, was_there: bool) -> None:
    done.there += was_there
    done.written += not was_there
    done.bytes += 0 if was_there else one.source.stat().st_size
