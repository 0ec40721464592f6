"""Reads corpora, one generator each: yields a Record per sample and a Rejection per unusable row."""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep.fetch import UrlRow
from data_prep.filters import caption_problem
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
    """The rows of a URL table to download; unusable rows as Rejection."""
    wanted = list(dict.fromkeys([url_column, caption_column, *extra_columns, *json_columns]))
    for number, row in enumerate(read_table(path, wanted, columns, table_format)):
        if isinstance(row, Rejection):
            yield row
            continue
        url, caption = row.get(url_column), row.get(caption_column)
        name = f"row {number}: {ascii(url)[1:200]}"
        problem = caption_problem(None if caption is None else str(caption))
        if not isinstance(url, str) or not url.strip().lower().startswith(("http://", "https://")):
            yield Rejection("bad_url", name)
        elif problem or caption_problem(url):
            yield Rejection(problem or "invalid_utf8", name, ascii(caption)[:80])
        else:
            try:
                extra = _extra_cells(row, extra_columns, json_columns)
            except (ValueError, RecursionError) as error:
                yield Rejection("malformed_row", name, str(error)[:200])
                continue
            yield UrlRow(number, url.strip(), str(caption), extra)


def _extra_cells(row: dict[str, Any], extra_columns: list[str], json_columns: list[str]) -> dict[str, Any]:
    extra = {column: row.get(column) for column in extra_columns}
    for column in json_columns:
        value = row.get(column)
        extra[column] = json.loads(value) if isinstance(value, str) else value
    json.dumps(extra).encode()  # a TypeError here would be ours; a type that JSON lacks is the table's
    return extra


def flickr8k_records(images: Path, captions: dict[str, list[str]], names: list[str]) -> Iterator[Record | Rejection]:
    """The images ``names`` of one split with all their captions (five each in the original)."""
    for name in names:
        texts = tuple(captions.get(name, ()))
        path = images / name
        if Path(name).name != name or not _is_plain_file(path):
            yield Rejection("missing_image", name, str(path), rows=max(1, len(texts)))
        else:
            yield Record(Path(name).stem, (path.read_bytes(),), texts, {"file": name})


def _is_plain_file(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except (OSError, ValueError):
        return False


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
        with open(path, encoding="utf-8", errors="surrogateescape", newline="\n") as stream:
            for line in stream:
                if line.strip():
                    yield line.rstrip("\r\n")
    except FileNotFoundError:
        raise PrepError(f"{path}: no such file") from None
