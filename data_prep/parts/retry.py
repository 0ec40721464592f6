"""Finds in a sealed split the rows whose download failed for reasons that can change, to try them again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from data_prep.downloading.failures import can_change
from data_prep.record import PrepError, UrlRow
from data_prep.shard_writer import REJECTED_NAME


def failed_rows(split_dir: Path) -> tuple[list[UrlRow], list[str]]:
    """The rows of a split's ``rejected.jsonl`` to download again, and the other lines of the file as they stand.

    Raises PrepError for a file that has not what is needed: of a split that was not downloaded, or by an older version.
    """
    path = split_dir / REJECTED_NAME
    rows: list[UrlRow] = []
    others: list[str] = []
    without = 0
    with open(path, encoding="utf-8") as stream:
        for number, line in enumerate(stream, start=1):
            try:
                entry = json.loads(line)
                again = entry.get("again") if can_change(entry["reason"]) else None
                if again is None:
                    without += can_change(entry["reason"])
                    others.append(line)
                else:
                    rows.append(_row(again))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise PrepError(f"{path}: line {number} is no rejected row ({error}); prepare again") from error
    if without and not rows:
        raise PrepError(
            f"{path}: {without} rows failed for reasons that can change, but their addresses are not in it; "
            "prepare the split again to have them"
        )
    return rows, others


def _row(again: dict[str, Any]) -> UrlRow:
    url, captions, extra = again["url"], again["captions"], again["extra"]
    if not isinstance(url, str) or not isinstance(extra, dict) or not all(isinstance(one, str) for one in captions):
        raise ValueError("url, captions or extra are mistyped")
    return UrlRow(int(again["row"]), url, tuple(captions), extra)
