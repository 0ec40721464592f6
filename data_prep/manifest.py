"""The format of a prepared split, on which data_prep and pipeline agree: manifest, index, safe reading and writing."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from dataclasses import asdict, dataclass, field
from dataclasses import fields as dataclass_fields
from pathlib import Path
from tokenize import TokenError
from typing import Any, NamedTuple

import numpy as np

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
# What numpy raises on a damaged header, which it parses as Python source and then makes an array of that shape.
INDEX_DAMAGE = (ValueError, KeyError, TypeError, SyntaxError, TokenError, ArithmeticError, EOFError)
INDEX_DAMAGE += (MemoryError, RecursionError)
KNOWN_FIELDS = ("image", "image1", "text", "meta")


class ManifestError(ValueError):
    """A split is missing, incomplete or differs from its manifest; the message is one line for the user."""


@dataclass(frozen=True)
class Shard:
    """One tar of a split. ``rows`` counts (image, caption) pairs, ``samples`` distinct keys, ``bytes`` the tar."""

    file: str
    index_file: str
    rows: int
    samples: int
    bytes: int
    sha256: str
    index_sha256: str


@dataclass(frozen=True)
class Manifest:
    """One split. ``fields`` are in index order; ``rejected`` counts records that were not written, by reason."""

    corpus: str
    split: str
    fields: tuple[str, ...]
    shards: tuple[Shard, ...]
    rejected: dict[str, int] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    @property
    def rows(self) -> int:
        return sum(shard.rows for shard in self.shards)

    @property
    def samples(self) -> int:
        return sum(shard.samples for shard in self.shards)

    @property
    def num_images(self) -> int:
        """Images per sample: 2 for image pairs, else 1."""
        return 2 if "image1" in self.fields else 1

    def fingerprint(self) -> str:
        """SHA-256 over everything that determines the samples and their order, and nothing else."""
        content = {
            "corpus": self.corpus,
            "split": self.split,
            "fields": self.fields,
            "shards": [asdict(shard) for shard in self.shards],
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


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
    path = Path(split_dir) / shard.index_file
    try:
        index = np.load(path, mmap_mode="r" if shard.rows else None, allow_pickle=False)
    except (OSError, *INDEX_DAMAGE) as error:
        raise ManifestError(f"{path}: not a readable index ({error}); prepare the split again") from error
    expected = (shard.rows, index_columns(manifest.fields).width)
    if index.dtype != np.int64 or index.shape != expected:
        found = f"{index.dtype} {list(index.shape)}"
        raise ManifestError(f"{path}: holds {found}, expected int64 {list(expected)}; prepare the split again")
    return index


def row_text(text: str | None, meta: dict[str, Any] | None, caption_number: int) -> str:
    """The caption of a row by the rule of ``index_columns``; raises ValueError where the members do not hold it."""
    captions = (meta or {}).get("captions")
    if captions is None:
        if text is None:
            raise ValueError("sample has neither captions nor a text member")
        return text
    if not isinstance(captions, list) or not 0 <= caption_number < len(captions):
        raise ValueError(f"captions of the JSON member do not hold number {caption_number}")
    if not isinstance(captions[caption_number], str):
        raise ValueError(f"caption number {caption_number} is not a string")
    return captions[caption_number]


def write_manifest(split_dir: Path, manifest: Manifest) -> None:
    """Write the manifest, whole or not at all; call it last."""
    content = {**asdict(manifest), "rows": manifest.rows, "samples": manifest.samples}
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
    split_dir = Path(split_dir)
    manifest = _read_content(split_dir)
    for shard in manifest.shards:
        _check_files(split_dir, shard)
    return manifest


def _read_content(split_dir: Path) -> Manifest:
    path = split_dir / MANIFEST_NAME
    try:
        if not is_split(split_dir):  # a pipe in its place would never end
            raise FileNotFoundError(path)
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ManifestError(
            f"{split_dir}: no {MANIFEST_NAME}: half-written or not a split; run `python -m data_prep synth` "
            "or prepare it again"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise ManifestError(f"{path}: not readable as JSON ({error}); prepare the split again") from error
    return _parse(path, content)


def _parse(path: Path, content: Any) -> Manifest:
    if not isinstance(content, dict):
        raise ManifestError(f"{path}: holds {type(content).__name__}, expected an object; prepare the split again")
    version = content.get("format_version")
    if version != FORMAT_VERSION:
        raise ManifestError(f"{path}: format version {version!r}, this program reads {FORMAT_VERSION}; prepare again")
    try:
        shards = tuple(Shard(**{f.name: shard[f.name] for f in dataclass_fields(Shard)}) for shard in content["shards"])
        manifest = Manifest(
            corpus=content["corpus"],
            split=content["split"],
            fields=tuple(content["fields"]),
            shards=shards,
            rejected=dict(content["rejected"]),
            provenance=dict(content["provenance"]),
        )
        totals = (content["rows"], content["samples"])
    except (KeyError, TypeError, ValueError) as error:
        raise ManifestError(f"{path}: misses or mistypes {error}; prepare the split again") from error
    _check_values(path, manifest, totals)
    return manifest


def _check_values(path: Path, manifest: Manifest, totals: tuple[Any, Any]) -> None:
    if not isinstance(manifest.corpus, str) or not isinstance(manifest.split, str):
        raise ManifestError(f"{path}: corpus and split must be strings; prepare the split again")
    unknown = [name for name in manifest.fields if name not in KNOWN_FIELDS]
    if unknown or len(set(manifest.fields)) != len(manifest.fields):
        raise ManifestError(f"{path}: fields {list(manifest.fields)}, expected distinct names of {list(KNOWN_FIELDS)}")
    for shard in manifest.shards:
        for name in (shard.file, shard.index_file):
            if not isinstance(name, str) or name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
                raise ManifestError(f"{path}: shard file {name!r} is not a plain file name inside the split")
        numbers = (shard.rows, shard.samples, shard.bytes)
        if not all(type(number) is int and number >= 0 for number in numbers):
            raise ManifestError(f"{path}: shard {shard.file} has rows, samples, bytes {numbers}; prepare again")
    if totals != (manifest.rows, manifest.samples):
        counted = (manifest.rows, manifest.samples)
        raise ManifestError(f"{path}: totals {totals} (rows, samples) but its shards add up to {counted}")


def _check_files(split_dir: Path, shard: Shard) -> None:
    """Check existence and size by one lstat per file: a corpus has thousands, often on a network file system."""
    for name in (shard.file, shard.index_file):
        path = split_dir / name
        try:
            found = os.lstat(path)
            if stat.S_ISLNK(found.st_mode):
                if split_dir.resolve() not in path.resolve().parents:
                    raise ManifestError(f"{path}: a link out of the split; copy the file into it")
                found = os.stat(path)
        except OSError:
            found = None
        if found is None or not stat.S_ISREG(found.st_mode):
            raise ManifestError(f"{path}: named by the manifest but missing; copy it again or prepare the split again")
        if name == shard.file and found.st_size != shard.bytes:
            raise ManifestError(
                f"{path}: {found.st_size} bytes, its manifest says {shard.bytes}: "
                "truncated or changed; copy it again or prepare the split again"
            )


def find_splits(path: Path, split: str, num_images: int | None = 1) -> list[Path]:
    """Folders of ``split`` at ``path``: a split folder, a corpus (SPLIT/) or a root of corpora (CORPUS/SPLIT/).

    Corpora with another number of images per sample (None: any) are skipped in a root and refused when named. Raises
    ManifestError, naming the command to run, when there is no split or a half-written one.
    """
    path = Path(path)
    if not path.is_dir():
        raise ManifestError(f"{path}: no such folder; run `python -m data_prep synth` or name one by --data DIR")
    if is_split(path):
        found = _manifest_identity(path)
        if found != (split, found[1] if num_images is None else num_images):
            expected = f"expected split {split!r} with {num_images} image(s)"
            raise ManifestError(f"{path}: holds split {found[0]!r} with {found[1]} image(s) per sample, {expected}")
        return [path]
    corpus_split = path / split
    candidates = [corpus_split] if corpus_split.is_dir() else []
    if not any(is_split(candidate) or _has_tars(candidate) for candidate in candidates):
        candidates = sorted(folder / split for folder in path.iterdir() if not folder.name.startswith("."))
    for candidate in (path, *candidates):
        if _has_tars(candidate) and not is_split(candidate):
            raise ManifestError(
                f"{candidate}: tars but no {MANIFEST_NAME}: half-written, or not made by data_prep; "
                "remove it or prepare it again (`python -m data_prep --help`)"
            )
    splits = [candidate for candidate in candidates if is_split(candidate)]
    matching = [candidate for candidate in splits if num_images in (None, _manifest_identity(candidate)[1])]
    if not matching:
        reason = f"none has {num_images} image(s) per sample" if splits else _what_is_there(path)
        raise ManifestError(
            f"{path}: no split {split!r} here ({reason}); run `python -m data_prep synth` or name another by --data DIR"
        )
    return matching


def _what_is_there(path: Path) -> str:
    """What a folder without the wanted split holds, for an error line."""
    if (path / "tokenizer.json").is_file():
        return "a tokenizer, which --data.tokenizer takes"
    names = {
        _manifest_identity(file.parent)[0]
        for file in (*path.glob(f"*/{MANIFEST_NAME}"), *path.glob(f"*/*/{MANIFEST_NAME}"))
    }
    return f"prepared: {', '.join(sorted(names))}" if names else "nothing prepared"


def is_split(folder: Path) -> bool:
    """Whether ``folder`` holds a finished split."""
    return (Path(folder) / MANIFEST_NAME).is_file()


def _has_tars(folder: Path) -> bool:
    return folder.is_dir() and any(folder.glob("*.tar"))


def _manifest_identity(folder: Path) -> tuple[str, int]:
    manifest = _read_content(folder)
    return manifest.split, manifest.num_images
