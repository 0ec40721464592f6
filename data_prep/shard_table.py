"""The shards of a split as columns, an array for each attribute: a corpus may have a hundred thousand."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

MAX_TEXT_BYTES = 255  # of a file name or a hash, as of a file name on any file system
_AT_A_TIME = 1000  # shards that are Python objects at once


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


TEXTS = ("file", "index_file", "sha256", "index_sha256")
NUMBERS = ("rows", "samples", "bytes")
ATTRIBUTES = tuple(Shard.__dataclass_fields__)


class ShardTable(Sequence[Shard]):
    """A read-only sequence of shards, about 180 bytes each; ``rows``, ``samples`` and ``bytes`` are int64 [N].

    Raises KeyError or TypeError for a shard that is no mapping with all attributes of ``Shard``, and ValueError for
    values that are not a plain file name, another text, or a number of at least 0.
    """

    def __init__(self, shards: Iterable[Mapping[str, Any]]) -> None:
        shards = list(shards)
        columns = {name: [shard[name] for shard in shards] for name in ATTRIBUTES}
        for name in ("file", "index_file"):
            for value in columns[name]:
                if not _is_file_name(value):
                    raise ValueError(f"shard file {value!r:.80} is not a plain file name inside the split")
        for name in NUMBERS:
            for file, value in zip(columns["file"], columns[name]):
                if type(value) is not int or not 0 <= value < 2**63:
                    raise ValueError(f"shard {file} has {name} {value!r:.80}, expected a number of at least 0")
        self._texts = {name: np.array([_encoded(text) for text in columns[name]], dtype=np.bytes_) for name in TEXTS}
        self._numbers = {name: np.array(columns[name], dtype=np.int64) for name in NUMBERS}
        self.rows, self.samples, self.bytes = (self._numbers[name] for name in NUMBERS)

    @classmethod
    def of(cls, shards: Iterable[Shard]) -> ShardTable:
        """The table of ``shards``; the same if it is one."""
        return shards if isinstance(shards, cls) else cls(vars(shard) for shard in shards)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> Shard:
        if not -len(self) <= number < len(self):
            raise IndexError(f"shard {number} of {len(self)}")
        return next(self._shards(range(number % len(self), number % len(self) + 1)))

    def __iter__(self) -> Iterator[Shard]:
        return self.among(range(len(self)))

    def among(self, numbers: range) -> Iterator[Shard]:
        """The shards with these numbers, in order."""
        for start in range(0, len(numbers), _AT_A_TIME):
            yield from self._shards(numbers[start : start + _AT_A_TIME])

    def _shards(self, numbers: range) -> Iterator[Shard]:
        return (Shard(*values) for values in zip(*(self._values(name, numbers) for name in ATTRIBUTES)))

    def _values(self, name: str, numbers: range) -> list[Any]:
        """An attribute of these shards, as Python objects."""
        part = slice(numbers.start, numbers.stop, numbers.step)
        if name in NUMBERS:
            return self._numbers[name][part].tolist()
        return [text.decode() for text in self._texts[name][part].tolist()]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ShardTable):
            return NotImplemented
        return all(
            np.array_equal(mine[name], others[name])
            for mine, others in ((self._texts, other._texts), (self._numbers, other._numbers))
            for name in mine
        )

    __hash__ = None

    def hash_into(self, digest: hashlib._Hash) -> None:
        """Feed ``digest`` with the table as ``json.dumps(..., sort_keys=True)`` writes a list of objects."""
        names = sorted(ATTRIBUTES)
        digest.update(b"[")
        for start in range(0, len(self), _AT_A_TIME):
            columns = (self._values(name, range(len(self))[start : start + _AT_A_TIME]) for name in names)
            part = json.dumps([dict(zip(names, values)) for values in zip(*columns)])
            digest.update(((", " if start else "") + part[1:-1]).encode())
        digest.update(b"]")


def _is_file_name(value: Any) -> bool:
    """Whether it names a file inside the folder of the split: invariant 7."""
    if not isinstance(value, str) or value in ("", ".", ".."):
        return False
    return not any(sign in value for sign in "/\\\0") and len(value.encode(errors="replace")) <= MAX_TEXT_BYTES


def _encoded(text: Any) -> bytes:
    """UTF-8; raises ValueError for what a column can't hold."""
    if not isinstance(text, str) or "\0" in text:
        raise ValueError(f"found {text!r:.80} in the place of a name or hash")
    encoded = text.encode()
    if len(encoded) > MAX_TEXT_BYTES:
        raise ValueError(f"a name or hash of {len(encoded)} bytes, expected at most {MAX_TEXT_BYTES}")
    return encoded
