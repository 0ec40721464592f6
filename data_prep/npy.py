"""Reads .npy files of numbers and bytes without parsing Python source, as which numpy reads their headers.

On Python 3.11 threads can't do that at the same time: one counter serves all of them, and SystemError is raised where
it turns out wrong (python/cpython issue 106905). Nor does a damaged header reach a parser that was made for programs.
"""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

MAX_HEADER_BYTES = 4096  # numpy writes 128 for the arrays of a split
_MAGIC = b"\x93NUMPY"
_LENGTH_BYTES = {(1, 0): 2, (2, 0): 4}  # of the header's length, by version of the format
_HEADER = re.compile(
    rb"\{'descr': '([<|][iuf][1248]|\|S\d{1,4})', 'fortran_order': (True|False), "
    rb"'shape': \(((?:\d{1,18}, ?)*(?:\d{1,18})?)\), \} *\n"
)


class NpyHeader(NamedTuple):
    """What an array is, and the byte at which its numbers begin."""

    dtype: np.dtype
    shape: tuple[int, ...]
    by_columns: bool
    start: int

    @property
    def end(self) -> int:
        """The byte after its last number."""
        return self.start + math.prod(self.shape) * self.dtype.itemsize


def parse_header(head: bytes) -> NpyHeader:
    """The header at the beginning of a file, of which ``head`` is at least that; raises ValueError if it is none."""
    version = tuple(head[len(_MAGIC) : len(_MAGIC) + 2])
    if not head.startswith(_MAGIC) or version not in _LENGTH_BYTES:
        raise ValueError(f"begins with {head[: len(_MAGIC) + 2]!r}, expected a .npy file of version 1 or 2")
    first = len(_MAGIC) + 2 + _LENGTH_BYTES[version]
    start = first + int.from_bytes(head[len(_MAGIC) + 2 : first], "little")
    found = _HEADER.fullmatch(head[first:start])
    if found is None or start > len(head):
        raise ValueError(
            f"header {head[first : min(start, first + 120)].rstrip()!r}, expected that of an array of numbers or bytes"
        )
    descr, by_columns, shape = (group.decode() for group in found.groups())
    sizes = tuple(int(size) for size in shape.split(",") if size.strip())
    return NpyHeader(np.dtype(descr), sizes, by_columns == "True", start)


def load_array(file: Path | BinaryIO, mapped: bool = False) -> np.ndarray:
    """The array in a file, ``mapped`` read-only from disk unless it is empty.

    Raises ValueError where it is not a whole .npy file with its rows in order, and OSError.
    """
    with open(file, "rb") if isinstance(file, Path) else file as stream:
        header, size = parse_header(stream.read(MAX_HEADER_BYTES)), os.fstat(stream.fileno()).st_size
        if header.by_columns or size < header.end:
            order = "columns" if header.by_columns else "rows"
            raise ValueError(f"{size} bytes by {order}, expected {header.end} by rows: truncated or changed")
        if mapped and math.prod(header.shape):
            return np.memmap(stream, header.dtype, "r", header.start, header.shape)
        stream.seek(header.start)
        return np.fromfile(stream, header.dtype, math.prod(header.shape)).reshape(header.shape)
