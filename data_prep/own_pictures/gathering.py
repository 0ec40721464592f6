"""Gathers all captions of each image, reads what the image holds, and gives it a split."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache

from data_prep.annotations.annotated import Annotated, AnnotatedSplit
from data_prep.filters import Limits, check_record
from data_prep.image_places import Places
from data_prep.own_pictures.caption_rows import CaptionRow, CaptionSource
from data_prep.own_pictures.image_names import ImageNames, NoImage
from data_prep.own_pictures.splits import DEV, SPLIT_NAMES, SPLITS, TEST, TRAIN, draw, folder_splits
from data_prep.prepare import progress
from data_prep.record import Record, Rejection
from data_prep.sources.flickr8k import distinct_keys


@dataclass
class Picture:
    """An image by its path below the place, the rows that name it, and a digest of its bytes."""

    name: str
    captions: list[str] = field(default_factory=list)
    place: str = ""  # of its first row
    split: str | None = None
    digest: bytes = b""


@dataclass
class Gathered:
    """``pictures`` by name; ``problems`` in the order of the rows; ``rows`` that were read."""

    pictures: dict[str, Picture] = field(default_factory=dict)
    problems: list[Rejection] = field(default_factory=list)
    rows: int = 0

    def refuse(self, picture: Picture, reason: str, detail: str) -> None:
        """Take a picture out, its captions counted as lost."""
        del self.pictures[picture.name]
        name = f"{picture.place}: {ascii(picture.name)[:200]}"
        self.problems.append(Rejection(reason, name, detail, rows=len(picture.captions)))


def gather(sources: Iterable[CaptionSource], names: ImageNames) -> Gathered:
    """The pictures that the rows name; no image is opened."""
    gathered = Gathered()
    for source in sources:
        for row in source.rows():
            gathered.rows += 1
            if isinstance(row, Rejection):
                gathered.problems.append(_explained(row))
            elif row.split is not None and row.split.lower() not in SPLIT_NAMES:
                detail = f"split {ascii(row.split)[:40]}, expected train, dev (val) or test"
                gathered.problems.append(_rejection(row, "unknown_split", detail))
            else:
                _take(gathered, row, source, names)
    return gathered


def _take(gathered: Gathered, row: CaptionRow, source: CaptionSource, names: ImageNames) -> None:
    try:
        name = names.find(row.image, source.folder)
    except NoImage as error:
        reason = "bad_url" if "://" in row.image else "missing_image"
        gathered.problems.append(_rejection(row, reason, str(error)))
        return
    picture = gathered.pictures.setdefault(name, Picture(name, place=row.place))
    picture.captions += row.captions
    split = None if row.split is None else SPLIT_NAMES[row.split.lower()]
    picture.split = max((one for one in (picture.split, split) if one), key=SPLITS.index, default=None)


def _rejection(row: CaptionRow, reason: str, detail: str) -> Rejection:
    return Rejection(reason, f"{row.place}: {ascii(row.image)[:200]}", detail, rows=len(row.captions))


def _explained(problem: Rejection) -> Rejection:
    if problem.reason != "invalid_utf8" or not problem.detail.startswith("'"):
        return problem
    return replace(problem, detail=f"{problem.detail}; Latin-1, perhaps")


def read_contents(gathered: Gathered, places: Places, limits: Limits) -> None:
    """Read every picture once for its digest; those that can't be read, or are too large, are refused."""
    for picture in progress(list(gathered.pictures.values()), len(gathered.pictures), "reading", "image"):
        found = places.find([picture.name])
        if found is None:  # a pipe or device, or removed meanwhile
            gathered.refuse(picture, "missing_image", "not a plain file")
        elif found.size > limits.max_image_bytes:
            gathered.refuse(picture, "image_bytes_too_large", f"{found.size} bytes")
        else:
            try:
                picture.digest = hashlib.sha256(found.read(limits.max_image_bytes)).digest()
            except OSError as error:
                gathered.refuse(picture, "undecodable_image", str(error)[:200])


def split_pictures(gathered: Gathered, shares: Mapping[str, float], seed: int, places: Places, limits: Limits) -> str:
    """Give every picture its split, equal bytes the same one; returns where the splits come from, for the user."""
    pictures = list(gathered.pictures.values())
    is_usable = _usable(pictures, places, limits)
    by_folder = {} if any(one.split for one in pictures) else folder_splits([one.name for one in pictures])
    for picture in pictures:
        picture.split = picture.split or by_folder.get(picture.name)
    told = "folders" if by_folder else "the captions' own"
    if not any(one.split in (DEV, TEST) for one in pictures):
        told = "drawn"
        for picture in pictures:
            picture.split = None
    fixed: dict[bytes, str] = {}
    for picture in pictures:
        if picture.split is not None:
            fixed[picture.digest] = max(picture.split, fixed.get(picture.digest, TRAIN), key=SPLITS.index)
    for picture in pictures:
        if picture.split not in (None, fixed.get(picture.digest)):
            gathered.refuse(
                picture, "held_out_image", f"the same bytes stand in {fixed[picture.digest]} under another name"
            )
    drawn = draw((one.digest for one in pictures if one.digest not in fixed), shares, seed, is_usable)
    if fixed and shares.get(DEV) and DEV not in {*fixed.values(), *drawn.values()}:
        told += ", dev drawn from train"
        training = [digest for digest, split in fixed.items() if split == TRAIN]
        fixed |= draw(training, {DEV: shares[DEV]}, seed, is_usable)
    for picture in pictures:
        picture.split = (drawn | fixed)[picture.digest]
    return told


def _usable(pictures: list[Picture], places: Places, limits: Limits) -> Callable[[bytes], bool]:
    """Whether the filters keep something of the images with a digest."""
    of_digest: dict[bytes, list[Picture]] = {}
    for picture in pictures:
        of_digest.setdefault(picture.digest, []).append(picture)

    @cache
    def is_usable(digest: bytes) -> bool:
        for picture in of_digest[digest]:
            found = places.find([picture.name])
            content = b"" if found is None else found.read(limits.max_image_bytes)
            if check_record(Record("key", (content,), tuple(picture.captions)), limits)[0] is not None:
                return True
        return False

    return is_usable


def annotated_splits(gathered: Gathered) -> list[AnnotatedSplit]:
    """The splits that have pictures, train first, with keys that differ in all of them; what could not be read is
    counted in the first."""
    keys = distinct_keys(gathered.pictures)
    splits = []
    for split in SPLITS:
        images = [
            Annotated(keys[one.name], ((one.name,),), (f"bytes/{one.digest.hex()}",), {"path": one.name}, one.captions)
            for one in gathered.pictures.values()
            if one.split == split
        ]
        if images:
            splits.append(AnnotatedSplit(split, images, [] if splits else gathered.problems, {}))
    return splits
