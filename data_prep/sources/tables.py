"""Reads the rows of TSV, CSV, JSONL and parquet files, one at a time, counting every row that cannot be read."""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import pyarrow

from data_prep.record import MissingInput, PrepError, Rejection, in_one_line
from data_prep.sources.parquet_cells import column_names, pick, read_cells

FORMATS = ("tsv", "csv", "jsonl", "parquet")
_COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd", ".zstd": "zstd"}
_SUFFIXES = {"tsv": "tsv", "tab": "tsv", "csv": "csv", "jsonl": "jsonl", "ndjson": "jsonl", "parquet": "parquet"}
_MAX_CELL_BYTES = 10_000_000
NAMES_IMAGE = re.compile(r"://|\.(?:jpe?g|png|webp|gif|bmp|tiff?)\b", re.IGNORECASE)  # an address, or a file's name

Row = dict[str, Any] | Rejection


def table_files(path: Path, table_format: str | None = None) -> list[Path]:
    """The file ``path``, or the tables of the folder ``path`` in order of their names, as Spark or Hugging Face write
    them; raises PrepError where there is none."""
    expected = "expected a TSV, CSV, JSONL or parquet file, or a folder of them"
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise MissingInput(f"{path}: no such file; {expected}")
    parts = [part for part in sorted(path.iterdir()) if part.is_file() and part.name[0] not in "._"]
    files = [part for part in parts if suffix_of(part) in _SUFFIXES] or (parts if table_format else [])
    if not files:
        raise MissingInput(f"{path}: a folder without a table; {expected}")
    return files


def read_table(
    path: Path,
    required: list[str],
    columns: list[str] | None = None,
    table_format: str | None = None,
    delimiter: str = ",",
) -> Iterator[Row]:
    """Rows of a file, or of all files of a folder, as dictionaries; unreadable ones as Rejection without a name.

    Bytes that are no UTF-8 become lone surrogates. ``columns`` names the cells of a TSV or CSV without a header line.
    TSV cells are taken as they stand, or unquoted where pandas quoted them; CSV, whose cells are parted by
    ``delimiter``, follows the usual quoting. A required
    column of parquet or JSONL may be a path into nested objects, like ``image.url``. Files may be compressed by gzip,
    bzip2 or Zstandard. Raises PrepError when a required column is not there, or is there twice: before the first row,
    of JSONL after the last.
    """
    for file in table_files(Path(path), table_format):
        yield from _read_file(file, required, columns, table_format or _format_of(file), delimiter)


def _read_file(path: Path, required: list[str], columns: list[str] | None, kind: str, delimiter: str) -> Iterator[Row]:
    if columns is not None and kind not in ("tsv", "csv"):
        raise PrepError(f"--columns names the cells of a TSV or CSV without header; {path} is read as {kind}")
    try:
        if kind == "parquet":
            rows = _read_parquet(path, required)
        elif kind == "jsonl":
            rows = _read_jsonl(path, required)
        else:
            rows = _read_cells(path, required, columns, kind, delimiter)
        yield from rows
    except (OSError, EOFError, csv.Error, pyarrow.ArrowException) as error:
        raise PrepError(f"{path}: cannot be read as {kind} ({in_one_line(error)}); give the right --format") from error


def columns_of(path: Path, table_format: str, delimiter: str = ",") -> list[str]:
    """The cells of the first line of a TSV or CSV, the columns of a parquet file (nested ones by their paths too), the
    names in the first 100 objects of JSON lines; raises PrepError."""
    try:
        if table_format == "parquet":
            return column_names(path)
        if table_format == "jsonl":
            objects = (row for row in _read_jsonl(path, []) if isinstance(row, dict))
            return list(dict.fromkeys(name for row in itertools.islice(objects, 100) for name in row))
        with open_text(path, "\n" if table_format == "tsv" else "") as stream:
            lines = _tsv_lines(stream) if table_format == "tsv" else _csv_lines(stream, delimiter)
            return [cell.strip() for cell in next(lines, (0, []))[1] or ()]
    except (OSError, EOFError, csv.Error, pyarrow.ArrowException) as error:
        raise PrepError(f"{path}: cannot be read as {table_format} ({in_one_line(error)})") from error


def first_rows(path: Path, count: int) -> list[list[str]]:
    """The cells of the first lines of a TSV, at most ``count``; raises PrepError."""
    if not path.is_file():
        raise MissingInput(f"{path}: no such file; expected a TSV")
    try:
        with open_text(path, "\n") as stream:
            return [cells for _, cells in itertools.islice(_tsv_lines(stream), count)]
    except (OSError, EOFError) as error:
        raise PrepError(f"{path}: cannot be read ({in_one_line(error)}); download it again") from error


def suffix_of(path: Path) -> str:
    """What the name of a file ends with, in small letters, that of its compression left out: "csv" of a.CSV.gz."""
    name = path.name.lower()
    return next((name.removesuffix(end) for end in _COMPRESSIONS if name.endswith(end)), name).rsplit(".", 1)[-1]


def _format_of(path: Path) -> str:
    suffix = suffix_of(path)
    if suffix not in _SUFFIXES:
        raise PrepError(f"{path}: suffix .{suffix} says no format; give --format {'|'.join(FORMATS)}")
    return _SUFFIXES[suffix]


