"""The format of a prepared split, on which data_prep and pipeline agree: manifest, index, safe reading and writing."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_prep.listed_files import wrong_with
from data_prep.npy import load_array
from data_prep.sample_fields import CLIP_FIELDS, advice, contents, fields_of
from data_prep.shard_table import Shard, ShardTable
from data_prep.stores.address import Address, data_path
from data_prep.stores.failures import StoreError
from data_prep.stores.split_files import open_remote_index, wrong_remote_file

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
CAPTIONS = "captions"
_CHECKED_AT_A_TIME, _CHECKING_THREADS = 1000, 16


class ManifestError(ValueError):
    """A split is missing, incomplete or differs from its manifest; the message is one line for the user."""


@dataclass(frozen=True)
class Manifest:
    """One split. ``fields`` are in index order; ``rejected`` counts records that were not written, by reason.

    ``texts`` says what the texts are: "captions" of their images, or "questions" and the like, which are no captions.
    ``caption_key`` is None for our own shards; for those that another program wrote see ``shard_members.in_own_form``.
    ``shards`` may be given as any sequence of ``Shard``; raises ValueError for what a ``ShardTable`` refuses.
    """

    corpus: str
    split: str
    fields: tuple[str, ...]
    shards: ShardTable
    rejected: dict[str, int] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION
    texts: str = CAPTIONS
    caption_key: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "shards", ShardTable.of(self.shards))

    @property
    def rows(self) -> int:
        return sum(self.shards.rows.tolist())

    @property
    def samples(self) -> int:
        return sum(self.shards.samples.tolist())

    @property
    def is_video(self) -> bool:
        """Whether its samples are clips."""
        return "video" in self.fields

    @property
    def num_images(self) -> int:
        """Images per sample, 1 where the fields name none."""
        return max(1, sum(field.startswith("image") for field in self.fields))

    def fingerprint(self) -> str:
        """SHA-256 over everything that determines the samples and their order, and nothing else."""
        corpus, fields, split = (json.dumps(value) for value in (self.corpus, self.fields, self.split))
        digest = hashlib.sha256(f'{{"corpus": {corpus}, "fields": {fields}, "shards": '.encode())
        self.shards.hash_into(digest)
        keyed = "" if self.caption_key is None else f', "caption_key": {json.dumps(self.caption_key)}'
        digest.update(f', "split": {split}{keyed}}}'.encode())
        return digest.hexdigest()


class IndexColumns(NamedTuple):
    """Column numbers of an index array."""

    offset: dict[str, int]
    size: dict[str, int]
    caption: int
    width: int


def index_columns(fields: tuple[str, ...]) -> IndexColumns:
    """Layout of an index, int64 [rows, 2*F+1].

    Field number f of ``fields`` has its byte offset in the tar in column 2f, its size in bytes in column 2f+1; a
    field that the row lacks has -1 in both. The last column is the caption number: the row's text is
    ``meta["captions"][number]`` where the JSON member has ``captions``, else the whole text member.
    """
    return IndexColumns(
        offset={name: 2 * number for number, name in enumerate(fields)},
        size={name: 2 * number + 1 for number, name in enumerate(fields)},
        caption=2 * len(fields),
        width=2 * len(fields) + 1,
    )


def open_index(split_dir: Path, manifest: Manifest, shard: Shard) -> np.ndarray:
    """The index of ``shard``, memory-mapped, int64 [rows, 2*F+1]; raises ManifestError if it is not that."""
    path, expected = data_path(split_dir) / shard.index_file, (shard.rows, index_columns(manifest.fields).width)
    try:
        if isinstance(path, Address):
            with open(open_remote_index(path, expected, shard.index_sha256), "rb") as stream:
                index = load_array(stream)
        else:
            index = load_array(path, mapped=True)
    except (OSError, ValueError) as error:
        raise ManifestError(f"{path}: not a readable index ({error}); prepare the split again") from error
    if index.dtype != np.int64 or index.shape != expected:
        found = f"{index.dtype} {list(index.shape)}"
        raise ManifestError(f"{path}: holds {found}, expected int64 {list(expected)}; prepare the split again")
    return index


def write_manifest(split_dir: Path, manifest: Manifest) -> None:
    """Write the manifest, whole or not at all; call it last."""
    content = {**vars(manifest), "shards": [vars(shard) for shard in manifest.shards]}
    content |= {"rows": manifest.rows, "samples": manifest.samples}
    if manifest.texts == CAPTIONS:  # as manifests have always been
        del content["texts"]
    if manifest.caption_key is None:
        del content["caption_key"]
    write_atomically(Path(split_dir) / MANIFEST_NAME, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace the file at ``path`` in one step: after a kill or an error it is the old file or the whole new one.

    Text is written as UTF-8. The content goes into a hidden file beside it, which is flushed to disk and renamed.
    Raises OSError, and then leaves nothing beside.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(beside, "wb") as stream:
            stream.write(content.encode() if isinstance(content, str) else content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(beside, path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a failed write does not name its file
        raise
    finally:
        beside.unlink(missing_ok=True)
    sync_directory(path.parent)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sync_directory(folder: Path) -> None:
    """Flush a folder's entries to disk, so that a rename in it survives a power cut; some file systems cannot."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def read_manifest(split_dir: Path) -> Manifest:
    """The manifest of a split; raises ManifestError unless all its files exist with the listed sizes."""
    manifest = load_manifest(split_dir)
    bad = first_bad_file(split_dir, manifest.shards, range(len(manifest.shards)))
    if bad is not None:
        raise ManifestError(bad[1])
    return manifest


