"""Reads a table of addresses and captions: a UrlRow for each row to download, a Rejection for each other one."""

from __future__ import annotations

import datetime
import decimal
import json
import math
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_prep.filters import caption_problem
from data_prep.record import Rejection, UrlRow
from data_prep.sources.tables import read_table

_LOCAL = "a path, no http(s) address; `python -m data_prep local` prepares pictures of this machine"


def url_rows(
    path: Path,
    url_column: str,
    caption_column: str,
    extra_columns: list[str],
    json_columns: list[str],
    columns: list[str] | None = None,
    table_format: str | None = None,
) -> Iterator[UrlRow | Rejection]:
    """The rows of a URL table to download; unusable rows as Rejection, named by the number that would be their key.

    A list in the caption's cell holds several captions of the image, each of which is judged and counted.
    """
    wanted = list(dict.fromkeys([url_column, caption_column, *extra_columns, *json_columns]))
    for number, row in enumerate(read_table(path, wanted, columns, table_format)):
        if isinstance(row, Rejection):
            yield replace(row, name=f"row {number}")
            continue
        url, cell = row.get(url_column), row.get(caption_column)
        shown = ascii(url).strip("'")[:200]
        name = f"row {number}: {shown}"
        captions, problems = captions_of(cell, name)
        if not isinstance(url, str) or not url.strip().lower().startswith(("http://", "https://")):
            detail = _LOCAL if isinstance(url, str) and ("://" not in url or url.strip().startswith("file:")) else ""
            yield Rejection("bad_url", name, detail, rows=len(captions) + len(problems))
        elif caption_problem(url):
            yield Rejection("invalid_utf8", name, rows=len(captions) + len(problems))
        else:
            yield from problems
            if captions:
                yield _row(number, url.strip(), captions, row, extra_columns, json_columns, name)


def _row(
    number: int,
    url: str,
    captions: tuple[str, ...],
    row: dict[str, Any],
    extra_columns: list[str],
    json_columns: list[str],
    name: str,
) -> UrlRow | Rejection:
    try:
        return UrlRow(number, url, captions, extra_cells(row, extra_columns, json_columns))
    except UnicodeEncodeError as error:
        return Rejection("invalid_utf8", name, ascii(error.object)[:200], rows=len(captions))
    except (ValueError, RecursionError) as error:
        return Rejection("malformed_row", name, str(error)[:200], rows=len(captions))


def captions_of(cell: Any, name: str) -> tuple[tuple[str, ...], list[Rejection]]:
    """The captions in a cell, a text or a list of texts, and those that can't be used; at least one in all."""
    captions, problems = [], []
    for caption in cell if isinstance(cell, list) and cell else [None if cell == [] else cell]:
        problem, detail = _text_problem(caption)
        if problem is None:
            captions.append(caption)
        else:
            problems.append(Rejection(problem, name, detail))
    return tuple(captions), problems


def _text_problem(caption: Any) -> tuple[str | None, str]:
    """(reason, detail) why a value is no caption; numbers, flags and objects are none, NaN is pandas' missing text."""
    if caption is None or (isinstance(caption, float) and math.isnan(caption)):
        return "empty_caption", ""
    if not isinstance(caption, str):
        return "malformed_row", f"the caption is of type {type(caption).__name__}: {ascii(caption)[:80]}"
    return caption_problem(caption), ascii(caption)[:80]


def extra_cells(row: dict[str, Any], extra_columns: list[str], json_columns: list[str]) -> dict[str, Any]:
    """Further cells as KEY.json will hold them; raises ValueError for what JSON or UTF-8 can't hold."""
    if not extra_columns and not json_columns:
        return {}
    extra = {column: row.get(column) for column in extra_columns}
    for column in json_columns:
        value = row.get(column)
        extra[column] = json.loads(value) if isinstance(value, str) else value
    extra = _as_json(extra)
    json.dumps(extra, ensure_ascii=False).encode()
    return extra


def _as_json(value: Any) -> Any:
    """A JSON value: times as ISO 8601, decimals as their digits, NaN and infinities (a missing number) as null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, (datetime.date, datetime.time)):  # datetime is a date
        return value.isoformat()
    if isinstance(value, (decimal.Decimal, datetime.timedelta, uuid.UUID)):
        return str(value)
    if isinstance(value, dict):
        return {str(key): _as_json(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_as_json(one) for one in value]
    raise ValueError(f"a cell of type {type(value).__name__}, which JSON does not have")