def open_bytes(path: Path) -> BinaryIO:
    """The content of a file, decompressed where the end of its name says so."""
    kind = next((kind for end, kind in _COMPRESSIONS.items() if path.name.lower().endswith(end)), None)
    if kind == "zstd":
        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
    return {"gzip": gzip.open, "bz2": bz2.open, None: open}[kind](path, "rb")


def open_text(path: Path, newline: str = "") -> TextIO:
    """A text file, decompressed where its name says so: UTF-8, or UTF-16 with its mark; other bytes become lone
    surrogates."""
    stream = open_bytes(path)
    if stream.peek(2)[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):  # Excel's "Unicode text"
        codecs.register_error("lone surrogate", lambda error: ("\udcff", error.end))
        return io.TextIOWrapper(stream, encoding="utf-16", errors="lone surrogate", newline=newline)
    return io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline=newline)


def _require(path: Path, required: list[str], found: list[str], hint: str = "") -> None:
    missing = [column for column in required if column not in found]
    if missing:
        shown = ", ".join(ascii(column[:40])[1:-1] for column in found[:20])
        raise PrepError(f"{path}: no column {', '.join(missing)}; found: {shown or 'none'}{hint}")
    if twice := next((column for column in required if found.count(column) > 1), None):
        raise PrepError(f"{path}: two columns are called {twice}; rename one of them")


def _read_cells(path: Path, required: list[str], columns: list[str] | None, kind: str, delimiter: str) -> Iterator[Row]:
    # A TSV line ends at "\n" only: other line separators are legal in a caption.
    with open_text(path, "\n" if kind == "tsv" else "") as stream:
        csv.field_size_limit(_MAX_CELL_BYTES)
        lines = _tsv_lines(stream) if kind == "tsv" else _csv_lines(stream, delimiter)
        header = columns
        if header is None:
            _, cells = next(lines, (0, []))
            header = [cell.strip() for cell in cells or ()]
        _require(path, required, header, "; for a file without header line name its cells by --columns")
        for number, cells in lines:
            if cells in ([], [""]):
                continue
            if cells is None or len(cells) != len(header):
                found = "a cell that is too long" if cells is None else f"{len(cells)} cells"
                yield Rejection("malformed_row", "", f"line {number} of {path.name}: {found}, expected {len(header)}")
            else:
                yield dict(zip(header, cells, strict=True))


def _tsv_lines(stream: TextIO) -> Iterator[tuple[int, list[str] | None]]:
    """(line number, cells) of each line.

    pandas puts a cell with quotation marks or a tab into quotation marks and doubles those inside; a cell of this
    form is read as pandas means it. Where all cells of the first line are quoted, all cells of the file are.
    """
    all_quoted = False
    for number, line in enumerate(stream, start=1):
        cells = line.rstrip("\r\n").split("\t")
        if number == 1:
            all_quoted = all(_QUOTED.fullmatch(cell) for cell in cells)
        yield number, [_unquote(cell) if all_quoted or '""' in cell else cell for cell in cells]


_QUOTED = re.compile('"(?:[^"]|"")*"')


def _unquote(cell: str) -> str:
    return cell[1:-1].replace('""', '"') if _QUOTED.fullmatch(cell) else cell


def _csv_lines(stream: TextIO, delimiter: str) -> Iterator[tuple[int, list[str] | None]]:
    """(number of the first line, cells) of each row; cells are None where one is larger than the bound.

    A row may take several lines, as a quoted cell may hold line breaks. A quotation mark too many would swallow the
    rows up to the next one; there each line is read as a row of its own.
    """
    taken: list[str] = []

    def lines() -> Iterator[str]:
        for line in stream:
            taken.append(line)
            yield line

    reader = csv.reader(lines(), strict=True, delimiter=delimiter)
    number, width = 1, 0
    while True:
        taken.clear()
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error:
            cells = None
        width = width or len(cells or ())
        if cells is not None and not _swallowed_rows(taken, width, delimiter):
            yield number, cells
        else:
            yield from ((number + offset, _lone_line(line, delimiter)) for offset, line in enumerate(taken))
        number += len(taken)


def _swallowed_rows(lines: list[str], width: int, delimiter: str) -> bool:
    """Whether what was read as one row holds further lines that look like rows with an address or an image's name."""
    return any(NAMES_IMAGE.search(line) and len(_lone_line(line, delimiter) or ()) == width for line in lines[1:])


def _lone_line(line: str, delimiter: str) -> list[str] | None:
    try:
        return next(csv.reader([line], delimiter=delimiter))
    except csv.Error:
        return None


def _read_jsonl(path: Path, required: list[str]) -> Iterator[Row]:
    found: dict[str, None] = {}
    with open_text(path, "\n") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                problem = None if isinstance(row, dict) else f"JSON {type(row).__name__}, expected an object"
            except (ValueError, RecursionError) as error:
                problem = str(error)
            if problem is None:
                found.update(dict.fromkeys(row))
                nested = {column: pick(row, column) for column in required if column not in row and "." in column}
                found.update(dict.fromkeys(column for column, value in nested.items() if value is not None))
                yield row | nested
            else:
                yield Rejection("malformed_row", "", f"line {number} of {path.name}: {problem}")
    if found:  # a file of unreadable lines is no file without columns
        _require(path, required, list(found))


def _read_parquet(path: Path, required: list[str]) -> Iterator[Row]:
    _require(path, required, column_names(path))
    yield from read_cells(path, required)
