"""Finds the captions that lie among the images: a metadata file, or a text beside each image."""

from __future__ import annotations

import codecs
import posixpath
from collections.abc import Iterator
from pathlib import Path

from data_prep.image_places import Places
from data_prep.own_pictures.caption_files import SUFFIXES, open_captions
from data_prep.own_pictures.caption_rows import CaptionRow, CaptionSource
from data_prep.own_pictures.image_names import is_image_name
from data_prep.own_pictures.splits import SPLIT_NAMES
from data_prep.record import MissingInput, PrepError, Rejection

_STEMS = ("metadata", "captions", "flickr8k.token", "results")
_MAX_TEXT_BYTES = 1 << 20


def captions_among(place: Path, places: Places, names: list[str], named: list[str]) -> list[CaptionSource]:
    """The captions of a folder of images without a file of captions being named: its metadata file, those of its
    folders train, dev, .., or NAME.txt beside NAME.jpg. Raises PrepError where there are none, or two files."""
    files = [name for name in names if _may_hold_captions(name)]
    above = [name for name in files if "/" not in name]
    chosen = above or [name for name in files if posixpath.dirname(name) in SPLIT_NAMES]
    for folder in {posixpath.dirname(name) for name in chosen}:
        if len(several := [name for name in chosen if posixpath.dirname(name) == folder]) > 1:
            raise PrepError(f"{place}: {' and '.join(several)} could both hold the captions; name one by --captions")
    if chosen and not place.is_dir():
        raise PrepError(f"{place}: holds {chosen[0]}; unpack that file and name it by --captions")
    if chosen:
        return [open_captions(place / name, named) for name in chosen]
    texts = [name for name in names if name.endswith(".txt")]
    if texts and any(is_image_name(name) for name in names):
        return [_texts_beside(place, places, texts)]
    raise MissingInput(
        f"{place}: neither metadata.csv, .jsonl or .parquet nor a NAME.txt beside each NAME.jpg; name the file of "
        "captions by --captions"
    )


def _may_hold_captions(name: str) -> bool:
    stem, _, suffix = posixpath.basename(name).lower().removesuffix(".gz").rpartition(".")
    return stem in _STEMS and suffix in SUFFIXES


def _texts_beside(place: Path, places: Places, texts: list[str]) -> CaptionSource:
    def rows() -> Iterator[CaptionRow | Rejection]:
        for name in texts:
            found = places.find([name])
            content = b"" if found is None else found.read(_MAX_TEXT_BYTES)
            if len(content) > _MAX_TEXT_BYTES:
                yield Rejection("malformed_row", f"file {name}", f"more than {_MAX_TEXT_BYTES} bytes")
                continue
            is_wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
            text = content.decode("utf-16", "replace") if is_wide else content.decode("utf-8-sig", "surrogateescape")
            captions = tuple(line.strip() for line in text.splitlines() if line.strip())
            if captions:
                yield CaptionRow(f"file {name}", name.removesuffix(".txt"), captions)
            else:
                yield Rejection("empty_caption", f"file {name}", "no line in it")

    return CaptionSource(f"{place}: NAME.txt beside each image", (), rows)
