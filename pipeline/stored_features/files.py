"""Features of a frozen vision tower beside the shards: the format on disk, written shard by shard, read by image.

SPLIT/features-HASH/00000.npy        uint16 [samples of the shard, I, P, W]: the bits of fp16 or bf16 numbers
SPLIT/features-HASH/00000.json       written behind it: its hash, which samples are unusable and why
SPLIT/features-HASH/features.json    written last: what they are features of (``Identity``)

HASH is that of the identity, so features of another tower, size or split are never taken for these.
Legend: I images of a sample, P tokens of an image, W their width.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_prep.manifest import write_atomically
from data_prep.npy import MAX_HEADER_BYTES, parse_header
from data_prep.stores.address import Address
from pipeline.config.options import ConfigError
from pipeline.data.open_shards import DataError
from pipeline.data.shard_reader import Corpus
from pipeline.data.transforms import UnusableSample

FORMAT_VERSION = 1
MAX_OPEN = 64  # files of a corpus and process
SUMMARY = "features.json"


class LostFeatures(DataError):
    """A file of features is gone or damaged; the message names it."""


@dataclass(frozen=True)
class Identity:
    """What features are features of; any difference makes them others."""

    split: str  # fingerprint of the split
    tower: str  # SHA-256 of its weights
    tokens: int  # P
    width: int  # W
    images: int  # I
    image_size: int
    fast_decode: bool
    max_pixels: int
    transform_version: int
    dtype: str  # float16 or bfloat16
    format_version: int = FORMAT_VERSION

    @property
    def folder(self) -> str:
        content = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return f"features-{hashlib.sha256(content.encode()).hexdigest()[:16]}"

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.images, self.tokens, self.width

    @property
    def bytes_shape(self) -> tuple[int, int, int]:
        return self.images, self.tokens, self.width * self.torch_dtype.itemsize

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)


class ShardWriter:
    """Writes the features of one shard; what is there already and whole is not written again."""

    def __init__(self, folder: Path, number: int, num_samples: int, identity: Identity) -> None:
        self._array, self._note = folder / f"{number:05d}.npy", folder / f"{number:05d}.json"
        self._shape, self._dtype = (num_samples, *identity.shape), identity.torch_dtype

    @property
    def is_done(self) -> bool:
        return self._note.is_file() and self._array.is_file()

    def write(self, features: Tensor, unusable: Mapping[int, tuple[str, str]]) -> None:
        """``features`` [samples, I, P, W] of any float dtype; (key, reason) of unusable samples by their number.

        Raises:
            ValueError: a feature is not finite, or too large for the dtype.
            OSError: the disk is full, or the like; nothing half-written is left.
        """
        assert tuple(features.shape) == self._shape, (features.shape, self._shape)
        stored = features.to(self._dtype)
        if not stored.isfinite().all():
            raise ValueError(
                f"{self._array}: features are not finite in {self._dtype}; --data.features bfloat16 has larger ones"
            )
        array = np.ascontiguousarray(stored.view(torch.int16).numpy().view(np.uint16))
        beside = self._array.with_suffix(".npy.tmp")
        try:
            with open(beside, "wb") as file:
                np.save(file, array)
            beside.replace(self._array)
        finally:
            beside.unlink(missing_ok=True)
        note = {
            "sha256": hashlib.sha256(array.tobytes()).hexdigest(),
            "unusable": {str(n): p for n, p in unusable.items()},
        }
        write_atomically(self._note, json.dumps(note) + "\n")


def seal(folder: Path, num_shards: int, identity: Identity) -> bool:
    """Write features.json if all shards are there; whether they are."""
    notes = [folder / f"{number:05d}.json" for number in range(num_shards)]
    if not all(note.is_file() for note in notes):
        return False
    content = {"identity": dataclasses.asdict(identity), "shards": [json.loads(note.read_text()) for note in notes]}
    write_atomically(folder / SUMMARY, json.dumps(content) + "\n")
    return True


class StoredFeatures:
    """The features of one corpus, read by row; a pickled or forked copy opens its own files."""

    def __init__(self, corpus: Corpus, identity: Identity) -> None:
        """Raises ConfigError where there are none, or others."""
        refuse_stores(corpus)
        self.identity, self._folder = identity, corpus.split_dir / identity.folder
        summary = _read_summary(self._folder, corpus, identity)
        samples = corpus.manifest.shards.samples
        self._starts = np.concatenate([[0], np.cumsum(samples)])
        self._first_rows = corpus.first_rows()
        self._unusable = {
            int(self._starts[number]) + int(sample): tuple(problem)
            for number, shard in enumerate(summary["shards"])
            for sample, problem in shard["unusable"].items()
        }
        self._files: dict[int, _ShardFile] = {}

    def read(self, row: int, out: Tensor) -> None:
        """The features of the images of a row, into ``out`` uint8 [I, P, 2W]; raises UnusableSample."""
        sample = int(np.searchsorted(self._first_rows, row, side="right")) - 1
        if sample in self._unusable:
            raise UnusableSample(*self._unusable[sample])
        shard = int(np.searchsorted(self._starts, sample, side="right")) - 1
        self._file(shard).read(sample - int(self._starts[shard]), out)

    def _file(self, number: int) -> _ShardFile:
        if number not in self._files:
            while len(self._files) >= MAX_OPEN:
                self._files.pop(next(iter(self._files))).close()
            samples = int(self._starts[number + 1] - self._starts[number])
            self._files[number] = _ShardFile(self._folder / f"{number:05d}.npy", (samples, *self.identity.shape))
        return self._files[number]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_files": {}}


class _ShardFile:
    """An array on disk, read and not mapped: a map of a truncated file kills the process."""

    def __init__(self, path: Path, shape: tuple[int, ...]) -> None:
        """Raises LostFeatures where it is not there, or holds something else."""
        self._path, self._row_bytes = path, 2 * math.prod(shape[1:])
        try:
            self._file = open(path, "rb")
            header = parse_header(self._file.read(MAX_HEADER_BYTES))
        except (OSError, ValueError) as error:
            raise self._lost(str(error)) from None
        if header.shape != shape or header.dtype != np.uint16 or header.by_columns:
            raise self._lost(f"holds {header.dtype} {header.shape}, expected uint16 {shape}")
        self._start = header.start

    def read(self, row: int, out: Tensor) -> None:
        """One row into ``out``, uint8 of as many bytes."""
        place, buffer = self._start + row * self._row_bytes, memoryview(out.numpy()).cast("B")
        try:
            count = os.preadv(self._file.fileno(), [buffer], place)
        except OSError as error:
            raise self._lost(str(error)) from None
        if count != self._row_bytes:
            raise self._lost(f"ends at byte {place + count}, expected {self._row_bytes} bytes from {place}")

    def close(self) -> None:
        self._file.close()

    def _lost(self, reason: str) -> LostFeatures:
        return LostFeatures(f"{self._path}: {reason}; write it again: python -m pipeline.features")


def refuse_stores(corpus: Corpus) -> None:
    """Raise ConfigError for a corpus in an object store, where features are neither written nor read."""
    if isinstance(corpus.split_dir, Address):
        raise ConfigError(
            f"{corpus.split_dir}: features are written and read beside shards on a file system only; copy the split to"
            " one, or use --data.features null"
        )


def _read_summary(folder: Path, corpus: Corpus, identity: Identity) -> dict[str, Any]:
    try:
        content = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        others = sorted(path.parent.name for path in corpus.split_dir.glob(f"features-*/{SUMMARY}"))
        found = (
            f"those of {', '.join(others)} are of another tower, image size or dtype" if others else "there are none"
        )
        raise ConfigError(
            f"{corpus.split_dir}: no features of this tower beside the shards ({found}); write them: python -m"
            " pipeline.features, with the same options"
        ) from None
    if content.get("identity") != dataclasses.asdict(identity) or len(content["shards"]) != len(corpus.manifest.shards):
        raise ConfigError(f"{folder / SUMMARY} is not of this split and tower; remove the folder and write them again")
    return content