def load_manifest(split_dir: Path) -> Manifest:
    """The manifest of a split, whose other files are not looked at; raises ManifestError."""
    path = data_path(split_dir) / MANIFEST_NAME
    try:
        if not is_split(split_dir):  # a pipe in its place would never end
            raise FileNotFoundError(path)
        content = json.loads(path.read_bytes())
    except StoreError as error:
        raise ManifestError(str(error)) from error
    except FileNotFoundError:
        raise ManifestError(
            f"{split_dir}: no {MANIFEST_NAME}: half-written or not a split; run `python -m data_prep synth` "
            "or prepare it again"
        ) from None
    except OSError as error:
        raise ManifestError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{path}: not readable as JSON ({error}); prepare the split again") from error
    return parse_manifest(path, content)


def parse_manifest(path: Path, content: Any) -> Manifest:
    """The manifest that ``content``, the JSON of ``path``, describes; raises ManifestError."""
    if not isinstance(content, dict):
        raise ManifestError(f"{path}: holds {type(content).__name__}, expected an object; prepare the split again")
    version = content.get("format_version")
    if version != FORMAT_VERSION:
        raise ManifestError(f"{path}: format version {version!r}, this program reads {FORMAT_VERSION}; prepare again")
    try:
        manifest = Manifest(
            corpus=content["corpus"],
            split=content["split"],
            fields=tuple(content["fields"]),
            shards=ShardTable(content.pop("shards")),
            rejected=dict(content["rejected"]),
            provenance=dict(content["provenance"]),
            texts=content.get("texts", CAPTIONS),
            caption_key=content.get("caption_key"),
        )
        totals = (content["rows"], content["samples"])
    except (KeyError, TypeError) as error:
        raise ManifestError(f"{path}: misses or mistypes {error}; prepare the split again") from error
    except ValueError as error:
        raise ManifestError(f"{path}: {error}; prepare the split again") from error
    _check_values(path, manifest, totals)
    return manifest


def _check_values(path: Path, manifest: Manifest, totals: tuple[Any, Any]) -> None:
    texts = (manifest.corpus, manifest.split, manifest.texts, manifest.caption_key or "", *manifest.fields)
    if not all(isinstance(value, str) for value in texts):
        raise ManifestError(f"{path}: corpus, split, texts, caption_key and fields must be strings; prepare it again")
    known = CLIP_FIELDS if manifest.is_video else fields_of(manifest.num_images)
    if not set(manifest.fields) <= set(known) or len(set(manifest.fields)) != len(manifest.fields):
        raise ManifestError(f"{path}: fields {list(manifest.fields)}, expected distinct names of {list(known)}")
    if totals != (manifest.rows, manifest.samples):
        counted = (manifest.rows, manifest.samples)
        raise ManifestError(f"{path}: totals {totals} (rows, samples) but its shards add up to {counted}")


def first_bad_file(split_dir: Path, shards: ShardTable, numbers: range) -> tuple[int, str] | None:
    """Number of the first of the shards ``numbers`` whose files are not as listed, and what is wrong with them.

    One lstat a file, many at a time: a network file system answers each after a while, but many at once. Of a store one
    list for many files.
    """
    if isinstance(split_dir, Address):
        return wrong_remote_file(split_dir, [(number, shards[number]) for number in numbers])
    parts = [numbers[start : start + _CHECKED_AT_A_TIME] for start in range(0, len(numbers), _CHECKED_AT_A_TIME)]
    if len(parts) <= 1:
        return _first_bad(split_dir, shards, numbers)
    with ThreadPoolExecutor(min(len(parts), _CHECKING_THREADS)) as threads:
        found = threads.map(lambda part: _first_bad(split_dir, shards, part), parts)
        return next((bad for bad in found if bad is not None), None)


def _first_bad(split_dir: Path, shards: ShardTable, numbers: range) -> tuple[int, str] | None:
    for number, shard in zip(numbers, shards.among(numbers)):
        for name, size in ((shard.file, shard.bytes), (shard.index_file, None)):
            wrong = wrong_with(os.path.join(split_dir, name), size)
            if wrong is not None:
                return number, f"{Path(split_dir) / name}: {wrong}"
    return None


