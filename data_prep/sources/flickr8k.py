"""Reads Flickr8k: its images, captions and split lists."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from data_prep.image_places import Places
from data_prep.record import MissingInput, PrepError, Record, Rejection
from data_prep.shard_members import safe_key
from data_prep.sources.tables import read_table

MAX_FILE_BYTES = 1 << 30
FLICKR8K_SPLITS = {
    "train": "Flickr_8k.trainImages.txt",
    "dev": "Flickr_8k.devImages.txt",
    "test": "Flickr_8k.testImages.txt",
}


def flickr8k_records(places: Places, captions: dict[str, list[str]], names: list[str]) -> Iterator[Record | Rejection]:
    """The images ``names`` of one split with all their captions (five each in the original)."""
    keys = distinct_keys(names)
    for name in names:
        texts = tuple(captions.get(name, ()))
        rows = max(1, len(texts))
        found = places.find([name]) if name and Path(name).name == name else None
        if found is None:
            yield Rejection("missing_image", name, "no such file among the images", rows=rows)
            continue
        try:
            yield Record(keys[name], (found.read(MAX_FILE_BYTES),), texts, {"file": name})
        except OSError as error:
            yield Rejection("undecodable_image", name, str(error)[:200], rows=rows)


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


def is_kaggle(path: Path) -> bool:
    """Whether a file of captions has Kaggle's header, ``image,caption``."""
    return next(_lines(path), "").replace('"', "").replace(" ", "").lower() == "image,caption"


def read_kaggle_captions(path: Path) -> tuple[dict[str, list[str]], list[Rejection]]:
    """Captions by image file name from Kaggle's CSV with that header; other lines as Rejection."""
    captions: dict[str, list[str]] = {}
    problems = []
    for row in read_table(path, ["image", "caption"], table_format="csv"):
        if isinstance(row, Rejection):
            problems.append(replace(row, name=path.name))
        else:
            captions.setdefault(row["image"].strip(), []).append(row["caption"])
    if not captions:
        raise PrepError(f"{path}: no row below its header; expected lines NAME,caption")
    return captions, problems


def drawn_splits(names: Iterable[str], dev_share: float, seed: int) -> dict[str, list[str]]:
    """Train, and dev with about ``dev_share`` of the images: a hash of seed and name says where an image belongs."""
    splits: dict[str, list[str]] = {"train": [], "dev": []}
    for name in names:
        digest = hashlib.sha256(f"{seed} {name}".encode("utf-8", "surrogateescape")).digest()
        is_dev = int.from_bytes(digest[:8], "big") < dev_share * 2**64
        splits["dev" if is_dev else "train"].append(name)
    return {split: found for split, found in splits.items() if found}


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
        raise MissingInput(f"{path}: no such file") from None
