"""Reads the rows of a TSV, CSV, JSONL or parquet file, one at a time, naming every row that cannot be read."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import pyarrow
import pyarrow.parquet

from data_prep.record import PrepError, Rejection

FORMATS = ("tsv", "csv", "jsonl", "parquet")
_SUFFIXES = {"tsv": "tsv", "tab": "tsv", "csv": "csv", "jsonl": "jsonl", "ndjson": "jsonl", "parquet": "parquet"}
_MAX_CELL_BYTES = 10_000_000

Row = dict[str, Any] | Rejection


def read_table(
    path: Path, required: list[str], columns: list[str] | None = None, table_format: str | None = None
) -> Iterator[Row]:
    """Rows as dictionaries; unreadable ones as Rejection. Bytes that are no UTF-8 become lone surrogates.

    ``columns`` names the cells of a TSV or CSV without a header line. TSV cells are taken as they stand, CSV follows
    the usual quoting. Raises PrepError, before the first row, when a required column is not there.
    """
    path = Path(path)
    if not path.is_file():
        raise PrepError(f"{path}: no such file; expected a TSV, CSV, JSONL or parquet file")
    kind = table_format or _format_of(path)
    if columns is not None and kind not in ("tsv", "csv"):
        raise PrepError(f"--columns names the cells of a TSV or CSV without header; {path} is read as {kind}")
    try:
        if kind == "parquet":
            rows = _read_parquet(path, required)
        elif kind == "jsonl":
            rows = _read_jsonl(path, required)
        else:
            rows = _read_cells(path, required, columns, kind)
        yield from rows
    except (OSError, EOFError, csv.Error, pyarrow.ArrowException) as error:
        raise PrepError(f"{path}: cannot be read as {kind} ({error}); give the right --format") from error


def _format_of(path: Path) -> str:
    name = path.name.lower().removesuffix(".gz")
    suffix = name.rsplit(".", 1)[-1]
    if suffix not in _SUFFIXES:
        raise PrepError(f"{path}: suffix .{suffix} says no format; give --format {'|'.join(FORMATS)}")
    return _SUFFIXES[suffix]


def _open_text(path: Path, newline: str) -> TextIO:
    stream = gzip.open(path, "rb") if path.name.lower().endswith(".gz") else open(path, "rb")
    return io.TextIOWrapper(stream, encoding="utf-8", errors="surrogateescape", newline=newline)


def _require(path: Path, required: list[str], found: list[str], hint: str = "") -> None:
    missing = [column for column in required if column not in found]
    if missing:
        shown = ", ".join(ascii(column[:40])[1:-1] for column in found[:20])
        raise PrepError(f"{path}: no column {', '.join(missing)}; found: {shown or 'none'}{hint}")


def _read_cells(path: Path, required: list[str], columns: list[str] | None, kind: str) -> Iterator[Row]:
    # A TSV line ends at "\n" only: other line separators are legal in a caption.
    with _open_text(path, "\n" if kind == "tsv" else "") as stream:
        csv.field_size_limit(_MAX_CELL_BYTES)
        lines = (line.rstrip("\r\n").split("\t") for line in stream) if kind == "tsv" else csv.reader(stream)
        header = columns
        if header is None:
            header = [cell.removeprefix("\ufeff").strip() for cell in next(lines, [])]
        _require(path, required, header, "; for a file without header line name its cells by --columns")
        for number, cells in enumerate(lines, start=1 if columns else 2):
            if cells in ([], [""]):
                continue
            if len(cells) != len(header):
                detail = f"{len(cells)} cells, expected {len(header)}"
                yield Rejection("malformed_row", f"row {number}", detail)
            else:
                yield dict(zip(header, cells, strict=True))


def _read_jsonl(path: Path, required: list[str]) -> Iterator[Row]:
    checked = False
    with _open_text(path, "\n") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.removeprefix("\ufeff"))
            except (ValueError, RecursionError) as error:
                yield Rejection("malformed_row", f"row {number}", str(error))
                continue
            if not isinstance(row, dict):
                yield Rejection("malformed_row", f"row {number}", f"JSON {type(row).__name__}, expected an object")
                continue
            if not checked:
                _require(path, required, list(row))
                checked = True
            yield row


def _read_parquet(path: Path, required: list[str]) -> Iterator[Row]:
    with pyarrow.parquet.ParquetFile(path) as table:
        _require(path, required, table.schema_arrow.names)
        for batch in table.iter_batches(batch_size=1000, columns=required):
            columns = {name: _to_python(batch.column(name)) for name in required}
            for values in zip(*columns.values(), strict=True):
                yield dict(zip(columns, values, strict=True))


def _to_python(column: pyarrow.Array) -> list[Any]:
    """Values of a column; strings through bytes, since parquet files may hold strings that are no UTF-8."""
    if pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type):
        values = column.cast(pyarrow.large_binary()).to_pylist()
        return [None if value is None else value.decode("utf-8", "surrogateescape") for value in values]
    return column.to_pylist()
