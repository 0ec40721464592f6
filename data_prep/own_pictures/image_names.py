"""Finds the image that a row means among the files of a folder or archive, however its name is written."""

from __future__ import annotations

import difflib
import os
import posixpath
import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path

from data_prep.record import in_one_line
from data_prep.shard_members import IMAGE_EXTENSIONS

_SUFFIXES = (*IMAGE_EXTENSIONS, "heic", "heif", "avif")  # the last three are found, and refused by the filters
_SUFFIX = re.compile(rf"\.(?:{'|'.join(_SUFFIXES)})", re.IGNORECASE)
_OF_JPEG = (".jpeg", ".jpe", ".jfif")
_DRIVE = re.compile(r"[A-Za-z]:(?=/)")
_MAX_COMPARED = 20_000  # names that the nearest is looked for among


class NoImage(ValueError):
    """No image can be meant, or not one alone; the text says why."""


def is_image_name(name: str) -> bool:
    return _SUFFIX.fullmatch(posixpath.splitext(name)[1]) is not None


class ImageNames:
    """The files of ``place``, a folder or archive, by their paths below it."""

    def __init__(self, place: Path, names: Iterable[str]) -> None:
        self._place = place
        self._all = set(names)
        self.images = sorted(name for name in self._all if is_image_name(name))
        self._whole: dict[str, list[str]] = {}  # a path as it is compared -> names
        self._ends: dict[str, list[str]] = {}  # the same of what paths end with: "b/1.jpg" and "1.jpg" of "a/b/1.jpg"
        for name in self.images:
            parts = name.split("/")
            for begin in range(len(parts)):
                for form in _forms("/".join(parts[begin:])):  # with its suffix and without
                    (self._ends if begin else self._whole).setdefault(form, []).append(name)
        self._shortened: dict[str, str] = {}  # name -> what was written where its end alone was found

    def find(self, written: str, folder: Path | None = None) -> str:
        """The file that a row means: by its path below the place or from ``folder``, where the row stands, in any case,
        with or without suffix, with either slash; or else the only one that lies deeper under that path, or that a
        path from another machine ends with.

        Raises NoImage where there is none or several, and for a path that leads out of the place.
        """
        if "://" in written:
            raise NoImage("is an address")
        candidates = self._below(written, folder)
        for name in candidates:
            if name in self._all:
                return name
        for table in (self._whole, self._ends):
            for name in candidates:
                if (found := _only(table, name)) is not None:
                    return found
        for name in candidates[:1]:
            parts = name.split("/")
            for begin in range(1, len(parts)):
                if (found := _only(self._whole, "/".join(parts[begin:]))) is not None:
                    if self._shortened.setdefault(found, name) != name:
                        raise NoImage(f"'{in_one_line(self._shortened[found])}' may be '{in_one_line(found)}' as well")
                    return found
        raise NoImage(f"is not below {self._place}")

    def nearest(self, written: str) -> str | None:
        """The image whose name is written most like it, if any is."""
        last = {posixpath.basename(name): name for name in self.images[:_MAX_COMPARED]}
        close = difflib.get_close_matches(posixpath.basename(written.replace("\\", "/")), last, n=1)
        return last[close[0]] if close else None

    def _below(self, written: str, folder: Path | None) -> list[str]:
        """Paths below the place that are meant; links are not looked at, as the names that are there are compared."""
        if written in self._all:
            return [written]
        path = posixpath.normpath(_DRIVE.sub("", written.replace("\\", "/")))
        is_inside = not path.startswith(("/", "../")) and path not in ("..", ".")
        found = [path] if is_inside else []
        place = os.path.realpath(self._place) + "/"
        for base in (folder, Path("/") if path.startswith("/") else None):
            absolute = "" if base is None else posixpath.normpath(posixpath.join(os.path.realpath(base), path))
            if absolute.startswith(place):
                found.append(absolute.removeprefix(place))
        if not found and path.startswith("/"):  # of another machine, perhaps
            found.append(path.lstrip("/"))
        if not found:
            raise NoImage(f"leads out of {self._place}")
        return found


def _forms(path: str) -> tuple[str, ...]:
    """How names are compared: composed, in one case, JPEG's suffixes as one; a path with the suffix of an image also
    without it."""
    plain = unicodedata.normalize("NFC", path).casefold()
    stem, suffix = posixpath.splitext(plain)
    if not _SUFFIX.fullmatch(suffix):
        return (plain,)
    return f"{stem}{'.jpg' if suffix in _OF_JPEG else suffix}", stem


def _only(table: dict[str, list[str]], name: str) -> str | None:
    """The one file of a name with a suffix or without; raises NoImage where there are several."""
    found = table.get(_forms(name)[0], [])
    if len(found) > 1:
        raise NoImage(f"could be {' or '.join(repr(in_one_line(one)) for one in found[:2])}; write the whole name")
    return found[0] if found else None
