"""Opens a file of captions in whatever form it has: a table, JSON, JSON lines, parquet, or Flickr8k's lines."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from data_prep.own_pictures.caption_rows import CaptionRow, CaptionSource, row_of
from data_prep.own_pictures.columns import Columns, choose_columns
from data_prep.own_pictures.json_forms import json_source
from data_prep.record import MissingInput, PrepError, Rejection, in_one_line
from data_prep.shard_members import IMAGE_EXTENSIONS
from data_prep.sources.flickr8k import read_flickr8k_captions
from data_prep.sources.tables import columns_of, open_bytes, open_text, read_table, suffix_of

SUFFIXES = ("csv", "tsv", "tab", "txt", "jsonl", "ndjson", "json", "parquet", "token")
_IMAGE_NAME = re.compile(rf"[^,;|\t]*\.(?:{'|'.join(IMAGE_EXTENSIONS)}|heic|avif)\"?\s*$", re.IGNORECASE)
_AFTER_IMAGE = re.compile(rf"\.(?:{'|'.join(IMAGE_EXTENSIONS)}|heic|avif)\"?\s*([,;|\t])", re.IGNORECASE)
_FLICKR8K = re.compile(r"[^\t]+#\d+\t")
_DELIMITERS = {",": "commas", ";": "semicolons", "|": "bars", "\t": "tabs"}


def open_captions(path: Path, named: list[str]) -> CaptionSource:
    """The captions in a file; ``named`` are its columns, image first, or their numbers from 1 where it has no header.

    Nothing is read but what the form is known by; raises PrepError where that can't be told.
    """
    if not path.is_file():
        found = "a folder" if path.is_dir() else "no such file"
        raise MissingInput(f"{path}: {found}, expected a file of captions ({', '.join(SUFFIXES)})")
    suffix = suffix_of(path)
    if suffix == "parquet":
        return _table(path, "parquet", ",", named)
    try:
        with open_text(path) as stream:
            line = next((line for line in iter(lambda: stream.readline(10_000), "") if line.strip()), "")
        if suffix in ("jsonl", "ndjson") or _is_object(line) and _has_more(path):
            return _table(path, "jsonl", ",", named)
        if suffix == "json" or line.lstrip()[:1] in ("[", "{"):
            return json_source(path, _read_json(path), named)
    except (OSError, EOFError, UnicodeError) as error:
        raise PrepError(f"{path}: cannot be read ({in_one_line(error)})") from error
    if not line:
        raise PrepError(f"{path}: is empty, expected captions")
    if suffix not in ("csv", "tsv", "tab") and _FLICKR8K.match(line):
        return CaptionSource(f"{path}: lines NAME#k<TAB>caption", (path,), partial(_flickr8k_rows, path))
    delimiter = _delimiter_of(line, suffix)
    return _table(path, "tsv" if delimiter == "\t" else "csv", delimiter, named)


def _delimiter_of(line: str, suffix: str) -> str:
    if suffix in ("tsv", "tab"):
        return "\t"
    after = _AFTER_IMAGE.search(line)
    return after[1] if after else max(_DELIMITERS, key=line.count)


def _table(path: Path, kind: str, delimiter: str, named: list[str]) -> CaptionSource:
    header = columns_of(path, kind, delimiter)
    own_names, told = None, ""
    if kind in ("csv", "tsv"):
        told = f", parted by {_DELIMITERS[delimiter]}" if delimiter != "," else ""
        own_names = _names_without_header(header, named)
    if own_names is not None:
        header = own_names
        columns = _columns_by_number(own_names, named, columns_of(path, kind, delimiter), path)
        told += ", no header line"
    else:
        _refuse_images(path, header)
        columns = choose_columns(header, named, path)
    wanted = list(dict.fromkeys([columns.image, *columns.captions, *([columns.split] if columns.split else [])]))

    def rows() -> Iterator[CaptionRow | Rejection]:
        read = read_table(path, wanted if kind != "jsonl" else [], own_names, kind, delimiter)
        for number, row in enumerate(read, start=1):
            place = f"row {number}"
            if isinstance(row, Rejection):
                yield replace(row, name=place)
            else:
                yield from row_of(row, columns, place)

    return CaptionSource(f"{path}{told}: {columns}", (path,), rows, path.parent, columns, tuple(header))


def _refuse_images(path: Path, header: list[str]) -> None:
    """Raise PrepError for parquet that holds the images themselves."""
    if inside := next((name for name in header if name.endswith(".bytes")), None):
        raise PrepError(
            f"{path}: column {in_one_line(inside)} holds the images themselves; run `python -m data_prep parquet "
            f"--input {path}`"
        )


def _names_without_header(first: list[str], named: list[str]) -> list[str] | None:
    """Names for the cells of a file whose first line is a row already: "1", "2", ..; None where it is a header."""
    if all(name.isdecimal() for name in named) if named else any(_IMAGE_NAME.fullmatch(cell) for cell in first):
        return [str(number) for number in range(1, len(first) + 1)]
    return None


def _columns_by_number(names: list[str], named: list[str], first: list[str], path: Path) -> Columns:
    if named:
        return choose_columns(names, named, path)
    image = next(name for name, cell in zip(names, first) if _IMAGE_NAME.fullmatch(cell))
    others = [name for name in names if name != image]
    if len(others) != 1:
        raise PrepError(
            f"{path}: no header line, and {len(others)} cells besides the image: {in_one_line(', '.join(first[:20]))}; "
            "say which cell is the image and which the caption, as --columns 1,2"
        )
    return Columns(image, (others[0],), None)


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _has_more(path: Path) -> bool:
    """Whether a file has a second line that is not blank."""
    with open_text(path) as stream:
        return sum(1 for _ in zip(filter(str.strip, stream), range(2))) == 2


def _read_json(path: Path) -> Any:
    with open_bytes(path) as stream:
        content = stream.read()
    try:
        return json.loads(content)  # UTF-8, UTF-16 and UTF-32 are told apart by it
    except (ValueError, RecursionError) as error:
        advice = "; save it again as UTF-8" if isinstance(error, UnicodeError) else ", expected a JSON file"
        raise PrepError(f"{path}: not readable as JSON ({in_one_line(error)}){advice}") from error


def _flickr8k_rows(path: Path) -> Iterator[CaptionRow | Rejection]:
    captions, problems = read_flickr8k_captions(path)
    yield from problems
    for number, (name, texts) in enumerate(captions.items(), start=1):
        yield CaptionRow(f"image {number}", name, tuple(texts))
