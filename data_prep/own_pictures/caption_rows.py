"""What every form of captions becomes: rows that name an image as it is written there, with its captions."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.own_pictures.columns import Columns
from data_prep.record import Rejection
from data_prep.sources.url_table import captions_of

_LONGEST_LIST = 100_000  # characters of a cell that may be a list


class CaptionRow(NamedTuple):
    """``place`` says where it stands, as "row 17". Rows are counted from 1, a header is none."""

    place: str
    image: str
    captions: tuple[str, ...]
    split: str | None = None


@dataclass(frozen=True)
class CaptionSource:
    """Captions that can be read (``rows``, any number of times); ``told`` says how, for the user to check.

    ``files`` are what they are read from. ``folder`` is what names are relative to, besides the folder of images.
    ``columns`` are None where the form has no columns; ``header`` are all that there are.
    """

    told: str
    files: tuple[Path, ...]
    rows: Callable[[], Iterator[CaptionRow | Rejection]]
    folder: Path | None = None
    columns: Columns | None = None
    header: tuple[str, ...] = field(default=())


def row_of(cells: dict[str, Any], columns: Columns, place: str) -> Iterator[CaptionRow | Rejection]:
    """The row that the cells of a table, or an object of a JSON file, make; what of it can't be used as Rejection."""
    image = cells.get(columns.image)
    if isinstance(image, int) and not isinstance(image, bool):
        image = str(image)
    captions: list[str] = []
    problems: list[Rejection] = []
    given = [cells.get(name) for name in columns.captions]
    if len(given) > 1:  # caption_1 to caption_5, of which some may be empty
        given = [cell for cell in given if cell not in (None, "")] or [None]
    for cell in given:
        usable, unusable = captions_of(_listed(cell), f"{place}: {_shown(image)}")
        captions += usable
        problems += unusable
    if not isinstance(image, str) or not image.strip():
        what = "no image is named" if image in (None, "") else f"the image is {ascii(image)[:80]}, expected its name"
        yield Rejection("malformed_row", place, what, rows=len(captions) + len(problems))
        return
    yield from problems
    split = cells.get(columns.split) if columns.split else None
    if captions:
        yield CaptionRow(place, image.strip(), tuple(captions), None if split in (None, "") else str(split).strip())


def _listed(cell: Any) -> Any:
    """A cell of a table that holds a list of texts, as JSON or as Python prints it, as that list."""
    if not isinstance(cell, str) or not cell.lstrip().startswith("[") or len(cell) > _LONGEST_LIST:
        return cell
    for read in (json.loads, ast.literal_eval):
        try:
            value = read(cell.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(value, list) and value and all(isinstance(one, str) for one in value):
            return value
    return cell


def _shown(image: Any) -> str:
    return ascii(image)[:200]
