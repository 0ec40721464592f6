"""Which samples a shard holds, and where: keys, rows of the index, images, by the index and the tar's headers alone."""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from data_prep.manifest import Manifest, ManifestError, Shard, index_columns, open_index
from data_prep.record import PrepError
from data_prep.shard_members import foreign_key, key_and_suffix

KEY_BYTES = 100  # as a tar's header has room for


class ShardSamples(NamedTuple):
    """The samples of one shard: ``index`` int64 [rows, 2*F+1], ``first_rows`` int64 [samples]."""

    index: np.ndarray
    first_rows: np.ndarray

    @property
    def num_rows(self) -> np.ndarray:
        """Rows (captions) of each sample, int64 [samples]."""
        return np.diff(np.append(self.first_rows, len(self.index)))


def samples_of(split_dir: Path, manifest: Manifest, shard: Shard) -> ShardSamples:
    """The samples of ``shard``; raises ManifestError where its rows are not in the order of its samples."""
    index = np.array(open_index(split_dir, manifest, shard))
    changes = np.any(index[1:, :-1] != index[:-1, :-1], axis=1)
    first_rows = np.concatenate([np.zeros(min(1, len(index)), np.int64), np.flatnonzero(changes) + 1])
    if len(first_rows) != shard.samples:
        found = f"{len(first_rows)} samples in the index, its manifest says {shard.samples}"
        raise ManifestError(f"{split_dir / shard.file}: {found}; `python -m data_prep verify` says what is damaged")
    return ShardSamples(index, first_rows)


def spans_of(row: np.ndarray, manifest: Manifest, fields: tuple[str, ...]) -> list[tuple[int, int] | None]:
    """(offset, size) of these fields in a row of the index; None for one that the row lacks."""
    columns = index_columns(manifest.fields)
    spans = [(int(row[columns.offset[name]]), int(row[columns.size[name]])) for name in fields]
    return [span if span[0] >= 0 else None for span in spans]


def image_fields(split_dir: Path, manifest: Manifest) -> tuple[str, ...]:
    """The fields that are images; raises PrepError for a split without any."""
    found = tuple(name for name in manifest.fields if name.startswith("image"))
    if not found:
        raise PrepError(f"{split_dir}: holds clips, which have no picture hash; name splits of images")
    return found


def key_before(stream: IO[bytes], offset: int, manifest: Manifest, file: str) -> str:
    """The key of the sample whose first member's content begins at ``offset`` in shard ``file``, as training names it.

    Raises ManifestError for what is no tar header.
    """
    stream.seek(offset - tarfile.BLOCKSIZE)
    header = stream.read(tarfile.BLOCKSIZE)
    try:
        name = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").name
    except tarfile.TarError as error:
        raise ManifestError(f"{file}: no member at byte {offset} ({error}); the index is damaged") from error
    if manifest.caption_key is None:
        return name.rpartition("/")[2].partition(".")[0]
    found = key_and_suffix(name)
    return name if found is None else foreign_key(manifest.split, file, found[0])
