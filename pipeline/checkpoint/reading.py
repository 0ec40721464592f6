"""Reads ranges of the tensors of a checkpoint, wherever in its files they stand; nothing is unpickled."""

from __future__ import annotations

import itertools
import json
import math
import os
import pickle
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pipeline.checkpoint.files import DIVIDED, KINDS, CheckpointError, attempt, read_manifest
from pipeline.distributed.ranks import Agreement

_DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "BOOL": torch.bool},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8},
}


class Key(NamedTuple):
    """A tensor of a checkpoint: whole, whatever pieces it is stored in."""

    kind: str
    name: str
    shape: tuple[int, ...]
    dtype: str  # as safetensors writes it


class Headers(NamedTuple):
    """What stands in some files of a checkpoint, small enough to be sent to every rank."""

    files: list[str]
    keys: list[Key]
    rows: np.ndarray  # int64 [pieces, 5]: number in keys, first element, end, number in files, byte in the file


class Stretch(NamedTuple):
    """Elements ``begin`` to ``end`` of a tensor, which stand in one file from byte ``offset`` on."""

    file: str
    begin: int
    end: int
    offset: int


def read_headers(path: Path, files: Iterable[str]) -> Headers:
    """The headers of some files of a checkpoint folder; raises CheckpointError for a file that is none of ours."""
    files, numbers, rows = list(files), {}, []
    for number, file in enumerate(files):
        try:
            for key, *where, offset in _pieces_in(path / file, file.partition("-")[0]):
                rows.append((numbers.setdefault(key, len(numbers)), *where, number, offset))
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise CheckpointError(f"{path}: {file} holds no tensors of ours ({error})") from None
    return Headers(files, list(numbers), np.array(rows, dtype=np.int64).reshape(-1, 5))


def _pieces_in(file: Path, kind: str) -> Iterator[tuple[Key, int, int, int]]:
    """(tensor, first element, end, byte in the file) of each piece in a file, in the order of their bytes."""
    with safe_open(file, framework="pt") as handle:
        divided = json.loads((handle.metadata() or {}).get(DIVIDED, "{}"))
        names = handle.offset_keys()
        slices = {name: handle.get_slice(name) for name in names}
        counts = {name: math.prod(one.get_shape()) for name, one in slices.items()}
        sizes = {name: counts[name] * _DTYPES[one.get_dtype()].itemsize for name, one in slices.items()}
        offset = file.stat().st_size - sum(sizes.values())  # safetensors has refused gaps and further bytes
        for name in names:
            begin, shape = 0, slices[name].get_shape()
            if name in divided:
                begin, shape = int(divided[name]["begin"]), divided[name]["shape"]
            key = Key(kind, name, tuple(int(length) for length in shape), slices[name].get_dtype())
            if min(begin, *key.shape, 0) < 0 or begin + counts[name] > math.prod(key.shape):
                raise ValueError(f"{name}: {counts[name]} elements from {begin} on of shape {list(shape)}")
            yield key, begin, begin + counts[name], offset
            offset += sizes[name]


class Layout:
    """Where each element of each tensor of a checkpoint stands; raises CheckpointError unless that is once for each."""

    def __init__(self, path: Path, parts: Sequence[Headers]) -> None:
        self.keys: dict[tuple[str, str], Key] = {}
        self._files: list[str] = []
        self._numbers: dict[tuple[str, str], int] = {}
        rows = [self._merge(path, part) for part in parts]
        rows = np.concatenate([np.empty((0, 5), dtype=np.int64), *rows])
        self._rows = rows[np.lexsort((rows[:, 2], rows[:, 1], rows[:, 0]))]
        self._first = np.searchsorted(self._rows[:, 0], np.arange(len(self.keys) + 1))
        for (kind, name), key in self.keys.items():
            begins, ends = (self._of(kind, name)[:, column].tolist() for column in (1, 2))
            whole = math.prod(key.shape)
            if begins != [0, *ends[:-1]] or ends[-1] != whole:
                stretches = ", ".join(f"{begin} to {end}" for begin, end in zip(begins, ends, strict=True))
                raise CheckpointError(f"{path}: of {kind} of {name} it holds {stretches}, expected 0 to {whole} once")

    def stretches(self, kind: str, name: str, begin: int, end: int) -> Iterator[Stretch]:
        """Where elements ``begin`` to ``end`` stand, in order."""
        rows, itemsize = self._of(kind, name), _DTYPES[self.keys[kind, name].dtype].itemsize
        low, high = np.searchsorted(rows[:, 2], begin, side="right"), np.searchsorted(rows[:, 1], end, side="left")
        for _, start, stop, file, offset in rows[low:high].tolist():
            first = max(begin, start)
            yield Stretch(self._files[file], first, min(end, stop), offset + (first - start) * itemsize)

    def _of(self, kind: str, name: str) -> np.ndarray:
        number = self._numbers[kind, name]
        return self._rows[self._first[number] : self._first[number + 1]]

    def _merge(self, path: Path, part: Headers) -> np.ndarray:
        """The rows of ``part`` with the numbers of this layout."""
        for key in part.keys:
            known = self.keys.setdefault(key[:2], key)
            if known != key:
                raise CheckpointError(f"{path}: {key.kind} of {key.name} has another shape or dtype in another file")
            self._numbers.setdefault(key[:2], len(self._numbers))
        numbers = np.array([self._numbers[key[:2]] for key in part.keys], dtype=np.int64)
        rows = part.rows.copy()
        rows[:, 0] = numbers[rows[:, 0]]
        rows[:, 3] += len(self._files)
        self._files += part.files
        return rows


