"""Reads WebVid's tables (results_2M_train.csv and alike) and takes the videos that are there."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

from data_prep.annotations.files import BadEntry, file_name, is_utf8
from data_prep.image_places import is_plain_file
from data_prep.record import PrepError, Record, Rejection

COLUMNS = ("videoid", "page_dir", "name")  # those that are read; contentUrl and duration are kept where they are there
_KEPT = ("contentUrl", "duration", "page_dir")
_LONGEST_CELL = 1 << 20


def webvid_records(path: Path, folders: Sequence[Path]) -> Iterator[Record | Rejection]:
    """A record of each row whose video is at PAGE_DIR/VIDEOID.mp4 or VIDEOID.mp4 in one of ``folders``.

    Most videos can't be downloaded any more: what is missing is counted as any other row. Raises PrepError for another
    kind of table.
    """
    seen: set[str] = set()
    csv.field_size_limit(_LONGEST_CELL)
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
            table = csv.DictReader(stream)
            lacking = [name for name in COLUMNS if name not in (table.fieldnames or ())]
            if lacking:
                found = ", ".join(table.fieldnames or ())[:200] or "nothing"
                raise PrepError(f"{path}: no column {lacking[0]} (found: {found}), expected WebVid's table")
            for number, row in enumerate(table, start=1):
                yield _record(row, f"{path.name} row {number}", seen, folders)
    except FileNotFoundError:
        raise PrepError(f"{path}: no such file") from None
    except csv.Error as error:
        raise PrepError(f"{path}: not readable as CSV ({error}); download it again") from None


def _record(row: dict[str, str | None], name: str, seen: set[str], folders: Sequence[Path]) -> Record | Rejection:
    try:
        if None in row or any(row[column] is None for column in COLUMNS):
            raise BadEntry("malformed_row", "another number of cells than the table has columns")
        video_id, page = file_name(row, "videoid"), row["page_dir"] or ""
        page = file_name(row, "page_dir") if page else ""
        if video_id in seen:
            raise BadEntry("duplicate_id", f"{video_id} comes again; the earlier row counts")
        seen.add(video_id)
    except BadEntry as error:
        return Rejection(error.reason, name, error.detail)
    names = [f"{page}/{video_id}.mp4", f"{video_id}.mp4"] if page else [f"{video_id}.mp4"]
    found = next((file for folder in folders for one in names if is_plain_file(file := folder / one)), None)
    if found is None:
        return Rejection("missing_video", video_id, f"no {names[0]} in {', '.join(map(str, folders))}")
    meta = {column: row[column] for column in _KEPT if row.get(column) and is_utf8(row[column])}
    meta |= {"image_id": video_id, "image_identities": [f"webvid/{video_id}"]}
    return Record(video_id, (), (row["name"],), meta, video=found.read_bytes())
