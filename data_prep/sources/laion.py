"""Reads LAION's folders of parquet: each file's own columns are mapped, rows beyond the wanted scores are counted."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from data_prep.record import PrepError, Rejection, UrlRow, in_one_line
from data_prep.sources.parquet_cells import column_names
from data_prep.sources.url_table import url_rows

# What is read -> what it is called in LAION-400M, 2B-en and its joined version, LAION-COCO, Re-LAION and copies.
_NAMES = {
    "url": ("url", "image_url"),
    "caption": ("top_caption", "caption", "text"),
    "punsafe": ("punsafe",),
    "nsfw": ("nsfw",),
    "similarity": ("similarity",),
    "pwatermark": ("pwatermark",),
    "hash": ("hash", "md5", "image_hash"),
    "license": ("license",),
    "sample_id": ("sample_id", "id"),
}


@dataclass(frozen=True)
class Scores:
    """Which rows are wanted; None where any is. ``nsfw`` are labels, compared without case."""

    max_punsafe: float | None = None
    min_similarity: float | None = None
    max_watermark: float | None = None
    nsfw: tuple[str, ...] | None = None


def laion_columns(path: Path, wanted: Scores, caption: str | None = None) -> dict[str, str]:
    """What is read -> this file's column of it; ``caption`` names the caption's. Raises PrepError where the address,
    the caption or a score that is asked for has no column."""
    try:
        found = column_names(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise PrepError(f"{path}: cannot be read as parquet ({in_one_line(error)}); download it again") from error
    by_lower: dict[str, str] = {}
    for name in found:
        by_lower.setdefault(name.lower(), name)
    columns = {
        what: next((by_lower[name] for name in names if name in by_lower), None) for what, names in _NAMES.items()
    }
    if caption is not None:
        columns["caption"] = caption if caption in found else None
    needed = {
        "url": True,
        "caption": True,
        "punsafe": wanted.max_punsafe is not None,
        "similarity": wanted.min_similarity is not None,
        "pwatermark": wanted.max_watermark is not None,
        "nsfw": wanted.nsfw is not None,
    }
    if missing := [what for what, is_needed in needed.items() if is_needed and columns[what] is None]:
        shown = in_one_line(", ".join(found[:20]))
        raise PrepError(
            f"{path}: no column of {', '.join(missing)} (found: {shown}); name the caption's by --caption-column, "
            "leave out an option on scores that this file lacks"
        )
    return {what: name for what, name in columns.items() if name is not None}


def laion_rows(files: list[Path], wanted: Scores, caption: str | None = None) -> Iterator[UrlRow | Rejection]:
    """The rows of all files, numbered through; those beyond the wanted scores, or without the score, as Rejection."""
    first = 0
    for path in files:
        columns = laion_columns(path, wanted, caption)
        further = {name: what for what, name in columns.items() if what not in ("url", "caption")}
        for row in url_rows(path, columns["url"], columns["caption"], list(further), [], table_format="parquet"):
            if isinstance(row, UrlRow):
                extra = {further[name]: value for name, value in row.extra.items()}
                yield _judged(replace(row, number=first + row.number, extra=extra), wanted)
            else:
                number, _, rest = row.name.removeprefix("row ").partition(":")
                yield replace(row, name=f"row {first + int(number)}:{rest}")
        first += pyarrow.parquet.read_metadata(path).num_rows


def _judged(row: UrlRow, wanted: Scores) -> UrlRow | Rejection:
    problem = _beyond(row.extra, wanted)
    if problem is None:
        return row
    return Rejection(problem[0], f"row {row.number}: {row.url[:200]}", problem[1], rows=len(row.captions))


def _beyond(extra: dict[str, Any], wanted: Scores) -> tuple[str, str] | None:
    """(reason, detail) why a row is not wanted, or None."""
    limits = (
        ("punsafe", wanted.max_punsafe, "unsafe_image", lambda value, limit: value <= limit),
        ("similarity", wanted.min_similarity, "low_similarity", lambda value, limit: value >= limit),
        ("pwatermark", wanted.max_watermark, "watermark", lambda value, limit: value <= limit),
    )
    for what, limit, reason, holds in limits:
        if limit is None:
            continue
        value = _number(extra.get(what))
        if value is None or not holds(value, limit):
            return reason, f"{what} is {'missing' if value is None else value}, wanted {limit}"
    label = extra.get("nsfw")
    if wanted.nsfw is not None and str(label).lower() not in {one.lower() for one in wanted.nsfw}:
        return "unsafe_image", f"nsfw is {ascii(label)[:40]}, wanted {' or '.join(wanted.nsfw)}"
    return None


def _number(value: Any) -> float | None:
    """A score, of whatever type its column is; None where there is none."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None
