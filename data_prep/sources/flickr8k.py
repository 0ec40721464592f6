"""Reads Flickr8k: its images, captions and split lists."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

from data_prep.annotations.annotated import is_plain_file
from data_prep.record import PrepError, Record, Rejection
from data_prep.shard_members import safe_key

FLICKR8K_SPLITS = {
    "train": "Flickr_8k.trainImages.txt",
    "dev": "Flickr_8k.devImages.txt",
    "test": "Flickr_8k.testImages.txt",
}


def flickr8k_records(images: Path, captions: dict[str, list[str]], names: list[str]) -> Iterator[Record | Rejection]:
    """The images ``names`` of one split with all their captions (five each in the original)."""
    keys = distinct_keys(names)
    for name in names:
        texts = tuple(captions.get(name, ()))
        path = images / name
        if Path(name).name != name or not is_plain_file(path):
            yield Rejection("missing_image", name, str(path), rows=max(1, len(texts)))
        else:
            yield Record(keys[name], (path.read_bytes(),), texts, {"file": name})


def distinct_keys(names: Iterable[str]) -> dict[str, str]:
    """A key for each file name: its stem, or where another name has that key already, the name with its suffix."""
    keys: dict[str, str] = {}
    taken: set[str] = set()
    for name in names:
        if name in keys:
            continue
        further = (f"{name}_{number}" for number in itertools.count(2))
        candidates = map(safe_key, itertools.chain([Path(name).stem, name], further))
        keys[name] = next(key for key in candidates if key not in taken)
        taken.add(keys[name])
    return keys


def read_flickr8k_captions(path: Path) -> tuple[dict[str, list[str]], list[Rejection]]:
    """Captions by image file name from lines ``NAME#k<TAB>caption``, in the order of k; other lines as Rejection."""
    numbered: dict[str, list[tuple[int, str]]] = {}
    problems = []
    for number, line in enumerate(_lines(path), start=1):
        head, tab, caption = line.partition("\t")
        name, _, position = head.rpartition("#")
        if tab and name and position.isdecimal():
            numbered.setdefault(name, []).append((int(position), caption))
        else:
            problems.append(Rejection("malformed_row", f"{path.name} line {number}", ascii(line[:80])))
    if not numbered:
        raise PrepError(f"{path}: no line of the form NAME#k<TAB>caption; give the captions file by --captions")
    return {name: [text for _, text in sorted(texts)] for name, texts in numbered.items()}, problems


def read_names(path: Path) -> list[str]:
    """The image file names of a split list, one on each line."""
    return [line.strip() for line in _lines(path)]


def _lines(path: Path) -> Iterator[str]:
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="\n") as stream:
            for line in stream:
                if line.strip():
                    yield line.rstrip("\r\n")
    except FileNotFoundError:
        raise PrepError(f"{path}: no such file") from None
