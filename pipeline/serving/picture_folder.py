"""A folder of pictures that is searched by sentences: opened without leaving it, indexed a few pictures at a time."""

from __future__ import annotations

import errno
import heapq
import io
import os
import stat
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastapi import HTTPException
from PIL import Image

from pipeline.batching.model import Index, Model
from pipeline.config.options import ConfigError
from pipeline.serving.uploads import Limits, decode

ENDINGS = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp"}
MAX_PICTURES = 100_000
MOST_AT_ONCE = 32  # pictures that are indexed in a step
STEP_SECONDS = 0.5  # that a step takes about, as a request may wait for it
SIZES = {"small": 320, "large": 1024}  # longer side of what is shown, px


@dataclass(frozen=True)
class Found:
    """A picture by its number, its name below the folder, and its score."""

    number: int
    name: str
    score: float


class PictureFolder:
    """The pictures below a folder. Links are not followed, so that nothing outside of it is read."""

    def __init__(self, root: Path, limits: Limits) -> None:
        """Raises ConfigError where there is no such folder."""
        if not root.is_dir():
            raise ConfigError(f"--search {root}: no such folder; give a folder of pictures")
        self._root, self._limits = root.resolve(), limits
        self._names: list[str] = []  # of what is indexed, by number
        self._parts: list[tuple[int, Index]] = []  # number of its first picture, index
        self._lock = threading.Lock()  # the worker writes, others read
        self._total: int | None = None
        self._refused = 0
        self._is_done = False

    def status(self) -> dict[str, int | bool | None]:
        """``total`` is None until the folder has been listed; ``refused`` are no usable pictures."""
        with self._lock:
            indexed, refused = len(self._names), self._refused
            return {"total": self._total, "indexed": indexed, "refused": refused, "done": self._is_done}

    def indexing(self, model: Model) -> Iterator[None]:
        """Index all pictures, some in each step."""
        names = list(_names_below(self._root))
        with self._lock:
            self._total = len(names)
        yield
        begin, count = 0, 4
        while begin < len(names):
            began = time.monotonic()
            self._index(model, names[begin : begin + count])
            begin, seconds = begin + count, time.monotonic() - began
            count = max(1, count // 2) if seconds > STEP_SECONDS else min(2 * count, MOST_AT_ONCE)
            yield
        with self._lock:
            self._is_done = True

    def _index(self, model: Model, names: Sequence[str]) -> None:
        pictures: list[tuple[str, Image.Image]] = []
        for name in names:
            try:
                pictures.append((name, decode(self._read(name), self._limits.pixels)))
            except (HTTPException, OSError):
                with self._lock:
                    self._refused += 1
        if pictures:
            index = model.index([image for _, image in pictures])
            with self._lock:
                self._parts.append((len(self._names), index))
                self._names += [name for name, _ in pictures]

    def searching(self, text: str, top: int) -> Iterator[list[Found]]:
        """The ``top`` best of what has been looked through, more with each step."""
        with self._lock:
            parts, names = tuple(self._parts), tuple(self._names)
        best: list[tuple[float, int]] = []
        for begin, index in parts:
            best += [(float(score), begin + number) for number, score in index.search(text, top)]
            best = heapq.nlargest(top, best, key=lambda one: (one[0], -one[1]))
            yield [Found(number, _shown(names[number]), score) for score, number in best]

    def jpeg(self, number: int, size: str) -> bytes:
        """The picture by its number, drawn anew without what its file holds besides, its longer side as SIZES says.

        Raises:
            HTTPException: 404, no such picture, or no longer one.
        """
        with self._lock:
            name = self._names[number] if 0 <= number < len(self._names) else None
        if name is None:
            raise HTTPException(404, f"no picture has the number {number}")
        try:
            picture = decode(self._read(name), self._limits.pixels)
        except (OSError, HTTPException):
            raise HTTPException(404, f"picture {number} is no longer there") from None
        picture.thumbnail((SIZES[size], SIZES[size]))
        stream = io.BytesIO()
        picture.save(stream, "JPEG", quality=85)
        return stream.getvalue()

    def _read(self, name: str) -> bytes:
        """The bytes of a regular file; each folder on the way is opened in the one before, so that no link counts.

        Raises:
            OSError: a link, no regular file, or more bytes than a picture may have.
        """
        *folders, last = Path(name).parts
        place = os.open(self._root, os.O_RDONLY | os.O_DIRECTORY)
        try:
            for folder in folders:
                inner = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=place)
                os.close(place)
                place = inner
            file = os.open(last, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=place)
        finally:
            os.close(place)
        with os.fdopen(file, "rb") as stream:
            if not stat.S_ISREG(os.fstat(file).st_mode):
                raise OSError(errno.EINVAL, "no regular file", name)
            data = stream.read(self._limits.bytes + 1)
        if len(data) > self._limits.bytes:
            raise OSError(errno.EFBIG, "too large", name)
        return data


def _shown(name: str) -> str:
    """A name of bytes that are no UTF-8 as a text that can be sent."""
    return os.fsencode(name).decode("utf-8", "replace")


def _names_below(root: Path) -> Iterator[str]:
    """Names of files that end like pictures, relative to ``root``, in order; MAX_PICTURES at most."""
    found = 0
    for folder, folders, files in os.walk(root):  # links to folders are listed, not entered
        folders.sort()
        for name in sorted(files):
            path = Path(folder, name)
            if path.suffix.lower() in ENDINGS and not path.is_symlink():
                yield str(path.relative_to(root))
                found += 1
                if found == MAX_PICTURES:
                    return
