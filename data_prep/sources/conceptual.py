"""Reads Conceptual Captions (CC3M, with or without image labels, and CC12M): TSV files without a header line."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from data_prep.record import PrepError, Rejection, UrlRow
from data_prep.sources.tables import first_rows
from data_prep.sources.url_table import url_rows

_ROWS_LOOKED_AT = 1000
_LABELS = ("labels", "mids", "confidences")  # of Google's image labels: lists with commas between


def conceptual_columns(path: Path) -> tuple[list[str] | None, list[str]]:
    """(names of the cells, or None where a header line names them; the url's and the caption's column first).

    CC3M puts the caption first, CC12M the address, and copies of both do it either way: what most of the first rows
    have in a cell decides. Raises PrepError for a file of another form.
    """
    rows = first_rows(path, _ROWS_LOOKED_AT)
    expected = "expected a caption and an address in each line, with a tab between, as in CC3M and CC12M"
    if not rows:
        raise PrepError(f"{path}: holds no line; {expected}; download it again")
    names = [cell.strip().lower() for cell in rows[0]]
    if set(names) >= {"url", "caption"} or set(names) >= {"image_url", "caption"}:
        url = "url" if "url" in names else "image_url"
        return None, [rows[0][names.index(name)].strip() for name in (url, "caption")]
    widths = [len(cells) for cells in rows]
    width = max(set(widths), key=widths.count)
    with_url = [sum(_is_url(cells[side]) for cells in rows if len(cells) == width) for side in range(min(2, width))]
    if width not in (2, 2 + len(_LABELS)) or max(with_url) == 0:
        found = f"{width} cells in most lines, {max(with_url, default=0)} of {len(rows)} with an address"
        raise PrepError(f"{path}: {found}; {expected}; for other tables use the verb urls")
    first = ["caption", "url"] if with_url[1] >= with_url[0] else ["url", "caption"]
    return [*first, *_LABELS[: width - 2]], ["url", "caption"]


def conceptual_rows(path: Path, columns: list[str] | None, url_and_caption: list[str]) -> Iterator[UrlRow | Rejection]:
    """The rows of a file with the columns that :func:`conceptual_columns` found; labels as lists in ``extra``."""
    labels = [name for name in _LABELS if name in (columns or ())]
    for row in url_rows(path, *url_and_caption, labels, [], columns, "tsv"):
        if isinstance(row, UrlRow) and labels:
            try:
                row = replace(row, extra=_label_lists(row.extra))
            except ValueError as error:
                row = Rejection("malformed_row", f"row {row.number}: {row.url[:200]}", str(error)[:200])
        yield row


def split_of_name(path: Path) -> str:
    """The split that a published file's name speaks of: train, or dev for the validation files."""
    return "dev" if "val" in path.name.lower() else "train"


def _label_lists(extra: dict[str, str]) -> dict[str, list]:
    lists = {name: [one.strip() for one in cell.split(",") if one.strip()] for name, cell in extra.items()}
    lists["confidences"] = [float(one) for one in lists["confidences"]]
    lengths = {name: len(values) for name, values in lists.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"lists of different lengths: {lengths}")
    return lists


def _is_url(cell: str) -> bool:
    return cell.strip().lower().startswith(("http://", "https://"))