class Reader:
    """Reads the tensors that the manifest of a checkpoint lists.

    With an ``agreement`` every rank must open it: each reads the headers of its share of the files, all get all.

    Raises:
        CheckpointError: a file that is none of ours, an element that is missing or there twice, a file that can't
            be read.
    """

    def __init__(self, path: Path, kinds: tuple[str, ...] = KINDS, agreement: Agreement | None = None) -> None:
        self._path = path
        self.num_bytes = 0  # of tensors read so far
        self._layout = Layout(path, _all_headers(path, kinds, agreement))

    def shapes(self, kind: str) -> dict[str, tuple[int, ...]]:
        """Shape by name of every tensor of one kind."""
        return {name: key.shape for (found, name), key in self._layout.keys.items() if found == kind}

    def read_ranges(self, kind: str, ranges: Sequence[tuple[str, int, int]]) -> list[Tensor]:
        """Of each (name, begin, end) these elements of the flattened tensor, on the host, in the dtype on file.

        The files are read one after the other, each opened once.
        """
        found, wanted = [], []
        for name, begin, end in ranges:
            values = torch.empty(end - begin, dtype=_DTYPES[self._layout.keys[kind, name].dtype])
            found.append(values)
            for one in self._layout.stretches(kind, name, begin, end):
                wanted.append((one.file, one.offset, values[one.begin - begin : one.end - begin]))
        wanted.sort(key=lambda one: one[:2])
        for file, stretches in itertools.groupby(wanted, key=lambda one: one[0]):
            self._read_file(file, [one[1:] for one in stretches])
        return found

    def read(self, kind: str, name: str) -> Tensor:
        """One whole tensor."""
        shape = self._layout.keys[kind, name].shape
        return self.read_ranges(kind, [(name, 0, math.prod(shape))])[0].view(shape)

    def read_all(self, kind: str) -> Iterator[tuple[str, Tensor]]:
        yield from ((name, self.read(kind, name)) for name in self.shapes(kind))

    def _read_file(self, file: str, stretches: Iterable[tuple[int, Tensor]]) -> None:
        """Fill each tensor with the bytes of a file from its offset on."""
        try:
            with open(self._path / file, "rb", buffering=0) as stream:
                for offset, values in stretches:
                    left = memoryview(values.view(torch.uint8).numpy())
                    self.num_bytes += len(left)
                    while left:
                        num_bytes = os.preadv(stream.fileno(), [left], offset)
                        if num_bytes == 0:
                            raise CheckpointError(f"{self._path}: {file} ends too early; it changed after its check")
                        left, offset = left[num_bytes:], offset + num_bytes
        except OSError as error:
            raise CheckpointError(f"{self._path}: {file} cannot be read ({error.strerror})") from None


def _all_headers(path: Path, kinds: tuple[str, ...], agreement: Agreement | None) -> list[Headers]:
    """The headers of all files of some kinds, in parts; raises CheckpointError on all ranks alike."""

    def listed() -> list[str]:
        return [file for file in sorted(read_manifest(path)["files"]) if file.partition("-")[0] in kinds]

    if agreement is None:
        return [read_headers(path, listed())]
    files, reason = agreement.gather(attempt(listed) if agreement.is_main else None)[0]
    if reason is not None:
        raise CheckpointError(f"{path}: {reason}")
    share = files[agreement.rank :: agreement.world_size]
    parts = agreement.gather(attempt(lambda: zlib.compress(pickle.dumps(read_headers(path, share)), 1)))
    if reasons := [reason for _, reason in parts if reason is not None]:
        raise CheckpointError(reasons[0])
    return [pickle.loads(zlib.decompress(part)) for part, _ in parts]
