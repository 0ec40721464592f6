"""Finds what killed preparations left beside the splits, and says what each of it is."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from data_prep.manifest import MANIFEST_NAME, is_split

_BUILT = re.compile(r"\.(?P<split>.+)\.(?P<process>\d+)\.(?P<kind>part|old)")
_DOWNLOAD = re.compile(r"\.(?P<split>.+)\.(parts|input)")  # the parts of a split, the copy of its table
_DROPPED = re.compile(r"\.(?P<split>.+)\.parts\.[0-9a-f]{12}")  # parts that were being planned or removed
_BESIDE = re.compile(r"\.(?P<name>.+)\.(?P<process>\d+)")  # of write_atomically


class Leftover(NamedTuple):
    """A file or folder that no split names. ``kind``: "leftover" may be removed, "unpublished" is a finished split that
    is not in its place, "superseded" one whose place is taken, "unfinished" a download that can go on."""

    path: Path
    kind: str
    text: str

    @property
    def split_dir(self) -> Path:
        """Where the split belongs that it is of."""
        patterns = (_BUILT, _DOWNLOAD, _DROPPED)
        found = next((found for pattern in patterns if (found := pattern.fullmatch(self.path.name))), None)
        assert found is not None, self.path
        return self.path.parent / found["split"]


def find_leftovers(folder: Path, min_age_seconds: float, split: str | None = None) -> list[Leftover]:
    """Those in ``folder``, of ``split`` alone where it is given. What a running process of this machine may still write
    and what changed in the last ``min_age_seconds`` is left out: it may be at work on another machine."""
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if entry.name.startswith(".")]
    names.sort(key=lambda name: (name.endswith(".old"), name))  # new splits before those that they were to replace
    found = (_leftover(folder / name, min_age_seconds) for name in names)
    return [one for one in found if one is not None and (split is None or one.path.name.startswith(f".{split}."))]


def _leftover(path: Path, min_age_seconds: float) -> Leftover | None:
    if path.is_symlink():
        return None
    if path.is_file():
        found = _BESIDE.fullmatch(path.name)
        is_left = found is not None and not _is_busy(path, int(found["process"]), min_age_seconds)
        return Leftover(path, "leftover", f"{path}: a file that was being written") if is_left else None
    if _DROPPED.fullmatch(path.name) and path.is_dir():
        is_left = _age_seconds(path) >= min_age_seconds
        return Leftover(path, "leftover", f"{path}: parts that were being planned, or removed") if is_left else None
    if (found := _DOWNLOAD.fullmatch(path.name)) and path.is_dir():
        is_added_to = (path / "base").is_dir()  # by --retry-failed
        if is_added_to or not is_split(path.parent / found["split"]):
            return Leftover(path, "unfinished", f"{path}: an unfinished download; the same command goes on with it")
        if _age_seconds(path) < min_age_seconds:
            return None
        return Leftover(path, "leftover", f"{path}: the download of a split that is finished")
    found = _BUILT.fullmatch(path.name)
    if found is None or not path.is_dir() or _is_busy(path, int(found["process"]), min_age_seconds):
        return None
    has_split, is_finished = is_split(path.parent / found["split"]), (path / MANIFEST_NAME).is_file()
    if found["kind"] == "old":
        if has_split or not is_finished:
            return Leftover(path, "leftover", f"{path}: the split that was replaced")
        return Leftover(path, "unpublished", f"{path}: the split that was to be replaced, and was not")
    if not is_finished:
        return Leftover(path, "leftover", f"{path}: a split whose writing was cut off")
    kind = "superseded" if has_split else "unpublished"
    return Leftover(path, kind, f"{path}: a finished split that was not put in its place")


def _is_busy(path: Path, process: int, min_age_seconds: float) -> bool:
    return _age_seconds(path) < min_age_seconds or (process != os.getpid() and _is_running(process))


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def _age_seconds(path: Path) -> float:
    """Since the last change of a file, or of anything in a folder."""
    return time.time() - max(_changes(path), default=0.0)


def _changes(path: Path) -> Iterator[float]:
    yield path.lstat().st_mtime
    if path.is_dir():
        for folder, _, names in os.walk(path):
            yield from (os.lstat(os.path.join(folder, name)).st_mtime for name in names)
