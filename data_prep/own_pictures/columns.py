"""Guesses which columns of a table name the image, its captions and its split."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from data_prep.record import PrepError, in_one_line

# By how sure the name is; all in small letters, with "_" for blanks and hyphens.
_IMAGE = (
    "file_name filename file image image_path image_file image_name img img_path path filepath file_path picture photo",
    "image_id img_id id name key",
)
_CAPTION = (
    "caption captions text texts description descriptions sentence sentences comment",
    "title alt alt_text label prompt raw",
)
_NUMBERED = re.compile(r"(?:caption|text|description|sentence|comment)_?\d+")
_SPLIT = ("split", "partition", "subset")


class Columns(NamedTuple):
    """The names of the columns: of the image, of the captions (one or several), of the split or None."""

    image: str
    captions: tuple[str, ...]
    split: str | None

    def __str__(self) -> str:
        captions = ", ".join(f"'{name}'" for name in self.captions)
        return f"image from '{self.image}', caption from {captions}" + (
            f", split from '{self.split}'" * bool(self.split)
        )


def choose_columns(found: Sequence[str], named: Sequence[str], where: Path) -> Columns:
    """The columns that are ``named``, image first, or else those that their usual names tell; raises PrepError where
    one is not there, or where none or several could be meant."""
    split = next((name for name in found if _plain(name) in _SPLIT and name not in named), None)
    if named:
        if missing := [name for name in named if name not in found]:
            raise PrepError(f"{where}: no column {in_one_line(', '.join(missing))}; {_shown(found)}")
        return Columns(named[0], tuple(named[1:]), split)
    return Columns(_one_of(found, _IMAGE, "the image", where), caption_columns(found, where), split)


def caption_columns(found: Sequence[str], where: Path) -> tuple[str, ...]:
    """The column of captions, or those of caption_1, caption_2, .. by their usual names; raises PrepError as above."""
    numbered = tuple(name for name in found if _NUMBERED.fullmatch(_plain(name)))
    return numbered or (_one_of(found, _CAPTION, "the caption", where),)


def _one_of(found: Sequence[str], tiers: tuple[str, ...], what: str, where: Path) -> str:
    for tier in tiers:
        fitting = [name for name in found if _plain(name) in tier.split()]
        if len(fitting) == 1:
            return fitting[0]
        if fitting:
            several = in_one_line(" and ".join(fitting))
            raise PrepError(f"{where}: {several} could both hold {what}; {_shown(found)}")
    raise PrepError(f"{where}: no column is called as one that holds {what}; {_shown(found)}")


def _shown(found: Sequence[str]) -> str:
    names = in_one_line(", ".join(name[:40] for name in found[:20])) or "none"
    return f"found: {names}; name image and caption by --columns IMAGE,CAPTION"


def _plain(name: str) -> str:
    return re.sub(r"[\s-]+", "_", name.strip().lower())