def find_splits(
    path: Path, split: str, num_images: int | None = 1, texts: str | None = CAPTIONS, videos: bool = False
) -> list[Path]:
    """The folders that ``find_manifests`` finds."""
    return [folder for folder, _ in find_manifests(path, split, num_images, texts, videos)]


def find_manifests(
    path: Path, split: str, num_images: int | None = 1, texts: str | None = CAPTIONS, videos: bool = False
) -> list[tuple[Path, Manifest]]:
    """Folders and manifests of ``split`` at ``path``: a split folder, a corpus (SPLIT/) or a root of corpora
    (CORPUS/SPLIT/). A manifest is read once; the other files of a finished split are not looked at.

    Corpora with another number of images per sample (None: any, clips too), and those of images where ``videos`` are
    wanted or of clips where they are not, are skipped in a root and refused when named. Those of other ``texts`` (None:
    any) are skipped in a root and taken when named. Raises ManifestError, naming the command to run, when there is no
    split or a half-written one.
    """
    path, maker = data_path(path), f"python -m data_prep {'moving' if videos else 'synth'}"
    if not path.is_dir():
        raise ManifestError(f"{path}: no such folder; run `{maker}` or name one by --data DIR")
    if is_split(path):
        manifest = load_manifest(path)
        if manifest.split != split or not _fits(manifest, num_images, videos):
            found = f"holds split {manifest.split!r} with {contents(manifest.num_images, manifest.is_video)} per sample"
            expected, hint = f"split {split!r}", ""
            if num_images:
                expected += f" with {contents(num_images, videos)}"
                hint = advice(manifest.is_video, videos)
            raise ManifestError(f"{path}: {found}, expected {expected}{hint}")
        return [(path, manifest)]
    candidates = _split_folders(path, split)
    for candidate in (path, *candidates):
        if not is_split(candidate) and _has_tars(candidate):
            raise ManifestError(
                f"{candidate}: tar files without a {MANIFEST_NAME}: shards of another program (img2dataset, "
                f"webdataset), which `python -m data_prep webdataset --input {candidate} --output data/NAME --split "
                f"{split}` takes in, or a split whose preparation was cut off"
            )
    found = [(candidate, load_manifest(candidate)) for candidate in candidates if is_split(candidate)]
    matching = [(folder, manifest) for folder, manifest in found if _fits(manifest, num_images, videos)]
    others = [] if candidates == [path / split] or texts is None else [one for one in matching if one[1].texts != texts]
    if others and len(others) == len(matching):
        folder, manifest = others[0]
        raise ManifestError(f"{path}: no {texts} here: {folder} holds {manifest.texts}; name its corpus if you want it")
    matching = [one for one in matching if one not in others]
    if not matching:
        kinds = sorted({contents(manifest.num_images, manifest.is_video) for _, manifest in found})
        reason = f"{', '.join(kinds)} per sample, expected {contents(num_images, videos)}" if found else ""
        hint = advice(found[0][1].is_video, videos) if found else ""
        raise ManifestError(
            f"{path}: no split {split!r} here ({reason or _what_is_there(path)}); run `{maker}` or"
            f" name another by --data DIR{hint}"
        )
    return matching


def _fits(manifest: Manifest, num_images: int | None, videos: bool) -> bool:
    return num_images is None or (manifest.num_images, manifest.is_video) == (num_images, videos)


def is_prepared(path: Path, split: str) -> bool:
    """Whether a finished split lies at ``path`` as ``find_manifests`` looks for it, by a few questions to the file
    system and no file read: for what every rank asks before the ranks know each other."""
    path = data_path(path)
    if is_split(path):
        return True
    return path.is_dir() and any(is_split(folder) for folder in _split_folders(path, split))


def _split_folders(path: Path, split: str) -> list[Path]:
    """Where ``split`` may lie in a corpus or in a root of corpora."""
    own = path / split
    if is_split(own) or own.is_dir() and _has_tars(own):
        return [own]
    return sorted(folder / split for folder in path.iterdir() if not folder.name.startswith("."))


def _what_is_there(path: Path) -> str:
    """What a folder without the wanted split holds, for an error line."""
    if (path / "tokenizer.json").is_file():
        return "a tokenizer, which --data.tokenizer takes"
    names = {
        load_manifest(file.parent).split
        for file in (*path.glob(f"*/{MANIFEST_NAME}"), *path.glob(f"*/*/{MANIFEST_NAME}"))
    }
    return f"prepared: {', '.join(sorted(names))}" if names else "nothing prepared"


def is_split(folder: Path) -> bool:
    """Whether ``folder`` holds a finished split."""
    return (data_path(folder) / MANIFEST_NAME).is_file()


def _has_tars(folder: Path) -> bool:
    if isinstance(folder, Address):
        return any(entry.name.endswith(".tar") for entry in folder.iterdir())
    if not folder.is_dir():
        return False
    with os.scandir(folder) as entries:
        return any(entry.name.endswith(".tar") for entry in entries)
