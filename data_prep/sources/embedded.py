"""Reads parquet files that hold the images themselves, as sets on the Hugging Face hub do."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from data_prep.record import PrepError, Record, Rejection, in_one_line
from data_prep.sources.parquet_cells import column_names, read_cells
from data_prep.sources.url_table import captions_of, extra_cells


def embedded_columns(path: Path, image: str, caption: str, further: list[str]) -> str:
    """The column of the images' bytes: ``image`` itself, or its field ``bytes``; raises PrepError where a column that
    is asked for is not there."""
    try:
        found = column_names(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise PrepError(f"{path}: cannot be read as parquet ({in_one_line(error)}); download it again") from error
    if missing := [name for name in (image, caption, *further) if name not in found]:
        shown = in_one_line(", ".join(found[:20]))
        raise PrepError(
            f"{path}: no column {', '.join(missing)}; found: {shown}; name them by --image-column, --caption-column"
        )
    return f"{image}.bytes" if f"{image}.bytes" in found else image


def embedded_records(
    files: list[Path], split: str, image: str, caption: str, further: list[str]
) -> Iterator[Record | Rejection]:
    """The rows of all files, numbered through, with the bytes of their images; unusable rows as Rejection.

    Each file is read by its own columns. ``split`` goes into the keys, so that those of two splits differ. Raises
    PrepError.
    """
    first = 0
    for path in files:
        content = embedded_columns(path, image, caption, further)
        columns = list(dict.fromkeys([content, caption, *further]))
        try:
            for number, row in enumerate(read_cells(path, columns, binary=[content]), start=first):
                yield from _row(row, f"row {number}", f"{split}_{number:09d}", content, caption, further)
        except (OSError, pyarrow.ArrowException) as error:
            raise PrepError(f"{path}: cannot be read to its end ({in_one_line(error)}); download it again") from error
        first += pyarrow.parquet.read_metadata(path).num_rows


def _row(
    row: dict[str, Any], name: str, key: str, image: str, caption: str, further: list[str]
) -> Iterator[Record | Rejection]:
    content = row[image]
    captions, problems = captions_of(row[caption], name)
    if not isinstance(content, bytes):
        reason = "missing_image" if content is None else "malformed_row"
        detail = f"the image is of type {type(content).__name__}, expected its bytes"
        yield Rejection(reason, name, detail, rows=len(captions) + len(problems))
        return
    yield from problems
    if captions:
        try:
            yield Record(key, (content,), captions, extra_cells(row, further, []))
        except UnicodeEncodeError as error:
            yield Rejection("invalid_utf8", name, ascii(error.object)[:200], rows=len(captions))
        except (ValueError, RecursionError) as error:
            yield Rejection("malformed_row", name, str(error)[:200], rows=len(captions))
