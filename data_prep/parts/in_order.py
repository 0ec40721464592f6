"""Puts results that come in any order into the order of their numbers, with a bounded number of bytes in memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

from data_prep.record import Record

MAX_BYTES = 128 * 2**20  # of images that wait in memory for an earlier one


class InOrder:
    """Holds what waits for an earlier number; images beyond ``max_bytes`` wait in the file ``spill``."""

    def __init__(self, spill: Path, max_bytes: int = MAX_BYTES) -> None:
        self._path, self._max_bytes = spill, max_bytes
        self._stream: BinaryIO | None = None
        self._waiting: dict[int, tuple[Record | None, Any, list[tuple[int, int]] | None, int]] = {}
        self._next = self._held_bytes = 0

    def put(self, number: int, record: Record | None, more: Any) -> Iterator[tuple[int, Record | None, Any]]:
        """Take one result; gives (number, record, more) of those whose turn it is now."""
        places, size = None, 0
        if record is not None and number != self._next:
            size = sum(map(len, record.images))
            if self._held_bytes + size > self._max_bytes:
                places = [self._write(image) for image in record.images]
                record, size = replace(record, images=()), 0
        self._held_bytes += size
        self._waiting[number] = record, more, places, size
        yield from self._ready()

    def missing(self, count: int) -> Iterator[int]:
        """The numbers below ``count`` that never came; each must be put before the next is asked for."""
        while self._next < count:
            yield self._next

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()

    def _ready(self) -> Iterator[tuple[int, Record | None, Any]]:
        while self._next in self._waiting:
            record, more, places, size = self._waiting.pop(self._next)
            number, self._next = self._next, self._next + 1
            self._held_bytes -= size
            if record is not None and places is not None:
                record = replace(record, images=tuple(self._read(*place) for place in places))
            yield number, record, more

    def _write(self, image: bytes) -> tuple[int, int]:
        if self._stream is None:
            self._stream = open(self._path, "w+b")
        place = self._stream.seek(0, 2), len(image)
        self._stream.write(image)
        return place

    def _read(self, offset: int, size: int) -> bytes:
        assert self._stream is not None
        self._stream.seek(offset)
        return self._stream.read(size)
