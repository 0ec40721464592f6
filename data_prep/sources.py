"""Reads corpora, one generator each: yields a Record per sample and a Rejection per unusable row."""

from __future__ import annotations

import datetime
import decimal
import itertools
import json
import math
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_prep.annotations.annotated import is_plain_file
from data_prep.fetch import UrlRow
from data_prep.filters import caption_problem, safe_key
from data_prep.record import PrepError, Record, Rejection
from data_prep.tables import read_table

FLICKR8K_SPLITS = {
    "train": "Flickr_8k.trainImages.txt",
    "dev": "Flickr_8k.devImages.txt",
    "test": "Flickr_8k.testImages.txt",
}


def url_rows(
    path: Path,
    url_column: str,
    caption_column: str,
    extra_columns: list[str],
    json_columns: list[str],
    columns: list[str] | None = None,
    table_format: str | None = None,
) -> Iterator[UrlRow | Rejection]:
    """The rows of a URL table to download; unusable rows as Rejection, named by the number that would be their key."""
    wanted = list(dict.fromkeys([url_column, caption_column, *extra_columns, *json_columns]))
    for number, row in enumerate(read_table(path, wanted, columns, table_format)):
        if isinstance(row, Rejection):
            yield replace(row, name=f"row {number}")
            continue
        url, caption = row.get(url_column), row.get(caption_column)
        shown = ascii(url).strip("'")[:200]
        name = f"row {number}: {shown}"
        problem, detail = _text_problem(caption)
        if not isinstance(url, str) or not url.strip().lower().startswith(("http://", "https://")):
            yield Rejection("bad_url", name)
        elif problem or caption_problem(url):
            yield Rejection(problem or "invalid_utf8", name, detail)
        else:
            try:
                yield UrlRow(number, url.strip(), caption, _extra_cells(row, extra_columns, json_columns))
            except UnicodeEncodeError as error:
                yield Rejection("invalid_utf8", name, ascii(error.object)[:200])
            except (ValueError, RecursionError) as error:
                yield Rejection("malformed_row", name, str(error)[:200])


def _text_problem(caption: Any) -> tuple[str | None, str]:
    """(reason, detail) why a cell is no caption; numbers, flags and objects are none, NaN is pandas' missing text."""
    if caption is None or (isinstance(caption, float) and math.isnan(caption)):
        return "empty_caption", ""
    if not isinstance(caption, str):
        return "malformed_row", f"the caption is of type {type(caption).__name__}: {ascii(caption)[:80]}"
    return caption_problem(caption), ascii(caption)[:80]


def _extra_cells(row: dict[str, Any], extra_columns: list[str], json_columns: list[str]) -> dict[str, Any]:
    """Further cells as KEY.json will hold them; raises ValueError for what JSON or UTF-8 can't hold."""
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
